"""One dict of backbones, a decorator that fills it, and the functions that build from it."""

from __future__ import annotations

import fnmatch
import importlib
import inspect
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, TypeVar

from resbackbone.backbone import Backbone, Preprocessing
from resbackbone.errors import InputError, nearest
from resbackbone.layers import has_fixed_statistics, set_norm_eps
from resbackbone.weights import WeightsInfo, load_weights, open_weights

logger = logging.getLogger(__name__)
ENTRY_POINTS = "resbackbone.backbones"  # a package adds a backbone under this group: `my_net = "my_package.my_net:my_net"`
FOREIGN = ("timm:", "torchvision:")

Builder = Callable[..., Backbone]
BuilderType = TypeVar("BuilderType", bound=Builder)
BACKBONES: dict[str, Builder] = {}


@dataclass(frozen=True)
class Task:
    """What a network was designed for: that many classes, images of that many pixels a side."""

    num_classes: int = 1000
    input_size: int = 224


IMAGENET = Task()
TASKS: dict[str, Task] = {}


def register_backbone(name: str, task: Task = IMAGENET) -> Callable[[BuilderType], BuilderType]:
    """Decorate a function that builds a Backbone from keyword options: those of `create_backbone` that it names, and its own."""

    def register(builder: BuilderType) -> BuilderType:
        if name in BACKBONES or name.startswith(FOREIGN):
            raise InputError(f"a backbone named {name!r} exists already; choose another name")
        BACKBONES[name], TASKS[name] = builder, task
        return builder

    return register


def list_backbones(pattern: str = "*") -> list[str]:
    """Names that match a shell pattern, installed plug-ins included; `timm:NAME` and `torchvision:NAME` come on top."""
    names = {*BACKBONES, *(point.name for point in entry_points(group=ENTRY_POINTS))}
    return sorted(fnmatch.filter(names, pattern))


def create_backbone(
    name: str,
    *,
    weights: str | Path | None = None,
    variant: str = "v1.5",
    norm: str = "batch",
    freeze_at: int = 0,
    out_features: Sequence[str] | None = None,
    output_stride: int = 32,
    dilation_rule: str = "torchvision",
    in_channels: int = 3,
    norm_eps: float | None = None,
    checkpointing: bool = False,
    allow_random_frozen: bool = False,
    **network: Any,
) -> Backbone:
    """Build a backbone: images [N, in_channels, H, W] -> ordered feature maps.

    Args:
        name: one of `list_backbones()`, `timm:NAME`, `torchvision:NAME`, or `MODULE:NAME` for one that MODULE registers.
        weights: None, a file as `load_weights` reads it, "torchvision" (downloaded once), or "timm" for timm's own.
        variant: v1 strides in a bottleneck's first 1x1 (the paper's release), v1.5 in its 3x3 (torchvision), v2 is pre-activated.
        norm: batch | frozen (fixed, nothing learns) | eval (fixed statistics, affine learns) | sync | group | none.
        freeze_at: stages from the bottom that don't learn; 1 = conv1, 2 = conv1 and conv2_x …
        out_features: the maps to return; None: all.
        output_stride: 32, or 16 / 8 with dilation.
        dilation_rule: "torchvision" or "detectron2"; see ResNet.
        in_channels: of the images.
        norm_eps: None: the source's own, 1e-5.
        checkpointing: recompute activations in the backward pass.
        allow_random_frozen: accept `norm="frozen"` without weights, because a checkpoint is about to be loaded over it.
        network: what only some have. Residual networks: shortcut (A | B | C), shortcut_scale (h(x) = scale * x), shortcut_gate (a
            highway's), stochastic_depth; ImageNet's also groups, width_per_group. One of your own: whatever its builder names.

    Raises InputError for an unknown name or option, and for weights that don't fit.
    """
    options: dict[str, Any] = {
        "variant": variant,
        "norm": norm,
        "output_stride": output_stride,
        "dilation_rule": dilation_rule,
        "in_channels": in_channels,
        "norm_eps": norm_eps,
        "checkpointing": checkpointing,
    }
    if name.startswith(FOREIGN):
        from resbackbone.foreign import create_foreign

        if network:
            raise InputError(f"{name} has no option {', '.join(network)}; that library's own network is taken as it is")
        net: Backbone = create_foreign(name, weights=weights, **options)
    else:
        net = _build(name, options, network)
        _load(net, weights, norm_eps)
    net.architecture = name
    _refuse_random_statistics(net, weights, allow_random_frozen)
    if out_features is not None:
        net.out_features = tuple(out_features)
    net.freeze(freeze_at)
    return net


