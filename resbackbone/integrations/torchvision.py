"""Our backbones in torchvision's detection and segmentation models. State dicts have torchvision's names, so they move both ways.

>>> backbone = fpn_backbone("resnet101", weights="torchvision", norm="frozen", freeze_at=2)
>>> FasterRCNN(backbone, num_classes=3, **normalization(backbone))
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from resbackbone.backbone import Backbone, FeatureInfo
from resbackbone.errors import InputError, nearest
from resbackbone.integrations.hosting import HostedBackbone, prepare, unit_statistics, warn_if_normalised_twice
from resbackbone.registry import create_backbone

try:
    from torchvision.models.detection.anchor_utils import AnchorGenerator
    from torchvision.models.segmentation import FCN, DeepLabV3
    from torchvision.models.segmentation.deeplabv3 import DeepLabHead
    from torchvision.models.segmentation.fcn import FCNHead
    from torchvision.ops.feature_pyramid_network import ExtraFPNBlock, FeaturePyramidNetwork, LastLevelMaxPool, LastLevelP6P7
except ImportError as error:
    raise InputError("resbackbone.integrations.torchvision needs torchvision; pip install torchvision") from error

EXTRA_LEVELS = {"pool": ("pool",), "p6p7": ("p6", "p7"), None: ()}  # the names torchvision's models know
FINEST_STRIDE = 4
SEGMENTERS = ("fcn", "deeplabv3")
ATROUS_PX = (96, 192, 288)  # what DeepLabV3's rates span in the image: 12, 24, 36 cells of stride 8 (Chen et al. 2017, §4.1)


class FPNBackbone(nn.Module):
    """Images [N, C, H, W] -> {"0": [N, out_channels, H/s, W/s], "1": …} and the extra levels, finest first.

    `feature_info` has each level's channels and stride.

    Args:
        body: the network; what lies above the last map asked for is removed from it.
        returned: its maps to build on, one per stride; None: of each stride from 4 up, the deepest.
        extra: coarser levels on top. "pool": one, for Faster, Mask and Keypoint R-CNN; "p6p7": two, for RetinaNet and FCOS; None.
        out_channels: of every level.
        norm_layer: of the pyramid's convolutions, as in torchvision's _v2 models; None: none.
    """

    def __init__(
        self,
        body: Backbone,
        *,
        returned: Sequence[str] | None = None,
        extra: str | None = "pool",
        out_channels: int = 256,
        norm_layer: Callable[..., nn.Module] | None = None,
    ) -> None:
        super().__init__()
        if extra not in EXTRA_LEVELS:
            raise InputError(f"extra={extra!r} is not known;{nearest(str(extra), ('pool', 'p6p7'))} choose from 'pool', 'p6p7', None")
        body.out_features = _deepest_of_each_stride(body) if returned is None else tuple(returned)
        body.trim()
        self.body = prepare(body)
        self._has_seen_images = False
        self.out_channels = out_channels
        infos = [body.feature_info[name] for name in body.out_features]
        self.feature_info = _level_info(body, infos, out_channels, EXTRA_LEVELS[extra])
        self.fpn = FeaturePyramidNetwork(
            [info.channels for info in infos], out_channels, extra_blocks=_extra_blocks(extra, out_channels), norm_layer=norm_layer
        )

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        if not self._has_seen_images:
            warn_if_normalised_twice(images, self.body.preprocessing)
            self._has_seen_images = True
        maps = self.body(images).values()
        return self.fpn({str(number): features for number, features in enumerate(maps)})


def fpn_backbone(
    name: str = "resnet50",
    *,
    returned: Sequence[str] | None = None,
    extra: str | None = "pool",
    out_channels: int = 256,
    norm_layer: Callable[..., nn.Module] | None = None,
    **options: Any,
) -> FPNBackbone:
    """What torchvision's FasterRCNN, MaskRCNN, KeypointRCNN, RetinaNet and FCOS take as `backbone`.

    See FPNBackbone for the named arguments; `options` are those of `create_backbone`: weights, norm, freeze_at, variant …
    """
    _refuse_out_features(options, "returned= says which maps the pyramid is built on")
    body = create_backbone(name, **options)
    return FPNBackbone(body, returned=returned, extra=extra, out_channels=out_channels, norm_layer=norm_layer)


def anchor_generator(
    backbone: FPNBackbone, *, size_per_stride: float = 8, octaves: int = 1, aspect_ratios: Sequence[float] = (0.5, 1.0, 2.0)
) -> AnchorGenerator:
    """Anchors for as many levels as `backbone` has; torchvision's own defaults serve five.

    Args:
        size_per_stride: an anchor's side in cells: 8 as in torchvision's Faster R-CNN, 4 in RetinaNet, 1 in FCOS.
        octaves: sizes per level, up to twice the first: 1 in Faster R-CNN and FCOS, 3 in RetinaNet.
        aspect_ratios: height / width; FCOS has (1.0,).
    """
    sides = [size_per_stride * info.stride for info in backbone.feature_info.values()]
    sizes = tuple(tuple(int(side * 2 ** (step / octaves)) for step in range(octaves)) for side in sides)
    return AnchorGenerator(sizes, (tuple(aspect_ratios),) * len(sizes))


def normalization(backbone: FPNBackbone) -> dict[str, list[float]]:
    """`image_mean` and `image_std` for a detection model, which normalises images itself: those the backbone's weights expect."""
    mean, std = unit_statistics(backbone.body.preprocessing)
    return {"image_mean": mean, "image_std": std}


