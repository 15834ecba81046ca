"""A feature pyramid over any backbone (Lin et al. 2017, Feature Pyramid Networks, §3), with torchvision's names and arithmetic."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from resbackbone.backbone import Backbone, FeatureInfo, Preprocessing
from resbackbone.errors import InputError

FINEST_STRIDE = 4  # p2; a finer level would cost four times p2 for objects of a few pixels


class FeaturePyramid(nn.Module):
    """Images [N, 3, H, W] -> {"p2": [N, out_channels, H/4, W/4], "p3": …}; level p_k has stride 2^k.

    Args:
        backbone: its `out_features` become `in_features`.
        in_features: the maps to build on, one per stride; None: of each stride from 4 up, the deepest.
        out_channels: of every level (256: §4.1).
        extra_level: a coarsest level more, every second cell of the last (§4.1, footnote 2).
    """

    def __init__(
        self, backbone: Backbone, *, in_features: Sequence[str] | None = None, out_channels: int = 256, extra_level: bool = True
    ) -> None:
        super().__init__()
        names = tuple(in_features) if in_features is not None else _deepest_of_each_stride(backbone.feature_info)
        backbone.out_features = names
        backbone.trim()
        self.backbone = backbone
        self.extra_level = extra_level
        self.feature_info = _level_info([backbone.feature_info[name] for name in backbone.out_features], out_channels, extra_level)
        self.out_features = tuple(self.feature_info)
        channels = [backbone.feature_info[name].channels for name in backbone.out_features]
        self.inner_blocks = nn.ModuleList(nn.Sequential(nn.Conv2d(count, out_channels, 1)) for count in channels)
        self.layer_blocks = nn.ModuleList(nn.Sequential(nn.Conv2d(out_channels, out_channels, 3, padding=1)) for _ in channels)
        for module in (*self.inner_blocks.modules(), *self.layer_blocks.modules()):
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_uniform_(module.weight, a=1)
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]

    @property
    def preprocessing(self) -> Preprocessing:
        """The backbone's."""
        return self.backbone.preprocessing

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """[N, 3, H, W] -> level name -> [N, out_channels, H/s, W/s], finest first."""
        laterals = [inner(features) for inner, features in zip(self.inner_blocks, self.backbone(images).values(), strict=True)]
        for finer in range(len(laterals) - 2, -1, -1):
            laterals[finer] = laterals[finer] + F.interpolate(laterals[finer + 1], size=laterals[finer].shape[-2:], mode="nearest")
        levels = [smooth(lateral) for smooth, lateral in zip(self.layer_blocks, laterals, strict=True)]
        if self.extra_level:
            levels.append(levels[-1][:, :, ::2, ::2])
        return dict(zip(self.out_features, levels, strict=True))


def _deepest_of_each_stride(feature_info: dict[str, FeatureInfo]) -> tuple[str, ...]:
    deepest = {info.stride: name for name, info in feature_info.items() if info.stride >= FINEST_STRIDE}
    if not deepest:
        raise InputError(f"a feature pyramid needs maps of stride {FINEST_STRIDE} or more; this backbone has {feature_info}")
    return tuple(deepest.values())


def _level_info(infos: list[FeatureInfo], channels: int, extra_level: bool) -> dict[str, FeatureInfo]:
    strides = [info.stride for info in infos]
    if strides != sorted(set(strides)) or any(stride & (stride - 1) for stride in strides):
        raise InputError(
            f"a feature pyramid needs one map per stride, each a power of two, not strides {strides}; choose other in_features"
        )
    if extra_level:
        strides.append(strides[-1] * 2)
    return {f"p{stride.bit_length() - 1}": FeatureInfo(channels, stride) for stride in strides}
