"""Which images a report shows, and what is drawn on them."""

from __future__ import annotations

import base64
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np

from detection.data.images import resize_image
from detection.evaluation.coco_matching import CocoArrays
from detection.evaluation.report.errors import IGNORED, MISSED, RIGHT, Errors
from resbackbone.errors import InputError

SIDE_PX = 360  # the longer side of a thumbnail
JPEG_QUALITY = 72
MOST_IMAGES = 240
MOST_BYTES = 10_000_000  # of thumbnails; images after that are drawn without
MOST_WRONG = 60  # boxes of an image, the surest; right ones are always there, as without them their objects would look not found
LEAST_SCORE = 0.05  # where the page's slider begins, or lower if a run's working point is
DIGITS = 4  # decimals of scores on the page


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """names: file names by COCO image id; sizes: (height, width) by it, (0, 0) where unknown; read: pixels of an image, RGB uint8
    [H, W, 3], or InputError that says why not; None where there are no images.
    """

    names: dict[int, str]
    sizes: dict[int, tuple[int, int]]
    read: Callable[[int], np.ndarray] | None = None


@dataclass(frozen=True, kw_only=True)
class Tally:
    """(I,) each: right detections, wrong ones, and objects without a right one, of an image at a threshold."""

    right: np.ndarray
    wrong: np.ndarray
    unfound: np.ndarray

    @property
    def quality(self) -> np.ndarray:
        """(I,) right / (right + wrong + unfound); 1 where there was nothing to find and nothing was claimed."""
        total = self.right + self.wrong + self.unfound
        return np.where(total > 0, self.right / np.maximum(total, 1), 1.0)


def tally(arrays: CocoArrays, errors: Errors, *, threshold: float) -> Tally:
    """Counts of each image, of detections scored `threshold` or more."""
    images, is_sure = len(arrays.image_ids), arrays.score >= threshold
    right = np.bincount(arrays.image[is_sure & (errors.kind == RIGHT)], minlength=images)
    wrong = np.bincount(arrays.image[is_sure & (errors.kind >= 0)], minlength=images)
    objects = np.bincount(arrays.object_image[~arrays.object_crowd], minlength=images)
    return Tally(right=right, wrong=wrong, unfound=objects - right)


