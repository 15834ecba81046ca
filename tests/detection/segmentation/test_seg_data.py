"""Label maps: what becomes of instance masks, crowds and overlaps, and that they stay with the image."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from detection.data import load_source
from detection.data.source import Source
from detection.segmentation.config import load_segmentation_config
from detection.segmentation.data import IGNORED, SegmentationDataset, eval_loader, label_map, load_split, train_loader
from resbackbone.errors import InputError
from resbackbone.runtime.distributed import Process


@pytest.fixture
def source(tiny_coco: Path) -> Source:
    return load_source("coco", tiny_coco, "train2017", masks=True)


def literal_label_map(source: Source, index: int) -> np.ndarray:
    """From the rules: each pixel looked at by itself."""
    height, width = source.annotations.sizes[index].tolist()
    boxes = source.annotations.of_image(index)
    drawn = [
        (int(source.annotations.labels[b]), bool(source.annotations.ignore[b]), source.annotations.mask(b, height, width))
        for b in range(boxes.start, boxes.stop)
    ]
    result = np.zeros((height, width), np.uint8)
    for y in range(height):
        for x in range(width):
            claims = {label for label, crowd, mask in drawn if mask[y, x] and not crowd}
            in_crowd = any(crowd and mask[y, x] for _, crowd, mask in drawn)
            result[y, x] = 255 if len(claims) > 1 or (in_crowd and not claims) else next(iter(claims), 0)
    return result


def test_label_maps_follow_the_rules(source: Source) -> None:
    """The tiny data set has a crowd over a whole image and objects of both classes that overlap."""
    seen = set()
    for index in range(len(source.annotations)):
        height, width = source.annotations.sizes[index].tolist()
        found = label_map(source.annotations, source.annotations.of_image(index), height, width)
        np.testing.assert_array_equal(found, literal_label_map(source, index))
        seen |= set(np.unique(found).tolist())
    assert seen == {0, 1, 2, IGNORED}


def test_objects_of_one_class_do_not_dispute_pixels(tiny_coco: Path, source: Source) -> None:
    class Claims:
        labels, ignore = np.array([1, 1, 2, 1]), np.array([False, False, False, True])

        def mask(self, box: int, height: int, width: int) -> np.ndarray:
            rows = np.zeros((height, width), np.uint8)
            rows[box : box + 2] = 1
            return rows

    found = label_map(Claims(), slice(0, 4), 6, 2)  # type: ignore[arg-type]
    assert found[:, 0].tolist() == [1, 1, IGNORED, 2, IGNORED, 0]  # row 1 by two of class 1; row 2 by 1 and 2; row 4 by the crowd only


@pytest.mark.parametrize("size", [48, 31, 96])
def test_label_maps_stay_with_the_image(source: Source, size: int) -> None:
    """Rectangles are bright and of known colours, so that the picture itself says which class is where, mirrored or not."""
    data = SegmentationDataset(source, min_size=size, max_size=4 * size, flip=True, train=True, seed=0)
    mirrored = set()
    for position in range(len(data)):
        for epoch in range(4):
            sample = data[epoch, position]
            label = sample.target.label_map
            assert label is not None
            assert label.shape == sample.image.shape[1:]
            assert label.dtype == torch.uint8
            red, green = sample.image[0].int(), sample.image[1].int()
            for number, shown in ((1, (green > 150) & (red < 120)), (2, (red > 150) & (green < 120))):
                inside = label == number
                if inside.sum() > 60:
                    assert float(shown[inside].float().mean()) > 0.8
            upright = literal_label_map(source, sample.target.index)
            if size == 48 and not np.array_equal(label.numpy(), upright):
                np.testing.assert_array_equal(label.numpy(), upright[:, ::-1])
                mirrored.add(position)
    assert (len(mirrored) > 0) is (size == 48)


def test_evaluation_keeps_the_truth_as_it_is(source: Source) -> None:
    data = SegmentationDataset(source, min_size=31, max_size=100, flip=True, train=False)
    for position in range(len(data)):
        target = data[0, position].target
        assert target.label_map is not None
        np.testing.assert_array_equal(target.label_map.numpy(), literal_label_map(source, target.index))


def test_loaders_bring_label_maps_from_workers(tiny_coco: Path) -> None:
    config = load_segmentation_config(
        None, [f"data.root={tiny_coco}", "data.workers=1", "data.min_size=48", "train.batch_size=2", "eval.batch_size=2"]
    )
    alone = Process(rank=0, local_rank=0, world_size=1, device=torch.device("cpu"))
    loader, _ = train_loader(config, load_split(config, "train"), alone)
    batches = iter(loader)
    batch = next(batches).to("cpu")
    assert all(target.label_map.shape == image.shape[1:] for image, target in zip(batch.images, batch.targets, strict=True))
    val = load_split(config, "val")
    maps = {target.index: target.label_map for batch in eval_loader(config, val, alone) for target in batch.targets}
    assert sorted(maps) == list(range(5))
    np.testing.assert_array_equal(maps[3].numpy(), literal_label_map(val, 3))


def test_boxes_alone_are_not_enough() -> None:
    with pytest.raises(InputError, match="boxes only"):
        load_split(load_segmentation_config(None, ["data.kind=voc", "data.root=data/voc"]), "train")


@pytest.mark.parametrize(("root", "split", "images"), [("coco_mini", "val2017", 41), ("pennfudan", "pennfudan_test.json", 50)])
def test_real_masks(shared_data: Path, root: str, split: str, images: int) -> None:
    folder = "PennFudanPed/JPEGImages" if root == "pennfudan" else None
    source = load_source("coco", shared_data / root, split, masks=True, images=folder)
    annotations = source.annotations
    assert len(annotations) == images
    for index in range(0, images, 10):
        height, width = annotations.sizes[index].tolist()
        found = label_map(annotations, annotations.of_image(index), height, width)
        boxes = annotations.of_image(index)
        expected = {int(label) for label, crowd in zip(annotations.labels[boxes], annotations.ignore[boxes], strict=True) if not crowd}
        assert set(np.unique(found).tolist()) - {0, IGNORED} <= expected
        assert found.shape == (height, width)
