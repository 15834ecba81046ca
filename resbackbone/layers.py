"""Norms by name, the frozen norm and its folding into the convolution before it, shortcuts, and He initialisation."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resbackbone.errors import InputError, nearest

NORM_EPS = 1e-5  # torchvision's, detectron2's and Caffe's BatchNorm
NORM_GROUPS = 32  # Wu & He 2018, Group Normalization, §4
NormFactory = Callable[[int], nn.Module]
SHORTCUTS = ("A", "B", "C")  # He et al. 2015, §4.1: zeros where shapes change; projections there; projections everywhere
GATE_BIAS = -6.0  # He et al. 2016, Identity Mappings, Table 1: of the biases tried there, the exclusive gate's best


class FrozenBatchNorm2d(nn.Module):
    """Batch normalisation as the affine map it is when statistics and weights are fixed: no parameters, four buffers.

    Loads a BatchNorm2d's state dict. It isn't a BatchNorm2d, so that no host can switch it back to training (He et al. 2015, appendix A).
    """

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, num_features: int, *, eps: float = NORM_EPS) -> None:
        super().__init__()
        self.num_features, self.eps = num_features, eps
        self.register_buffer("weight", torch.ones(num_features))
        self.register_buffer("bias", torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))

    def scale_and_shift(self) -> tuple[Tensor, Tensor]:
        """The map's two [C] vectors: norm(x) = x * scale + shift. At least float32, since eps is nothing in float16."""
        weight, bias, mean, variance = (
            buffer.to(torch.promote_types(buffer.dtype, torch.float32))
            for buffer in (self.weight, self.bias, self.running_mean, self.running_var)
        )
        scale = weight * (variance + self.eps).rsqrt()
        return scale, bias - mean * scale

    def forward(self, features: Tensor) -> Tensor:
        """[N, C, H, W] -> the same shape and dtype."""
        scale, shift = (vector.to(features.dtype).view(1, -1, 1, 1) for vector in self.scale_and_shift())
        return features * scale + shift

    def extra_repr(self) -> str:
        return f"{self.num_features}, eps={self.eps}"

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        # A BatchNorm2d's counter says how long it learned; nothing here depends on it.
        state_dict.pop(f"{prefix}num_batches_tracked", None)
        super()._load_from_state_dict(state_dict, prefix, *args)


class EvalBatchNorm2d(nn.BatchNorm2d):
    """Batch normalisation with fixed statistics and an affine that learns: `.train()` leaves it in eval."""

    def __init__(self, num_features: int, *, eps: float = NORM_EPS) -> None:
        super().__init__(num_features, eps=eps)
        self.training = False

    def train(self, mode: bool = True) -> EvalBatchNorm2d:
        super().train(False)
        return self


def _group_norm(channels: int, *, eps: float) -> nn.GroupNorm:
    return nn.GroupNorm(math.gcd(NORM_GROUPS, channels), channels, eps=eps)


def _no_norm(channels: int, *, eps: float) -> nn.Identity:
    return nn.Identity()


NORMS: dict[str, Callable[..., nn.Module]] = {
    "batch": nn.BatchNorm2d,
    "frozen": FrozenBatchNorm2d,
    "eval": EvalBatchNorm2d,
    "sync": nn.SyncBatchNorm,
    "group": _group_norm,
    "none": _no_norm,
}


def norm_factory(kind: str, *, eps: float | None = None) -> NormFactory:
    """A function channels -> norm layer. `kind` is one of NORMS; `eps=None` takes 1e-5."""
    if kind not in NORMS:
        raise InputError(f"norm={kind!r} is not known;{nearest(kind, NORMS)} choose from {', '.join(NORMS)}")
    if eps is not None and not 0 <= eps < 1:
        raise InputError(f"norm_eps={eps} is not possible; it must be at least 0 and below 1, usually 1e-5")
    return partial(NORMS[kind], eps=NORM_EPS if eps is None else eps)


def has_fixed_statistics(module: nn.Module) -> bool:
    """Whether some norm inside has statistics that training never updates."""
    return any(isinstance(child, FrozenBatchNorm2d | EvalBatchNorm2d) for child in module.modules())


def set_norm_eps(module: nn.Module, eps: float) -> None:
    """Give every batch norm inside the epsilon it was trained with."""
    for child in module.modules():
        if isinstance(child, FrozenBatchNorm2d | nn.BatchNorm2d | nn.SyncBatchNorm):
            child.eps = eps


