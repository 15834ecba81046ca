"""Residual networks for ImageNet, as in Table 1 of He et al. 2015, Deep Residual Learning for Image Recognition.

State-dict keys are torchvision's (`conv1 bn1 layer1 … layer4 fc`), so its weights load as they are. Shapes: N images, C channels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

from torch import Tensor, nn

from resbackbone.backbone import Backbone, FeatureInfo, RegionHead, imagenet_preprocessing, run_blocks
from resbackbone.errors import InputError, nearest
from resbackbone.layers import NormFactory, conv_norm, initialize, norm_factory
from resbackbone.registry import register_backbone

STEM_WIDTH = 64
STAGE_WIDTHS = (64, 128, 256, 512)  # conv2_x … conv5_x, before a bottleneck's fourfold expansion
LAYERS = {"conv2_x": "layer1", "conv3_x": "layer2", "conv4_x": "layer3", "conv5_x": "layer4"}
VARIANTS = ("v1", "v1.5")
DILATION_RULES = ("torchvision", "detectron2")
REGION_SIZE = 7  # cells of conv5_x per region and side, as on a whole 224 x 224 image


@dataclass(frozen=True, kw_only=True)
class BlockStyle:
    """What all blocks of one network share."""

    norm: NormFactory
    bias: bool  # convolutions have one only where no norm follows
    stride_in_3x3: bool  # "v1.5", torchvision's; the paper's own release strides in the first 1x1
    groups: int = 1
    base_width: int = 64  # ResNeXt and wide networks: the 3x3 of conv2_x has groups * base_width channels


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut (Figure 2; Figure 5, left). A strided or wider one projects its shortcut (option B)."""

    expansion = 1

    def __init__(self, in_channels: int, width: int, *, stride: int, dilations: tuple[int, int], style: BlockStyle) -> None:
        super().__init__()
        if style.groups != 1 or style.base_width != STEM_WIDTH:
            raise InputError("groups and base_width need bottleneck blocks: resnet50 and deeper")
        self.conv1 = _conv(in_channels, width, size=3, stride=stride, dilation=dilations[0], bias=style.bias)
        self.bn1 = style.norm(width)
        self.conv2 = _conv(width, width, size=3, dilation=dilations[1], bias=style.bias)
        self.bn2 = style.norm(width)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _projection(in_channels, width, stride, style)

    def forward(self, features: Tensor) -> Tensor:
        """[N, in_channels, H, W] -> [N, width, H / stride, W / stride]."""
        residual = self.relu(conv_norm(self.conv1, self.bn1, features))
        residual = conv_norm(self.conv2, self.bn2, residual)
        return self.relu(residual + _shortcut(self.downsample, features))


