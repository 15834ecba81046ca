"""The fast engine's figures are pycocotools', to the last bit, on boxes, masks and keypoints; so is what surrounds the engines."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from coco_cases import random_case

from detection.evaluation import coco
from detection.evaluation.coco import IOU_TYPES, KEYPOINT_NAMES, NAMES, evaluate_coco, format_coco
from resbackbone.errors import InputError

needs_hotcoco = pytest.mark.skipif(importlib.util.find_spec("hotcoco") is None, reason="hotcoco is optional and not installed")
CASES = {"bbox": 800, "segm": 500, "keypoints": 700}  # 25 ms each


def raw_pycocotools(truth: dict[str, Any], rows: list[dict[str, Any]], iou_type: str) -> tuple[list[float], str]:
    """Figures and printed lines of COCO's own tool, called as its demo does."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):
        api = COCO()
        api.dataset = copy.deepcopy(truth)
        api.createIndex()
        evaluation = COCOeval(api, api.loadRes(copy.deepcopy(rows)), iou_type)
        evaluation.evaluate()
        evaluation.accumulate()
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        evaluation.summarize()
    return list(evaluation.stats), printed.getvalue()


@needs_hotcoco
@pytest.mark.parametrize("iou_type", IOU_TYPES)
def test_engines_agree_on_random_cases(iou_type: Any) -> None:
    detections, objects = [], []
    for seed in range(CASES[iou_type]):
        truth, rows = random_case(seed, iou_type)
        slow, fast = (evaluate_coco(truth, rows, iou_type=iou_type, engine=engine) for engine in ("pycocotools", "hotcoco"))
        assert fast == slow, seed
        detections.append(len(rows))
        objects.append(len(truth["annotations"]))
    assert max(detections) > 400
    assert min(detections.count(0), objects.count(0)) > 20  # without any detection, without any object
    assert any(not one and not other for one, other in zip(detections, objects, strict=True))


@pytest.mark.parametrize("iou_type", IOU_TYPES)
def test_figures_and_lines_are_those_of_cocos_tool(iou_type: Any) -> None:
    names = KEYPOINT_NAMES if iou_type == "keypoints" else NAMES
    for seed in range(1000, 1015):
        truth, rows = random_case(seed, iou_type)
        if not rows:
            continue
        if iou_type == "segm":  # its loadRes wants compressed codes
            rows = [row for row in rows if isinstance(row["segmentation"]["counts"], str)]
        figures, lines = raw_pycocotools(truth, rows, iou_type)
        ours = evaluate_coco(truth, rows, iou_type=iou_type)
        assert [ours[name] for name in names] == figures, seed
        assert format_coco(ours, iou_type=iou_type) + "\n" == lines, seed


@needs_hotcoco
@pytest.mark.parametrize("engine", ["pycocotools", "hotcoco"])
@pytest.mark.parametrize("iou_type", IOU_TYPES)
def test_no_detection_at_all(iou_type: Any, engine: Any) -> None:
    truth, _ = random_case(3, iou_type)
    truth["annotations"] = [one | {"iscrowd": 0, "area": 500.0, "num_keypoints": 17} for one in truth["annotations"]]
    figures = evaluate_coco(truth, [], iou_type=iou_type, engine=engine)
    assert figures["AP"] == figures["AP50"] == 0.0
    assert figures["APl"] == -1.0
    assert evaluate_coco(truth | {"annotations": []}, [], iou_type=iou_type, engine=engine)["AP"] == -1.0


@needs_hotcoco
@pytest.mark.parametrize("engine", ["pycocotools", "hotcoco"])
def test_perfect_detections(engine: Any) -> None:
    truth, _ = random_case(5, "bbox")
    truth["annotations"] = [one | {"iscrowd": 0, "bbox": [10.0 * n, 5.0, 8.0, 8.0]} for n, one in enumerate(truth["annotations"])]
    rows = [{key: one[key] for key in ("image_id", "category_id", "bbox")} | {"score": 0.5} for one in truth["annotations"]]
    figures = evaluate_coco(truth, rows, engine=engine)
    assert figures["AP"] == figures["AP75"] == pytest.approx(1.0)
    present = {one["category_id"] for one in truth["annotations"]}
    for one in truth["categories"]:
        assert figures[f"AP/{one['name']}"] == pytest.approx(1.0 if one["id"] in present else -1.0)


