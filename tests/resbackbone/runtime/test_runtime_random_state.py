"""Captured generators go on exactly where they were, through a file that only plain data may be in."""

from __future__ import annotations

import io
import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from resbackbone.runtime.random_state import capture_random_states, deterministic, item_seed, restore_random_states, seed_everything


@pytest.fixture(autouse=True)
def _own_randomness() -> Iterator[None]:
    before = capture_random_states()
    yield
    restore_random_states(before)


def draw() -> tuple[float, float, float, float]:
    return random.gauss(0, 1), float(np.random.randn()), torch.rand(1).item(), random.random()


def test_restore_repeats_every_generator() -> None:
    seed_everything(3)
    draw()  # leaves half a Gaussian pair in Python's and NumPy's generators
    file = io.BytesIO()
    torch.save(capture_random_states(), file)
    expected = [draw() for _ in range(3)]
    seed_everything(99)
    file.seek(0)
    restore_random_states(torch.load(file, weights_only=True))
    assert [draw() for _ in range(3)] == expected


@pytest.mark.parametrize("seed", [0, 7, 2**40])
def test_seed_everything_repeats(seed: int) -> None:
    seed_everything(seed)
    first = draw()
    seed_everything(seed)
    assert draw() == first
    seed_everything(seed + 1)
    assert draw() != first


def test_item_seed_is_fixed_for_ever_and_spread() -> None:
    seeds = {item_seed(seed, epoch, index) for seed in range(10) for epoch in range(10) for index in range(100)}
    assert len(seeds) == 10_000
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert item_seed(1, 23) != item_seed(12, 3)
    assert item_seed(np.int64(4), -1) == item_seed(4, -1)  # type: ignore[arg-type]
    # blake2b("0,1,2") in eight bytes, little-endian, halved: computed by hand with b2sum.
    assert item_seed(0, 1, 2) == B2SUM_0_1_2


B2SUM_0_1_2 = int.from_bytes(bytes.fromhex("83341505f293b77d"), "little") // 2


@pytest.mark.parametrize("before", [False, True])
def test_deterministic_operators_are_for_the_run_alone(before: bool) -> None:
    torch.use_deterministic_algorithms(before)
    try:
        with deterministic(True):
            assert torch.are_deterministic_algorithms_enabled()
            assert torch.is_deterministic_algorithms_warn_only_enabled()  # an operator that has none shouldn't end a training
            assert not torch.backends.cudnn.benchmark
        assert torch.are_deterministic_algorithms_enabled() is before
        with deterministic(False):
            assert torch.are_deterministic_algorithms_enabled() is before
    finally:
        torch.use_deterministic_algorithms(False)
