"""Detections of drawn shapes and VOC-like sources to report on, without a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

from detection.data import load_source
from detection.data.source import Source
from detection.evaluation.results import Record
from detection.structures import Detections


def noisy_records(source: Source, *, seed: int = 0, noise: float = 0.06, lost: float = 0.12, mistaken: float = 0.12) -> list[Record]:
    """What a middling detector might find: true boxes moved, some lost, some called another class, some twice, and strays."""
    annotations, draw = source.annotations, np.random.default_rng(seed)
    classes, records = len(annotations.classes), []
    for index in range(len(annotations)):
        height, width = annotations.sizes[index].tolist()
        rows: list[tuple[list[float], float, int]] = []
        for box, label in zip(
            annotations.boxes[annotations.of_image(index)].tolist(), annotations.labels[annotations.of_image(index)].tolist(), strict=True
        ):
            sides = np.array([box[2] - box[0], box[3] - box[1]] * 2)
            if draw.random() < lost + 0.4 * (sides.min() < 24):
                continue
            called = int(draw.integers(1, classes + 1)) if draw.random() < mistaken else label
            rows.append((box + draw.normal(0, noise, 4) * sides, float(draw.beta(5, 1.5)), called))
            if draw.random() < 0.12:
                rows.append((box + draw.normal(0, 2 * noise, 4) * sides, float(draw.beta(2, 3)), called))
        for _ in range(draw.poisson(0.5)):
            x, y, w, h = (draw.random(4) * [0.7 * width, 0.7 * height, 0.3 * width, 0.3 * height]).tolist()
            rows.append(([x, y, x + w + 4, y + h + 4], float(draw.beta(1.5, 4)), int(draw.integers(1, classes + 1))))
        records.append(_record(annotations.image_id(index), index, (height, width), rows))
    return records


def _record(image_id: int | str, index: int, size: tuple[int, int], rows: list[tuple[Any, float, int]]) -> Record:
    rows = sorted(rows, key=lambda row: -row[1])
    boxes = np.array([row[0] for row in rows], dtype=np.float32).reshape(-1, 4).clip(0, [size[1], size[0]] * 2)
    boxes[:, 2:] = np.maximum(boxes[:, 2:], boxes[:, :2] + 1)
    found = Detections(
        boxes=torch.from_numpy(boxes),
        scores=torch.tensor([row[1] for row in rows], dtype=torch.float32),
        labels=torch.tensor([row[2] for row in rows], dtype=torch.int64),
    )
    return Record(image_id=image_id, index=index, size=size, detections=found)


def shapes(images: int, size: int = 128) -> Source:
    """Drawn circles, squares and triangles."""
    return load_source("shapes", None, "val", images=images, size=size)


def write_images(source: Source, folder: Path) -> None:
    """Every image as a PNG under its file name."""
    for index in range(len(source.annotations)):
        path = folder / source.annotations.file_name(index)
        path.parent.mkdir(parents=True, exist_ok=True)
        is_encoded, data = cv2.imencode(".png", source.read_image(index)[..., ::-1])
        assert is_encoded
        path.write_bytes(data.tobytes())
