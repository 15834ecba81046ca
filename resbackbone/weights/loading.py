"""Weights into a module: strict, with a report that names what is missing, what is left over and what has another shape."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from resbackbone.errors import InputError
from resbackbone.weights.files import read_state_dict
from resbackbone.weights.torchvision import download_torchvision

COUNTER = "num_batches_tracked"  # older files and fixed norms don't have it, and nothing computed depends on it
SHOWN = 5


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


def load_weights(
    module: nn.Module,
    source: str | Path | Mapping[str, Tensor],
    *,
    strict: bool = True,
    drop_prefixes: Sequence[str] | None = None,
) -> LoadReport:
    """Copy weights into `module`, cast to its dtypes.

    Args:
        module: a backbone, a classifier, or any module.
        source: a .safetensors or torch file, "torchvision", or a state dict.
        strict: every tensor must have its place, and every place its tensor. If False, those that fit are loaded.
        drop_prefixes: names in the source to leave; None: the classifier's head where `module` is a backbone.

    Raises InputError for a file that can't be read or doesn't fit; the module is then as it was.
    """
    label, tensors = _resolve(module, source)
    prefixes = tuple(getattr(module, "head_prefixes", ()) if drop_prefixes is None else drop_prefixes)
    left = tuple(name for name in tensors if prefixes and name.startswith(prefixes))
    kept = {name: tensor for name, tensor in tensors.items() if name not in left}
    report, fitting = _compare(module.state_dict(), kept, label=label, left=left)
    if report.loaded == 0 or (strict and report.problems()):
        raise InputError(
            f"{label} does not fit {_name_of(module)}: {report.loaded} of {report.total} tensors do{report.problems()}. "
            "Give the weights of this very network (name, norm and in_channels must agree)"
        )
    module.load_state_dict(fitting, strict=False)
    return report


def locate_weights(source: str | Path, *, architecture: str) -> Path:
    """The file behind `source`, which is a path or "torchvision"; the latter is downloaded if need be."""
    if str(source) == "torchvision":
        return download_torchvision(architecture)
    if str(source) == "timm":
        raise InputError(f"weights='timm' needs a timm backbone; take timm:{architecture}, or weights=torchvision or a file")
    return Path(source)


def _resolve(module: nn.Module, source: str | Path | Mapping[str, Tensor]) -> tuple[str, Mapping[str, Tensor]]:
    if isinstance(source, Mapping):
        return "the state dict", source
    path = locate_weights(source, architecture=_name_of(module))
    return str(path), read_state_dict(path)[0]


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
