"""timm's names for our networks, both ways. Only names change, and whether a linear layer is written as a convolution."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from resbackbone.errors import InputError, nearest

WITHOUT_BOTTLENECKS = ("resnet18", "resnet34")  # v1 and v1.5 are the same there
PREACTIVATION = ("resnet50", "resnet101", "resnet152")  # timm's resnetv2_50, resnetv2_101, resnetv2_152
RESNETS = (*WITHOUT_BOTTLENECKS, *PREACTIVATION, "resnext50_32x4d", "wide_resnet50_2")
VGGS = ("vgg16", "vgg16_bn")
# They differ in one block, so the same weights would compute something else (He et al. 2016, appendix: the first activation is before it).
DIFFERENT_FIRST_BLOCK = "of resnetv2_18 and resnetv2_34 timm's first shortcut starts before the activation, ours behind it"
MAP_SIDE = 7  # of what VGG's first linear layer sees

FIELDS = {"{n}": r"(?P<n>\d+)", "{k}": "(?P<k>[123])", "{kind}": "(?P<kind>weight|bias|running_mean|running_var|num_batches_tracked)"}


def _unchanged(tensor: Tensor) -> Tensor:
    return tensor


def _to_linear(weight: Tensor) -> Tensor:
    return weight.flatten(1)


def _to_convolution(weight: Tensor) -> Tensor:
    return weight[:, :, None, None]


def _to_map_convolution(weight: Tensor) -> Tensor:
    return weight.unflatten(1, (-1, MAP_SIDE, MAP_SIDE))


@dataclass(frozen=True)
class Name:
    """One tensor's name here and there; {n} is a block or a layer, {k} one of three convolutions, {kind} what a norm or layer has."""

    ours: str
    timm: str
    to_ours: Callable[[Tensor], Tensor] = _unchanged
    to_timm: Callable[[Tensor], Tensor] = _unchanged


def _same(*names: str) -> tuple[Name, ...]:
    return tuple(Name(name, name) for name in names)


RESNET_NAMES = (
    *_same("conv1.weight", "bn1.{kind}", "fc.weight", "fc.bias"),
    *(
        name
        for layer in ("layer1", "layer2", "layer3", "layer4")
        for name in _same(
            *(f"{layer}.{{n}}.{part}" for part in ("conv{k}.weight", "bn{k}.{kind}", "downsample.0.weight", "downsample.1.{kind}"))
        )
    ),
)
PREACTIVATION_NAMES = (
    Name("conv1.weight", "stem.conv.weight"),
    *(
        Name(f"layer{stage + 1}.{{n}}.{ours}", f"stages.{stage}.blocks.{{n}}.{timm}")
        for stage in range(4)
        for ours, timm in (
            ("bn{k}.{kind}", "norm{k}.{kind}"),
            ("conv{k}.weight", "conv{k}.weight"),
            ("downsample.0.weight", "downsample.conv.weight"),
        )
    ),
    Name("bn_last.{kind}", "norm.{kind}"),
    Name("fc.weight", "head.fc.weight", _to_linear, _to_convolution),
    Name("fc.bias", "head.fc.bias"),
)
VGG_NAMES = (
    *_same("features.{n}.{kind}"),
    Name("classifier.0.weight", "pre_logits.fc1.weight", _to_linear, _to_map_convolution),
    Name("classifier.0.bias", "pre_logits.fc1.bias"),
    Name("classifier.3.weight", "pre_logits.fc2.weight", _to_linear, _to_convolution),
    Name("classifier.3.bias", "pre_logits.fc2.bias"),
    Name("classifier.6.weight", "head.fc.weight"),
    Name("classifier.6.bias", "head.fc.bias"),
)


def looks_like_timm(tensors: Mapping[str, Tensor]) -> bool:
    """Whether the names are timm's and not ours as well: a pre-activation ResNet's, or a VGG's with its classifier."""
    return "stem.conv.weight" in tensors or "pre_logits.fc1.weight" in tensors


