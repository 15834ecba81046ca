"""Boxes, names and masks on a picture, with OpenCV; line width and text follow the picture's size."""

from __future__ import annotations

import colorsys
import unicodedata
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np

from detection.mask_head import paste_masks
from detection.structures import Detections
from resbackbone.errors import InputError

FONT = cv2.FONT_HERSHEY_SIMPLEX
SMALLEST_SIDE_PX = 480  # smaller pictures are enlarged, so that names can be read
SIDE_PER_LINE_PX = 400  # a line of one pixel for every so many of the longer side
SIDE_PER_SCALE_PX = 1500  # of text: letters of about 11 pixels on a picture of 800
SMALLEST_SCALE = 0.45
MASK_OPACITY = 0.45
BLACK, WHITE = (0, 0, 0), (255, 255, 255)


def draw_detections(
    image: np.ndarray,
    detections: Detections,
    classes: Sequence[str],
    *,
    threshold: float = 0.5,
    truth: np.ndarray | None = None,
) -> np.ndarray:
    """A copy of `image`, RGB uint8 (H, W, 3), with the detections of at least `threshold`, and the true boxes (G, 4) in thin white.

    Boxes are in pixels of `image`. A picture whose longer side is below 480 pixels comes back enlarged by a whole factor.
    """
    factor = max(1, -(-SMALLEST_SIDE_PX // max(image.shape[:2])))
    picture = np.ascontiguousarray(cv2.resize(image, None, fx=factor, fy=factor, interpolation=cv2.INTER_CUBIC) if factor > 1 else image)
    picture = picture.copy() if picture is image else picture
    shown = detections[detections.scores >= threshold].to("cpu")
    shown = replace(shown, boxes=shown.boxes.float() * factor)
    colors = [color_of(label) for label in shown.labels.tolist()]
    if shown.masks is not None:
        for mask, color in zip(paste_masks(shown, (picture.shape[0], picture.shape[1])), colors, strict=True):
            _tint(picture, mask.numpy().astype(bool), color)
    for box in () if truth is None else (truth * factor).tolist():
        _draw_truth(picture, box)
    texts = [f"{classes[label - 1]} {score:.2f}" for label, score in zip(shown.labels.tolist(), shown.scores.tolist(), strict=True)]
    for box, text, color in reversed(list(zip(shown.boxes.tolist(), texts, colors, strict=True))):  # the surest last, on top
        _draw_box(picture, box, text, color)
    return picture


def color_of(label: int) -> tuple[int, int, int]:
    """A bright RGB colour for a label 1..K; neighbours differ clearly, since hues step by the golden ratio."""
    red, green, blue = colorsys.hsv_to_rgb((label * 0.618034) % 1.0, 0.85, 1.0)
    return round(red * 255), round(green * 255), round(blue * 255)


def save_image(path: Path, picture: np.ndarray) -> None:
    """Write an RGB uint8 picture in the format of its suffix. Raises InputError where it cannot be written."""
    # Only the suffix goes to OpenCV, and no odd one: it ends the whole process at text that isn't UTF-8, as a file's name may be.
    if not path.suffix.isascii() or not cv2.haveImageWriter(f"picture{path.suffix}"):
        raise InputError(f"{path}: pictures of kind {path.suffix or 'without a suffix'} cannot be written; name it .jpg or .png")
    options = [cv2.IMWRITE_JPEG_QUALITY, 90] if path.suffix.lower() in (".jpg", ".jpeg") else []
    is_encoded, data = cv2.imencode(path.suffix, picture[..., ::-1], options)
    assert is_encoded, path
    try:
        path.write_bytes(data.tobytes())
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error.strerror}); choose another --output") from error


def _line_width(picture: np.ndarray) -> int:
    return max(1, round(max(picture.shape[:2]) / SIDE_PER_LINE_PX))


def _corners(picture: np.ndarray, box: Sequence[float]) -> tuple[tuple[int, int], tuple[int, int]]:
    """The first and the last pixel of a box, cut to the picture: OpenCV takes no infinite or huge coordinates."""
    height, width = picture.shape[:2]
    x1, y1, x2, y2 = (int(side) for side in np.clip(np.nan_to_num(np.round(box)), 0, [width, height, width, height]))
    return (min(x1, width - 1), min(y1, height - 1)), (max(x2 - 1, 0), max(y2 - 1, 0))


def _tint(picture: np.ndarray, mask: np.ndarray, color: tuple[int, int, int]) -> None:
    picture[mask] = (picture[mask] * (1 - MASK_OPACITY) + np.array(color) * MASK_OPACITY).astype(np.uint8)


def _draw_truth(picture: np.ndarray, box: Sequence[float]) -> None:
    # White on a black line, to be seen on either.
    thin = max(1, _line_width(picture) // 2)
    cv2.rectangle(picture, *_corners(picture, box), BLACK, thin + 2, cv2.LINE_AA)
    cv2.rectangle(picture, *_corners(picture, box), WHITE, thin, cv2.LINE_AA)


def _draw_box(picture: np.ndarray, box: Sequence[float], text: str, color: tuple[int, int, int]) -> None:
    width = _line_width(picture)
    (left, top), bottom_right = _corners(picture, box)
    cv2.rectangle(picture, (left, top), bottom_right, color, width, cv2.LINE_AA)
    # OpenCV's fonts have ASCII only: é becomes e, what has no such letter becomes "?".
    text = unicodedata.normalize("NFKD", text).encode("ascii", "replace").decode()
    scale = max(SMALLEST_SCALE, max(picture.shape[:2]) / SIDE_PER_SCALE_PX)
    stroke = max(1, round(scale))
    (text_width, text_height), baseline = cv2.getTextSize(text, FONT, scale, stroke)
    x = min(left, max(picture.shape[1] - text_width, 0))
    has_room_above = top - text_height - 2 * baseline >= 0
    y = top - baseline if has_room_above else min(top + text_height + baseline, picture.shape[0] - baseline)
    cv2.rectangle(picture, (x, y - text_height - baseline // 2), (x + text_width, y + baseline), color, cv2.FILLED)
    is_light = color[0] * 0.299 + color[1] * 0.587 + color[2] * 0.114 > 110
    cv2.putText(picture, text, (x, y), FONT, scale, BLACK if is_light else WHITE, stroke, cv2.LINE_AA)
