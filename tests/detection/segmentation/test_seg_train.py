"""A segmentation run: its output folder, being interrupted and resumed, its tools, and what happens when it goes wrong."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torchvision.models import resnet18, segmentation
from torchvision.models._utils import IntermediateLayerGetter

from detection.segmentation.config import load_segmentation_config
from detection.segmentation.predict import SegmentationPredictor, resolve_config
from detection.segmentation.score import evaluate_weights
from detection.segmentation.train import train
from detection.train_state import TrainState
from resbackbone.errors import InputError
from resbackbone.runtime.signals import Interrupted
from tools import eval_seg, train_seg

SETTINGS = [
    "model.head=fcn",
    "model.output_stride=16",
    "model.backbone={name: resnet18, weights: null}",
    "data.min_size=[32, 48]",
    "data.max_size=64",
    "data.workers=0",
    "train.batch_size=2",
    "train.reference_batch=2",
    "train.steps=6",
    "train.warmup_steps=2",
    "train.schedule=cosine",
    "train.precision=fp32",
    "train.ema=0.5",
    "train.log_every=1",
    "train.save_every=2",
    "train.eval_every=4",
    "train.device=cpu",
    "eval.samples=1",
]
LAST = 6


def run(data: Path, output: Path, *extra: str, resume: str | None = None) -> Any:
    return train(load_segmentation_config(None, [f"data.root={data}", *SETTINGS, *extra]), output, resume=resume)


@pytest.fixture(scope="module")
def finished(tiny_coco: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was left alone."""
    output = tmp_path_factory.mktemp("seg") / "run"
    run(tiny_coco, output)
    return output


def rows(output: Path) -> list[dict]:
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{name: row[name] for name in row if name in ("step", "pixel", "lr") or name.startswith("eval/")} for row in lines]


def test_every_file_of_the_contract(finished: Path) -> None:
    files = ["config.yaml", "metrics.jsonl", "log.txt", "tensorboard", "checkpoints", "model_final.safetensors", "environment.json"]
    for name in [*files, "eval/metrics.json", "eval/confusion.json"]:
        assert (finished / name).exists(), name
    with safe_open(finished / "model_final.safetensors", "pt") as file:
        metadata = file.metadata()
    assert json.loads(metadata["classes"]) == ["green", "red"]
    assert json.loads(metadata["preprocessing"])["mean"] == [0.485, 0.456, 0.406]
    assert "head: fcn" in metadata["config"]
    figures = json.loads((finished / "eval/metrics.json").read_text())
    assert {"mean_iou", "pixel_accuracy", "iou/background", "loss"} <= figures.keys()
    confusion = json.loads((finished / "eval/confusion.json").read_text())
    assert confusion["classes"] == ["background", "green", "red"]
    assert sum(map(sum, confusion["pixels"])) <= 5 * 48 * 64
    (drawn,) = (finished / "samples").glob("*.jpg")
    assert max(cv2.imread(str(drawn)).shape) >= 480
    assert [row["step"] for row in rows(finished)] == [1, 2, 3, 4, 4, 5, 6, 6]


def test_the_weights_are_torchvisions(finished: Path) -> None:
    """The names are those of torchvision's FCN, here on a ResNet-18 of its own."""
    theirs = segmentation.FCN(IntermediateLayerGetter(resnet18(), {"layer4": "out"}), segmentation.fcn.FCNHead(512, 3))
    theirs.load_state_dict(load_file(finished / "model_final.safetensors"), strict=True)


