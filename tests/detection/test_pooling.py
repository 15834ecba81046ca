"""Pooling against torchvision's operators: levels, values, gradients, edges; both ways through the code."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.ops import MultiScaleRoIAlign, roi_align, roi_pool

from detection import bag_align
from detection.pooling import RegionPooler
from resbackbone.backbone import FeatureInfo
from resbackbone.errors import InputError

SIZE = (128, 192)  # images: (height, width)
CHANNELS = 5
PYRAMID = {f"p{level}": FeatureInfo(CHANNELS, 2**level) for level in (2, 3, 4, 5)}
SINGLE = {"conv4_x": FeatureInfo(CHANNELS, 16)}


def _maps(info: dict[str, FeatureInfo], *, dtype: torch.dtype = torch.float32, channels_last: bool = False) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    memory = torch.channels_last if channels_last else torch.contiguous_format
    maps = {
        name: torch.randn((2, one.channels, SIZE[0] // one.stride, SIZE[1] // one.stride), generator=generator)
        for name, one in info.items()
    }
    return {name: value.to(dtype=dtype, memory_format=memory).requires_grad_() for name, value in maps.items()}


def _boxes(count: int = 40, *, seed: int = 0) -> Tensor:
    """(count, 4) of all sizes, some reaching outside the image."""
    corners = torch.rand((count, 2, 2), generator=torch.Generator().manual_seed(seed)) * torch.tensor([SIZE[1] + 80.0, SIZE[0] + 80.0]) - 40
    return torch.cat((corners.amin(1), corners.amax(1)), dim=1)


def _gradients(pooled: Tensor, maps: dict[str, Tensor]) -> list[Tensor]:
    weights = torch.randn(pooled.shape, generator=torch.Generator().manual_seed(1)).to(pooled.dtype)
    return list(torch.autograd.grad((pooled * weights).sum(), list(maps.values())))


def _same(pooled: Tensor, expected: Tensor, maps: dict[str, Tensor]) -> None:
    torch.testing.assert_close(pooled, expected, rtol=0, atol=1e-5)
    for mine, theirs in zip(_gradients(pooled, maps), _gradients(expected, maps), strict=True):
        assert (mine - theirs).norm() <= 1e-5 * theirs.norm()


@pytest.mark.parametrize("compiled_op", [False, True])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("info", "side"), [(PYRAMID, 7), (SINGLE, 14)])
def test_equals_torchvision(info: dict[str, FeatureInfo], side: int, channels_last: bool, compiled_op: bool) -> None:
    maps, boxes = _maps(info, channels_last=channels_last), [_boxes(seed=0), _boxes(7, seed=1)]
    peer = MultiScaleRoIAlign(list(info), side, sampling_ratio=2)
    pooled = RegionPooler(info, output_size=side, compiled_op=compiled_op)(maps, boxes, [SIZE, SIZE])
    assert pooled.shape == (47, CHANNELS, side, side)
    _same(pooled, peer(maps, boxes, [SIZE, SIZE]), maps)


@pytest.mark.parametrize("channels_last", [False, True])
def test_more_than_one_pass(channels_last: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Regions in the forward, channels in the backward; the last pass is a smaller one."""
    maps, boxes = _maps(PYRAMID), [_boxes(9), _boxes(5)]
    expected = MultiScaleRoIAlign(list(PYRAMID), 7, sampling_ratio=2)(maps, boxes, [SIZE, SIZE])
    monkeypatch.setattr(bag_align, "REGIONS_AT_A_TIME", 4)
    monkeypatch.setattr(bag_align, "COPY_BYTES", expected.nbytes // 2)
    _same(RegionPooler(PYRAMID, channels_last=channels_last)(maps, boxes, [SIZE, SIZE]), expected, maps)


@pytest.mark.parametrize("channels_last", [False, True])
def test_layout_is_the_one_asked_for(channels_last: bool) -> None:
    pooled = RegionPooler(PYRAMID, channels_last=channels_last)(_maps(PYRAMID), [_boxes(9), _boxes(5)], [SIZE, SIZE])
    assert pooled.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


EDGES = {
    "no boxes": [],
    "whole image": [[0, 0, 192, 128]],
    "less than a cell": [[10, 10, 10.5, 10.25]],
    "no area": [[33, 20, 33, 20]],
    "upside down": [[60, 60, 20, 30]],
    "left of the image": [[-300, 10, -200, 60]],
    "below and right": [[500, 500, 600, 600]],
    "last cell": [[176, 112, 192, 128]],
    "samples one cell outside": [[-32, -32, 0, 0], [192, 128, 224, 160]],
    "very long": [[-1e6, 3, 1e6, 5]],
    "beyond int32": [[-1e12, -1e12, 1e12, 1e12]],
}


@pytest.mark.parametrize("sampling_ratio", [1, 2, 3])
@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("edge", EDGES)
def test_edges(edge: str, aligned: bool, sampling_ratio: int) -> None:
    maps, boxes = _maps(SINGLE), [torch.zeros((0, 4)), torch.tensor(EDGES[edge], dtype=torch.float32).view(-1, 4)]
    pooled = RegionPooler(SINGLE, output_size=3, sampling_ratio=sampling_ratio, aligned=aligned)(maps, boxes, [SIZE, SIZE])
    _same(pooled, roi_align(maps["conv4_x"], boxes, 3, 1 / 16, sampling_ratio, aligned), maps)


@pytest.mark.parametrize("options", [{}, {"channels_last": False}, {"compiled_op": True}])
def test_no_boxes_at_all(options: dict[str, Any]) -> None:
    maps = _maps(PYRAMID)
    pooled = RegionPooler(PYRAMID, **options)(maps, [torch.zeros((0, 4))] * 2, [SIZE, SIZE])
    assert pooled.shape == (0, CHANNELS, 7, 7)
    assert all(not gradient.any() for gradient in _gradients(pooled, maps))


def test_maps_of_one_cell() -> None:
    maps = {"conv4_x": torch.randn((1, CHANNELS, 1, 1), requires_grad=True)}
    boxes = [torch.tensor([[0.0, 0.0, 16.0, 16.0], [4.0, 4.0, 30.0, 8.0]])]
    _same(RegionPooler(SINGLE)(maps, boxes, [(16, 16)]), roi_align(maps["conv4_x"], boxes, 7, 1 / 16, 2), maps)


def test_boxes_that_are_no_numbers_give_no_numbers() -> None:
    """A diverged run must reach the check of its loss, not die on an index."""
    strange = torch.tensor([[float("nan")] * 4, [0.0, 0.0, float("inf"), 10.0], [5.0, 5.0, 40.0, 40.0]])
    pooled = RegionPooler(PYRAMID)(_maps(PYRAMID), [strange, torch.zeros((0, 4))], [SIZE, SIZE])
    assert pooled[0].isnan().all()
    assert pooled[2].isfinite().all()


def test_levels_by_hand() -> None:
    """A box of 224² belongs to stride 16; half the side one level finer; outside the pyramid the nearest (FPN, eq. 1)."""
    sides = torch.tensor([1.0, 111.0, 112.0, 223.9, 224.0, 447.0, 448.0, 5000.0, 0.0])
    boxes = torch.stack((torch.zeros_like(sides), torch.zeros_like(sides), sides, sides), dim=1)
    assert RegionPooler(PYRAMID).levels_of(boxes).tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 0]
    assert RegionPooler(SINGLE).levels_of(boxes).tolist() == [0] * len(sides)
    two = {name: PYRAMID[name] for name in ("p4", "p5")}
    assert RegionPooler(two).levels_of(boxes).tolist() == [0, 0, 0, 0, 0, 0, 1, 1, 0]


