"""What the two tools print, write and answer when they are given files only."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from detection.evaluation.coco import NAMES, format_run
from detection.evaluation.voc import format_voc
from resbackbone.errors import InputError

REPOSITORY = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(REPOSITORY))

from detection.evaluation import evaluate as evaluate_module  # noqa: E402
from tools import eval_coco, eval_voc  # noqa: E402  (the folder of a checkout, not an installed package)


@pytest.fixture(scope="module")
def coco_files(shared_data: Path) -> list[str]:
    folder = shared_data / "known_answers" / "coco_val2014_100"
    return [
        "--annotations",
        str(folder / "instances_val2014_100.json"),
        "--detections",
        str(folder / "instances_val2014_fake{}100_results.json"),
    ]


@pytest.fixture(scope="module")
def voc_files(shared_data: Path) -> list[str]:
    folder = shared_data / "voc_known_answer"
    return ["--devkit", str(folder), "--detections", str(folder / "detections.json")]


@pytest.mark.parametrize("iou_type", ["bbox", "segm"])
def test_coco_prints_the_twelve_published_figures(
    iou_type: str, coco_files: list[str], shared_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = json.loads((shared_data / "known_answers" / "coco_val2014_100" / "expected.json").read_text())
    arguments = [word.format(iou_type) for word in coco_files]
    assert eval_coco.main([*arguments, "--iou-type", iou_type, "--output", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    page = [f"report {tmp_path / 'report' / 'index.html'}"] if iou_type == "bbox" else []
    assert lines[12:] == [f"figures {tmp_path / 'eval' / 'metrics.json'}", *page]
    lines = lines[:12]
    assert lines[0].startswith(" Average Precision  (AP) @[ IoU=0.50:0.95 | area=   all | maxDets=100 ] = 0.")
    assert [float(line.rpartition(" = ")[2]) for line in lines] == [expected["_published_3_digits"][iou_type][name] for name in NAMES]
    written = json.loads((tmp_path / "eval" / "metrics.json").read_text())
    assert written["AP"] == pytest.approx(expected[iou_type]["AP"], abs=1e-12)


def test_voc_prints_its_table(voc_files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert eval_voc.main([*voc_files, "--image-set", "test", "--output", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["class", "11-point", "area", "COCO", "AP"]
    assert lines[21].split()[:3] == ["mean", "0.577850", "0.578884"]
    assert lines[-2:] == [f"figures {tmp_path / 'eval' / 'metrics.json'}", f"report {tmp_path / 'report' / 'index.html'}"]
    assert json.loads((tmp_path / "eval" / "metrics.json").read_text())["mAP"] == pytest.approx(0.578884, abs=1e-6)
    assert eval_voc.main([*voc_files, "--iou", "0.75"]) == 0
    assert "0.360840   0.353917" in capsys.readouterr().out


def test_voc_takes_the_engine_it_is_told(voc_files: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    evaluate = evaluate_module.evaluate_coco
    monkeypatch.setattr(evaluate_module, "evaluate_coco", lambda *parts, engine: asked.append(engine) or evaluate(*parts, engine=engine))
    printed = []
    for engine in ("auto", "pycocotools"):
        assert eval_voc.main([*voc_files, "--image-set", "test", "--engine", engine]) == 0
        printed.append(capsys.readouterr().out)
    assert asked == ["auto", "pycocotools"]
    assert printed[0] == printed[1]


def test_wrong_input_is_one_message_and_exit_1(
    coco_files: list[str], voc_files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "cut.json").write_text('[{"image_id": 42, "sco')
    assert eval_coco.main([*coco_files[:2], "--detections", str(tmp_path / "cut.json")]) == 1
    assert eval_coco.main([*coco_files[:2], "--detections", voc_files[-1]]) == 1
    assert eval_voc.main([*voc_files, "--image-set", "nosuch"]) == 1
    output = capsys.readouterr()
    assert output.out == ""
    errors = output.err.splitlines()
    assert len(errors) == 3
    assert "cut.json: not valid JSON at line 1" in errors[0]
    assert "row [0], image_id: expected a whole number, got text" in errors[1]
    assert "--image-set nosuch" in errors[2]


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--annotations", "a.json"],
        ["--detections", "d.json"],
        ["--weights", "w", "--annotations", "a.json", "--detections", "d.json"],
        ["--weights", "w", "--iou-type", "segm"],
        ["--annotations", "a.json", "--detections", "d.json", "data.root=x"],
        ["--annotations", "a.json", "--detections", "d.json", "--iou-type", "box"],
    ],
)
def test_coco_usage(arguments: list[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        eval_coco.main(arguments)


@pytest.mark.parametrize(
    "arguments",
    [[], ["--devkit", "d"], ["--detections", "d.json"], ["--weights", "w", "--iou", "0.7"], ["--weights", "w", "--devkit", "d"]],
)
def test_voc_usage(arguments: list[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        eval_voc.main(arguments)


def test_a_runs_boxes_and_masks_are_told_apart() -> None:
    figures = dict.fromkeys(NAMES, 0.25)
    assert len(format_run(figures).splitlines()) == 12
    both = format_run(figures | {f"segm/{name}": 0.125 for name in NAMES}).splitlines()
    assert [both[0], both[13]] == ["Evaluate annotation type *bbox*", "Evaluate annotation type *segm*"]
    assert [line[-5:] for line in (both[1], both[14])] == ["0.250", "0.125"]
    with pytest.raises(InputError, match="eval_coco"):
        format_voc(figures)
