"""Our networks as detectron2's backbones: plain for C4 and DC5, under a feature pyramid, and as LazyConfig's `bottom_up`.

>>> cfg = patch_config(model_zoo.get_config("COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml"), weights="resnet50.safetensors")
>>> model = build_model(cfg)

detectron2 finds what the imported modules registered and looks for nothing else, so importing this one comes first.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from resbackbone.backbone import Backbone
from resbackbone.errors import InputError, nearest
from resbackbone.integrations.hosting import HostedBackbone, prepare, unit_statistics
from resbackbone.registry import create_backbone

try:
    from detectron2.config import CfgNode
    from detectron2.layers import ShapeSpec
    from detectron2.modeling import BACKBONE_REGISTRY, FPN, ROI_HEADS_REGISTRY
    from detectron2.modeling import Backbone as DetectronBackbone
    from detectron2.modeling.backbone.fpn import LastLevelMaxPool, LastLevelP6P7
    from detectron2.modeling.roi_heads import Res5ROIHeads
except ImportError as error:
    raise InputError(
        "resbackbone.integrations.detectron2 needs detectron2, which no package registry has; "
        "install it as its own INSTALL.md says: pip install git+https://github.com/facebookresearch/detectron2"
    ) from error

BUILDERS = {  # theirs -> ours
    "build_resnet_backbone": "build_resbackbone",
    "build_resnet_fpn_backbone": "build_resbackbone_fpn",
    "build_retinanet_resnet_fpn_backbone": "build_resbackbone_retinanet_fpn",
}
NORMS = {"": "none", "FrozenBN": "frozen", "BN": "batch", "SyncBN": "sync", "nnSyncBN": "sync", "GN": "group"}
WHITE = 255.0
OPTIONS = "RESBACKBONE"  # of cfg.MODEL: what `create_backbone` takes, in capitals


class Resbackbone(HostedBackbone, DetectronBackbone):
    """Images -> {"res4": map, …}, the maps asked for. LazyConfig's pyramid reads the argument `out_features` by its name.

    Args:
        name: of our network; `options` are those of `create_backbone`: weights, variant, output_stride …
        out_features: "res2" to "res5", or our names.
        norm: "frozen" as detectron2's default; without `weights` a checkpoint has to bring its statistics.
        freeze_at: as detectron2 counts: 1 is the stem, 2 the stem and res2.
    """

    def __init__(
        self,
        name: str = "resnet50",
        *,
        out_features: Sequence[str] = ("res2", "res3", "res4", "res5"),
        norm: str = "frozen",
        freeze_at: int = 2,
        **options: Any,
    ) -> None:
        network = create_backbone(name, norm=norm, freeze_at=freeze_at, allow_random_frozen=True, **options)
        names = _their_names(network)
        for feature in out_features:
            if feature not in names:
                raise InputError(f"{name} has no feature {feature!r};{nearest(feature, names)} it has {', '.join(names)}")
        network.out_features = [names[feature] for feature in out_features]
        network.trim()
        super().__init__(prepare(network))
        self._out_features = list(out_features)
        self._ours = {feature: names[feature] for feature in out_features}
        infos = {feature: network.feature_info[ours] for feature, ours in self._ours.items()}
        self._out_feature_channels = {feature: info.channels for feature, info in infos.items()}
        self._out_feature_strides = {feature: info.stride for feature, info in infos.items()}

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        maps = self.network(images)
        return {feature: maps[ours] for feature, ours in self._ours.items()}

    def freeze(self, freeze_at: int = 0) -> Resbackbone:
        """Freeze the lowest stages, counted as detectron2 does, for good."""
        self.network.freeze(freeze_at)
        prepare(self.network)
        return self


@BACKBONE_REGISTRY.register()
def build_resbackbone(cfg: CfgNode, input_shape: ShapeSpec) -> Resbackbone:
    """The plain network, for C4 (res4) and DC5 (res5 with RES5_DILATION 2)."""
    return Resbackbone(**_options(cfg, input_shape.channels), out_features=cfg.MODEL.RESNETS.OUT_FEATURES)


@BACKBONE_REGISTRY.register()
def build_resbackbone_fpn(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """Under a pyramid with one more level, for Faster, Mask and Keypoint R-CNN."""
    return _fpn(cfg, build_resbackbone(cfg, input_shape), LastLevelMaxPool())


@BACKBONE_REGISTRY.register()
def build_resbackbone_retinanet_fpn(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """Under a pyramid with two more levels, for RetinaNet."""
    bottom_up = build_resbackbone(cfg, input_shape)
    return _fpn(cfg, bottom_up, LastLevelP6P7(bottom_up.output_shape()["res5"].channels, cfg.MODEL.FPN.OUT_CHANNELS))


@ROI_HEADS_REGISTRY.register()
class ResbackboneRes5ROIHeads(Res5ROIHeads):
    """The C4 head with our conv5_x and its weights; detectron2's builds a res5 of its own, a bottleneck's always."""

    @classmethod
    def _build_res5_block(cls, cfg: CfgNode) -> tuple[nn.Module, int]:
        options = _options(cfg, len(cfg.MODEL.PIXEL_MEAN))
        head = prepare(create_backbone(**options, allow_random_frozen=True)).split_region_head()
        return head, head.out_channels


def patch_config(cfg: CfgNode, name: str | None = None, **options: Any) -> CfgNode:
    """Let a configuration of detectron2's ResNets build ours, and give images as our weights want them; changes and returns `cfg`.

    Sets MODEL.BACKBONE.NAME, in C4 models ROI_HEADS.NAME, INPUT.FORMAT, PIXEL_MEAN, PIXEL_STD, STRIDE_IN_1X1 and RES2_OUT_CHANNELS, and
    empties MODEL.WEIGHTS, whose default has detectron2's names, of which none would match.

    Args:
        name: of our network; None: the ResNet of MODEL.RESNETS.DEPTH.
        options: those of `create_backbone`: weights, variant, norm, dilation_rule … Without `variant` it is v1.5, as most weights are.
    """
    builder = cfg.MODEL.BACKBONE.NAME
    if builder not in {*BUILDERS, *BUILDERS.values()}:
        raise InputError(
            f"MODEL.BACKBONE.NAME={builder} has no counterpart of ours;{nearest(builder, BUILDERS)} take one of {', '.join(BUILDERS)}"
        )
    given = {"name": name or f"resnet{cfg.MODEL.RESNETS.DEPTH}", "variant": "v1.5", **options}
    cfg.MODEL.BACKBONE.NAME = BUILDERS.get(builder, builder)
    if cfg.MODEL.ROI_HEADS.NAME == "Res5ROIHeads":
        cfg.MODEL.ROI_HEADS.NAME = "ResbackboneRes5ROIHeads"
    cfg.MODEL[OPTIONS] = CfgNode({key.upper(): str(value) if isinstance(value, Path) else value for key, value in given.items()})
    with torch.device("cpu" if given.get("weights") else "meta"):
        network = prepare(create_backbone(**_options(cfg, options.get("in_channels", 3)), allow_random_frozen=True))
    mean, std = unit_statistics(network.preprocessing)
    cfg.INPUT.FORMAT, cfg.MODEL.WEIGHTS = "RGB", ""
    cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD = [each * WHITE for each in mean], [each * WHITE for each in std]
    cfg.MODEL.RESNETS.STRIDE_IN_1X1 = network.variant == "v1"
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = next(info.channels for info in network.feature_info.values() if info.stride == 4)
    return cfg


def _options(cfg: CfgNode, in_channels: int) -> dict[str, Any]:
    """What `cfg` says of the network: in MODEL.RESBACKBONE, and else in MODEL.RESNETS."""
    theirs = cfg.MODEL.RESNETS
    if any(theirs.DEFORM_ON_PER_STAGE):
        raise InputError(
            "MODEL.RESNETS.DEFORM_ON_PER_STAGE asks for deformable convolutions, which our networks don't have; set all to False"
        )
    if theirs.NORM not in NORMS:
        raise InputError(
            f"MODEL.RESNETS.NORM={theirs.NORM!r} is not known;{nearest(theirs.NORM, NORMS)} choose from {', '.join(map(repr, NORMS))}"
        )
    options = {
        "name": f"resnet{theirs.DEPTH}",
        "variant": "v1" if theirs.STRIDE_IN_1X1 else "v1.5",
        "norm": NORMS[theirs.NORM],
        "freeze_at": cfg.MODEL.BACKBONE.FREEZE_AT,
        "in_channels": in_channels,
    }
    if theirs.RES5_DILATION == 2:
        options |= {"output_stride": 16, "dilation_rule": "detectron2"}
    if theirs.NUM_GROUPS > 1:
        options |= {"groups": theirs.NUM_GROUPS, "width_per_group": theirs.WIDTH_PER_GROUP}
    return options | {key.lower(): value for key, value in cfg.MODEL.get(OPTIONS, {}).items()}


def _fpn(cfg: CfgNode, bottom_up: Resbackbone, top: nn.Module) -> FPN:
    return FPN(
        bottom_up=bottom_up,
        in_features=cfg.MODEL.FPN.IN_FEATURES,
        out_channels=cfg.MODEL.FPN.OUT_CHANNELS,
        norm=cfg.MODEL.FPN.NORM,
        top_block=top,
        fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
    )


def _their_names(network: Backbone) -> dict[str, str]:
    """ "res2" … and our own names -> our names. Their "stem" is pooled, which no map of ours is."""
    ours = list(network.feature_info)
    return {f"res{number}": name for number, name in enumerate(ours[1:], 2)} | {name: name for name in ours}
