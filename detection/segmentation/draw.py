"""A label map on a picture: classes tinted and named, the truth as a white outline."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np

from detection.draw import BLACK, FONT, MASK_OPACITY, SMALLEST_SCALE, SMALLEST_SIDE_PX, WHITE, color_of
from detection.segmentation.data import IGNORED

OUTLINE_PX = 2
MARGIN_PX = 4


def draw_segmentation(image: np.ndarray, labels: np.ndarray, classes: Sequence[str], *, truth: np.ndarray | None = None) -> np.ndarray:
    """A copy of `image`, RGB uint8 (H, W, 3), with `labels`, uint8 (H, W), tinted over it and the classes found named in a corner.

    truth: uint8 (H, W), its borders drawn white on black. A picture whose longer side is below 480 pixels comes back enlarged by a
    whole factor.
    """
    factor = max(1, -(-SMALLEST_SIDE_PX // max(image.shape[:2])))
    picture = cv2.resize(image, None, fx=factor, fy=factor, interpolation=cv2.INTER_CUBIC) if factor > 1 else image.copy()
    labels = labels.repeat(factor, 0).repeat(factor, 1)
    found = [label for label in np.unique(labels).tolist() if 0 < label <= len(classes)]
    for label in found:
        inside = labels == label
        picture[inside] = (picture[inside] * (1 - MASK_OPACITY) + np.array(color_of(label)) * MASK_OPACITY).astype(np.uint8)
    if truth is not None:
        _outline(picture, truth.repeat(factor, 0).repeat(factor, 1))
    for row, label in enumerate(found):
        _name(picture, row, classes[label - 1], color_of(label))
    return picture


def _outline(picture: np.ndarray, truth: np.ndarray) -> None:
    for label in set(np.unique(truth).tolist()) - {0, IGNORED}:
        outlines, _ = cv2.findContours((truth == label).astype(np.uint8), cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
        for color, width in ((BLACK, OUTLINE_PX + 2), (WHITE, OUTLINE_PX)):
            cv2.drawContours(picture, outlines, -1, color, width)


def _name(picture: np.ndarray, row: int, text: str, color: tuple[int, int, int]) -> None:
    text = text.encode("ascii", "replace").decode()  # OpenCV's fonts have no more
    (width, height), baseline = cv2.getTextSize(text, FONT, SMALLEST_SCALE, 1)
    top = row * (height + baseline + MARGIN_PX)
    cv2.rectangle(picture, (0, top), (width + 2 * MARGIN_PX, top + height + baseline + MARGIN_PX), color, cv2.FILLED)
    is_light = color[0] * 0.299 + color[1] * 0.587 + color[2] * 0.114 > 110
    place = (MARGIN_PX, top + height + MARGIN_PX)
    cv2.putText(picture, text, place, FONT, SMALLEST_SCALE, BLACK if is_light else WHITE, 1, cv2.LINE_AA)
