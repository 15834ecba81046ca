"""Detecting with the paper's steps (He et al. 2015, appendix B): refinement, several scales, mirror images, in any combination.

What is new at test time is all here and in the files it names; training is the plain detector's. One image at a time:

    views of the image → proposals → candidates [+ candidates of the regressed boxes] → NMS [and voting] → the best
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from detection.data.images import resized_size
from detection.faster_rcnn import Encoded, FasterRCNN
from detection.multiscale import ScaledFeatures, View, interpolated, pool_two_scales, resize_to, views_of
from detection.preprocess import Size
from detection.refine import regressed, suppress_and_vote
from detection.roi_head import Pool, RoIHead, Scored
from detection.structures import Detections, Target, together


@dataclass(frozen=True, kw_only=True)
class Steps:
    """Which steps are switched on. scales: shorter sides in pixels; merge: how they are joined (multiscale.py); flip: mirror images too.

    base: (shorter, longer) side that regions are proposed at, where images come larger so that the scales have all their detail; None: as
    they come.
    """

    refine: bool = False
    scales: tuple[int, ...] | None = None
    merge: Literal["maxout", "nms"] = "maxout"
    flip: bool = False
    base: tuple[int, int] | None = None

    def __bool__(self) -> bool:
        return self.refine or self.flip or self.scales is not None


@dataclass(frozen=True)
class Look:
    """What a detector, or several, make of one image of `size`: proposals (P, 4), and scores for any regions (R, 4) of it.

    has_masks: whether `add_masks` adds any, rather than giving back what it gets.
    """

    size: Size
    proposals: Tensor
    score: Callable[[Tensor], Scored]
    add_masks: Callable[[Detections], Detections]
    has_masks: bool = True


class SteppedRCNN(FasterRCNN):
    """A Faster R-CNN that trains as ever and detects with the steps."""

    def __init__(self, *parts: Any, steps: Steps, **options: Any) -> None:
        """As FasterRCNN."""
        super().__init__(*parts, **options)
        self.steps = steps

    @torch.no_grad()
    def detect(self, images: Sequence[Tensor]) -> list[Detections]:
        """As FasterRCNN, with the steps."""
        return [detect_with_steps(lambda view: look_at(self, view, self.steps), image, self.roi_head, self.steps) for image in images]

    @torch.no_grad()
    def validate(self, images: Sequence[Tensor], targets: Sequence[Target]) -> tuple[dict[str, Tensor], list[Detections]]:
        """The plain detector's losses, and `detect`'s detections."""
        seen = [at_base(image, self.steps) for image in images]
        targets = [target.scaled(_size(image), _size(base)) for image, base, target in zip(images, seen, targets, strict=True)]
        losses, _ = super().validate(seen, targets)
        return losses, self.detect(images)

    def _detections(self, encoded: Encoded, proposals: Sequence[Tensor]) -> list[Detections]:
        """Nothing: of the plain detector `validate` wants the losses alone."""
        nothing = Detections(boxes=torch.zeros(0, 4), scores=torch.zeros(0), labels=torch.zeros(0, dtype=torch.int64))
        return [nothing] * len(proposals)


def at_base(image: Tensor, steps: Steps) -> Tensor:
    """`image` (3, h, w) as regions are proposed in it."""
    if steps.base is None:
        return image
    return interpolated(image, resized_size(*_size(image), min_size=steps.base[0], max_size=steps.base[1]))


def _size(image: Tensor) -> Size:
    return image.shape[-2], image.shape[-1]


def look_at(detector: FasterRCNN, view: View, steps: Steps) -> Look:
    """One detector's look at a view. Proposals are made at the view's own size whatever the scales, as in the paper."""
    encoded = detector.encode([view.image])
    (proposals,) = detector.rpn.propose(encoded.predictions, encoded.sizes, detector.rpn.test_limits)
    head, sizes = detector.roi_head, encoded.sizes
    pool = head.pool_from(encoded.features, sizes)
    if steps.scales is not None and steps.merge == "maxout":
        pool = _pool_from_scales(detector, view, steps.scales)

    def add_masks(found: Detections) -> Detections:
        return found if detector.mask_head is None else detector.mask_head.detect(encoded.features, [found], sizes)[0]

    has_masks = detector.mask_head is not None
    return Look(sizes[0], proposals, lambda regions: head.score(pool, [regions], sizes)[0], add_masks, has_masks)


def _pool_from_scales(detector: FasterRCNN, view: View, scales: Sequence[int]) -> Pool:
    pyramid = []
    for scale in scales:
        features, (size,), _ = detector.extract([resize_to(view.detail, scale)])  # regions are known, so no RPN
        pyramid.append(ScaledFeatures(features, size))
    return lambda regions: pool_two_scales(detector.roi_head.pooler, pyramid, regions[0], _size(view.image))


def detect_with_steps(look: Callable[[View], Look], image: Tensor, head: RoIHead, steps: Steps) -> Detections:
    """What is in `image` (3, h, w), in its pixels, best first. head: whose thresholds count.

    Masks are those of the image as given, inside the boxes of all views together.
    """
    base = at_base(image, steps)
    views = list(views_of(base, scales=steps.scales if steps.merge == "nms" else None, flip=steps.flip, detail=image))
    looks = [look(view) for view in views]
    parts = [view.restored(part) for view, one in zip(views, looks, strict=True) for part in _candidates(one, head, refine=steps.refine)]
    found = together(parts)
    kept = suppress_and_vote(found, most=head.detections) if steps.refine else head.best(found)
    if looks[0].has_masks:
        as_given = looks[0] if views[0].image is base else look(next(views_of(base, scales=None, flip=False)))
        kept = as_given.add_masks(kept)
    return kept.scaled(_size(base), _size(image))


def _candidates(look: Look, head: RoIHead, *, refine: bool) -> Iterator[Detections]:
    """Boxes before NMS: those of the proposals and, refined, those of the regressed proposals."""
    scored = look.score(look.proposals)
    yield head.candidates(scored, look.proposals, look.size)
    if refine:
        regions = regressed(scored, look.proposals, look.size)
        yield head.candidates(look.score(regions), regions, look.size)
