"""PASCAL VOC's average precision, by the rules of its devkit (Everingham et al. 2010, §4.2).

Detections of a class, best first; each takes the object of that class and image it overlaps most (IoU counted in whole pixels, +1).
Below the threshold, or an object already found: false. A difficult object: neither right nor wrong, and not in the denominator.
G objects, D detections, P pairs of a detection and an object of its class and image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from detection.evaluation.rows import VocRow, check_finite, check_known, name_of, read_rows
from resbackbone.errors import InputError


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
    """One class: both APs, -1 where it has no object that counts, and the counts behind them."""

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
        return float(np.mean(values)) if values else -1.0


@dataclass(frozen=True, kw_only=True)
class JudgedDetections:
    """All detections, best score first, (D,) each: index of the image, of the class, and whether right or wrong; neither: ignored."""

    image_of: np.ndarray
    labels: np.ndarray
    is_true: np.ndarray
    is_false: np.ndarray


def evaluate_voc(truth: VocTruth, detections: Path | Sequence[dict[str, Any]], *, iou: float = 0.5) -> VocResult:
    """Both APs of every class. detections: rows {image_id, category, score, bbox} in VOC's pixels. Raises InputError, naming the row."""
    judged = judge_voc(truth, detections, iou=iou)
    results = {}
    for label, name in enumerate(truth.classes):
        chosen, counts = judged.labels == label, ~truth.difficult[truth.labels == label]
        results[name] = _class_result(judged.is_true[chosen], judged.is_false[chosen], objects=int(counts.sum()))
    return VocResult(iou=iou, classes=results)


def judge_voc(truth: VocTruth, detections: Path | Sequence[dict[str, Any]], *, iou: float = 0.5) -> JudgedDetections:
    """The verdicts behind `evaluate_voc`. Raises InputError for a threshold outside (0, 1], too."""
    if not 0 < iou <= 1:  # NaN, too
        hint = f" did you mean {iou / 100:g}?" if 1 < iou <= 100 else ""
        raise InputError(f"--iou {iou:g}: a threshold of IoU lies above 0 and is at most 1;{hint} give one of these, such as 0.5")
    rows, where = read_rows(detections, VocRow), name_of(detections, "detections")
    images, classes = np.array([str(row.image_id) for row in rows], dtype=str), np.array([row.category for row in rows], dtype=str)
    check_known(images, truth.image_ids, f"{where}: the image set has no image", "; is this the right --image-set?")
    check_known(classes, truth.classes, f"{where}: there is no class")
    image_number, label_number = _numbers(truth.image_ids), _numbers(truth.classes)
    image_of = np.array([image_number[name] for name in images.tolist()], dtype=np.int64)
    labels = np.array([label_number[name] for name in classes.tolist()], dtype=np.int64)
    numbers = np.array([(row.score, *row.bbox) for row in rows], dtype=np.float64).reshape(-1, 5)
    check_finite(rows, numbers, where)
    order = np.argsort(-numbers[:, 0], kind="stable")  # equal scores keep the file's order
    boxes, labels, image_of = numbers[order, 1:], labels[order], image_of[order]
    best, overlap = best_objects(truth, image_of * len(truth.classes) + labels, boxes)
    is_true, is_false = _judge(best, overlap >= iou, truth.difficult)
    return JudgedDetections(image_of=image_of, labels=labels, is_true=is_true, is_false=is_false)


