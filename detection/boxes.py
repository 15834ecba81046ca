"""Boxes: what a box regressor speaks (deltas), and the few box operations torchvision.ops has not.

Boxes are xyxy in pixels with width = x2 - x1; everything is computed in float32, whatever autocast is doing outside.
R boxes, A anchors.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from detection.waiting import constant

Weights = tuple[float, float, float, float]

UNIT_WEIGHTS: Weights = (1.0, 1.0, 1.0, 1.0)  # the RPN regresses plain deltas (Ren et al. 2015, §3.1.2)
REGION_WEIGHTS: Weights = (10.0, 10.0, 5.0, 5.0)  # 1 / standard deviation of the deltas of regions (Girshick 2015, Fast R-CNN)
APART = float(1 << 20)  # pixels between the boxes of two sets; in float64 the shift rounds nothing away
LARGEST_LOG_SCALE = math.log(1000 / 16)  # an untrained regressor must not blow a 16 px anchor up beyond any image


def encode(boxes: Tensor, anchors: Tensor, weights: Weights = UNIT_WEIGHTS) -> Tensor:
    """The deltas (R, 4) that turn `anchors` (R, 4) into `boxes` (R, 4): (dx, dy, dlog w, dlog h) (Girshick et al. 2014, eq. 6-9)."""
    boxes, anchors = boxes.float(), anchors.float()
    size, anchor_size = boxes[:, 2:] - boxes[:, :2], anchors[:, 2:] - anchors[:, :2]
    centre, anchor_centre = boxes[:, :2] + 0.5 * size, anchors[:, :2] + 0.5 * anchor_size
    factors = constant(weights, like=boxes)
    shift = factors[:2] * (centre - anchor_centre) / anchor_size
    return torch.cat((shift, factors[2:] * torch.log(size / anchor_size)), dim=1)


def decode(deltas: Tensor, anchors: Tensor, weights: Weights = UNIT_WEIGHTS, *, clip: float = LARGEST_LOG_SCALE) -> Tensor:
    """The boxes (..., 4) that `deltas` (..., 4) make of `anchors` (..., 4); log scales are cut at `clip`."""
    deltas, anchors = deltas.float(), anchors.float()
    deltas = deltas / constant(weights, like=deltas)
    anchor_size = anchors[..., 2:] - anchors[..., :2]
    centre = deltas[..., :2] * anchor_size + (anchors[..., :2] + 0.5 * anchor_size)
    half = 0.5 * (torch.exp(deltas[..., 2:].clamp(max=clip)) * anchor_size)
    return torch.cat((centre - half, centre + half), dim=-1)


def clip_to_image(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """`boxes` (R, 4) cut at the borders of an image of `size` (height, width)."""
    height, width = size
    return torch.minimum(boxes.clamp(min=0), constant([width, height, width, height], like=boxes))


def is_large(boxes: Tensor, min_size: float) -> Tensor:
    """(...) bool: both sides of `boxes` (..., 4) are at least `min_size` pixels."""
    return ((boxes[..., 2:] - boxes[..., :2]) >= min_size).all(dim=-1)


def intersection_over_area(boxes: Tensor, regions: Tensor) -> Tensor:
    """(R, I): which part of each of `boxes` (R, 4) lies inside each of `regions` (I, 4); 0 for a box without area."""
    top_left = torch.maximum(boxes[:, None, :2], regions[None, :, :2])
    bottom_right = torch.minimum(boxes[:, None, 2:], regions[None, :, 2:])
    intersection = (bottom_right - top_left).clamp(min=0).prod(dim=2)
    area = (boxes[:, 2:] - boxes[:, :2]).prod(dim=1)
    return intersection / area.clamp(min=torch.finfo(torch.float32).tiny)[:, None]


def moved_apart(boxes: Tensor, number: Tensor) -> Tensor:
    """(R, 4) float64: `boxes` (R, 4) in sets, `number` (R,) saying which, so far apart that no two sets overlap: one NMS does for all."""
    return boxes.double() + (number * APART)[:, None]
