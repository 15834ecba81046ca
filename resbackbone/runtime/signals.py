"""A signal asks for a checkpoint and a clean exit; the loop decides when."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

# What a shell sees: 128 + the signal number; SIGUSR1 is how schedulers announce SIGTERM, so it counts as that.
EXIT_CODES = {"SIGTERM": 143, "SIGUSR1": 143, "SIGINT": 130}


class Interrupted(Exception):
    """A signal asked the run to stop. A tool exits with `exit_code`."""

    def __init__(self, exit_code: int) -> None:
        super().__init__(f"stopped by a signal (exit code {exit_code})")
        self.exit_code = exit_code


class SignalGuard:
    """While entered, SIGTERM, SIGUSR1 and SIGINT only set `requested` to an exit code; a second SIGINT ends the process at once.

    In a thread other than the main one, where Python allows no handlers, it does nothing.
    """

    def __init__(self) -> None:
        self.requested: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> SignalGuard:
        if threading.current_thread() is threading.main_thread():
            for name in EXIT_CODES:
                if hasattr(signal, name):
                    number = getattr(signal, name)
                    self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def check(self) -> None:
        """Raise Interrupted if a signal came. With several processes, agree first (`any_process(guard.requested is not None)`)."""
        if self.requested is not None:
            raise Interrupted(self.requested)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.requested is not None:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
        self.requested = EXIT_CODES[signal.Signals(number).name]


def ignore_signals_in_worker(worker_id: int = 0) -> None:
    """For a DataLoader's `worker_init_fn`: Ctrl-C and schedulers signal the whole process group, and the loop still needs its workers
    for the batch in hand. The main process ends them through its own queue."""
    for name in EXIT_CODES:
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
