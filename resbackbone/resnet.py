"""Residual and plain networks for ImageNet, as in Table 1 of He et al. 2015, Deep Residual Learning for Image Recognition.

State-dict keys are torchvision's (`conv1 bn1 layer1 … layer4 fc`), so its weights load as they are. A v2 network has no `bn1`, for its
first block begins with a norm, and a `bn_last` at the end. Shapes: N images, C channels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor, nn

from resbackbone.backbone import Backbone, FeatureInfo, RegionHead, imagenet_preprocessing, run_blocks
from resbackbone.blocks import BASE_WIDTH, BasicBlock, BlockStyle, BlockType, Bottleneck, drop_rates, stack_blocks
from resbackbone.errors import InputError, nearest
from resbackbone.layers import conv_norm, initialize, norm_factory
from resbackbone.registry import register_backbone

STEM_WIDTH = 64
STAGE_WIDTHS = (64, 128, 256, 512)  # conv2_x … conv5_x, before a bottleneck's fourfold expansion
LAYERS = {"conv2_x": "layer1", "conv3_x": "layer2", "conv4_x": "layer3", "conv5_x": "layer4"}
VARIANTS = ("v1", "v1.5", "v2")
DILATION_RULES = ("torchvision", "detectron2")
REGION_SIZE = 7  # cells of conv5_x per region and side, as on a whole 224 x 224 image


@dataclass(frozen=True)
class Layout:
    """One column of Table 1: the block, how many of it conv2_x … conv5_x have, whether without shortcuts, and ResNeXt's two numbers."""

    block: BlockType
    depths: tuple[int, int, int, int]
    plain: bool = False
    groups: int = 1
    base_width: int = BASE_WIDTH


TABLE_1 = {
    "resnet18": Layout(BasicBlock, (2, 2, 2, 2)),
    "resnet34": Layout(BasicBlock, (3, 4, 6, 3)),
    "resnet50": Layout(Bottleneck, (3, 4, 6, 3)),
    "resnet101": Layout(Bottleneck, (3, 4, 23, 3)),
    "resnet152": Layout(Bottleneck, (3, 8, 36, 3)),
    # Figure 3, middle, and §4.1: what depth does without shortcuts
    "plain18": Layout(BasicBlock, (2, 2, 2, 2), plain=True),
    "plain34": Layout(BasicBlock, (3, 4, 6, 3), plain=True),
    # Xie et al. 2017, Table 1; Zagoruyko & Komodakis 2016
    "resnext50_32x4d": Layout(Bottleneck, (3, 4, 6, 3), groups=32, base_width=4),
    "wide_resnet50_2": Layout(Bottleneck, (3, 4, 6, 3), base_width=128),
}


