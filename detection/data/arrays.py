"""Flat arrays that worker processes share: ragged gathers, and pickling through one block of shared memory."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from resbackbone.errors import InputError

SHARED_MEMORY_HELP = (
    "Set data.workers=0 (or fewer workers, a smaller train.batch_size or data.max_size), or make /dev/shm larger "
    "(docker run --shm-size=8g, Kubernetes: an emptyDir with medium: Memory at /dev/shm)"
)
_ALIGN = 16  # bytes; every numpy type we keep is aligned at this


def take_ragged(values: np.ndarray, offsets: np.ndarray, order: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows `order` of a ragged array (row i is values[offsets[i]:offsets[i + 1]]), packed again: (values, offsets)."""
    positions, new_offsets = ragged_positions(offsets, order)
    return values[positions], new_offsets


def ragged_positions(offsets: np.ndarray, order: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where the values of rows `order` lie, and the offsets of the packed result."""
    lengths = np.diff(offsets)[order]
    new_offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])
    starts = np.repeat(offsets[:-1][order] - new_offsets[:-1], lengths)
    return starts + np.arange(new_offsets[-1], dtype=np.int64), new_offsets


def offsets_of(lengths: Sequence[int] | np.ndarray) -> np.ndarray:
    """Row lengths -> int64 offsets, one longer."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(np.asarray(lengths, dtype=np.int64), dtype=np.int64)])


def check_shared_memory(num_bytes: int, *, what: str) -> None:
    """Refuse before the kernel would: writing past the end of /dev/shm kills the process with a bus error.

    Raises InputError that names the settings that help.
    """
    if not os.path.isdir("/dev/shm"):
        return
    stats = os.statvfs("/dev/shm")
    free = stats.f_bavail * stats.f_frsize
    if num_bytes > free:
        needs = f"{what} needs {num_bytes / 2**20:.1f} MiB, /dev/shm has {free / 2**20:.1f} MiB free"
        raise InputError(f"shared memory is too small for the data workers: {needs}. {SHARED_MEMORY_HELP}")


class SharedArrays:
    """A dataclass whose numpy fields travel to other processes as one block of shared memory, so that W workers hold one copy.

    Forked workers share the arrays anyway (numpy data has no reference counts to write); this is for `spawn`.
    """

    def __getstate__(self) -> dict[str, Any]:
        arrays = {name: value for name, value in self.__dict__.items() if isinstance(value, np.ndarray)}
        rest = {name: value for name, value in self.__dict__.items() if name not in arrays and name != "_shared"}
        block, layout = self._shared_block(arrays)
        return {"rest": rest, "block": block, "layout": layout}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state["rest"])
        memory = state["block"].numpy()
        for name, dtype, shape, start, num_bytes in state["layout"]:
            self.__dict__[name] = memory[start : start + num_bytes].view(dtype).reshape(shape)

    def _shared_block(self, arrays: dict[str, np.ndarray]) -> tuple[torch.Tensor, list[tuple]]:
        """One uint8 tensor in shared memory with every array in it, made once and kept, and where each lies."""
        cached = self.__dict__.get("_shared")
        if cached is not None:
            return cached
        starts = offsets_of([-(-array.nbytes // _ALIGN) * _ALIGN for array in arrays.values()])
        check_shared_memory(int(starts[-1]), what="sharing the annotations")
        block = torch.zeros(max(int(starts[-1]), 1), dtype=torch.uint8).share_memory_()
        layout = []
        for (name, array), start in zip(arrays.items(), starts[:-1].tolist(), strict=True):
            block.numpy()[start : start + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
            layout.append((name, array.dtype.str, array.shape, start, array.nbytes))
        self.__dict__["_shared"] = (block, layout)
        return block, layout
