"""One process: what a run leaves behind, resuming to the bit, wrong input, and its weights in a backbone."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from resbackbone import create_backbone
from resbackbone.classification import train as train_module
from resbackbone.classification.config import load_classification_config
from resbackbone.classification.nonfinite import replay
from resbackbone.classification.train import train
from resbackbone.runtime.checkpoint import load_checkpoint
from resbackbone.runtime.signals import Interrupted

Tool = Callable[..., int]
STEPS = 10
RUN = [f"train.steps={STEPS}", "train.milestones=[8]", "train.save_every=3", "train.eval_every=4", "train.ema=0.9", "train.bn_images=16"]


@pytest.fixture
def tiny(tiny_photos: Path, tiny_settings: list[str]) -> list[str]:
    return [*tiny_settings, f"data.root={tiny_photos}"]


@pytest.fixture(scope="module")
def finished(tiny_photos: Path, tiny_settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("finished") / "run"
    train(load_classification_config(None, [*tiny_settings, f"data.root={tiny_photos}", *RUN]), output)
    return output


@pytest.fixture
def train_cls(repository: Path, tmp_path: Path, tiny: list[str]) -> Tool:
    """tools/train_cls.py's main on an empty config: call it with the output folder and overrides, get the exit code."""
    spec = importlib.util.spec_from_file_location("train_cls", repository / "tools/train_cls.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    (tmp_path / "tiny.yaml").write_text("{}\n")
    return lambda output, *extra: module.main(["--config", str(tmp_path / "tiny.yaml"), "--output", str(output), *tiny, *extra])


def rows(output: Path) -> dict[int, dict[str, float]]:
    """loss, training error and figures by step."""
    found: dict[int, dict[str, float]] = {}
    for line in (output / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        kept = {name: value for name, value in row.items() if name in ("loss", "train_error", "lr", "epoch") or name.startswith("eval/")}
        found.setdefault(row["step"], {}).update(kept)
    return found


def assert_same_run(one: Path, other: Path) -> None:
    first, second = (load_file(output / "model_final.safetensors") for output in (one, other))
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
    assert rows(one) == rows(other)


def test_every_file_of_the_contract(finished: Path) -> None:
    files = ["config.yaml", "metrics.jsonl", "log.txt", "tensorboard", "checkpoints", "model_final.safetensors", "environment.json"]
    for name in [*files, "eval/metrics.json", "curves.png"]:
        assert (finished / name).exists(), name
    row = json.loads((finished / "metrics.jsonl").read_text().splitlines()[0])
    assert {"step", "time", "lr", "images_per_s", "data_wait", "memory_mb", "loss", "train_error", "epoch"} <= row.keys()
    assert load_classification_config(finished / "config.yaml").train.steps == STEPS
    assert {"top1", "top5", "error", "loss"} == json.loads((finished / "eval/metrics.json").read_text()).keys()
    assert rows(finished)[9]["lr"] == pytest.approx(0.002)
    assert "computed anew over 16 training images" in (finished / "log.txt").read_text()


def test_the_weights_go_into_a_backbone(finished: Path) -> None:
    path = finished / "model_final.safetensors"
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    assert json.loads(metadata["classes"]) == ["blue", "green", "red"]
    assert "name: resnet20_cifar" in metadata["config"]
    net = create_backbone("resnet20_cifar", weights=path, norm="frozen")
    assert "head left: fc." in net.load_report
    assert (net.preprocessing.input_range, net.preprocessing.std) == (255.0, (1.0, 1.0, 1.0))
    assert net.preprocessing.mean == pytest.approx([255 * value for value in (0.4914, 0.4822, 0.4465)])
    tensors = load_file(path)
    assert all(torch.equal(value, tensors[name]) for name, value in net.state_dict().items())


@pytest.mark.parametrize(("stop_at", "workers"), [(2, 0), (5, 2), (8, 0)])
def test_a_signalled_run_ends_as_if_left_alone(
    finished: Path, tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_at: int, workers: int
) -> None:
    log_step = train_module.log_step

    def signalling(log: Any, state: Any, *args: Any, **options: Any) -> None:
        log_step(log, state, *args, **options)
        if state.step == stop_at:
            os.kill(os.getpid(), signal.SIGUSR1)

    config = load_classification_config(None, [*tiny, *RUN, f"data.workers={workers}"])
    monkeypatch.setattr(train_module, "log_step", signalling)
    with pytest.raises(Interrupted) as stopped:
        train(config, tmp_path / "run")
    assert stopped.value.exit_code == 143
    monkeypatch.undo()
    train(config, tmp_path / "run", resume="auto")
    assert_same_run(finished, tmp_path / "run")


def test_a_kill_between_checkpoints_and_between_saving_and_judging(finished: Path, tiny: list[str], tmp_path: Path) -> None:
    """Nothing in memory survives: the run goes on from copies of the checkpoint folders, as they were before each later one."""
    config = load_classification_config(None, [*tiny, *RUN, "train.keep_checkpoints=9"])
    train(config, tmp_path / "all")
    assert_same_run(finished, tmp_path / "all")
    for step in (3, 9):
        output = tmp_path / f"from_{step}"
        shutil.copytree(tmp_path / "all", output)
        for folder in (output / "checkpoints").glob("step_*"):
            if int(folder.name[5:]) > step:
                shutil.rmtree(folder)
        train(config, output, resume="auto")
        assert_same_run(finished, output)


def test_plateaus_and_warm_up_by_error_survive_a_resume(tiny: list[str], tmp_path: Path) -> None:
    options = ["train.schedule=plateau", "train.plateau_patience=0", "train.plateau_threshold=0.9", "train.eval_every=2", "train.steps=8"]
    warm = [
        "train.warmup=constant",
        "train.warmup_steps=100",
        "train.warmup_until_error=1.1",
        "train.log_every=3",
        "train.keep_checkpoints=9",
    ]
    config = load_classification_config(None, [*tiny, *options, *warm, "train.save_every=1"])
    train(config, tmp_path / "whole")
    rates = {step: row["lr"] for step, row in rows(tmp_path / "whole").items() if "lr" in row}
    # Warm-up at a tenth until the first line of the log; the first evaluation sets the best, each later one divides by 10.
    assert rates == pytest.approx({1: 0.002, 3: 0.02, 6: 0.002})
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    for folder in (tmp_path / "resumed/checkpoints").glob("step_*"):
        if int(folder.name[5:]) > 5:
            shutil.rmtree(folder)
    train(config, tmp_path / "resumed", resume="auto")
    assert_same_run(tmp_path / "whole", tmp_path / "resumed")


def test_accumulating_gives_the_losses_of_the_whole_batch(tiny: list[str], tmp_path: Path) -> None:
    losses = []
    for name, extra in (("one", ["train.batch_size=8"]), ("two", ["train.batch_size=4", "train.accumulate=2"])):
        # A gentle rate, so that rounding isn't amplified; norms that know nothing of the batch; one epoch, the same images.
        config = load_classification_config(None, [*tiny, "model.norm=group", "train.steps=4", "train.lr=0.002", *extra])
        train(config, tmp_path / name)
        losses.append([rows(tmp_path / name)[step]["loss"] for step in range(1, 5)])
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    assert len({round(loss, 3) for loss in losses[0]}) == 4


def test_a_modern_recipe_runs(tiny: list[str], tmp_path: Path) -> None:
    modern = ["data.crop=area", "data.auto_augment=trivialaugment", "data.normalize=mean_std", "train.mixup=0.2", "train.cutmix=1.0"]
    more = ["train.decay_norms_and_biases=false", "train.label_smoothing=0.1", "train.schedule=cosine", "train.clip_norm=1.0"]
    result = train(load_classification_config(None, [*tiny, *modern, *more, "train.steps=3", "train.precision=bf16"]), tmp_path / "run")
    assert result.weights.exists()
    randaugment = ["data.auto_augment=randaugment", "train.steps=1"]
    train(load_classification_config(None, [*tiny, *randaugment]), tmp_path / "other")


# ------------------------------------------------------------------------------------------------------------------------------ wrong input


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["train.lrr=0.1"], ["command line", "train.lrr", "did you mean 'lr'"]),
        (["model.name=resnet51"], ["resnet51", "did you mean 'resnet5"]),
        (["data.kind=folders"], ["data.kind", "folder"]),
        (["data.root=/no/such/folder"], ["/no/such/folder", "not a folder"]),
        (["data.train=trian"], ["trian", "did you mean 'train'"]),
        (["train.batch_size=64"], ["train.batch_size", "37"]),
        (["model.weights=/no/such.safetensors"], ["/no/such.safetensors"]),
        (["data.kind=shards"], ["index.json", "make_shards"]),
    ],
)
def test_wrong_config_is_explained(
    train_cls: Tool, tmp_path: Path, capsys: pytest.CaptureFixture[str], overrides: list[str], words: list[str]
) -> None:
    assert train_cls(tmp_path / "run", *overrides) == 1
    message = capsys.readouterr().err
    assert "Traceback" not in message
    for word in words:
        assert word in message


