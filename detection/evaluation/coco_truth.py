"""COCO ground truth, checked and in the one shape that both engines take: what either would stumble over is named or made good here."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np

from detection.data.masks import FARTHEST_PX, is_drawable
from detection.data.run_lengths import broken_masks
from detection.evaluation.rows import Box, Id, RunLengths, check_known, name_of, read_typed
from resbackbone.errors import InputError

_logger = logging.getLogger(__name__)

IouType = Literal["bbox", "segm", "keypoints"]
KEYPOINTS = 17  # people's, whose spreads the metric is defined with


class Image(msgspec.Struct, gc=False):
    """One entry of `images`; only masks need its size."""

    id: Id
    height: int = 0
    width: int = 0


class Category(msgspec.Struct, gc=False):
    """One entry of `categories`."""

    id: Id
    name: str


class Object(msgspec.Struct, gc=False):
    """One entry of `annotations`. Without an area it has its box's; without iscrowd it is an object of its own."""

    id: Id
    image_id: Id
    category_id: Id
    bbox: Box
    area: float | None = None
    iscrowd: bool | int = 0


class MaskObject(Object, gc=False, kw_only=True):
    """With polygons [[x, y, x, y …] …] or a run-length code."""

    segmentation: list[list[float]] | RunLengths


class KeypointObject(Object, gc=False, kw_only=True):
    """With [x, y, v] × 17; num_keypoints, if left out, counts those with v > 0."""

    keypoints: list[float]
    num_keypoints: int | None = None


class _File(msgspec.Struct):
    images: list[Image]
    annotations: list[Object]
    categories: list[Category]


class _MaskFile(_File, kw_only=True):
    annotations: list[MaskObject]  # type: ignore[assignment]


class _KeypointFile(_File, kw_only=True):
    annotations: list[KeypointObject]  # type: ignore[assignment]


_KINDS: dict[IouType, type[_File]] = {"bbox": _File, "segm": _MaskFile, "keypoints": _KeypointFile}


def read_coco_truth(source: Path | dict[str, Any], iou_type: IouType, *, image_ids: Collection[int] | None = None) -> dict[str, Any]:
    """{"images", "annotations", "categories"} with just the keys that `iou_type` needs; of `image_ids` only, where given.

    Raises InputError naming the annotation for what is malformed, twice there, or points nowhere.
    """
    content = read_typed(source, _KINDS[iou_type], "annotations", has_masks=iou_type == "segm")
    where = name_of(source, "annotations")
    _check_ids(content, where)
    for number, one in enumerate(content.annotations):
        _check_object(one, f"{where}, annotations[{number}] (id {one.id})")
    if iou_type == "segm":
        _check_masks(content, where)
    wanted = None if image_ids is None else set(image_ids)
    objects = [one for one in content.annotations if wanted is None or one.image_id in wanted]
    images = [one for one in content.images if wanted is None or one.id in wanted]
    return {
        "images": [{"id": one.id, "height": one.height, "width": one.width} for one in images],
        "categories": [{"id": one.id, "name": one.name} for one in sorted(content.categories, key=lambda one: one.id)],
        "annotations": [_as_dict(one) for one in objects],
    }


def _check_ids(content: _File, where: str) -> None:
    for what in ("images", "annotations", "categories"):
        (number, times), *_ = Counter(one.id for one in getattr(content, what)).most_common(1) or [(0, 0)]
        if times > 1:
            raise InputError(f"{where}: {times} {what} have the id {number}; number them apart")
    if any(one.id == 0 for one in content.annotations):
        _logger.warning("%s: annotation 0 never counts as found, for COCO's own tool neither; number annotations from 1", where)
    for key, what in (("image_id", "images"), ("category_id", "categories")):
        values = np.array([getattr(one, key) for one in content.annotations], dtype=np.int64)
        check_known(values, sorted(one.id for one in getattr(content, what)), f"{where}: `annotations` name in {key} what `{what}` lacks:")


