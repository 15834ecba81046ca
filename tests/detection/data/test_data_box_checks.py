"""Boxes that are sound stay so through float32, scaling and mirroring."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from detection.data import coco
from detection.data.dataset import DetectionDataset

# the box as its file has it, xywh in an image of 640 × 480 -> the kind found
THIN = {
    (630, 10, 1e-5, 20): "box_zero_area",
    (639.99999, 10, 5, 20): "box_zero_area",
    (1e-5, 10, 1e-5, 20): "box_zero_area",
    (10, 470, 20, 0.0099): "box_zero_area",
    (-5, 10, 5.001, 20): "box_zero_area",
    (641, 10, 0.001, 20): "box_outside",
    (630, 10, -1e-5, 20): "box_negative",
    (630, 10, 0.0101, 20): None,
    (639.98, 10, 5, 20): "box_partly_outside",
    (0, 479.98, 20, 0.02): None,
}


@pytest.mark.parametrize("box", THIN)
def test_what_has_no_side_left_once_scaled_and_mirrored_is_left_out(tmp_path: Path, box: tuple[float, ...]) -> None:
    (tmp_path / "images").mkdir()
    cv2.imwrite(str(tmp_path / "images" / "a.png"), np.zeros((480, 640, 3), np.uint8))
    content = {
        "images": [{"id": 1, "file_name": "a.png", "height": 480, "width": 640}],
        "annotations": [
            {"id": 1, "image_id": 1, "category_id": 1, "bbox": [5, 5, 50, 50]},
            {"id": 2, "image_id": 1, "category_id": 1, "bbox": box},
        ],
        "categories": [{"id": 1, "name": "thing"}],
    }
    (tmp_path / "a.json").write_text(json.dumps(content))
    source, log = coco.scan(tmp_path, "a.json", images="images")
    assert source is not None
    assert [(one.kind, one.annotation) for one in log] == ([(THIN[box], 2)] if THIN[box] else [])
    for min_size, max_size in ((800, 1333), (24, 32), (100, 100), (333, 1000)):
        data = DetectionDataset(source, min_size=min_size, max_size=max_size, flip=True, train=True)
        boxes = torch.cat([data[epoch, 0].target.boxes for epoch in range(8)])
        assert bool((boxes[:, 2:] > boxes[:, :2]).all())
