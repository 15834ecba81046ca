"""torchvision's detectors with random weights, and ours carrying the same ones: what the parity tests compare."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.detection import fasterrcnn_resnet50_fpn, maskrcnn_resnet50_fpn
from torchvision.ops import FrozenBatchNorm2d, MultiScaleRoIAlign

from detection.anchors import anchor_grid
from detection.faster_rcnn import FasterRCNN
from detection.mask_head import MaskHead
from detection.pooling import RegionPooler
from detection.preprocess import Preprocess
from detection.roi_head import RoIHead, TwoFCHead
from detection.rpn import Limits, ProposalNetwork
from detection.structures import Target
from detection.torchvision_weights import from_torchvision
from resbackbone.fpn import FeaturePyramid
from resbackbone.registry import create_backbone

LEVELS = ("p2", "p3", "p4", "p5", "p6")
CLASSES = 5
SIZE = (96, 128)  # of the test images: (height, width)
TRAIN_LIMITS, TEST_LIMITS = Limits(candidates=300, proposals=200), Limits(candidates=150, proposals=100)  # more would only cost time


class PlainPooler(nn.Module):
    """torchvision's pooling under our names."""

    def __init__(self, side: int, levels: tuple[str, ...] = LEVELS[:4]) -> None:
        super().__init__()
        self.align = MultiScaleRoIAlign(list(levels), side, sampling_ratio=2)

    def forward(self, features: dict[str, Tensor], boxes: list[Tensor], sizes: list[tuple[int, int]]) -> Tensor:
        return self.align(features, list(boxes), list(sizes))


def theirs(*, mask: bool = False, seed: int = 0) -> nn.Module:
    """torchvision's detector with random weights that give sensible scores and boxes, for images of SIZE as they are."""
    torch.manual_seed(seed)
    build = maskrcnn_resnet50_fpn if mask else fasterrcnn_resnet50_fpn
    model = build(weights=None, weights_backbone=None, num_classes=CLASSES + 1, min_size=min(SIZE), max_size=max(SIZE))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | FrozenBatchNorm2d):
            module.weight.data.uniform_(0.2, 0.5)
            module.running_var.uniform_(0.5, 1.5)
            module.running_mean.normal_(0, 0.1)
    nn.init.normal_(model.rpn.head.cls_logits.weight, std=0.2)
    nn.init.normal_(model.rpn.head.bbox_pred.weight, std=0.05)
    nn.init.normal_(model.roi_heads.box_predictor.cls_score.weight, std=0.2)
    nn.init.normal_(model.roi_heads.box_predictor.bbox_pred.weight, std=0.2)
    return model


def ours(*, mask: bool = False, backbone: str = "resnet50", samples: int = 64, width: int = 128) -> FasterRCNN:
    """Our pyramid detector, with torchvision's settings and weights of its own."""
    pyramid = FeaturePyramid(create_backbone(backbone))
    pooled = {name: pyramid.feature_info[name] for name in list(pyramid.feature_info)[:4]}
    rpn = ProposalNetwork(256, anchor_grid(pyramid.feature_info), train_limits=TRAIN_LIMITS, test_limits=TEST_LIMITS)
    roi_head = RoIHead(RegionPooler(pooled), TwoFCHead(256, 7, width=width), num_classes=CLASSES, samples=samples)
    mask_head = MaskHead(RegionPooler(pooled, output_size=14), 256, num_classes=CLASSES) if mask else None
    return FasterRCNN(pyramid, rpn, roi_head, Preprocess(pyramid.preprocessing), mask_head=mask_head)


def ours_c4(backbone: str = "resnet18", *, samples: int = 16) -> FasterRCNN:
    """Our C4 detector: the backbone's top runs on each region."""
    net = create_backbone(backbone)
    top = net.split_region_head()
    levels = {name: net.feature_info[name] for name in net.out_features}
    (info,) = levels.values()
    rpn = ProposalNetwork(info.channels, anchor_grid(levels), train_limits=TRAIN_LIMITS, test_limits=TEST_LIMITS)
    pooler = RegionPooler(levels, output_size=top.pool_size)
    roi_head = RoIHead(pooler, top, num_classes=CLASSES, samples=samples, regions_per_pass=50)
    return FasterRCNN(net, rpn, roi_head, Preprocess(net.preprocessing))


def pair(*, mask: bool = False) -> tuple[nn.Module, FasterRCNN]:
    """Both detectors with the same weights."""
    peer, mine = theirs(mask=mask), ours(mask=mask, width=1024)
    peer.roi_heads.fg_bg_sampler.batch_size_per_image = mine.roi_head.samples
    peer.rpn._pre_nms_top_n = {"training": TRAIN_LIMITS.candidates, "testing": TEST_LIMITS.candidates}
    peer.rpn._post_nms_top_n = {"training": TRAIN_LIMITS.proposals, "testing": TEST_LIMITS.proposals}
    mine.load_state_dict(from_torchvision(peer.state_dict()), strict=True)
    return peer, mine


def trained(model: nn.Module) -> nn.Module:
    """`model` in training mode, batch norms apart: on two small images their statistics would drown what is compared."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    return model


def same_permutations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make torch.randperm a function of its length: both detectors sample through it, and so sample the same."""
    draw = torch.randperm
    monkeypatch.setattr(torch, "randperm", lambda n, **options: draw(n, generator=torch.Generator().manual_seed(n)))


def random_images(count: int = 2, *, size: tuple[int, int] = SIZE, seed: int = 0) -> list[Tensor]:
    """uint8 noise with some structure in it."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand((count, 3, 6, 8), generator=generator)
    return [(image * 255).to(torch.uint8) for image in nn.functional.interpolate(coarse, size=size, mode="nearest")]


def random_boxes(count: int, *, size: tuple[int, int] = SIZE, seed: int = 0, min_side: float = 4.0) -> Tensor:
    """(count, 4) boxes inside an image of `size`."""
    generator = torch.Generator().manual_seed(seed)
    sides = torch.tensor([size[1], size[0]], dtype=torch.float32)
    extent = min_side + torch.rand((count, 2), generator=generator) ** 2 * (sides - min_side)
    corner = torch.rand((count, 2), generator=generator) * (sides - extent)
    return torch.cat((corner, corner + extent), dim=1)


def target(
    boxes: Tensor, labels: Tensor | None = None, *, ignored: Tensor | None = None, seed: int | None = None, masks: Tensor | None = None
) -> Target:
    """What a loader would hand over about an image of SIZE."""
    return Target(
        boxes=boxes,
        labels=torch.arange(len(boxes)) % CLASSES + 1 if labels is None else labels,
        ignore_boxes=torch.zeros((0, 4)) if ignored is None else ignored,
        image_id=1,
        index=0,
        original_size=SIZE,
        seed=seed,
        masks=masks,
    )


def their_target(one: Target) -> dict[str, Tensor]:
    """The same in torchvision's words."""
    return {"boxes": one.boxes, "labels": one.labels} | ({} if one.masks is None else {"masks": one.masks})
