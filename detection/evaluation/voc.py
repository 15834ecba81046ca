"""PASCAL VOC's average precision, by the rules of its devkit (Everingham et al. 2010, §4.2).

Detections of a class, best first; each takes the object of that class and image it overlaps most (IoU counted in whole pixels, +1).
Below the threshold, or an object already found: false. A difficult object: neither right nor wrong, and not in the denominator.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from resbackbone.errors import InputError, nearest


@dataclass(frozen=True, kw_only=True)
class VocTruth:
    """Objects of a split. Boxes are (G, 4) [xmin, ymin, xmax, ymax] in VOC's pixels: from 1, both ends inside."""

    classes: tuple[str, ...]
    image_ids: tuple[str, ...]
    image_of: np.ndarray  # (G,) index into image_ids
    labels: np.ndarray  # (G,) index into classes
    boxes: np.ndarray
    difficult: np.ndarray  # (G,) bool


@dataclass(frozen=True, kw_only=True)
class ClassResult:
    """One class: both APs, and the counts behind them."""

    ap_11_point: float
    ap_area: float
    objects: int
    detections: int
    true_positives: int
    false_positives: int
    ignored: int


@dataclass(frozen=True, kw_only=True)
class VocResult:
    """All classes at one IoU threshold. Classes without an object that counts are left out of the means, as there is nothing to recall."""

    iou: float
    classes: dict[str, ClassResult]

    @property
    def map_11_point(self) -> float:
        """The mean of VOC 2007's metric."""
        return self._mean("ap_11_point")

    @property
    def map_area(self) -> float:
        """The mean of the metric of VOC 2010 and later."""
        return self._mean("ap_area")

    def _mean(self, name: str) -> float:
        values = [getattr(result, name) for result in self.classes.values() if result.objects]
        return float(np.mean(values)) if values else 0.0


def evaluate_voc(truth: VocTruth, detections: Sequence[dict[str, Any]], *, iou: float = 0.5) -> VocResult:
    """Both APs of every class. detections: rows {image_id, category, score, bbox} in VOC's pixels. Raises InputError for unknown names."""
    image_index = {name: number for number, name in enumerate(truth.image_ids)}
    by_class: dict[str, list[tuple[float, int, list[float]]]] = {name: [] for name in truth.classes}
    for number, row in enumerate(detections):
        if str(row["image_id"]) not in image_index:
            raise InputError(
                f"detection {number}: image {row['image_id']!r} is not in the image set;{nearest(row['image_id'], image_index)}"
            )
        if row["category"] not in by_class:
            raise InputError(f"detection {number}: there is no class {row['category']!r};{nearest(row['category'], by_class)}")
        by_class[row["category"]].append((float(row["score"]), image_index[str(row["image_id"])], row["bbox"]))
    results = {name: _evaluate_class(truth, label, by_class[name], iou) for label, name in enumerate(truth.classes)}
    return VocResult(iou=iou, classes=results)


def ap_11_point(recall: np.ndarray, precision: np.ndarray) -> float:
    """VOC 2007: the mean over recall 0, 0.1 … 1 of the best precision at that recall or beyond."""
    # Recall is a count over a count: comparing tenths as k / 10 is exact enough, since both sides round the same quotient.
    best = [precision[recall >= step / 10].max(initial=0.0) for step in range(11)]
    return float(np.mean(best))


def ap_area(recall: np.ndarray, precision: np.ndarray) -> float:
    """VOC 2010 on: the area under the precision curve made monotone."""
    recall = np.concatenate(([0.0], recall, [1.0]))
    precision = np.concatenate(([0.0], precision, [0.0]))
    precision = np.maximum.accumulate(precision[::-1])[::-1]
    steps = np.flatnonzero(recall[1:] != recall[:-1])
    return float(np.sum((recall[steps + 1] - recall[steps]) * precision[steps + 1]))


def _evaluate_class(truth: VocTruth, label: int, found: list[tuple[float, int, list[float]]], iou: float) -> ClassResult:
    rows = np.flatnonzero(truth.labels == label)
    objects = int((~truth.difficult[rows]).sum())
    of_image: dict[int, np.ndarray] = {}
    for image in np.unique(truth.image_of[rows]).tolist():
        of_image[image] = rows[truth.image_of[rows] == image]
    found = sorted(found, key=lambda row: -row[0])  # stable, so equal scores keep the file's order
    is_true, is_false = np.zeros(len(found)), np.zeros(len(found))
    taken: set[int] = set()
    for place, (_, image, box) in enumerate(found):
        candidates = of_image.get(image, np.zeros(0, np.int64))
        overlaps = _pixel_iou(np.asarray(box, np.float64), truth.boxes[candidates])
        best = int(overlaps.argmax()) if len(overlaps) else -1
        if best < 0 or overlaps[best] < iou:
            is_false[place] = 1
        elif truth.difficult[candidates[best]]:
            continue
        elif int(candidates[best]) in taken:
            is_false[place] = 1
        else:
            taken.add(int(candidates[best]))
            is_true[place] = 1
    true_sum, false_sum = is_true.cumsum(), is_false.cumsum()
    recall = true_sum / max(objects, 1)
    precision = true_sum / np.maximum(true_sum + false_sum, np.finfo(np.float64).eps)
    right, wrong = int(is_true.sum()), int(is_false.sum())
    return ClassResult(
        ap_11_point=ap_11_point(recall, precision),
        ap_area=ap_area(recall, precision),
        objects=objects,
        detections=len(found),
        true_positives=right,
        false_positives=wrong,
        ignored=len(found) - right - wrong,
    )


def _pixel_iou(box: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """IoU of (4,) and (G, 4) where a box from pixel 3 to pixel 5 is 3 wide, as the devkit counts."""
    low, high = np.maximum(box[:2], boxes[:, :2]), np.minimum(box[2:], boxes[:, 2:])
    intersection = (high - low + 1).clip(min=0).prod(axis=1)
    areas = (boxes[:, 2:] - boxes[:, :2] + 1).prod(axis=1) + (box[2:] - box[:2] + 1).prod()
    return intersection / (areas - intersection)


def format_voc(figures: dict[str, float]) -> str:
    """A table of the named figures: per class 11-point and area AP at IoU 0.5 and COCO's AP (IoU 0.50 … 0.95), then the means."""
    lines = [f"{'class':<16} {'11-point':>10} {'area':>10} {'COCO AP':>10}"]
    for name in (key.removeprefix("VOC/") for key in figures if key.startswith("VOC/")):
        values = (figures[f"VOC_11_point/{name}"], figures[f"VOC/{name}"], figures[f"AP/{name}"])
        lines.append(f"{name:<16}" + "".join(f" {value:>10.6f}" for value in values))
    means = (figures["mAP_11_point"], figures["mAP"], figures["AP"])
    return "\n".join([*lines, f"{'mean':<16}" + "".join(f" {value:>10.6f}" for value in means)])
