"""Which two scales a region takes, what maxout makes of them, and the way there and back of a mirrored or resized image."""

from __future__ import annotations

import peers
import pytest
import torch
from literal_steps import literal_scales

from detection.config import load_detection_config
from detection.multiscale import LONGEST_PX, PAPER_SCALES, ScaledFeatures, choose_scales, mirror, pool_two_scales, resize_to, views_of
from detection.pooling import RegionPooler
from detection.structures import Detections
from resbackbone.backbone import FeatureInfo
from resbackbone.errors import InputError

SIZE = (600, 800)
SCALED = [(200, 266), (400, 533), (600, 800), (800, 1066), (1000, 1333)]


def test_scales_are_chosen_as_by_the_literal_rule() -> None:
    regions = torch.cat((peers.random_boxes(300, size=SIZE), torch.tensor([[0.0, 0, 800, 600], [5, 5, 5, 9]])))
    view, scaled = torch.empty((3, *SIZE)), [torch.empty((3, *size)) for size in SCALED]
    found = choose_scales(regions, SIZE, SCALED).tolist()
    assert found == [literal_scales(region, view, scaled) for region in regions.tolist()]
    assert set(found) == {0, 1, 2, 3}


@pytest.mark.parametrize(
    ("side", "lower"),
    [
        (800, 0),  # large: at 200 px it is 266, at 400 already 533
        (350, 0),  # 233 at 400, its nearest; 117 at 200 is nearer in area than 350 at 600
        (224, 1),  # 224 at 600; 149 at 400 is nearer than 299 at 800
        (100, 3),  # small: 133 and 167 at 800 and 1000
    ],
)
def test_scales_by_hand(side: float, lower: int) -> None:
    assert choose_scales(torch.tensor([[0.0, 0.0, side, side]]), (600, 800), SCALED).tolist() == [lower]


@pytest.mark.parametrize("levels", [("c4",), ("p3", "p4")])
@pytest.mark.parametrize("count", [0, 1, 25])
def test_maxout_equals_one_region_at_a_time(levels: tuple[str, ...], count: int) -> None:
    size, sizes = (96, 128), [(96, 128), (300, 400), (600, 800)]
    strides = {"c4": 16, "p3": 8, "p4": 16}
    pooler = RegionPooler({name: FeatureInfo(3, strides[name]) for name in levels}, output_size=4)
    generator = torch.Generator().manual_seed(0)
    pyramid = [
        ScaledFeatures(
            {name: torch.randn((1, 3, -(-h // strides[name]), -(-w // strides[name])), generator=generator) for name in levels}, (h, w)
        )
        for h, w in sizes
    ]
    regions = peers.random_boxes(count, size=size)
    found = pool_two_scales(pooler, pyramid, regions, size)
    assert found.shape == (count, 3, 4, 4)
    view, scaled = torch.empty((3, *size)), [torch.empty((3, *one)) for one in sizes]
    for pooled, region in zip(found, regions, strict=True):
        first = literal_scales(region.tolist(), view, scaled)
        pair = [
            pooler(one.features, [region[None] * torch.tensor([one.size[1] / 128, one.size[0] / 96] * 2)], [one.size])[0]
            for one in pyramid[first : first + 2]
        ]
        torch.testing.assert_close(pooled, torch.where(pair[0] > pair[1], pair[0], pair[1]), atol=1e-5, rtol=1e-4)


def test_mirroring_twice_changes_nothing_and_boxes_follow_their_pixels() -> None:
    boxes = torch.tensor([[2.0, 3.0, 7.0, 9.0], [0.0, 0.0, 20.0, 10.0]])
    masks = torch.rand((2, 5, 5))
    found = Detections(boxes=boxes, scores=torch.tensor([0.5, 0.4]), labels=torch.tensor([1, 2]), masks=masks)
    image = torch.zeros((1, 10, 20))
    image[:, 3:9, 2:7] = 1
    turned = mirror(found, 20)
    x1, y1, x2, y2 = map(int, turned.boxes[0])
    assert image.flip(-1)[:, y1:y2, x1:x2].all()
    assert image.flip(-1).sum() == (y2 - y1) * (x2 - x1)
    again = mirror(turned, 20)
    assert torch.equal(again.boxes, boxes)
    assert torch.equal(again.masks, masks)


def test_views_lead_back_to_the_image() -> None:
    image = torch.rand((3, 40, 60))
    views = list(views_of(image, scales=(20, 80), flip=True))
    assert [(tuple(view.image.shape[1:]), view.mirrored) for view in views] == [
        ((20, 30), False),
        ((80, 120), False),
        ((20, 30), True),
        ((80, 120), True),
    ]
    for view in views:
        height, width = view.image.shape[1:]
        box = torch.tensor([[0.0, 0.0, width / 4, height / 2]])
        restored = view.restored(Detections(boxes=box, scores=torch.ones(1), labels=torch.ones(1))).boxes[0].tolist()
        assert restored == pytest.approx([45, 0, 60, 20] if view.mirrored else [0, 0, 15, 20])
    assert next(views_of(image, scales=None, flip=False)).image is image


@pytest.mark.parametrize(
    ("size", "scale", "wanted"), [((50, 80), 100, (100, 160)), ((80, 50), 25, (40, 25)), ((10, 500), 100, (40, LONGEST_PX))]
)
def test_resizing(size: tuple[int, int], scale: int, wanted: tuple[int, int]) -> None:
    image = torch.randint(0, 256, (3, *size), dtype=torch.uint8)
    resized = resize_to(image, scale)
    assert tuple(resized.shape) == (3, *wanted)
    torch.testing.assert_close(resized, resize_to(image / 255, scale))
    assert resized.max() <= 1


@pytest.mark.parametrize("scales", ["[600,400]", "[0,200]", "[200,200]", "[]", "[300]"])
def test_impossible_scales_are_refused(scales: str) -> None:
    with pytest.raises(InputError, match="scales"):
        load_detection_config(None, [f"model.test.scales={scales}"])


def test_the_papers_scales_and_one_alone_where_nms_merges() -> None:
    given = load_detection_config(None, [f"model.test.scales={list(PAPER_SCALES)}"])
    assert given.model.test.scales == (200, 400, 600, 800, 1000)
    assert load_detection_config(None, ["model.test.scales=300", "model.test.scale_merge=nms"]).model.test.scales == (300,)
