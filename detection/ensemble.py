"""Several detectors as one (He et al. 2015, appendix B): the union of their proposals, judged by the average of their region classifiers.

Any mix of heads and backbones with the same classes; each brings its own features, regions are in pixels and so common to all. Deltas are
averaged as each regresses them from the same region: the mean of the centres, the geometric mean of the sides.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from detection.faster_rcnn import FasterRCNN
from detection.multiscale import View
from detection.roi_head import Scored
from detection.steps import Look, Steps, detect_with_steps, look_at
from detection.structures import Detections


class Ensemble(nn.Module):
    """Detects with all its members. Thresholds and the number of detections are the first one's."""

    def __init__(self, members: Sequence[FasterRCNN], *, steps: Steps = Steps()) -> None:  # noqa: B008 (frozen)
        """members: two or more, with the same classes. steps: what else is switched on; context is each member's own."""
        super().__init__()
        self.members, self.steps = nn.ModuleList(members), steps

    @torch.no_grad()
    def detect(self, images: Sequence[Tensor]) -> list[Detections]:
        """What is in each image, in its pixels: as FasterRCNN.detect."""
        return [detect_with_steps(self._look, image, self._detectors()[0].roi_head, self.steps) for image in images]

    def _detectors(self) -> list[FasterRCNN]:
        return list(self.members)  # type: ignore[arg-type]

    def _look(self, view: View) -> Look:
        return join([look_at(member, view, self.steps) for member in self._detectors()])


def join(looks: Sequence[Look]) -> Look:
    """The members' looks at one image as one."""
    proposals = torch.cat([look.proposals for look in looks])
    return Look(
        looks[0].size,
        proposals,
        lambda regions: average([look.score(regions) for look in looks]),
        lambda found: _average_masks(found, [look.add_masks(found) for look in looks]),
        any(look.has_masks for look in looks),
    )


def average(scored: Sequence[Scored]) -> Scored:
    """The mean of the members' probabilities (R, K + 1) and of their deltas (R, 4 · (K + 1))."""
    scores, deltas = zip(*scored, strict=True)
    return torch.stack(scores).mean(dim=0), torch.stack([one.float() for one in deltas]).mean(dim=0)


def _average_masks(found: Detections, masked: Sequence[Detections]) -> Detections:
    """`found` with the mean mask of the members that have a mask branch; those of C4 (14 × 14) and FPN (28 × 28) at the larger side."""
    masks = [one.masks for one in masked if one.masks is not None]
    if not masks:
        return found
    side = max(mask.shape[-1] for mask in masks)
    same = [
        nn.functional.interpolate(mask[:, None], size=(side, side), mode="bilinear")[:, 0] if mask.shape[-1] != side else mask
        for mask in masks
    ]
    return replace(found, masks=torch.stack(same).mean(dim=0))
