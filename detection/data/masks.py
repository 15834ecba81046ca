"""Object masks of a whole data set in a few flat arrays: polygons as points, run-length codes as bytes."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from .arrays import SharedArrays, offsets_of, ragged_positions, take_ragged
from .run_lengths import broken_codes

FARTHEST_PX = 1e6  # COCO's C code counts an outline's pixels, at five times the size, in 32 bits, and takes memory for each


@dataclass(frozen=True, kw_only=True, eq=False)
class PackedMasks(SharedArrays):
    """Masks of B boxes. A box has either polygons or a run-length code; the other's rows are empty.

    points: float64 [P], x and y in turn, exactly as the JSON has them; polygon_offsets: int64 [Q + 1] into points;
    box_offsets: int64 [B + 1] into polygons; rle_bytes: uint8, COCO's compressed form; rle_offsets: int64 [B + 1] into it.
    """

    points: np.ndarray
    polygon_offsets: np.ndarray
    box_offsets: np.ndarray
    rle_bytes: np.ndarray
    rle_offsets: np.ndarray

    @classmethod
    def pack(cls, segmentations: Iterable[Any]) -> PackedMasks:
        """COCO `segmentation` values (a list of polygons, or a dict with compressed `counts`), one a box -> packed."""
        points, codes = array("d"), bytearray()
        polygon_ends, box_ends, code_ends = array("q", [0]), array("q", [0]), array("q", [0])
        for one in segmentations:
            if isinstance(one, dict):
                codes += _code_bytes(one["counts"])
            else:
                for polygon in one:
                    points.extend(polygon)
                    polygon_ends.append(len(points))
            box_ends.append(len(polygon_ends) - 1)
            code_ends.append(len(codes))
        return cls(
            points=np.array(points),
            polygon_offsets=np.array(polygon_ends),
            box_offsets=np.array(box_ends),
            rle_bytes=np.frombuffer(bytes(codes), dtype=np.uint8),
            rle_offsets=np.array(code_ends),
        )

    @classmethod
    def concatenate(cls, parts: Sequence[PackedMasks]) -> PackedMasks:
        """The masks of all parts, in order."""
        return cls(
            points=np.concatenate([part.points for part in parts]),
            polygon_offsets=offsets_of(np.concatenate([np.diff(part.polygon_offsets) for part in parts])),
            box_offsets=offsets_of(np.concatenate([np.diff(part.box_offsets) for part in parts])),
            rle_bytes=np.concatenate([part.rle_bytes for part in parts]),
            rle_offsets=offsets_of(np.concatenate([np.diff(part.rle_offsets) for part in parts])),
        )

    def take(self, order: np.ndarray) -> PackedMasks:
        """The masks of boxes `order`, packed again."""
        polygon_order, box_offsets = ragged_positions(self.box_offsets, order)
        points, polygon_offsets = take_ragged(self.points, self.polygon_offsets, polygon_order)
        rle_bytes, rle_offsets = take_ragged(self.rle_bytes, self.rle_offsets, order)
        return PackedMasks(
            points=points, polygon_offsets=polygon_offsets, box_offsets=box_offsets, rle_bytes=rle_bytes, rle_offsets=rle_offsets
        )

    def broken(self, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Boxes whose run-length code isn't one of `pixels` int64 [B], its image's; and boxes with a point that is_drawable refuses."""
        coded = np.flatnonzero(np.diff(self.rle_offsets))
        ends = self.rle_offsets[np.append(coded, len(pixels))]  # between two coded boxes there are no bytes
        bad_codes = coded[broken_codes(self.rle_bytes, ends, pixels[coded])]
        # Without an array of so many absolute values where all is well; NaN makes either comparison false.
        is_near = not len(self.points) or (self.points.min() >= -FARTHEST_PX and self.points.max() <= FARTHEST_PX)
        far = np.zeros(0, np.int64) if is_near else np.flatnonzero(~(np.abs(self.points) <= FARTHEST_PX))
        polygons = np.searchsorted(self.polygon_offsets, far, side="right") - 1
        return bad_codes, np.unique(np.searchsorted(self.box_offsets, polygons, side="right") - 1)

    def without(self, boxes: np.ndarray) -> PackedMasks:
        """The same with nothing for `boxes`."""
        order = np.arange(len(self.rle_offsets) - 1)
        order[boxes] = len(order)
        return PackedMasks.concatenate([self, PackedMasks.pack([[]])]).take(order)

    def segmentation(self, index: int, height: int, width: int) -> Any:
        """Mask `index` as COCO writes it: a list of polygons, or {"size", "counts"} with the counts as text."""
        code = self.rle_bytes[self.rle_offsets[index] : self.rle_offsets[index + 1]]
        if len(code):
            return {"size": [height, width], "counts": code.tobytes().decode("ascii")}
        first, last = self.box_offsets[index], self.box_offsets[index + 1]
        ends = self.polygon_offsets[first : last + 1]
        return [self.points[a:b].tolist() for a, b in pairwise(ends.tolist())]

    def mask(self, index: int, height: int, width: int) -> np.ndarray:
        """Mask `index` drawn as pycocotools draws it: uint8 [height, width] of 0 and 1."""
        from pycocotools import mask as coco_mask

        segmentation = self.segmentation(index, height, width)
        if isinstance(segmentation, dict):
            return coco_mask.decode(segmentation)
        if not segmentation:
            return np.zeros((height, width), dtype=np.uint8)
        return coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(segmentation, height, width)))


def is_drawable(coordinates: Sequence[float]) -> bool:
    """Whether all are finite and near enough for COCO's C code, which loops or ends the process otherwise."""
    return all(-FARTHEST_PX <= number <= FARTHEST_PX for number in coordinates)  # False for NaN


def compress_counts(counts: Sequence[int], height: int, width: int) -> str:
    """An uncompressed run-length code -> COCO's compressed text."""
    from pycocotools import mask as coco_mask

    return coco_mask.frPyObjects({"size": [height, width], "counts": list(counts)}, height, width)["counts"].decode("ascii")


def _code_bytes(counts: str | bytes) -> bytes:
    return counts.encode("ascii") if isinstance(counts, str) else counts
