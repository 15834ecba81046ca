"""Box refinement (He et al. 2015, appendix B) with box voting (Gidaris & Komodakis 2015, §5).

Features are pooled again from the regressed boxes, which gives a second score and a second regressed box for each. The 300 new
predictions join the 300 old ones; NMS at an IoU of 0.3 thins the union, and what stays is moved to where its neighbours vote it to be.

R regions of one image, K classes, C candidates (boxes with a class and a score, before NMS), D of them kept.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torchvision.ops import batched_nms, box_iou

from detection.boxes import REGION_WEIGHTS, clip_to_image, decode
from detection.roi_head import Scored
from detection.structures import Detections

UNION_NMS_IOU = 0.3  # appendix B
VOTING_IOU = 0.5  # Gidaris & Komodakis 2015: boxes that overlap a kept one by more than this vote on its sides


def regressed(scored: Scored, regions: Tensor, size: tuple[int, int]) -> Tensor:
    """(R, 4): each region moved to the box of its likeliest class, clipped to the image. One a region, so that 300 stay 300."""
    scores, deltas = scored
    label = scores[:, 1:].argmax(dim=1) + 1
    chosen = deltas.unflatten(1, (-1, 4))[torch.arange(len(label), device=label.device), label]
    return clip_to_image(decode(chosen, regions, REGION_WEIGHTS), size)


def suppress_and_vote(candidates: Detections, *, most: int) -> Detections:
    """The best `most` of the union of both predictions, after NMS inside each class, each where the candidates around it vote it to be."""
    keep = batched_nms(candidates.boxes, candidates.scores, candidates.labels, UNION_NMS_IOU)
    return vote(candidates[keep[:most]], candidates)


def vote(kept: Detections, candidates: Detections, *, iou: float = VOTING_IOU) -> Detections:
    """The kept boxes (D, 4), each the mean, weighted by scores, of the candidates of its class that overlap it by more than `iou`.

    Scores and labels stay. A kept box overlaps itself, so it always has a vote.
    """
    with torch.autocast(kept.boxes.device.type, enabled=False):  # bfloat16 would round pixels
        votes = (box_iou(kept.boxes, candidates.boxes) > iou) & (kept.labels[:, None] == candidates.labels)
        weights = votes * candidates.scores
        return replace(kept, boxes=weights @ candidates.boxes / weights.sum(dim=1, keepdim=True))
