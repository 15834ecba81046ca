"""Detections and ground truth as JSON from outside: read into typed records, every mistake named by file, row and key.

Rows in memory take the same way, so that a list and the file it came from give the same figures or the same complaint.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec
import numpy as np

from resbackbone.errors import InputError, nearest

T = TypeVar("T")
# Engines keep ids in float64, which counts exactly up to here.
Id = Annotated[int, msgspec.Meta(ge=-(2**53), le=2**53)]
Box = tuple[float, float, float, float]
SHOWN = 3  # wrong values named in one message
MOST_CANDIDATES = 10_000  # comparing a name with more than that takes seconds


class RunLengths(msgspec.Struct, gc=False):
    """COCO's run-length code of a mask; size is [height, width], counts is its compressed text or a list."""

    size: tuple[int, int]
    counts: str | list[int]


class CocoRow(msgspec.Struct, gc=False):
    """What every row of COCO's results format has."""

    image_id: Id
    category_id: Id
    score: float


class BoxRow(CocoRow, gc=False):
    """bbox: [x, y, width, height]."""

    bbox: Box


class MaskRow(CocoRow, gc=False):
    """Its `bbox`, if it has one, is not read: areas are those of the masks, as in detectron2 and COCO's own submissions."""

    segmentation: RunLengths


class KeypointRow(CocoRow, gc=False):
    """keypoints: [x, y, v] × 17."""

    keypoints: list[float]


class VocRow(msgspec.Struct, gc=False):
    """bbox: [xmin, ymin, xmax, ymax] in VOC's pixels, from 1, both ends inside."""

    image_id: str | int
    category: str
    score: float
    bbox: Box


def read_rows(source: Path | Sequence[dict[str, Any]], kind: type[T]) -> list[T]:
    """A list of detections, from a file or memory, as `kind`. Raises InputError for the first row that is wrong."""
    return read_typed(source, list[kind], "detections", has_masks=kind is MaskRow)  # type: ignore[valid-type]


def read_typed(source: Path | Any, kind: type[T], what: str, *, has_masks: bool = False) -> T:
    """JSON of a file, or the same as Python objects, as `kind`. Raises InputError, which calls it `what`."""
    where = name_of(source, what)
    data = _read_bytes(source, where) if isinstance(source, Path) else _as_json(source, where, has_masks)
    try:
        return msgspec.json.decode(data, type=kind)
    except msgspec.ValidationError as error:
        raise InputError(_explain(str(error), where, what)) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return _read_slowly(data, kind, where, what)


def name_of(source: object, what: str) -> str:
    """What messages call it: "detections D.json", or "detections" for what never was a file."""
    return f"{what} {source}" if isinstance(source, Path) else what


def check_finite(rows: Sequence[Any], numbers: np.ndarray, where: str) -> None:
    """Raise InputError for the first of `rows` whose line of numbers (N, …) has a NaN or an infinity."""
    wrong = np.flatnonzero(~np.isfinite(numbers).all(axis=1))
    if not len(wrong):
        return
    row = rows[wrong[0]]
    values = {field: getattr(row, field) for field in ("score", "bbox", "keypoints") if hasattr(row, field)}
    field = next(name for name, value in values.items() if not np.isfinite(np.array(value, dtype=np.float64)).all())
    raise InputError(f"{where}, row [{wrong[0]}], {field}: {values[field]} is not finite; leave such detections out")


def check_known(values: np.ndarray, known: Sequence[Any], words: str, hint: str = "") -> None:
    """Raise InputError, opening with `words`, where a value is not in `known`: how many rows, the first few, the nearest."""
    # Of numbers the type is theirs, as an id may be beyond int64's default; names as long as `known` has them, or "per" would be "person".
    there = np.asarray(known, dtype=values.dtype if values.dtype.kind == "i" else None) if len(known) else values[:0]
    wrong = np.flatnonzero(~np.isin(values, there))
    if not len(wrong):
        return
    names = list(dict.fromkeys(values[wrong].tolist()))
    shown = ", ".join(repr(name) for name in names[:SHOWN]) + (" …" if len(names) > SHOWN else "")
    close = nearest(str(names[0]), map(str, known)) if len(known) <= MOST_CANDIDATES else ""
    first = ", ".join(repr(one) for one in list(known)[:SHOWN]) + (" …" if len(known) > SHOWN else "")
    raise InputError(
        f"{words} {shown} (row [{wrong[0]}] is the first of {len(wrong)});{close} there are {len(known)}: {first or 'none'}{hint}"
    )


def _read_bytes(path: Path, where: str) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        names = [str(one) for one in path.parent.glob("*.json")] if path.parent.is_dir() else []
        raise InputError(f"{where}: there is no such file;{nearest(str(path), names) or ' check the path'}") from None
    except OSError as error:
        raise InputError(f"{where}: cannot be read ({error.strerror})") from None


def _as_json(value: Any, where: str, has_masks: bool) -> bytes:
    try:
        # msgspec is ten times as fast, but writes bytes, which pycocotools has for counts, in base64.
        return json.dumps(value, default=_plain).encode() if has_masks else msgspec.json.encode(value, enc_hook=_plain)
    except (TypeError, ValueError, OverflowError) as error:
        raise InputError(f"{where}: not made of numbers, text, lists and dicts ({error})") from None


def _plain(value: Any) -> Any:
    """NumPy's numbers and arrays, and the bytes that pycocotools gives as counts."""
    if isinstance(value, bytes):
        return value.decode("ascii")
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"a {type(value).__name__} is in it")


def _read_slowly(data: bytes, kind: type[T], where: str, what: str) -> T:
    """Python's own parser says in which line a file breaks off, and lets NaN pass, which then is named by its row."""
    try:
        return msgspec.convert(json.loads(data), kind)
    except json.JSONDecodeError as error:
        raise InputError(
            f"{where}: not valid JSON at line {error.lineno}, column {error.colno} ({error.msg}); is the file cut off?"
        ) from None
    except UnicodeDecodeError:
        raise InputError(f"{where}: not valid JSON: the file is not UTF-8 text") from None
    except RecursionError:
        raise InputError(f"{where}: lists nested too deeply") from None
    except msgspec.ValidationError as error:
        raise InputError(_explain(str(error), where, what)) from None


def _explain(error: str, where: str, what: str) -> str:
    """msgspec's "Expected `float`, got `str` - at `$[3].score`" as "…, row [3], score: expected a number, got text"."""
    text, _, place = error.replace("$", "").partition(" - at ")
    place = re.sub(r"^(\[\d+\])\.?", r"row \1, ", place.strip("`").lstrip(".")).rstrip(", ")
    for kind, words in (
        ("array", "list"),
        ("`str`", "text"),
        ("`float`", "a number"),
        ("`int`", "a whole number"),
        ("`null`", "nothing (null or NaN)"),
    ):
        text = text.replace(kind, words)
    hint = ""
    if not place:
        hint = (
            "; COCO's results format is a bare list of detections" if what == "detections" else "; it has images, annotations, categories"
        )
    return f"{where}{', ' if place else ''}{place}: {text[0].lower()}{text[1:].replace('`', '')}{hint}"
