"""Weights of any format into ours, torchvision's, timm's or detectron2's; proven whole by loading them into the network in between."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from resbackbone.backbone import Backbone
from resbackbone.errors import InputError, nearest
from resbackbone.layers import set_norm_eps
from resbackbone.registry import create_backbone, create_classifier, list_backbones
from resbackbone.runtime.atomic import write_atomically
from resbackbone.runtime.checkpoint import save_weights
from resbackbone.weights import Weights, WeightsInfo, load_weights, read_weights
from resbackbone.weights.detectron2 import to_detectron2, write_detectron2
from resbackbone.weights.timm import to_timm

TARGETS = ("resbackbone", "torchvision", "timm", "detectron2")
TORCHVISION_HAS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnext50_32x4d", "wide_resnet50_2", "vgg16", "vgg16_bn")
HEADS = ("fc.", "classifier.")
COUNTER = "num_batches_tracked"


@dataclass(frozen=True)
class Conversion:
    """What was read and written; `str()` is one line."""

    info: WeightsInfo
    report: str
    target: Path

    def __str__(self) -> str:
        facts = [self.info.variant, self.info.shortcut and f"shortcut {self.info.shortcut}", self.info.color_order]
        said = ", ".join(fact for fact in facts if fact)
        return f"{self.info.architecture}{f' ({said})' if said else ''}: {self.report}; written to {self.target}"


def convert_weights(source: Path, target: Path, *, to: str, name: str | None = None, variant: str | None = None) -> Conversion:
    """Read `source` in whatever format it is and write `target`.

    Args:
        to: one of TARGETS. resbackbone writes .safetensors with metadata, torchvision and timm .safetensors or, by any other
            ending, a torch file; detectron2 a .pkl.
        name: the network, where the file doesn't tell.
        variant: v1, v1.5 or v2, where the file doesn't tell.

    Raises InputError for a file that can't be read, a network that can't be told or lacks tensors, and a target that has no such network.
    """
    if to not in TARGETS:
        raise InputError(f"--to {to} is not known;{nearest(to, TARGETS)} choose from {', '.join(TARGETS)}")
    tensors, said = read_weights(source)
    info = _completed(tensors, said, name, variant, source)
    net = _network(tensors, info)
    report = load_weights(net, Weights(label=str(source), tensors=tensors, info=info))
    state = {key: tensor for key, tensor in net.state_dict().items() if not key.endswith(COUNTER)}
    _write(target, state, info, to)
    return Conversion(info, str(report), target)


def create_from_file(source: Path, *, name: str | None = None, variant: str | None = None) -> Backbone:
    """The backbone that a weights file of any format holds, with these weights; arguments and errors as in `convert_weights`."""
    tensors, said = read_weights(source)
    info = _completed(tensors, said, name, variant, source)
    return create_backbone(info.architecture, weights=source, **_options(info.architecture, info))


def _completed(tensors: Mapping[str, Tensor], info: WeightsInfo, name: str | None, variant: str | None, source: Path) -> WeightsInfo:
    """What the file says, what the user says, and what the tensors show. Where the first two differ, InputError."""
    for option, given, known in (("--name", name, info.architecture), ("--variant", variant, info.variant)):
        if given and known and given != known:
            raise InputError(f"{source} says it holds {known}, not {given}; leave {option} out")
    shown = "v2" if "bn_last.weight" in tensors else ""
    info = replace(info, variant=info.variant or shown or variant or "", shortcut=info.shortcut or _shortcut(tensors))
    return replace(info, architecture=name or info.architecture or _recognized(tensors, info, source))


def _shortcut(tensors: Mapping[str, Tensor]) -> str:
    """Projections have tensors; that there are none may be option A or a plain network."""
    if "layer1.1.downsample.0.weight" in tensors:
        return "C"
    return "B" if "layer2.0.downsample.0.weight" in tensors else ""


def _recognized(tensors: Mapping[str, Tensor], info: WeightsInfo, source: Path) -> str:
    fitting = [name for name in _candidates(tensors) if _fits(tensors, name, info)]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise InputError(f"{source} has the tensors of {' and of '.join(fitting)} alike; say which one with --name")
    raise InputError(
        f"{source} has the tensors of no network of ours (it begins with {', '.join(list(tensors)[:3])}); give --name to see the difference"
    )


def _candidates(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names worth building: of the CIFAR networks, which have three stages, those of this very depth."""
    if "layer3.0.conv1.weight" in tensors and "layer4.0.conv1.weight" not in tensors:
        blocks = len({key.split(".")[1] for key in tensors if key.startswith("layer1.")})
        return list_backbones(f"*{6 * blocks + 2}_cifar")
    return [name for name in list_backbones() if not name.endswith("_cifar")]


def _fits(tensors: Mapping[str, Tensor], name: str, info: WeightsInfo) -> bool:
    """Whether the tensors below the head are those of network `name`."""
    try:
        with torch.device("meta"):
            net = create_backbone(name, **_options(name, info))
    except InputError:  # it has no such variant or shortcut
        return False
    wanted = {key: value.shape for key, value in net.state_dict().items() if not key.endswith(COUNTER)}
    return wanted == {key: value.shape for key, value in tensors.items() if not key.endswith(COUNTER) and not key.startswith(HEADS)}


def _options(name: str, info: WeightsInfo) -> dict[str, Any]:
    options: dict[str, Any] = {"variant": info.variant} if info.variant else {}
    return {**options, "shortcut": info.shortcut} if info.shortcut and not name.startswith(("plain", "vgg")) else options


def _network(tensors: Mapping[str, Tensor], info: WeightsInfo) -> Backbone:
    """The network to load into: with its head where the file has one."""
    options = _options(info.architecture, info)
    head = [tensor for key, tensor in tensors.items() if key.startswith(HEADS) and tensor.ndim == 2]
    if head:
        net = create_classifier(info.architecture, num_classes=head[-1].shape[0], **options)
    else:
        net = create_backbone(info.architecture, **options)
    if info.norm_eps is not None:
        set_norm_eps(net, info.norm_eps)
    return net


def _write(path: Path, tensors: dict[str, Tensor], info: WeightsInfo, to: str) -> None:
    if to == "detectron2":
        write_detectron2(path, to_detectron2(tensors))
    elif to == "resbackbone":
        if path.suffix != ".safetensors":
            raise InputError(f"{path}: our own weights are .safetensors files; give the file that ending")
        save_weights(path, tensors, info.to_metadata())
    else:
        renamed = to_timm(tensors, info.architecture, info.variant or "v1.5") if to == "timm" else _to_torchvision(tensors, info)
        if path.suffix == ".safetensors":
            save_weights(path, renamed, {"format": "pt"})
        else:
            buffer = io.BytesIO()
            torch.save(renamed, buffer)
            write_atomically(path, buffer.getvalue())


def _to_torchvision(tensors: dict[str, Tensor], info: WeightsInfo) -> dict[str, Tensor]:
    if info.architecture not in TORCHVISION_HAS:
        raise InputError(f"torchvision has no {info.architecture};{nearest(info.architecture, TORCHVISION_HAS)} take --to resbackbone")
    if info.variant not in ("", "v1.5") or info.shortcut not in ("", "B"):
        raise InputError(
            f"torchvision's {info.architecture} is variant v1.5 with shortcut B, and would make something else of these weights "
            f"({info.variant or 'v1.5'}, shortcut {info.shortcut or 'B'}); take --to resbackbone"
        )
    return tensors