def from_timm(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """timm's state dict under our names. InputError for a network that isn't among ours."""
    names, family = _names_of(tensors)
    if names is PREACTIVATION_NAMES:
        _check_preactivation(tensors)
    rules = [(_pattern(name.timm), name.ours, name.to_ours) for name in names]
    return _rename(tensors, rules, f"timm's {family}")


def to_timm(tensors: Mapping[str, Tensor], architecture: str, variant: str = "v1.5") -> dict[str, Tensor]:
    """Our state dict under timm's names, to load strictly into its model of that name (resnetv2_… for variant v2).

    Raises InputError for a network timm doesn't have.
    """
    rules = [(_pattern(name.ours), name.timm, name.to_timm) for name in _names_for(architecture, variant)]
    return _rename(tensors, rules, f"our {architecture} {variant}".rstrip())


def _check_preactivation(tensors: Mapping[str, Tensor]) -> None:
    """Refuse relatives whose names would do while what they compute is something else."""
    instead = f"Take timm's {', '.join(_preactivation_name(name) for name in PREACTIVATION)}"
    if "norm.weight" in tensors and "norm.running_mean" not in tensors:
        raise InputError(f"these are weights of a BiT network (group norm, standardised convolutions), which is not among ours. {instead}")
    if "stages.0.blocks.0.conv3.weight" not in tensors:
        raise InputError(f"these are no weights for ours: {DIFFERENT_FIRST_BLOCK}. {instead}")


def _names_of(tensors: Mapping[str, Tensor]) -> tuple[Sequence[Name], str]:
    if "stem.conv.weight" in tensors:
        return PREACTIVATION_NAMES, "resnetv2_*"
    if any(name.startswith("features.") for name in tensors):
        return VGG_NAMES, "vgg16"
    if "conv1.weight" in tensors:
        return RESNET_NAMES, "ResNets"
    ours = (*RESNETS, *(_preactivation_name(name) for name in PREACTIVATION), *VGGS)
    raise InputError(f"tensors named {_first(tensors)} are of no network that timm and we both have; those are {', '.join(ours)}")


def _names_for(architecture: str, variant: str) -> Sequence[Name]:
    if architecture in VGGS:
        return VGG_NAMES
    if variant == "v2" and architecture in WITHOUT_BOTTLENECKS:
        raise InputError(f"timm has no {architecture} like ours of variant v2: {DIFFERENT_FIRST_BLOCK}. Keep the weights in our format")
    known = PREACTIVATION if variant == "v2" else RESNETS
    if architecture not in known:
        every = known if variant == "v2" else (*known, *VGGS)
        raise InputError(f"timm has no {architecture} of variant {variant};{nearest(architecture, every)} it has {', '.join(every)}")
    if variant == "v2":
        return PREACTIVATION_NAMES
    if variant not in ("v1.5", "") and architecture not in WITHOUT_BOTTLENECKS:
        raise InputError(
            f"timm has no {architecture} of variant {variant}: its bottlenecks have their stride in the 3x3 convolution (v1.5) and would "
            "compute something else with these weights. Keep them in our format"
        )
    return RESNET_NAMES


def _preactivation_name(name: str) -> str:
    return name.replace("resnet", "resnetv2_")


def _pattern(template: str) -> re.Pattern[str]:
    text = re.escape(template).replace(r"\{", "{").replace(r"\}", "}")
    for field, expression in FIELDS.items():
        text = text.replace(field, expression)
    return re.compile(text)


def _rename(
    tensors: Mapping[str, Tensor], rules: Iterable[tuple[re.Pattern[str], str, Callable[[Tensor], Tensor]]], family: str
) -> dict[str, Tensor]:
    rules = tuple(rules)
    renamed, unknown = {}, []
    for name, tensor in tensors.items():
        found = next(((match, new, convert) for pattern, new, convert in rules if (match := pattern.fullmatch(name))), None)
        if found is None:
            unknown.append(name)
            continue
        match, new, convert = found
        renamed[new.format(**match.groupdict())] = _convert(convert, tensor, name)
    if unknown:
        raise InputError(f"{family} has no tensors named {_first(unknown)}; this is another network, or not a state dict alone")
    return renamed


def _convert(convert: Callable[[Tensor], Tensor], tensor: Tensor, name: str) -> Tensor:
    try:
        return convert(tensor)
    except (RuntimeError, IndexError) as error:
        raise InputError(f"{name} has the shape {list(tensor.shape)}, which no classifier's layer of this network has") from error


def _first(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:5]) + (", …" if len(names) > 5 else "")
