"""Blocks against their equations, written out literally."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resbackbone import create_backbone, create_classifier
from resbackbone.blocks import BasicBlock, BlockStyle, PreActivationBasicBlock, PreActivationBottleneck, drop_rates
from resbackbone.errors import InputError
from resbackbone.layers import GatedAddition, PaddedShortcut, StochasticDepth, norm_factory
from tests.resbackbone.test_resnet import images, randomise_norms

BATCH = norm_factory("batch")


def style(**options: object) -> BlockStyle:
    return BlockStyle(norm=BATCH, bias=False, **options)  # type: ignore[arg-type]


def norm(module: nn.Module, x: Tensor) -> Tensor:
    """Batch normalisation by its formula, with the running statistics."""
    mean, variance, scale, shift = (v.view(1, -1, 1, 1) for v in (module.running_mean, module.running_var, module.weight, module.bias))
    return (x - mean) / (variance + 1e-5).sqrt() * scale + shift


def conv(module: nn.Module, x: Tensor) -> Tensor:
    return F.conv2d(x, module.weight, stride=module.stride, padding=module.padding)


def made(block: nn.Module) -> nn.Module:
    randomise_norms(block)
    return block.eval()


def test_the_projection_is_strided_and_normalised() -> None:
    block = made(BasicBlock(8, 16, stride=2, dilations=(1, 1), style=style()))
    x = images(2, 8, 9, 7)
    residual = norm(block.bn2, conv(block.conv2, norm(block.bn1, conv(block.conv1, x)).relu()))
    projected = norm(block.downsample[1], conv(block.downsample[0], x))
    torch.testing.assert_close(block(x), (residual + projected).relu())


def test_option_a_takes_every_other_cell_and_adds_zeros() -> None:
    block = made(BasicBlock(8, 16, stride=2, dilations=(1, 1), style=style(shortcut="A")))
    x = images(2, 8, 9, 7)
    residual = norm(block.bn2, conv(block.conv2, norm(block.bn1, conv(block.conv1, x)).relu()))
    padded = torch.zeros(2, 16, 5, 4)
    padded[:, 4:12] = x[:, :, ::2, ::2]
    torch.testing.assert_close(block(x), (residual + padded).relu())
    assert not list(PaddedShortcut(8, 16, 2).parameters())


@pytest.mark.parametrize(("shortcut", "projections"), [("A", 0), ("B", 3), ("C", 8)])
def test_options_differ_in_where_they_project(shortcut: str, projections: int) -> None:
    net = create_classifier("resnet18", shortcut=shortcut)
    assert sum("downsample.0.weight" in key for key in net.state_dict()) == projections
    assert net(images(1, 3, 64, 64)).shape == (1, 1000)


def test_a_plain_network_is_the_chain_of_its_layers() -> None:
    net = made(create_backbone("plain18"))
    x = images(2, 3, 65, 47)
    expected = F.max_pool2d(norm(net.bn1, conv(net.conv1, x)).relu(), 3, stride=2, padding=1)
    for stage in (net.layer1, net.layer2, net.layer3, net.layer4):
        for block in stage:
            expected = norm(block.bn1, conv(block.conv1, expected)).relu()
            expected = norm(block.bn2, conv(block.conv2, expected)).relu()
    torch.testing.assert_close(net(x)["conv5_x"], expected, rtol=1e-4, atol=1e-5)
    assert not any("downsample" in key for key in net.state_dict())


@pytest.mark.parametrize("name", ["resnet18", "resnet20_cifar"])
def test_v2_of_basic_blocks_is_the_literal_one(name: str) -> None:
    """He et al. 2016: BN, ReLU, convolution; both paths of the first block from its activation; BN and ReLU after the last."""
    net = made(create_backbone(name, variant="v2", shortcut="B"))
    x = images(2, 3, 64, 48)
    expected, stages = conv(net.conv1, x), [getattr(net, f"layer{n}") for n in range(1, 5) if hasattr(net, f"layer{n}")]
    if name == "resnet18":
        expected = F.max_pool2d(expected, 3, stride=2, padding=1)
    for block in [block for stage in stages for block in stage]:
        activated = norm(block.bn1, expected).relu()
        residual = conv(block.conv2, norm(block.bn2, conv(block.conv1, activated)).relu())
        if block.downsample is not None:
            shortcut = conv(block.downsample[0], activated)
        else:
            shortcut = activated if block is stages[0][0] else expected
        expected = residual + shortcut
    maps = list(net(x).values())
    torch.testing.assert_close(maps[-1], norm(net.bn_last, expected).relu(), rtol=1e-4, atol=1e-4)
    assert maps[-2].min() < 0  # no ReLU after the addition


def test_v2_strides_in_the_3x3() -> None:
    block = PreActivationBottleneck(64, 32, stride=2, dilations=(1, 1), style=style(preactivation=True))
    assert [block.conv1.stride, block.conv2.stride, block.conv3.stride] == [(1, 1), (2, 2), (1, 1)]


def test_v2_without_norms_leaves_the_map_below_alone() -> None:
    block = PreActivationBasicBlock(
        8, 8, stride=1, dilations=(1, 1), style=BlockStyle(norm=norm_factory("none"), bias=True, preactivation=True)
    )
    x = images(1, 8, 5, 5) - 0.5
    before = x.clone()
    block(x)
    assert torch.equal(x, before)


@pytest.mark.parametrize("variant", ["v1", "v2"])
def test_a_scaled_shortcut(variant: str) -> None:
    net = create_backbone("resnet20_cifar", variant=variant, shortcut_scale=0.5)
    block, x = made(net.layer1[1]), images(2, 16, 8, 8)
    assert block.addition.scale == 0.5
    whole = block(x)
    block.addition.scale = 0.0
    residual = block(x) if variant == "v2" else norm(block.bn2, conv(block.conv2, norm(block.bn1, conv(block.conv1, x)).relu()))
    expected = residual + 0.5 * x
    torch.testing.assert_close(whole, expected if variant == "v2" else expected.relu(), rtol=1e-4, atol=1e-5)


def test_a_gate_lets_the_shortcut_through_at_first_and_learns() -> None:
    gated = GatedAddition(4)
    residual, shortcut = images(2, 4, 3, 3), images(2, 4, 3, 3, seed=2)
    g = torch.sigmoid(conv(gated.gate, shortcut) + gated.gate.bias.view(1, -1, 1, 1))
    torch.testing.assert_close(gated(residual, shortcut), g * residual + (1 - g) * shortcut)
    net = create_backbone("resnet20_cifar", shortcut_gate=True)
    assert all((block.addition.gate.bias == -6).all() for block in net.layer2)
    net(images(2, 3, 16, 16))["conv4_x"].sum().backward()
    assert all(block.addition.gate.weight.grad.abs().sum() > 0 for block in net.layer2)


def test_stochastic_depth_drops_whole_images_and_keeps_the_mean() -> None:
    torch.manual_seed(0)
    drop = StochasticDepth(0.25)
    x = torch.ones(4000, 2, 1, 1)
    dropped = drop(x)
    assert dropped.unique().tolist() == pytest.approx([0, 1 / 0.75])
    assert torch.equal(dropped[:, 0], dropped[:, 1])
    assert dropped.mean().item() == pytest.approx(1, abs=0.04)
    assert torch.equal(drop.eval()(x), x)


def test_stochastic_depth_grows_linearly_with_depth() -> None:
    rates = [rate for stage in drop_rates((2, 3), 0.5) for rate in stage]
    assert rates == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])
    net = create_backbone("resnet18", stochastic_depth=0.4)
    assert net.layer4[1].drop.rate == pytest.approx(0.4)
    assert net.layer1[0].drop.rate == pytest.approx(0.05)
    assert net.state_dict().keys() == create_backbone("resnet18").state_dict().keys()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("resnet18", {"shortcut": "D"}, "choose from A, B, C"),
        ("resnet18", {"shortcut_gate": True, "shortcut_scale": 0.5}, "exclude each other"),
        ("plain18", {"variant": "v2"}, "plain network has no shortcuts"),
        ("plain20_cifar", {"shortcut_scale": 0.5}, "plain network has no shortcuts"),
        ("resnet18", {"stochastic_depth": 1.0}, "from 0 to below 1"),
        ("resnet18", {"groups": 2}, "bottleneck blocks"),
        ("resnet50", {"shortcuts": "A"}, "did you mean 'shortcut'"),
        ("vgg16", {"shortcut": "A"}, "no option 'shortcut'"),
        ("timm:resnet18", {"shortcut": "A"}, "no option shortcut"),
    ],
)
def test_impossible_options_say_what_is_possible(name: str, options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        create_backbone(name, **options)


def test_groups_and_width_make_resnext_and_wide_networks() -> None:
    pairs = (("resnet50", {"groups": 32, "width_per_group": 4}), ("resnext50_32x4d", {}), ("resnet50", {"width_per_group": 128}))
    with torch.device("meta"):
        nets = [create_backbone(name, **options) for name, options in (*pairs, ("wide_resnet50_2", {}))]
    shapes = [{key: value.shape for key, value in net.state_dict().items()} for net in nets]
    assert shapes[0] == shapes[1]
    assert shapes[2] == shapes[3]
