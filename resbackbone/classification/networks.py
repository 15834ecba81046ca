"""A config becomes a network and the preprocessing that travels with its weights; a trained file becomes a network again."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from resbackbone.backbone import Backbone, Preprocessing
from resbackbone.classification.config import ClassificationConfig, load_classification_config, parse_classification_config
from resbackbone.classification.recipe import Normalizer
from resbackbone.errors import InputError
from resbackbone.layers import NORM_EPS
from resbackbone.registry import create_classifier
from resbackbone.runtime.config import dump_config
from resbackbone.vgg import VGGClassifier
from resbackbone.weights import WeightsInfo
from resbackbone.weights.files import read_state_dict
from resbackbone.weights.formats import read_weights

_WHITE = 255.0
_HEAD_BIASES = ("fc.bias", "classifier.6.bias")


def build_classifier(config: ClassificationConfig, num_classes: int) -> Backbone:
    """The network of a run. Without weights, its preprocessing is what `data.normalize` says; with weights, theirs."""
    model = config.model
    net = create_classifier(
        model.name,
        num_classes=num_classes,
        variant=model.variant,
        norm=model.norm,
        weights=model.weights,
        checkpointing=model.checkpointing,
        **model.options,
    )
    if model.weights is None and config.data.normalize == "mean":
        mean = tuple(_WHITE * value for value in net.preprocessing.mean)
        net.preprocessing = Preprocessing(mean=mean, std=(1.0, 1.0, 1.0), input_range=_WHITE)
    return net


def normalizer_of(net: Backbone) -> Normalizer:
    """What turns RGB uint8 images into this network's input. Raises InputError for a network that expects BGR."""
    expected = net.preprocessing
    if expected.color_order != "RGB":
        raise InputError(f"{net.architecture} expects {expected.color_order}; convert its weights to RGB with tools/convert_weights.py")
    return Normalizer(mean=expected.mean, std=expected.std, input_range=expected.input_range)


def classifier_metadata(config: ClassificationConfig, net: Backbone, classes: Sequence[str]) -> dict[str, str]:
    """What travels with the weights: the facts that any network of ours reads (classes, preprocessing), and the run's config."""
    expected = net.preprocessing
    info = WeightsInfo(
        architecture=net.architecture,
        variant=net.variant,
        shortcut=net.shortcut,
        norm_eps=net.weights_eps or NORM_EPS,
        color_order=expected.color_order,
        mean=expected.mean,
        std=expected.std,
        input_range=expected.input_range,
        classes=tuple(classes),
    )
    return info.to_metadata() | {"config": dump_config(config)}


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A network from a weights file, the config to evaluate it with, and the names of its outputs (none: the file doesn't say)."""

    net: Backbone
    config: ClassificationConfig
    classes: tuple[str, ...]


def load_trained(weights: Path, config_file: Path | None, overrides: Sequence[str]) -> Trained:
    """The classifier in a weights file of ours (which carries its config), or in any other with a `--config` that names the network."""
    tensors, info = read_weights(weights)
    metadata = read_state_dict(weights)[1] if weights.suffix == ".safetensors" else {}
    if config_file is not None:
        config = load_classification_config(config_file, overrides)
    elif "config" in metadata:
        config = parse_classification_config(metadata["config"], source=str(weights), overrides=overrides)
    else:
        raise InputError(f"{weights} does not carry a config; give --config with the model.name and the data it belongs to")
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, weights=str(weights)))
    outputs = next((len(tensors[name]) for name in _HEAD_BIASES if name in tensors), None)
    if outputs is None:
        raise InputError(f"{weights} has no classifier ({', '.join(_HEAD_BIASES)}), only a backbone; give weights that tell classes apart")
    return Trained(net=build_classifier(config, outputs).eval(), config=config, classes=info.classes)


def dense_logits(net: Backbone, images: Tensor) -> Tensor:
    """[N, K] logits of images of any size, the network applied fully convolutionally and its scores averaged over positions (§3.4).

    A residual network's is the network itself: averaging before one linear layer or after it is the same. VGG-16's fully connected
    layers become a 7x7 and two 1x1 convolutions (Simonyan & Zisserman 2015, §3.2).
    """
    if not isinstance(net, VGGClassifier):
        return net(images)
    features: Any = net.features[-1](Backbone.forward(net, images)["conv5"])
    side = 7
    if min(features.shape[-2:]) < side:
        return net(images)
    first, *rest = (layer for layer in net.classifier if isinstance(layer, nn.Linear))
    hidden = F.conv2d(features, first.weight.view(first.out_features, features.shape[1], side, side), first.bias)
    for layer in rest:
        hidden = F.conv2d(F.relu(hidden), layer.weight[:, :, None, None], layer.bias)
    return hidden.mean((2, 3))
