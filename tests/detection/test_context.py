"""The whole image beside each region: the features one by one, and that training reaches all of it."""

from __future__ import annotations

import peers
import pytest
import torch
from literal_steps import tiny_detector, tiny_images

from detection.context import ContextRoIHead
from detection.roi_head import RoIHead


@pytest.mark.parametrize("head", ["fpn", "c4"])
@pytest.mark.parametrize("counts", [(3, 2), (0, 4), (0, 0)])
@torch.no_grad()
def test_each_region_is_followed_by_its_image(head: str, counts: tuple[int, int]) -> None:
    detector = tiny_detector(head, "model.test.context=true")
    region_head = detector.roi_head
    assert isinstance(region_head, ContextRoIHead)
    images = [tiny_images()[0], tiny_images()[2]]
    encoded = detector.encode(images)
    boxes = [peers.random_boxes(count, size=(64, 80), seed=number) for number, count in enumerate(counts)]
    found = region_head.describe(region_head.pool_from(encoded.features, encoded.sizes), boxes, encoded.sizes)
    channels = region_head.box_head.out_channels
    assert found.shape == (sum(counts), 2 * channels)
    rows = iter(found)
    for number, image in enumerate(images):
        alone = detector.encode([image])
        pool = region_head.pool_from(alone.features, alone.sizes)
        whole = RoIHead.describe(region_head, pool, [torch.tensor([[0.0, 0.0, 80.0, 64.0]])], alone.sizes)[0]
        for box in boxes[number]:
            own = RoIHead.describe(region_head, pool, [box[None]], alone.sizes)[0]
            torch.testing.assert_close(next(rows), torch.cat((own, whole)), atol=1e-4, rtol=1e-3)
    assert next(rows, None) is None


@pytest.mark.parametrize("head", ["fpn", "c4", "dc5"])
def test_it_is_trained_end_to_end(head: str) -> None:
    detector = tiny_detector(head, "model.test.context=true", backbone="resnet18" if head == "dc5" else "resnet20_cifar").train()
    target = peers.target(torch.tensor([[8.0, 8.0, 40.0, 40.0]]), torch.tensor([1]), seed=0)
    losses = detector([tiny_images()[0]], [target])
    (losses["roi_class"] + losses["roi_box"]).backward()
    for layer in (detector.roi_head.cls_score, detector.roi_head.bbox_pred):
        own, context = layer.weight.grad.chunk(2, dim=1)
        assert own.any()
        assert context.any()
    assert all(p.grad is not None for p in detector.roi_head.box_head.parameters())
