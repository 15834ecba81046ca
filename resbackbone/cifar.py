"""The CIFAR-10 networks of He et al. 2015, §4.2: 6n+2 layers, residual (option A) and plain.

A 3x3 convolution, then three stages of 2n layers on 32x32, 16x16 and 8x8 cells with 16, 32 and 64 channels. The first convolution belongs
to conv2_x, as in the section's table ("1+2n layers"), so there are three maps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor, nn

from resbackbone.backbone import Backbone, FeatureInfo, Preprocessing, RegionHead, imagenet_preprocessing, run_blocks
from resbackbone.blocks import BasicBlock, BlockStyle, drop_rates, stack_blocks
from resbackbone.errors import InputError
from resbackbone.layers import conv_norm, initialize, norm_factory
from resbackbone.registry import Task, register_backbone
from resbackbone.resnet import ResNetRegionHead, check_variant

WIDTHS = {"conv2_x": 16, "conv3_x": 32, "conv4_x": 64}
LAYERS = {"conv2_x": "layer1", "conv3_x": "layer2", "conv4_x": "layer3"}
RESIDUAL_DEPTHS = (20, 32, 44, 56, 110, 1202)  # Table 6
PLAIN_DEPTHS = (20, 32, 44, 56)  # Figure 6, left
LARGEST_STRIDE = 4
TASK = Task(num_classes=10, input_size=32)
CIFAR10 = Preprocessing(mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616))  # of its training images


class CifarResNet(Backbone):
    """Maps conv2_x, conv3_x, conv4_x at strides 1, 2 and 4.

    Args:
        depth: 6n+2 weighted layers.
        style: what its blocks share.
        in_channels: of the images.
        stochastic_depth: probability that the last block's residual is left out in training; growing from 0 at the first.
        checkpointing: recompute blocks in the backward pass. At 1202 layers it is what fits a batch of 128 into memory.
    """

    head_prefixes: tuple[str, ...] = ("fc.",)

    def __init__(
        self, depth: int, style: BlockStyle, *, in_channels: int = 3, stochastic_depth: float = 0.0, checkpointing: bool = False
    ) -> None:
        info = {name: FeatureInfo(width, 2**number) for number, (name, width) in enumerate(WIDTHS.items())}
        preprocessing = CIFAR10 if in_channels == 3 else imagenet_preprocessing(in_channels)
        super().__init__(info, preprocessing=preprocessing, checkpointing=checkpointing)
        self.preactivation = style.preactivation
        count = blocks_per_stage(depth)
        channels = WIDTHS["conv2_x"]
        self.conv1 = nn.Conv2d(in_channels, channels, 3, padding=1, bias=style.bias)
        if not style.preactivation:
            self.bn1 = style.norm(channels)
        self.relu = nn.ReLU(inplace=True)
        rates = drop_rates((count, count, count), stochastic_depth)
        for (name, width), stage_rates in zip(WIDTHS.items(), rates, strict=True):
            first = name == "conv2_x"
            stage = stack_blocks(
                BasicBlock, channels, width, stride=1 if first else 2, dilations=(1, 1), style=style, drop_rates=stage_rates, first=first
            )
            self.add_module(LAYERS[name], stage)
            channels = width
        if style.preactivation:
            self.bn_last = style.norm(channels)
        initialize(self)

    def run_stage(self, name: str, features: Tensor) -> Tensor:
        if name == "conv2_x":
            features = self.conv1(features) if self.preactivation else self.relu(conv_norm(self.conv1, self.bn1, features))
        features = run_blocks(cast(nn.Sequential, getattr(self, LAYERS[name])), features, checkpointing=self.checkpointing)
        return self.relu(self.bn_last(features)) if self.preactivation and name == "conv4_x" else features

    def stage_modules(self, name: str) -> tuple[nn.Module, ...]:
        stem = () if self.preactivation else (self.bn1,)
        below = (self.conv1, *stem) if name == "conv2_x" else ()
        above = (self.bn_last,) if self.preactivation and name == "conv4_x" else ()
        return (*below, getattr(self, LAYERS[name]), *above)

    def region_head_available(self) -> bool:
        return "conv4_x" in self.feature_info

    def split_region_head(self) -> RegionHead:
        """Move conv4_x out, to run on each region pooled from conv3_x."""
        if not self.region_head_available():
            raise InputError(f"{self.architecture} has no conv4_x (any more) to run on each region")
        head = ResNetRegionHead(
            cast(nn.Sequential, self.layer3),
            bn_last=self.bn_last if self.preactivation else None,
            in_feature="conv3_x",
            stride=2,
            out_channels=WIDTHS["conv4_x"],
            frozen=self.frozen_stages == len(self.feature_info),
            checkpointing=self.checkpointing,
        )
        self.out_features = ("conv3_x",)
        self.trim()
        return head


class CifarClassifier(CifarResNet):
    """The whole network: [N, 3, 32, 32] -> logits [N, num_classes], by global average pooling and one linear layer."""

    head_prefixes = ()

    def __init__(self, depth: int, style: BlockStyle, *, num_classes: int, **options: Any) -> None:
        super().__init__(depth, style, **options)
        self.fc = nn.Linear(WIDTHS["conv4_x"], num_classes)
        nn.init.kaiming_normal_(self.fc.weight, nonlinearity="linear")
        nn.init.zeros_(self.fc.bias)
        self.out_features = ("conv4_x",)

    def forward(self, images: Tensor) -> Tensor:  # type: ignore[override]
        features = super().forward(images)["conv4_x"]
        return self.fc(F.adaptive_avg_pool2d(features, 1).flatten(1))


def blocks_per_stage(depth: int) -> int:
    """n of 6n+2. Raises InputError for a depth that isn't of that form."""
    if depth < 8 or (depth - 2) % 6:
        raise InputError(f"{depth} layers are not 6n+2; the nearest that are: {depth - (depth - 2) % 6} and {depth - (depth - 2) % 6 + 6}")
    return (depth - 2) // 6


