"""A config becomes a network and the preprocessing that travels with its weights; a trained file becomes a network again."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from resbackbone.backbone import Backbone, Preprocessing
from resbackbone.classification.config import (
    ClassificationConfig,
    ModelConfig,
    load_classification_config,
    parse_classification_config,
)
from resbackbone.classification.recipe import Normalizer
from resbackbone.convert import create_from_file
from resbackbone.errors import InputError
from resbackbone.layers import NORM_EPS, set_norm_eps
from resbackbone.registry import create_classifier
from resbackbone.runtime.checkpoint import STATE_FILE, load_checkpoint
from resbackbone.runtime.config import dump_config
from resbackbone.vgg import VGGClassifier
from resbackbone.weights import Weights, WeightsInfo, load_weights, open_weights
from resbackbone.weights.files import first_bytes, read_state_dict
from resbackbone.weights.formats import COUNTER, read_weights

_WHITE = 255.0
_HEADS = ("fc", "classifier.6")  # the module that tells classes apart, in a residual network and in VGG-16
_ZIP = b"PK"  # what checkpoints begin with, and torch's files since 1.6
_AVERAGED = "module."  # before the names of the moving average
_logger = logging.getLogger(__name__)


def build_classifier(config: ClassificationConfig, num_classes: int) -> Backbone:
    """The network of a run. Its preprocessing is its weights'; without any, what `data.normalize` says.

    Of weights for another number of classes it takes everything but the head, which starts anew; `load_report` says so.
    """
    source, net = config.model.weights, _create(config.model, num_classes)
    if source is None:
        net.preprocessing = _configured_preprocessing(config, net)
        return net
    saved = _read_checkpoint(Path(source))
    weights = open_weights(net, source) if saved is None else _delivered(saved, source)
    outputs = _outputs(weights.tensors)
    if outputs is None or outputs == num_classes:
        return _load(net, weights)
    whole = _load(_create(config.model, outputs), weights)
    head = next(name for name in _HEADS if f"{name}.bias" in weights.tensors)
    whole.set_submodule(head, net.get_submodule(head))
    whole.load_report += f"; its head tells {outputs} classes apart, so that of {num_classes} starts anew"
    return whole


def normalizer_of(net: Backbone) -> Normalizer:
    """What turns RGB uint8 images into this network's input. Raises InputError for a network that expects BGR."""
    expected = net.preprocessing
    if expected.color_order != "RGB":
        raise InputError(f"{net.architecture} expects {expected.color_order}; convert its weights to RGB with tools/convert_weights.py")
    return Normalizer(mean=expected.mean, std=expected.std, input_range=expected.input_range)


