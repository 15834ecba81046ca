"""A killed run that resumes ends with the weights of one that was left alone, bit for bit; two processes equal one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

STEPS = 8
TINY = [
    "data.kind=coco",
    "data.min_size=64",
    "data.max_size=64",
    "model.head=fpn",
    "model.backbone.name=resnet18",
    "model.backbone.weights=null",
    "model.backbone.norm=group",
    "model.backbone.freeze_at=0",
    "model.roi.samples=32",
    "model.roi.head_width=32",
    "train.batch_size=2",
    "train.reference_batch=2",
    "train.log_every=1",
    "train.warmup_steps=3",
    "train.precision=fp32",
    "train.milestones=[6]",
    "eval.samples=1",
    f"train.steps={STEPS}",
]


def command(repository: Path, data: Path, output: Path, *extra: str) -> list[str]:
    config = output.parent / "tiny.yaml"
    config.write_text(f"data: {{root: {data}}}\n")
    return [sys.executable, str(repository / "tools/train_det.py"), "--config", str(config), "--output", str(output), *TINY, *extra]


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1"}


def run(repository: Path, data: Path, output: Path, *extra: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(repository, data, output, *extra), capture_output=True, text=True, env=environment(), cwd=output.parent)


def losses(output: Path) -> dict[int, dict[str, float]]:
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: {name: row[name] for name in row if name.startswith(("rpn_", "roi_"))} for row in rows if "rpn_box" in row}


def weights(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "model_final.safetensors")


def assert_same_weights(one: Path, other: Path) -> None:
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def interrupt(repository: Path, data: Path, output: Path, when: str, number: int, *extra: str) -> int:
    """Start a run, wait until its log says `when`, send it signal `number`; returns its exit code."""
    process = subprocess.Popen(
        command(repository, data, output, *extra),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=environment(),
        cwd=output.parent,
    )
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and process.poll() is None:
        seen = "".join(path.read_text() for name in ("metrics.jsonl", "log.txt") if (path := output / name).exists())
        if when in seen:
            break
        time.sleep(0.01)
    process.send_signal(number)
    return process.wait(timeout=120)


@pytest.fixture(scope="module")
def left_alone(repository: Path, tiny_coco: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("alone") / "run"
    done = run(repository, tiny_coco, output, "data.workers=0", "train.eval_every=4", "train.save_every=3")
    assert done.returncode == 0, done.stderr
    return output


def test_every_file_of_the_contract(left_alone: Path) -> None:
    files = ["config.yaml", "metrics.jsonl", "log.txt", "tensorboard", "checkpoints", "model_final.safetensors", "environment.json"]
    for name in [*files, "eval/detections.json", "eval/metrics.json", "samples"]:
        assert (left_alone / name).exists(), name
    assert list((left_alone / "samples").glob("*.jpg"))
    row = json.loads((left_alone / "metrics.jsonl").read_text().splitlines()[0])
    assert {"step", "time", "lr", "images_per_s", "data_wait", "memory_mb", "rpn_objectness", "roi_class"} <= row.keys()


@pytest.mark.parametrize(
    ("when", "number", "workers"),
    [
        ('"step": 2', signal.SIGKILL, 0),  # before the first checkpoint
        ('"step": 5', signal.SIGKILL, 2),  # between two checkpoints, mid-epoch, with batches prefetched
        ("evaluating step 4", signal.SIGKILL, 0),
        ('"step": 5', signal.SIGTERM, 2),
        ("evaluating step 4", signal.SIGTERM, 0),
        ('"step": 3', signal.SIGUSR1, 0),
    ],
)
def test_interrupted_run_ends_as_if_left_alone(
    repository: Path, tiny_coco: Path, tmp_path: Path, left_alone: Path, when: str, number: int, workers: int
) -> None:
    output = tmp_path / "run"
    extra = [f"data.workers={workers}", "train.eval_every=4", "train.save_every=3"]
    code = interrupt(repository, tiny_coco, output, when, number, *extra)
    if number == signal.SIGKILL:
        assert code == -signal.SIGKILL
    else:
        assert code == 143
        assert list((output / "checkpoints").glob("step_*")), "a signal must leave a checkpoint"
    resumed = run(repository, tiny_coco, output, "--resume", "auto", *extra)
    assert resumed.returncode == 0, resumed.stderr
    assert_same_weights(left_alone, output)
    assert losses(output) == losses(left_alone)
    assert (output / "eval/metrics.json").read_text() == (left_alone / "eval/metrics.json").read_text()


def test_two_processes_give_the_loss_of_one(repository: Path, tiny_coco: Path, tmp_path: Path) -> None:
    # A gentle rate: after large steps, rounding may flip one proposal's NMS, and then all regions are sampled anew.
    extra = ["data.workers=0", "train.eval_every=0", "train.steps=10", "train.batch_size=4", "train.lr=0.0005"]
    alone = run(repository, tiny_coco, tmp_path / "one", *extra)
    assert alone.returncode == 0, alone.stderr
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29517"]
    together = subprocess.run(
        launch + command(repository, tiny_coco, tmp_path / "two", *extra)[1:],
        capture_output=True,
        text=True,
        env=environment(),
        cwd=tmp_path,
    )
    assert together.returncode == 0, together.stderr
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert one.keys() == two.keys()
    assert len(one) == 10
    for step in one:
        assert two[step] == pytest.approx(one[step], abs=1e-4), step
    figures = [json.loads((tmp_path / name / "eval/metrics.json").read_text()) for name in ("one", "two")]
    assert figures[1]["AP50"] == pytest.approx(figures[0]["AP50"], abs=1e-3)
    counted = [
        len({row["image_id"] for row in json.loads((tmp_path / name / "eval/detections.json").read_text())}) for name in ("one", "two")
    ]
    assert counted[0] == counted[1]