def _builder(depth: int, *, plain: bool) -> Callable[..., Backbone]:
    def build(
        *,
        variant: str = "v1.5",
        norm: str = "batch",
        norm_eps: float | None = None,
        output_stride: int = 32,
        in_channels: int = 3,
        checkpointing: bool = False,
        num_classes: int | None = None,
        shortcut: str = "A",
        shortcut_scale: float = 1.0,
        shortcut_gate: bool = False,
        stochastic_depth: float = 0.0,
    ) -> Backbone:
        check_variant(variant)
        # Nothing to dilate: the last map's stride is smaller than any that a detector asks for.
        if output_stride < LARGEST_STRIDE:
            raise InputError(f"output_stride={output_stride} is not possible; a CIFAR network's last map has stride {LARGEST_STRIDE}")
        style = BlockStyle(
            norm=norm_factory(norm, eps=norm_eps),
            bias=norm == "none",
            preactivation=variant == "v2",
            plain=plain,
            shortcut=shortcut,
            shortcut_scale=shortcut_scale,
            shortcut_gate=shortcut_gate,
        )
        options: dict[str, Any] = {"in_channels": in_channels, "stochastic_depth": stochastic_depth, "checkpointing": checkpointing}
        net = CifarClassifier(depth, style, num_classes=num_classes, **options) if num_classes else CifarResNet(depth, style, **options)
        net.variant = "v2" if variant == "v2" else ""
        net.shortcut = "" if plain else shortcut
        return net

    return build


for _depth in RESIDUAL_DEPTHS:
    register_backbone(f"resnet{_depth}_cifar", TASK)(_builder(_depth, plain=False))
for _depth in PLAIN_DEPTHS:
    register_backbone(f"plain{_depth}_cifar", TASK)(_builder(_depth, plain=True))
