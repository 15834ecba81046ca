"""An image file's bytes in, RGB uint8 out, at a half, a quarter or an eighth of its size where that is enough."""

from __future__ import annotations

import importlib.util
from functools import cache
from types import ModuleType

import cv2
import numpy as np

from resbackbone.errors import InputError

# The scales that libjpeg computes faster than the whole image; 6/8 and 5/8 are slower.
REDUCTIONS = {1: cv2.IMREAD_COLOR, 2: cv2.IMREAD_REDUCED_COLOR_2, 4: cv2.IMREAD_REDUCED_COLOR_4, 8: cv2.IMREAD_REDUCED_COLOR_8}
MAX_PIXELS = 2**27  # 134 million; a header may claim anything
_FRAME_MARKERS = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}


class UnreadableImage(InputError):
    """An image that is empty, cut off, too large or no image. `data.unreadable` says whether training stops."""


def decode(data: bytes, *, name: str, reduction: int = 1) -> np.ndarray:
    """uint8 RGB [ceil(H / reduction), ceil(W / reduction), 3]; as stored, whatever EXIF says, as everybody reads ImageNet.

    reduction: 1, 2, 4 or 8; more than 1 for JPEGs only. Raises UnreadableImage naming the file.
    """
    if data[:2] == b"\xff\xd8" and data.rfind(b"\xff\xd9") < 0:
        raise UnreadableImage(f"{name}: the file is cut off (no end marker); copy or download it again")
    size = jpeg_size(data)
    if size is not None and size[0] * size[1] > MAX_PIXELS:
        raise UnreadableImage(f"{name}: the header claims {size[1]}x{size[0]} pixels, more than {MAX_PIXELS:,}; damaged, or made to harm")
    image = None if size is None else _decode_plain_jpeg(data, size, reduction)
    if image is not None:
        return image
    try:
        image = cv2.imdecode(np.frombuffer(data, dtype=np.uint8), REDUCTIONS[reduction] | cv2.IMREAD_IGNORE_ORIENTATION)
    except cv2.error:
        image = None
    if image is None:
        raise UnreadableImage(f"{name}: {'the file is empty' if not data else 'not an image, or damaged'}; copy or download it again")
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def jpeg_size(data: bytes) -> tuple[int, int] | None:
    """(height, width) from a JPEG's header; None for anything else."""
    if data[:2] != b"\xff\xd8":
        return None
    position = 2
    while position + 9 <= len(data):
        if data[position] != 0xFF:
            return None
        marker = data[position + 1]
        if marker in _FRAME_MARKERS:
            return int.from_bytes(data[position + 5 : position + 7], "big"), int.from_bytes(data[position + 7 : position + 9], "big")
        position += 1 if marker == 0xFF else 2 + int.from_bytes(data[position + 2 : position + 4], "big")
    return None


def largest_reduction(height: float, width: float, *, size: int) -> int:
    """The largest of 1, 2, 4, 8 by which a crop of `height` x `width` pixels may shrink and still be `size` a side."""
    return max(factor for factor in REDUCTIONS if factor == 1 or min(height, width) >= factor * size)


@cache
def _simplejpeg() -> ModuleType | None:
    return importlib.import_module("simplejpeg") if importlib.util.find_spec("simplejpeg") else None


def _decode_plain_jpeg(data: bytes, size: tuple[int, int], reduction: int) -> np.ndarray | None:
    """simplejpeg's pixels, or None where it is absent or objects (CMYK): OpenCV is slower and more forgiving."""
    decoder = _simplejpeg()
    if decoder is None:
        return None
    least = [-(-side // reduction) for side in size] if reduction > 1 else [0, 0]
    try:
        return decoder.decode_jpeg(data, colorspace="RGB", min_height=least[0], min_width=least[1], min_factor=1)
    except ValueError:
        return None
