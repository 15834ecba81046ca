"""Stages that work at the same time: an iterator that runs in a thread, a few items ahead of whoever reads it."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Generator
from typing import TypeVar

T = TypeVar("T")
PATIENCE_S = 5.0  # for the item a thread is at when nobody wants more: longer than a frame takes, shorter than a user waits


def overlapped(items: Generator[T, None, None], *, ahead: int = 2, patience_s: float = PATIENCE_S) -> Generator[T, None, None]:
    """The same items in the same order, made in a thread of their own while the reader is busy with earlier ones.

    ahead: how many are made beyond the one the reader has, at most; so `ahead` + 1 are in memory. What `items` raises is raised here,
    after the items before it. Closing this ends the thread after the item it is at, and closes `items` there; it waits for that
    `patience_s` at most, since a camera may never answer: the thread is then left behind. Work overlaps as far as it lets go of the
    interpreter's lock, as decoding, networks and encoding do.
    """
    ready: queue.SimpleQueue[tuple[T] | BaseException | None] = queue.SimpleQueue()  # an item, what was raised, or the end
    room = threading.Semaphore(ahead - 1)  # for items to begin while none is read
    is_closed = threading.Event()

    def make() -> None:
        try:
            with contextlib.closing(items):
                for item in items:
                    ready.put((item,))
                    del item  # the reader is done with it long before the next is made
                    room.acquire()
                    if is_closed.is_set():
                        return
            ready.put(None)
        except BaseException as error:
            ready.put(error)

    # A daemon, and waited for with a limit: a camera that never answers must not keep the program from ending.
    thread = threading.Thread(target=make, name="overlapped", daemon=True)
    try:
        thread.start()
        while (received := ready.get()) is not None:
            if isinstance(received, BaseException):
                raise received
            room.release()
            yield received[0]
    finally:
        is_closed.set()
        room.release()
        thread.join(patience_s)
