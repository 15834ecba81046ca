"""Our networks in transformers' detectors and segmenters, against its own backbones with the same weights."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from host_checks import losses_of_training, relative
from host_norms import SMALL_VARIANCES, randomise_norms
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")

from resbackbone.integrations import transformers as integration  # noqa: E402
from resbackbone.integrations.transformers import ResbackboneBackbone, ResbackboneConfig  # noqa: E402

DETR = {  # an encoder and a decoder of no size
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16,
    "num_queries": 4,
    "num_labels": 3,
}
STAGES = ["conv2_x", "conv3_x", "conv4_x", "conv5_x"]


@pytest.fixture(autouse=True, scope="module")
def registered() -> None:
    integration.register()
    transformers.logging.set_verbosity_error()


def detr(backbone: Any = None, **options: Any) -> nn.Module:
    """With transformers' own backbone, timm's ResNet-50, where none is given."""
    torch.manual_seed(0)
    given = {} if backbone is None else {"backbone_config": backbone}
    return transformers.DetrForObjectDetection(transformers.DetrConfig(**given, **DETR, **options))


def rt_detr(backbone: Any) -> nn.Module:
    torch.manual_seed(0)
    channels = ResbackboneBackbone(backbone).channels
    small = {"encoder_hidden_dim": 16, "encoder_ffn_dim": 16, "d_model": 16, "decoder_ffn_dim": 16, "decoder_layers": 2}
    small["num_queries"] = 84  # every position of 64 × 64 pixels: which few are chosen would change with each step, and the loss with it
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "num_denoising": 0, "decoder_in_channels": [16] * 3}
    config = transformers.RTDetrConfig(backbone_config=backbone, encoder_in_channels=channels, num_labels=3, **small, **heads)
    return transformers.RTDetrForObjectDetection(config)


def upernet(backbone: Any) -> nn.Module:
    torch.manual_seed(0)
    small = {"hidden_size": 16, "use_auxiliary_head": False, "num_labels": 3, "pool_scales": [1, 2]}
    return transformers.UperNetForSemanticSegmentation(transformers.UperNetConfig(backbone_config=backbone, **small))


def mask2former(backbone: Any) -> nn.Module:
    torch.manual_seed(0)
    small = {"feature_size": 32, "mask_feature_size": 32, "hidden_dim": 32, "encoder_feedforward_dim": 16, "encoder_layers": 1}
    heads = {"decoder_layers": 2, "num_attention_heads": 2, "dim_feedforward": 16, "num_queries": 4, "num_labels": 3}
    config = transformers.Mask2FormerConfig(backbone_config=backbone, train_num_points=64, **small, **heads)
    return transformers.Mask2FormerForUniversalSegmentation(config)


def images() -> Tensor:
    return torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def boxes() -> list[dict[str, Tensor]]:
    return [{"class_labels": torch.tensor([0, 2]), "boxes": torch.tensor([[0.5, 0.5, 0.3, 0.4], [0.3, 0.6, 0.2, 0.2]])}] * 2


def box_loss(model: nn.Module) -> Tensor:
    return model(pixel_values=images(), labels=boxes()).loss


def pixel_loss(model: nn.Module) -> Tensor:
    return model(pixel_values=images(), labels=torch.arange(64 * 64).reshape(1, 64, 64).expand(2, -1, -1) % 3).loss


def mask_loss(model: nn.Module) -> Tensor:
    masks = torch.zeros(2, 64, 64)
    masks[0, :32], masks[1, 32:] = 1, 1
    return model(pixel_values=images(), mask_labels=[masks] * 2, class_labels=[torch.tensor([0, 1])] * 2).loss


HOSTS: dict[str, tuple[Callable, list[str], Callable]] = {
    "detr": (detr, ["conv5_x"], box_loss),
    "rt_detr": (rt_detr, ["conv3_x", "conv4_x", "conv5_x"], box_loss),
    "upernet": (upernet, STAGES, pixel_loss),
    "mask2former": (mask2former, STAGES, mask_loss),
}


@pytest.mark.parametrize("variance", [(0.5, 1.0), SMALL_VARIANCES])
def test_detr_is_transformers_own_with_its_weights(variance: tuple[float, float]) -> None:
    """Its default backbone is timm's ResNet-50: a whole checkpoint fits name for name, and outputs and gradients are the same."""
    theirs = randomise_norms(detr(), variance=variance)
    ours = detr(ResbackboneConfig(out_features=["conv5_x"]))
    ours.load_state_dict(theirs.state_dict(), strict=True)
    with torch.no_grad():
        expected, found = theirs.eval()(images()), ours.eval()(images())
        mask = torch.ones(2, 64, 64)
        last = [model.model.backbone(images(), mask)[-1][0] for model in (ours, theirs)]
    assert torch.equal(*last)
    assert relative(found.logits, expected.logits) < 1e-5
    assert relative(found.pred_boxes, expected.pred_boxes) < 1e-5
    for model in (ours, theirs):
        box_loss(model).backward()
    wanted = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    assert sum("backbone" in name for name in wanted) == 53
    for name, parameter in ours.named_parameters():
        assert relative(parameter.grad, wanted[name]) < 1e-4, name


