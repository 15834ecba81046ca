"""The frozen norm, its folding, and initialisation."""

from __future__ import annotations

import math

import pytest
import torch
import torchvision
from torch import nn

from resbackbone.errors import InputError
from resbackbone.layers import EvalBatchNorm2d, FrozenBatchNorm2d, conv_norm, initialize, norm_factory


def frozen_norm(channels: int, *, smallest_variance: float, eps: float = 1e-5) -> FrozenBatchNorm2d:
    norm = FrozenBatchNorm2d(channels, eps=eps)
    norm.weight.uniform_(0.5, 1.5)
    norm.bias.uniform_(-1, 1)
    norm.running_mean.uniform_(-1, 1)
    norm.running_var.uniform_(smallest_variance, 2 * smallest_variance)
    return norm


@pytest.mark.parametrize("smallest_variance", [1.0, 1e-2, 1e-5, 1e-8])
@pytest.mark.parametrize("options", [{"bias": False}, {"bias": True}, {"stride": 2, "padding": 1}, {"dilation": 2, "groups": 2}])
def test_folding_is_exact_in_values_and_gradients(smallest_variance: float, options: dict) -> None:
    torch.manual_seed(0)
    conv, norm = nn.Conv2d(4, 6, 3, **options).double(), frozen_norm(6, smallest_variance=smallest_variance).double()
    results = []
    for folded in (True, False):
        x = torch.rand(2, 4, 9, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
        conv.zero_grad()
        output = conv_norm(conv, norm, x) if folded else norm(conv(x))
        output.sin().sum().backward()
        results.append([output, x.grad, *(p.grad.clone() for p in conv.parameters())])
    for ours, literal in zip(*results, strict=True):
        torch.testing.assert_close(ours, literal, rtol=1e-9, atol=1e-9)


def test_folding_in_single_precision_stays_close() -> None:
    torch.manual_seed(0)
    conv, norm = nn.Conv2d(16, 8, 3, bias=False), frozen_norm(8, smallest_variance=1e-4)
    x = torch.rand(1, 16, 12, 12)
    exact = norm.double()(conv.double()(x.double()))
    folded = conv_norm(conv.float(), norm.float(), x)
    assert (folded - exact).norm() / exact.norm() < 1e-6


@pytest.mark.parametrize("smallest_variance", [0.5, 1e-5])
def test_unfolded_is_torchvisions_frozen_norm(smallest_variance: float) -> None:
    ours, theirs = frozen_norm(5, smallest_variance=smallest_variance), torchvision.ops.FrozenBatchNorm2d(5)
    theirs.load_state_dict(ours.state_dict())
    assert theirs.eps == ours.eps
    x = torch.randn(2, 5, 4, 4)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-6, atol=1e-5)


def test_frozen_takes_a_batch_norms_state_strictly_and_back() -> None:
    source = nn.BatchNorm2d(4).eval()
    source.running_var.uniform_(0.1, 1)
    frozen = FrozenBatchNorm2d(4)
    assert list(frozen.load_state_dict(source.state_dict(), strict=True)) == [[], []]
    x = torch.rand(1, 4, 3, 3)
    torch.testing.assert_close(frozen(x), source(x))
    assert list(frozen.parameters()) == []
    assert "num_batches_tracked" not in frozen.state_dict()
    back = nn.BatchNorm2d(4)
    back.load_state_dict(frozen.state_dict(), strict=False)
    assert torch.equal(back.running_var, source.running_var)


def test_half_precision_doesnt_lose_eps() -> None:
    norm = FrozenBatchNorm2d(2).half()
    norm.running_var.zero_()
    scale, _ = norm.scale_and_shift()
    assert scale.isfinite().all()
    assert norm(torch.zeros(1, 2, 1, 1).half()).isfinite().all()


def test_bfloat16_autocast_goes_through() -> None:
    conv, norm = nn.Conv2d(3, 4, 3), frozen_norm(4, smallest_variance=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        output = conv_norm(conv, norm, torch.rand(1, 3, 5, 5))
    assert output.dtype == torch.bfloat16
    output.float().sum().backward()
    assert conv.weight.grad is not None


def test_eval_norm_keeps_its_statistics_and_learns_its_affine() -> None:
    norm = EvalBatchNorm2d(3)
    nn.Sequential(norm).train()
    before = norm.running_mean.clone()
    norm(torch.rand(2, 3, 4, 4)).sum().backward()
    assert not norm.training
    assert torch.equal(norm.running_mean, before)
    assert norm.weight.grad is not None


def test_other_norms_are_called_as_they_are() -> None:
    conv, norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
    x = torch.rand(2, 3, 5, 5)
    assert torch.equal(conv_norm(conv, norm.eval(), x), norm(conv(x)))


def test_norms_by_name() -> None:
    assert isinstance(norm_factory("batch")(4), nn.BatchNorm2d)
    assert isinstance(norm_factory("sync")(4), nn.SyncBatchNorm)
    assert isinstance(norm_factory("none")(4), nn.Identity)
    assert norm_factory("group")(64).num_groups == 32
    assert norm_factory("group")(24).num_groups == 8
    assert norm_factory("frozen", eps=1e-3)(4).eps == 1e-3
    with pytest.raises(InputError, match="did you mean 'group'"):
        norm_factory("groups")


def test_he_initialisation_has_its_variance() -> None:
    conv = nn.Conv2d(32, 64, 3)
    initialize(nn.Sequential(conv))
    assert math.isclose(conv.weight.std().item(), math.sqrt(2 / (64 * 9)), rel_tol=0.05)
    assert not conv.bias.any()
