"""Non-maximum suppression that marks boxes instead of listing them: its result has a size known beforehand (waiting.py).

Greedy suppression is the fixed point of "a box is kept unless a kept one above it overlaps it too much", so every box can be asked at once,
again and again: after r rounds each box is right whose fate hangs on a chain of at most r others, every one of which overlaps the next.

G groups, of which none suppresses another's boxes; K boxes a group, best first.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 1024  # boxes at a time, so that not all pairs are in memory at once, and chains are short
ROUNDS = 48  # the longest chain in a block was 27, in 285 images' proposals by trained and untrained detectors, on one map and on five


def kept_by_nms(boxes: Tensor, alive: Tensor, iou: float) -> Tensor:
    """(G, K) bool: which boxes (G, K, 4) no better one of their group, itself kept, overlaps by more than `iou`.

    alive: (G, K) bool; the others are neither kept nor in any box's way. torchvision's nms, except for a box at the end of a chain of
    more than ROUNDS within a block: it may be kept where it should not be, and be in the way of boxes of later blocks.
    """
    kept: list[Tensor] = []
    with torch.autocast(boxes.device.type, enabled=False):  # it would cast every matrix in every round
        for start in range(0, boxes.shape[1], BLOCK):
            block, left = boxes[:, start : start + BLOCK], alive[:, start : start + BLOCK]
            if kept:
                left = left & ~_reached(torch.cat(kept, dim=1), _overlap(boxes[:, :start], block, iou))
            kept.append(_settled(left, _overlap(block, block, iou).triu(diagonal=1)))
    return torch.cat(kept, dim=1) if kept else alive


def _reached(kept: Tensor, overlap: Tensor) -> Tensor:
    """(G, L) bool: the boxes that one of the kept (G, K) ones overlaps."""
    return torch.bmm(kept[:, None].to(overlap.dtype), overlap)[:, 0] > 0


def _settled(alive: Tensor, overlap: Tensor) -> Tensor:
    """The rounds inside a block, as matrix products: 1 for a box that is there, less the number of kept ones that overlap it."""
    there = alive[:, None].to(overlap.dtype)
    kept = there
    for _ in range(ROUNDS):
        kept = torch.baddbmm(there, kept, overlap, alpha=-1).clamp(min=0)
    return kept[:, 0] > 0


def _overlap(above: Tensor, below: Tensor, iou: float) -> Tensor:
    """(G, K, L) of 0 and 1: which of (G, K, 4) boxes overlap which of (G, L, 4) by more than `iou`; torchvision's arithmetic."""
    left, top, right, bottom = above[:, :, None].unbind(3)
    x1, y1, x2, y2 = below[:, None].unbind(3)
    width = torch.minimum(right, x2).sub_(torch.maximum(left, x1)).clamp_(min=0)
    height = torch.minimum(bottom, y2).sub_(torch.maximum(top, y1)).clamp_(min=0)
    intersection = width.mul_(height)
    union = ((right - left) * (bottom - top) + (x2 - x1) * (y2 - y1)).sub_(intersection)
    return (intersection.div_(union) > iou).half()
