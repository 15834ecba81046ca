"""Every network in every variant and norm: maps, gradients, freezing, copies, memory layout, export. One process, small inputs.

Output stride, batch and image size take turns along the matrix, so that each network and each norm meets each of them.
"""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor

from resbackbone import create_backbone, list_backbones
from resbackbone.backbone import Backbone
from resbackbone.layers import NORMS

BOTTLENECK = {"resnet50", "resnet101", "resnet152", "resnext50_32x4d", "wide_resnet50_2"}
DEEPEST = "resnet1202_cifar"  # minutes in a matrix; tests/resbackbone/test_cifar.py has its own
SIZES = ((65, 49), (64, 80), (71, 66))


def variants(name: str) -> tuple[str, ...]:
    if name in BOTTLENECK:
        return ("v1", "v1.5", "v2")
    return ("v1.5", "v2") if name.startswith("resnet") else ("v1.5",)


def strides(name: str) -> tuple[int, ...]:
    return (16, 32) if name.startswith("vgg") else (8, 16, 32)


NETWORKS = [(name, variant) for name in list_backbones() if name != DEEPEST for variant in variants(name)]
CELLS = [(name, variant, norm, number) for number, (name, variant) in enumerate(NETWORKS) for norm in NORMS]


def build(name: str, variant: str, norm: str, **options: object) -> Backbone:
    """The network with random weights and statistics that keep activations of their size; without its own, which take long to draw."""
    with torch.device("meta"):
        net = create_backbone(name, variant=variant, norm=norm, allow_random_frozen=True, **options)  # type: ignore[arg-type]
    net = net.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    ranges = {"running_mean": (-0.3, 0.3), "running_var": (0.5, 1.0), "bias": (-0.3, 0.3)}
    for key, tensor in net.state_dict().items():
        bound = (3 / tensor[0].numel()) ** 0.5 if tensor.dim() > 1 else 0
        low, high = (-bound, bound) if bound else ranges.get(key.rpartition(".")[2], (0.5, 1.0))
        if tensor.dim():
            tensor.uniform_(low, high, generator=generator)
        else:
            tensor.zero_()  # a norm's counter
    return net


def photo(batch: int, size: tuple[int, int], small: bool) -> Tensor:
    height, width = (side // 3 for side in size) if small else size
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(1))


def same(one: dict[str, Tensor], other: dict[str, Tensor], tolerance: float = 0.0) -> None:
    """Equal bit for bit, or up to rounding, in the norm of the whole map."""
    for name, features in one.items():
        difference = (other[name] - features).norm() / features.norm()
        assert difference <= tolerance, f"{name} differs by {difference:.2g} of its norm"


@pytest.mark.parametrize(("name", "variant", "norm", "number"), CELLS)
def test_cell(name: str, variant: str, norm: str, number: int) -> None:
    turn = number + list(NORMS).index(norm)
    output_stride = strides(name)[turn % len(strides(name))]
    net = build(name, variant, norm, output_stride=output_stride)
    x = photo(1 + turn % 2, SIZES[turn % 3], name.endswith("_cifar"))

    maps = net.train()(x)
    for key, info in net.feature_info.items():
        assert info.stride <= max(output_stride, 4)
        assert maps[key].shape == (len(x), info.channels, -(-x.shape[2] // info.stride), -(-x.shape[3] // info.stride)), key
    sum(features.square().mean() for features in maps.values()).backward()  # type: ignore[union-attr]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())

    net.freeze(2)
    learning = {id(p) for p in net.parameters() if p.requires_grad}
    for key in list(net.feature_info)[:2]:
        assert not any(id(p) in learning for module in net.stage_modules(key) for p in module.parameters())
    assert learning

    net.eval()
    with torch.no_grad():
        expected = net(x)
        same(expected, copy.deepcopy(net)(x))
        twin = pickle.loads(pickle.dumps(net))
        for tensor in twin.state_dict().values():
            tensor.zero_()
        twin.load_state_dict(net.state_dict(), strict=True)
        same(expected, twin(x))
        if name.startswith("plain"):  # dozens of layers without shortcuts amplify float32's rounding beyond any bound
            net, x = net.double(), x.double()
            expected = net(x)
        last = net.to(memory_format=torch.channels_last)(x.contiguous(memory_format=torch.channels_last))
        same(expected, last, tolerance=1e-4)


@pytest.mark.parametrize(("name", "variant"), [cell for cell in NETWORKS if cell[0] not in ("resnet101", "resnet152", "resnet110_cifar")])
def test_export(name: str, variant: str) -> None:
    """torch.export traces each kind of network whole; the deeper ones repeat the same blocks."""
    net = build(name, variant, "frozen" if not name.startswith("vgg16_") else "batch").eval()
    x = photo(1, SIZES[0], name.endswith("_cifar"))
    program = torch.export.export(net, (x,), strict=False)
    with torch.no_grad():
        same(net(x), program.module()(x), tolerance=1e-5)


def test_the_matrix_covers_what_is_registered() -> None:
    assert {name for name, _ in NETWORKS} | {DEEPEST} == set(list_backbones())
