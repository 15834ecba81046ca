"""The figures others published for the same files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from detection.evaluation.coco import KEYPOINT_NAMES, NAMES, evaluate_coco, format_coco
from detection.evaluation.evaluate import voc_truth
from detection.evaluation.results import read_rows
from detection.evaluation.voc import evaluate_voc
from detection.evaluation.voc_files import annotated_images, evaluate_voc_file


@pytest.mark.parametrize("engine", ["auto", "pycocotools", "hotcoco"])
@pytest.mark.parametrize("iou_type", ["bbox", "segm"])
def test_coco_val2014_100(shared_data: Path, engine: str, iou_type: str) -> None:
    folder = shared_data / "known_answers/coco_val2014_100"
    expected = json.loads((folder / "expected.json").read_text())[iou_type]
    figures = evaluate_coco(
        folder / "instances_val2014_100.json",
        folder / f"instances_val2014_fake{iou_type}100_results.json",
        iou_type=iou_type,
        engine=engine,
    )
    for name in NAMES:
        assert figures[name] == pytest.approx(expected[name], abs=1e-12), name


def test_the_printed_lines_are_cocos() -> None:
    lines = format_coco(dict.fromkeys(NAMES, 0.1234)).splitlines()
    assert len(lines) == 12
    assert lines[0] == " Average Precision  (AP) @[ IoU=0.50:0.95 | area=   all | maxDets=100 ] = 0.123"
    assert lines[1] == " Average Precision  (AP) @[ IoU=0.50      | area=   all | maxDets=100 ] = 0.123"
    assert lines[6] == " Average Recall     (AR) @[ IoU=0.50:0.95 | area=   all | maxDets=  1 ] = 0.123"
    assert len(format_coco(dict.fromkeys(KEYPOINT_NAMES, 0.5), iou_type="keypoints").splitlines()) == 10


@pytest.mark.parametrize("iou", [0.5, 0.75])
def test_voc_per_class(shared_data: Path, iou: float) -> None:
    folder = shared_data / "voc_known_answer"
    expected = json.loads((folder / "expected.json").read_text())[f"iou_{iou:.2f}"]
    rows = read_rows(folder / "detections.json", ("image_id", "category", "score", "bbox"))
    result = evaluate_voc(voc_truth(annotated_images(folder, "test")), rows, iou=iou)
    for name, one in result.classes.items():
        wanted = expected[name]
        assert one.ap_11_point == pytest.approx(wanted["ap11"], abs=1e-9), name
        assert one.ap_area == pytest.approx(wanted["ap_area"], abs=1e-9), name
        counts = (one.objects, one.detections, one.true_positives, one.false_positives, one.ignored)
        assert counts == tuple(wanted[key] for key in ("npos", "ndet", "tp", "fp", "ignored")), name


def test_voc_means(shared_data: Path) -> None:
    folder = shared_data / "voc_known_answer"
    figures = evaluate_voc_file(folder, "test", folder / "detections.json")
    assert figures["mAP_11_point"] == pytest.approx(0.577850, abs=1e-6)
    assert figures["mAP"] == pytest.approx(0.578884, abs=1e-6)
    assert 0 < figures["AP"] < figures["mAP"]
