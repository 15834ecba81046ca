"""The figures others published for the same files."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from detection.evaluation.coco import NAMES, evaluate_coco
from detection.evaluation.evaluate import voc_truth
from detection.evaluation.voc import VocTruth, evaluate_voc
from detection.evaluation.voc_files import annotated_images, evaluate_voc_file

KEYS = ("npos", "ndet", "tp", "fp", "ignored")


@pytest.fixture(scope="module")
def coco_folder(shared_data: Path) -> Path:
    return shared_data / "known_answers" / "coco_val2014_100"


@pytest.fixture(scope="module")
def voc_folder(shared_data: Path) -> Path:
    return shared_data / "voc_known_answer"


@pytest.mark.parametrize("engine", ["auto", "pycocotools", "hotcoco"])
@pytest.mark.parametrize("iou_type", ["bbox", "segm"])
def test_coco_val2014_100(coco_folder: Path, engine: Any, iou_type: Any) -> None:
    if engine == "hotcoco" and importlib.util.find_spec("hotcoco") is None:
        pytest.skip("hotcoco is optional and not installed")
    expected = json.loads((coco_folder / "expected.json").read_text())
    files = (coco_folder / "instances_val2014_100.json", coco_folder / f"instances_val2014_fake{iou_type}100_results.json")
    figures = evaluate_coco(*files, iou_type=iou_type, engine=engine)
    for name in NAMES:
        assert figures[name] == pytest.approx(expected[iou_type][name], abs=1e-12), name
        assert round(figures[name], 3) == expected["_published_3_digits"][iou_type][name], name
    assert sum(name.startswith("AP/") for name in figures) == 80
    in_memory = [json.loads(path.read_bytes()) for path in files]
    assert evaluate_coco(*in_memory, iou_type=iou_type, engine=engine) == figures


def test_coco_keypoints_engines_agree_on_people(coco_folder: Path) -> None:
    """Real boxes of people carry made keypoints, since no keypoint answer was published with these files."""
    pytest.importorskip("hotcoco")
    draw = np.random.default_rng(0)
    truth = json.loads((coco_folder / "instances_val2014_100.json").read_bytes())
    truth["annotations"] = [one for one in truth["annotations"] if one["category_id"] == 1]
    rows = []
    for one in truth["annotations"]:
        x, y, width, height = one["bbox"]
        points = np.column_stack((x + draw.random(17) * width, y + draw.random(17) * height, draw.integers(0, 3, 17)))
        one |= {"keypoints": points.flatten().tolist(), "num_keypoints": int((points[:, 2] > 0).sum())}
        moved = points + draw.normal(0, max(width, height) * 0.05, points.shape)
        rows.append({"image_id": one["image_id"], "category_id": 1, "score": draw.random(), "keypoints": moved.flatten().tolist()})
    slow, fast = (evaluate_coco(truth, rows, iou_type="keypoints", engine=engine) for engine in ("pycocotools", "hotcoco"))
    assert 0.1 < slow["AP"] < 0.9
    assert fast == slow


@pytest.mark.parametrize("iou", [0.5, 0.75])
def test_voc_per_class(voc_folder: Path, iou: float) -> None:
    expected = json.loads((voc_folder / "expected.json").read_text())[f"iou_{iou:.2f}"]
    result = evaluate_voc(voc_truth(annotated_images(voc_folder, "test")), voc_folder / "detections.json", iou=iou)
    for name, one in result.classes.items():
        wanted = expected[name]
        assert one.ap_11_point == pytest.approx(wanted["ap11"], abs=1e-9), name
        assert one.ap_area == pytest.approx(wanted["ap_area"], abs=1e-9), name
        counts = (one.objects, one.detections, one.true_positives, one.false_positives, one.ignored)
        assert counts == tuple(wanted[key] for key in KEYS), name


@pytest.mark.parametrize(("iou", "eleven", "area"), [(0.5, 0.577850, 0.578884), (0.75, 0.360840, 0.353917)])
@pytest.mark.parametrize("image_set", ["test", None])
def test_voc_means(voc_folder: Path, image_set: str | None, iou: float, eleven: float, area: float) -> None:
    figures = evaluate_voc_file(voc_folder, image_set, voc_folder / "detections.json", iou=iou)
    assert figures["mAP_11_point"] == pytest.approx(eleven, abs=1e-6)
    assert figures["mAP"] == pytest.approx(area, abs=1e-6)
    assert 0 < figures["AP"] < figures["AP50"]


def test_voc_mistakes_would_show(voc_folder: Path) -> None:
    """Counting difficult objects like others gives the figure that the known answers call wrong."""
    wrong = {
        key: value for key, value in json.loads((voc_folder / "expected.json").read_text()).items() if key.startswith("wrong_on_purpose")
    }
    truth = voc_truth(annotated_images(voc_folder, "test"))
    no_difficult = VocTruth(**(vars(truth) | {"difficult": np.zeros_like(truth.difficult)}))
    mean = evaluate_voc(no_difficult, voc_folder / "detections.json").map_11_point
    assert any(abs(mean - number) < 1e-6 for number in _numbers(wrong)), (mean, wrong)
    assert abs(mean - 0.577850) > 1e-3


def _numbers(value: Any) -> list[float]:
    if isinstance(value, dict):
        return [number for one in value.values() for number in _numbers(one)]
    return [value] if isinstance(value, float) else []
