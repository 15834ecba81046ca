"""Training and evaluation from shards that are read from front to back.

An epoch puts the shards in an order of its own, cuts that row of images into `lanes` equal stretches, and shuffles each stretch block by
block. A batch takes equally many from every lane; a process reads its own lanes and no others. All of it follows from (seed, epoch) and
the index: the position is one integer, and any number of processes that divides the lanes gives the same batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from resbackbone.classification.config import ClassificationConfig
from resbackbone.classification.dataset import EvalTransform, Views
from resbackbone.classification.files import UnreadableImage
from resbackbone.classification.loader import Batch, Preparation, plain_preparation, raise_errors, start_worker
from resbackbone.classification.shards import ShardIndex, read_shard
from resbackbone.errors import InputError
from resbackbone.runtime.distributed import Process, worker_start_method
from resbackbone.runtime.random_state import item_seed
from resbackbone.runtime.sampler import shuffled

_PREFETCH = 2  # parts of a batch that each worker keeps ready


class StreamSampler:
    """The position in the stream and what follows from it, as runtime's ResumableBatchSampler has it for images at random."""

    def __init__(self, counts: np.ndarray, *, batch_size: int, lanes: int, block: int, seed: int, world_size: int = 1) -> None:
        if lanes % world_size or batch_size % lanes:
            raise InputError(
                f"data.lanes={lanes} must be a multiple of the {world_size} processes and divide train.batch_size={batch_size}; "
                f"try data.lanes={world_size} and a batch that it divides"
            )
        self.counts, self.batch_size, self.lanes, self.block, self.seed = counts, batch_size, lanes, block, seed
        self.batches_per_epoch = int(counts.sum()) // batch_size
        if not self.batches_per_epoch:
            raise InputError(f"the shards hold {int(counts.sum())} images, fewer than train.batch_size={batch_size}; set it lower")
        self.share = batch_size // lanes  # images of a batch from each lane
        self.batches_done = 0

    @property
    def epoch(self) -> float:
        """How many times the data has been gone through, as a fraction."""
        return self.batches_done / self.batches_per_epoch

    def advance(self, batches: int = 1) -> None:
        """Count batches that training has consumed."""
        self.batches_done += batches

    def blocks(self, epoch: int, lane: int, *, position: int = 0) -> Iterator[tuple[list[tuple[int, int, int]], np.ndarray]]:
        """The blocks of one lane from its image number `position` on: pieces (shard, first, last) to read, and the order to give them out.

        Order: positions int64 within the pieces taken together; of the first block, only what is left of it.
        """
        shards = shuffled(len(self.counts), seed=item_seed(self.seed, epoch))
        ends = np.cumsum(self.counts[shards])
        length = self.batches_per_epoch * self.share
        for start in range(position // self.block * self.block, length, self.block):
            count = min(self.block, length - start)
            order = shuffled(count, seed=item_seed(self.seed, epoch, lane, start))
            yield list(_pieces(shards, ends, lane * length + start, count)), order[max(0, position - start) :]

    def state_dict(self) -> dict[str, int]:
        """The position, and what it is a position in."""
        return {"batches_done": self.batches_done, **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved position. Raises InputError where it belongs to another order of images."""
        for key, value in self._identity().items():
            if state.get(key) != value:
                raise InputError(
                    f"the checkpoint was written with {key} = {state.get(key)}, this run has {value}; its position would mean other "
                    "images. Resume with the settings and shards it was written with, or start a new run in another --output"
                )
        self.batches_done = int(state["batches_done"])

    def _identity(self) -> dict[str, int]:
        names = ("batch_size", "lanes", "block", "seed")
        return {"num_items": int(self.counts.sum()), "num_shards": len(self.counts), **{name: getattr(self, name) for name in names}}


def _pieces(shards: np.ndarray, ends: np.ndarray, start: int, count: int) -> Iterator[tuple[int, int, int]]:
    """(shard, first, last) that cover `count` images from `start` on, in the row of `shards` that end at `ends`."""
    place = int(np.searchsorted(ends, start, side="right"))
    while count:
        begin = int(ends[place - 1]) if place else 0
        taken = min(count, int(ends[place]) - start)
        yield int(shards[place]), start - begin, start - begin + taken
        start, count, place = start + taken, count - taken, place + 1


@dataclass
class _TrainStream(IterableDataset):
    """One worker's lanes: for each batch, `(lane, Batch)` parts of it, or the InputError that stops the run."""

    index: ShardIndex
    sampler: StreamSampler
    preparation: Preparation
    lanes: range
    skip_unreadable: bool

    def __iter__(self) -> Iterator[Any]:
        info = get_worker_info()
        lanes = self.lanes if info is None else self.lanes[info.id :: info.num_workers]
        epoch, batch = divmod(self.sampler.batches_done, self.sampler.batches_per_epoch)
        try:
            while True:
                streams = [self._lane(epoch, lane, batch * self.sampler.share) for lane in lanes]
                for _ in range(batch, self.sampler.batches_per_epoch):
                    yield [(lane, self._part(stream)) for lane, stream in zip(lanes, streams, strict=True)]
                epoch, batch = epoch + 1, 0
        except InputError as error:
            yield error

    def _part(self, stream: Iterator[Any]) -> Any:
        return self.preparation.collate(islice(stream, self.sampler.share), self.sampler.share)

    def _lane(self, epoch: int, lane: int, position: int) -> Iterator[Any]:
        reader = _Reader(self.index)
        for pieces, order in self.sampler.blocks(epoch, lane, position=position):
            held = [item for piece in pieces for item in reader.read(*piece)]
            for place in order.tolist():
                yield self._sample(held, place, epoch)

    def _sample(self, held: list[tuple[int, bytes, int]], place: int, epoch: int) -> Any:
        for step in range(len(held)):
            number, data, label = held[(place + step) % len(held)]
            try:
                return self.preparation.transform(data, label, epoch=epoch, index=number, name=f"{self.index.place}, image {number}")
            except UnreadableImage as error:
                if not self.skip_unreadable:
                    raise InputError(f"{error}. Or go on without it: data.unreadable=skip") from error
        raise InputError(f"{self.index.place}: {len(held)} images in a row cannot be read; write the shards again")


class _Reader:
    """Goes on in an open shard where the next piece begins where the last one ended; opens another otherwise."""

    def __init__(self, index: ShardIndex) -> None:
        self.index = index
        self.shard, self.at = -1, 0
        self.rows: Iterator[tuple[int, bytes, int]] = iter(())

    def read(self, shard: int, first: int, last: int) -> Iterator[tuple[int, bytes, int]]:
        if (shard, first) != (self.shard, self.at):
            self.rows = read_shard(self.index, shard, first=first)
        self.shard, self.at = shard, last
        for _ in range(last - first):
            yield next(self.rows)


class StreamLoader:
    """Endless training batches from shards, in the order of the sampler and from its position on."""

    def __init__(self, stream: _TrainStream, *, workers: int, context: str | None) -> None:
        self.stream, self.context = stream, context or worker_start_method()
        self.workers = min(workers, len(stream.lanes))

    def __iter__(self) -> Iterator[Batch]:
        loader: DataLoader[Any] = _data_loader(self.stream, self.workers, self.context)
        parts: list[Any] = []
        for part in raise_errors(loader):
            parts.append(part)  # workers take turns, so each batch is one part of each
            if len(parts) == max(1, self.workers):
                in_order = sorted((one for each in parts for one in each), key=lambda one: one[0])
                batches = [batch for _, batch in in_order]
                yield batches[0].join(batches)
                parts = []

    def unreadable(self) -> int:
        """Not counted: what a stream skips, it doesn't tell."""
        return 0


def train_stream(
    config: ClassificationConfig,
    index: ShardIndex,
    process: Process,
    *,
    preparation: Preparation | None = None,
    context: str | None = None,
) -> tuple[StreamLoader, StreamSampler]:
    """(loader, sampler): this process's lanes of each global batch, for ever; call sampler.advance() once a batch is used up."""
    data, settings = config.data, config.train
    sampler = StreamSampler(
        index.counts,
        batch_size=settings.batch_size,
        lanes=data.lanes,
        block=data.shuffle_block,
        seed=settings.seed,
        world_size=process.world_size,
    )
    share = data.lanes // process.world_size
    stream = _TrainStream(
        index=index,
        sampler=sampler,
        preparation=preparation or plain_preparation(config),
        lanes=range(process.rank * share, (process.rank + 1) * share),
        skip_unreadable=data.unreadable == "skip",
    )
    return StreamLoader(stream, workers=data.workers, context=context), sampler


@dataclass
class _EvalStream(IterableDataset):
    """Every image of this process's shards once; a worker takes whole shards."""

    index: ShardIndex
    transform: Callable[..., Views]
    shards: range
    batch_size: int
    skip_unreadable: bool

    def __iter__(self) -> Iterator[Any]:
        info = get_worker_info()
        batch: list[Views] = []
        try:
            for shard in self.shards if info is None else self.shards[info.id :: info.num_workers]:
                for number, data, label in read_shard(self.index, shard):
                    batch.append(self._views(number, data, label))
                    if len(batch) == self.batch_size:
                        yield batch
                        batch = []
            if batch:
                yield batch
        except InputError as error:
            yield error

    def _views(self, number: int, data: bytes, label: int) -> Views:
        try:
            return self.transform(data, label, epoch=0, index=number, name=f"{self.index.place}, image {number}")
        except UnreadableImage as error:
            if not self.skip_unreadable:
                raise InputError(f"{error}. Or go on without it: data.unreadable=skip") from error
            return Views(stacks=[], label=label)


def eval_stream(config: ClassificationConfig, index: ShardIndex, process: Process, *, context: str | None = None) -> Iterator[list[Views]]:
    """This process's share of the evaluation images, in whole shards; each image is in exactly one share."""
    stream = _EvalStream(
        index=index,
        transform=EvalTransform(settings=config.eval),
        shards=range(process.rank, len(index.counts), process.world_size),
        batch_size=config.eval.batch_size,
        skip_unreadable=config.data.unreadable == "skip",
    )
    return raise_errors(_data_loader(stream, config.data.workers, context or worker_start_method()))


def _data_loader(stream: IterableDataset, workers: int, context: str) -> DataLoader[Any]:
    return DataLoader(
        stream,
        batch_size=None,
        num_workers=workers,
        worker_init_fn=start_worker if workers else None,
        multiprocessing_context=context if workers else None,
        prefetch_factor=_PREFETCH if workers else None,
        generator=torch.Generator(),
    )
