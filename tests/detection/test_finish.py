"""What a run that dies at its very end leaves undone is done when it is resumed, and what is there already is left alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from detection import finish as finish_module
from detection.config import DetectionConfig, load_detection_config
from detection.train import train

TINY = [
    "data.workers=0",
    "data.min_size=48",
    "data.max_size=64",
    "model.head=fpn",
    "model.backbone.name=resnet20_cifar",
    "model.backbone.weights=null",
    "model.backbone.norm=group",
    "model.backbone.freeze_at=0",
    "model.roi.samples=8",
    "model.roi.head_width=16",
    "model.roi.proposals_train=50",
    "train.batch_size=2",
    "train.eval_every=0",
    "train.precision=fp32",
    "eval.samples=1",
]
CONTRACT = ["model_final.safetensors", "eval/metrics.json", "eval/detections.json", "report/index.html"]


def config(data: Path, steps: int = 1) -> DetectionConfig:
    return load_detection_config(None, [f"data.root={data}", *TINY, f"train.steps={steps}"])


@pytest.fixture(scope="module")
def whole(tiny_coco: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    output = tmp_path_factory.mktemp("whole") / "run"
    train(config(tiny_coco), output)
    return output


def assert_whole(output: Path, like: Path) -> None:
    assert [name for name in CONTRACT if not (output / name).is_file()] == []
    assert list((output / "samples").glob("*.jpg"))
    for name in ("eval/metrics.json", "eval/detections.json"):
        assert (output / name).read_text() == (like / name).read_text()


@pytest.mark.parametrize("lost", [["eval", "samples", "report", "model_final.safetensors"], ["eval/detections.json"], ["report"]])
def test_what_was_never_written_is_made_up_for(whole: Path, lost: list[str], tiny_coco: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    shutil.copytree(whole, output)
    for name in lost:
        shutil.rmtree(output / name) if (output / name).is_dir() else (output / name).unlink()
    result = train(config(tiny_coco), output, resume="auto")
    assert_whole(output, whole)
    assert result.metrics == json.loads((whole / "eval/metrics.json").read_text())


def test_a_run_that_dies_after_its_last_evaluation(whole: Path, tiny_coco: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def die(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(finish_module, "save_weights", die)
        with pytest.raises(KeyboardInterrupt):
            train(config(tiny_coco), tmp_path / "run")
    assert not (tmp_path / "run/eval").exists()
    train(config(tiny_coco), tmp_path / "run", resume="auto")
    assert_whole(tmp_path / "run", whole)


def test_figures_of_an_earlier_evaluation_are_not_taken_for_the_last(
    whole: Path, tiny_coco: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trained on to 3 steps, and dead before it wrote what came of them."""
    output = tmp_path / "run"
    shutil.copytree(whole, output)
    with monkeypatch.context() as patch:
        patch.setattr(finish_module, "write_evaluation", lambda *args: shutil.rmtree(output / "nosuch"))
        with pytest.raises(FileNotFoundError):
            train(config(tiny_coco, steps=3), output, resume="auto")
    result = train(config(tiny_coco, steps=3), output, resume="auto")
    assert json.loads((output / "eval/metrics.json").read_text()) == result.metrics
    assert (output / "eval/metrics.json").read_text() != (whole / "eval/metrics.json").read_text()


def test_a_finished_run_is_not_evaluated_again(whole: Path, tiny_coco: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {name: (whole / name).stat().st_mtime_ns for name in CONTRACT[1:]}
    monkeypatch.setattr("detection.validate.Validator.evaluate", lambda *args, **options: pytest.fail("evaluated again"))
    train(config(tiny_coco), whole, resume="auto")
    assert {name: (whole / name).stat().st_mtime_ns for name in CONTRACT[1:]} == before
