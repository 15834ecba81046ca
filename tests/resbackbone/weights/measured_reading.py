"""What reading a file costs, measured in a process of its own: tracemalloc.stop() beside other threads can crash Python 3.11.

`measure` starts this file as a program; test processes have threads that others' tests left behind.
"""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from resbackbone.errors import InputError


class Cost(NamedTuple):
    refusal: str | None  # the InputError's text; None if the file was read
    peak: int  # bytes of Python's and numpy's memory
    seconds: float


def measure(reader: str, paths: Sequence[Path], timeout: float = 300) -> list[Cost]:
    """Read each file by `reader` ("package.module:function"). Any other exception than InputError fails the caller, with its text."""
    command = [sys.executable, __file__, reader, *map(str, paths)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    assert run.returncode == 0, run.stderr[-3000:]
    return [Cost(*json.loads(line)) for line in run.stdout.splitlines()]


def read_one(read: Callable[[Path], Any], path: Path) -> Cost:
    refusal, began = None, time.monotonic()
    tracemalloc.start()
    try:
        read(path)
    except InputError as error:
        refusal = str(error)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return Cost(refusal, peak, time.monotonic() - began)


def main(reader: str, *paths: str) -> None:
    module, function = reader.split(":")
    read = getattr(importlib.import_module(module), function)
    read_one(read, Path(paths[0]))  # what a first call imports isn't the file's cost
    for path in paths:
        print(json.dumps(read_one(read, Path(path))))


if __name__ == "__main__":
    main(*sys.argv[1:])
