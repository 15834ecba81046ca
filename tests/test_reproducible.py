"""The same seed gives the same run, and figures do not depend on the batch size they were computed at."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from detection.config import load_detection_config
from detection.predict import config_from_weights
from detection.score import evaluate_weights
from detection.train import train

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
    "train.steps=20",
    "train.lr=0.04",
    "train.clip_norm=1.0",
    "train.log_every=1",
    "train.warmup_steps=2",
    "train.precision=fp32",
    "train.ema=0.9",
    "train.eval_every=0",
    "eval.samples=1",
]


def run(tiny_coco: Path, output: Path, *extra: str) -> list[float]:
    train(load_detection_config(None, [*TINY, f"data.root={tiny_coco}", *extra]), output)
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


@pytest.fixture(scope="module")
def first(tiny_coco: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[float]]:
    output = tmp_path_factory.mktemp("first") / "run"
    return output, run(tiny_coco, output)


def test_twenty_steps_twice(tiny_coco: Path, tmp_path: Path, first: tuple[Path, list[float]]) -> None:
    output, losses = first
    assert len(losses) == 20
    assert run(tiny_coco, tmp_path / "run") == losses
    ours, again = (load_file(folder / "model_final.safetensors") for folder in (output, tmp_path / "run"))
    assert all(torch.equal(ours[name], again[name]) for name in ours)


def test_the_loss_falls_and_another_seed_is_another_run(tiny_coco: Path, tmp_path: Path, first: tuple[Path, list[float]]) -> None:
    _, losses = first
    assert sum(losses[-5:]) < 0.85 * sum(losses[:5])  # 0.72 to 0.84 over four seeds
    assert run(tiny_coco, tmp_path / "run", "train.seed=1", "train.steps=2") != losses[:2]


def test_the_tool_prints_what_training_did_at_any_batch_size(first: tuple[Path, list[float]], tmp_path: Path) -> None:
    output, _ = first
    trained = json.loads((output / "eval/metrics.json").read_text())
    for batch_size in (1, 3):
        weights = output / "model_final.safetensors"
        config = config_from_weights(weights, [f"eval.batch_size={batch_size}"])
        figures = evaluate_weights(config, weights, output=tmp_path / str(batch_size), log=lambda text: None)
        for name, value in figures.items():
            assert value == pytest.approx(trained[name], abs=1e-6), (name, batch_size)


def test_a_resolved_config_repeats_itself(first: tuple[Path, list[float]]) -> None:
    output, _ = first
    assert load_detection_config(output / "config.yaml") == config_from_weights(output / "model_final.safetensors")


@pytest.mark.parametrize("trainer", ["detection.train", "detection.segmentation.train", "resbackbone.classification.train"])
def test_every_trainer_takes_the_switch(trainer: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    module = importlib.import_module(trainer)
    seen = []
    monkeypatch.setattr(module, "_run", lambda *args, **options: seen.append(torch.are_deterministic_algorithms_enabled()))
    for number, wanted in enumerate((True, False)):
        config = SimpleNamespace(train=SimpleNamespace(deterministic=wanted, device="cpu"), model=SimpleNamespace(head="fcn"))
        module.train(config, tmp_path / str(number))
    assert seen == [True, False]
