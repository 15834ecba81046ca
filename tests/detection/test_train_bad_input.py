"""What wrong input gets when a run starts, and what a run leaves when it fails on the way."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

Tool = Callable[..., int]

TINY = [
    "data.workers=0",
    "data.min_size=48",
    "data.max_size=64",
    "model.head=fpn",
    "model.backbone.name=resnet18",
    "model.backbone.weights=null",
    "model.backbone.norm=group",
    "model.backbone.freeze_at=0",
    "model.roi.samples=16",
    "model.roi.head_width=16",
    "train.batch_size=2",
    "train.steps=4",
    "train.log_every=1",
    "train.save_every=1",
    "train.precision=fp32",
    "train.milestones=[3]",
    "eval.samples=1",
]


@pytest.fixture
def train_det(repository: Path, tmp_path: Path) -> Tool:
    """tools/train_det.py's main on an empty config: call it with the output folder and overrides, get the exit code."""
    spec = importlib.util.spec_from_file_location("train_det", repository / "tools/train_det.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = tmp_path / "tiny.yaml"
    config.write_text("{}\n")
    return lambda output, *extra: module.main(["--config", str(config), "--output", str(output), *TINY, *extra])


@pytest.fixture(scope="module")
def finished(repository: Path, tiny_coco: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of four steps."""
    from detection.config import load_detection_config
    from detection.train import train

    output = tmp_path_factory.mktemp("finished") / "run"
    train(load_detection_config(None, [*TINY, f"data.root={tiny_coco}"]), output)
    return output


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["train.lrr=0.1"], ["command line", "train.lrr", "did you mean 'lr'"]),
        (["train.lr=fast"], ["train.lr", "fast", "number"]),
        (["model.head=c5"], ["model.head", "c5", "c4, fpn, dc5"]),
        (["model.backbone.name=resnet51"], ["resnet51", "did you mean 'resnet5"]),
        (["model.backbone.norm=frozen"], ["frozen", "weights"]),
        (["data.root=/no/such/folder"], ["/no/such/folder", "annotations"]),
        (["data.kind=cocoo"], ["cocoo", "coco"]),
        (["train.batch_size=8"], ["train.batch_size", "7"]),
        (["model.backbone.weights=/no/such.safetensors"], ["/no/such.safetensors"]),
    ],
)
def test_wrong_config_is_explained(
    train_det: Tool, tiny_coco: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], overrides: list[str], words: list[str]
) -> None:
    assert train_det(tmp_path / "run", f"data.root={tiny_coco}", *overrides) == 1
    message = capsys.readouterr().err
    assert "Traceback" not in message
    for word in words:
        assert word in message


def test_output_that_cannot_be_written(train_det: Tool, tiny_coco: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    assert train_det(blocked / "run", f"data.root={tiny_coco}") == 1
    assert "--output" in capsys.readouterr().err


def test_a_finished_run_is_not_overwritten(train_det: Tool, finished: Path, tiny_coco: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (finished / "model_final.safetensors").read_bytes()
    assert train_det(finished, f"data.root={tiny_coco}") == 1
    assert "--resume auto" in capsys.readouterr().err
    assert (finished / "model_final.safetensors").read_bytes() == before


def test_the_weights_carry_config_and_classes(finished: Path) -> None:
    with safe_open(finished / "model_final.safetensors", framework="pt") as file:
        metadata = file.metadata()
    assert json.loads(metadata["classes"]) == ["green", "red"]
    assert "name: resnet18" in metadata["config"]
    assert json.loads(metadata["preprocessing"])["color_order"] == "RGB"


def test_resume_skips_a_damaged_checkpoint(train_det: Tool, finished: Path, tiny_coco: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    shutil.copytree(finished, output)
    newest = max((output / "checkpoints").glob("step_*")) / "state.pt"
    newest.write_bytes(newest.read_bytes()[: newest.stat().st_size // 2])
    assert train_det(output, f"data.root={tiny_coco}", "--resume", "auto", "train.log_every=2") == 0
    assert "changed since that checkpoint: train.log_every: 1 → 2" in (output / "log.txt").read_text()
    ours, theirs = (load_file(folder / "model_final.safetensors") for folder in (output, finished))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_resume_with_another_architecture(train_det: Tool, finished: Path, tiny_coco: Path, tmp_path: Path, capsys) -> None:
    checkpoint = max((finished / "checkpoints").glob("step_*"))
    code = train_det(tmp_path / "run", f"data.root={tiny_coco}", "model.roi.head_width=24", "--resume", str(checkpoint))
    assert code == 1
    assert "another" in capsys.readouterr().err


def test_a_loss_that_is_not_finite(train_det: Tool, tiny_coco: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "run"
    assert train_det(output, f"data.root={tiny_coco}", "train.lr=1e30", "train.warmup_steps=0", "train.steps=20") == 3
    report = json.loads((output / "nonfinite/report.json").read_text())
    assert report["images"][0]["image_id"] in range(100, 150)
    assert report["first_nonfinite_module"]
    assert list((output / "checkpoints").glob("step_*"))
    from detection.nonfinite import replay

    assert "nan" in replay(output / "nonfinite") or "inf" in replay(output / "nonfinite")
    assert "--replay" in report["replay"]


def test_early_stopping_and_the_best_checkpoint(train_det: Tool, tiny_coco: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    options = ["train.lr=1e-12", "train.eval_every=1", "train.early_stop=2", "train.keep_checkpoints=1", "train.steps=9"]
    assert train_det(output, f"data.root={tiny_coco}", *options) == 0
    steps = sorted(int(path.name.removeprefix("step_")) for path in (output / "checkpoints").glob("step_*"))
    assert steps == [1, 3]  # the best, since nothing gets better without learning, and the last of two more