def choose_images(arrays: CocoArrays, errors: Errors, counts: Tally, *, other: Tally | None = None, most: int = MOST_IMAGES) -> np.ndarray:
    """Up to `most` image positions, worst first: half the worst, a quarter the best, the rest the surest errors of every class and kind.

    other: a second run's counts; then half are those on which the two differ most, and the others halve their parts.
    """
    if len(arrays.image_ids) <= most:
        return np.lexsort((-(counts.wrong + counts.unfound), counts.quality))
    worst = np.lexsort((-(counts.wrong + counts.unfound), counts.quality))
    best = np.lexsort((-counts.right, -counts.quality))
    whole = most if other is None else most // 2
    wanted = dict.fromkeys([*worst[: whole // 2].tolist(), *best[: whole // 4].tolist()])
    if other is not None:
        gap = np.abs(other.quality - counts.quality)
        differing = np.argsort(-gap, kind="stable")[: int((gap > 0).sum())]
        wanted |= dict.fromkeys(differing[: most // 2].tolist())
    for one in _telling(arrays, errors):
        if len(wanted) == most:
            break
        wanted[one] = None
    for one in worst.tolist():
        if len(wanted) == most:
            break
        wanted[one] = None
    return worst[np.isin(worst, list(wanted))]


def _telling(arrays: CocoArrays, errors: Errors) -> list[int]:
    """Images with the surest error of each class and kind, then those with the second, and so on; missed objects largest first."""
    classes = len(arrays.category_ids)
    wrong = np.flatnonzero(errors.kind >= 0)
    lost = np.flatnonzero(errors.missed)
    lost = lost[np.argsort(-arrays.object_area[lost], kind="stable")]
    groups = np.concatenate((errors.kind[wrong] * classes + arrays.label[wrong], MISSED * classes + arrays.object_label[lost]))
    images = np.concatenate((arrays.image[wrong], arrays.object_image[lost]))
    _, first = np.unique(groups * len(arrays.image_ids) + images, return_index=True)
    first.sort()  # an image once a group, at its surest
    order = np.argsort(groups[first], kind="stable")
    starts = np.searchsorted(groups[first][order], groups[first][order], side="left")
    turn = np.arange(len(order)) - starts
    return images[first][order][np.argsort(turn, kind="stable")].tolist()


def slider_of(thresholds: Iterable[float]) -> tuple[float, int]:
    """(lowest score, decimals) of the page's slider: LEAST_SCORE, or the lowest working point of the runs below it, rounded down.

    Without that, captions would call objects not found that are right at the working point of a detector of low scores. The lower, the
    finer: a hundredth is a large step where all scores lie below a few.
    """
    least = min(LEAST_SCORE, *thresholds)
    digits = 2 if least == LEAST_SCORE else 3 if least >= 0.01 else DIGITS
    return math.floor(least * 10**digits) / 10**digits, digits


def describe_image(arrays: CocoArrays, position: int) -> dict[str, Any]:
    """Its objects, JSON-ready: [x, y, width, height, label, is a crowd]."""
    mine = np.flatnonzero(arrays.object_image == position)
    columns = (arrays.object_box[mine].round(1).tolist(), arrays.object_label[mine].tolist(), arrays.object_crowd[mine].tolist())
    return {"objects": [[*box, label, int(crowd)] for box, label, crowd in zip(*columns, strict=True)]}


def describe_found(
    arrays: CocoArrays, errors: Errors, counts: Tally, position: int, *, slider: tuple[float, int] = (LEAST_SCORE, 2)
) -> dict[str, Any]:
    """What a run found in an image: [x, y, width, height, label, score, kind, position of its object in the image or -1], surest first.

    cut: [score, times] of wrong ones left out, so that they count, by steps of the slider; missed: the positions of objects that count as
    missed; counts: the tally; slider: see `slider_of`.
    """
    mine = np.flatnonzero((arrays.image == position) & (errors.kind != IGNORED))
    is_cut = (errors.kind[mine] != RIGHT) & (np.cumsum(errors.kind[mine] != RIGHT) > MOST_WRONG)
    cut, mine = mine[is_cut], mine[~is_cut]
    objects = np.flatnonzero(arrays.object_image == position)
    target = np.where(errors.target[mine] >= 0, np.searchsorted(objects, errors.target[mine]), -1).tolist()
    columns = (arrays.box[mine].round(1).tolist(), arrays.label[mine].tolist(), arrays.score[mine].round(DIGITS).tolist())
    return {
        "found": [
            [*box, label, score, kind, place]
            for box, label, score, kind, place in zip(*columns, errors.kind[mine].tolist(), target, strict=True)
        ],
        "cut": _score_counts(arrays.score[cut], *slider),
        "missed": np.flatnonzero(errors.missed[objects]).tolist(),
        "counts": [int(counts.right[position]), int(counts.wrong[position]), int(counts.unfound[position])],
    }


def _score_counts(scores: np.ndarray, least: float, digits: int) -> list[list[float]]:
    """[score rounded down, how many], best first, of those of at least `least`: a hundred a class in each image would be a large page."""
    steps = np.rint(scores * 10**DIGITS).astype(np.int64) // 10 ** (DIGITS - digits)  # whole numbers: 0.29 * 100 is less than 29
    values, times = np.unique(steps, return_counts=True)
    pairs = zip((values / 10**digits).tolist(), times.tolist(), strict=True)
    return [[score, count] for score, count in pairs if score >= least][::-1]


def extent(arrays: CocoArrays, position: int) -> tuple[int, int]:
    """(height, width) that holds every box of an image whose size nobody stated."""
    boxes = np.concatenate((arrays.object_box[arrays.object_image == position], arrays.box[arrays.image == position]))
    far = (boxes[:, :2] + boxes[:, 2:]).max(axis=0, initial=1)
    return int(np.ceil(far[1])), int(np.ceil(far[0]))


def thumbnail(image: np.ndarray) -> str:
    """A JPEG of at most SIDE_PX as a data URI. image: RGB uint8 [H, W, 3]."""
    scale = min(1.0, SIDE_PX / max(image.shape[:2]))
    small = resize_image(image, (max(1, round(image.shape[0] * scale)), max(1, round(image.shape[1] * scale))))
    is_encoded, data = cv2.imencode(".jpg", small[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
    assert is_encoded, small.shape
    return f"data:image/jpeg;base64,{base64.b64encode(data.tobytes()).decode('ascii')}"


def picture_of(pictures: Pictures, image_id: int) -> tuple[str, str]:
    """(data URI or "", why there is none or "")."""
    if pictures.read is None:
        return "", "no images were given"
    try:
        return thumbnail(pictures.read(image_id)), ""
    except InputError as error:
        return "", str(error)