def _check_object(one: Object, where: str) -> None:
    if not np.isfinite((*one.bbox, one.area or 0.0)).all():
        raise InputError(f"{where}: bbox {list(one.bbox)}, area {one.area}: not finite numbers; correct or delete it")
    if isinstance(one, KeypointObject):
        if len(one.keypoints) != 3 * KEYPOINTS:
            words = f"{len(one.keypoints)} numbers in keypoints; COCO's measure is defined for {KEYPOINTS} points [x, y, v]"
            raise InputError(f"{where}: {words}")
        _check_coordinates(one.keypoints, f"{where}, keypoints")
    if isinstance(one, MaskObject) and isinstance(one.segmentation, list):
        polygons = segmentation_of(one.segmentation)
        if not polygons:
            raise InputError(f"{where}: no polygon of three corners or more, and no run-length code, in segmentation")
        for polygon in polygons:
            _check_coordinates(polygon, f"{where}, segmentation")


def _check_coordinates(numbers: list[float], where: str) -> None:
    # With NaN or 10^9 among them pycocotools loops or writes beyond its memory, and hotcoco gives figures of its own.
    if not is_drawable(numbers):
        wrong = next(number for number in numbers if not is_drawable((number,)))
        raise InputError(f"{where}: {wrong} is no coordinate; write finite pixels within ±{FARTHEST_PX:,.0f}, or delete the annotation")


def _check_masks(content: _File, where: str) -> None:
    sizes = {image.id: (image.height, image.width) for image in content.images}
    unsized = next((number for number, size in sizes.items() if min(size) < 1), None)
    if unsized is not None:
        raise InputError(f"{where}, image {unsized}: no height and width, which masks need")
    coded = [(n, one.image_id, one.segmentation) for n, one in enumerate(content.annotations) if isinstance(one, MaskObject)]
    check_run_lengths([row for row in coded if isinstance(row[2], RunLengths)], sizes, lambda n: f"{where}, annotations[{n}]")  # type: ignore[misc]


def check_run_lengths(rows: list[tuple[int, int, RunLengths]], sizes: dict[int, tuple[int, int]], name: Any) -> None:
    """Refuse masks of (row number, image id, code) that are not of their image's size or do not add up to it; name(row) says where."""
    for number, image_id, code in rows:
        if tuple(code.size) != sizes[image_id]:
            raise InputError(
                f"{name(number)}: the mask is of size {list(code.size)}, image {image_id} of {list(sizes[image_id])} (height, width)"
            )
        if isinstance(code.counts, list) and (min(code.counts, default=0) < 0 or sum(code.counts) != code.size[0] * code.size[1]):
            raise InputError(f"{name(number)}: the mask's run lengths do not add up to its {code.size[0]} × {code.size[1]} pixels")
    packed = [(number, code) for number, _, code in rows if isinstance(code.counts, str)]
    pixels = np.array([code.size[0] * code.size[1] for _, code in packed], dtype=np.int64)
    broken = broken_masks([str(code.counts) for _, code in packed], pixels)
    if len(broken):
        raise InputError(f"{name(packed[broken[0]][0])}: the mask's counts are no run-length code of its size ({len(broken)} such masks)")


def segmentation_of(value: list[list[float]] | RunLengths) -> Any:
    """As the engines take it; what encloses nothing is left out, as in training (COCO's tools take four numbers for a box)."""
    if isinstance(value, list):
        return [polygon for polygon in value if len(polygon) >= 6 and len(polygon) % 2 == 0]
    if isinstance(value.counts, str):
        return {"size": list(value.size), "counts": value.counts}
    from pycocotools import mask as coco_mask

    height, width = value.size
    code = coco_mask.frPyObjects({"size": [height, width], "counts": value.counts}, height, width)
    return {"size": [height, width], "counts": code["counts"].decode("ascii")}


def _as_dict(one: Object) -> dict[str, Any]:
    row: dict[str, Any] = {
        "id": one.id,
        "image_id": one.image_id,
        "category_id": one.category_id,
        "bbox": list(one.bbox),
        "area": one.bbox[2] * one.bbox[3] if one.area is None else one.area,
        "iscrowd": int(one.iscrowd),
    }
    if isinstance(one, MaskObject):
        row["segmentation"] = segmentation_of(one.segmentation)
    if isinstance(one, KeypointObject):
        visible = sum(v > 0 for v in one.keypoints[2::3])
        row |= {"keypoints": one.keypoints, "num_keypoints": visible if one.num_keypoints is None else one.num_keypoints}
    return row
