"""The fast engine's figures are pycocotools', on boxes, masks and keypoints, crowds, ties and empty lists included."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from detection.evaluation.coco import KEYPOINT_NAMES, NAMES, evaluate_coco
from resbackbone.errors import InputError

SIDE = 320


def polygon(box: list[float]) -> list[list[float]]:
    x, y, w, h = box
    return [[x, y, x + w, y, x + w, y + h, x + w / 3, y + h / 2]]


def keypoints(draw: np.random.Generator, box: list[float]) -> list[float]:
    x, y, w, h = box
    points = np.column_stack((x + draw.random(17) * w, y + draw.random(17) * h, draw.integers(0, 3, 17)))
    return [float(value) for value in points.flatten()]


def random_case(seed: int, *, images: int = 6, most: int = 14) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Truth and detections of 4 categories with gaps; jittered copies of objects, duplicates, strays, tied scores, crowds."""
    draw = np.random.default_rng(seed)
    categories = [{"id": number, "name": f"c{number}", "keypoints": [], "skeleton": []} for number in (1, 3, 7, 90)]
    truth: dict[str, Any] = {"images": [], "annotations": [], "categories": categories}
    rows: list[dict[str, Any]] = []
    for image in range(images):
        truth["images"].append({"id": 10 + image, "height": SIDE, "width": SIDE, "file_name": f"{image}.jpg"})
        for _ in range(int(draw.integers(0, most))):
            w, h = (float(side) for side in np.exp(draw.uniform(1, 5.4, 2)))
            box = [float(draw.uniform(0, SIDE - w)), float(draw.uniform(0, SIDE - h)), w, h]
            category = int(draw.choice([1, 3, 7]))  # 90 never has an object
            truth["annotations"].append(
                {
                    "id": len(truth["annotations"]) + 1,
                    "image_id": 10 + image,
                    "category_id": category,
                    "bbox": box,
                    "area": w * h * 0.8,
                    "iscrowd": int(draw.random() < 0.1),
                    "segmentation": polygon(box),
                    "keypoints": keypoints(draw, box),
                    "num_keypoints": 17,
                }
            )
            for _ in range(int(draw.integers(0, 3))):
                moved = [box[0] + draw.normal() * w / 10, box[1] + draw.normal() * h / 10, w * draw.uniform(0.8, 1.25), h]
                rows.append(detection(draw, 10 + image, category if draw.random() < 0.9 else 90, [float(side) for side in moved]))
    for _ in range(int(draw.integers(0, 150))):
        box = [float(draw.uniform(0, 200)), float(draw.uniform(0, 200)), float(draw.uniform(1, 100)), float(draw.uniform(1, 100))]
        rows.append(detection(draw, 10, 1, box))
    return truth, rows


def detection(draw: np.random.Generator, image: int, category: int, box: list[float]) -> dict[str, Any]:
    from pycocotools import mask as rle

    code = rle.merge(rle.frPyObjects(polygon([max(box[0], 0), max(box[1], 0), box[2], box[3]]), SIDE, SIDE))
    return {
        "image_id": image,
        "category_id": category,
        "score": round(float(draw.random()), 1),  # many ties
        "bbox": box,
        "segmentation": {"size": [SIDE, SIDE], "counts": code["counts"].decode("ascii")},
        "keypoints": keypoints(draw, box),
    }


@pytest.mark.parametrize("iou_type", ["bbox", "segm", "keypoints"])
def test_random_cases_are_identical(iou_type: str) -> None:
    keys = {"bbox": "bbox", "segm": "segmentation", "keypoints": "keypoints"}
    for seed in range(25):
        truth, rows = random_case(seed)
        rows = [{key: row[key] for key in ("image_id", "category_id", "score", keys[iou_type])} for row in rows]
        if not rows:
            continue
        slow, fast = (evaluate_coco(truth, rows, iou_type=iou_type, engine=engine) for engine in ("pycocotools", "hotcoco"))
        assert fast == pytest.approx(slow, abs=1e-12), seed


@pytest.mark.parametrize("iou_type", ["bbox", "keypoints"])
def test_no_detection_at_all(iou_type: str) -> None:
    truth, _ = random_case(3)
    figures = evaluate_coco(truth, [], iou_type=iou_type)
    assert set(figures) == set(KEYPOINT_NAMES if iou_type == "keypoints" else NAMES)
    assert figures["AP"] == 0.0
    assert evaluate_coco({**truth, "annotations": []}, [])["AP"] == -1.0


@pytest.mark.parametrize(
    ("change", "words"),
    [({"image_id": 999}, "999"), ({"category_id": 2}, "category_ids")],
)
def test_unknown_ids_are_named(change: dict[str, int], words: str) -> None:
    truth, rows = random_case(0)
    with pytest.raises(InputError, match=words):
        evaluate_coco(truth, [rows[0] | change])
