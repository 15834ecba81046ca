"""torchvision's detectors with random weights, and ours carrying the same ones: what the parity tests compare."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.detection import fasterrcnn_resnet50_fpn, maskrcnn_resnet50_fpn
from torchvision.ops import FrozenBatchNorm2d, MultiScaleRoIAlign

from detection.anchors import AnchorGrid
from detection.faster_rcnn import FasterRCNN
from detection.mask_head import MaskHead
from detection.preprocess import Preprocess
from detection.roi_head import RoIHead, TwoFCHead
from detection.rpn import ProposalNetwork
from detection.structures import Target
from detection.torchvision_weights import from_torchvision

IMAGENET = SimpleNamespace(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), color_order="RGB", input_range=1.0)
LEVELS = ("p2", "p3", "p4", "p5", "p6")
CLASSES = 5
SIZE = (96, 128)  # of the test images: (height, width)


class PlainPooler(nn.Module):
    """torchvision's pooling under our names."""

    def __init__(self, side: int, levels: tuple[str, ...] = LEVELS[:4]) -> None:
        super().__init__()
        self.align = MultiScaleRoIAlign(list(levels), side, sampling_ratio=2)

    def forward(self, features: dict[str, Tensor], boxes: list[Tensor], sizes: list[tuple[int, int]]) -> Tensor:
        return self.align(features, list(boxes), list(sizes))


class PlainPyramid(nn.Module):
    """torchvision's ResNet with FPN under our names."""

    def __init__(self, theirs: nn.Module) -> None:
        super().__init__()
        self.backbone, self.inner_blocks, self.layer_blocks = theirs.body, theirs.fpn.inner_blocks, theirs.fpn.layer_blocks
        self._forward = [theirs.forward]

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return dict(zip(LEVELS, self._forward[0](images).values(), strict=True))


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


def ours(*, mask: bool = False) -> FasterRCNN:
    """Our detector of the same shape, with weights of its own."""
    return assemble(PlainPyramid(theirs(mask=mask, seed=1).backbone), mask=mask)


def assemble(pyramid: nn.Module, *, mask: bool = False, channels: int = 256, classes: int = CLASSES) -> FasterRCNN:
    """A pyramid detector with torchvision's settings."""
    rpn = ProposalNetwork(channels, AnchorGrid([(32,), (64,), (128,), (256,), (512,)]))
    roi_head = RoIHead(PlainPooler(7), TwoFCHead(channels, 7), num_classes=classes)
    mask_head = MaskHead(PlainPooler(14), channels, num_classes=classes) if mask else None
    return FasterRCNN(pyramid, rpn, roi_head, Preprocess(IMAGENET), mask_head=mask_head)


def pair(*, mask: bool = False) -> tuple[nn.Module, FasterRCNN]:
    """Both detectors with the same weights."""
    peer, mine = theirs(mask=mask), ours(mask=mask)
    peer.roi_heads.fg_bg_sampler.batch_size_per_image = mine.roi_head.samples = 64  # 512 would only cost time
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
