"""The drawn data set: deterministic, its boxes and masks true to the pixels, as varied as its words say."""

from __future__ import annotations

import time

import numpy as np
import pytest

from detection.data import load_source, shapes
from resbackbone.errors import InputError


def test_same_numbers_same_images() -> None:
    one, again = (load_source("shapes", None, "val", images=12, size=64) for _ in range(2))
    other, train = load_source("shapes", None, "val", images=12, size=64, seed=1), load_source("shapes", None, "train", images=12, size=64)
    assert np.array_equal(one.annotations.boxes, again.annotations.boxes)
    for index in (11, 0, 5):
        assert np.array_equal(one.read_image(index), again.read_image(index))
        assert not np.array_equal(one.read_image(index), other.read_image(index))
        assert not np.array_equal(one.read_image(index), train.read_image(index)), "validation images are never trained on"


def test_masks_boxes_and_areas_agree() -> None:
    annotations = load_source("shapes", None, "train", images=60, masks=True).annotations
    for index in range(60):
        rows = annotations.of_image(index)
        drawn = np.stack([annotations.mask(box, 128, 128) for box in range(rows.start, rows.stop)])
        assert (drawn.sum(axis=0) <= 1).all(), "a pixel belongs to whatever lies in front"
        for mask, box, area in zip(drawn, annotations.boxes[rows], annotations.areas[rows], strict=True):
            ys, xs = np.nonzero(mask)
            assert [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1] == box.tolist()
            assert mask.sum() == area


def test_objects_stand_out_from_the_background() -> None:
    source = load_source("shapes", None, "train", images=40, masks=True)
    annotations, contrasts = source.annotations, []
    for index in range(40):
        image = source.read_image(index).astype(float)
        assert image.std() > 5
        rows = annotations.of_image(index)
        drawn = [annotations.mask(box, 128, 128).astype(bool) for box in range(rows.start, rows.stop)]
        background = image[~np.any(drawn, axis=0)].mean(axis=0)
        contrasts += [np.abs(image[mask].mean(axis=0) - background).sum() for mask in drawn]
    assert min(contrasts) > 60


def test_three_classes_three_scales_and_overlaps() -> None:
    annotations = load_source("shapes", None, "train", images=400).annotations
    assert annotations.classes == ("circle", "square", "triangle")
    counts = np.bincount(annotations.labels, minlength=4)[1:]
    assert counts.min() > 0.8 * counts.max()
    sides = np.sqrt((annotations.boxes[:, 2:] - annotations.boxes[:, :2]).prod(axis=1))
    for low, high in ((10, 24), (24, 46), (46, 90)):
        assert ((sides >= low) & (sides < high)).mean() > 0.15
    per_image = np.diff(annotations.offsets)
    assert per_image.min() >= 1
    assert per_image.max() <= 5
    overlapping = 0
    for index in range(400):
        boxes = annotations.boxes[annotations.of_image(index)]
        corners_low, corners_high = np.maximum(boxes[:, None, :2], boxes[None, :, :2]), np.minimum(boxes[:, None, 2:], boxes[None, :, 2:])
        overlapping += int(((corners_high - corners_low).clip(0).prod(axis=2) > 0).sum() > len(boxes))
    assert overlapping > 100


def test_drawing_is_fast_enough_not_to_be_waited_for() -> None:
    source = load_source("shapes", None, "train", images=100)
    started = time.process_time()
    for index in range(100):
        source.read_image(index)
    assert (time.process_time() - started) / 100 < 0.01, "10 ms would already be slow; about 1 is usual"


def test_wrong_splits_and_sizes() -> None:
    with pytest.raises(InputError, match="did you mean 'train'"):
        load_source("shapes", None, "trai")
    with pytest.raises(InputError, match="no split"):
        load_source("shapes", None, ["train", "val"])
    with pytest.raises(InputError, match="32 pixels or more"):
        load_source("shapes", None, "train", size=8)
    assert len(load_source("shapes", None, "val").annotations) == shapes.SPLITS["val"]