def levels_table(levels: Mapping[str, FeatureInfo], anchors: Sequence[Sequence[float]] = ()) -> str:
    """A line a level: its name, channels, stride in pixels, and where given the sides of its anchors in pixels."""
    rows = [("level", "channels", "stride", *(["anchors"] if anchors else []))]
    for number, (name, info) in enumerate(levels.items()):
        sides = ", ".join(f"{side:g}" for side in anchors[number]) if number < len(anchors) else "none"
        rows.append((name, str(info.channels), str(info.stride), *([sides] if anchors else [])))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)


def check_fit(model: Any) -> str:
    """The levels of a torchvision detector on an FPNBackbone and its anchors on them, as a table to print.

    Raises InputError, with that table and what to pass, where the model has anchors for another number of levels or leaves some out of
    region pooling: torchvision itself stops at an assertion or says nothing.
    """
    backbone, part = model.backbone, model.rpn if hasattr(model, "rpn") else model
    if not isinstance(backbone, FPNBackbone) or not hasattr(part, "anchor_generator"):
        raise InputError(f"{type(model).__name__} is no detector of torchvision's on an FPNBackbone; build one with fpn_backbone(...)")
    sizes, levels = part.anchor_generator.sizes, backbone.feature_info
    table = levels_table(levels, sizes)
    if len(sizes) != len(levels):
        option = "anchor_generator" if part is model else "rpn_anchor_generator"
        raise InputError(f"there are {len(levels)} levels and anchors for {len(sizes)}; pass {option}=anchor_generator(backbone)\n{table}")
    pooled = model.roi_heads.box_roi_pool.featmap_names if hasattr(model, "roi_heads") else list(levels)
    left_out = [name for name in levels if name.isdigit() and name not in pooled]
    if left_out:
        named = [name for name in levels if name.isdigit()]
        raise InputError(
            f"regions are pooled from levels {pooled}, never from {left_out}; pass box_roi_pool=MultiScaleRoIAlign({named}, 7, 2)\n{table}"
        )
    return table


class SegmentationBackbone(HostedBackbone):
    """The last map of a network as "out", the one below it as "aux" if asked for."""

    def __init__(self, network: Backbone, *, auxiliary: bool) -> None:
        network.out_features = list(network.feature_info)[-2 if auxiliary else -1 :]
        super().__init__(prepare(network))

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        maps = list(self.network(images).values())
        return dict(zip(("out", "aux"), reversed(maps), strict=False))


def segmentation_model(
    head: str,
    name: str = "resnet50",
    *,
    num_classes: int = 21,
    output_stride: int = 8,
    auxiliary: bool = False,
    **options: Any,
) -> FCN | DeepLabV3:
    """torchvision's FCN or DeepLabV3 on a network of ours: normalised images [N, C, H, W] -> {"out": [N, num_classes, H, W]}.

    Args:
        head: "fcn" or "deeplabv3".
        name: of the network; `options` are those of `create_backbone`: weights, norm, freeze_at, variant …
        num_classes: with the background; VOC's 20 and one.
        output_stride: of the last map: 8, 16 or 32. DeepLabV3's rates follow it: 12, 24, 36 at 8 and 6, 12, 18 at 16.
        auxiliary: a second FCN head on the map below (conv4_x), as "aux", for the auxiliary loss.
    """
    if head not in SEGMENTERS:
        raise InputError(f"there is no head {head!r};{nearest(head, SEGMENTERS)} choose from {', '.join(SEGMENTERS)}")
    _refuse_out_features(options, "the heads take the topmost maps")
    backbone = SegmentationBackbone(create_backbone(name, output_stride=output_stride, **options), auxiliary=auxiliary)
    infos = [backbone.network.feature_info[feature] for feature in backbone.network.out_features]
    channels, stride = infos[-1].channels, infos[-1].stride
    auxiliary_head = FCNHead(infos[0].channels, num_classes) if auxiliary else None
    if head == "fcn":
        return FCN(backbone, FCNHead(channels, num_classes), auxiliary_head)
    rates = [span // stride for span in ATROUS_PX]
    return DeepLabV3(backbone, DeepLabHead(channels, num_classes, rates), auxiliary_head)


def _refuse_out_features(options: dict[str, Any], instead: str) -> None:
    if "out_features" in options:
        raise InputError(f"out_features={options['out_features']!r} has no place here; leave it out: {instead}")


def _deepest_of_each_stride(body: Backbone) -> tuple[str, ...]:
    deepest = {info.stride: name for name, info in body.feature_info.items() if info.stride >= FINEST_STRIDE}
    if not deepest:
        raise InputError(f"{body.architecture} has no map of stride {FINEST_STRIDE} or more; say which to take with returned=")
    return tuple(deepest.values())


def _level_info(body: Backbone, infos: list[FeatureInfo], channels: int, extra: tuple[str, ...]) -> dict[str, FeatureInfo]:
    strides = [info.stride for info in infos]
    if strides != sorted(set(strides)):
        raise InputError(
            f"the maps {', '.join(body.out_features)} have strides {strides}, and a pyramid needs one map per stride; "
            f"leave some out of returned=\n{levels_table(body.feature_info)}"
        )
    strides += [strides[-1] * 2**number for number in range(1, len(extra) + 1)]
    names = [*map(str, range(len(infos))), *extra]
    return {name: FeatureInfo(channels, stride) for name, stride in zip(names, strides, strict=True)}


def _extra_blocks(extra: str | None, channels: int) -> ExtraFPNBlock | None:
    if extra == "p6p7":
        return LastLevelP6P7(channels, channels)
    return LastLevelMaxPool() if extra == "pool" else None