def test_large_boxes_use_all_levels_as_torchvision_does() -> None:
    size, side = (640, 960), torch.tensor([20.0, 60.0, 111.99, 112.0, 200.0, 224.0, 300.0, 448.0, 600.0])
    maps = {name: torch.randn((1, CHANNELS, size[0] // one.stride, size[1] // one.stride)) for name, one in PYRAMID.items()}
    boxes = [torch.stack((side * 0 + 7, side * 0 + 5, side + 7, side + 5), dim=1)]
    expected = MultiScaleRoIAlign(list(PYRAMID), 7, sampling_ratio=2)(maps, boxes, [size])
    torch.testing.assert_close(RegionPooler(PYRAMID)(maps, boxes, [size]), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_is_as_near_as_its_rounding(autocast: bool) -> None:
    maps, boxes = _maps(PYRAMID, dtype=torch.bfloat16), [_boxes(seed=0), _boxes(7, seed=1)]
    exact = {name: value.detach().float().requires_grad_() for name, value in maps.items()}
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        pooled = RegionPooler(PYRAMID)(maps, boxes, [SIZE, SIZE])
    expected = MultiScaleRoIAlign(list(PYRAMID), 7, sampling_ratio=2)(exact, boxes, [SIZE, SIZE])
    assert pooled.dtype == torch.bfloat16
    assert (pooled.float() - expected).norm() <= 0.004 * expected.norm()
    for mine, theirs in zip(_gradients(pooled, maps), _gradients(expected, exact), strict=True):
        assert mine.dtype == torch.bfloat16
        assert (mine.float() - theirs).norm() <= 0.006 * theirs.norm()


def test_gradient_in_double() -> None:
    maps = {name: value.detach().double()[:, :2].requires_grad_() for name, value in _maps(SINGLE).items()}
    pooler, boxes = RegionPooler(SINGLE, output_size=2), [_boxes(3).double(), _boxes(1).double()]
    assert torch.autograd.gradcheck(lambda features: pooler({"conv4_x": features}, boxes, [SIZE, SIZE]), (maps["conv4_x"],))


def test_gradient_is_the_same_on_any_number_of_threads() -> None:
    boxes, threads, runs = [_boxes(60), _boxes(60, seed=3)], torch.get_num_threads(), []
    for count in (1, 2):
        torch.set_num_threads(count)
        maps = _maps(PYRAMID, channels_last=True)
        runs.append(_gradients(RegionPooler(PYRAMID)(maps, boxes, [SIZE, SIZE]), maps))
    torch.set_num_threads(threads)
    assert all(torch.equal(one, two) for one, two in zip(*runs, strict=True))


@pytest.mark.parametrize("sampling_ratio", [0, -1])
def test_adaptive_sampling_is_torchvisions(sampling_ratio: int) -> None:
    maps, boxes = _maps(PYRAMID), [_boxes(10), _boxes(4)]
    peer = MultiScaleRoIAlign(list(PYRAMID), 7, sampling_ratio=sampling_ratio)
    assert torch.equal(RegionPooler(PYRAMID, sampling_ratio=sampling_ratio)(maps, boxes, [SIZE, SIZE]), peer(maps, boxes, [SIZE, SIZE]))


def test_pool_is_torchvisions() -> None:
    maps, boxes = _maps(SINGLE), [_boxes(10), _boxes(4)]
    _same(RegionPooler(SINGLE, op="pool")(maps, boxes, [SIZE, SIZE]), roi_pool(maps["conv4_x"], boxes, 7, 1 / 16), maps)


def test_pool_from_a_pyramid_takes_each_box_from_its_level() -> None:
    maps, boxes = _maps(PYRAMID, dtype=torch.bfloat16), [_boxes(10), _boxes(4)]
    pooler = RegionPooler(PYRAMID, op="pool")
    pooled, level = pooler(maps, boxes, [SIZE, SIZE]), pooler.levels_of(torch.cat(boxes))
    assert len(level.unique()) > 1
    for number, (name, info) in enumerate(PYRAMID.items()):
        expected = roi_pool(maps[name].float(), boxes, 7, 1 / info.stride)
        assert torch.equal(pooled[level == number].float(), expected[level == number])


@pytest.mark.parametrize(
    ("info", "options", "message"),
    [
        (PYRAMID, {"op": "alin"}, "did you mean 'align'"),
        ({}, {}, "strides double"),
        ({"p3": PYRAMID["p3"], "p5": PYRAMID["p5"]}, {}, "'p5': 32"),
        ({"p4": PYRAMID["p4"], "p3": PYRAMID["p3"]}, {}, "finest first"),
    ],
)
def test_wrong_settings_are_explained(info: dict[str, FeatureInfo], options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        RegionPooler(info, **options)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_equals_cpu() -> None:
    maps, boxes = _maps(PYRAMID), [_boxes(seed=0), _boxes(7, seed=1)]
    pooler = RegionPooler(PYRAMID)
    there = pooler({name: value.cuda() for name, value in maps.items()}, [part.cuda() for part in boxes], [SIZE, SIZE])
    _same(there.cpu(), pooler(maps, boxes, [SIZE, SIZE]), maps)


def test_compiled_op_exports_for_any_number_of_boxes() -> None:
    class Pooled(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pooler = RegionPooler(PYRAMID, compiled_op=True)

        def forward(self, maps: dict[str, Tensor], boxes: Tensor) -> Tensor:
            return self.pooler(maps, [boxes], [SIZE])

    maps = {name: value.detach()[:1].contiguous() for name, value in _maps(PYRAMID).items()}
    shapes = (dict.fromkeys(maps), {0: torch.export.Dim("boxes")})
    exported = torch.export.export(Pooled(), (maps, _boxes(5)), dynamic_shapes=shapes).module()
    assert torch.equal(exported(maps, _boxes(12, seed=4)), Pooled()(maps, _boxes(12, seed=4)))
