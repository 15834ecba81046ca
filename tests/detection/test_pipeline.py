"""Iterators that run ahead in a thread: order, bounds, and that nothing hangs or stays behind, however it ends."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from detection.pipeline import overlapped

pytestmark = pytest.mark.timeout(120)
PATIENCE_S = 10


@pytest.fixture(autouse=True)
def no_thread_stays() -> Iterator[None]:
    before = threading.active_count()
    yield
    assert threading.active_count() == before


def numbers(count: int, made: list[int] | None = None) -> Generator[int, None, None]:
    for number in range(count):
        if made is not None:
            made.append(number)
        yield number


@pytest.mark.parametrize("ahead", [1, 2, 5])
@pytest.mark.parametrize("count", [0, 1, 3, 200])
def test_the_same_items_in_the_same_order(count: int, ahead: int) -> None:
    assert list(overlapped(numbers(count), ahead=ahead)) == list(range(count))


def test_it_works_while_the_reader_is_busy_and_waits_when_it_is_ahead() -> None:
    made: list[int] = []
    third_is_there = threading.Event()

    def source() -> Generator[int, None, None]:
        for number in numbers(100, made):
            if number == 2:
                third_is_there.set()
            yield number

    items = overlapped(source(), ahead=2)
    assert next(items) == 0
    assert third_is_there.wait(PATIENCE_S), "the thread makes two more while the reader has the first"
    assert not threading.Event().wait(0.2)
    assert made == [0, 1, 2]
    items.close()
    assert made == [0, 1, 2]


def test_an_error_comes_after_the_items_before_it() -> None:
    def source() -> Generator[int, None, None]:
        yield from numbers(3)
        raise OSError(28, "No space left on device")

    seen: list[int] = []
    with pytest.raises(OSError, match="No space left") as caught:
        seen.extend(overlapped(source()))
    assert seen == [0, 1, 2]
    assert "source" in [entry.name for entry in caught.traceback], "the traceback reaches to where it happened"


def test_an_error_goes_through_several_stages_and_ends_them() -> None:
    ended = []

    def first() -> Generator[int, None, None]:
        try:
            yield from iter(int, 1)  # zeros for ever
        finally:
            ended.append("first")

    def second(items: Generator[int, None, None]) -> Generator[float, None, None]:
        try:
            for number, item in enumerate(items):
                yield item / (3 - number)
        finally:
            items.close()
            ended.append("second")

    seen: list[float] = []
    with pytest.raises(ZeroDivisionError):
        seen.extend(overlapped(second(overlapped(first()))))
    assert len(seen) == 3
    assert ended == ["first", "second"]


def test_a_reader_that_fails_ends_the_thread_and_what_it_ran() -> None:
    where: list[threading.Thread] = []

    def endless() -> Generator[int, None, None]:
        try:
            yield from iter(int, 1)
        finally:
            where.append(threading.current_thread())

    items = overlapped(endless())
    next(items)
    items.close()
    assert where[0] is not threading.current_thread(), "closed in the thread that ran it"


def test_the_keyboard_reaches_a_reader_that_waits() -> None:
    never = threading.Event()

    def source() -> Generator[int, None, None]:
        yield 0
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        never.wait(1)  # as a frame that takes its time
        yield 1

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs start with it ignored
    try:
        with pytest.raises(KeyboardInterrupt):
            list(overlapped(source()))
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_camera_that_never_answers_is_left_behind() -> None:
    answers, where = threading.Event(), []

    def camera() -> Generator[int, None, None]:
        where.append(threading.current_thread())
        yield 0
        answers.wait(PATIENCE_S)
        yield 1

    items = overlapped(camera(), patience_s=0.1)
    next(items)
    start = time.monotonic()
    items.close()
    assert time.monotonic() - start < PATIENCE_S / 2
    assert where[0].is_alive()
    answers.set()
    where[0].join(PATIENCE_S)


def test_a_program_with_such_a_camera_ends_by_the_keyboard(repository: Path) -> None:
    code = """
import os, signal, threading
from detection.pipeline import overlapped

def camera():
    yield 0
    os.kill(os.getpid(), signal.SIGINT)
    threading.Event().wait()
    yield 1

signal.signal(signal.SIGINT, signal.default_int_handler)
list(overlapped(overlapped(camera(), patience_s=0.1), patience_s=0.1))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=repository, capture_output=True, text=True, timeout=60)
    assert done.returncode == -signal.SIGINT, done.stderr
