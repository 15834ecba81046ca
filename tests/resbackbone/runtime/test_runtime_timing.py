"""Seconds land in the right part, and the closing sentence names the setting that would help."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from resbackbone.runtime import timing
from resbackbone.runtime.timing import StepTimer, bottleneck_sentence, peak_memory_mb


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def perf_counter(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(timing, "time", clock)
    return clock


def spend(timer: StepTimer, clock: Clock, part: str, seconds: float) -> None:
    with timer.part(part):
        clock.now_s += seconds


def test_windows_and_totals(clock: Clock) -> None:
    timer = StepTimer()
    spend(timer, clock, "data", 1)
    spend(timer, clock, "forward", 2)
    spend(timer, clock, "forward", 3)
    clock.now_s += 4
    timer.count(20)
    window = timer.window()
    assert window.split == {"data": 0.1, "forward": 0.5, "backward": 0.0, "optimizer": 0.0}
    assert (window.images_per_s, window.elapsed_s) == (2.0, 10.0)
    spend(timer, clock, "backward", 5)
    timer.count(5)
    assert timer.window().split == {"data": 0.0, "forward": 0.0, "backward": 1.0, "optimizer": 0.0}
    assert timer.total() == {"data": 1.0, "forward": 5.0, "backward": 5.0, "optimizer": 0.0}


def test_restart_leaves_evaluation_out_of_the_pace(clock: Clock) -> None:
    timer = StepTimer()
    spend(timer, clock, "forward", 2)
    clock.now_s += 100
    timer.restart()
    spend(timer, clock, "forward", 1)
    timer.count(3)
    window = timer.window()
    assert (window.elapsed_s, window.images_per_s, window.split["forward"]) == (1.0, 3.0, 1.0)
    assert timer.total()["forward"] == 3.0


def test_an_empty_window_does_not_divide_by_zero(clock: Clock) -> None:
    assert StepTimer().window().images_per_s == 0.0


@pytest.mark.parametrize(
    ("totals", "workers", "device", "expected"),
    [
        ({"data": 4, "forward": 3, "backward": 3}, 0, "cpu", r"40% of the time went into waiting for data; set data.workers=2"),
        ({"data": 2, "forward": 4, "backward": 4}, 1, "cuda", r"20% .* waiting for data; raise data.workers from 1 to up to 4"),
        ({"data": 9, "forward": 1}, 4, "cuda", r"90% .* already use all 4 cores, .* lower data.side"),
        ({"data": 1, "forward": 3, "backward": 6}, 4, "cuda", r"backward computation took 60% .*data wait 10%.*train.precision=bf16"),
        ({"data": 1, "forward": 6, "backward": 3}, 4, "cpu", r"forward computation took 60% .*data.side"),
        ({"data": 1, "forward": 2, "optimizer": 7}, 4, "cpu", r"optimizer .* 70% .*train.batch_size"),
        ({"data": 0.0}, 4, "cpu", "nothing was measured"),
        ({}, 4, "cpu", "nothing was measured"),
    ],
)
def test_bottleneck(monkeypatch: pytest.MonkeyPatch, totals: dict[str, float], workers: int, device: str, expected: str) -> None:
    monkeypatch.setattr(timing.os, "sched_getaffinity", lambda process: {0, 1, 2, 3}, raising=False)
    sentence = bottleneck_sentence(totals, workers=workers, device=device, size_setting="data.side")
    assert re.search(expected, sentence), sentence
    assert sentence.startswith("Bottleneck: ")
    assert sentence.endswith(".")
    assert "\n" not in sentence


def test_peak_memory_is_what_the_kernel_says() -> None:
    held = torch.ones(10_000_000)
    status = Path("/proc/self/status")
    if not status.is_file():
        pytest.skip("no /proc here")
    (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    assert peak_memory_mb() == pytest.approx(int(line.split()[1]) * 1024 / 1e6, rel=0.02)
    assert peak_memory_mb() > held.numel() * 4 / 1e6


@pytest.mark.gpu
def test_gpu_parts_are_measured_on_the_gpu_s_own_time_line() -> None:
    timer = StepTimer("cuda")
    matrix = torch.rand(4096, 4096, device="cuda")
    with timer.part("forward"):
        for _ in range(20):
            matrix = matrix @ matrix
    with timer.part("backward"):
        pass
    window = timer.window()
    assert window.split["forward"] > 0.5 > window.split["backward"]
