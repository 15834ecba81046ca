"""Residual blocks, shared by the ImageNet and the CIFAR networks: basic and bottleneck, after and before activation.

v1 and v1.5 are He et al. 2015, Figure 5; v2 is He et al. 2016, Identity Mappings in Deep Residual Networks, Figure 4 (e).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from resbackbone.errors import InputError, nearest
from resbackbone.layers import SHORTCUTS, Addition, GatedAddition, NormFactory, StochasticDepth, conv_norm, make_shortcut, run_shortcut

BASE_WIDTH = 64  # per group, of an ordinary bottleneck


@dataclass(frozen=True, kw_only=True)
class BlockStyle:
    """What all blocks of one network share.

    Raises InputError for an unknown shortcut and for settings that exclude each other.
    """

    norm: NormFactory
    bias: bool  # convolutions have one only where no norm follows
    stride_in_3x3: bool = True  # "v1.5", torchvision's; the paper's own release strides in the first 1x1
    preactivation: bool = False  # "v2"
    plain: bool = False  # no shortcuts at all (§3.3)
    shortcut: str = "B"  # one of SHORTCUTS
    shortcut_scale: float = 1.0
    shortcut_gate: bool = False
    groups: int = 1
    base_width: int = BASE_WIDTH  # ResNeXt and wide networks: the 3x3 of conv2_x has groups * base_width channels

    def __post_init__(self) -> None:
        if self.shortcut not in SHORTCUTS:
            raise InputError(f"shortcut={self.shortcut!r} is not known;{nearest(self.shortcut, SHORTCUTS)} choose from A, B, C")
        if self.shortcut_gate and self.shortcut_scale != 1:
            raise InputError("shortcut_gate and shortcut_scale exclude each other; leave one of them at its default")
        if self.plain and (self.preactivation or self.shortcut_gate or self.shortcut_scale != 1):
            raise InputError("a plain network has no shortcuts to scale, gate or pre-activate; take the residual network of that depth")


class Block(nn.Module):
    """What the four blocks have in common: a shortcut, and how it meets the residual."""

    expansion = 1

    def __init__(self, *, first: bool = False) -> None:
        super().__init__()
        self.activated_shortcut = first  # He et al. 2016, appendix: in v2's first block both paths start from the activation
        self.relu = nn.ReLU(inplace=True)

    def add_shortcut(self, in_channels: int, out_channels: int, *, stride: int, style: BlockStyle, drop_rate: float) -> None:
        """Called last, so that parameters come in torchvision's order, which optimizers' states count by."""
        if style.plain:
            return
        norm = None if style.preactivation else style.norm
        self.downsample = make_shortcut(style.shortcut, in_channels, out_channels, stride=stride, bias=style.bias, norm=norm)
        self.drop = StochasticDepth(drop_rate) if drop_rate else nn.Identity()
        self.addition = GatedAddition(out_channels) if style.shortcut_gate else Addition(style.shortcut_scale)

    def join(self, residual: Tensor, features: Tensor, activated: Tensor | None = None) -> Tensor:
        """F(x) + h(x), and F(x) alone in a plain network. Pre-activated, only an identity takes what came in as it is."""
        if not hasattr(self, "addition"):
            return residual
        raw = activated is None or (self.downsample is None and not self.activated_shortcut)
        return self.addition(self.drop(residual), run_shortcut(self.downsample, features if raw else activated))  # type: ignore[arg-type]


class BasicBlock(Block):
    """Two 3x3 convolutions and a shortcut (He et al. 2015, Figure 2; Figure 5, left)."""

    def __init__(
        self,
        in_channels: int,
        width: int,
        *,
        stride: int,
        dilations: tuple[int, int],
        style: BlockStyle,
        drop_rate: float = 0.0,
        first: bool = False,
    ) -> None:
        _refuse_groups(style)
        super().__init__(first=first)
        self.conv1 = _conv(in_channels, width, size=3, stride=stride, dilation=dilations[0], bias=style.bias)
        self.bn1 = style.norm(width)
        self.conv2 = _conv(width, width, size=3, dilation=dilations[1], bias=style.bias)
        self.bn2 = style.norm(width)
        self.add_shortcut(in_channels, width, stride=stride, style=style, drop_rate=drop_rate)

    def forward(self, features: Tensor) -> Tensor:
        """[N, in_channels, H, W] -> [N, width, H / stride, W / stride]."""
        residual = self.relu(conv_norm(self.conv1, self.bn1, features))
        residual = conv_norm(self.conv2, self.bn2, residual)
        return self.relu(self.join(residual, features))


class Bottleneck(Block):
    """1x1 down, 3x3, 1x1 up, and a shortcut (He et al. 2015, Figure 5, right)."""

    expansion = 4

    def __init__(
        self,
        in_channels: int,
        width: int,
        *,
        stride: int,
        dilations: tuple[int, int],
        style: BlockStyle,
        drop_rate: float = 0.0,
        first: bool = False,
    ) -> None:
        inner, out_channels = _inner_width(width, style), width * self.expansion
        super().__init__(first=first)
        stride_1x1, stride_3x3 = (1, stride) if style.stride_in_3x3 else (stride, 1)
        self.conv1 = _conv(in_channels, inner, size=1, stride=stride_1x1, bias=style.bias)
        self.bn1 = style.norm(inner)
        self.conv2 = _conv(inner, inner, size=3, stride=stride_3x3, dilation=dilations[0], groups=style.groups, bias=style.bias)
        self.bn2 = style.norm(inner)
        self.conv3 = _conv(inner, out_channels, size=1, bias=style.bias)
        self.bn3 = style.norm(out_channels)
        self.add_shortcut(in_channels, out_channels, stride=stride, style=style, drop_rate=drop_rate)

    def forward(self, features: Tensor) -> Tensor:
        """[N, in_channels, H, W] -> [N, 4 width, H / stride, W / stride]."""
        residual = self.relu(conv_norm(self.conv1, self.bn1, features))
        residual = self.relu(conv_norm(self.conv2, self.bn2, residual))
        residual = conv_norm(self.conv3, self.bn3, residual)
        return self.relu(self.join(residual, features))


class PreActivationBasicBlock(Block):
    """Norm, ReLU, 3x3, twice; nothing after the addition."""

    def __init__(
        self,
        in_channels: int,
        width: int,
        *,
        stride: int,
        dilations: tuple[int, int],
        style: BlockStyle,
        drop_rate: float = 0.0,
        first: bool = False,
    ) -> None:
        _refuse_groups(style)
        super().__init__(first=first)
        self.bn1 = style.norm(in_channels)
        self.conv1 = _conv(in_channels, width, size=3, stride=stride, dilation=dilations[0], bias=style.bias)
        self.bn2 = style.norm(width)
        self.conv2 = _conv(width, width, size=3, dilation=dilations[1], bias=style.bias)
        self.add_shortcut(in_channels, width, stride=stride, style=style, drop_rate=drop_rate)

    def forward(self, features: Tensor) -> Tensor:
        """[N, in_channels, H, W] -> [N, width, H / stride, W / stride]."""
        activated = F.relu(self.bn1(features))  # not in place: without norms it would change the map below
        residual = self.relu(conv_norm(self.conv1, self.bn2, activated))
        return self.join(self.conv2(residual), features, activated)


class PreActivationBottleneck(Block):
    """Norm, ReLU, convolution, three times (1x1, 3x3, 1x1); nothing after the addition. The 3x3 strides."""

    expansion = 4

    def __init__(
        self,
        in_channels: int,
        width: int,
        *,
        stride: int,
        dilations: tuple[int, int],
        style: BlockStyle,
        drop_rate: float = 0.0,
        first: bool = False,
    ) -> None:
        inner, out_channels = _inner_width(width, style), width * self.expansion
        super().__init__(first=first)
        self.bn1 = style.norm(in_channels)
        self.conv1 = _conv(in_channels, inner, size=1, bias=style.bias)
        self.bn2 = style.norm(inner)
        self.conv2 = _conv(inner, inner, size=3, stride=stride, dilation=dilations[0], groups=style.groups, bias=style.bias)
        self.bn3 = style.norm(inner)
        self.conv3 = _conv(inner, out_channels, size=1, bias=style.bias)
        self.add_shortcut(in_channels, out_channels, stride=stride, style=style, drop_rate=drop_rate)

    def forward(self, features: Tensor) -> Tensor:
        """[N, in_channels, H, W] -> [N, 4 width, H / stride, W / stride]."""
        activated = F.relu(self.bn1(features))
        residual = self.relu(conv_norm(self.conv1, self.bn2, activated))
        residual = self.relu(conv_norm(self.conv2, self.bn3, residual))
        return self.join(self.conv3(residual), features, activated)


BlockType = type[BasicBlock] | type[Bottleneck]
PREACTIVATED: dict[BlockType, type[PreActivationBasicBlock] | type[PreActivationBottleneck]] = {
    BasicBlock: PreActivationBasicBlock,
    Bottleneck: PreActivationBottleneck,
}


def block_type(
    block: BlockType, style: BlockStyle
) -> type[BasicBlock] | type[Bottleneck] | type[PreActivationBasicBlock] | type[PreActivationBottleneck]:
    """The block itself, or in a v2 network its pre-activated form."""
    return PREACTIVATED[block] if style.preactivation else block


def stack_blocks(
    block: BlockType,
    in_channels: int,
    width: int,
    *,
    stride: int,
    dilations: tuple[int, int],
    style: BlockStyle,
    drop_rates: list[float],
    first: bool = False,
) -> nn.Sequential:
    """One stage of len(drop_rates) blocks; the first one strides and widens. `first`: of the whole network."""
    kind = block_type(block, style)
    blocks: list[nn.Module] = []
    for number, drop_rate in enumerate(drop_rates):
        blocks.append(
            kind(
                in_channels,
                width,
                stride=1 if number else stride,
                dilations=(dilations[1], dilations[1]) if number else dilations,
                style=style,
                drop_rate=drop_rate,
                first=first and not number,
            )
        )
        in_channels = width * block.expansion
    return nn.Sequential(*blocks)


def drop_rates(depths: tuple[int, ...], last: float) -> list[list[float]]:
    """Per stage and block, growing in proportion to depth up to `last` (Huang et al. 2016, Equation 4)."""
    if not 0 <= last < 1:
        raise InputError(f"stochastic_depth={last} is not possible; it is the last block's probability to be left out, from 0 to below 1")
    total, number, rates = sum(depths), 0, []
    for depth in depths:
        rates.append([last * (number + offset) / total for offset in range(1, depth + 1)])
        number += depth
    return rates


def _conv(
    in_channels: int, out_channels: int, *, size: int, stride: int = 1, dilation: int = 1, groups: int = 1, bias: bool = False
) -> nn.Conv2d:
    padding = dilation * (size // 2)
    return nn.Conv2d(in_channels, out_channels, size, stride=stride, padding=padding, dilation=dilation, groups=groups, bias=bias)


def _inner_width(width: int, style: BlockStyle) -> int:
    return width * style.base_width // BASE_WIDTH * style.groups


def _refuse_groups(style: BlockStyle) -> None:
    if style.groups != 1 or style.base_width != BASE_WIDTH:
        raise InputError("groups and width_per_group need bottleneck blocks: resnet50 and deeper")
