"""Crops, colour noise and resizing: what they are in distribution, and equal to slow literal versions and to torchvision and PIL."""

from __future__ import annotations

import io
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from resbackbone.classification.config import EvalConfig
from resbackbone.classification.files import REDUCTIONS, UnreadableImage, decode, jpeg_size, largest_reduction
from resbackbone.classification.transforms import (
    RGB_AXES,
    RGB_VARIANCES,
    Crop,
    area_crop,
    cut,
    padded_crop,
    pca_shift,
    resize,
    resize_as_pil,
    scale_crop,
    stored_size,
)
from resbackbone.classification.views import image_views, resize_shorter

HEIGHT, WIDTH = 375, 500
DRAWS = 4000


def jpeg(height: int, width: int, *, quality: int = 90) -> bytes:
    """A smooth picture with edges, as photographs are."""
    draw = np.random.default_rng(0)
    pixels = cv2.resize(draw.integers(0, 256, (height // 24 + 2, width // 24 + 2, 3), dtype=np.uint8), (width, height))
    cv2.circle(pixels, (width // 2, height // 2), min(height, width) // 3, (20, 200, 90), 5)
    return cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, quality])[1].tobytes()


def test_scale_crop_draws_the_shorter_side_from_the_range() -> None:
    rng = np.random.default_rng(1)
    crops = [scale_crop(HEIGHT, WIDTH, size=224, shorter_side=(256, 480), rng=rng) for _ in range(DRAWS)]
    shorter = np.array([224 * HEIGHT / crop.height for crop in crops])
    assert {round(side) for side in shorter} <= set(range(256, 481))
    assert np.allclose(shorter, shorter.round()), "the side is a whole number of pixels"
    assert (round(shorter.min()), round(shorter.max())) == (256, 480)
    # Uniform: the mean of 4000 draws has a standard error of 1.03, each quarter of the range gets a quarter of them.
    assert shorter.mean() == pytest.approx(368, abs=4)
    quarters = np.histogram(shorter, bins=[256, 312.25, 368.5, 424.75, 481])[0] / DRAWS
    assert quarters == pytest.approx(0.25, abs=0.03)
    for low, room in (("top", HEIGHT), ("left", WIDTH)):
        places = np.array([getattr(crop, low) / (room - crop.height) for crop in crops])
        assert places.min() >= 0
        assert places.max() <= 1
        assert np.quantile(places, [0.25, 0.5, 0.75]) == pytest.approx([0.25, 0.5, 0.75], abs=0.04)
    assert all(crop.height == crop.width for crop in crops)


def test_area_crop_has_torchvisions_distribution() -> None:
    rng = np.random.default_rng(1)
    torch.manual_seed(1)
    ours = [area_crop(HEIGHT, WIDTH, area=(0.08, 1.0), rng=rng) for _ in range(DRAWS)]
    image = torch.zeros(3, HEIGHT, WIDTH)
    theirs = [v2.RandomResizedCrop(224).make_params([image]) for _ in range(DRAWS)]
    levels = [0.05, 0.25, 0.5, 0.75, 0.95]
    for name in ("top", "left", "height", "width"):
        mine, peer = np.array([getattr(crop, name) for crop in ours]), np.array([crop[name] for crop in theirs])
        assert np.quantile(mine, levels) == pytest.approx(np.quantile(peer, levels), abs=0.04 * peer.max()), name


@pytest.mark.parametrize(("height", "width"), [(20, 400), (400, 20)])
def test_area_crop_of_a_strip_is_torchvisions(height: int, width: int) -> None:
    crop = area_crop(height, width, area=(0.9, 1.0), rng=np.random.default_rng(0))
    peer = v2.RandomResizedCrop(8, scale=(0.9, 1.0)).make_params([torch.zeros(3, height, width)])
    assert vars(crop) == peer


def test_padded_crop_is_a_window_of_the_padded_image() -> None:
    image = np.random.default_rng(0).integers(1, 256, (32, 32, 3), dtype=np.uint8)
    rng = np.random.default_rng(3)
    corners = set()
    for _ in range(600):
        crop = padded_crop(image, size=32, padding=4, rng=rng)
        assert crop.shape == (32, 32, 3)
        # What is left of the image starts at the first row that isn't padding.
        rows, columns = np.flatnonzero(crop.any((1, 2))), np.flatnonzero(crop.any((0, 2)))
        corners.add((int(rows[0]) - (31 - int(rows[-1])), int(columns[0]) - (31 - int(columns[-1]))))
        inner = crop[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        top, left = (0 if rows[0] else 32 - len(rows)), (0 if columns[0] else 32 - len(columns))
        assert np.array_equal(inner, image[top : top + len(rows), left : left + len(columns)])
    assert corners == {(dy, dx) for dy in range(-4, 5) for dx in range(-4, 5)}, "all 81 windows come up"
    with pytest.raises(UnreadableImage, match="too small"):
        padded_crop(image[:20], size=32, padding=4, rng=rng)


def test_pca_noise_has_the_covariance_of_the_paper() -> None:
    rng = np.random.default_rng(0)
    shifts = np.stack([pca_shift(0.1, rng) for _ in range(20_000)])
    expected = sum((0.1 * value) ** 2 * np.outer(axis, axis) for value, axis in zip(RGB_VARIANCES, RGB_AXES.T, strict=True))
    assert shifts.mean(0) == pytest.approx(0, abs=4e-4)
    assert np.cov(shifts.T) == pytest.approx(expected, abs=0.03 * expected.max())
    assert pytest.approx(np.eye(3), abs=2e-3) == RGB_AXES.T @ RGB_AXES, "principal axes stand at right angles"
    # Nearly all of it is brightness: the three channels move together.
    assert (np.sign(shifts) == np.sign(shifts[:, :1])).all(1).mean() > 0.8


def test_cut_equals_pil() -> None:
    data = jpeg(120, 160)
    crop = Crop(top=10, left=20, height=90, width=120)
    ours = cut(data, crop, size=64, name="a.jpg", reduced=False)
    theirs = Image.open(io.BytesIO(data)).convert("RGB").crop((20, 10, 140, 100)).resize((64, 64), Image.Resampling.BILINEAR)
    difference = np.abs(ours.astype(int) - np.asarray(theirs))
    assert difference.max() <= 1


@pytest.mark.parametrize("size", [(40, 60), (200, 220)])
def test_resize_equals_pil(size: tuple[int, int]) -> None:
    pixels = decode(jpeg(120, 160), name="a")
    theirs = np.asarray(Image.fromarray(pixels).resize(size[::-1], Image.Resampling.BILINEAR))
    assert np.abs(resize(pixels, size).astype(int) - theirs).max() <= 1
    assert np.abs(resize_as_pil(pixels, size).astype(int) - theirs).max() <= 1


def test_resizing_keeps_the_channels_together() -> None:
    pixels = decode(jpeg(120, 160), name="a")
    for image in (pixels, pixels[3:100, 5:150]):  # whole, and a crop: torch must not turn either into planes, which takes twice as long
        assert resize_as_pil(image, (40, 60)).flags.c_contiguous


def test_reduced_decoding_differs_little_and_only_where_it_may() -> None:
    data = jpeg(960, 1280)
    whole = Crop(top=0, left=0, height=960, width=1280)
    full, reduced = (cut(data, whole, size=224, name="a", reduced=flag).astype(int) for flag in (False, True))
    assert not np.array_equal(full, reduced)
    assert np.abs(full - reduced).mean() < 1.5
    small = Crop(top=0, left=0, height=440, width=440)
    assert np.array_equal(*(cut(data, small, size=224, name="a", reduced=flag) for flag in (False, True)))


def test_largest_reduction_keeps_pixels_enough() -> None:
    assert [largest_reduction(side, 5000, size=224) for side in (100, 447, 448, 895, 896, 1792, 9999)] == [1, 1, 2, 2, 4, 8, 8]


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("fast", [True, False])
def test_decoders_agree_on_the_reduced_size(reduction: int, fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not fast:
        monkeypatch.setattr("resbackbone.classification.files._simplejpeg", lambda: None)
    data = jpeg(101, 203)
    assert decode(data, name="a", reduction=reduction).shape == (-(-101 // reduction), -(-203 // reduction), 3)


def test_other_formats_and_broken_files(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    png = cv2.imencode(".png", pixels[..., ::-1])[1].tobytes()
    assert jpeg_size(png) is None
    height, width, decoded = stored_size(png, name="a.png")
    assert (height, width) == (9, 7)
    assert np.array_equal(decoded, pixels)
    data = jpeg(64, 64)
    for broken, words in ((data[: len(data) // 2], "cut off"), (b"", "empty"), (b"<html>", "not an image"), (data[:30], "cut off")):
        with pytest.raises(UnreadableImage, match=rf"x\.jpg.*{words}"):
            decode(broken, name="x.jpg")
    huge = data.replace(b"\xff\xc0\x00\x11\x08\x00\x40\x00\x40", b"\xff\xc0\x00\x11\x08\xff\xff\xff\xff")
    with pytest.raises(UnreadableImage, match="65535x65535"):
        decode(huge, name="x.jpg")


def test_views_are_torchvisions() -> None:
    pixels = decode(jpeg(90, 130), name="a")
    image = torch.from_numpy(pixels).permute(2, 0, 1)
    resized = v2.Resize(72, antialias=True)(image)
    assert tuple(resize_shorter(pixels, 72).shape[:2]) == tuple(resized.shape[1:])
    (one,) = image_views(pixels, EvalConfig(mode="1crop", shorter_side=72, crop=64))
    assert torch.equal(one[0], v2.CenterCrop(64)(resized))
    (ten,) = image_views(pixels, EvalConfig(mode="10crop", shorter_side=72, crop=64))
    theirs = torch.stack(v2.TenCrop(64)(resized))
    assert torch.equal(ten.flatten(1).sort(0).values, theirs.flatten(1).sort(0).values), "the same ten, in whatever order"
    scales = image_views(pixels, EvalConfig(mode="multiscale", scales=(40, 80), flip=True))
    assert [tuple(stack.shape) for stack in scales] == [(2, 3, 40, 57), (2, 3, 80, 115)]
    assert torch.equal(scales[0][1], scales[0][0].flip(-1))
