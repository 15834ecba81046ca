"""An image file in, upright RGB uint8 out; and the two resizes that are fast on a CPU.

Every kind of file that OpenCV reads as 8 or 16 bits becomes 8-bit RGB [H, W, 3]: grey is repeated, a palette looked up, CMYK converted,
16 bits rounded to 8, and an alpha channel ignored, as PIL's convert("RGB") and OpenCV do (the colours under it are kept, nothing is
blended).
"""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import math
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import BinaryIO

import cv2
import numpy as np
import torch

from resbackbone.errors import InputError

from .image_header import MAX_PIXELS, BrokenHeader, ImageHeader, is_cut_off, orientation_of, read_header

_HEADER_BYTES = 2**18
_NO_DESCRIPTOR = {errno.EMFILE, errno.ENFILE}  # says nothing about the file: a run that skipped it would go on with black images
_INVERSE = (0, 1, 2, 3, 4, 5, 8, 7, 6)  # of an EXIF orientation: what turns an upright image back
# What makes uint8 [H, W, 3] of other kinds of numbers, of channels, and of channels that come first.
_AS_BYTES = {"u2": "(image / 257).round().astype(np.uint8), 16 bits", "f": "(image * 255).round().astype(np.uint8), if from 0 to 1"}
_AS_THREE = {1: "image.repeat(3, axis=2), grey", 4: "image[..., :3], without the alpha channel"}
_AS_FIRST = {3: "image.transpose(1, 2, 0)"}


class UnreadableImage(InputError):
    """An image file that is empty, cut off, too large or no image. Training skips and counts these; see problems.POLICY."""


def read_image(path: Path | str, *, exif: bool = True) -> np.ndarray:
    """The image as uint8 RGB [H, W, 3], contiguous and its own memory.

    exif: turn it as the camera's orientation says; False leaves the stored pixels. simplejpeg decodes plain JPEGs where it is installed,
    OpenCV everything else. Raises UnreadableImage naming the file, InputError when there is none.
    """
    data = _read_bytes(path)
    header = _checked_header(data, path)
    if is_cut_off(data, header):
        raise UnreadableImage(f"{path}: the file is cut off (no end marker); copy or download it again")
    image = _decode(data, header, path, exif=exif)
    return _turned(image, header.orientation) if exif else image


def image_header(path: Path | str) -> ImageHeader:
    """What the file says about itself, without decoding. Raises as `read_image` does."""
    with _opened(path) as file:
        data = file.read(_HEADER_BYTES)
        try:
            return _checked_header(data, path)
        except UnreadableImage:
            rest = file.read()
            if not rest:
                raise
    return _checked_header(data + rest, path)


def image_size(path: Path | str, *, exif: bool = True) -> tuple[int, int]:
    """(height, width) of what `read_image` would return, from the header alone where the format is JPEG or PNG."""
    header = image_header(path)
    if not header.height:
        height, width = read_image(path, exif=exif).shape[:2]
        return height, width
    return header.upright_size if exif else (header.height, header.width)


def check_pixels(image: object) -> None:
    """Raise InputError unless `image` is what `read_image` gives, uint8 [H, W, 3]; it says which call makes it that."""
    if not isinstance(image, np.ndarray):
        if image is None:
            raise InputError("an image is None, which is what cv2.imread gives for a file it can't read; check the path")
        raise InputError(
            f"an image is a {type(image).__name__}; it should be a numpy array, uint8 [height, width, 3] in RGB order: of PIL's, "
            "np.asarray(image.convert('RGB')) makes one, of torch's image.permute(1, 2, 0).numpy()"
        )
    shape, kind = image.shape, image.dtype
    if kind == np.uint8 and len(shape) == 3 and shape[2] == 3 and image.size:
        return
    if not image.size:
        helps = "it has no pixels; check where it was cut out"
    elif kind != np.uint8:
        helps = _AS_BYTES.get(kind.kind + str(kind.itemsize), _AS_BYTES.get(kind.kind, "image.astype(np.uint8), where the values allow it"))
    elif len(shape) == 2:
        helps = "np.stack([image] * 3, axis=2), grey"
    elif len(shape) == 3:
        helps = _AS_THREE.get(shape[2], _AS_FIRST.get(shape[0], "leave three channels of it"))
    else:
        helps = "one image at a time"
    raise InputError(f"an image is {kind} of shape {list(shape)}; it should be uint8 [height, width, 3] in RGB order: {helps}")


def resized_size(height: int, width: int, *, min_size: int, max_size: int, enlarge: bool = True) -> tuple[int, int]:
    """(height, width) with the shorter side at `min_size`, unless the longer would pass `max_size`: torchvision's rule and rounding.

    enlarge=False: a smaller image stays as it is.
    """
    scale = min(min_size / min(height, width), max_size / max(height, width), math.inf if enlarge else 1.0)
    return max(1, math.floor(height * scale)), max(1, math.floor(width * scale))


