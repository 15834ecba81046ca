"""Signals set a flag, the second Ctrl-C kills, and everything is put back afterwards."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from itertools import islice
from pathlib import Path

import pytest
import torch

from resbackbone.runtime.signals import Interrupted, SignalGuard, ignore_signals_in_worker


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGUSR1, 143), (signal.SIGINT, 130)])
def test_a_signal_is_remembered_until_it_is_asked_for(number: signal.Signals, code: int) -> None:
    before = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)]
    with SignalGuard() as guard:
        guard.check()
        assert guard.requested is None
        os.kill(os.getpid(), number)
        assert guard.requested == code
        with pytest.raises(Interrupted) as caught:
            guard.check()
    assert caught.value.exit_code == code
    assert [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)] == before


def test_handlers_come_back_after_an_error() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(ZeroDivisionError), SignalGuard():
        _ = 1 / 0
    assert signal.getsignal(signal.SIGTERM) is before


def test_another_thread_is_left_alone() -> None:
    before = signal.getsignal(signal.SIGTERM)
    seen: list[object] = []

    def work() -> None:
        with SignalGuard() as guard:
            guard.check()
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]


def test_the_second_interrupt_kills_at_once(repository: Path) -> None:
    program = """
import os, signal, time
from resbackbone.runtime.signals import SignalGuard
with SignalGuard() as guard:
    os.kill(os.getpid(), signal.SIGINT)
    print(guard.requested, flush=True)
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(60)
"""
    environment = {**os.environ, "PYTHONPATH": str(repository)}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, timeout=60, check=False)
    assert done.stdout == "130\n"
    assert done.returncode == -signal.SIGINT


class Numbers(torch.utils.data.Dataset[int]):
    def __getitem__(self, index: int) -> int:
        return index

    def __len__(self) -> int:
        return 10_000


def test_workers_outlive_a_signal_to_the_whole_group() -> None:
    loader = torch.utils.data.DataLoader(
        Numbers(), batch_size=2, num_workers=1, worker_init_fn=ignore_signals_in_worker, multiprocessing_context="fork", prefetch_factor=2
    )
    iterator = iter(loader)
    next(iterator)
    (worker,) = iterator._workers  # type: ignore[attr-defined]
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        os.kill(worker.pid, number)
    assert [batch.tolist() for batch in islice(iterator, 40)] == [[2 * i, 2 * i + 1] for i in range(1, 41)]
    del iterator
    worker.join(10)
    assert worker.exitcode is not None, "the worker did not end with its loader"
