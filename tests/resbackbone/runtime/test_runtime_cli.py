"""Exit codes and what is said on the way out."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from resbackbone.errors import InputError
from resbackbone.runtime.cli import run_tool
from resbackbone.runtime.nonfinite import NonFiniteLoss
from resbackbone.runtime.signals import Interrupted


def raising(error: BaseException) -> Any:
    def run(args: argparse.Namespace) -> int:
        raise error

    return run


QUIET, DEBUG = argparse.Namespace(debug=False), argparse.Namespace(debug=True)


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (InputError("a.yaml:3: lrr=1; did you mean 'lr'?"), 1, "error: a.yaml:3: lrr=1; did you mean 'lr'?\n"),
        (NonFiniteLoss("the loss is nan at step 3"), 3, "error: the loss is nan at step 3\n"),
        (Interrupted(143), 143, "stopped by a signal (exit code 143)\n"),
        (Interrupted(130), 130, "stopped by a signal (exit code 130)\n"),
        (KeyboardInterrupt(), 130, "stopped from the keyboard\n"),
        (torch.OutOfMemoryError("CUDA out of memory.\nlots"), 1, "error: too little memory (CUDA out of memory.); lower"),
        (MemoryError(), 1, "error: too little memory (no more is known); lower"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes"), 1, "error: too little memory (DefaultCPUAllocator: can't"),
    ],
)
def test_one_message_and_a_code(capsys: pytest.CaptureFixture[str], error: BaseException, code: int, text: str) -> None:
    assert run_tool(raising(error), QUIET) == code
    captured = capsys.readouterr()
    assert captured.err.startswith(text)
    assert "Traceback" not in captured.err
    assert captured.out == ""
    with pytest.raises(type(error)):
        run_tool(raising(error), DEBUG)


@pytest.mark.parametrize(("returned", "code"), [(None, 0), (0, 0), (1, 1)])
def test_what_a_tool_returns(returned: int | None, code: int) -> None:
    seen: list[argparse.Namespace] = []

    def run(args: argparse.Namespace) -> int | None:
        seen.append(args)
        return returned

    assert run_tool(run, QUIET) == code
    assert seen == [QUIET]


def test_our_own_mistakes_are_not_swallowed() -> None:
    with pytest.raises(ZeroDivisionError):
        run_tool(raising(ZeroDivisionError()), QUIET)


def test_other_processes_say_who_they_are(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("RANK", "3")
    assert run_tool(raising(InputError("x")), QUIET) == 1
    assert capsys.readouterr().err == "[process 3] error: x\n"


def test_a_closed_pipe_is_quiet(repository: Path) -> None:
    program = """
import argparse
import sys
from resbackbone.runtime.cli import run_tool
def run(args):
    for _ in range(100000):
        print("line")
sys.exit(run_tool(run, argparse.Namespace(debug=False)))
"""
    environment = {**os.environ, "PYTHONPATH": str(repository)}
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(60) == 141
