"""Figures behind the figures: precision-recall curves, AP against the size of objects, one operating point, who is taken for whom."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import numpy as np

from detection.evaluation.coco_matching import CocoArrays, match, precision_at_recalls
from detection.evaluation.report.errors import IGNORED, IOU, RIGHT, Errors

# Square roots of areas in pixels; COCO's own borders 32 and 96 are among them.
SIZE_BORDERS = (0, 16, 32, 48, 64, 96, 128, 192, 256, 384, 100_000)
THRESHOLDS = np.linspace(0.0, 1.0, 101)


def precision_recall(precision: np.ndarray) -> np.ndarray:
    """(3, 101, K) precision at recall 0, 0.01 … 1 for IoU 0.5, 0.75 and the mean over 0.5 … 0.95; NaN for classes without objects.

    precision: (T, R, K, A, M), as a `CocoEvaluation` has it.
    """
    curves = precision[:, :, :, 0, -1]
    curves = np.where(curves > -1, curves, np.nan)
    return np.stack([curves[0], curves[5], curves.mean(axis=0)])


def size_curve(arrays: CocoArrays, borders: tuple[int, ...] = SIZE_BORDERS) -> tuple[np.ndarray, np.ndarray]:
    """(AP50, number of objects) of objects between neighbouring borders, (S, K) each; NaN where there are none.

    COCO's rule for its three sizes: objects outside are neither right nor wrong, nor are detections outside that found nothing.
    """
    classes, area = len(arrays.category_ids), arrays.box[:, 2] * arrays.box[:, 3]
    aps, counts = np.full((len(borders) - 1, classes), np.nan), np.zeros((len(borders) - 1, classes), dtype=np.int64)
    for row, (low, high) in enumerate(pairwise(borders)):
        ignored = arrays.object_crowd | (arrays.object_area < low**2) | (arrays.object_area > high**2)
        counts[row] = np.bincount(arrays.object_label[~ignored], minlength=classes)
        found = match(arrays, iou=IOU, ignored=ignored)
        is_true = (found >= 0) & ~np.append(ignored, False)[found]
        is_false = (found < 0) & (area >= low**2) & (area <= high**2)
        for label in np.flatnonzero(counts[row]):
            chosen = (arrays.label == label) & (is_true | is_false)
            aps[row, label] = precision_at_recalls(is_true[chosen], objects=int(counts[row, label])).mean()
    return aps, counts


def best_threshold(arrays: CocoArrays, errors: Errors) -> float:
    """The score at which F1 of all detections of at least it, over all classes at IoU 0.5, is highest; 0.5 without a right one."""
    shown = np.flatnonzero(errors.kind != IGNORED)
    right = np.cumsum(errors.kind[shown] == RIGHT)
    if not len(shown) or not right[-1]:
        return 0.5
    f1 = 2 * right / (np.arange(1, len(shown) + 1) + (~arrays.object_crowd).sum())
    scores = arrays.score[shown]
    is_last = np.append(scores[1:] < scores[:-1], True)  # a threshold takes all of one score
    return float(scores[np.argmax(np.where(is_last, f1, -1.0))])


def confusions(arrays: CocoArrays, errors: Errors, *, threshold: float) -> dict[tuple[int, int], int]:
    """How often an object of one class was taken for another by detections of at least `threshold`, {(object, detection): times}.

    Right detections have their objects; each other one, surest first, takes the free object it overlaps most, if by half. K stands for
    nothing: (label, K) is an object not found, (K, label) a detection where no free object is. Crowds and what lies in them are left out.
    """
    nothing, is_sure = len(arrays.category_ids), arrays.score >= threshold
    is_right = is_sure & (errors.kind == RIGHT)
    is_taken = arrays.object_crowd.copy()
    is_taken[errors.target[is_right]] = True
    table = Counter((label, label) for label in arrays.label[is_right].tolist())
    near = np.flatnonzero((arrays.pair_iou >= IOU) & (is_sure & ~is_right & (errors.kind != IGNORED))[arrays.pair_detection])
    near = near[np.lexsort((-arrays.pair_iou[near], arrays.pair_detection[near]))]
    seen = set()
    for one, wanted in zip(arrays.pair_detection[near].tolist(), arrays.pair_object[near].tolist(), strict=True):
        if one not in seen and not is_taken[wanted]:
            seen.add(one)
            is_taken[wanted] = True
            table[int(arrays.object_label[wanted]), int(arrays.label[one])] += 1
    strays = np.flatnonzero(is_sure & ~is_right & (errors.kind != IGNORED))
    table.update((nothing, label) for one, label in zip(strays.tolist(), arrays.label[strays].tolist(), strict=True) if one not in seen)
    table.update((label, nothing) for label in arrays.object_label[~is_taken].tolist())
    return dict(table)