def their_resnet_name(name: str) -> str:
    """Of transformers' ResNet -> ours."""
    if name.startswith("embedder."):
        return name.replace("embedder.embedder.convolution", "conv1").replace("embedder.embedder.normalization", "bn1")
    stage, block, rest = re.fullmatch(r"encoder\.stages\.(\d)\.layers\.(\d+)\.(.*)", name).groups()
    if rest.startswith("shortcut"):
        layer = rest.replace("shortcut.convolution", "downsample.0").replace("shortcut.normalization", "downsample.1")
    else:
        number, kind, end = re.fullmatch(r"layer\.(\d)\.(convolution|normalization)\.(.*)", rest).groups()
        layer = f"{'conv' if kind == 'convolution' else 'bn'}{int(number) + 1}.{end}"
    return f"layer{int(stage) + 1}.{block}.{layer}"


@pytest.mark.parametrize("strided_1x1", [False, True])
def test_maps_are_those_of_transformers_resnet(strided_1x1: bool) -> None:
    torch.manual_seed(0)
    config = transformers.ResNetConfig(downsample_in_bottleneck=strided_1x1, out_indices=[0, 1, 2, 3, 4])
    theirs = randomise_norms(transformers.ResNetBackbone(config)).eval()
    ours = ResbackboneBackbone(ResbackboneConfig(variant="v1" if strided_1x1 else "v1.5", out_indices=[0, 1, 2, 3, 4])).eval()
    ours.load_state_dict({their_resnet_name(name): tensor for name, tensor in theirs.state_dict().items()}, strict=True)
    with torch.no_grad():
        found, expected = ours(images()).feature_maps, theirs(images()).feature_maps
    assert torch.equal(nn.functional.max_pool2d(found[0], 3, 2, 1), expected[0])
    assert all(torch.equal(*pair) for pair in zip(found[1:], expected[1:], strict=True))
    assert ours.channels == theirs.channels


def check_host(host: str, name: str, variant: str, folder: Path) -> None:
    """A host trains what it should, learns, and comes back from disk the same, with the same parts frozen."""
    build, features, loss = HOSTS[host]
    model = build(ResbackboneConfig(name=name, variant=variant, freeze_at=2, out_features=features)).train()
    backbone = next(module for module in model.modules() if isinstance(module, ResbackboneBackbone))
    fixed = ("conv1.", "bn1.", "layer1.")
    trainable = {key: parameter.requires_grad for key, parameter in backbone.named_parameters()}
    assert trainable == {key: not key.startswith(fixed) for key in trainable}
    assert all(
        p.requires_grad for key, p in model.named_parameters() if not re.search("backbone|encoder.conv1|encoder.layer1|encoder.bn1", key)
    )
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    losses = losses_of_training(model, loss, rate=1e-5)
    assert losses[-1] < losses[0]
    moved = {key.split(".")[0] for key, value in backbone.state_dict().items() if not torch.equal(value, before[key])}
    assert moved == {"layer2", "layer3", "layer4"} | ({"bn_last"} if variant == "v2" and host not in ("detr", "rt_detr") else set())
    model.save_pretrained(folder)
    again = type(model).from_pretrained(folder)
    state = model.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in again.state_dict().items())
    with torch.no_grad():  # a tensor that lies elsewhere in memory may be added up in another order
        assert all(relative(*pair) < 1e-5 for pair in zip(tensors(again.eval()), tensors(model.eval()), strict=True))
    kept = next(module for module in again.modules() if isinstance(module, ResbackboneBackbone))
    assert {key: parameter.requires_grad for key, parameter in kept.named_parameters()} == trainable


def tensors(model: nn.Module) -> list[Tensor]:
    return [value for value in model(pixel_values=images()).values() if isinstance(value, Tensor)]


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize(
    ("name", "variant"), [("resnet18", "v1.5"), ("resnet18", "v2"), *((f"resnet{n}", v) for n in (50, 101) for v in ("v1", "v1.5", "v2"))]
)
def test_hosts_train_freeze_save_and_reload(host: str, name: str, variant: str, tmp_path: Path) -> None:
    check_host(host, name, variant, tmp_path)
