"""How much memory a process may still take: what the machine has left, and what its control group allows it; and whether it ran out."""

from __future__ import annotations

import os
from pathlib import Path

import torch

SAYINGS = ("out of memory", "not enough memory", "can't allocate memory", "cannot allocate memory", "failed to allocate")
CODES = ("status_alloc_failed", "allocation_failed")  # cuBLAS, cuSOLVER and cuDNN before 9; cuDNN since
MEMINFO, OWN_GROUPS, GROUPS = Path("/proc/meminfo"), Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
# Of a control group: its limit, what it uses, and which line of memory.stat counts the files that the kernel would drop for it.
VERSION_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
VERSION_2 = ("memory.max", "memory.current", "inactive_file")


def available_mb(*, meminfo: Path = MEMINFO, own_groups: Path = OWN_GROUPS, groups: Path = GROUPS) -> float:
    """Memory in MB (10^6 bytes) that this process and others beside it may still take before something must go.

    Linux: MemAvailable, or what a container's limit leaves if that is less. Elsewhere all of the machine's memory.
    """
    if not meminfo.is_file():
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e6
    lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines() if ":" in line)
    left = [int(lines["MemAvailable"].split()[0]) * 1024]
    for line in own_groups.read_text().splitlines() if own_groups.is_file() else ():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            left += _left_of(groups, path, VERSION_2)
        elif "memory" in controllers.split(","):
            left += _left_of(groups / "memory", path, VERSION_1)
    return max(0, min(left)) / 1e6


def is_out_of_memory(error: BaseException) -> bool:
    """The GPU's caching allocator has an error of its own; all else that allocates raises some RuntimeError of torch's, with words."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    # Torch's and Python's own: those of others, such as our NonFiniteLoss, quote names of files and images, which may say anything.
    is_known = isinstance(error, RuntimeError) and type(error).__module__.partition(".")[0] in ("torch", "builtins")
    return is_known and any(words in str(error).lower() for words in SAYINGS + CODES)


def _left_of(root: Path, path: str, names: tuple[str, str, str]) -> list[int]:
    """Bytes that a group and each group around it leave, where they have a limit."""
    limit_name, usage_name, files_name = names
    group, left = root / path.strip("/"), []
    for folder in (group, *group.parents):
        if folder.is_relative_to(root) and (folder / limit_name).is_file():  # inside a container the outer ones aren't there
            limit = (folder / limit_name).read_text().strip()
            if limit != "max":
                statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                left.append(int(limit) - int((folder / usage_name).read_text()) + int(statistics.get(files_name, 0)))
    return left
