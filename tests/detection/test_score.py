"""Weights judged by the tools: what is wrong is said before the detector runs, and its figures are printed before they are written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from detection import score
from detection.build import build_detector
from detection.config import load_detection_config
from detection.predict import detector_metadata
from detection.validate import Validator
from resbackbone.runtime.checkpoint import save_weights
from resbackbone.runtime.config import save_config
from tools import eval_coco, eval_voc

TINY = [
    "data.workers=0",
    "data.min_size=48",
    "data.max_size=64",
    "model.head=fpn",
    "model.backbone.name=resnet20_cifar",
    "model.backbone.weights=null",
    "model.backbone.norm=group",
    "model.backbone.freeze_at=0",
    "model.roi.head_width=16",
    "train.precision=fp32",
]


def save(path: Path, data: Path, classes: tuple[str, ...]) -> list[str]:
    """An untrained detector, as the words that name it."""
    torch.manual_seed(0)
    config = load_detection_config(None, [f"data.root={data}", *TINY])
    detector = build_detector(config, len(classes))
    save_weights(path, detector.state_dict(), detector_metadata(config, classes, detector))
    return ["--weights", str(path)]


@pytest.fixture
def weights(tiny_coco: Path, tmp_path: Path) -> list[str]:
    return save(tmp_path / "weights.safetensors", tiny_coco, ("green", "red"))


@pytest.fixture
def never_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Validator, "evaluate", lambda *args, **options: pytest.fail("the detector ran"))


@pytest.mark.usefixtures("never_run")
@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--report", "{tmp}/r", "--compare", "{tmp}/nosuch.json"], "nosuch.json"),
        (["--report", "{tmp}/r", "--compare", "{tmp}"], "there is no eval/detections.json in this folder"),
        (["--report", "{tmp}/r", "--compare", "{tmp}/wrong.json"], "no image of the annotations has the id"),
        (["--compare", "{tmp}/wrong.json"], "name its folder with --report"),
        (["--output", "{tmp}/o", "eval.report=false", "--compare", "{tmp}/wrong.json"], "name its folder with --report"),
        (["--output", "{tmp}/wrong.json"], "--output {tmp}/wrong.json: this is a file"),
        (["--report", "{tmp}/wrong.json"], "--report {tmp}/wrong.json: this is a file"),
    ],
)
def test_what_is_wrong_is_said_before_the_detector_runs(
    given: list[str], words: str, weights: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = {"image_id": 123456, "category_id": 3, "score": 0.5, "bbox": [0, 0, 5, 5]}
    (tmp_path / "wrong.json").write_text(json.dumps([row]))
    assert eval_coco.main([*weights, *(word.format(tmp=tmp_path) for word in given)]) == 1
    assert words.format(tmp=tmp_path) in capsys.readouterr().err


@pytest.mark.usefixtures("never_run")
def test_vocs_figures_of_cocos_data_are_refused_at_once(weights: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert eval_voc.main(weights) == 1
    assert "data.kind=coco has none of VOC's figures; tools/eval_coco.py prints COCO's" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "is_own"),
    [([], True), (["eval.report=false", "data.workers=0"], True), (["model.test.refine=true"], False), (["data.min_size=32"], False)],
)
def test_a_run_keeps_its_own_figures(
    settings: list[str], is_own: bool, weights: list[str], tiny_coco: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "seed_0"
    run.mkdir()
    save_config(load_detection_config(None, [f"data.root={tiny_coco}", *TINY]), run / "config.yaml")
    assert eval_coco.main([*weights, "--output", str(run), *settings]) == (0 if is_own else 1)
    assert (run / "eval/metrics.json").is_file() == is_own
    if not is_own:
        assert f"would be replaced by those of another test ({settings[0].partition('=')[0]}: " in capsys.readouterr().err


@pytest.mark.parametrize("failing", ["report_records", "write_evaluation"])
def test_figures_are_printed_though_nothing_can_be_written(
    failing: str, weights: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*args: object, **options: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(score, failing, fail)
    with pytest.raises(OSError, match="disk full"):
        eval_coco.main([*weights, "--output", str(tmp_path / "o")])
    assert "area=   all | maxDets=100 ] = " in capsys.readouterr().out
    assert (tmp_path / "o/eval/metrics.json").is_file() == (failing == "report_records")


@pytest.mark.usefixtures("never_run")
@pytest.mark.parametrize(
    ("classes", "words"),
    [
        (
            ("green", "blue"),
            "2 classes, the data has 2; the first that differs is number 2: 'blue' in the weights, 'red' in the data",
        ),
        (("green",), "1 classes, the data has 2; the first that differs is number 2: none in the weights, 'red' in the data"),
        (
            ("green", "red", "x"),
            "3 classes, the data has 2; the first that differs is number 3: 'x' in the weights, none in the data",
        ),
    ],
)
def test_the_first_class_that_differs_is_named(
    classes: tuple[str, ...], words: str, tiny_coco: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert eval_coco.main(save(tmp_path / "other.safetensors", tiny_coco, classes)) == 1
    assert words in capsys.readouterr().err