@pytest.fixture
def broken_photos(tiny_photos: Path, tmp_path: Path) -> Path:
    """The tiny photos with one training and one validation JPEG cut in half."""
    root = tmp_path / "broken"
    shutil.copytree(tiny_photos, root)
    for split in ("train", "val"):
        victim = sorted((root / split / "red").iterdir())[1]
        victim.write_bytes(victim.read_bytes()[: victim.stat().st_size // 2])
    return root


@pytest.mark.parametrize("workers", [0, 1])
def test_a_truncated_jpeg_stops_or_is_skipped(train_cls: Tool, broken_photos: Path, tmp_path: Path, workers: int, capsys: Any) -> None:
    options = [f"data.root={broken_photos}", f"data.workers={workers}", "train.steps=5"]
    assert train_cls(tmp_path / "run", *options) == 1
    message = capsys.readouterr().err
    assert "red" in message
    assert "cut off" in message
    assert "data.unreadable=skip" in message
    assert "Traceback" not in message
    assert train_cls(tmp_path / "other", *options, "data.unreadable=skip") == 0
    assert "1 training images could not be read" in (tmp_path / "other/log.txt").read_text()


def test_a_split_without_one_of_the_classes(train_cls: Tool, tiny_photos: Path, tmp_path: Path, capsys: Any) -> None:
    shutil.copytree(tiny_photos, tmp_path / "photos")
    shutil.rmtree(tmp_path / "photos/val/green")
    assert train_cls(tmp_path / "run", f"data.root={tmp_path / 'photos'}") == 1
    assert "green" in capsys.readouterr().err


def test_a_loss_that_is_not_finite(train_cls: Tool, tmp_path: Path) -> None:
    output = tmp_path / "run"
    assert train_cls(output, "train.lr=1e30", "train.steps=20", "train.save_every=1") == 3
    report = json.loads((output / "nonfinite/report.json").read_text())
    assert 0 <= report["images"][0]["index"] < 37
    assert report["first_nonfinite_module"]
    for checkpoint in (output / "checkpoints").glob("step_*"):
        assert all(torch.isfinite(tensor).all() for tensor in load_checkpoint(checkpoint)["model"].values())
    assert report["first_nonfinite_module"] in replay(output / "nonfinite")
    assert "--replay" in report["replay"]


def test_resuming_another_run(train_cls: Tool, finished: Path, tmp_path: Path, capsys: Any) -> None:
    checkpoint = str(max((finished / "checkpoints").glob("step_*")))
    assert train_cls(tmp_path / "a", "model.name=resnet32_cifar", "--resume", checkpoint) == 1
    assert "another model" in capsys.readouterr().err
    assert train_cls(tmp_path / "b", "train.seed=4", "--resume", checkpoint) == 1
    assert "train.seed" in capsys.readouterr().err
    assert train_cls(finished) == 1
    assert "--resume auto" in capsys.readouterr().err


def test_pictures_of_one_colour_are_learned(tmp_path: Path, tiny_settings: list[str]) -> None:
    """The loop learns: colours are told apart after a few steps."""
    for split, count in (("train", 16), ("val", 4)):
        for label, colour in enumerate(((255, 0, 0), (0, 0, 255))):
            folder = tmp_path / split / str(label)
            folder.mkdir(parents=True)
            for number in range(count):
                cv2.imwrite(str(folder / f"{number}.png"), np.full((40, 40, 3), colour, dtype=np.uint8))
    options = [f"data.root={tmp_path}", "train.steps=12", "train.lr=0.05", "train.bn_images=-1"]
    result = train(load_classification_config(None, [*tiny_settings, *options]), tmp_path / "run")
    assert result.metrics["top1"] == 1.0
