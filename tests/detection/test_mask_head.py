"""The mask branch against torchvision's Mask R-CNN."""

from __future__ import annotations

import peers
import pytest
import torch
from torchvision.models.detection.roi_heads import paste_masks_in_image

from detection import mask_head
from detection.mask_head import MaskHead, cut_masks, paste_masks
from detection.roi_head import Regions
from detection.structures import Detections


@pytest.fixture(scope="module")
def masked():
    peer, mine = peers.pair(mask=True)
    peer.roi_heads.detections_per_img = mine.roi_head.detections = 10
    return peer, mine


def _masks(boxes: torch.Tensor) -> torch.Tensor:
    """Ellipses inside the boxes."""
    y, x = torch.meshgrid(torch.arange(peers.SIZE[0]) + 0.5, torch.arange(peers.SIZE[1]) + 0.5, indexing="ij")
    centre, half = (boxes[:, :2] + boxes[:, 2:]) / 2, (boxes[:, 2:] - boxes[:, :2]) / 2
    distance = ((x - centre[:, 0, None, None]) / half[:, 0, None, None]) ** 2 + (
        (y - centre[:, 1, None, None]) / half[:, 1, None, None]
    ) ** 2
    return (distance <= 1).to(torch.uint8)


def test_masks_equal_torchvision(masked):
    peer, mine = masked
    images = peers.random_images(2)
    wanted = peer.eval()([image / 255 for image in images])
    for ours, theirs in zip(mine.eval().detect(images), wanted, strict=True):
        assert len(ours) > 3
        torch.testing.assert_close(ours.boxes, theirs["boxes"], atol=1e-4, rtol=1e-5)
        pasted = torch.stack(list(paste_masks(ours, peers.SIZE)))
        assert pasted.any()
        assert (pasted != (theirs["masks"][:, 0] > 0.5)).float().mean() < 1e-4  # a pixel exactly at one half may fall either way


def test_losses_equal_torchvision(masked, monkeypatch):
    peers.same_permutations(monkeypatch)
    peer, mine = masked
    boxes = [peers.random_boxes(3, min_side=20), peers.random_boxes(2, seed=1, min_side=20)]
    targets = [peers.target(one, masks=_masks(one)) for one in boxes]
    images = peers.random_images(2)
    wanted = peers.trained(peer)([image / 255 for image in images], [peers.their_target(one) for one in targets])
    losses = peers.trained(mine)(images, targets)
    torch.testing.assert_close(losses["mask"], wanted["loss_mask"], atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(losses["roi_class"], wanted["loss_classifier"], atol=1e-4, rtol=1e-5)


def test_no_positive_region_gives_zero_gradients():
    head = MaskHead(peers.PlainPooler(14, ("p2",)), 4, num_classes=2, width=4)
    features = {"p2": torch.randn((1, 4, 24, 32), requires_grad=True)}
    regions = Regions(boxes=peers.random_boxes(3), labels=torch.zeros(3, dtype=torch.int64), matches=torch.full((3,), -1), reserved=0)
    none = torch.zeros((0, 4))
    targets = [peers.target(none, masks=torch.zeros((0, *peers.SIZE), dtype=torch.uint8))]
    losses = head.losses(features, [regions], [peers.SIZE], targets=targets)
    assert losses["mask"].item() == 0
    losses["mask"].backward()
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in head.parameters())
    nothing = Detections(boxes=none, scores=torch.zeros(0), labels=torch.zeros(0, dtype=torch.int64))
    (found,) = head.detect(features, [nothing], [peers.SIZE])
    assert found.masks.shape == (0, 28, 28)
    assert not list(paste_masks(found, peers.SIZE))


@pytest.mark.parametrize(
    "box",
    [[10.0, 20.0, 50.0, 70.0], [-5.0, -8.0, 30.0, 20.0], [100.0, 80.0, 140.0, 110.0], [40.2, 40.7, 40.9, 41.1], [0.0, 0.0, 128.0, 96.0]],
)
def test_pasting_equals_torchvision(box):
    masks = torch.rand((1, 28, 28), generator=torch.Generator().manual_seed(0))
    boxes = torch.tensor([box])
    wanted = paste_masks_in_image(masks[:, None], boxes, peers.SIZE)[0, 0] > 0.5
    (found,) = paste_masks(Detections(boxes=boxes, scores=torch.ones(1), labels=torch.ones(1), masks=masks), peers.SIZE)
    assert found.dtype == torch.uint8
    assert torch.equal(found.bool(), wanted)


def test_a_crowd_is_cut_in_parts(monkeypatch):
    """The same masks, and never more of them as floats at a time than the limit."""
    objects = peers.random_boxes(9, min_side=20)
    target = peers.target(objects, masks=_masks(objects))
    generator = torch.Generator().manual_seed(3)
    matches = torch.randint(1, 9, (40,), generator=generator)  # object 0 is nobody's
    boxes = objects[matches] + torch.randn((40, 4), generator=generator)
    whole = cut_masks(target, matches, boxes, side=14)
    seen = []
    align = mask_head.roi_align
    monkeypatch.setattr(mask_head, "roi_align", lambda masks, *rest: seen.append(len(masks)) or align(masks, *rest))
    monkeypatch.setattr(mask_head, "MASKS_AT_ONCE", 3)
    assert torch.equal(cut_masks(target, matches, boxes, side=14), whole)
    assert seen == [3, 3, 2]
    assert cut_masks(target, matches[:0], boxes[:0], side=14).shape == (0, 14, 14)
