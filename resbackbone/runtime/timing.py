"""Where a training step's time goes, measured without making the GPU wait, and what to change about it."""

from __future__ import annotations

import os
import re
import resource
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

PARTS = ("data", "forward", "backward", "optimizer")
# Below this share of the time, faster data would hardly be felt, and the larger parts are named instead.
DATA_IS_FELT = 0.15


@dataclass(frozen=True, kw_only=True)
class Window:
    """One stretch of training: `split` holds each part's fraction of the elapsed time."""

    split: dict[str, float]
    images_per_s: float
    elapsed_s: float


class StepTimer:
    """Adds up the seconds of named parts: `with timer.part("forward"): …`, `timer.count(images)`, and now and then `timer.window()`.

    On CUDA the parts are measured on the GPU's own time line by events: "data" is then the time the GPU stood idle for want of a batch,
    not the time the CPU spent fetching one while the GPU was busy. Only `window()` and `total()` wait for the GPU.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._on_cuda = torch.device(device).type == "cuda"
        self._totals = dict.fromkeys(PARTS, 0.0)
        self._window_parts = dict.fromkeys(PARTS, 0.0)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self._images = 0
        self._started_s = time.perf_counter()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count the time spent inside the block as `name`."""
        if self._on_cuda:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            yield
            end.record()
            self._events.append((name, start, end))
        else:
            started_s = time.perf_counter()
            yield
            self._add(name, time.perf_counter() - started_s)

    def count(self, images: int) -> None:
        """Count images that went through a step."""
        self._images += images

    def window(self) -> Window:
        """Fractions and speed since the last call (or the start), and begin the next window."""
        self._collect_events()
        now_s = time.perf_counter()
        elapsed_s = max(now_s - self._started_s, 1e-9)
        split = {name: seconds / elapsed_s for name, seconds in self._window_parts.items()}
        window = Window(split=split, images_per_s=self._images / elapsed_s, elapsed_s=elapsed_s)
        self._window_parts = dict.fromkeys(self._window_parts, 0.0)
        self._images, self._started_s = 0, now_s
        return window

    def restart(self) -> None:
        """Begin a new window now and forget the open one's pace, after something that is not training (evaluation, a checkpoint)."""
        self._collect_events()
        self._window_parts = dict.fromkeys(self._window_parts, 0.0)
        self._images, self._started_s = 0, time.perf_counter()

    def total(self) -> dict[str, float]:
        """Seconds by part since the timer was made."""
        self._collect_events()
        return dict(self._totals)

    def _add(self, name: str, seconds: float) -> None:
        self._totals[name] = self._totals.get(name, 0.0) + seconds
        self._window_parts[name] = self._window_parts.get(name, 0.0) + seconds

    def _collect_events(self) -> None:
        if self._events:
            self._events[-1][2].synchronize()
        for name, start, end in self._events:
            self._add(name, start.elapsed_time(end) / 1e3)
        self._events.clear()


def bottleneck_sentence(totals: Mapping[str, float], *, workers: int, device: str, size_setting: str) -> str:
    """One closing sentence: which part took most of the time, and the setting to change.

    `totals`: seconds by part, as `StepTimer.total` gives them; `workers`: data workers of the run; `device`: "cpu" or "cuda";
    `size_setting`: the key that makes images smaller.
    """
    whole = sum(totals.values())
    if whole <= 0:
        return "Bottleneck: nothing was measured, because no step was taken."
    data_share = totals.get("data", 0.0) / whole
    slowest = max(totals, key=lambda name: totals[name])
    if data_share >= DATA_IS_FELT or slowest == "data":
        return f"Bottleneck: {data_share:.0%} of the time went into waiting for data; {_data_advice(workers, size_setting)}."
    on_cuda = torch.device(device).type == "cuda"
    share = totals[slowest] / whole
    advice = "try train.precision=bf16 and train.compile=true" if on_cuda else f"try a GPU, or a smaller {size_setting}"
    if slowest == "optimizer":
        advice = "try a larger train.batch_size, which takes fewer optimizer steps"
    return f"Bottleneck: {slowest} computation took {share:.0%} of the time (data wait {data_share:.0%}); to go faster, {advice}."


def _data_advice(workers: int, size_setting: str) -> str:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if workers == 0:
        return "set data.workers=2 or more, so that images are read while the network computes"
    if workers < cores:
        return f"raise data.workers from {workers} to up to {cores}, the cores of this machine"
    return f"its {workers} workers already use all {cores} cores, so put smaller images on a faster disk, or lower {size_setting}"


def peak_memory_mb(device: torch.device | str = "cpu") -> float:
    """The most memory used so far in MB (10^6 bytes): the GPU's for a CUDA device, else this process's resident memory."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    status = Path("/proc/self/status")
    if status.is_file() and (found := re.search(r"VmHWM:\s*(\d+) kB", status.read_text())):
        return int(found[1]) * 1024 / 1e6  # ru_maxrss begins with what the process that started this one had
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6
