"""Boxes against their images, for a whole data set at once: what training would refuse, leave out or cut."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .problems import ProblemLog

ROUNDING_PX = 1.0  # annotation tools round outwards; sticking out this little is cut without a word
# Boxes are kept in float32, then scaled and mirrored, after which a thinner one may have no side left. Below 8,192 pixels float32's steps
# are under 0.001, and scaling leaves the ratio of the two as it is.
THINNEST_PX = 0.01


def check_boxes(
    boxes: np.ndarray, sizes: np.ndarray, log: ProblemLog, *, where: Callable[[int], dict[str, Any]], describe: Callable[[int], str]
) -> tuple[np.ndarray, np.ndarray]:
    """Boxes (float64 [B, 4] xyxy) and the (height, width) of each box's image [B, 2] -> (boxes cut to the image, bool [B] which to keep).

    where(b) gives the file, image and annotation of box b for the log; describe(b) the box as its file writes it.
    """
    boxes = boxes.reshape(-1, 4)
    width, height = sizes[:, 1].astype(np.float64), sizes[:, 0].astype(np.float64)
    limits = np.stack([width, height, width, height], axis=1) if len(boxes) else boxes
    with np.errstate(invalid="ignore"):
        clipped = np.clip(boxes, 0.0, limits)
        spans, inside = boxes[:, 2:] - boxes[:, :2], clipped[:, 2:] - clipped[:, :2]
        finite = np.isfinite(boxes).all(axis=1)
        negative = finite & (spans < 0).any(axis=1)
        empty = finite & ~negative & (spans == 0).any(axis=1)
        outside = finite & ~negative & ~empty & (inside <= 0).any(axis=1)
        sliver = finite & ~negative & ~empty & ~outside & (inside < THINNEST_PX).any(axis=1)
        good = finite & ~negative & ~empty & ~outside & ~sliver
        partly = good & (np.abs(boxes - clipped) > ROUNDING_PX).any(axis=1)
    found = [
        ("box_not_finite", ~finite, "is not made of finite numbers; correct or delete it"),
        ("box_negative", negative, "has a negative width or height (corners swapped?); write the smaller corner first"),
        ("box_zero_area", empty, "has no area"),
        ("box_zero_area", sliver, f"is thinner than {THINNEST_PX} pixels within its image of {{}}×{{}} (width×height), as good as no area"),
        ("box_outside", outside, "lies wholly outside its image of {}×{} (width×height)"),
        ("box_partly_outside", partly, "sticks out of its image of {}×{} (width×height)"),
    ]
    for kind, rows, words in found:
        for b in np.flatnonzero(rows).tolist():
            log.add(kind, f"{describe(b)} {words.format(int(sizes[b, 1]), int(sizes[b, 0]))}", **where(b))
    return clipped, good
