"""Which part of an image a training sample shows, the colour it is shifted by, and the resizing; all uint8.

A crop is drawn from a numpy generator that belongs to one sample, so the same (seed, epoch, index) gives the same sample in any process.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from resbackbone.classification.files import UnreadableImage, decode, jpeg_size, largest_reduction

# Eigenvalues and eigenvectors (columns) of the covariance of ImageNet's RGB values in 0 … 1, as fb.resnet.torch publishes them.
RGB_VARIANCES = np.array([0.2175, 0.0188, 0.0045])
RGB_AXES = np.array([[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]])
_TRIES = 10
_LOG_RATIOS = (math.log(3 / 4), math.log(4 / 3))


@dataclass(frozen=True, kw_only=True)
class Crop:
    """A rectangle in pixels of the stored image."""

    top: float
    left: float
    height: float
    width: float


def scale_crop(height: int, width: int, *, size: int, shorter_side: tuple[int, ...], rng: np.random.Generator) -> Crop:
    """The paper's (§3.4): resize so that the shorter side is drawn from `shorter_side` (both ends included), take a square of `size`.

    The square is returned in pixels of the image as it is: cutting before resizing gives the same picture for less work.
    """
    scale = int(rng.integers(shorter_side[0], shorter_side[1] + 1)) / min(height, width)
    side = size / scale
    return Crop(top=rng.random() * (height - side), left=rng.random() * (width - side), height=side, width=side)


def area_crop(height: int, width: int, *, area: tuple[float, ...], rng: np.random.Generator) -> Crop:
    """torchvision's RandomResizedCrop: a share of the area drawn from `area`, a ratio of sides from 3/4 to 4/3, uniformly in its logarithm.

    After ten crops that don't fit, the largest central one whose ratio is allowed.
    """
    for _ in range(_TRIES):
        pixels = height * width * rng.uniform(area[0], area[1])
        ratio = math.exp(rng.uniform(*_LOG_RATIOS))
        w, h = round(math.sqrt(pixels * ratio)), round(math.sqrt(pixels / ratio))
        if 0 < w <= width and 0 < h <= height:
            return Crop(top=int(rng.integers(height - h + 1)), left=int(rng.integers(width - w + 1)), height=h, width=w)
    w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    return Crop(top=(height - h) // 2, left=(width - w) // 2, height=h, width=w)


def padded_crop(image: np.ndarray, *, size: int, padding: int, rng: np.random.Generator) -> np.ndarray:
    """CIFAR's (§4.2): `padding` zeros on each side of uint8 [H, W, 3], then a random square of `size`."""
    padded = np.pad(image, ((padding, padding), (padding, padding), (0, 0)))
    room = padded.shape[0] - size, padded.shape[1] - size
    if min(room) < 0:
        raise UnreadableImage(f"an image of {image.shape[0]}x{image.shape[1]} pixels is too small to cut {size} from, padded by {padding}")
    top, left = (int(rng.integers(free + 1)) for free in room)
    return padded[top : top + size, left : left + size]


def pca_shift(deviation: float, rng: np.random.Generator) -> np.ndarray:
    """What the colour noise adds to each of R, G, B in 0 … 1, float32 [3] (Krizhevsky et al. 2012, §4.1): sum of p_i * a_i * l_i."""
    return (RGB_AXES @ (rng.normal(0.0, deviation, 3) * RGB_VARIANCES)).astype(np.float32)


def cut(source: bytes | np.ndarray, crop: Crop, *, size: int, name: str, reduced: bool = True) -> np.ndarray:
    """The crop of an encoded or decoded image as uint8 RGB [size, size, 3], antialiased.

    reduced: decode a JPEG at 1/2, 1/4 or 1/8 where the crop keeps at least `size` pixels a side; the values differ slightly.
    """
    image = source
    if isinstance(image, bytes):
        reduction = largest_reduction(crop.height, crop.width, size=size) if reduced and jpeg_size(image) else 1
        image = decode(image, name=name, reduction=reduction)
        crop = replace(crop, **{side: getattr(crop, side) / reduction for side in ("top", "left", "height", "width")})
    height, width = image.shape[:2]
    top, bottom = span_inside(crop.top, crop.height, height)
    left, right = span_inside(crop.left, crop.width, width)
    return resize(image[top:bottom, left:right], (size, size))


def span_inside(start: float, length: float, limit: int) -> tuple[int, int]:
    """The whole pixels (first, end) of a side of `limit` that a crop from `start` covers; at least one."""
    first = min(max(0, round(start)), limit - 1)
    return first, min(limit, max(first + 1, round(start + length)))


def resize(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """uint8 [H, W, 3] -> uint8 [h, w, 3], bilinear: OpenCV to enlarge, which is faster, `resize_as_pil` to shrink."""
    if size[0] >= image.shape[0] and size[1] >= image.shape[1] and image.shape[:2] != tuple(size):
        return cv2.resize(image, (size[1], size[0]), interpolation=cv2.INTER_LINEAR)
    return resize_as_pil(image, size)


def resize_as_pil(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """uint8 [H, W, 3] -> uint8 [h, w, 3], bilinear and antialiased by torch: at most a level from PIL, on which published figures rest."""
    if image.shape[:2] == tuple(size):
        return image
    planes = torch.from_numpy(image)[None].permute(0, 3, 1, 2)  # of [None] last, torch wouldn't see the memory as channels-last
    return F.interpolate(planes, size=list(size), mode="bilinear", antialias=True)[0].permute(1, 2, 0).numpy()


def stored_size(source: bytes | np.ndarray, *, name: str) -> tuple[int, int, bytes | np.ndarray]:
    """(height, width, source): from a JPEG's header; another format is decoded, and the pixels returned in its place."""
    if isinstance(source, bytes):
        known = jpeg_size(source)
        if known is not None and min(known) > 0:
            return *known, source
        source = decode(source, name=name)
    return source.shape[0], source.shape[1], source


def pixels_of(source: bytes | np.ndarray, *, name: str) -> np.ndarray:
    """uint8 RGB [H, W, 3] of an encoded image, or of one that is decoded already."""
    return decode(source, name=name) if isinstance(source, bytes) else source


def as_tensor(pixels: np.ndarray) -> Tensor:
    """uint8 [H, W, 3] -> uint8 [3, H, W] over the same channels-last memory, its own."""
    return torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)
