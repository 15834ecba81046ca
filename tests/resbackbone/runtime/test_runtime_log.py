"""metrics.jsonl holds each step once and is always JSON; the progress line says everything; environment.json is complete."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from resbackbone.errors import InputError
from resbackbone.runtime.log import RunLog, format_duration, git_revision, progress_line, to_json, write_environment


def not_json(word: str) -> None:
    raise AssertionError(f"{word} is not JSON")


def read(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line, parse_constant=not_json) for line in (output / "metrics.jsonl").read_text().splitlines()]


def run_steps(output: Path, steps: range, *, resume_step: int = 0) -> None:
    log = RunLog(output, total_steps=100, main=True, resume_step=resume_step)
    for step in steps:
        log.metrics(step, loss=torch.tensor(float(step)), lr=np.float32(0.5), **{"eval/AP": step / 10})
    log.close()


def test_one_object_a_line(tmp_path: Path) -> None:
    run_steps(tmp_path, range(1, 4))
    lines = read(tmp_path)
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert lines[1]["loss"] == 2.0
    assert lines[1]["lr"] == 0.5
    assert lines[1]["eval/AP"] == 0.2
    assert lines[0]["time"] <= lines[2]["time"]


@pytest.mark.parametrize("tail", ["", '{"step": 5, "lo', "\n", '{"no_step": 1}\n', "null\n"])
def test_a_resumed_run_has_each_step_once(tmp_path: Path, tail: str) -> None:
    run_steps(tmp_path, range(1, 6))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(tail)
    run_steps(tmp_path, range(4, 8), resume_step=3)
    assert [line["step"] for line in read(tmp_path)] == [1, 2, 3, 4, 5, 6, 7]


def test_an_evaluation_that_no_checkpoint_knows_of_is_written_once(tmp_path: Path) -> None:
    def evaluate(**resumed_at: int) -> None:
        log = RunLog(tmp_path, total_steps=100, main=True, **resumed_at)
        if not resumed_at:
            log.metrics(4, loss=1.0)
        log.metrics(4, **{"eval/AP": 0.5})
        log.close()

    evaluate()  # and killed before the evaluation was recorded in a checkpoint
    evaluate(resume_step=4, evaluated_step=2)
    assert [sorted(line) for line in read(tmp_path)] == [["loss", "step", "time"], ["eval/AP", "step", "time"]]


def test_a_run_from_the_start_keeps_nothing_old(tmp_path: Path) -> None:
    run_steps(tmp_path, range(3))
    run_steps(tmp_path, range(2))
    assert [line["step"] for line in read(tmp_path)] == [0, 1]


def test_tensorboard_gets_the_same_numbers(tmp_path: Path) -> None:
    run_steps(tmp_path, range(1, 6))
    run_steps(tmp_path, range(4, 7), resume_step=3)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(step, float(step)) for step in range(1, 7)]
    assert set(events.Tags()["scalars"]) == {"loss", "lr", "eval/AP"}


def test_other_processes_write_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = RunLog(tmp_path / "out", total_steps=1, main=False)
    log.metrics(1, loss=1.0)
    log.message("hello")
    log.progress(1, losses={}, images_per_s=1, split={}, memory_mb=1, eta_s=1)
    log.close()
    assert not (tmp_path / "out").exists()
    assert capsys.readouterr().out == ""


def test_messages_go_to_both_places(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = RunLog(tmp_path, total_steps=10, main=True)
    log.message("[bold]not markup[/bold] " + "long " * 60)
    log.progress(3, losses={"rpn_box": torch.tensor(0.25)}, images_per_s=4.26, split={"data": 0.031}, memory_mb=812.4, eta_s=83)
    log.close()
    out = capsys.readouterr().out.splitlines()
    kept = (tmp_path / "log.txt").read_text().splitlines()
    assert out[0].startswith("[bold]not markup[/bold] long")
    assert out[1] == "step  3/10 | loss 0.2500 (rpn_box 0.250) | 4.3 images/s | data 3% | 812 MB | 0:01:23 left"
    assert [line[20:] for line in kept] == out
    assert kept[0][4] == "-"


def test_progress_line_with_a_loss_that_is_not_finite() -> None:
    line = progress_line(1, 2, losses={"a": float("nan")}, images_per_s=0.0, split={}, memory_mb=1, eta_s=float("inf"))
    assert line == "step 1/2 | loss nan (a nan) | 0.0 images/s |  | 1 MB | ? left"


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(0, "0:00:00"), (59.6, "0:01:00"), (3723, "1:02:03"), (90061, "1d 1:01:01"), (-5, "0:00:00"), (float("nan"), "?")],
)
def test_format_duration(seconds: float, expected: str) -> None:
    assert format_duration(seconds) == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (float("nan"), '"nan"'),
        ([float("inf"), -float("inf")], '["inf", "-inf"]'),
        (torch.tensor([[1.5]]), "[[1.5]]"),
        (torch.tensor(float("nan")), '"nan"'),
        (np.float32(0.5), "0.5"),
        (np.arange(2), "[0, 1]"),
        ({1: (True, None, "ü")}, '{"1": [true, null, "ü"]}'),
        (Path("a/b"), '"a/b"'),
        ({}, "{}"),
    ],
)
def test_to_json(value: object, expected: str) -> None:
    assert to_json(value) == expected


def test_environment(tmp_path: Path) -> None:
    write_environment(tmp_path, 17)
    environment = json.loads((tmp_path / "environment.json").read_text())
    assert environment["seed"] == 17
    assert environment["versions"]["torch"] == torch.__version__
    assert environment["machine"]["cpu_count"] >= 1
    assert set(environment) == {"command", "seed", "started", "git", "versions", "machine"}


def test_git_revision(tmp_path: Path) -> None:
    def git(*words: str) -> str:
        command = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b", *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    assert git_revision(tmp_path / "nowhere") is None
    git("init", "-q")
    assert git_revision(tmp_path) is None
    (tmp_path / "f").write_text("1")
    git("add", "f")
    git("commit", "-qm", "x")
    assert git_revision(tmp_path) == git("rev-parse", "HEAD")
    (tmp_path / "f").write_text("2")
    assert git_revision(tmp_path) == git("rev-parse", "HEAD") + "-dirty"


def test_an_output_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(InputError, match="a file stands where"):
        RunLog(tmp_path / "out", total_steps=1, main=True)


def test_a_disk_that_fills_up_under_the_log(tmp_path: Path) -> None:
    log = RunLog(tmp_path, total_steps=1, main=True)
    log._metrics.close()
    try:
        log._metrics = Path("/dev/full").open("a")  # noqa: SIM115
    except OSError:
        pytest.skip("no /dev/full here")
    with pytest.raises(InputError, match="the disk is full"):
        log.metrics(1, loss=1.0)
