"""From a segmentation config to a segmenter: the one place where its settings become modules."""

from __future__ import annotations

import dataclasses

from detection.build import backbone_options
from detection.preprocess import Preprocess
from detection.segmentation.config import SegmentationConfig
from detection.segmentation.data import IGNORED
from detection.segmentation.segmenter import Segmenter
from resbackbone.backbone import Preprocessing
from resbackbone.errors import InputError
from resbackbone.integrations.torchvision import segmentation_model


def build_segmenter(
    config: SegmentationConfig, num_classes: int, *, initial_weights: bool = True, preprocessing: Preprocessing | None = None
) -> Segmenter:
    """A segmenter for `num_classes` foreground classes, as `config.model` describes it.

    initial_weights=False: the backbone's weights are not read, since a whole segmenter's will be loaded over them; `preprocessing` is
    then the one those came with. Raises InputError.
    """
    if num_classes >= IGNORED:
        raise InputError(f"{num_classes} classes do not fit a label map, which has room for {IGNORED - 1}; leave some out of the data")
    model = config.model
    network = segmentation_model(
        model.head,
        model.backbone.name,
        num_classes=num_classes + 1,
        output_stride=model.output_stride,
        auxiliary=model.auxiliary is not None,
        **backbone_options(model.backbone, initial_weights),
    )
    preprocess = Preprocess(preprocessing or network.backbone.network.preprocessing, divisor=32)
    return Segmenter(network, preprocess, auxiliary_weight=model.auxiliary or 0.0)


def resolved_config(config: SegmentationConfig, segmenter: Segmenter) -> SegmentationConfig:
    """The config with what the backbone's weights decided, so that the segmenter can be built again without them: the norms' epsilon."""
    spec, found = config.model.backbone, segmenter.backbone.network.weights_eps
    if spec.norm_eps is not None or found is None:
        return config
    return dataclasses.replace(config, model=dataclasses.replace(config.model, backbone=dataclasses.replace(spec, norm_eps=found)))