def classifier_metadata(config: ClassificationConfig, net: Backbone, classes: Sequence[str]) -> dict[str, str]:
    """What travels with the weights: the facts that any network of ours reads (classes, preprocessing), and the run's config."""
    return _info_of(net, classes).to_metadata() | {"config": dump_config(config)}


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A network from a weights file, the config to evaluate it with, how many outputs it has and their names (none: it doesn't say)."""

    net: Backbone
    config: ClassificationConfig
    outputs: int
    classes: tuple[str, ...]


def load_trained(weights: Path, config_file: Path | None, overrides: Sequence[str]) -> Trained:
    """The classifier in a weights file or a checkpoint of ours, or in any other file with a `--config` that names the network.

    Ours carry their config: it says which network they hold, also where `config_file` says how to judge it.
    """
    saved = _read_checkpoint(weights)
    metadata = read_state_dict(weights)[1] if weights.suffix == ".safetensors" else {}
    text = metadata.get("config") if saved is None else saved["config"]
    own = None if text is None else parse_classification_config(text, source=str(weights), overrides=overrides)
    config = own if config_file is None else load_classification_config(config_file, overrides)
    if config is None:
        raise InputError(f"{weights} does not carry a config; give --config with the model.name and the data it belongs to")
    content = _content_of(weights) if saved is None else _delivered(saved, str(weights))
    outputs = _outputs(content.tensors)
    if outputs is None:
        biases = ", ".join(f"{name}.bias" for name in _HEADS)
        raise InputError(f"{weights} has no classifier ({biases}), only a backbone; give weights that tell classes apart")
    model = config.model if own is None else own.model
    net = _create(model, outputs)
    if own is None and not _is_of(content, net):
        model = _recognized(weights, content.info, model)
        net = _create(model, outputs)
    config = dataclasses.replace(config, model=dataclasses.replace(model, weights=str(weights)))
    _load(net, open_weights(net, weights) if saved is None else content)
    if not content.info.mean:
        _logger.warning("%s", net.load_report)
    return Trained(net=net.eval(), config=config, outputs=outputs, classes=content.info.classes)


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


def _create(model: ModelConfig, num_classes: int) -> Backbone:
    return create_classifier(
        model.name, num_classes=num_classes, variant=model.variant, norm=model.norm, checkpointing=model.checkpointing, **model.options
    )


def _configured_preprocessing(config: ClassificationConfig, net: Backbone) -> Preprocessing:
    if config.data.normalize == "mean_std":
        return net.preprocessing
    mean = tuple(_WHITE * value for value in net.preprocessing.mean)
    return Preprocessing(mean=mean, std=(1.0, 1.0, 1.0), input_range=_WHITE)


def _load(net: Backbone, weights: Weights) -> Backbone:
    """`net` with these weights, and with what they say of the images they expect."""
    info, default = weights.info, net.preprocessing
    if info.norm_eps is not None:
        set_norm_eps(net, info.norm_eps)
        net.weights_eps = info.norm_eps
    net.load_report, net.weights = str(load_weights(net, weights)), weights.label
    if len(info.mean) == len(default.mean):
        net.preprocessing = Preprocessing(
            mean=info.mean,
            std=info.std or default.std,
            color_order=info.color_order or default.color_order,
            input_range=default.input_range if info.input_range is None else info.input_range,
        )
    else:
        net.preprocessing = dataclasses.replace(default, color_order=info.color_order or default.color_order)
        net.load_report += "; it does not say which images it expects, so they get ImageNet's mean and deviation, as most networks have it"
    return net


def _outputs(tensors: Mapping[str, Tensor]) -> int | None:
    return next((len(tensors[f"{name}.bias"]) for name in _HEADS if f"{name}.bias" in tensors), None)


def _info_of(net: Backbone, classes: Sequence[str]) -> WeightsInfo:
    expected = net.preprocessing
    return WeightsInfo(
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


def _content_of(path: Path) -> Weights:
    tensors, info = read_weights(path)
    return Weights(label=str(path), tensors=tensors, info=info)


def _read_checkpoint(path: Path) -> dict[str, Any] | None:
    """What a checkpoint of a classifier's training holds, given its folder or its state.pt; None for anything else."""
    path = path / STATE_FILE if path.is_dir() else path
    if not path.is_file() or first_bytes(path)[:2] != _ZIP:
        return None
    try:
        saved = load_checkpoint(path)
    except InputError:
        if path.name == STATE_FILE:
            raise
        return None  # somebody else's file, of which read_weights says more
    if not saved.keys() >= {"model", "ema", "classes", "config"}:
        return None
    if saved.get("tool", "train_cls") != "train_cls":
        raise InputError(f"{path} is a checkpoint of tools/{saved['tool']}.py, not of a classifier; give one that train_cls wrote")
    return saved


def _delivered(saved: Mapping[str, Any], label: str) -> Weights:
    """A checkpoint's weights as its run would deliver them: the moving average where there is one, with the images they expect."""
    config, classes = parse_classification_config(saved["config"], source=label), saved["classes"]
    try:
        start = build_classifier(config, len(classes))
    except InputError as error:
        raise InputError(f"{label}: what images it expects is said by model.weights={config.model.weights} of its run: {error}") from error
    averaged = {name.removeprefix(_AVERAGED): tensor for name, tensor in (saved["ema"] or {}).items() if name.startswith(_AVERAGED)}
    return Weights(label=label, tensors=averaged or saved["model"], info=_info_of(start, classes))


def _is_of(weights: Weights, net: Backbone) -> bool:
    """Whether a file that carries no config holds this very network."""
    ours, theirs = (
        {name: tensor.shape for name, tensor in tensors.items() if not name.endswith(COUNTER)}
        for tensors in (net.state_dict(), weights.tensors)
    )
    return ours == theirs and weights.info.architecture in ("", net.architecture)


def _recognized(path: Path, info: WeightsInfo, model: ModelConfig) -> ModelConfig:
    """The network that a file's tensors show, as where several networks vote under one config; `model` where they show none."""
    try:
        found = create_from_file(path, variant=None if info.variant else model.variant)
    except InputError:
        return model  # loading says what doesn't fit
    options = model.options
    if found.architecture != model.name:
        _logger.warning("%s holds %s, not the config's %s", path, found.architecture, model.name)
        options = {}
    if found.shortcut:
        options = {**options, "shortcut": found.shortcut}
    return dataclasses.replace(model, name=found.architecture, variant=found.variant or model.variant, options=options)  # type: ignore[arg-type]
