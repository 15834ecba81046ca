"""Randomness that a checkpoint can hold, and seeds that depend on numbers instead of on what was drawn before."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch


def seed_everything(seed: int) -> None:
    """Seed Python's, NumPy's and torch's (CPU and every GPU) global generators."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def seed_process(seed: int, rank: int) -> None:
    """Give each process but the first, which goes on as one alone would, a stream of its own: masks drawn alike on all of them (dropout,
    stochastic depth) would be fewer draws than they seem. To be called once the model is built, which must come out alike.
    """
    if rank > 0:
        seed_everything(item_seed(seed, rank))


@contextlib.contextmanager
def deterministic(enabled: bool) -> Iterator[None]:
    """Inside, and if `enabled`, torch takes the operators whose result doesn't hang on the order in which a GPU's threads finish.

    So that two runs on one machine are equal bit for bit, as they are on the CPU anyway; slower on a GPU. torch warns of an operator that
    has no such version.
    """
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    before_cudnn = torch.backends.cudnn.benchmark
    try:
        if enabled:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it starts, and torch insists on it
            torch.use_deterministic_algorithms(True, warn_only=True)
            torch.backends.cudnn.benchmark = False  # which tries algorithms and takes the fastest, not always the same
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.backends.cudnn.benchmark = before_cudnn


def item_seed(*parts: int) -> int:
    """A 63-bit seed from integers such as (seed, epoch, index): the same on every machine and version, unrelated for neighbours."""
    text = ",".join(str(int(part)) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def capture_random_states() -> dict[str, Any]:
    """The states of all global generators, in types that `torch.load(weights_only=True)` accepts."""
    version, words, gauss = random.getstate()
    algorithm, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "python": {"version": version, "words": torch.tensor(words, dtype=torch.int64), "gauss": gauss},
        "numpy": {
            "algorithm": str(algorithm),
            "keys": torch.from_numpy(np.asarray(keys).astype(np.int64)),
            "position": int(position),
            "has_gauss": int(has_gauss),
            "cached": float(cached),
        },
        "torch": torch.get_rng_state(),
        # Only this process's own GPU: touching the others would start a context on each.
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def restore_random_states(states: dict[str, Any]) -> None:
    """Put back what `capture_random_states` took. A GPU state is skipped where there is no GPU."""
    python, numpy = states["python"], states["numpy"]
    random.setstate((python["version"], tuple(python["words"].tolist()), python["gauss"]))
    keys = numpy["keys"].numpy().astype(np.uint32)
    np.random.set_state((numpy["algorithm"], keys, numpy["position"], numpy["has_gauss"], numpy["cached"]))
    torch.set_rng_state(states["torch"].cpu())
    if states["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"].cpu())
