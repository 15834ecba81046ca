"""Mask R-CNN on C4 (He et al. 2017, figure 4, left) against the same layers written out, and on the heads that have no conv5_x."""

from __future__ import annotations

import copy

import peers
import pytest
import torch
import torch.nn.functional as F
from literal_steps import tiny_detector, tiny_images

from detection.mask_head import RegionTop, paste_masks


def _target() -> object:
    masks = torch.zeros((1, 64, 80), dtype=torch.uint8)
    masks[:, 10:40, 12:50] = 1
    return peers.target(torch.tensor([[8.0, 8.0, 52.0, 44.0]]), torch.tensor([2]), seed=0, masks=masks)


@torch.no_grad()
def test_masks_are_those_of_figure_4_left() -> None:
    detector = tiny_detector("c4", "model.mask=true", backbone="resnet18")
    detector.roi_head.detections = 5
    image = tiny_images()[0]
    (found,) = detector.detect([image])
    assert found.masks.shape == (5, 14, 14)
    branch, features = detector.mask_head, detector.encode([image]).features
    assert len(branch.convs) == 0
    for mask, box, label in zip(found.masks, found.boxes, found.labels, strict=True):
        region = detector.roi_head.pooler(features, [box[None]], [(64, 80)])
        top = detector.roi_head.box_head(region)
        assert top.shape == (1, 512, 7, 7)
        deconvolved = F.conv_transpose2d(top, branch.conv5_mask.weight, branch.conv5_mask.bias, stride=2).clamp(min=0)
        logits = F.conv2d(deconvolved, branch.mask_fcn_logits.weight, branch.mask_fcn_logits.bias)
        torch.testing.assert_close(mask, torch.sigmoid(logits[0, label]), atol=1e-4, rtol=1e-3)
    assert all(pasted.shape == (64, 80) for pasted in paste_masks(found, (64, 80)))


@torch.no_grad()
def test_conv5_is_one_module_saved_once_and_copied_once() -> None:
    detector = tiny_detector("c4", "model.mask=true")
    top = detector.mask_head.pooler
    assert isinstance(top, RegionTop)
    assert top._shared[0] is detector.roi_head.box_head
    assert [name for name in detector.state_dict() if name.startswith("mask_head") and "layer" in name] == []
    double = copy.deepcopy(detector)  # as the moving average is made
    assert double.mask_head.pooler._shared[0] is double.roi_head.box_head


@pytest.mark.parametrize(
    ("head", "backbone", "side"), [("c4", "resnet20_cifar", None), ("dc5", "resnet18", 28), ("fpn", "resnet20_cifar", 28)]
)
def test_it_learns_and_detects_on_every_head(head: str, backbone: str, side: int | None) -> None:
    detector = tiny_detector(head, "model.mask=true", backbone=backbone).train()
    losses = detector([tiny_images()[0]], [_target()])
    assert losses["mask"].item() > 0
    losses["mask"].backward()
    assert all(p.grad is not None for p in detector.mask_head.parameters())
    if side is None:
        assert any(p.grad is not None and p.grad.any() for p in detector.roi_head.box_head.parameters())  # shared with the classes
    (found,) = detector.eval().detect([tiny_images()[0]])
    assert side is None or found.masks.shape[1:] == (side, side)


@pytest.mark.slow  # a hundred million weights
def test_vgg_has_no_conv5_x_and_takes_the_branch_of_figure_4_right() -> None:
    detector = tiny_detector("c4", "model.mask=true", "model.backbone.norm=none", backbone="vgg16")
    assert len(detector.mask_head.convs) == 4
    assert detector.mask_head.convs[0].in_channels == 512


@pytest.mark.parametrize("steps", ["refine", "context", "flip"])
def test_no_detection_has_no_mask(steps: str) -> None:
    detector = tiny_detector("c4", "model.mask=true", f"model.test.{steps}=true")
    detector.roi_head.score_threshold = 1.0
    (found,) = detector.detect(tiny_images()[:1])
    assert found.masks.shape[0] == len(found) == 0