def best_objects(truth: VocTruth, keys: np.ndarray, boxes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For boxes (D, 4) of image × classes + label = keys (D,): the object each overlaps most, -1 for none, and that overlap, (D,) each.

    Of equal overlaps the object listed first wins.
    """
    object_keys = truth.image_of * len(truth.classes) + truth.labels
    by_key = np.argsort(object_keys, kind="stable")
    first, last = (np.searchsorted(object_keys[by_key], keys, side=side) for side in ("left", "right"))
    counts = last - first
    pair_box = np.repeat(np.arange(len(keys)), counts)
    pair_object = by_key[np.repeat(first - np.cumsum(counts) + counts, counts) + np.arange(len(pair_box))]
    overlaps_P = pixel_iou(boxes[pair_box], truth.boxes[pair_object])
    best, overlap = np.full(len(keys), -1), np.zeros(len(keys))
    np.maximum.at(overlap, pair_box, overlaps_P)
    is_best = np.flatnonzero(overlaps_P == overlap[pair_box])
    boxes_there, first_of_box = np.unique(pair_box[is_best], return_index=True)
    best[boxes_there] = pair_object[is_best[first_of_box]]
    return best, overlap


def pixel_iou(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """(P,) IoU of (P, 4) with (P, 4), where a box from pixel 3 to pixel 5 is 3 wide, as the devkit counts."""
    low, high = np.maximum(boxes[:, :2], others[:, :2]), np.minimum(boxes[:, 2:], others[:, 2:])
    intersection = (high - low + 1).clip(min=0).prod(axis=1)
    areas = sum((one[:, 2:] - one[:, :2] + 1).clip(min=0).prod(axis=1) for one in (boxes, others))
    return intersection / np.maximum(areas - intersection, np.finfo(np.float64).tiny)


def ap_11_point(true_sum: np.ndarray, precision: np.ndarray, *, objects: int) -> float:
    """VOC 2007: the mean over recall 0, 0.1 … 1 of the best precision at that recall or beyond. true_sum: right ones so far, (D,)."""
    # In whole numbers: true_sum / objects >= step / 10 hangs on how two quotients round.
    best = [precision[10 * true_sum >= step * objects].max(initial=0.0) for step in range(11)]
    return float(np.mean(best))


def ap_area(recall: np.ndarray, precision: np.ndarray) -> float:
    """VOC 2010 on: the area under the precision curve made monotone."""
    recall = np.concatenate(([0.0], recall, [1.0]))
    precision = np.concatenate(([0.0], precision, [0.0]))
    precision = np.maximum.accumulate(precision[::-1])[::-1]
    steps = np.flatnonzero(recall[1:] != recall[:-1])
    return float(np.sum((recall[steps + 1] - recall[steps]) * precision[steps + 1]))


def format_voc(figures: dict[str, float], *, iou: float = 0.5) -> str:
    """A table of the named figures: per class 11-point and area AP and COCO's AP, then the means; "-" for a class without objects.

    Raises InputError for the figures of data that is not VOC's.
    """
    if "mAP" not in figures:
        raise InputError("this data is not VOC's, so it has no VOC figures; tools/eval_coco.py prints COCO's")
    lines = [f"{'class':<16} {'11-point':>10} {'area':>10} {'COCO AP':>10}"]
    for name in (key.removeprefix("VOC/") for key in figures if key.startswith("VOC/")):
        lines.append(f"{name:<16}" + _cells(figures[f"VOC_11_point/{name}"], figures[f"VOC/{name}"], figures[f"AP/{name}"]))
    lines.append(f"{'mean':<16}" + _cells(figures["mAP_11_point"], figures["mAP"], figures["AP"]))
    return "\n".join([*lines, f"(11-point and area: IoU {iou:.2f}, difficult objects left out; COCO AP: mean over IoU 0.50 to 0.95)"])


def _cells(*values: float) -> str:
    return "".join(f" {value:>10.6f}" if value >= 0 else f" {'-':>10}" for value in values)


def _numbers(names: Sequence[str]) -> dict[str, int]:
    return {name: number for number, name in enumerate(names)}


def _judge(best: np.ndarray, is_hit: np.ndarray, difficult: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which detections, best score first, are right and which wrong: (D,) bool each; the rest met a difficult object."""
    hits = np.flatnonzero(is_hit & (best >= 0))
    is_difficult = difficult[best[hits]]
    claims = hits[~is_difficult]
    _, first = np.unique(best[claims], return_index=True)
    is_true, is_false = np.zeros(len(best), dtype=bool), np.ones(len(best), dtype=bool)
    is_true[claims[first]] = True
    is_false[claims[first]] = is_false[hits[is_difficult]] = False
    return is_true, is_false


def _class_result(is_true: np.ndarray, is_false: np.ndarray, *, objects: int) -> ClassResult:
    true_sum, false_sum = is_true.cumsum(), is_false.cumsum()
    precision = true_sum / np.maximum(true_sum + false_sum, 1)
    right, wrong = int(is_true.sum()), int(is_false.sum())
    return ClassResult(
        ap_11_point=ap_11_point(true_sum, precision, objects=objects) if objects else -1.0,
        ap_area=ap_area(true_sum / objects, precision) if objects else -1.0,
        objects=objects,
        detections=len(is_true),
        true_positives=right,
        false_positives=wrong,
        ignored=len(is_true) - right - wrong,
    )
