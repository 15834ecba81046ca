"""Boxes and names on a picture, with OpenCV; line width and text follow the picture's size."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

from detection.structures import Detections
from resbackbone.errors import InputError

FONT = cv2.FONT_HERSHEY_SIMPLEX
SMALLEST_SIDE_PX = 480  # smaller pictures are enlarged, so that names can be read
TRUTH_COLOR = (255, 255, 255)


def draw_detections(
    image: np.ndarray,
    detections: Detections,
    classes: Sequence[str],
    *,
    threshold: float = 0.5,
    truth: np.ndarray | None = None,
) -> np.ndarray:
    """A copy of `image`, RGB uint8 (H, W, 3), with the detections of at least `threshold`, and the true boxes (G, 4) in thin white.

    A picture whose longer side is below 480 pixels comes back enlarged.
    """
    factor = max(1, -(-SMALLEST_SIDE_PX // max(image.shape[:2])))
    picture = np.ascontiguousarray(
        cv2.resize(image, None, fx=factor, fy=factor, interpolation=cv2.INTER_CUBIC) if factor > 1 else image.copy()
    )
    thickness = max(1, round(max(picture.shape[:2]) / 400))
    for box in np.zeros((0, 4)) if truth is None else truth * factor:
        cv2.rectangle(picture, *_corners(box), TRUTH_COLOR, max(1, thickness // 2), cv2.LINE_AA)
    shown = detections[detections.scores >= threshold]
    rows = list(zip((shown.boxes * factor).tolist(), shown.scores.tolist(), shown.labels.tolist(), strict=True))
    for box, score, label in reversed(rows):  # the surest last, on top
        _draw_box(picture, box, f"{classes[label - 1]} {score:.2f}", color_of(label), thickness)
    return picture


def color_of(label: int) -> tuple[int, int, int]:
    """A bright RGB colour for a label 1..K; neighbours differ clearly, since hues step by the golden ratio."""
    red, green, blue = colorsys.hsv_to_rgb((label * 0.618034) % 1.0, 0.85, 1.0)
    return round(red * 255), round(green * 255), round(blue * 255)


def save_image(path: Path, picture: np.ndarray) -> None:
    """Write an RGB uint8 picture. Raises InputError where it cannot be written."""
    is_encoded, data = cv2.imencode(path.suffix, picture[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 90])
    assert is_encoded, path
    try:
        path.write_bytes(data.tobytes())
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error.strerror}); choose another --output") from error


def _corners(box: Sequence[float] | np.ndarray) -> tuple[tuple[int, int], tuple[int, int]]:
    return (round(float(box[0])), round(float(box[1]))), (round(float(box[2])), round(float(box[3])))


def _draw_box(picture: np.ndarray, box: Sequence[float], text: str, color: tuple[int, int, int], thickness: int) -> None:
    (left, top), bottom_right = _corners(box)
    cv2.rectangle(picture, (left, top), bottom_right, color, thickness, cv2.LINE_AA)
    scale = 0.45 * max(1.0, max(picture.shape[:2]) / 800)
    (width, height), baseline = cv2.getTextSize(text, FONT, scale, 1)
    x = min(max(left, 0), max(picture.shape[1] - width, 0))
    y = top - baseline if top - height - baseline >= 0 else top + height + thickness  # inside where there is no room above
    cv2.rectangle(picture, (x, y - height - 1), (x + width, y + baseline), color, cv2.FILLED)
    cv2.putText(picture, text, (x, y), FONT, scale, (0, 0, 0), 1, cv2.LINE_AA)
