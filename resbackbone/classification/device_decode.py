"""`data.decode=gpu`: workers hand over encoded JPEGs, and the device decodes, cuts, resizes and mirrors them (torchvision's nvJPEG).

N images, S the side of a crop, B bytes of all files of a batch together.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from resbackbone.classification.config import ClassificationConfig, DataConfig
from resbackbone.classification.dataset import TrainTransform, auto_augmented
from resbackbone.classification.files import MAX_PIXELS, decode, jpeg_size
from resbackbone.classification.loader import Batch, Preparation
from resbackbone.classification.transforms import span_inside
from resbackbone.errors import InputError


class EncodedSample(NamedTuple):
    """data: uint8 [bytes], a JPEG file, or, where `ready`, [3 * S * S] an image that a worker has prepared as without a GPU."""

    data: np.ndarray
    ready: bool
    place: tuple[int, int, int, int]  # top, bottom, left, right of the crop, pixels of the stored image
    flip: bool
    seed: int
    label: int
    shift: np.ndarray
    number: int
    name: str


@dataclass(frozen=True, kw_only=True)
class EncodedTransform:
    """Encoded image -> the same draws as TrainTransform's for (seed, epoch, index), without its pixels."""

    data: DataConfig
    seed: int

    def __call__(self, source: bytes | np.ndarray, label: int, *, epoch: int, index: int, name: str) -> EncodedSample:
        plain = TrainTransform(data=self.data, seed=self.seed)
        size = jpeg_size(source) if isinstance(source, bytes) else None
        if size is None or not 0 < size[0] * size[1] <= MAX_PIXELS or source.rfind(b"\xff\xd9") < 0:  # type: ignore[union-attr]
            sample = plain(source, label, epoch=epoch, index=index, name=name)  # it also explains what is wrong
            pixels = sample.image.contiguous().numpy().reshape(-1)
            return EncodedSample(pixels, True, (0, 0, 0, 0), False, 0, label, sample.shift, index, name)
        seed, rng, flip, shift = plain.draws(epoch, index)
        crop = plain.crop(*size, rng)
        place = *span_inside(crop.top, crop.height, size[0]), *span_inside(crop.left, crop.width, size[1])
        return EncodedSample(np.frombuffer(source, dtype=np.uint8), False, place, flip, seed, label, shift, index, name)


class EncodedBatch(NamedTuple):
    """data: uint8 [B], one after the other; `rows` has what belongs to each. `to` makes the Batch that training takes."""

    data: Tensor
    rows: list[EncodedSample]  # their own `data` empty, its length in `lengths`
    lengths: list[int]
    settings: DataConfig

    @classmethod
    def join(cls, batches: Sequence[EncodedBatch]) -> EncodedBatch:
        """One batch of several, in their order."""
        rows, lengths = ([one for batch in batches for one in getattr(batch, name)] for name in ("rows", "lengths"))
        return cls(torch.cat([batch.data for batch in batches]), rows, lengths, batches[0].settings)

    def to(self, device: torch.device) -> Batch:
        """Decoded on `device`. Raises InputError naming a file that neither it nor the CPU can decode."""
        parts, size = self.data.split(self.lengths), self.settings.size
        encoded = [number for number, row in enumerate(self.rows) if not row.ready]
        decoded = decode_on(device, [parts[number] for number in encoded], [self.rows[number].name for number in encoded])
        pixels = dict(zip(encoded, decoded, strict=True))
        images = [
            parts[number].view(3, size, size).to(device, non_blocking=True) if row.ready else _prepared(pixels[number], row, self.settings)
            for number, row in enumerate(self.rows)
        ]
        return Batch(
            images=torch.stack(images).contiguous(memory_format=torch.channels_last),
            labels=torch.tensor([row.label for row in self.rows]).to(device, non_blocking=True),
            shifts=torch.from_numpy(np.stack([row.shift for row in self.rows])).to(device, non_blocking=True),
            indices=torch.tensor([row.number for row in self.rows]).to(device, non_blocking=True),
        )


@dataclass(frozen=True)
class EncodedCollate:
    """Samples -> one EncodedBatch: two objects to hand over, not one for each image."""

    settings: DataConfig

    def __call__(self, samples: Iterable[EncodedSample], count: int) -> EncodedBatch:
        rows = [sample for sample, _ in zip(samples, range(count), strict=True)]
        data, nothing = torch.from_numpy(np.concatenate([row.data for row in rows])), np.empty(0, dtype=np.uint8)
        return EncodedBatch(data, [row._replace(data=nothing) for row in rows], [len(row.data) for row in rows], self.settings)


def _prepared(image: Tensor, row: EncodedSample, settings: DataConfig) -> Tensor:
    """The crop of a decoded image, uint8 [3, H, W] -> uint8 [3, S, S], antialiased, mirrored and augmented as `row` says."""
    top, bottom, left, right = row.place
    part = image[None, :, top:bottom, left:right].float()
    part = F.interpolate(part, size=(settings.size, settings.size), mode="bilinear", antialias=True)[0].round().clamp(0, 255).byte()
    part = part.flip(-1) if row.flip else part
    return part if settings.auto_augment == "none" else auto_augmented(part, settings.auto_augment, row.seed)


def decode_on(device: torch.device, jpegs: list[Tensor], names: list[str]) -> list[Tensor]:
    """uint8 RGB [3, H, W] of each file's bytes; what the device refuses (CMYK, damage) the CPU tries. Raises InputError naming the file."""
    from torchvision.io import ImageReadMode, decode_jpeg

    try:
        return decode_jpeg(jpegs, mode=ImageReadMode.RGB, device=device) if jpegs else []
    except RuntimeError as error:
        if len(jpegs) > 1:
            return [decode_on(device, [jpeg], [name])[0] for jpeg, name in zip(jpegs, names, strict=True)]
        if "not compiled" in str(error):
            raise InputError("this torchvision was built without nvJPEG; install the one for CUDA, or set data.decode=cpu") from error
        return [torch.from_numpy(decode(jpegs[0].numpy().tobytes(), name=names[0])).permute(2, 0, 1).to(device)]


def encoded_preparation(config: ClassificationConfig, device: torch.device) -> Preparation:
    """For train_loader and train_stream. Raises InputError where there is no GPU to decode on."""
    if device.type != "cuda":
        raise InputError(f"data.decode=gpu decodes on an NVIDIA GPU, and this run is on the {device.type}; set data.decode=cpu")
    return Preparation(EncodedTransform(data=config.data, seed=config.train.seed), EncodedCollate(config.data))
