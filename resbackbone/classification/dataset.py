"""One training or evaluation sample, decided by (seed, epoch, index) alone: the sampler's position is the whole state of the input."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor

from resbackbone.classification.config import DataConfig, EvalConfig
from resbackbone.classification.files import UnreadableImage
from resbackbone.classification.sources import Source
from resbackbone.classification.transforms import (
    Crop,
    area_crop,
    as_tensor,
    cut,
    padded_crop,
    pca_shift,
    pixels_of,
    scale_crop,
    stored_size,
)
from resbackbone.classification.views import image_views
from resbackbone.errors import InputError
from resbackbone.runtime.random_state import item_seed

_MAX_UNREADABLE_IN_A_ROW = 100  # then the disk is gone, not a file
_logger = logging.getLogger(__name__)


class Sample(NamedTuple):
    """image: uint8 [3, S, S] RGB; shift: what colour noise adds in 0 … 1, float32 [3]; number: the image's in its source."""

    image: Tensor
    label: int
    shift: np.ndarray
    number: int


class Views(NamedTuple):
    """What an image looks like to each pass of an evaluation: stacks of uint8 [V, 3, h, w], one a shape; none: it couldn't be read."""

    stacks: list[Tensor]
    label: int


@dataclass(frozen=True, kw_only=True)
class TrainTransform:
    """Encoded image -> training sample, as `data` says."""

    data: DataConfig
    seed: int

    def __call__(self, source: bytes | np.ndarray, label: int, *, epoch: int, index: int, name: str) -> Sample:
        seed, rng, flip, shift = self.draws(epoch, index)
        pixels = self._cropped(source, rng, name)
        image = as_tensor(cv2.flip(pixels, 1) if flip else pixels)  # numpy's mirrored view takes ten times as long to copy
        if self.data.auto_augment != "none":
            image = auto_augmented(image, self.data.auto_augment, seed)
        return Sample(image=image, label=label, shift=shift, number=index)

    def draws(self, epoch: int, index: int) -> tuple[int, np.random.Generator, bool, np.ndarray]:
        """(seed, generator, flip, colour shift) of one image in one epoch; the crop is the generator's next draw."""
        data, seed = self.data, item_seed(self.seed, epoch, index)
        rng = np.random.default_rng(seed)
        flip = data.flip and bool(rng.random() < 0.5)
        return seed, rng, flip, pca_shift(data.pca_noise, rng) if data.pca_noise else np.zeros(3, dtype=np.float32)

    def crop(self, height: int, width: int, rng: np.random.Generator) -> Crop:
        """What is cut from an image of this size, `data.crop` being scale or area."""
        if self.data.crop == "scale":
            return scale_crop(height, width, size=self.data.size, shorter_side=self.data.shorter_side, rng=rng)
        return area_crop(height, width, area=self.data.area, rng=rng)

    def _cropped(self, source: bytes | np.ndarray, rng: np.random.Generator, name: str) -> np.ndarray:
        data = self.data
        if data.crop == "pad":
            return padded_crop(pixels_of(source, name=name), size=data.size, padding=data.padding, rng=rng)
        height, width, source = stored_size(source, name=name)
        return cut(source, self.crop(height, width, rng), size=data.size, name=name, reduced=data.reduced_decoding)


def auto_augmented(image: Tensor, policy: str, seed: int) -> Tensor:
    """torchvision's RandAugment or TrivialAugmentWide of uint8 [3, S, S]; it draws from torch's global generator, which is put back."""
    from torchvision.transforms import v2

    augment = v2.RandAugment() if policy == "randaugment" else v2.TrivialAugmentWide()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return augment(image)


@dataclass(frozen=True, kw_only=True)
class EvalTransform:
    """Encoded image -> its views, as `settings` says."""

    settings: EvalConfig

    def __call__(self, source: bytes | np.ndarray, label: int, *, epoch: int, index: int, name: str) -> Views:
        return Views(stacks=image_views(pixels_of(source, name=name), self.settings), label=label)


class ClassificationDataset:
    """Samples by `(epoch, index)`.

    stand_in: what an unreadable image becomes; None stops. Flagged once in `unreadable`, uint8 [images], which the loader shares.
    """

    def __init__(
        self, source: Source, transform: Callable[..., Any], *, stand_in: Callable[[ClassificationDataset, int, int], Any] | None
    ) -> None:
        self.source, self.transform, self.stand_in = source, transform, stand_in
        self.unreadable = torch.zeros(len(source.labels), dtype=torch.uint8)

    def __len__(self) -> int:
        return len(self.source.labels)

    def __getitem__(self, key: tuple[int, int]) -> Any:
        epoch, index = key
        try:
            return self.sample(epoch, index)
        except UnreadableImage as error:
            if self.stand_in is None:
                raise InputError(f"{error}. Or go on without it: data.unreadable=skip") from error
            if not self.unreadable[index]:
                self.unreadable[index] = 1
                _logger.warning("%s; skipped", error)
            return self.stand_in(self, epoch, index)

    def sample(self, epoch: int, index: int) -> Any:
        """The sample itself. Raises UnreadableImage."""
        label = int(self.source.labels[index])
        return self.transform(self.source.read(index), label, epoch=epoch, index=index, name=self.source.name(index))


def next_readable(dataset: ClassificationDataset, epoch: int, index: int) -> Any:
    """For training: the first readable image after one that isn't."""
    for step in range(1, min(len(dataset), _MAX_UNREADABLE_IN_A_ROW)):
        try:
            return dataset.sample(epoch, (index + step) % len(dataset))
        except UnreadableImage:
            continue
    raise InputError(f"{_MAX_UNREADABLE_IN_A_ROW} images in a row cannot be read; is the disk still there?")


def counts_as_wrong(dataset: ClassificationDataset, epoch: int, index: int) -> Views:
    """For evaluation: an image without views, which no answer gets right."""
    return Views(stacks=[], label=int(dataset.source.labels[index]))
