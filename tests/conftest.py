"""Where tests find real data, and what they do without it: skip, with the reason."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

REPOSITORY = Path(__file__).resolve().parents[1]
torch.set_num_threads(1)  # tiny tensors gain nothing from more, and pytest-xdist runs a process a core


def _find_shared_data() -> Path | None:
    named = os.environ.get("RESBACKBONE_DATA")
    places = [Path(named)] if named else [REPOSITORY.parent / "shared" / "data"]
    return next((place.resolve() for place in places if (place / "unpack.py").is_file()), None)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data ($RESBACKBONE_DATA, else ../shared/data)."""
    found = _find_shared_data()
    if found is None:
        pytest.skip("the real data is not here; set RESBACKBONE_DATA to its folder")
    return found


@pytest.fixture(scope="session")
def unpacked_data(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """VOC images, Imagenette and ImageNet weights, unpacked once a session."""
    folder = tmp_path_factory.getbasetemp() / "unpacked"
    subprocess.run([sys.executable, str(shared_data / "unpack.py"), str(folder)], check=True)
    return folder


@pytest.fixture(scope="session")
def voc_root(unpacked_data: Path) -> Path:
    """The folder that holds VOCdevkit/."""
    return unpacked_data / "voc12"


@pytest.fixture(scope="session")
def repository() -> Path:
    """The checkout these tests belong to."""
    return REPOSITORY


@pytest.fixture(scope="session")
def tiny_coco(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A COCO folder made on the spot: 7 train and 5 val images with bright rectangles of two categories, ids with gaps, a crowd."""
    root = tmp_path_factory.mktemp("tiny_coco")
    for split, count, seed in (("train2017", 7, 0), ("val2017", 5, 1)):
        write_tiny_split(root, split, count, seed)
    return root


def write_tiny_split(root: Path, split: str, count: int, seed: int) -> None:
    """Noise images of 64 x 48 or 48 x 64 pixels with one to three filled rectangles each."""
    draw = np.random.default_rng(seed)
    (root / split).mkdir(parents=True)
    (root / "annotations").mkdir(exist_ok=True)
    images, annotations = [], []
    for number in range(count):
        height, width = (48, 64) if number % 3 else (64, 48)
        pixels = draw.integers(0, 90, (height, width, 3), dtype=np.uint8)
        for _ in range(draw.integers(1, 4)):
            w, h = (int(side) for side in draw.integers(12, 30, 2))
            x, y, category = int(draw.integers(0, width - w)), int(draw.integers(0, height - h)), int(draw.integers(0, 2))
            pixels[y : y + h, x : x + w] = (255, 40, 40) if category else (40, 255, 40)
            corners = [x, y, x + w, y, x + w, y + h, x, y + h]
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": 100 + 7 * number,
                    "category_id": (3, 17)[category],
                    "bbox": [x, y, w, h],
                    "area": w * h,
                    "iscrowd": int(len(annotations) == 4),
                    "segmentation": {"size": [height, width], "counts": [0, 1, height * width - 1]} if len(annotations) == 4 else [corners],
                }
            )
        name = f"{split}_{number}.png"
        cv2.imwrite(str(root / split / name), pixels[..., ::-1])
        images.append({"id": 100 + 7 * number, "file_name": name, "height": height, "width": width})
    content = {"images": images, "annotations": annotations, "categories": [{"id": 3, "name": "green"}, {"id": 17, "name": "red"}]}
    (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
