"""From a config to a detector: the one place where settings become modules. Channels, strides and anchors follow from the backbone."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from torch import nn

from detection.anchors import anchor_grid
from detection.config import BackboneConfig, DetectionConfig, ModelConfig
from detection.context import ContextRoIHead
from detection.faster_rcnn import FasterRCNN
from detection.mask_head import MaskHead, RegionTop
from detection.pooling import RegionPooler
from detection.preprocess import Preprocess
from detection.roi_head import RoIHead, TwoFCHead
from detection.rpn import Limits, ProposalNetwork
from detection.steps import SteppedRCNN, Steps
from resbackbone.backbone import Backbone, FeatureInfo, Preprocessing
from resbackbone.errors import InputError
from resbackbone.fpn import FeaturePyramid
from resbackbone.registry import create_backbone
from resbackbone.resnet import ResNetRegionHead

# Boxes by score before NMS. On one map Ren et al. 2015's code takes 12000 and 6000; a pyramid takes these of each level (Lin et al. 2017).
CANDIDATES = {"c4": (12000, 6000), "dc5": (12000, 6000), "fpn": (2000, 1000)}
REGIONS_PER_PASS = 300  # conv5_x on more regions at a time needs gigabytes


def build_detector(
    config: DetectionConfig, num_classes: int, *, initial_weights: bool = True, preprocessing: Preprocessing | None = None
) -> FasterRCNN:
    """A Faster R-CNN for `num_classes` foreground classes, as `config.model` describes it.

    initial_weights=False: the backbone's weights are not read, since a whole detector's will be loaded over them; `preprocessing` is
    then the one those came with.
    """
    model = config.model
    backbone = _backbone(model, initial_weights)
    trunk, box_head, pool_size = _HEADS[model.head](backbone, model)
    levels: dict[str, FeatureInfo] = {name: trunk.feature_info[name] for name in trunk.out_features}
    candidates_train, candidates_test = CANDIDATES[model.head]
    rpn = ProposalNetwork(
        next(iter(levels.values())).channels,
        anchor_grid(levels, sizes=model.anchor_sizes),
        train_limits=Limits(candidates=model.roi.candidates_train or candidates_train, proposals=model.roi.proposals_train),
        test_limits=Limits(candidates=model.roi.candidates_test or candidates_test, proposals=model.roi.proposals_test),
    )
    pooled_levels = _pooled(levels)
    runs_conv5 = not isinstance(box_head, TwoFCHead)
    roi_head = (ContextRoIHead if model.test.context else RoIHead)(
        RegionPooler(pooled_levels, op=model.roi.op, output_size=pool_size, channels_last=runs_conv5),  # FC layers flatten channels first
        box_head,
        num_classes=num_classes,
        samples=model.roi.samples or (128 if runs_conv5 else 512),
        score_threshold=model.test.score_threshold,
        nms_iou=model.test.nms,
        detections=model.test.detections,
        regions_per_pass=REGIONS_PER_PASS if runs_conv5 else None,
    )
    parts = trunk, rpn, roi_head, Preprocess(preprocessing or backbone.preprocessing, divisor=32)
    mask_head = _mask_head(model, roi_head, pooled_levels, num_classes)
    steps = chosen_steps(config)
    return SteppedRCNN(*parts, mask_head=mask_head, steps=steps) if steps else FasterRCNN(*parts, mask_head=mask_head)


def chosen_steps(config: DetectionConfig) -> Steps:
    """The steps at test time that leave the network as it is: all but context."""
    test, data = config.model.test, config.data
    base = None if test.scales is None else (data.min_size[-1], data.max_size)  # the scales come from what `read_size` keeps
    return Steps(refine=test.refine, scales=test.scales, merge=test.scale_merge, flip=test.flip, base=base)


def resolved_config(config: DetectionConfig, detector: FasterRCNN) -> DetectionConfig:
    """The config with what the backbone's weights decided, so that the detector can be built again without them: the norms' epsilon."""
    backbone = next(module for module in detector.modules() if isinstance(module, Backbone))
    if config.model.backbone.norm_eps is not None or backbone.weights_eps is None:
        return config
    spec = dataclasses.replace(config.model.backbone, norm_eps=backbone.weights_eps)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, backbone=spec))


def _backbone(model: ModelConfig, initial_weights: bool) -> Backbone:
    output_stride = 16 if model.head == "dc5" else 32
    return create_backbone(model.backbone.name, output_stride=output_stride, **backbone_options(model.backbone, initial_weights))


def backbone_options(spec: BackboneConfig, initial_weights: bool) -> dict[str, Any]:
    """What `create_backbone` is to be told of a config's backbone, but its name and output stride."""
    return {
        "weights": spec.weights if initial_weights else None,
        "variant": spec.variant,
        "norm": spec.norm,
        "norm_eps": spec.norm_eps,
        "freeze_at": spec.freeze_at,
        "dilation_rule": spec.dilation_rule,
        "checkpointing": spec.checkpointing,
        "allow_random_frozen": not initial_weights,
        **spec.options,
    }