class ResNet(Backbone):
    """conv1 (7x7, stride 2), 3x3 max pooling, then four stages of blocks; maps conv1, conv2_x … conv5_x.

    The maps of a v2 network are sums that no norm or ReLU has met yet, but for the last one.

    Args:
        layout: a column of TABLE_1.
        style: what its blocks share.
        output_stride: 32, or 16 / 8, where the last one or two stages dilate instead of striding.
        dilation_rule: whether the first block of a dilated stage keeps the dilation below it ("torchvision", timm) or takes the
            new one ("detectron2", mmdetection). Same keys, different outputs: weights want the rule they were trained with.
        in_channels: of the images.
        stochastic_depth: probability that the last block's residual is left out in training; growing from 0 at the first.
        checkpointing: recompute blocks in the backward pass.
    """

    head_prefixes: tuple[str, ...] = ("fc.",)

    def __init__(
        self,
        layout: Layout,
        style: BlockStyle,
        *,
        output_stride: int = 32,
        dilation_rule: str = "torchvision",
        in_channels: int = 3,
        stochastic_depth: float = 0.0,
        checkpointing: bool = False,
    ) -> None:
        strides = _stage_strides(output_stride)
        expansion = layout.block.expansion
        info = {"conv1": FeatureInfo(STEM_WIDTH, 2)}
        stride_px = 4  # after the max pooling
        for name, width, stride in zip(LAYERS, STAGE_WIDTHS, strides, strict=True):
            stride_px *= stride
            info[name] = FeatureInfo(width * expansion, stride_px)
        super().__init__(info, preprocessing=imagenet_preprocessing(in_channels), checkpointing=checkpointing)
        self.inplanes = STAGE_WIDTHS[-1] * expansion  # torchvision's feature-pyramid helper asks for it
        self.preactivation = style.preactivation
        self.conv1 = nn.Conv2d(in_channels, STEM_WIDTH, 7, stride=2, padding=3, bias=style.bias)
        if not style.preactivation:
            self.bn1 = style.norm(STEM_WIDTH)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self._add_stages(layout, style, strides, dilation_rule, drop_rates(layout.depths, stochastic_depth))
        if style.preactivation:
            self.bn_last = style.norm(self.inplanes)
        initialize(self)

    def _add_stages(
        self, layout: Layout, style: BlockStyle, strides: tuple[int, ...], dilation_rule: str, rates: list[list[float]]
    ) -> None:
        channels, dilation = STEM_WIDTH, 1
        for name, width, stride, stage_rates in zip(LAYERS, STAGE_WIDTHS, strides, rates, strict=True):
            below = dilation
            dilation *= 2 if stride == 1 and name != "conv2_x" else 1
            stage = stack_blocks(
                layout.block,
                channels,
                width,
                stride=stride,
                dilations=_dilations(dilation_rule, below, dilation),
                style=style,
                drop_rates=stage_rates,
                first=name == "conv2_x",
            )
            self.add_module(LAYERS[name], stage)
            channels = width * layout.block.expansion

    def run_stage(self, name: str, features: Tensor) -> Tensor:
        if name == "conv1":
            return self.conv1(features) if self.preactivation else self.relu(conv_norm(self.conv1, self.bn1, features))
        if name == "conv2_x":
            features = self.maxpool(features)
        features = run_blocks(cast(nn.Sequential, getattr(self, LAYERS[name])), features, checkpointing=self.checkpointing)
        return self.relu(self.bn_last(features)) if self.preactivation and name == "conv5_x" else features

    def stage_modules(self, name: str) -> tuple[nn.Module, ...]:
        if name == "conv1":
            return (self.conv1,) if self.preactivation else (self.conv1, self.bn1)
        blocks = getattr(self, LAYERS[name])
        return (blocks, self.bn_last) if self.preactivation and name == "conv5_x" else (blocks,)

    def region_head_available(self) -> bool:
        return "conv5_x" in self.feature_info

    def split_region_head(self) -> RegionHead:
        """Move conv5_x out, to run on each region pooled from conv4_x (He et al. 2015, appendix A)."""
        if not self.region_head_available():
            raise InputError(f"{self.architecture} has no conv5_x (any more) to run on each region")
        stride = self.feature_info["conv5_x"].stride // self.feature_info["conv4_x"].stride
        head = ResNetRegionHead(
            cast(nn.Sequential, self.layer4),
            bn_last=self.bn_last if self.preactivation else None,
            stride=stride,
            out_channels=self.feature_info["conv5_x"].channels,
            frozen=self.frozen_stages == len(self.feature_info),
            checkpointing=self.checkpointing,
        )
        self.out_features = ("conv4_x",)
        self.trim()
        return head


