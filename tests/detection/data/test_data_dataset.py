"""Samples: geometry in step, ignored boxes apart, everything decided by (seed, epoch, index), unreadable images replaced and counted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from detection.data import load_source
from detection.data.augment import Scene, horizontal_flip, resized
from detection.data.dataset import DetectionDataset
from detection.data.source import Source
from resbackbone.errors import InputError


@pytest.fixture(scope="module")
def penn_fudan(shared_data: Path) -> Source:
    return load_source("coco", shared_data / "pennfudan", "pennfudan_train.json", images="PennFudanPed/JPEGImages", masks=True)


def test_boxes_masks_and_size_are_torchvisions(penn_fudan: Source) -> None:
    dataset = DetectionDataset(penn_fudan, min_size=160, max_size=220, train=False)
    transform = GeneralizedRCNNTransform(160, 220, [0.0] * 3, [1.0] * 3).eval()
    annotations = penn_fudan.annotations
    for index in range(6):
        rows = annotations.of_image(index)
        size = annotations.sizes[index].tolist()
        masks = torch.from_numpy(np.stack([annotations.mask(box, *size) for box in range(rows.start, rows.stop)]))
        image = torch.from_numpy(penn_fudan.read_image(index)).permute(2, 0, 1) / 255
        expected = {"boxes": torch.from_numpy(annotations.boxes[rows]), "masks": masks}
        reference, target = transform.resize(image, expected)
        sample = dataset[0, index]
        assert sample.image.shape == reference.shape
        assert torch.allclose(sample.target.boxes, target["boxes"], atol=1e-4)
        assert sample.target.masks is not None
        assert (sample.target.masks != target["masks"]).float().mean() < 1e-3
        assert sample.target.original_size == tuple(size)


def test_images_are_owned_contiguous_uint8(penn_fudan: Source) -> None:
    for size in (100, 700):  # shrunk and enlarged
        image = DetectionDataset(penn_fudan, min_size=size, max_size=2 * size, train=True, flip=True)[0, 0].image
        assert image.dtype == torch.uint8
        assert image.is_contiguous()
        assert image.untyped_storage().nbytes() == image.numel(), "it must not keep a larger decoder buffer alive"


def test_flip_moves_pixels_boxes_and_masks_together() -> None:
    rng = np.random.default_rng(0)
    masks = np.zeros((2, 20, 30), np.uint8)
    masks[0, 3:9, 4:11], masks[1, 0:20, 29:30] = 1, 1
    boxes = np.array([[4, 3, 11, 9], [29, 0, 30, 20]], np.float32)
    scene = Scene(image=rng.integers(0, 256, (20, 30, 3), dtype=np.uint8), boxes=boxes, masks=masks)
    flipped = horizontal_flip(scene)
    assert np.array_equal(flipped.image, scene.image[:, ::-1])
    assert flipped.boxes.tolist() == [[19, 3, 26, 9], [0, 0, 1, 20]]
    assert flipped.masks is not None
    for box, mask in zip(flipped.boxes, flipped.masks, strict=True):
        rows, columns = np.nonzero(mask)
        assert [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1] == box.tolist()
    again = horizontal_flip(flipped)
    assert np.array_equal(again.image, scene.image)
    assert np.array_equal(again.boxes, boxes)


def test_no_boxes_stay_no_boxes() -> None:
    scene = Scene(image=np.zeros((8, 9, 3), np.uint8), boxes=np.zeros((0, 4), np.float32), masks=np.zeros((0, 8, 9), np.uint8))
    after = horizontal_flip(resized(scene, (16, 18)))
    assert after.boxes.shape == (0, 4)
    assert after.masks is not None
    assert after.masks.shape == (0, 16, 18)


def test_a_sample_depends_on_seed_epoch_and_index_only(penn_fudan: Source) -> None:
    def make(seed: int) -> DetectionDataset:
        return DetectionDataset(penn_fudan, min_size=(96, 112, 128), max_size=200, train=True, flip=True, seed=seed)

    one, again, other = make(1), make(1), make(2)
    np.random.default_rng().random()
    torch.rand(3)
    keys = [(epoch, index) for epoch in range(4) for index in range(8)]
    for key in reversed(keys):
        ours, theirs = one[key], again[key]
        assert torch.equal(ours.image, theirs.image)
        assert torch.equal(ours.target.boxes, theirs.target.boxes)
        assert ours.target.seed == theirs.target.seed
    shapes = {one[key].image.shape for key in keys if key[1] == 0}
    assert len({one[key].target.seed for key in keys}) == len(keys)
    assert len(shapes) > 1, "several sizes are drawn over the epochs"
    assert any(one[key].image.shape != other[key].image.shape for key in keys)


def test_half_of_the_training_images_are_flipped(penn_fudan: Source) -> None:
    plain = DetectionDataset(penn_fudan, min_size=32, max_size=60, train=False)
    dataset = DetectionDataset(penn_fudan, min_size=32, max_size=60, train=True, flip=True)
    flipped = [not torch.equal(dataset[epoch, index].image, plain[0, index].image) for epoch in range(12) for index in range(4)]
    assert 12 <= sum(flipped) <= 36
    never = DetectionDataset(penn_fudan, min_size=32, max_size=60, train=True, flip=False)
    assert all(torch.equal(never[epoch, 0].image, plain[0, 0].image) for epoch in range(4))


def test_crowd_and_difficult_are_ignored_not_lost(coco_mini: Path) -> None:
    source = load_source("coco", coco_mini, "train2017", masks=True)
    dataset = DetectionDataset(source, min_size=128, max_size=200, train=False)
    crowds = 0
    for index in range(len(source.annotations)):
        ignore = source.annotations.ignore[source.annotations.of_image(index)]
        if ignore.any():
            target = dataset[0, index].target
            assert len(target.ignore_boxes) == ignore.sum()
            assert target.masks is not None
            assert len(target.boxes) == len(target.labels) == len(target.masks) == (~ignore).sum()
            crowds += int(ignore.sum())
    assert crowds == 8


def test_empty_images_are_kept_or_dropped(coco_mini: Path) -> None:
    source = load_source("coco", coco_mini, "train2017")
    empty = np.flatnonzero(source.annotations.num_objects() == 0)
    assert source.annotations.image_ids[empty].tolist() == [226111]
    kept = DetectionDataset(source, min_size=64, max_size=100, train=True, empty_images="keep")
    dropped = DetectionDataset(source, min_size=64, max_size=100, train=True, empty_images="drop")
    assert (len(kept), len(dropped)) == (81, 80)
    target = kept[0, int(empty[0])].target
    assert target.boxes.shape == (0, 4)
    assert target.image_id == 226111
    assert [dropped[0, position].target.index for position in range(80)] == [i for i in range(81) if i != empty[0]]


@pytest.mark.parametrize("name", ["truncated.jpg", "zero_bytes.jpg", "html_named.jpg", "huge_header.png"])
def test_training_replaces_unreadable_images_and_counts_them(
    coco_with: Callable[..., Path], name: str, caplog: pytest.LogCaptureFixture
) -> None:
    dataset = DetectionDataset(load_source("coco", coco_with(None, name, None), "train"), min_size=64, max_size=100, train=True)
    for _ in range(2):
        sample = dataset[0, 1]
        assert sample.target.image_id == 3
        assert sample.target.boxes.shape == (1, 4)
    assert dataset.unreadable.tolist() == [0, 1, 0]
    assert caplog.text.count("the next image takes its place") == 1, "said once"
    assert dataset[0, 2].target.image_id == 3


def test_the_last_image_is_replaced_by_the_first(coco_with: Callable[..., Path]) -> None:
    dataset = DetectionDataset(load_source("coco", coco_with(None, "zero_bytes.jpg"), "train"), min_size=64, max_size=100, train=True)
    assert dataset[0, 1].target.image_id == 1


def test_evaluation_counts_an_unreadable_image_as_missed(coco_with: Callable[..., Path]) -> None:
    dataset = DetectionDataset(load_source("coco", coco_with(None, "truncated.jpg"), "train"), min_size=64, max_size=100, train=False)
    sample = dataset[0, 1]
    assert sample.target.image_id == 2
    assert not sample.image.any()
    assert dataset.unreadable.tolist() == [0, 1]


def test_a_set_of_unreadable_images_stops(coco_with: Callable[..., Path]) -> None:
    dataset = DetectionDataset(
        load_source("coco", coco_with("zero_bytes.jpg", "truncated.jpg"), "train"), min_size=64, max_size=100, train=True
    )
    with pytest.raises(InputError, match="2 images in a row"):
        dataset[0, 0]


def test_impossible_settings(coco_with: Callable[..., Path], coco_mini: Path) -> None:
    source = load_source("coco", coco_with(None), "train")
    for min_size, max_size in ((0, 100), (200, 100), ((64, 300), 200)):
        with pytest.raises(InputError, match=r"data\.min_size"):
            DetectionDataset(source, min_size=min_size, max_size=max_size, train=True)
    source.annotations.ignore[:] = True
    with pytest.raises(InputError, match="no image is left"):
        DetectionDataset(source, min_size=64, max_size=100, train=True, empty_images="drop")


def test_pixels_arrive_in_their_planes(bad_inputs: Path) -> None:
    source = load_source("coco", bad_inputs, "coco_valid.json")
    dataset = DetectionDataset(source, min_size=228, max_size=400, train=False)
    assert np.array_equal(dataset[0, 0].image.numpy(), source.read_image(0).transpose(2, 0, 1))
