"""Which images each batch holds, fixed by (seed, epoch) alone, so that a position in the run is a single integer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from resbackbone.errors import InputError
from resbackbone.runtime.random_state import item_seed

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


class ResumableBatchSampler:
    """An endless iterator of this process's batches, each a list of `(epoch, index)` pairs.

    The global order depends on `seed` and the epoch only: each global batch of `batch_size` is cut into `world_size` equal slices, so a run
    can be continued on another number of processes. With `groups` (one integer an item, such as wide or tall) a batch holds one group;
    what is left of the groups makes mixed batches at the end of the epoch. Each item comes at most once an epoch; fewer than
    `batch_size` items are left out of it, others each time.

    Prefetching runs ahead of training, so the position is not where the iterator is: call `advance()` once a batch has been *consumed*.
    """

    def __init__(
        self,
        num_items: int,
        groups: np.ndarray | None = None,
        *,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        shuffle: bool = True,
    ) -> None:
        _check_sizes(num_items, batch_size, world_size)
        assert 0 <= rank < world_size, f"rank {rank} of {world_size}"
        assert groups is None or len(groups) == num_items, f"{len(groups or ())} groups for {num_items} items"
        self.num_items, self.batch_size, self.seed, self.shuffle = num_items, batch_size, seed, shuffle
        self.groups = None if groups is None else np.asarray(groups)
        self.batches_per_epoch = num_items // batch_size
        self.batches_done = 0
        share = batch_size // world_size
        self._slice = slice(rank * share, (rank + 1) * share)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, position = divmod(self.batches_done, self.batches_per_epoch)
        while True:
            for batch in self.epoch_batches(epoch)[position:]:
                yield [(epoch, index) for index in batch[self._slice].tolist()]
            epoch, position = epoch + 1, 0

    @property
    def epoch(self) -> float:
        """How many times the data has been gone through, as a fraction."""
        return self.batches_done / self.batches_per_epoch

    def advance(self, batches: int = 1) -> None:
        """Count batches that training has consumed."""
        self.batches_done += batches

    def epoch_batches(self, epoch: int) -> np.ndarray:
        """All global batches of one epoch: indices, int64 [batches_per_epoch, batch_size]."""
        order = shuffled(self.num_items, seed=item_seed(self.seed, epoch)) if self.shuffle else np.arange(self.num_items)
        if self.groups is not None:
            order = _grouped(order, self.groups, self.batch_size)
        return order[: self.batches_per_epoch * self.batch_size].reshape(-1, self.batch_size)

    def state_dict(self) -> dict[str, int]:
        """The position, and what it is a position in."""
        return {"batches_done": self.batches_done, "num_items": self.num_items, "batch_size": self.batch_size, "seed": self.seed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved position. Raises InputError where it belongs to other data, another batch size, seed or kind of sampler."""
        foreign = sorted(state.keys() - self.state_dict().keys())
        if foreign:  # such as the lanes of a stream of shards, which gives the same number of images in another order
            raise InputError(
                f"the checkpoint was written with images in another order, such as that of shards (it knows of {', '.join(foreign)}); its "
                "position would mean other images. Resume with the data.kind it was written with, or start a new run in another --output"
            )
        names = {"num_items": "the number of training images", "batch_size": "train.batch_size", "seed": "train.seed"}
        for key, name in names.items():
            if state.get(key, getattr(self, key)) != getattr(self, key):
                raise InputError(
                    f"the checkpoint was written with {name} = {state[key]}, this run has {getattr(self, key)}; its position would mean "
                    f"other images. Resume with {state[key]}, or start a new run in another --output"
                )
        self.batches_done = int(state["batches_done"])


def shuffled(count: int, *, seed: int) -> np.ndarray:
    """A permutation of 0 … count-1 (int64) by the SplitMix64 stream of `seed`; unlike numpy's, the same in every version for ever."""
    with np.errstate(over="ignore"):
        state = np.uint64(seed) + np.arange(1, count + 1, dtype=np.uint64) * _GOLDEN
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.argsort(state ^ (state >> np.uint64(31)), kind="stable")


def _grouped(order: np.ndarray, groups: np.ndarray, batch_size: int) -> np.ndarray:
    """Reorder so that each consecutive `batch_size` items are of one group, as long as any group can fill a batch."""
    batches, ready_at, leftovers = [], [], []
    of_group = groups[order]
    for group in np.unique(groups):
        positions = np.flatnonzero(of_group == group)
        full = len(positions) // batch_size * batch_size
        batches.append(order[positions[:full]].reshape(-1, batch_size))
        # A batch goes out when its last item comes by, so the groups stay interleaved as the shuffle had them.
        ready_at.append(positions[:full].reshape(-1, batch_size)[:, -1])
        leftovers.append(positions[full:])
    in_turn = np.concatenate(batches)[np.argsort(np.concatenate(ready_at), kind="stable")]
    return np.concatenate([in_turn.reshape(-1), order[np.sort(np.concatenate(leftovers))]])


def _check_sizes(num_items: int, batch_size: int, world_size: int) -> None:
    if batch_size < 1:
        raise InputError(f"train.batch_size={batch_size} is not a batch size; it is the number of images over all processes, 1 or more")
    if batch_size % world_size:
        fitting = max(world_size, batch_size // world_size * world_size)
        raise InputError(f"train.batch_size={batch_size} cannot be cut evenly over {world_size} processes; try {fitting}")
    if num_items < batch_size:
        raise InputError(
            f"there are {num_items} training images, fewer than train.batch_size={batch_size}; "
            + (f"set train.batch_size to at most {num_items}" if num_items else "check data.root, data.train and data.empty_images")
        )
