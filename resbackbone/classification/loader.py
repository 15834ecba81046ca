"""Batches from worker processes: endless for training, each image once for evaluation. Everything is uint8 until the device."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from resbackbone.classification.config import ClassificationConfig
from resbackbone.classification.dataset import (
    ClassificationDataset,
    EvalTransform,
    Sample,
    TrainTransform,
    counts_as_wrong,
    next_readable,
)
from resbackbone.classification.sources import Source
from resbackbone.errors import InputError
from resbackbone.runtime.distributed import Process, worker_start_method
from resbackbone.runtime.sampler import ResumableBatchSampler
from resbackbone.runtime.signals import ignore_signals_in_worker

_PREFETCH = 2  # batches each worker keeps ready


class Batch(NamedTuple):
    """images: uint8 [N, 3, S, S] in channels-last memory; labels: int64 [N]; shifts: float32 [N, 3], colour noise in 0 … 1.

    indices: int64 [N], the images' numbers in their source.
    """

    images: Tensor
    labels: Tensor
    shifts: Tensor
    indices: Tensor

    def to(self, device: torch.device) -> Batch:
        """The same batch on `device`; copies are asynchronous where the memory is page-locked."""
        return Batch(*(tensor.to(device, non_blocking=True) for tensor in self))

    @classmethod
    def join(cls, batches: Sequence[Batch]) -> Batch:
        """One batch of several, in their order."""
        return cls(*(torch.cat(tensors) for tensors in zip(*batches, strict=True)))


def collate(samples: Iterable[Sample], count: int) -> Batch:
    """One batch of `count` samples of one size, taken one at a time, so that each image's own memory serves the next one as well."""
    samples = iter(samples)
    first = next(samples)
    images = np.empty((count, *first.image.shape[1:], 3), dtype=np.uint8)
    rest = []
    for place, sample in zip(images, chain([first], samples), strict=True):
        place[...] = sample.image.permute(1, 2, 0).numpy()
        rest.append(sample[1:])
    labels, shifts, indices = zip(*rest, strict=True)
    return Batch(
        images=torch.from_numpy(images).permute(0, 3, 1, 2),
        labels=torch.tensor(labels),
        shifts=torch.from_numpy(np.stack(shifts)),
        indices=torch.tensor(indices),
    )


class Preparation(NamedTuple):
    """What workers make of an encoded image, and of several of the results; the batch has `to(device)`, which gives a Batch, and `join`."""

    transform: Callable[..., Any]
    collate: Callable[[Iterable[Any], int], Any]


def plain_preparation(config: ClassificationConfig) -> Preparation:
    """Workers decode."""
    return Preparation(TrainTransform(data=config.data, seed=config.train.seed), collate)


def train_loader(
    config: ClassificationConfig,
    source: Source,
    process: Process,
    *,
    preparation: Preparation | None = None,
    context: str | None = None,
) -> tuple[BatchLoader, ResumableBatchSampler]:
    """(loader, sampler): this process's share of each global batch, for ever; call sampler.advance() once a batch is used up."""
    settings, data, preparation = config.train, config.data, preparation or plain_preparation(config)
    dataset = ClassificationDataset(source, preparation.transform, stand_in=next_readable if data.unreadable == "skip" else None)
    sampler = ResumableBatchSampler(
        len(dataset), batch_size=settings.batch_size, seed=settings.seed, rank=process.rank, world_size=process.world_size
    )
    return BatchLoader(_Reader(dataset, preparation.collate), sampler, workers=data.workers, context=context), sampler


def eval_loader(config: ClassificationConfig, source: Source, process: Process, *, context: str | None = None) -> BatchLoader:
    """This process's share of the evaluation images, as lists of `Views`; each image is in exactly one share."""
    dataset = ClassificationDataset(
        source, EvalTransform(settings=config.eval), stand_in=counts_as_wrong if config.data.unreadable == "skip" else None
    )
    mine = range(process.rank, len(dataset), process.world_size)
    size = config.eval.batch_size
    batches = [[(0, index) for index in mine[start : start + size]] for start in range(0, len(mine), size)]
    return BatchLoader(_Reader(dataset, _listed), batches, workers=config.data.workers, context=context)


class BatchLoader:
    """Iterates over batches that workers prepare ahead, from the sampler's position on. `unreadable()` counts the images skipped so far."""

    def __init__(self, reader: _Reader, batches: Any, *, workers: int, context: str | None = None) -> None:
        self.reader, self.batches, self.workers, self.context = reader, batches, workers, context or worker_start_method()
        if workers:
            reader.dataset.unreadable.share_memory_()

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        loader: DataLoader[Any] = DataLoader(
            self.reader,  # type: ignore[arg-type]  # it has what the loader asks for
            batch_sampler=self.batches,
            num_workers=self.workers,
            collate_fn=_identity,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=start_worker if self.workers else None,
            multiprocessing_context=self.context if self.workers else None,
            prefetch_factor=_PREFETCH if self.workers else None,
            # Its own generator: the loader draws a seed at each start, which must not move the training's random state.
            generator=torch.Generator(),
        )
        yield from raise_errors(loader)

    def unreadable(self) -> int:
        """How many images could not be read so far."""
        return int(self.reader.dataset.unreadable.sum())


def raise_errors(loader: Any) -> Iterator[Any]:
    """Batches of a DataLoader; an InputError that a worker returned is raised here, without the worker's traceback around it."""
    try:
        for batch in loader:
            if isinstance(batch, InputError):
                raise batch
            yield batch
    except (RuntimeError, OSError) as error:
        text = str(error).lower()
        if "shared memory" in text or "bus error" in text:
            raise InputError(
                "a data worker ran out of shared memory (/dev/shm); give the container more, or set fewer data.workers"
            ) from error
        if "killed by signal: killed" in text:
            raise InputError("a data worker was killed, most likely because memory ran out; set fewer data.workers") from error
        raise


def start_worker(worker: int) -> None:
    """One thread a worker (the workers are the parallelism), and signals left to the training process."""
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    ignore_signals_in_worker(worker)


@dataclass
class _Reader:
    """The data set as the loader's workers see it: a list of keys in, a collated batch out, or the InputError that stops the run."""

    dataset: ClassificationDataset
    collate: Callable[[Iterable[Any], int], Any]

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, keys: list[tuple[int, int]]) -> Any:
        try:
            return self.collate((self.dataset[key] for key in keys), len(keys))
        except InputError as error:
            return error


def _listed(samples: Iterable[Any], _: int) -> list[Any]:
    return list(samples)


def _identity(batch: Any) -> Any:
    return batch
