"""How every tool ends: one message and an exit code for what the user or a signal did, a traceback only for our own mistakes."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable

from resbackbone.errors import InputError
from resbackbone.runtime.memory import is_out_of_memory
from resbackbone.runtime.nonfinite import NonFiniteLoss
from resbackbone.runtime.signals import Interrupted

EXIT_INPUT, EXIT_NONFINITE, EXIT_KEYBOARD, EXIT_BROKEN_PIPE = 1, 3, 130, 141


def run_tool(run: Callable[[argparse.Namespace], int | None], args: argparse.Namespace) -> int:
    """Run a tool with its parsed arguments and return its exit code: 0 done, 1 wrong input, 3 non-finite loss, 130/143 after a signal.

    A tool parses before it imports this, and with it torch: --help and usage errors (argparse's SystemExit(2)) don't wait for it.
    `args.debug` shows the traceback of any error.
    """
    try:
        return int(run(args) or 0)
    except BrokenPipeError:
        return _leave_broken_pipe()
    except (InputError, NonFiniteLoss, Interrupted, KeyboardInterrupt, RuntimeError, MemoryError) as error:
        is_explained = isinstance(error, InputError | NonFiniteLoss | Interrupted | KeyboardInterrupt) or is_out_of_memory(error)
        if args.debug or not is_explained:
            raise
        code, message = _explain(error)
        print(f"{_rank_prefix()}{message}", file=sys.stderr, flush=True)
        return code


def _explain(error: BaseException) -> tuple[int, str]:
    if isinstance(error, Interrupted):
        return error.exit_code, str(error)
    if isinstance(error, NonFiniteLoss):
        return EXIT_NONFINITE, f"error: {error}"
    if isinstance(error, KeyboardInterrupt):
        return EXIT_KEYBOARD, "stopped from the keyboard"
    if is_out_of_memory(error):
        detail = (str(error).splitlines() or ["no more is known"])[0]
        return EXIT_INPUT, f"error: too little memory ({detail}); lower the batch or image size, or free what other processes hold"
    return EXIT_INPUT, f"error: {error}"


def _rank_prefix() -> str:
    # Every process of a torchrun prints its own error; the main one needs no mark.
    rank = os.environ.get("RANK", "0")
    return "" if rank == "0" else f"[process {rank}] "


def _leave_broken_pipe() -> int:
    # The reader (head, less) is gone; without this, Python would complain once more when it flushes at exit.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return EXIT_BROKEN_PIPE
