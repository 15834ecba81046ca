"""What is left of memory, read from made-up kernels; and which errors mean that there is none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from resbackbone.runtime.memory import available_mb, is_out_of_memory
from resbackbone.runtime.nonfinite import NonFiniteLoss

MEMINFO = "MemTotal:       8000000 kB\nMemFree:  100 kB\nMemAvailable:   1000000 kB\n"


def written(folder: Path, **files: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)
    return folder


@pytest.fixture
def meminfo(tmp_path: Path) -> Path:
    return written(tmp_path, meminfo=MEMINFO) / "meminfo"


def test_without_groups_it_is_the_machine_s(meminfo: Path, tmp_path: Path) -> None:
    assert available_mb(meminfo=meminfo, own_groups=tmp_path / "none", groups=tmp_path) == pytest.approx(1024.0)


@pytest.mark.parametrize(
    ("limits", "wanted"),
    [
        (("max", "max"), 1024.0),
        (("500000000", "max"), 350.0),  # 500 - 200 used + 50 of files that can go
        (("max", "400000000"), 250.0),  # the group around it
        (("900000000", "300000000"), 150.0),
        (("100000000", "max"), 0.0),
        (("9000000000", "max"), 1024.0),
    ],
)
def test_the_tightest_group_counts(meminfo: Path, tmp_path: Path, limits: tuple[str, str], wanted: float) -> None:
    usage = {"memory__current": "200000000\n", "memory__stat": "anon 1\ninactive_file 50000000\n"}
    written(tmp_path / "groups" / "job", memory__max=limits[1] + "\n", **usage)
    written(tmp_path / "groups" / "job" / "step", memory__max=limits[0] + "\n", **usage)
    own = written(tmp_path, own="0::/job/step\n") / "own"
    assert available_mb(meminfo=meminfo, own_groups=own, groups=tmp_path / "groups") == pytest.approx(wanted)


def test_version_1_whose_own_path_a_container_cannot_see(meminfo: Path, tmp_path: Path) -> None:
    written(
        tmp_path / "groups" / "memory",
        memory__limit_in_bytes="600000000\n",
        memory__usage_in_bytes="100000000\n",
        memory__stat="inactive_file 7\ntotal_inactive_file 20000000\n",
    )
    own = written(tmp_path, own="5:cpu,cpuacct:/x\n4:memory:/docker/abc\n0::/\n") / "own"
    assert available_mb(meminfo=meminfo, own_groups=own, groups=tmp_path / "groups") == pytest.approx(520.0)


def test_this_machine_has_some() -> None:
    assert 1 < available_mb() < 1e8


OF_A_CALL = "when calling `cublasCreate(handle)`"


@pytest.mark.parametrize(
    ("error", "is_memory"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (MemoryError(), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), True),
        (torch.AcceleratorError("CUDA error: out of memory"), True),  # outside the caching allocator
        (torch.distributed.DistBackendError("NCCL error: unhandled cuda error, Cuda failure 2 'out of memory'"), True),
        (RuntimeError(f"CUDA error: CUBLAS_STATUS_ALLOC_FAILED {OF_A_CALL}"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"), True),  # as cuDNN 9 says it
        (torch.AcceleratorError("CUDA error: an illegal memory access was encountered"), False),
        (RuntimeError(f"CUDA error: CUBLAS_STATUS_NOT_INITIALIZED {OF_A_CALL}"), False),
        (RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"), False),
        (RuntimeError("DataLoader worker is killed by signal: Bus error. Workers may be out of shared memory."), False),
        (RuntimeError("shapes differ"), False),
        (RecursionError("maximum recursion depth exceeded"), False),
        (NonFiniteLoss("the loss is nan; see runs/out of memory/nonfinite.json"), False),  # a RuntimeError, and a name
        (ValueError("out of memory"), False),
        (OSError("out of memory"), False),
    ],
    ids=lambda value: f"{type(value).__name__} {value}"[:60] if isinstance(value, BaseException) else None,
)
def test_which_errors_are_memory_s(error: BaseException, is_memory: bool) -> None:
    assert is_out_of_memory(error) is is_memory