class ResNetRegionHead(RegionHead):
    """The top stage on regions of the map below it, as conv5_x on regions of conv4_x: [R, C, 14, 14] -> [R, out_channels, 7, 7].

    A v2 network's last norm and ReLU come with it.
    """

    def __init__(
        self,
        layer4: nn.Sequential,
        *,
        bn_last: nn.Module | None = None,
        in_feature: str = "conv4_x",
        stride: int,
        out_channels: int,
        frozen: bool,
        checkpointing: bool,
    ) -> None:
        super().__init__()
        self.layer4 = layer4
        if bn_last is not None:
            self.bn_last = bn_last
        self.in_feature, self.pool_size, self.out_channels = in_feature, REGION_SIZE * stride, out_channels
        self.frozen, self.checkpointing = frozen, checkpointing

    def forward(self, pooled: Tensor) -> Tensor:
        features = run_blocks(self.layer4, pooled, checkpointing=self.checkpointing)
        return F.relu(self.bn_last(features)) if hasattr(self, "bn_last") else features

    def train(self, mode: bool = True) -> ResNetRegionHead:
        super().train(mode and not self.frozen)
        return self


class ResNetClassifier(ResNet):
    """The whole network: [N, 3, H, W] -> logits [N, num_classes], by global average pooling and one linear layer."""

    head_prefixes = ()

    def __init__(self, layout: Layout, style: BlockStyle, *, num_classes: int, **options: object) -> None:
        super().__init__(layout, style, **options)  # type: ignore[arg-type]
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(self.inplanes, num_classes)
        self.out_features = ("conv5_x",)

    def forward(self, images: Tensor) -> Tensor:  # type: ignore[override]
        features = super().forward(images)["conv5_x"]
        return self.fc(self.avgpool(features).flatten(1))


def _stage_strides(output_stride: int) -> tuple[int, int, int, int]:
    strides = {32: (1, 2, 2, 2), 16: (1, 2, 2, 1), 8: (1, 2, 1, 1)}
    if output_stride not in strides:
        raise InputError(f"output_stride={output_stride} is not possible; a ResNet takes 8, 16 or 32")
    return strides[output_stride]


def _dilations(rule: str, below: int, own: int) -> tuple[int, int]:
    """Of the first block of a stage: its first 3x3 (a bottleneck has no other) and its second."""
    return (own, own) if rule == "detectron2" else (below, own)


def _check_choice(option: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise InputError(f"{option}={value!r} is not known;{nearest(value, choices)} choose from {', '.join(choices)}")


def check_variant(variant: str) -> None:
    """Raises InputError for other than v1, v1.5, v2."""
    _check_choice("variant", variant, VARIANTS)


def _builder(name: str) -> Callable[..., Backbone]:
    def build(
        *,
        variant: str = "v1.5",
        norm: str = "batch",
        norm_eps: float | None = None,
        output_stride: int = 32,
        dilation_rule: str = "torchvision",
        in_channels: int = 3,
        checkpointing: bool = False,
        num_classes: int | None = None,
        shortcut: str = "B",
        shortcut_scale: float = 1.0,
        shortcut_gate: bool = False,
        stochastic_depth: float = 0.0,
        groups: int | None = None,
        width_per_group: int | None = None,
    ) -> Backbone:
        check_variant(variant)
        _check_choice("dilation_rule", dilation_rule, DILATION_RULES)
        layout = TABLE_1[name]
        style = BlockStyle(
            norm=norm_factory(norm, eps=norm_eps),
            bias=norm == "none",
            stride_in_3x3=variant != "v1",
            preactivation=variant == "v2",
            plain=layout.plain,
            shortcut=shortcut,
            shortcut_scale=shortcut_scale,
            shortcut_gate=shortcut_gate,
            groups=layout.groups if groups is None else groups,
            base_width=layout.base_width if width_per_group is None else width_per_group,
        )
        options: dict[str, Any] = {
            "output_stride": output_stride,
            "dilation_rule": dilation_rule,
            "in_channels": in_channels,
            "stochastic_depth": stochastic_depth,
            "checkpointing": checkpointing,
        }
        net = ResNetClassifier(layout, style, num_classes=num_classes, **options) if num_classes else ResNet(layout, style, **options)
        net.variant = variant if layout.block is Bottleneck or variant == "v2" else ""  # v1 and v1.5 differ in bottlenecks alone
        net.shortcut = "" if layout.plain else shortcut
        return net

    return build


for _name in TABLE_1:
    register_backbone(_name)(_builder(_name))