def create_classifier(
    name: str,
    *,
    num_classes: int | None = None,
    weights: str | Path | None = None,
    variant: str = "v1.5",
    norm: str = "batch",
    in_channels: int = 3,
    norm_eps: float | None = None,
    checkpointing: bool = False,
    **network: Any,
) -> Backbone:
    """Build a whole classifier, [N, in_channels, H, W] -> logits [N, num_classes], with torchvision's state-dict keys.

    num_classes: None: those of the data set it was designed for, 10 for a CIFAR network and else 1000. The other options are those of
    `create_backbone`; so are the errors.
    """
    if num_classes is None:
        num_classes = designed_for(name).num_classes
    if num_classes < 1:
        raise InputError(f"num_classes={num_classes} is not possible; it must be at least 1")
    options = {
        "variant": variant,
        "norm": norm,
        "in_channels": in_channels,
        "norm_eps": norm_eps,
        "checkpointing": checkpointing,
        "num_classes": num_classes,
    }
    net = _build(name, options, network)
    _load(net, weights, norm_eps)
    _refuse_random_statistics(net, weights, allowed=False)
    return net


def designed_for(name: str) -> Task:
    """The classes and image size a network was designed for; ImageNet's for one that doesn't say."""
    return TASKS.get(name.rpartition(":")[2], IMAGENET)


def _find_builder(name: str) -> Builder:
    if name in BACKBONES:
        return BACKBONES[name]
    for point in entry_points(group=ENTRY_POINTS):
        if point.name == name:
            return point.load()
    if name.startswith(FOREIGN):
        raise InputError(f"{name}: a classifier of another library is built by that library; create_backbone takes this name")
    module, colon, registered = name.rpartition(":")
    if colon:
        _import(module, name)
        name = registered
    if name not in BACKBONES:
        raise InputError(
            f"there is no backbone {name!r};{nearest(name, list_backbones())} choose from {', '.join(list_backbones())}, "
            "timm:NAME, torchvision:NAME, MODULE:NAME for one that a module of yours registers, or install a package that adds it "
            f"(entry-point group {ENTRY_POINTS})"
        )
    return BACKBONES[name]


def _import(module: str, name: str) -> None:
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise  # the module is there; something it needs isn't
        raise InputError(f"backbone {name!r}: there is no module {module!r}; put the folder that holds it on PYTHONPATH") from error


def _build(name: str, options: dict[str, Any], network: dict[str, Any]) -> Backbone:
    """Call the builder with the common options it names (the others must have their defaults) and the network's own."""
    builder = _find_builder(name)
    parameters = inspect.signature(builder).parameters
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    given = {option: value for option, value in options.items() if takes_all or option in parameters}
    defaults = {option: parameter.default for option, parameter in inspect.signature(create_backbone).parameters.items()}
    for option in options.keys() - given.keys():
        if option not in defaults or options[option] != defaults[option]:
            raise InputError(f"backbone {name!r} has no option {option}; leave it at {defaults.get(option)!r}, not {options[option]!r}")
    for option in network:
        if not takes_all and option not in parameters:
            raise InputError(f"backbone {name!r} has no option {option!r};{nearest(option, parameters)} it has {', '.join(parameters)}")
    net = builder(**given, **network)
    net.architecture = name
    return net


def _load(net: Backbone, weights: str | Path | None, norm_eps: float | None) -> None:
    """Load, and take over what the file says of its batch norms and of the images it expects."""
    if weights is None:
        return
    opened = open_weights(net, weights)
    if norm_eps is None and opened.info.norm_eps is not None:
        set_norm_eps(net, opened.info.norm_eps)
        net.weights_eps = opened.info.norm_eps
    net.load_report = str(load_weights(net, opened))
    net.weights = weights
    net.preprocessing = _preprocessing_of(opened.info, net.preprocessing)
    logger.info("%s: %s", net.architecture, net.load_report)


def _preprocessing_of(info: WeightsInfo, default: Preprocessing) -> Preprocessing:
    """The weights' own, as far as they tell it for as many channels as the network has."""
    if len(info.mean) != len(default.mean):
        return default
    return Preprocessing(
        mean=info.mean,
        std=info.std if len(info.std) == len(info.mean) else default.std,
        color_order=info.color_order or default.color_order,
        input_range=default.input_range if info.input_range is None else info.input_range,
    )


def _refuse_random_statistics(net: Backbone, weights: str | Path | None, allowed: bool) -> None:
    if weights is None and not allowed and has_fixed_statistics(net):
        raise InputError(
            f"{net.architecture}: norm 'frozen' or 'eval' needs weights, for without them its statistics are those of no data; "
            "give weights (torchvision, or a file), or take norm 'group' or 'batch'"
        )