def resize_image(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """uint8 [H, W, 3] -> uint8 [h, w, 3], bilinear: OpenCV to enlarge, torch's antialiased filter to shrink."""
    height, width = image.shape[:2]
    if (height, width) == tuple(size):
        return image
    if size[0] >= height and size[1] >= width:
        return cv2.resize(image, (size[1], size[0]), interpolation=cv2.INTER_LINEAR)
    image = np.ascontiguousarray(image)  # torch knows no negative strides, and `[..., ::-1]` is how OpenCV's users make RGB of BGR
    planes = torch.from_numpy(image)[None].permute(0, 3, 1, 2)  # of [None] last, torch wouldn't see the memory as channels-last
    shrunk = torch.nn.functional.interpolate(planes, size=list(size), mode="bilinear", antialias=True)
    return np.ascontiguousarray(shrunk[0].permute(1, 2, 0).numpy())


@contextlib.contextmanager
def _opened(path: Path | str) -> Iterator[BinaryIO]:
    """The file, to read in the block; what fails there is told as what fails in opening it."""
    try:
        with open(path, "rb") as file:
            yield file
    except FileNotFoundError:
        raise InputError(f"{path}: no such image file") from None
    except OSError as error:
        if error.errno in _NO_DESCRIPTOR:
            raise InputError(f"{path}: cannot be read: too many open files; allow more (ulimit -n), or use fewer data.workers") from None
        why = error.strerror or error
        raise UnreadableImage(f"{path}: cannot be read ({why}); check its permissions and its disk, or copy it again") from None


def _read_bytes(path: Path | str) -> bytes:
    with _opened(path) as file:
        return file.read()


def _checked_header(data: bytes, path: Path | str) -> ImageHeader:
    try:
        header = read_header(data)
    except BrokenHeader as error:
        raise UnreadableImage(f"{path}: not a readable image: {error}") from None
    if header.height * header.width > MAX_PIXELS:
        raise UnreadableImage(
            f"{path}: the header claims {header.width}×{header.height} pixels, more than the {MAX_PIXELS:,} allowed; damaged, or made to "
            "exhaust memory"
        )
    return header


def _decode(data: bytes, header: ImageHeader, path: Path | str, *, exif: bool) -> np.ndarray:
    """RGB as stored for JPEG and PNG (the caller turns it); other formats are turned by OpenCV here, and back for exif=False."""
    if header.format == "jpeg" and header.bits == 8 and (header.channels == 1 or (header.channels == 3 and header.adobe_transform == 1)):
        image = _decode_plain_jpeg(data)
        if image is not None:
            return image
    flags = cv2.IMREAD_UNCHANGED
    if header.format not in ("jpeg", "png"):
        flags = cv2.IMREAD_COLOR_RGB | (0 if exif else cv2.IMREAD_IGNORE_ORIENTATION)
    try:
        image = cv2.imdecode(np.frombuffer(data, dtype=np.uint8), flags)
    except cv2.error as error:
        raise UnreadableImage(f"{path}: OpenCV cannot decode it ({str(error).strip()[:200]})") from None
    if image is None:
        raise UnreadableImage(f"{path}: the {header.format.upper()} data is damaged or of a kind OpenCV cannot decode")
    if header.format == "tiff" and not exif:  # OpenCV's reader of TIFFs turns them whatever the flag says
        image = _turned(image, _INVERSE[orientation_of(data)])
    return image if flags != cv2.IMREAD_UNCHANGED else _to_rgb(image)


@cache
def _simplejpeg() -> ModuleType | None:
    return importlib.import_module("simplejpeg") if importlib.util.find_spec("simplejpeg") else None


def _decode_plain_jpeg(data: bytes) -> np.ndarray | None:
    """simplejpeg's pixels (bit for bit OpenCV's, sooner), or None where it is absent or objects: OpenCV is the more forgiving."""
    decoder = _simplejpeg()
    if decoder is None:
        return None
    try:
        return decoder.decode_jpeg(data, colorspace="RGB")
    except ValueError:
        return None


def _to_rgb(image: np.ndarray) -> np.ndarray:
    """OpenCV's grey, BGR or BGRA of 8, 16 or 32 bits -> RGB uint8."""
    if image.dtype == np.uint16:
        image = ((image.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8)
    if image.ndim == 2:
        return cv2.cvtColor(image, cv2.COLOR_GRAY2RGB)
    return cv2.cvtColor(image, cv2.COLOR_BGRA2RGB if image.shape[2] == 4 else cv2.COLOR_BGR2RGB)


def _turned(image: np.ndarray, orientation: int) -> np.ndarray:
    """EXIF orientation 1..8 undone, so that the image stands upright."""
    if orientation >= 5:
        image = image.transpose(1, 0, 2)
    if orientation in (2, 3, 6, 7):
        image = image[:, ::-1]
    if orientation in (3, 4, 7, 8):
        image = image[::-1]
    return np.ascontiguousarray(image)
