"""The views of an image that an evaluation averages over: one crop, ten crops, or the whole image at several scales (§3.4); uint8."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from resbackbone.classification.config import EvalConfig
from resbackbone.classification.transforms import as_tensor, resize_as_pil


def image_views(pixels: np.ndarray, settings: EvalConfig) -> list[Tensor]:
    """uint8 RGB [H, W, 3] -> stacks of views, uint8 [V, 3, h, w], one stack a shape.

    1crop: the centre; 10crop: the four corners and the centre, and the same mirrored (Krizhevsky et al. 2012, §4.1), both from the
    image with its shorter side at `eval.shorter_side`; multiscale: the whole image at each of `eval.scales`, mirrored too with `eval.flip`.
    """
    if settings.mode == "multiscale":
        scaled = [as_tensor(resize_shorter(pixels, scale)) for scale in settings.scales]
        return [torch.stack([image, image.flip(-1)] if settings.flip else [image]) for image in scaled]
    image = as_tensor(resize_shorter(pixels, settings.shorter_side))
    if settings.mode == "1crop":
        return [centre_crop(image, settings.crop)[None]]
    return [ten_crop(image, settings.crop)]


def resize_shorter(pixels: np.ndarray, side: int) -> np.ndarray:
    """uint8 [H, W, 3] with its shorter side at `side`, the longer rounded down, as torchvision does."""
    height, width = pixels.shape[:2]
    shorter = min(height, width)
    return resize_as_pil(pixels, (side * height // shorter, side * width // shorter))


def centre_crop(image: Tensor, side: int) -> Tensor:
    """[3, H, W] -> [3, side, side] with torchvision's rounding."""
    top, left = (round((length - side) / 2.0) for length in image.shape[-2:])
    return image[..., top : top + side, left : left + side]


def ten_crop(image: Tensor, side: int) -> Tensor:
    """[3, H, W] -> [10, 3, side, side]: corners and centre, then the same of the mirrored image."""
    crops = []
    for picture in (image, image.flip(-1)):
        crops += [
            picture[..., rows, columns] for rows in (slice(0, side), slice(-side, None)) for columns in (slice(0, side), slice(-side, None))
        ]
        crops.append(centre_crop(picture, side))
    return torch.stack(crops)