def test_class_figures_average_to_the_whole() -> None:
    truth, rows = random_case(11, "bbox")
    figures = evaluate_coco(truth, rows)
    classes = [value for name, value in figures.items() if name.startswith("AP/") and value >= 0]
    assert np.mean(classes) == pytest.approx(figures["AP"], abs=1e-12)


@needs_hotcoco
def test_names_of_any_kind_are_taken(tmp_path: Path) -> None:
    """Half of a surrogate pair, which a JSON file may hold, is no text to the fast engine's language."""
    truth, rows = random_case(1003, "bbox")
    odd = {**truth, "images": [one | {"file_name": "a\ud800.jpg"} for one in truth["images"]]}
    odd["categories"] = [one | {"name": f"{one['name']}\ud800"} for one in truth["categories"]]
    (tmp_path / "odd.json").write_text(json.dumps(odd))
    found, wanted = evaluate_coco(tmp_path / "odd.json", rows, engine="hotcoco"), evaluate_coco(truth, rows, engine="pycocotools")
    assert [found[name] for name in NAMES] == [wanted[name] for name in NAMES]


def test_annotation_id_0_gives_cocos_figure_not_the_fast_engines(caplog: pytest.LogCaptureFixture) -> None:
    """pycocotools never counts annotation 0 as found; so do the figures people publish."""
    truth, rows = random_case(7, "bbox")
    truth["annotations"] = [one | {"id": one["id"] - 1} for one in truth["annotations"]]
    figures, _ = raw_pycocotools(truth, rows, "bbox")
    assert [evaluate_coco(truth, rows)[name] for name in NAMES] == figures
    assert "annotation 0 never counts as found" in caplog.text
    if importlib.util.find_spec("hotcoco") is not None:
        with pytest.raises(InputError, match="id 0; take the engine auto"):
            evaluate_coco(truth, rows, engine="hotcoco")


def test_without_the_fast_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    truth, rows = random_case(1, "bbox")
    figures = evaluate_coco(truth, rows)
    monkeypatch.setattr(coco.importlib.util, "find_spec", lambda name: None if name == "hotcoco" else name)
    assert evaluate_coco(truth, rows) == figures
    with pytest.raises(InputError, match="pip install hotcoco"):
        evaluate_coco(truth, rows, engine="hotcoco")


def test_some_images_only() -> None:
    truth, rows = random_case(9, "bbox")
    chosen = [one["id"] for one in truth["images"][::2]]
    smaller = {key: [one for one in truth[key] if one.get("image_id", one["id"]) in chosen] for key in ("images", "annotations")}
    rows = [row for row in rows if row["image_id"] in chosen]
    assert evaluate_coco(truth, rows, image_ids=chosen) == evaluate_coco(smaller | {"categories": truth["categories"]}, rows)
    with pytest.raises(InputError, match="no image of the annotations has the id"):
        evaluate_coco(truth, [{**rows[0], "image_id": truth["images"][1]["id"]}], image_ids=chosen)


def test_mask_areas_are_the_masks_own_even_beside_boxes() -> None:
    truth, rows = random_case(4, "segm")
    boxed = [row | {"bbox": [0.0, 0.0, 1.0, 1.0]} for row in rows]
    assert evaluate_coco(truth, boxed, iou_type="segm") == evaluate_coco(truth, rows, iou_type="segm")


def test_area_and_crowd_may_be_left_out() -> None:
    truth, rows = random_case(6, "bbox")
    full = [one | {"area": one["bbox"][2] * one["bbox"][3], "iscrowd": 0} for one in truth["annotations"]]
    bare = [{key: value for key, value in one.items() if key not in ("area", "iscrowd")} for one in full]
    assert evaluate_coco(truth | {"annotations": bare}, rows) == evaluate_coco(truth | {"annotations": full}, rows)


def test_numpy_numbers_and_pycocotools_bytes_are_taken() -> None:
    truth, rows = random_case(8, "segm")
    odd = [row | {"score": np.float32(0.5), "image_id": np.int64(row["image_id"])} for row in rows]
    plain = [row | {"score": 0.5} for row in rows]
    for row in odd:
        if isinstance(row["segmentation"]["counts"], str):
            row["segmentation"] = row["segmentation"] | {"counts": row["segmentation"]["counts"].encode()}
    assert evaluate_coco(truth, odd, iou_type="segm") == evaluate_coco(truth, plain, iou_type="segm")
