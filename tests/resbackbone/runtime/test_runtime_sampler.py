"""The order of images: a pure function of (seed, epoch), the same for any number of processes, and resumable at any batch."""

from __future__ import annotations

from itertools import chain, islice
from typing import Any

import numpy as np
import pytest
import torch

from resbackbone.errors import InputError
from resbackbone.runtime.sampler import ResumableBatchSampler, shuffled

GROUPS = np.array([0, 1, 1, 0, 0, 1, 0, 0, 0, 1, 0, 1, 1, 0, 1, 0, 2])


def take(sampler: ResumableBatchSampler, count: int) -> list[list[tuple[int, int]]]:
    return list(islice(sampler, count))


def make(**changes: Any) -> ResumableBatchSampler:
    return ResumableBatchSampler(**{"num_items": 17, "batch_size": 4, "seed": 3, **changes})


@pytest.mark.parametrize("groups", [None, GROUPS])
@pytest.mark.parametrize("shuffle", [True, False])
def test_each_item_at_most_once_an_epoch_and_fewer_than_a_batch_left_out(groups: np.ndarray | None, shuffle: bool) -> None:
    for epoch in range(5):
        flat = make(groups=groups, shuffle=shuffle).epoch_batches(epoch).reshape(-1).tolist()
        assert len(flat) == 16
        assert len(set(flat)) == 16
        assert set(flat) <= set(range(17))


def test_pairs_carry_their_epoch() -> None:
    assert [sorted({epoch for epoch, _ in batch}) for batch in take(make(), 9)] == [[0]] * 4 + [[1]] * 4 + [[2]]


def test_every_item_comes_in_some_epoch() -> None:
    assert {index for batch in take(make(), 4 * 20) for _, index in batch} == set(range(17))


def test_batches_hold_one_group_except_the_leftovers() -> None:
    batches = make(groups=GROUPS).epoch_batches(0)
    kinds = [len(set(GROUPS[batch])) for batch in batches]
    # 9 items of group 0 and 7 of group 1 fill two and one batches of four; the rest is mixed, and comes last.
    assert kinds == sorted(kinds)
    assert kinds.count(1) == 3


def test_groups_stay_interleaved() -> None:
    groups = np.arange(4000) % 2
    first_half = groups[ResumableBatchSampler(4000, groups, batch_size=4, seed=0).epoch_batches(0)[:500, 0]]
    assert 0.4 < first_half.mean() < 0.6


def test_epochs_and_seeds_differ_and_repeat() -> None:
    batches = [make(seed=seed).epoch_batches(epoch).tolist() for seed in (0, 1) for epoch in (0, 1)]
    assert all(batches[i] != batches[j] for i in range(4) for j in range(i))
    assert make(seed=1).epoch_batches(1).tolist() == batches[3]
    assert make(shuffle=False).epoch_batches(7).reshape(-1).tolist() == list(range(16))


@pytest.mark.parametrize("groups", [None, GROUPS])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_processes_cut_the_same_global_batches(groups: np.ndarray | None, world_size: int) -> None:
    parts = [take(make(groups=groups, rank=rank, world_size=world_size), 11) for rank in range(world_size)]
    joined = [list(chain(*batches)) for batches in zip(*parts, strict=True)]
    assert joined == take(make(groups=groups), 11)
    assert all(len(batch) == 4 // world_size for part in parts for batch in part)


@pytest.mark.parametrize("stop", [0, 1, 3, 4, 5, 9])
def test_resume_continues_as_if_never_stopped(stop: int) -> None:
    whole = take(make(groups=GROUPS), 14)
    sampler = make(groups=GROUPS)
    iterator = iter(sampler)
    for _ in range(stop):
        next(iterator)
        sampler.advance()
    next(iterator)  # prefetched, never consumed
    resumed = make(groups=GROUPS)
    resumed.load_state_dict(sampler.state_dict())
    assert take(resumed, 14 - stop) == whole[stop:]
    assert resumed.epoch == stop / 4


def test_the_position_may_move_to_another_number_of_processes() -> None:
    sampler = make()
    sampler.advance(6)
    halves = [make(rank=rank, world_size=2) for rank in (0, 1)]
    for half in halves:
        half.load_state_dict(sampler.state_dict())
    assert next(iter(halves[0])) + next(iter(halves[1])) == take(make(), 7)[6]


@pytest.mark.parametrize("change", [{"batch_size": 2}, {"num_items": 18}, {"seed": 4}])
def test_a_position_in_other_data_is_refused(change: dict[str, int]) -> None:
    with pytest.raises(InputError, match=r"checkpoint was written with .* this run has"):
        make(**change).load_state_dict(make().state_dict())


def test_a_position_among_shards_is_refused() -> None:
    shards = {**make().state_dict(), "lanes": 16, "block": 256, "num_shards": 3}
    with pytest.raises(InputError, match=r"another order, such as that of shards \(it knows of block, lanes, num_shards\)"):
        make().load_state_dict(shards)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_items": 3}, "there are 3 training images, fewer than train.batch_size=4; set train.batch_size to at most 3"),
        ({"num_items": 0}, "there are 0 training images, .*; check data.root"),
        ({"batch_size": 0}, "train.batch_size=0 is not a batch size"),
        ({"world_size": 3}, "train.batch_size=4 cannot be cut evenly over 3 processes; try 3"),
        ({"world_size": 8}, "try 8"),
    ],
)
def test_sizes_that_cannot_work(change: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make(**change)


def test_shuffled_is_a_fixed_uniform_permutation() -> None:
    assert sorted(shuffled(1000, seed=5).tolist()) == list(range(1000))
    assert shuffled(0, seed=1).tolist() == []
    # SplitMix64 of seed 1234567 begins 6457827717110365317, 3203168211198807973, 9817491932198370423 (Vigna's reference C code).
    assert shuffled(3, seed=1234567).tolist() == [1, 0, 2]
    firsts = np.bincount([shuffled(10, seed=seed)[0] for seed in range(4000)], minlength=10)
    assert firsts.min() > 320
    assert firsts.max() < 480


def test_it_drives_a_data_loader() -> None:
    class Pairs(torch.utils.data.Dataset[int]):
        def __getitem__(self, key: Any) -> int:
            return key[0] * 100 + key[1]

    loader = torch.utils.data.DataLoader(Pairs(), batch_sampler=make(), num_workers=0)
    assert [batch.tolist() for batch in islice(loader, 5)] == [[epoch * 100 + index for epoch, index in batch] for batch in take(make(), 5)]
