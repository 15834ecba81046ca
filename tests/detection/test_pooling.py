"""Pooling equals torchvision's operators, forward and backward, on every level, empty and odd boxes included."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torchvision.ops import MultiScaleRoIAlign, roi_align, roi_pool

from detection.pooling import RegionPooler
from resbackbone.backbone import FeatureInfo
from resbackbone.errors import InputError

SIZE = (128, 192)
LEVELS = {f"p{k}": FeatureInfo(12, 2**k) for k in (2, 3, 4, 5)}


def features(levels: dict[str, FeatureInfo], *, images: int = 2) -> dict[str, Tensor]:
    return {
        name: torch.randn(images, info.channels, SIZE[0] // info.stride, SIZE[1] // info.stride, requires_grad=True)
        for name, info in levels.items()
    }


def boxes(count: int) -> list[Tensor]:
    """Boxes of all sizes, some sticking out, some thinner than a cell."""
    corner = torch.rand(count, 2) * torch.tensor([SIZE[1] + 20.0, SIZE[0] + 20.0]) - 10
    side = torch.rand(count, 2) ** 3 * 220
    both = torch.cat((corner, corner + side), dim=1)
    return [both[: count // 3], both[count // 3 :]]


def relative(one: Tensor, other: Tensor) -> float:
    return ((one - other).abs().max() / other.abs().max().clamp(min=1e-12)).item()


@pytest.mark.parametrize("count", [0, 1, 150])
@pytest.mark.parametrize("channels_last", [False, True])
def test_bags_equal_torchvision_over_a_pyramid(count: int, channels_last: bool) -> None:
    torch.manual_seed(count)
    maps, regions = features(LEVELS), boxes(count)
    given = {name: value.contiguous(memory_format=torch.channels_last) for name, value in maps.items()} if channels_last else maps
    ours = RegionPooler(LEVELS)(given, regions, [SIZE, SIZE])
    theirs = MultiScaleRoIAlign(list(LEVELS), 7, 2)(maps, regions, [SIZE, SIZE])
    assert ours.shape == theirs.shape == (count, 12, 7, 7)
    assert torch.allclose(ours, theirs, atol=1e-4)
    grad = torch.randn_like(theirs)
    ours_grad = torch.autograd.grad(ours, list(maps.values()), grad)
    if count == 0:
        assert all(not one.any() for one in ours_grad)
        return
    for one, other in zip(ours_grad, torch.autograd.grad(theirs, list(maps.values()), grad, allow_unused=True), strict=True):
        assert relative(one, torch.zeros_like(one) if other is None else other) <= 1e-5


@pytest.mark.parametrize(("op", "peer"), [("align", roi_align), ("pool", roi_pool)])
def test_one_map_as_c4_has_it(op: str, peer) -> None:
    torch.manual_seed(1)
    levels = {"conv4_x": FeatureInfo(8, 16)}
    maps, regions = features(levels), boxes(40)
    ours = RegionPooler(levels, op=op, output_size=14)(maps, regions, [SIZE, SIZE])
    arguments = {"sampling_ratio": 2} if op == "align" else {}
    theirs = peer(maps["conv4_x"], regions, 14, spatial_scale=1 / 16, **arguments)
    assert torch.allclose(ours, theirs, atol=1e-4)


def test_the_compiled_operator_is_a_switch_away() -> None:
    torch.manual_seed(2)
    maps, regions = features(LEVELS), boxes(60)
    bags, compiled = (RegionPooler(LEVELS, use_bags=use)(maps, regions, [SIZE, SIZE]) for use in (True, False))
    assert torch.allclose(bags, compiled, atol=1e-4)


def test_levels_follow_the_formula_of_the_pyramid_paper() -> None:
    sides = torch.tensor([10.0, 111.9, 112.0, 223.9, 224.0, 447.9, 448.0, 2000.0])
    square = torch.stack((torch.zeros_like(sides), torch.zeros_like(sides), sides, sides), dim=1)
    levels = RegionPooler(LEVELS).levels_of(square)
    assert levels.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert all(low <= high for low, high in pairwise(levels.tolist()))


def test_bf16_features_are_pooled_in_float32() -> None:
    maps = {name: value.bfloat16() for name, value in features(LEVELS).items()}
    assert RegionPooler(LEVELS)(maps, boxes(9), [SIZE, SIZE]).dtype == torch.float32


def test_an_unknown_op_is_explained() -> None:
    with pytest.raises(InputError, match="did you mean 'align'"):
        RegionPooler(LEVELS, op="aling")