def conv_norm(conv: nn.Conv2d, norm: nn.Module, features: Tensor) -> Tensor:
    """norm(conv(features)). A frozen norm is folded into the convolution, which saves the memory and time of one feature map.

    Gradients with respect to the convolution's weight and to the features are the same; the state dict doesn't change.
    """
    if not isinstance(norm, FrozenBatchNorm2d) or conv.padding_mode != "zeros":
        return norm(conv(features))
    scale, shift = norm.scale_and_shift()
    weight = conv.weight * scale.to(conv.weight.dtype).view(-1, 1, 1, 1)
    bias = shift if conv.bias is None else conv.bias * scale + shift
    return F.conv2d(features, weight, bias.to(weight.dtype), conv.stride, conv.padding, conv.dilation, conv.groups)


class PaddedShortcut(nn.Module):
    """Option A (He et al. 2015, §4.1): every stride-th cell, and channels of zeros on both sides. Nothing to learn.

    The paper doesn't say where the zeros go. Half of them in front, as in the CIFAR networks whose weights people hold.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.front = (out_channels - in_channels) // 2
        self.back = out_channels - in_channels - self.front

    def forward(self, features: Tensor) -> Tensor:
        """[N, in_channels, H, W] -> [N, out_channels, ceil(H / stride), ceil(W / stride)]."""
        return F.pad(features[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.front, self.back))

    def extra_repr(self) -> str:
        return f"stride={self.stride}, zero channels {self.front} + {self.back}"


class Addition(nn.Module):
    """Equation 1 of He et al. 2015: residual + shortcut. With `scale`, the shortcut is h(x) = scale * x (He et al. 2016, Equation 6)."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, residual: Tensor, shortcut: Tensor) -> Tensor:
        return residual + shortcut if self.scale == 1 else residual + self.scale * shortcut


class GatedAddition(nn.Module):
    """Exclusive gating (He et al. 2016, §3.1; a highway network's): g * residual + (1 - g) * shortcut.

    g is the sigmoid of a 1x1 convolution of the shortcut.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gate = nn.Conv2d(channels, channels, 1)

    def forward(self, residual: Tensor, shortcut: Tensor) -> Tensor:
        return torch.lerp(shortcut, residual, torch.sigmoid(self.gate(shortcut)))

    def open_shortcut(self) -> None:
        """Start as He et al. 2016 do: the shortcut carries, the residual comes in as the gate learns."""
        nn.init.constant_(self.gate.bias, GATE_BIAS)  # type: ignore[arg-type]


class StochasticDepth(nn.Module):
    """In training, leaves the residual of an image out with probability `rate` (Huang et al. 2016).

    The others are divided by 1 - rate, which is their multiplication by the survival probability at test time, moved to training.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, residual: Tensor) -> Tensor:
        if not self.training or self.rate == 0:
            return residual
        kept = torch.full((len(residual), 1, 1, 1), 1 - self.rate, device=residual.device, dtype=residual.dtype).bernoulli()
        return residual * kept / (1 - self.rate)

    def extra_repr(self) -> str:
        return f"rate={self.rate:.3f}"


def make_shortcut(
    kind: str, in_channels: int, out_channels: int, *, stride: int, bias: bool, norm: NormFactory | None
) -> nn.Sequential | PaddedShortcut | None:
    """Option A, B or C; None for the identity. `norm=None`: a projection without one, as pre-activation blocks have."""
    identity = stride == 1 and in_channels == out_channels
    if identity and kind != "C":
        return None
    if kind == "A":
        return PaddedShortcut(in_channels, out_channels, stride)
    projection = nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=bias)
    return nn.Sequential(projection) if norm is None else nn.Sequential(projection, norm(out_channels))


def run_shortcut(shortcut: nn.Module | None, features: Tensor) -> Tensor:
    """h(x): what `make_shortcut` made, its frozen norm folded."""
    if shortcut is None:
        return features
    if isinstance(shortcut, nn.Sequential) and len(shortcut) == 2:
        return conv_norm(cast(nn.Conv2d, shortcut[0]), shortcut[1], features)
    return shortcut(features)


def initialize(module: nn.Module) -> None:
    """He initialisation of every convolution (He et al. 2015, Delving Deep into Rectifiers, §2.2, backward case, as torchvision)."""
    for child in module.modules():
        if isinstance(child, nn.Conv2d):
            nn.init.kaiming_normal_(child.weight, mode="fan_out", nonlinearity="relu")
            if child.bias is not None:
                nn.init.zeros_(child.bias)
    for child in module.modules():
        if isinstance(child, GatedAddition):
            child.open_shortcut()
