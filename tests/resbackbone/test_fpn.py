"""The feature pyramid against torchvision's."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
from torch import nn
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from resbackbone import FeatureInfo, create_backbone
from resbackbone.backbone import StagedBackbone
from resbackbone.errors import InputError
from resbackbone.fpn import FeaturePyramid


def tiny_backbone(strides: tuple[int, ...] = (2, 2, 2, 2)) -> StagedBackbone:
    stages, channels, total = {}, 3, 1
    for number, stride in enumerate(strides, 1):
        total *= stride
        stages[f"conv{number}"] = (nn.Conv2d(channels, 3 + number, 3, stride, 1), FeatureInfo(3 + number, total))
        channels = 3 + number
    return StagedBackbone(stages)


@pytest.mark.parametrize("size", [(64, 64), (37, 50), (5, 3)])
def test_levels_and_gradients_are_torchvisions(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    ours = FeaturePyramid(tiny_backbone(), out_channels=8)
    theirs = FeaturePyramidNetwork([5, 6, 7], 8, extra_blocks=LastLevelMaxPool())
    theirs.load_state_dict({key: value for key, value in ours.state_dict().items() if not key.startswith("backbone.")}, strict=True)
    x = torch.rand(2, 3, *size)
    maps = ours(x)
    expected = theirs(OrderedDict(ours.backbone(x)))
    assert list(maps) == ["p2", "p3", "p4", "p5"]
    assert all(torch.equal(a, b) for a, b in zip(maps.values(), expected.values(), strict=True))
    for net, levels in ((ours, maps), (theirs, expected)):
        sum(level.square().sum() for level in levels.values()).backward()
        net.grads = [net.inner_blocks[i][0].weight.grad for i in range(3)] + [net.layer_blocks[i][0].weight.grad for i in range(3)]
    assert all(torch.allclose(a, b, rtol=1e-5) for a, b in zip(ours.grads, theirs.grads, strict=True))


def test_contract_over_a_resnet() -> None:
    pyramid = FeaturePyramid(create_backbone("resnet18", freeze_at=2), out_channels=16)
    assert {name: (info.channels, info.stride) for name, info in pyramid.feature_info.items()} == {
        "p2": (16, 4),
        "p3": (16, 8),
        "p4": (16, 16),
        "p5": (16, 32),
        "p6": (16, 64),
    }
    assert pyramid.out_features == tuple(pyramid.feature_info)
    assert pyramid.preprocessing == pyramid.backbone.preprocessing
    maps = pyramid.eval()(torch.rand(1, 3, 70, 90))
    for name, info in pyramid.feature_info.items():
        assert maps[name].shape == (1, 16, -(-70 // info.stride), -(-90 // info.stride))
    assert not pyramid.train().backbone.bn1.training


def test_initialisation_is_torchvisions() -> None:
    pyramid = FeaturePyramid(tiny_backbone(), out_channels=64)
    weight = pyramid.layer_blocks[0][0].weight
    bound = (3 / (64 * 9)) ** 0.5  # kaiming_uniform with a=1
    assert weight.abs().max() <= bound
    assert weight.abs().max() > 0.95 * bound
    assert not pyramid.inner_blocks[0][0].bias.any()


def test_vgg_starts_at_stride_four_and_extra_level_is_optional() -> None:
    pyramid = FeaturePyramid(create_backbone("vgg16"), out_channels=8, extra_level=False)
    assert list(pyramid.feature_info) == ["p2", "p3", "p4"]
    assert pyramid.backbone.out_features == ("conv3", "conv4", "conv5")


def test_of_several_maps_of_one_stride_the_deepest_counts() -> None:
    pyramid = FeaturePyramid(tiny_backbone((4, 1, 2)), out_channels=8)
    assert pyramid.backbone.out_features == ("conv2", "conv3")


def test_chosen_levels_leave_nothing_unused() -> None:
    pyramid = FeaturePyramid(tiny_backbone(), in_features=("conv2", "conv3"), out_channels=8, extra_level=False)
    sum(level.sum() for level in pyramid(torch.rand(1, 3, 32, 32)).values()).backward()
    assert all(p.grad is not None for p in pyramid.parameters())


def test_unusable_maps_are_refused() -> None:
    with pytest.raises(InputError, match="one map per stride"):
        FeaturePyramid(tiny_backbone((4, 1)), in_features=("conv1", "conv2"))
    with pytest.raises(InputError, match="power of two"):
        FeaturePyramid(tiny_backbone((4, 3)))
    with pytest.raises(InputError, match="stride 4 or more"):
        FeaturePyramid(tiny_backbone((2, 1)))
    with pytest.raises(InputError, match="did you mean 'conv3'"):
        FeaturePyramid(tiny_backbone(), in_features=("conv3_x",))
