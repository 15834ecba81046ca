"""From a list of images to one normalised, padded batch, on the device and in one place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from resbackbone.errors import InputError

if TYPE_CHECKING:
    from resbackbone.backbone import Preprocessing

Size = tuple[int, int]  # (height, width), pixels
ROWS_AT_A_TIME = 64  # what is between uint8 and the batch stays in the cache: 0.6 of the time of whole images
SLACK = 0.25  # how far resizing and added noise may take a float image out of 0..1


class Preprocess(nn.Module):
    """Normalises as the backbone's weights want it, then pads with zeros (the mean colour) to a common size."""

    factor: Tensor
    offset: Tensor

    def __init__(self, preprocessing: Preprocessing, *, divisor: int = 32) -> None:
        """divisor: padded sides are multiples of it, so that every stage of the backbone halves exactly."""
        super().__init__()
        mean, std = torch.tensor(preprocessing.mean), torch.tensor(preprocessing.std)
        self.preprocessing, self.divisor = preprocessing, divisor
        # The mean and standard deviation are in the order of the network's own channels.
        self.register_buffer("factor", (preprocessing.input_range / std).view(-1, 1, 1), persistent=False)
        self.register_buffer("offset", (-mean / std).view(-1, 1, 1), persistent=False)

    def forward(self, images: Sequence[Tensor]) -> tuple[Tensor, list[Size]]:
        """images: RGB (3, h, w), uint8 or float in 0..1. Returns the batch (N, 3, H, W) float32 and each image's (h, w).

        Raises InputError for a float image far outside 0..1: it has been normalised already, or is in 0..255.
        """
        for image in images:
            _check_range(image)
        sizes = [(image.shape[-2], image.shape[-1]) for image in images]
        padded = [self.padded_size(size) for size in sizes]
        height, width = max(size[0] for size in padded), max(size[1] for size in padded)
        batch = self.factor.new_empty((len(images), 3, height, width))
        for place, image, (h, w) in zip(batch, images, sizes, strict=True):
            place[:, h:] = 0
            place[:, :h, w:] = 0
            rows = ROWS_AT_A_TIME if image.device.type == "cpu" else max(h, 1)
            for part, target in zip(image.split(rows, dim=1), place[:, :h, :w].split(rows, dim=1), strict=True):
                torch.add(self._scaled(part), self.offset, out=target)
        return batch, sizes

    def _scaled(self, image: Tensor) -> Tensor:
        image = image.flip(0) if self.preprocessing.color_order == "BGR" else image
        return image * (self.factor if image.is_floating_point() else self.factor / 255)

    def padded_size(self, size: Size) -> Size:
        """The size an image of `size` has in a batch of its own."""
        height, width = (-(-side // self.divisor) * self.divisor for side in size)
        return height, width


def _check_range(image: Tensor) -> None:
    """Only floats can be wrong. A compiled or exported graph has no place for the question."""
    if not image.is_floating_point() or not image.numel() or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return
    low, high = (float(value) for value in image.detach().aminmax())
    if low < -SLACK or high > 1 + SLACK:
        raise InputError(
            f"a float image has values from {low:.3g} to {high:.3g}; it should be uint8, or float from 0 to 1, and not normalised: that "
            "happens here, and twice is wrong. Leave your own Normalize out, or divide by 255"
        )
