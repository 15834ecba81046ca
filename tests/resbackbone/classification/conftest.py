"""Small labelled pictures made on the spot: three classes that differ in colour."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

CLASSES = ("blue", "green", "red")


def picture(draw: np.random.Generator, label: int, height: int, width: int) -> np.ndarray:
    """Noise with a tint, RGB [height, width, 3]."""
    pixels = draw.integers(0, 120, (height, width, 3), dtype=np.uint8)
    pixels[..., 2 - label] += np.uint8(100)
    return pixels


@pytest.fixture(scope="session")
def tiny_photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A class folder tree: 13, 12 and 12 training and 5, 4 and 4 validation JPEGs, 48 x 64 and 64 x 48."""
    root = tmp_path_factory.mktemp("tiny_photos")
    draw = np.random.default_rng(0)
    for split, count in (("train", 37), ("val", 13)):
        for number in range(count):
            label = number % len(CLASSES)
            size = (48, 64) if number % 2 else (64, 48)
            folder = root / split / CLASSES[label]
            folder.mkdir(parents=True, exist_ok=True)
            pixels = cv2.GaussianBlur(picture(draw, label, *size), (5, 5), 0)
            cv2.imwrite(str(folder / f"{number:03d}.jpg"), pixels[..., ::-1])
    return root


@pytest.fixture(scope="session")
def tiny_settings() -> list[str]:
    """Overrides that make a run of seconds; the data's root comes on top."""
    return [
        "model.name=resnet20_cifar",
        "data.size=16",
        "data.shorter_side=[16, 24]",
        "data.workers=0",
        "train.batch_size=8",
        "train.reference_batch=8",
        "train.lr=0.02",
        "train.schedule=step",
        "train.precision=fp32",
        "train.log_every=1",
        "train.eval_every=0",
        "eval.shorter_side=18",
        "eval.crop=16",
    ]
