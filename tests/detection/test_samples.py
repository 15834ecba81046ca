"""What a run draws at its end: never a reason to lose its figures."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from detection.config import load_detection_config, load_split
from detection.evaluation.results import Record
from detection.finish import draw_samples
from detection.structures import Detections


def test_images_that_cannot_be_read_are_left_out(tiny_coco: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_coco, tmp_path / "coco")
    source = load_split(load_detection_config(None, [f"data.root={tmp_path / 'coco'}"]), "val")
    annotations = source.annotations
    nothing = Detections(boxes=torch.zeros(0, 4), scores=torch.zeros(0), labels=torch.zeros(0, dtype=torch.int64))
    records = [
        Record(image_id=annotations.image_id(index), index=index, size=tuple(annotations.sizes[index].tolist()), detections=nothing)
        for index in range(len(annotations))
    ]
    first, second, third, *_ = (record for record in records if annotations.num_objects()[record.index])
    path = next((tmp_path / "coco").rglob(annotations.file_name(first.index)))
    path.write_bytes(path.read_bytes()[:60])
    draw_samples(tmp_path / "samples", source, records, count=2)
    assert sorted(one.name for one in (tmp_path / "samples").iterdir()) == sorted(f"{one.image_id}.jpg" for one in (second, third))
