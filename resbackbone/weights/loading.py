"""Weights into a module: strict, with a report that names what is missing, what is left over and what has another shape."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from resbackbone.errors import InputError
from resbackbone.weights.formats import read_weights
from resbackbone.weights.info import WeightsInfo
from resbackbone.weights.torchvision import download_torchvision

COUNTER = "num_batches_tracked"  # older files and fixed norms don't have it, and nothing computed depends on it
SHOWN = 5
RGB = 3
TORCHVISION = WeightsInfo(
    variant="v1.5", norm_eps=1e-5, color_order="RGB", mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), input_range=1.0
)


@dataclass(frozen=True, kw_only=True)
class LoadReport:
    """What happened to each tensor; `str(report)` is one line."""

    source: str
    loaded: int
    total: int
    left: tuple[str, ...] = ()  # the file's, dropped on purpose: a classifier's head
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    wrong_shape: tuple[str, ...] = ()

    def __str__(self) -> str:
        left = f"; head left: {', '.join(self.left)}" if self.left else ""
        return f"loaded {self.loaded}/{self.total} tensors from {self.source}{left}{self.problems()}"

    def problems(self) -> str:
        """The three lists of what didn't fit, "" when all did."""
        kinds = {"missing": self.missing, "unexpected": self.unexpected, "of another shape": self.wrong_shape}
        return "".join(f"; {len(names)} {kind}: {_first(names)}" for kind, names in kinds.items() if names)


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Tensors under our names, what their source says of itself, and where they come from."""

    label: str
    tensors: Mapping[str, Tensor]
    info: WeightsInfo


def open_weights(module: nn.Module, source: str | Path | Mapping[str, Tensor]) -> Weights:
    """Read `source` for `module`: a file of any format, "torchvision" (by the module's `architecture`), or a state dict."""
    if isinstance(source, Mapping):
        return Weights(label="the state dict", tensors=source, info=WeightsInfo())
    path = locate_weights(source, architecture=_name_of(module))
    tensors, info = read_weights(path, wanted=module.state_dict().keys())
    if str(source) == "torchvision":
        info = TORCHVISION
    return Weights(label=str(path), tensors=tensors, info=info)


def load_weights(
    module: nn.Module,
    source: str | Path | Mapping[str, Tensor] | Weights,
    *,
    strict: bool = True,
    drop_prefixes: Sequence[str] | None = None,
) -> LoadReport:
    """Copy weights into `module`, cast to its dtypes.

    Args:
        module: a backbone, a classifier, or any module.
        source: a file (safetensors, torch, detectron2's .pkl, Caffe's .caffemodel, Keras's .h5), "torchvision", a state dict, or
            what `open_weights` returned.
        strict: every tensor must have its place, and every place its tensor. If False, those that fit are loaded.
        drop_prefixes: names in the source to leave; None: the classifier's head where `module` is a backbone.

    A first convolution for other than three channels takes the three-channel one's: their sum for one channel (a grey image then gives
    what it would give in colour), and else the channels in turn, scaled by 3 / in_channels, as timm does.

    Raises InputError for a file that can't be read or doesn't fit, or says it belongs to another network; the module is then as it was.
    """
    given = source if isinstance(source, Weights) else open_weights(module, source)
    check_info(module, given)
    prefixes = tuple(getattr(module, "head_prefixes", ()) if drop_prefixes is None else drop_prefixes)
    left = tuple(name for name in given.tensors if prefixes and name.startswith(prefixes))
    kept = {name: tensor for name, tensor in given.tensors.items() if name not in left}
    wanted = module.state_dict()
    report, fitting = _compare(wanted, _with_channels(wanted, kept), label=given.label, left=left)
    if report.loaded == 0 or (strict and report.problems()):
        raise InputError(
            f"{given.label} does not fit {_name_of(module)}: {report.loaded} of {report.total} tensors do{report.problems()}. "
            "Give the weights of this very network (name, norm and in_channels must agree)"
        )
    module.load_state_dict(fitting, strict=False)
    return report


def check_info(module: nn.Module, weights: Weights) -> None:
    """Raise InputError where the source says it belongs to another network than `module`, or to other batch norms."""
    info, label = weights.info, weights.label
    for fact, wanted in (
        ("architecture", _architecture(module)),
        ("variant", _text(module, "variant")),
        ("shortcut", _text(module, "shortcut")),
    ):
        said = getattr(info, fact)
        if said and wanted and said != wanted:
            raise InputError(f"{label} says it is for {fact} {said}, not {wanted}; take {_option(fact)}={said}, or other weights")
    epsilons = {float(norm.eps) for norm in module.modules() if hasattr(norm, "running_var") and hasattr(norm, "eps")}  # type: ignore[arg-type]
    wrong = [eps for eps in epsilons if info.norm_eps is not None and not math.isclose(eps, info.norm_eps, rel_tol=1e-6)]
    if wrong:
        raise InputError(
            f"{label} was trained with norm_eps={info.norm_eps:g}, not {wrong[0]:g}; leave norm_eps at null to take the file's own"
        )


def _option(fact: str) -> str:
    return "name" if fact == "architecture" else fact


def _text(module: nn.Module, name: str) -> str:
    value = getattr(module, name, "")
    return value if isinstance(value, str) else ""


def _architecture(module: nn.Module) -> str:
    """Without the library or module it is taken from: timm:resnet50 is a resnet50."""
    return _text(module, "architecture").rpartition(":")[2]


def _with_channels(wanted: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The first convolution of `given` for as many input channels as the one in `wanted` has."""
    first = next((name for name, tensor in wanted.items() if tensor.ndim == 4), None)
    fitted = dict(given)
    if first is None or first not in given or given[first].ndim != 4:
        return fitted
    channels, weight = wanted[first].shape[1], given[first]
    if channels == weight.shape[1] or weight.shape[1] != RGB:
        return fitted
    if channels == 1:
        fitted[first] = weight.sum(1, keepdim=True)
    else:
        fitted[first] = weight[:, [number % RGB for number in range(channels)]] * (RGB / channels)
    return fitted


def locate_weights(source: str | Path, *, architecture: str) -> Path:
    """The file behind `source`, which is a path or "torchvision"; the latter is downloaded if need be."""
    if str(source) == "torchvision":
        return download_torchvision(architecture)
    if str(source) == "timm":
        raise InputError(f"weights='timm' needs a timm backbone; take timm:{architecture}, or weights=torchvision or a file")
    return Path(source)


def _compare(
    wanted: Mapping[str, Tensor], given: Mapping[str, Tensor], *, label: str, left: tuple[str, ...]
) -> tuple[LoadReport, dict[str, Tensor]]:
    fitting = {name: tensor for name, tensor in given.items() if name in wanted and tensor.shape == wanted[name].shape}
    wrong_shape = tuple(
        f"{name} {list(given[name].shape)} where {list(wanted[name].shape)} belongs"
        for name in given
        if name in wanted and name not in fitting
    )
    report = LoadReport(
        source=label,
        loaded=len(fitting),
        total=sum(name in given or not name.endswith(COUNTER) for name in wanted),
        left=left,
        missing=_without_counters(name for name in wanted if name not in given),
        unexpected=_without_counters(name for name in given if name not in wanted),
        wrong_shape=wrong_shape,
    )
    return report, fitting


def _without_counters(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(name for name in names if not name.endswith(COUNTER))


def _first(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", …" if len(names) > SHOWN else "")


def _name_of(module: nn.Module) -> str:
    return getattr(module, "architecture", "") or type(module).__name__
