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
    def main(argv: list[str] | None) -> int:
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (InputError("a.yaml:3: lrr=1; did you mean 'lr'?"), 1, "error: a.yaml:3: lrr=1; did you mean 'lr'?\n"),
        (NonFiniteLoss("the loss is nan at step 3"), 3, "error: the loss is nan at step 3\n"),
        (Interrupted(143), 143, "stopped by a signal (exit code 143)\n"),
        (Interrupted(130), 130, "stopped by a signal (exit code 130)\n"),
        (KeyboardInterrupt(), 130, "stopped from the keyboard\n"),
        (torch.OutOfMemoryError("CUDA out of memory.\nlots"), 1, "error: the GPU has too little memory (CUDA out of memory.); lower"),
    ],
)
def test_one_message_and_a_code(capsys: pytest.CaptureFixture[str], error: BaseException, code: int, text: str) -> None:
    assert run_tool(raising(error), []) == code
    captured = capsys.readouterr()
    assert captured.err.startswith(text)
    assert "Traceback" not in captured.err
    assert captured.out == ""
    with pytest.raises(type(error)):
        run_tool(raising(error), ["--debug"])


@pytest.mark.parametrize(("returned", "code"), [(None, 0), (0, 0), (1, 1)])
def test_what_main_returns(returned: int | None, code: int) -> None:
    seen: list[list[str] | None] = []

    def main(argv: list[str] | None) -> int | None:
        seen.append(argv)
        return returned

    assert run_tool(main, ["--debug", "a", "b=c"]) == code
    assert seen == [["a", "b=c"]]


def test_arguments_come_from_the_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["tool", "x"])
    assert run_tool(lambda argv: len(argv or ()), None) == 1


def test_usage_errors_stay_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        run_tool(lambda argv: argparse.ArgumentParser().parse_args(argv) and 0, ["--nonsense"])
    assert caught.value.code == 2


def test_our_own_mistakes_are_not_swallowed() -> None:
    with pytest.raises(ZeroDivisionError):
        run_tool(raising(ZeroDivisionError()), [])


def test_other_processes_say_who_they_are(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("RANK", "3")
    assert run_tool(raising(InputError("x")), []) == 1
    assert capsys.readouterr().err == "[process 3] error: x\n"


def test_a_closed_pipe_is_quiet(repository: Path) -> None:
    program = """
import sys
from resbackbone.runtime.cli import run_tool
def main(argv):
    for _ in range(100000):
        print("line")
sys.exit(run_tool(main, []))
"""
    environment = {**os.environ, "PYTHONPATH": str(repository)}
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(60) == 141