def _c4(backbone: Backbone, model: ModelConfig) -> tuple[Backbone, nn.Module, int]:
    """The paper's (appendix A): conv1 … conv4_x shared, conv5_x on each region; VGG-16's own: fc6 and fc7 on each region."""
    if not backbone.region_head_available():
        return _single_map(backbone, model)
    head = backbone.split_region_head()
    return backbone, head, model.roi.pool_size or head.pool_size


def _single_map(backbone: Backbone, model: ModelConfig) -> tuple[Backbone, nn.Module, int]:
    """The deepest map of stride 16, with two FC layers on each region: DC5, and C4 where a backbone has no stage to run on regions."""
    of_stride_16 = [name for name, info in backbone.feature_info.items() if info.stride == 16]
    if not of_stride_16:
        strides = {name: info.stride for name, info in backbone.feature_info.items()}
        raise InputError(
            f"model.head={model.head} needs a feature map of stride 16; {model.backbone.name} has {strides}. Use model.head=fpn"
        )
    backbone.out_features = (of_stride_16[-1],)
    backbone.trim()
    pool_size = model.roi.pool_size or 7
    channels = backbone.feature_info[of_stride_16[-1]].channels
    return backbone, TwoFCHead(channels, pool_size, width=model.roi.head_width), pool_size


def _fpn(backbone: Backbone, model: ModelConfig) -> tuple[FeaturePyramid, nn.Module, int]:
    """Feature pyramid (Lin et al. 2017): p2 … p6 for proposals, p2 … p5 for regions."""
    pyramid = FeaturePyramid(backbone)
    pool_size = model.roi.pool_size or 7
    channels = next(iter(pyramid.feature_info.values())).channels
    return pyramid, TwoFCHead(channels, pool_size, width=model.roi.head_width), pool_size


Trunk = Backbone | FeaturePyramid
_HEADS: dict[str, Callable[[Backbone, ModelConfig], tuple[Trunk, nn.Module, int]]] = {"c4": _c4, "dc5": _single_map, "fpn": _fpn}


def _pooled(levels: dict[str, FeatureInfo]) -> dict[str, FeatureInfo]:
    """The levels regions are pooled from: all but the pyramid's extra one, which only proposes."""
    return levels if len(levels) == 1 else dict(list(levels.items())[:-1])


def _mask_head(model: ModelConfig, roi_head: RoIHead, levels: dict[str, FeatureInfo], num_classes: int) -> MaskHead | None:
    """On residual C4 the branch goes on from the region head's conv5_x, elsewhere it has four convolutions of its own."""
    if not model.mask:
        return None
    if isinstance(roi_head.box_head, ResNetRegionHead):
        top = RegionTop(roi_head.pooler, roi_head.box_head)
        return MaskHead(top, roi_head.box_head.out_channels, num_classes=num_classes, depth=0)
    channels = next(iter(levels.values())).channels
    return MaskHead(RegionPooler(levels, op=model.roi.op, output_size=14), channels, num_classes=num_classes)
