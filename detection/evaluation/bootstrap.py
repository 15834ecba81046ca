"""How sure the difference between two detectors is: the paired bootstrap over images (Efron & Tibshirani 1993, §6; Koehn 2004).

Images are drawn with replacement, as many as there are, and both detectors are judged on the same draw; the spread of the figures over many
draws is what another test set of this size would give. An image drawn twice counts twice, with its objects and its detections; that
lifts AP a little on average, so intervals are of the draws less this common shift.

    first, second = (coco_verdicts(truth, rows) for rows in (one, other))
    paired_bootstrap(first, second).difference      # Interval(value=0.032, low=0.011, high=0.052)

It says nothing about another seed of training: for that, train several.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from detection.evaluation.coco import evaluate_coco_fully
from detection.evaluation.coco_matching import IOUS, RECALLS, CocoArrays, coco_arrays, match
from detection.evaluation.voc import VocTruth, judge_voc
from resbackbone.errors import InputError

Metric = Literal["coco", "area", "11-point"]
AT_ONCE = 100  # draws judged together, to keep the memory small
WORK = 3_000_000_000  # detections times draws, over classes and IoUs: 15 seconds of one core for val2017, and 1000 draws
LEAST_DRAWS = 200  # fewer say little about the ends of an interval
LEAST_IMAGES = 5  # with objects of a class, for an interval of its own: draws of fewer are the same one or two images again and again


@dataclass(frozen=True, kw_only=True)
class ClassVerdicts:
    """One class at one IoU. image: (D,) position of each detection's image, best score first, ignored ones left out; is_true: (D,)
    bool; objects: (I,) how many objects of the class each image has, one array for all IoUs.
    """

    image: np.ndarray
    is_true: np.ndarray
    objects: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Verdicts:
    """A detector's verdicts: one entry a class and IoU; the figure is the mean of their APs by `metric`, of those with objects."""

    metric: Metric
    entries: tuple[ClassVerdicts, ...]

    @property
    def images(self) -> int:
        """How many images were judged."""
        return len(self.entries[0].objects) if self.entries else 0


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A figure and between what it lies: within 0 … 1, or -1 … 1 for a difference."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two detectors on the same images; difference is second - first; share_better: of draws with it above 0, equals counted half."""

    first: Interval
    second: Interval
    difference: Interval
    share_better: float


def coco_verdicts(
    ground_truth: Path | dict[str, Any],
    detections: Path | list[dict[str, Any]],
    *,
    ious: Sequence[float] = tuple(IOUS),
    image_ids: Collection[int] | None = None,
) -> Verdicts:
    """Verdicts whose mean is COCO's AP of boxes; of `ious` [0.5] alone its AP50. Raises InputError as `evaluate_coco` does."""
    evaluation = evaluate_coco_fully(ground_truth, detections, image_ids=image_ids)
    return verdicts_of(coco_arrays(evaluation.truth, evaluation.numbers), ious=ious)


def verdicts_of(arrays: CocoArrays, *, ious: Sequence[float] = tuple(IOUS)) -> Verdicts:
    """The same for arrays that are there already."""
    entries, classes = [], len(arrays.category_ids)
    counted = ~arrays.object_crowd
    images_of = _by_label(arrays.object_image[counted], arrays.object_label[counted], classes)
    objects = [np.bincount(images, minlength=len(arrays.image_ids)) for images in images_of]
    for iou in ious:
        found = match(arrays, iou=iou)
        is_ignored = np.zeros(len(found), dtype=bool)
        is_ignored[found >= 0] = arrays.object_crowd[found[found >= 0]]
        labels = arrays.label[~is_ignored]
        images, is_true = (_by_label(values[~is_ignored], labels, classes) for values in (arrays.image, found >= 0))
        entries += [ClassVerdicts(image=images[label], is_true=is_true[label], objects=objects[label]) for label in range(classes)]
    return Verdicts(metric="coco", entries=tuple(entries))


def _by_label(values: np.ndarray, labels: np.ndarray, count: int) -> list[np.ndarray]:
    """`values` (D,) of each label 0 … count - 1, in their order."""
    order = np.argsort(labels, kind="stable")
    return np.split(values[order], np.searchsorted(labels[order], np.arange(1, count)))


def voc_verdicts(
    truth: VocTruth, detections: Path | Sequence[dict[str, Any]], *, iou: float = 0.5, metric: Literal["area", "11-point"] = "area"
) -> Verdicts:
    """Verdicts whose mean is VOC's mAP. Raises InputError as `evaluate_voc` does."""
    judged = judge_voc(truth, detections, iou=iou)
    entries = []
    for label in range(len(truth.classes)):
        chosen = (judged.labels == label) & (judged.is_true | judged.is_false)
        counted = truth.image_of[(truth.labels == label) & ~truth.difficult]
        objects = np.bincount(counted, minlength=len(truth.image_ids))
        entries.append(ClassVerdicts(image=judged.image_of[chosen], is_true=judged.is_true[chosen], objects=objects))
    return Verdicts(metric=metric, entries=tuple(entries))


def paired_bootstrap(first: Verdicts, second: Verdicts, *, resamples: int = 1000, seed: int = 0, level: float = 0.95) -> Comparison:
    """Percentile intervals that hold `level` of the draws. Raises InputError unless the two were judged on the same two images or more."""
    if first.images != second.images or first.metric != second.metric or first.images < 2:
        raise InputError(
            f"runs on {first.images} images by the metric {first.metric} and on {second.images} by {second.metric} can't be compared; "
            "judge both on the same images, at least two"
        )
    times = draws(first.images, resamples=resamples, seed=seed)
    return compare_aps(class_aps(first, times), class_aps(second, times), level=level)


