"""Which box does a candidate (anchor or proposal) belong to, and which candidates does the loss look at.

A candidates, G boxes, I ignored regions, S samples. The rules are Ren et al. 2015, §3.1.2; the results are torchvision's Matcher's, found
in chunks that stay in the cache instead of over the whole (G, A) matrix.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from detection.boxes import intersection_over_area
from detection.waiting import is_asking_free

BELOW = -1  # overlaps no box enough: background
BETWEEN = -2  # neither object nor background: not sampled
IGNORED_FROM = 0.5  # part of a candidate inside an ignored region from which it stops being background
# Overlaps at a time: they and their temporaries fit the cache on a CPU, and a crowded image takes little more memory than a plain one: with
# up to 64 boxes 0.5 MB a temporary, with 400 boxes 3.3 MB, where all 267,069 anchors of 800×1333 pixels would take 427. Below LEAST
# candidates the calls count: with 1000 boxes 2048 at a time take 0.4 of the time of 16384, with 8 boxes more than twice as long.
CELLS = {"cpu": 1 << 17, "cuda": 1 << 26}
LEAST = 2048


def assign(candidates: Tensor, boxes: Tensor, ignored: Tensor, *, high: float, low: float, allow_low_quality: bool = False) -> Tensor:
    """`match`, and then BETWEEN for candidates that no box claims and that lie at least half inside an ignored region (I, 4)."""
    matches = match(candidates, boxes, high=high, low=low, allow_low_quality=allow_low_quality)
    if len(ignored) == 0:
        return matches
    inside = torch.cat([intersection_over_area(part, ignored).amax(dim=1) for part in candidates.split(_chunk(ignored))])
    return torch.where((matches < 0) & (inside >= IGNORED_FROM), BETWEEN, matches)


def match(
    candidates: Tensor, boxes: Tensor, *, high: float, low: float, allow_low_quality: bool = False, chunk: int | None = None
) -> Tensor:
    """(A,) int64: the index of the box each candidate overlaps most if that IoU is ≥ high, BELOW if < low, else BETWEEN.

    candidates: (A, 4); boxes: (G, 4), none being fine. allow_low_quality: the candidates with which a box has its best IoU,
    ties included, take the box they overlap most, however little that is.
    """
    if len(boxes) == 0 or len(candidates) == 0:
        return torch.full((len(candidates),), BELOW, dtype=torch.int64, device=candidates.device)
    parts = torch.stack(candidates.float().unbind(dim=1)).split(chunk or _chunk(boxes), dim=1)  # .t().contiguous() takes five times as long
    boxes = boxes.float()
    best_iou, best_box, best_of_box = zip(*(_best(_iou(boxes, part), allow_low_quality) for part in parts), strict=True)
    iou, nearest = torch.cat(best_iou), torch.cat(best_box)
    matches = torch.where(iou < low, BELOW, torch.where(iou < high, BETWEEN, nearest))
    if allow_low_quality:
        claimed = _claimed(boxes, parts, torch.stack(best_of_box))
        matches = torch.where(claimed, nearest, matches)
    return matches


def _chunk(boxes: Tensor) -> int:
    """How many candidates to hold against `boxes` (G, 4) at a time, G not being 0."""
    return max(LEAST, CELLS.get(boxes.device.type, CELLS["cuda"]) // len(boxes))


def _best(iou: Tensor, per_box: bool) -> tuple[Tensor, Tensor, Tensor]:
    value, index = iou.max(dim=0)
    return value, index, iou.amax(dim=1) if per_box else value


def _claimed(boxes: Tensor, parts: tuple[Tensor, ...], best_of_box: Tensor) -> Tensor:
    """(A,) bool: candidates with which some box has its best IoU. On a CPU each box is held only against chunks that hold its best."""
    best = best_of_box.amax(dim=0)
    if not is_asking_free(boxes):
        return torch.cat([(_iou(boxes, part) == best[:, None]).any(dim=0) for part in parts])
    holds_best = (best_of_box == best).tolist()
    claimed = []
    for part, holds in zip(parts, holds_best, strict=True):
        rows = [row for row, value in enumerate(holds) if value]
        claimed.append((_iou(boxes[rows], part) == best[rows, None]).any(dim=0))
    return torch.cat(claimed)


def _iou(boxes: Tensor, candidates: Tensor) -> Tensor:
    """(G, C) overlaps of `boxes` (G, 4) with `candidates` (4, C); torchvision's arithmetic, in as few temporaries as possible."""
    x1, y1, x2, y2 = candidates
    left, top, right, bottom = boxes.t()[:, :, None]
    width = torch.minimum(x2, right).sub_(torch.maximum(x1, left)).clamp_(min=0)
    height = torch.minimum(y2, bottom).sub_(torch.maximum(y1, top)).clamp_(min=0)
    intersection = width.mul_(height)
    union = ((right - left) * (bottom - top) + (x2 - x1) * (y2 - y1)).sub_(intersection)
    return intersection.div_(union)


@dataclass(frozen=True)
class Sample:
    """Candidates drawn for a loss: positives, then negatives, then, where asking for their number isn't free, empty places.

    index: (S,) int64, which candidate; positive, negative: (S,) bool; reserved: so many places at the front, for the positives.
    """

    index: Tensor
    positive: Tensor
    negative: Tensor
    reserved: int


def balanced_sample(matches: Tensor, *, count: int, positive_fraction: float, generator: torch.Generator | None = None) -> Sample:
    """At most `count` candidates, drawn at random: positives (match ≥ 0), at most their fraction, and negatives (BELOW).

    Negatives fill up what positives leave; generator: None is torch's global one. matches: (A,). On a CPU S is the number drawn, elsewhere
    min(count, A).
    """
    most_positive = int(count * positive_fraction)
    return (_shrunk if is_asking_free(matches) else _marked)(matches, count, most_positive, generator)


def _shrunk(matches: Tensor, count: int, most_positive: int, generator: torch.Generator | None) -> Sample:
    positive = torch.nonzero(matches >= 0).flatten()
    negative = torch.nonzero(matches == BELOW).flatten()
    num_positive = min(len(positive), most_positive)
    num_negative = min(len(negative), count - num_positive)
    index = torch.cat((_draw(positive, num_positive, generator), _draw(negative, num_negative, generator)))
    is_positive = torch.arange(len(index), device=index.device) < num_positive
    return Sample(index, is_positive, ~is_positive, num_positive)


def _draw(indices: Tensor, count: int, generator: torch.Generator | None) -> Tensor:
    order = torch.randperm(len(indices), device=indices.device, generator=generator)
    return indices[order[:count]]


def _marked(matches: Tensor, count: int, most_positive: int, generator: torch.Generator | None) -> Sample:
    """Every candidate draws a number from 0 to 1, and the highest are taken: of the positives first, then of the negatives."""
    count, most_positive = min(count, len(matches)), min(most_positive, len(matches))
    drawn = torch.rand(len(matches), device=matches.device, generator=generator)
    value, index = torch.where(matches >= 0, drawn, -1.0).topk(most_positive)
    rank = torch.where(matches == BELOW, drawn, -1.0)
    rank = rank.scatter(0, index, torch.where(value >= 0, value + 2, rank[index]))
    rank, index = rank.topk(count)
    return Sample(index, rank >= 2, (rank >= 0) & (rank < 2), most_positive)
