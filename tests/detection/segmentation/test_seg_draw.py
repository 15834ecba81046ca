"""Drawn label maps: classes tinted, the truth outlined, names in the corner, the picture given left as it was."""

from __future__ import annotations

import numpy as np

from detection.draw import color_of
from detection.segmentation.draw import draw_segmentation


def test_classes_are_tinted_and_the_truth_outlined() -> None:
    image = np.full((480, 500, 3), 100, np.uint8)
    found: np.ndarray = np.zeros((480, 500), np.uint8)
    found[200:300, 200:300] = 2
    truth: np.ndarray = np.zeros((480, 500), np.uint8)
    truth[150:350, 150:350] = 1
    truth[400:, :] = 255
    drawn = draw_segmentation(image, found, ("cat", "dog"), truth=truth)
    assert (image == 100).all()
    tint = np.array(color_of(2)) * 0.45 + 100 * 0.55
    assert np.abs(drawn[250, 250] - tint).max() < 2
    assert (drawn[390, 390] == 100).all()  # background, outside
    assert (drawn[450, 250] == 100).all()  # ignored: neither tinted nor outlined
    assert (drawn[250, 150] == 255).all()
    assert drawn[148, 250].max() <= 1
    assert tuple(drawn[1, 1]) == color_of(2)  # the one class found, named in the corner
    assert (draw_segmentation(image, found * 0, ("cat", "dog")) == 100).all()


def test_small_pictures_are_enlarged() -> None:
    labels: np.ndarray = np.zeros((40, 100), np.uint8)
    labels[20:, 50:] = 1
    drawn = draw_segmentation(np.zeros((40, 100, 3), np.uint8), labels, ("é",))
    assert drawn.shape == (200, 500, 3)
    assert drawn[150, 400].any()
    assert not drawn[150, 100].any()
