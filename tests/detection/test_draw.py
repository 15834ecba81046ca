"""Pictures show what was found: in the right place, in another style than the truth, at any size, whatever the boxes."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from detection.draw import color_of, draw_detections, save_image
from detection.structures import Detections
from resbackbone.errors import InputError

CLASSES = ("cat", "pottedplant", "chaise longue près")


def found(*rows: tuple[list[float], float, int], masks: torch.Tensor | None = None) -> Detections:
    return Detections(
        boxes=torch.tensor([box for box, _, _ in rows]).reshape(-1, 4).float(),
        scores=torch.tensor([score for _, score, _ in rows]).float(),
        labels=torch.tensor([label for _, _, label in rows], dtype=torch.int64),
        masks=masks,
    )


def gray(height: int, width: int) -> np.ndarray:
    return np.full((height, width, 3), 128, dtype=np.uint8)


def changed(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    return (before != after).any(axis=2)


def test_a_box_is_drawn_where_it_is_and_the_image_is_left_alone() -> None:
    image = gray(500, 600)
    picture = draw_detections(image, found(([100, 200, 300, 400], 0.9, 1)), CLASSES)
    assert (image == 128).all()
    assert picture.shape == image.shape
    where = np.argwhere(changed(image, picture))
    assert tuple(where.max(axis=0)) <= (401, 301)
    assert where[:, 1].min() >= 98
    assert picture[300, 100].tolist() == list(color_of(1))
    assert picture[399, 200].tolist() == list(color_of(1))
    assert (picture[230:390, 110:290] == 128).all()


def test_only_sure_detections_are_drawn() -> None:
    image, rows = gray(480, 480), [([10, 100, 60, 160], 0.3, 1), ([200, 100, 260, 160], 0.8, 2)]
    strict, loose = (draw_detections(image, found(*rows), CLASSES, threshold=threshold) for threshold in (0.5, 0.2))
    assert not changed(image, strict)[:, :100].any()
    assert changed(image, loose)[:, :100].any()
    assert not changed(image, draw_detections(image, found(*rows), CLASSES, threshold=0.9)).any()


@pytest.mark.parametrize("size", [(48, 64), (1, 1), (1, 700), (480, 640), (3000, 4000)])
def test_every_size_is_readable(size: tuple[int, int]) -> None:
    height, width = size
    picture = draw_detections(gray(*size), found(([0.2 * width, 0.2 * height, 0.9 * width, 0.9 * height], 0.87, 2)), CLASSES)
    factor = picture.shape[0] / height
    assert factor == int(factor) == picture.shape[1] / width
    assert max(picture.shape[:2]) >= 480
    label = (picture == color_of(2)).all(axis=2)
    if min(size) > 40:  # the name's background is a block of a fortieth of the picture or more
        rows = label.sum(axis=1)
        assert (rows > 0.1 * picture.shape[1]).sum() >= max(8, max(picture.shape[:2]) / 100)


@pytest.mark.parametrize(
    "box",
    [
        [-50, -50, 20, 20],
        [600, 400, 9000, 9000],
        [float("inf"), float("-inf"), float("nan"), 1e30],
        [30, 30, 30, 30],
        [300, 300, 200, 200],
        [-1e9, 5, 1e9, 10],
    ],
)
def test_odd_boxes_do_no_harm(box: list[float]) -> None:
    assert draw_detections(gray(480, 640), found((box, 1.0, 3)), CLASSES, truth=np.array([box])).shape == (480, 640, 3)


def test_nothing_found() -> None:
    image = gray(480, 640)
    assert (draw_detections(image, found(), CLASSES, truth=np.zeros((0, 4), np.float32)) == image).all()


def test_truth_has_a_style_of_its_own() -> None:
    for level in (0, 128, 255):
        image = np.full((480, 640, 3), level, dtype=np.uint8)
        picture = draw_detections(image, found(), CLASSES, truth=np.array([[100, 100, 300, 300]], dtype=np.float32))
        assert changed(image, picture).any()
        assert (picture[..., 0] == picture[..., 1]).all()
    assert all(max(color_of(label)) - min(color_of(label)) > 150 for label in range(1, 100))


def test_masks_tint_their_pixels() -> None:
    image, masks = gray(480, 640), torch.zeros(1, 28, 28)
    masks[:, :14] = 1.0
    picture = draw_detections(image, found(([100, 100, 300, 300], 0.9, 1), masks=masks), CLASSES)
    assert changed(image, picture)[140:190, 110:290].all()
    assert not changed(image, picture)[210:290, 110:290].any()


def test_colors_of_neighbours_differ() -> None:
    colors = np.array([color_of(label) for label in range(1, 81)], dtype=float)
    assert np.abs(np.diff(colors, axis=0)).sum(axis=1).min() > 150
    assert len({tuple(color) for color in colors}) == 80


def test_saving(tmp_path: Path) -> None:
    picture = gray(20, 30)
    picture[:, :, 0] = 250
    save_image(tmp_path / "a.png", picture)
    assert (cv2.imread(str(tmp_path / "a.png"))[..., ::-1] == picture).all()
    with pytest.raises(InputError, match=r"name it .jpg or .png"):
        save_image(tmp_path / "a.xyz", picture)
    with pytest.raises(InputError, match="choose another --output"):
        save_image(tmp_path / "missing" / "a.png", picture)
