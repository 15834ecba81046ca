"""The truth about a whole data set in a few flat arrays, which forked or spawned workers share without copying.

I images, B boxes, K foreground classes. Boxes are xyxy float32 in pixels of the upright image; a pixel covers [x, x + 1).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from .arrays import SharedArrays, offsets_of, ragged_positions, take_ragged
from .masks import PackedMasks


@dataclass(frozen=True, kw_only=True, eq=False)
class Annotations(SharedArrays):
    """What is where in every image.

    classes: K names; category_ids: int64 [K], the source's own ids (label l in 1..K is category_ids[l - 1]); image_ids: int64 [I]
    or text [I]; name_bytes, name_offsets: packed file names; sizes: int32 [I, 2], (height, width) of the upright image;
    offsets: int64 [I + 1] into the boxes; boxes: float32 [B, 4]; labels: int64 [B] in 1..K; ignore: bool [B], crowd or difficult;
    areas: float32 [B] in pixels (COCO: of the mask); masks: packed, or None when they were not asked for.
    """

    classes: tuple[str, ...]
    category_ids: np.ndarray
    image_ids: np.ndarray
    name_bytes: np.ndarray
    name_offsets: np.ndarray
    sizes: np.ndarray
    offsets: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    ignore: np.ndarray
    areas: np.ndarray
    masks: PackedMasks | None = None

    def __len__(self) -> int:
        return len(self.image_ids)

    def of_image(self, index: int) -> slice:
        """Which boxes belong to image `index`."""
        return slice(int(self.offsets[index]), int(self.offsets[index + 1]))

    def file_name(self, index: int) -> str:
        """The image's file name, relative to the source's image folder."""
        return self.name_bytes[self.name_offsets[index] : self.name_offsets[index + 1]].tobytes().decode("utf-8")

    def image_id(self, index: int) -> int | str:
        """The source's own id of image `index`."""
        return self.image_ids[index].item()

    def label_of(self, category_id: int) -> int:
        """The label 1..K of a category id of the source; KeyError if it has none."""
        found = np.flatnonzero(self.category_ids == category_id)
        if not len(found):
            raise KeyError(category_id)
        return int(found[0]) + 1

    def mask(self, box: int, height: int, width: int) -> np.ndarray:
        """The mask of one box (its position among all boxes): uint8 [height, width] of 0 and 1."""
        if self.masks is None:
            raise ValueError("these annotations were loaded without masks; load the source with masks=True")
        return self.masks.mask(box, height, width)

    def num_objects(self) -> np.ndarray:
        """int64 [I]: the boxes of each image that training may use, i.e. neither crowd nor difficult."""
        counted = np.concatenate([np.zeros(1, np.int64), np.cumsum(~self.ignore, dtype=np.int64)])
        return counted[self.offsets[1:]] - counted[self.offsets[:-1]]

    def summary(self) -> str:
        """One line for the log: how many images, objects, ignored boxes and classes."""
        ignored = int(self.ignore.sum())
        more = f" and {ignored} to ignore" if ignored else ""
        return f"{len(self)} images, {len(self.labels) - ignored} objects{more}, {len(self.classes)} classes"

    def select(self, indices: Sequence[int] | np.ndarray) -> Annotations:
        """The same for the images `indices` only, in that order."""
        images = np.asarray(indices, dtype=np.int64)
        boxes, offsets = ragged_positions(self.offsets, images)
        names, name_offsets = take_ragged(self.name_bytes, self.name_offsets, images)
        return replace(
            self,
            image_ids=self.image_ids[images],
            name_bytes=names,
            name_offsets=name_offsets,
            sizes=self.sizes[images],
            offsets=offsets,
            boxes=self.boxes[boxes],
            labels=self.labels[boxes],
            ignore=self.ignore[boxes],
            areas=self.areas[boxes],
            masks=None if self.masks is None else self.masks.take(boxes),
        )

    def to_coco(self) -> dict[str, Any]:
        """COCO ground truth: image ids as they are if they are integers, else 1..I; `ignore` becomes iscrowd; boxes xywh."""
        integer_ids = self.image_ids.dtype.kind == "i"
        ids = self.image_ids.tolist() if integer_ids else list(range(1, len(self) + 1))
        images = [
            {"id": ids[i], "file_name": self.file_name(i), "height": int(self.sizes[i, 0]), "width": int(self.sizes[i, 1])}
            for i in range(len(self))
        ]
        categories = [{"id": int(number), "name": name} for number, name in zip(self.category_ids, self.classes, strict=True)]
        return {"images": images, "categories": categories, "annotations": self._coco_objects(ids)}

    def _coco_objects(self, ids: list[int]) -> list[dict[str, Any]]:
        image_of_box = np.repeat(np.arange(len(self)), np.diff(self.offsets)).tolist()
        boxes = self.boxes.astype(np.float64)
        boxes[:, 2:] -= boxes[:, :2]
        category = self.category_ids[self.labels - 1].tolist()
        columns = zip(image_of_box, category, boxes.tolist(), self.areas.tolist(), self.ignore.tolist(), strict=True)
        rows = [
            {"id": i + 1, "image_id": ids[image], "category_id": cat, "bbox": box, "area": area, "iscrowd": int(crowd)}
            for i, (image, cat, box, area, crowd) in enumerate(columns)
        ]
        if self.masks is not None:
            for i, image in enumerate(image_of_box):
                rows[i]["segmentation"] = self.masks.segmentation(i, *self.sizes[image].tolist())
        return rows


def assemble(
    *,
    classes: Sequence[str],
    category_ids: Sequence[int],
    image_ids: Sequence[int] | Sequence[str],
    file_names: Sequence[str],
    sizes: np.ndarray,
    image_of_box: np.ndarray,
    boxes: np.ndarray,
    labels: np.ndarray,
    ignore: np.ndarray,
    areas: np.ndarray,
    masks: PackedMasks | None = None,
) -> Annotations:
    """Box rows in any order, each naming its image by position -> `Annotations`; boxes of one image keep their order."""
    order = np.argsort(image_of_box, kind="stable")
    names = [name.encode("utf-8") for name in file_names]
    ids = np.asarray(image_ids) if len(image_ids) else np.zeros(0, np.int64)
    return Annotations(
        classes=tuple(classes),
        category_ids=np.asarray(category_ids, dtype=np.int64),
        image_ids=ids if ids.dtype.kind == "U" else ids.astype(np.int64),
        name_bytes=np.frombuffer(b"".join(names), dtype=np.uint8),
        name_offsets=offsets_of([len(name) for name in names]),
        sizes=np.asarray(sizes, dtype=np.int32).reshape(-1, 2),
        offsets=offsets_of(np.bincount(image_of_box.astype(np.int64), minlength=len(names))),
        boxes=np.asarray(boxes, dtype=np.float32).reshape(-1, 4)[order],
        labels=np.asarray(labels, dtype=np.int64)[order],
        ignore=np.asarray(ignore, dtype=bool)[order],
        areas=np.asarray(areas, dtype=np.float32)[order],
        masks=None if masks is None else masks.take(order),
    )
