"""Our networks against the hosts' own with the same weights, to the bit where nothing is reordered, also with the small variances that
show a wrong epsilon, and with both dilation rules."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from host_checks import batch_of, photos, randomise, relative
from torch import Tensor, nn
from torchvision.models import detection, segmentation
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops.misc import FrozenBatchNorm2d as TorchvisionFrozenBatchNorm2d

from resbackbone import blocks, create_backbone, layers, resnet
from resbackbone.integrations.torchvision import fpn_backbone, segmentation_model

SMALL_VARIANCES = (1e-5, 0.02)  # torchvision's own trained ones go down to these
FROZEN = {"norm": "frozen", "allow_random_frozen": True}


def with_small_variances(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(5)
    for module in randomise(model).modules():
        if hasattr(module, "running_var"):
            module.running_var.uniform_(*SMALL_VARIANCES, generator=generator)  # type: ignore[operator, union-attr]
            module.weight.data.mul_(0.05)  # type: ignore[operator, union-attr]
    return model


def unfolded(conv: nn.Conv2d, norm: nn.Module, features: Tensor) -> Tensor:
    return norm(conv(features))


@pytest.fixture
def norms_stay_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compute frozen norms after the convolution, as hosts do; folded into it, sums are rounded elsewhere."""
    for module in (blocks, layers, resnet):
        monkeypatch.setattr(module, "conv_norm", unfolded)


def detector(backbone: nn.Module) -> nn.Module:
    torch.manual_seed(3)
    return detection.FasterRCNN(backbone, 3, min_size=64, max_size=96, rpn_post_nms_top_n_test=40, box_score_thresh=0.0)


@pytest.mark.parametrize("fill", [randomise, with_small_variances])
def test_frozen_bodies_are_bit_equal_and_so_is_the_detector(fill: Any, norms_stay_apart: None) -> None:
    torch.manual_seed(0)
    theirs = fill(resnet_fpn_backbone(backbone_name="resnet50", weights=None, trainable_layers=3)).eval()
    ours = fpn_backbone("resnet50", **FROZEN, freeze_at=2).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    batch = batch_of(1)
    with torch.no_grad():
        for found, expected in zip(ours.body(batch).values(), theirs.body(batch).values(), strict=True):
            assert torch.equal(found, expected)
        whole = detector(theirs).eval()
        (expected,) = whole(photos())
        whole.backbone.body = ours.body  # that and nothing else
        (found,) = _renamed(whole)(photos())
    assert len(expected["boxes"]) >= 10
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def _renamed(model: nn.Module) -> nn.Module:
    """torchvision's pyramid counts its levels, our body names them by the paper."""
    body = model.backbone.body
    model.backbone.forward = lambda x: model.backbone.fpn({str(n): each for n, each in enumerate(body(x).values())})  # type: ignore[union-attr]
    return model


@pytest.mark.parametrize("fill", [randomise, with_small_variances])
def test_folding_changes_the_last_digits_only(fill: Any) -> None:
    torch.manual_seed(0)
    theirs = fill(resnet_fpn_backbone(backbone_name="resnet50", weights=None, trainable_layers=3)).eval()
    ours = fpn_backbone("resnet50", **FROZEN).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    with torch.no_grad():
        for found, expected in zip(ours.body(batch_of(1)).values(), theirs.body(batch_of(1)).values(), strict=True):
            assert relative(found, expected) < 1e-5


@pytest.mark.parametrize("variances", [(0.5, 1.0), SMALL_VARIANCES])
def test_one_frozen_norm_is_torchvisions_bit_for_bit_and_batch_norm_to_the_last_digits(variances: tuple[float, float]) -> None:
    theirs = randomise(TorchvisionFrozenBatchNorm2d(8))
    theirs.running_var.uniform_(*variances)
    ours, batch = layers.FrozenBatchNorm2d(8), nn.BatchNorm2d(8).eval()
    ours.load_state_dict(theirs.state_dict())
    batch.load_state_dict(theirs.state_dict(), strict=False)
    x = torch.randn(2, 8, 9, 7)
    assert torch.equal(ours(x), theirs(x))
    assert relative(batch(x).detach(), theirs(x)) < 1e-6


@pytest.mark.parametrize("fill", [randomise, with_small_variances])
def test_only_torchvisions_dilation_rule_is_torchvisions_deeplab(fill: Any) -> None:
    torch.manual_seed(0)
    theirs = fill(segmentation.deeplabv3_resnet50(weights=None, weights_backbone=None, num_classes=4)).eval()
    batch = batch_of(1)
    with torch.no_grad():
        expected = theirs.backbone(batch)["out"]
        for rule in ("torchvision", "detectron2"):
            ours = segmentation_model("deeplabv3", "resnet50", num_classes=4, dilation_rule=rule).eval()
            ours.load_state_dict(theirs.state_dict(), strict=True)
            found = ours.backbone(batch)["out"]
            assert torch.equal(found, expected) is (rule == "torchvision")
            assert (relative(found, expected) > 0.02) is (rule == "detectron2")


@pytest.mark.parametrize("stride", [32, 16, 8])
@pytest.mark.parametrize("fill", [randomise, with_small_variances])
def test_timms_five_maps_are_bit_equal(fill: Any, stride: int) -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    theirs = fill(timm.create_model("resnet50", output_stride=stride, features_only=True)).eval()
    with torch.no_grad():
        expected = theirs(batch_of(1))
        for rule in ("torchvision", "detectron2")[: 1 if stride == 32 else 2]:
            ours = create_backbone("resnet50", output_stride=stride, dilation_rule=rule).eval()
            ours.load_state_dict(theirs.state_dict(), strict=True)
            equal = [torch.equal(*pair) for pair in zip(ours(batch_of(1)).values(), expected, strict=True)]
            assert all(equal) is (rule == "torchvision")


@pytest.mark.parametrize("stride", [32, 16, 8])
@pytest.mark.parametrize("fill", [randomise, with_small_variances])
def test_smps_encoder_is_equal_by_its_own_rule(fill: Any, stride: int) -> None:
    """To the bit, but at 8 to the last digits: it dilates its 1x1 convolutions as well, and other kernels then compute them."""
    smp = pytest.importorskip("segmentation_models_pytorch")
    torch.manual_seed(0)
    theirs = fill(smp.encoders.get_encoder("resnet50", weights=None, output_stride=stride)).eval()
    with torch.no_grad():
        expected = theirs(batch_of(1))[1:]
        for rule in ("detectron2", "torchvision")[: 1 if stride == 32 else 2]:
            ours = create_backbone("resnet50", output_stride=stride, dilation_rule=rule).eval()
            ours.load_state_dict(theirs.state_dict(), strict=True)
            off = max(relative(*pair) for pair in zip(ours(batch_of(1)).values(), expected, strict=True))
            assert off > 0.02 if rule == "torchvision" else off <= (1e-6 if stride == 8 else 0)
