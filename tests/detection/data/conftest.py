"""Small data sets in the layouts that users have, made from the real files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def bad_inputs(shared_data: Path) -> Path:
    """The folder of broken and unusual files."""
    return shared_data / "bad_inputs"


@pytest.fixture(scope="session")
def coco_mini(shared_data: Path) -> Path:
    """A COCO root with 81 + 41 real images."""
    return shared_data / "coco_mini"


@pytest.fixture
def devkit_with(bad_inputs: Path, tmp_path: Path) -> Callable[..., Path]:
    """annotation name(s) -> the root of a devkit whose VOC2012/trainval images 2008_000001 … have these annotations."""

    def make(*xml_names: str, image: str = "ok_1.jpg") -> Path:
        year = tmp_path / "VOCdevkit" / "VOC2012"
        for folder in ("Annotations", "JPEGImages", "ImageSets/Main"):
            (year / folder).mkdir(parents=True, exist_ok=True)
        ids = [f"2008_{number:06d}" for number in range(1, len(xml_names) + 1)]
        for image_id, name in zip(ids, xml_names, strict=True):
            shutil.copy(bad_inputs / name, year / "Annotations" / f"{image_id}.xml")
            shutil.copy(bad_inputs / image, year / "JPEGImages" / f"{image_id}.jpg")
        (year / "ImageSets" / "Main" / "trainval.txt").write_text("".join(f"{image_id}\n" for image_id in ids))
        return tmp_path

    return make


@pytest.fixture
def coco_with(bad_inputs: Path, tmp_path: Path) -> Callable[..., Path]:
    """image files (None: a sound one) -> a COCO root with split `train` whose images 1, 2 … are these files, one box each."""

    def make(*images: str | None, sizes: dict[int, tuple[int, int]] | None = None) -> Path:
        folder = tmp_path / "train"
        folder.mkdir(exist_ok=True)
        (tmp_path / "annotations").mkdir(exist_ok=True)
        rows, boxes = [], []
        for number, name in enumerate(images, start=1):
            source = bad_inputs / (name or "ok_1.jpg")
            shutil.copy(source, folder / f"{number}{source.suffix}")
            height, width = (sizes or {}).get(number, (228, 320))
            rows.append({"id": number, "file_name": f"{number}{source.suffix}", "height": height, "width": width})
            boxes.append({"id": number, "image_id": number, "category_id": 7, "bbox": [10.0, 20.0, 30.0 + number, 40.0], "iscrowd": 0})
        content = {"images": rows, "annotations": boxes, "categories": [{"id": 7, "name": "thing"}]}
        (tmp_path / "annotations" / "instances_train.json").write_text(json.dumps(content))
        return tmp_path

    return make