@pytest.mark.parametrize("how", ["killed", "asked to stop"])
def test_interrupted_run_ends_as_if_left_alone(
    how: str, tiny_coco: Path, tmp_path: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    update = TrainState.update

    def interrupting_update(state: TrainState) -> None:
        if how == "killed" and state.step == 5:  # the last checkpoint is of step 4, and evaluated
            raise SystemError
        update(state)
        if how == "asked to stop" and state.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(TrainState, "update", interrupting_update)
        with pytest.raises((SystemError, Interrupted)) as stopped:
            run(tiny_coco, tmp_path / "run")
        if how == "asked to stop":
            assert stopped.value.exit_code == 143
            assert (tmp_path / "run" / "checkpoints" / "step_00000003").exists()
    run(tiny_coco, tmp_path / "run", resume="auto")
    first, second = (load_file(folder / "model_final.safetensors") for folder in (finished, tmp_path / "run"))
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
    assert rows(tmp_path / "run") == rows(finished)
    assert (tmp_path / "run/eval/metrics.json").read_text() == (finished / "eval/metrics.json").read_text()


def test_an_evaluation_that_died_before_its_files_is_made_again(tiny_coco: Path, tmp_path: Path, finished: Path) -> None:
    shutil.copytree(finished, tmp_path / "run")
    for name in ("eval", "samples"):
        shutil.rmtree(tmp_path / "run" / name)
    (tmp_path / "run" / "model_final.safetensors").unlink()
    run(tiny_coco, tmp_path / "run", resume="auto")
    for name in ("eval/metrics.json", "eval/confusion.json"):
        assert (tmp_path / "run" / name).read_bytes() == (finished / name).read_bytes()
    first, second = (load_file(folder / "model_final.safetensors") for folder in (finished, tmp_path / "run"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    drawn = [sorted(path.name for path in (folder / "samples").iterdir()) for folder in (tmp_path / "run", finished)]
    assert drawn[0] == drawn[1]
    before = (tmp_path / "run/eval/metrics.json").stat().st_mtime_ns
    run(tiny_coco, tmp_path / "run", resume="auto")
    assert (tmp_path / "run/eval/metrics.json").stat().st_mtime_ns == before  # nothing to make up for


def test_eval_tool_gives_the_figures_of_training(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    weights = finished / "model_final.safetensors"
    assert eval_seg.main(["--weights", str(weights), "--output", str(tmp_path)]) == 0
    figures = json.loads((finished / "eval/metrics.json").read_text())
    assert json.loads((tmp_path / "eval/metrics.json").read_text()) == pytest.approx(figures, rel=1e-5)
    assert f"mean_iou        {figures['mean_iou']:.4f}" in capsys.readouterr().out
    assert eval_seg.main(["--weights", str(finished / "checkpoints" / f"step_{LAST:08d}")]) == 0  # its average is what was judged
    assert f"mean_iou        {figures['mean_iou']:.4f}" in capsys.readouterr().out


def test_an_image_in_its_label_map_out(finished: Path, tiny_coco: Path) -> None:
    weights = finished / "model_final.safetensors"
    predict = SegmentationPredictor(resolve_config(None, weights, ["train.device=cpu"]), weights)
    image = cv2.imread(str(next((tiny_coco / "val2017").glob("*.png"))))[..., ::-1]
    found = predict(np.ascontiguousarray(image))
    assert found.shape == image.shape[:2]
    assert found.dtype == torch.uint8
    assert predict.classes == ("green", "red")
    with pytest.raises(InputError, match=r"uint8 \[height, width, 3\]"):
        predict(image.astype(np.float32))


def test_a_loss_that_is_not_finite_stops_the_run(tiny_coco: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "c.yaml").write_text(f"data: {{root: {tiny_coco}}}\n")
    settings = ["--config", str(tmp_path / "c.yaml"), "--output", str(tmp_path / "run"), *SETTINGS]
    assert train_seg.main([*settings, "train.lr=1e30", "train.warmup_steps=0"]) == 3
    assert "pixel" in capsys.readouterr().err
    assert train_seg.main(["--replay", str(tmp_path / "run" / "nonfinite")]) == 0
    assert "first module with an output that is not finite" in capsys.readouterr().out


def test_wrong_input_exits_with_1(tiny_coco: Path, tmp_path: Path, finished: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "c.yaml").write_text("data: {root: nowhere}\n")
    assert train_seg.main(["--config", str(tmp_path / "c.yaml"), "--output", str(tmp_path / "run")]) == 1
    assert "nowhere" in capsys.readouterr().err
    assert train_seg.main(["--config", str(tmp_path / "c.yaml"), "modell.head=fcn"]) == 1
    assert "did you mean 'model" in capsys.readouterr().err
    assert eval_seg.main(["--weights", str(finished / "model_final.safetensors"), "model.output_stride=8", "model.head=deeplabv3"]) == 1
    assert "another architecture" in capsys.readouterr().err
    with pytest.raises(InputError, match="another run is in this folder"):
        run(tiny_coco, finished)


def test_a_detectors_file_is_refused(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "detector.safetensors", {"format": "resbackbone-detector-1"})
    with pytest.raises(InputError, match="no segmenter of ours"):
        resolve_config(None, tmp_path / "detector.safetensors")


def test_other_classes_in_the_data_are_explained(finished: Path, shared_data: Path) -> None:
    weights = finished / "model_final.safetensors"
    config = resolve_config(None, weights, [f"data.root={shared_data / 'coco_mini'}", "train.device=cpu"])
    with pytest.raises(InputError, match="knows the classes"):
        evaluate_weights(config, weights)
