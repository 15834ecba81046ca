"""Data sets for detection: one file a format (coco, voc, shapes), everything after that the same for all."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from resbackbone.errors import InputError, nearest

from .problems import ProblemLog
from .source import Source

KINDS = ("coco", "voc", "shapes")
_DEFAULTS = {"images": None, "exif": True}


def format_module(kind: str) -> ModuleType:
    """The module of a data format: one of KINDS, or the dotted name of a module of the user's that has `load`."""
    if kind in KINDS:
        return importlib.import_module(f"{__name__}.{kind}")
    if "." not in kind:
        raise InputError(
            f"data.kind={kind!r} is no data format here;{nearest(kind, KINDS)} known: {', '.join(KINDS)}, or package.module of yours"
        )
    try:
        module = importlib.import_module(kind)
    except ModuleNotFoundError as error:
        if error.name and (kind == error.name or kind.startswith(f"{error.name}.")):
            raise InputError(f"data.kind={kind!r}: there is no module {error.name!r}; is its folder on PYTHONPATH?") from None
        raise
    if not callable(getattr(module, "load", None)):
        raise InputError(f"data.kind={kind!r}: the module has no load(root, split, *, masks=False) that returns a Source")
    return module


def load_source(
    kind: str,
    root: Path | str | None,
    split: str | Sequence[str],
    *,
    masks: bool = False,
    images: str | None = None,
    exif: bool = True,
    **options: Any,
) -> Source:
    """One split of a data set, its annotations read and checked.

    split: as the format names it, several to join them. images: the image folder below root where it is not the split's own. Options that
    are left at their defaults are not passed on, so a format of one's own may do without them. Raises InputError.
    """
    return _call(kind, "load", root, split, masks=masks, images=images, exif=exif, **options)


def scan_source(kind: str, root: Path | str | None, split: str | Sequence[str], **options: Any) -> tuple[Source | None, ProblemLog]:
    """The same through the format's `scan`: nothing is refused, and every problem is in the log."""
    return _call(kind, "scan", root, split, **options)


def _call(kind: str, name: str, root: Path | str | None, split: str | Sequence[str], **options: Any) -> Any:
    function = getattr(format_module(kind), name)
    given = {option: value for option, value in options.items() if option == "masks" or value != _DEFAULTS.get(option)}
    parameters = inspect.signature(function).parameters
    if not any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
        known = [parameter for parameter in parameters if parameter not in ("root", "split")]
        for option in given.keys() - parameters.keys():
            words = f"data.{option}={given[option]!r}: data.kind={kind} has no such option;{nearest(option, known)}"
            raise InputError(f"{words} it has {', '.join(known)}")
    splits = (split,) if isinstance(split, str) else tuple(split)
    return function(None if root is None else Path(root), splits[0] if len(splits) == 1 else splits, **given)


__all__ = ["KINDS", "Source", "format_module", "load_source", "scan_source"]
