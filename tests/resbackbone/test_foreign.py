"""Backbones of timm and torchvision behind our contract."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn

from resbackbone import create_backbone
from resbackbone.errors import InputError
from resbackbone.fpn import FeaturePyramid
from resbackbone.layers import EvalBatchNorm2d, FrozenBatchNorm2d

LIBRARIES = ["timm", "torchvision"]


@pytest.fixture(autouse=True)
def _libraries() -> None:
    pytest.importorskip("timm")


@pytest.mark.parametrize("name", ["timm:resnet18", "torchvision:resnet18", "timm:mobilenetv3_small_100", "torchvision:mobilenet_v3_small"])
def test_maps_are_what_feature_info_says(name: str) -> None:
    net = create_backbone(name, out_features=("conv2_x", "conv5_x")).eval()
    assert list(net.feature_info) == ["conv1", "conv2_x", "conv3_x", "conv4_x", "conv5_x"]
    with torch.no_grad():
        maps = net(torch.rand(1, 3, 65, 96))
    assert list(maps) == ["conv2_x", "conv5_x"]
    for key, features in maps.items():
        info = net.feature_info[key]
        assert features.shape == (1, info.channels, -(-65 // info.stride), 96 // info.stride)


@pytest.mark.parametrize("library", LIBRARIES)
def test_the_same_weights_give_the_maps_of_ours(library: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    source = torchvision.models.resnet18()
    for norm in (m for m in source.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.running_var.uniform_(0.2, 1)
        norm.running_mean.uniform_(-0.5, 0.5)
    save_file(source.state_dict(), tmp_path / "w.safetensors")
    theirs = create_backbone(f"{library}:resnet18", weights=tmp_path / "w.safetensors", norm="frozen").train()
    ours = create_backbone("resnet18", weights=tmp_path / "w.safetensors", norm="frozen").train()
    assert theirs.feature_info == ours.feature_info
    assert theirs.load_report.startswith("loaded 122/122" if library == "torchvision" else "loaded 120/120")
    x = torch.rand(1, 3, 64, 47)
    for (name, features), expected in zip(theirs(x).items(), ours(x).values(), strict=True):
        assert (features - expected).abs().max() <= 1e-4 * expected.abs().max(), name


@pytest.mark.parametrize("library", LIBRARIES)
def test_freezing_stages_of_others(library: str) -> None:
    net = create_backbone(f"{library}:resnet18", freeze_at=2).train()
    learning = {name for name, p in net.named_parameters() if p.requires_grad}
    assert learning == {name for name, _ in net.named_parameters() if ".layer2." in name or ".layer3." in name or ".layer4." in name}
    assert not net.net.bn1.training
    assert not net.net.layer1[0].bn1.training if library == "timm" else True
    assert all(module.training for module in net.stage_modules("conv5_x"))
    before = {key: value.clone() for key, value in net.state_dict().items() if "layer1" in key or ".bn1" in key.removeprefix("net")[:5]}
    net(torch.rand(2, 3, 32, 32))
    assert all(torch.equal(value, net.state_dict()[key]) for key, value in before.items())
    net.freeze(0)
    assert all(p.requires_grad for p in net.parameters())


@pytest.mark.parametrize("name", ["timm:resnet18", "torchvision:resnet18", "timm:regnety_002"])
def test_trim_leaves_no_parameter_without_a_gradient(name: str) -> None:
    net = create_backbone(name).eval()
    x = torch.rand(1, 3, 64, 64)
    expected = net(x)["conv4_x"]
    net.out_features = ("conv4_x",)
    net.trim()
    assert list(net.feature_info) == ["conv1", "conv2_x", "conv3_x", "conv4_x"]
    output = net(x)
    assert list(output) == ["conv4_x"]
    assert torch.equal(output["conv4_x"], expected)
    net.train()(torch.rand(2, 3, 64, 64))["conv4_x"].mean().backward()
    assert all(p.grad is not None for p in net.parameters() if p.requires_grad)
    assert not any("layer4" in key or "s4." in key for key in net.state_dict())


@pytest.mark.parametrize("norm", ["frozen", "eval", "group", "none", "sync"])
def test_norms_are_exchanged(norm: str) -> None:
    net = create_backbone("timm:resnet18", norm=norm, allow_random_frozen=True)
    kinds = {
        "frozen": FrozenBatchNorm2d,
        "eval": EvalBatchNorm2d,
        "group": nn.GroupNorm,
        "none": nn.Identity,
        "sync": nn.SyncBatchNorm,
    }
    assert isinstance(net.net.bn1, kinds[norm])
    assert not any(type(m) is nn.BatchNorm2d for m in net.modules())


def test_norms_with_an_activation_inside_keep_it() -> None:
    batch = create_backbone("timm:efficientnet_b0", out_features=("conv3_x",)).eval()
    frozen = create_backbone("timm:efficientnet_b0", norm="frozen", out_features=("conv3_x",), allow_random_frozen=True).eval()
    source = [value for key, value in batch.state_dict().items() if not key.endswith("num_batches_tracked")]
    for target, value in zip(frozen.state_dict().values(), source, strict=True):  # other names for the norms, the same order
        target.copy_(value)
    x = torch.rand(1, 3, 64, 64)
    torch.testing.assert_close(frozen(x)["conv3_x"], batch(x)["conv3_x"], rtol=1e-3, atol=1e-4)


def test_frozen_without_weights_is_refused() -> None:
    for library in LIBRARIES:
        with pytest.raises(InputError, match="needs weights"):
            create_backbone(f"{library}:resnet18", norm="frozen")


@pytest.mark.parametrize("library", LIBRARIES)
def test_dilation_of_others(library: str) -> None:
    net = create_backbone(f"{library}:resnet50", output_stride=16, out_features=("conv4_x", "conv5_x")).eval()
    assert [net.feature_info[name].stride for name in ("conv4_x", "conv5_x")] == [16, 16]
    with torch.no_grad():
        assert [tuple(m.shape[-2:]) for m in net(torch.rand(1, 3, 64, 64)).values()] == [(4, 4), (4, 4)]


def test_a_pyramid_over_another_librarys_network() -> None:
    pyramid = FeaturePyramid(create_backbone("timm:mobilenetv3_small_100", freeze_at=1), out_channels=8)
    assert list(pyramid(torch.rand(2, 3, 64, 64))) == ["p2", "p3", "p4", "p5", "p6"]


def test_transformers_of_one_stride_give_one_map() -> None:
    net = create_backbone("timm:vit_tiny_patch16_224").eval()
    assert {name: info.stride for name, info in net.feature_info.items()} == {"conv4_x": 16}
    with torch.no_grad():
        assert net(torch.rand(1, 3, 224, 224))["conv4_x"].shape == (1, 192, 14, 14)


def test_timm_takes_other_channels_and_checkpointing() -> None:
    net = create_backbone("timm:resnet18", in_channels=1, checkpointing=True).train()
    assert len(net.preprocessing.mean) == 1
    net(torch.rand(2, 1, 32, 32))["conv5_x"].mean().backward()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("timm:resnet1", {}, "timm has no model 'resnet1'; did you mean"),
        ("torchvision:resnet1", {}, "torchvision has no classifier 'resnet1'; did you mean"),
        ("torchvision:fasterrcnn_resnet50_fpn", {}, "no classifier"),
        ("timm:resnet18", {"variant": "v1"}, "no option variant"),
        ("timm:resnet18", {"dilation_rule": "detectron2"}, "no option dilation_rule"),
        ("timm:resnet18", {"weights": "torchvision"}, "torchvision:resnet18"),
        ("timm:resnet18", {"norm": "batchnorm"}, "did you mean 'batch'"),
        ("torchvision:resnet18", {"weights": "timm"}, "timm:resnet18"),
        ("torchvision:resnet18", {"in_channels": 1}, "three channels"),
        ("torchvision:resnet18", {"output_stride": 16}, "no dilated form"),
        ("torchvision:resnet18", {"output_stride": 4}, "8, 16 or 32"),
        ("torchvision:resnet18", {"weights": "missing.pth"}, "does not exist"),
        ("timm:resnet18", {"weights": "missing.pth"}, "does not exist"),
        ("timm:resnet18", {"freeze_at": 9}, "0 to 5"),
    ],
)
def test_wrong_options_are_explained(name: str, options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        create_backbone(name, **options)


def test_a_missing_library_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "timm", None)
    with pytest.raises(InputError, match=r"pip install 'resbackbone\[timm\]'"):
        create_backbone("timm:resnet18")


def test_no_region_head_to_split() -> None:
    net = create_backbone("torchvision:resnet18")
    assert not net.region_head_available()
    with pytest.raises(InputError, match=r"model\.head=fpn"):
        net.split_region_head()
