"""COCO's matching of detections to objects, as arrays: who took which object at one IoU. The figures come from coco.py's engines; this is
for what they don't tell: which error each detection is, and what resampled images would give.

I images, K classes, G objects, D detections, P pairs of a detection and an object of one image, of any classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

LEAST_IOU = 0.1  # pairs below it are no pairs; TIDE's border between a bad box and the background
MAX_DETECTIONS = 100  # of a class in an image
RECALLS = np.linspace(0.0, 1.0, 101)
IOUS = np.linspace(0.5, 0.95, 10)


@dataclass(frozen=True, kw_only=True)
class CocoArrays:
    """Objects and detections. Boxes are [x, y, width, height]; labels 0..K-1 in the order of category ids, images 0..I-1 in that of ids.

    Detections are sorted by score, best first, equal ones by image and then as they were given; those beyond the best 100 of a class in an
    image are left out. Pairs are sorted by detection, then by object; their IoU is at least LEAST_IOU, with a crowd the part inside it.
    """

    image_ids: np.ndarray  # (I,) int64
    category_ids: np.ndarray  # (K,) int64
    object_image: np.ndarray
    object_label: np.ndarray
    object_box: np.ndarray  # (G, 4)
    object_area: np.ndarray
    object_crowd: np.ndarray  # (G,) bool
    image: np.ndarray
    label: np.ndarray
    box: np.ndarray  # (D, 4)
    score: np.ndarray
    pair_detection: np.ndarray
    pair_object: np.ndarray
    pair_iou: np.ndarray


def coco_arrays(truth: dict[str, Any], numbers: np.ndarray) -> CocoArrays:
    """truth and numbers: those of a `CocoEvaluation` of boxes."""
    image_ids = np.sort(np.array([one["id"] for one in truth["images"]], dtype=np.int64))
    category_ids = np.sort(np.array([one["id"] for one in truth["categories"]], dtype=np.int64))
    objects = truth["annotations"]
    numbers = numbers.reshape(-1, 7)
    image = np.searchsorted(image_ids, numbers[:, 0].astype(np.int64))
    label = np.searchsorted(category_ids, numbers[:, 6].astype(np.int64))
    score = numbers[:, 5]
    order = np.lexsort((np.arange(len(score)), image, -score))
    order = order[_rank_within(image[order] * len(category_ids) + label[order]) < MAX_DETECTIONS]
    object_image = np.searchsorted(image_ids, np.array([one["image_id"] for one in objects], dtype=np.int64))
    object_box = np.array([one["bbox"] for one in objects], dtype=np.float64).reshape(-1, 4)
    object_crowd = np.array([one["iscrowd"] for one in objects], dtype=bool)
    box = numbers[order, 1:5]
    pairs = _pairs(image[order], box, object_image, object_box, object_crowd)
    return CocoArrays(
        image_ids=image_ids,
        category_ids=category_ids,
        object_image=object_image,
        object_label=np.searchsorted(category_ids, np.array([one["category_id"] for one in objects], dtype=np.int64)),
        object_box=object_box,
        object_area=np.array([one["area"] for one in objects], dtype=np.float64),
        object_crowd=object_crowd,
        image=image[order],
        label=label[order],
        box=box,
        score=score[order],
        pair_detection=pairs[0],
        pair_object=pairs[1],
        pair_iou=pairs[2],
    )


def match(arrays: CocoArrays, *, iou: float = 0.5, ignored: np.ndarray | None = None) -> np.ndarray:
    """(D,) the object each detection takes at `iou`, -1 for none.

    Best first, each takes the free object of its class it overlaps most (of equals the last); where it has none, an ignored one, and
    a crowd is never used up. ignored: (G,) bool, by default the crowds.
    """
    ignored = arrays.object_crowd if ignored is None else ignored
    own = arrays.label[arrays.pair_detection] == arrays.object_label[arrays.pair_object]
    chosen = np.flatnonzero(own & (arrays.pair_iou >= min(iou, 1 - 1e-10)))
    detection, objects = arrays.pair_detection[chosen], arrays.pair_object[chosen]
    order = np.lexsort((-objects, -arrays.pair_iou[chosen], ignored[objects], detection))  # each detection's first choice first
    found = np.full(len(arrays.score), -1)
    is_taken, is_crowd, served = [False] * len(arrays.object_area), arrays.object_crowd.tolist(), -1
    for one, wanted in zip(detection[order].tolist(), objects[order].tolist(), strict=True):
        if one != served and (not is_taken[wanted] or is_crowd[wanted]):
            found[one], is_taken[wanted], served = wanted, True, one
    return found


def average_precision(is_true: np.ndarray, *, objects: int) -> float:
    """COCO's AP of one class at one IoU: the mean of 101 precisions. is_true: (D,) bool, best score first, ignored ones left out."""
    return float(precision_at_recalls(is_true, objects=objects).mean())


def precision_at_recalls(is_true: np.ndarray, *, objects: int) -> np.ndarray:
    """(101,) the best precision at recall 0, 0.01 … 1 or beyond; 0 where it is not reached."""
    true_sum = np.cumsum(is_true)
    precision = true_sum / (np.arange(1, len(is_true) + 1) + np.spacing(1))
    precision = np.maximum.accumulate(precision[::-1])[::-1]
    places = np.searchsorted(true_sum / max(objects, 1), RECALLS, side="left")
    return np.append(precision, 0.0)[np.minimum(places, len(is_true))]


def _rank_within(keys: np.ndarray) -> np.ndarray:
    """(N,) how many earlier entries have the same key."""
    order = np.argsort(keys, kind="stable")
    first = np.searchsorted(keys[order], keys[order], side="left")
    rank = np.empty_like(order)
    rank[order] = np.arange(len(keys)) - first
    return rank


def _pairs(
    image: np.ndarray, box: np.ndarray, object_image: np.ndarray, object_box: np.ndarray, crowd: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(detection, object, IoU), (P,) each; by COCO's own compiled IoU, so that no border case falls on another side."""
    by_image, objects_by_image = np.argsort(image, kind="stable"), np.argsort(object_image, kind="stable")
    both = np.intersect1d(image, object_image)
    sides = ("left", "right")
    ranges = [np.searchsorted(image[by_image], both, side=side) for side in sides]  # type: ignore[call-overload]
    object_ranges = [np.searchsorted(object_image[objects_by_image], both, side=side) for side in sides]  # type: ignore[call-overload]
    found = []
    for low, high, object_low, object_high in zip(*ranges, *object_ranges, strict=True):
        mine, theirs = by_image[low:high], objects_by_image[object_low:object_high]
        iou = coco_mask.iou(box[mine], object_box[theirs], crowd[theirs].astype(np.uint8).tolist())
        row, column = np.nonzero(iou >= LEAST_IOU)
        found.append((mine[row], theirs[column], iou[row, column]))
    if not found:
        return np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0)
    detection, objects, iou = (np.concatenate(part) for part in zip(*found, strict=True))
    order = np.lexsort((objects, detection))
    return detection[order], objects[order], iou[order]