class Bottleneck(nn.Module):
    """1x1 down, 3x3, 1x1 up, and a shortcut (Figure 5, right)."""

    expansion = 4

    def __init__(self, in_channels: int, width: int, *, stride: int, dilations: tuple[int, int], style: BlockStyle) -> None:
        super().__init__()
        inner, out_channels = width * style.base_width // 64 * style.groups, width * self.expansion
        stride_1x1, stride_3x3 = (1, stride) if style.stride_in_3x3 else (stride, 1)
        self.conv1 = _conv(in_channels, inner, size=1, stride=stride_1x1, bias=style.bias)
        self.bn1 = style.norm(inner)
        self.conv2 = _conv(inner, inner, size=3, stride=stride_3x3, dilation=dilations[0], groups=style.groups, bias=style.bias)
        self.bn2 = style.norm(inner)
        self.conv3 = _conv(inner, out_channels, size=1, bias=style.bias)
        self.bn3 = style.norm(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _projection(in_channels, out_channels, stride, style)

    def forward(self, features: Tensor) -> Tensor:
        """[N, in_channels, H, W] -> [N, 4 width, H / stride, W / stride]."""
        residual = self.relu(conv_norm(self.conv1, self.bn1, features))
        residual = self.relu(conv_norm(self.conv2, self.bn2, residual))
        residual = conv_norm(self.conv3, self.bn3, residual)
        return self.relu(residual + _shortcut(self.downsample, features))


@dataclass(frozen=True)
class Layout:
    """One column of Table 1: the block, how many of it conv2_x … conv5_x have, and ResNeXt's two numbers."""

    block: type[BasicBlock] | type[Bottleneck]
    depths: tuple[int, int, int, int]
    groups: int = 1
    base_width: int = 64


TABLE_1 = {
    "resnet18": Layout(BasicBlock, (2, 2, 2, 2)),
    "resnet34": Layout(BasicBlock, (3, 4, 6, 3)),
    "resnet50": Layout(Bottleneck, (3, 4, 6, 3)),
    "resnet101": Layout(Bottleneck, (3, 4, 23, 3)),
    "resnet152": Layout(Bottleneck, (3, 8, 36, 3)),
    # Xie et al. 2017, Table 1; Zagoruyko & Komodakis 2016
    "resnext50_32x4d": Layout(Bottleneck, (3, 4, 6, 3), groups=32, base_width=4),
    "wide_resnet50_2": Layout(Bottleneck, (3, 4, 6, 3), base_width=128),
}


class ResNet(Backbone):
    """conv1 (7x7, stride 2), 3x3 max pooling, then four stages of residual blocks; maps conv1, conv2_x … conv5_x.

    Args:
        layout: a column of TABLE_1.
        style: what its blocks share.
        output_stride: 32, or 16 / 8, where the last one or two stages dilate instead of striding.
        dilation_rule: whether the first block of a dilated stage keeps the dilation below it ("torchvision", timm) or takes the
            new one ("detectron2", mmdetection). Same keys, different outputs: weights want the rule they were trained with.
        in_channels: of the images.
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
        self.conv1 = nn.Conv2d(in_channels, STEM_WIDTH, 7, stride=2, padding=3, bias=style.bias)
        self.bn1 = style.norm(STEM_WIDTH)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        channels, dilation = STEM_WIDTH, 1
        for name, width, depth, stride in zip(LAYERS, STAGE_WIDTHS, layout.depths, strides, strict=True):
            below = dilation
            dilation *= 2 if stride == 1 and name != "conv2_x" else 1
            first = _dilations(dilation_rule, below, dilation)
            blocks = [layout.block(channels, width, stride=stride, dilations=first, style=style)]
            channels = width * expansion
            blocks += [layout.block(channels, width, stride=1, dilations=(dilation, dilation), style=style) for _ in range(1, depth)]
            self.add_module(LAYERS[name], nn.Sequential(*blocks))
        initialize(self)

    def run_stage(self, name: str, features: Tensor) -> Tensor:
        if name == "conv1":
            return self.relu(conv_norm(self.conv1, self.bn1, features))
        if name == "conv2_x":
            features = self.maxpool(features)
        return run_blocks(cast(nn.Sequential, getattr(self, LAYERS[name])), features, checkpointing=self.checkpointing)

    def stage_modules(self, name: str) -> tuple[nn.Module, ...]:
        return (self.conv1, self.bn1) if name == "conv1" else (getattr(self, LAYERS[name]),)

    def region_head_available(self) -> bool:
        return "conv5_x" in self.feature_info

    def split_region_head(self) -> RegionHead:
        """Move conv5_x out, to run on each region pooled from conv4_x (He et al. 2015, appendix A)."""
        if not self.region_head_available():
            raise InputError(f"{self.architecture} has no conv5_x (any more) to run on each region")
        stride = self.feature_info["conv5_x"].stride // self.feature_info["conv4_x"].stride
        head = ResNetRegionHead(
            cast(nn.Module, self.layer4),
            stride=stride,
            out_channels=self.feature_info["conv5_x"].channels,
            frozen=self.frozen_stages == len(self.feature_info),
            checkpointing=self.checkpointing,
        )
        self.out_features = ("conv4_x",)
        self.trim()
        return head


class ResNetRegionHead(RegionHead):
    """conv5_x on regions of conv4_x: [R, C, 14, 14] -> [R, out_channels, 7, 7]."""

    in_feature = "conv4_x"

    def __init__(self, layer4: nn.Module, *, stride: int, out_channels: int, frozen: bool, checkpointing: bool) -> None:
        super().__init__()
        self.layer4 = layer4
        self.pool_size, self.out_channels = REGION_SIZE * stride, out_channels
        self.frozen, self.checkpointing = frozen, checkpointing

    def forward(self, pooled: Tensor) -> Tensor:
        return run_blocks(cast(nn.Sequential, self.layer4), pooled, checkpointing=self.checkpointing)

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


def _conv(
    in_channels: int, out_channels: int, *, size: int, stride: int = 1, dilation: int = 1, groups: int = 1, bias: bool = False
) -> nn.Conv2d:
    padding = dilation * (size // 2)
    return nn.Conv2d(in_channels, out_channels, size, stride=stride, padding=padding, dilation=dilation, groups=groups, bias=bias)


def _projection(in_channels: int, out_channels: int, stride: int, style: BlockStyle) -> nn.Sequential | None:
    """Option B (§3.3, Equation 2): a strided 1x1 convolution where the shapes differ, else the identity."""
    if stride == 1 and in_channels == out_channels:
        return None
    return nn.Sequential(_conv(in_channels, out_channels, size=1, stride=stride, bias=style.bias), style.norm(out_channels))


def _shortcut(downsample: nn.Sequential | None, features: Tensor) -> Tensor:
    return features if downsample is None else conv_norm(cast(nn.Conv2d, downsample[0]), downsample[1], features)


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


def _builder(name: str) -> Callable[..., Backbone]:
    def build(
        *,
        variant: str = "v1.5",
        norm: str = "batch",
        norm_eps: float | None = None,
        dilation_rule: str = "torchvision",
        num_classes: int | None = None,
        **options: object,
    ) -> Backbone:
        _check_choice("variant", variant, VARIANTS)
        _check_choice("dilation_rule", dilation_rule, DILATION_RULES)
        layout = TABLE_1[name]
        style = BlockStyle(
            norm=norm_factory(norm, eps=norm_eps),
            bias=norm == "none",
            stride_in_3x3=variant == "v1.5",
            groups=layout.groups,
            base_width=layout.base_width,
        )
        options["dilation_rule"] = dilation_rule
        net = ResNetClassifier(layout, style, num_classes=num_classes, **options) if num_classes else ResNet(layout, style, **options)  # type: ignore[arg-type]
        net.variant = variant if layout.block is Bottleneck else ""  # basic blocks are the same in both
        return net

    return build


for _name in TABLE_1:
    register_backbone(_name)(_builder(_name))