def draws(images: int, *, resamples: int, seed: int = 0) -> np.ndarray:
    """(1 + resamples, images) int16: how often each image is drawn; the first row is every image once, the data set itself."""
    draw, times = np.random.default_rng(seed), np.ones((1 + resamples, images), dtype=np.int16)  # int16: most of the time is reading them
    for row in times[1:]:
        row[:] = np.bincount(draw.integers(0, max(images, 1), images), minlength=images)
    return times


def images_with_objects(verdicts: Verdicts) -> np.ndarray:
    """(E,) in how many images each entry has objects."""
    return np.array([np.count_nonzero(entry.objects) for entry in verdicts.entries], dtype=np.int64)


def affordable_draws(verdicts: Verdicts, *, most: int = 1000) -> int:
    """`most`, or fewer where so many would take minutes: COCO's val2017 with its 100 detections an image. At least LEAST_DRAWS."""
    rows = sum(len(entry.image) for entry in verdicts.entries)
    return max(min(most, LEAST_DRAWS), min(most, WORK // max(rows, 1)))


def class_aps(verdicts: Verdicts, times: np.ndarray) -> np.ndarray:
    """(E, N) AP of each entry where image i counts times[n, i] times, times: (N, images) whole numbers; NaN where no object is left."""
    aps = np.zeros((len(verdicts.entries), len(times)))
    objects = {id(entry.objects): entry.objects for entry in verdicts.entries}  # a class's are the same at every IoU
    for start in range(0, len(times), AT_ONCE):
        part = times[start : start + AT_ONCE]
        exact = part.astype(np.float64)  # whole numbers far below 2^53, and BLAS has no product of integers
        totals = {key: (exact @ counts).astype(np.int64) for key, counts in objects.items()}
        for row, entry in zip(aps, verdicts.entries, strict=True):
            row[start : start + AT_ONCE] = _aps(entry, part, totals[id(entry.objects)], verdicts.metric)
    return aps


def compare_aps(first: np.ndarray, second: np.ndarray, *, level: float = 0.95) -> Comparison:
    """The comparison of what `class_aps` gave for two runs and the same `draws`: of all entries, or of some rows of both."""
    one, other = _means(first), _means(second)
    (before, _), (after, _) = (interval_of(values, level, least=0.0) for values in (one, other))
    difference, share_better = interval_of(other - one, level)
    return Comparison(first=before, second=after, difference=difference, share_better=share_better)


def interval_of(values: np.ndarray, level: float = 0.95, *, least: float = -1.0) -> tuple[Interval, float]:
    """Between what the figure values[0] lies, from its draws values[1:]; and the share of draws above 0, equals counted half.

    Draws without a figure (NaN: no object is among their images) tell nothing and are left out. least: the lowest the figure can be, -1
    for a difference and 0 for a figure; the highest is 1.

    The draws are moved by what they lie above the figure on average: a draw, with images more than once, has a higher AP than a new
    test set. Without that, 95 % intervals of one detector's AP held the truth in some 70 % of simulations.
    """
    drawn = values[1:][~np.isnan(values[1:])]
    if not len(drawn):
        return Interval(value=float(values[0]), low=float(values[0]), high=float(values[0])), 0.5
    drawn = drawn - (drawn.mean() - values[0])
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2]).clip(least, 1.0)
    share = np.mean((drawn > 0) + 0.5 * (drawn == 0))
    return Interval(value=float(values[0]), low=float(low), high=float(high)), float(share)


def mean_ap(verdicts: Verdicts, times: np.ndarray) -> float:
    """The figure with image i counted times[i] times, (images,) whole numbers; 0 where no object is left."""
    return float(mean_aps(verdicts, times[None])[0])


def mean_aps(verdicts: Verdicts, times: np.ndarray) -> np.ndarray:
    """(N,) the same for each row of times, (N, images)."""
    return np.nan_to_num(_means(class_aps(verdicts, times)))


def _means(aps: np.ndarray) -> np.ndarray:
    """(N,) mean over the entries that have objects, as COCO and VOC take it; NaN where none has."""
    is_there = ~np.isnan(aps)
    counts = is_there.sum(axis=0)
    return np.where(counts > 0, np.where(is_there, aps, 0.0).sum(axis=0) / np.maximum(counts, 1), np.nan)


def _aps(entry: ClassVerdicts, times: np.ndarray, objects: np.ndarray, metric: Metric) -> np.ndarray:
    """(N,) AP of one entry for each row of times, with (N,) objects in all."""
    hits = np.flatnonzero(entry.is_true)
    aps = np.where(objects > 0, 0.0, np.nan)
    if not len(hits):
        return aps
    # Only at right ones does recall grow, and between the copies of one the precision only rises: these points are the whole curve.
    until = times[:, entry.image[: hits[-1] + 1]]
    seen = np.cumsum(np.add.reduceat(until, np.append(0, hits[:-1] + 1), axis=1, dtype=np.int64), axis=1)
    right = np.cumsum(times[:, entry.image[hits]], axis=1, dtype=np.int64)
    precision = np.maximum.accumulate((right / np.maximum(seen, 1))[:, ::-1], axis=1)[:, ::-1]
    total = np.maximum(objects, 1)[:, None]
    if metric == "area":
        reached = right / total
    elif metric == "11-point":
        reached = (10 * right // total + 1) / 11
    else:
        reached = np.searchsorted(RECALLS, right / total, side="right") / len(RECALLS)
    return aps + (np.diff(reached, axis=1, prepend=0.0) * precision).sum(axis=1)
