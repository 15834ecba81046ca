"""The CIFAR networks against the paper's Table 6, and the deepest of them in practice."""

from __future__ import annotations

import time

import pytest
import torch

from resbackbone import create_backbone, create_classifier, list_backbones
from resbackbone.cifar import blocks_per_stage
from resbackbone.errors import InputError
from resbackbone.registry import designed_for

PAPER = {20: 0.27, 32: 0.46, 44: 0.66, 56: 0.85, 110: 1.7, 1202: 19.4}  # Table 6, millions


@pytest.mark.parametrize("depth", PAPER)
def test_parameters_are_table_6s(depth: int) -> None:
    with torch.device("meta"):
        net = create_classifier(f"resnet{depth}_cifar")
    millions = sum(p.numel() for p in net.parameters()) / 1e6
    assert round(millions, 1 if depth > 56 else 2) == PAPER[depth]
    layers = [m for m in net.modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Linear)]
    assert len(layers) == depth


def test_names_are_the_papers() -> None:
    assert {f"resnet{depth}_cifar" for depth in PAPER} | {f"plain{d}_cifar" for d in (20, 32, 44, 56)} == set(list_backbones("*_cifar"))


def test_three_maps_and_ten_classes() -> None:
    net = create_backbone("resnet20_cifar")
    maps = net(torch.rand(2, 3, 33, 31))
    assert {name: tuple(value.shape) for name, value in maps.items()} == {
        "conv2_x": (2, 16, 33, 31),
        "conv3_x": (2, 32, 17, 16),
        "conv4_x": (2, 64, 9, 8),
    }
    assert create_classifier("plain20_cifar")(torch.rand(2, 3, 32, 32)).shape == (2, 10)
    assert create_classifier("resnet20_cifar", num_classes=100)(torch.rand(1, 3, 32, 32)).shape == (1, 100)
    assert designed_for("resnet20_cifar").input_size == 32


def test_plain_and_residual_differ_in_the_shortcuts_alone() -> None:
    plain, residual = create_classifier("plain20_cifar"), create_classifier("resnet20_cifar")
    residual.load_state_dict(plain.state_dict(), strict=True)
    x = torch.rand(2, 3, 32, 32)
    assert not torch.allclose(plain(x), residual(x))


def test_1202_layers_build_in_seconds_and_train_with_checkpointing() -> None:
    began = time.process_time()
    net = create_classifier("resnet1202_cifar", checkpointing=True)
    assert time.process_time() - began < 30
    net(torch.rand(2, 3, 8, 8)).square().sum().backward()
    assert all(p.grad is not None for p in net.parameters())


def test_the_region_head_is_the_last_stage() -> None:
    net = create_backbone("resnet20_cifar").eval()
    x = torch.rand(1, 3, 28, 28)
    expected = net(x)["conv4_x"]
    head = net.split_region_head()
    assert (head.in_feature, head.pool_size) == ("conv3_x", 14)
    torch.testing.assert_close(head.eval()(net(x)["conv3_x"]), expected)


@pytest.mark.parametrize(("depth", "nearest"), [(21, "20 and 26"), (100, "98 and 104")])
def test_other_depths_are_refused_with_the_nearest(depth: int, nearest: str) -> None:
    with pytest.raises(InputError, match=nearest):
        blocks_per_stage(depth)
    with pytest.raises(InputError, match="stride 4"):
        create_backbone("resnet20_cifar", output_stride=2)
