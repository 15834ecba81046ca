"""A COCO instances file as typed records: fast where it is right, record by record with every mistake named where it isn't."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import msgspec

from .problems import ProblemLog

Number = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]  # what our arrays hold
Pixels = Annotated[int, msgspec.Meta(ge=-(2**31), le=2**31 - 1)]


class CocoImage(msgspec.Struct, gc=False):
    """One entry of `images`."""

    id: Number
    file_name: str
    height: Pixels
    width: Pixels


class CocoCategory(msgspec.Struct, gc=False):
    """One entry of `categories`."""

    id: Number
    name: str


class CocoObject(msgspec.Struct, gc=False):
    """One entry of `annotations`; its segmentation is skipped unread."""

    id: Number
    image_id: Number
    category_id: Number
    bbox: tuple[float, float, float, float]
    area: float | None = None
    iscrowd: int | bool = 0


class CocoObjectWithMask(CocoObject, gc=False):
    """The same with its segmentation, still as JSON text: as Python lists all of COCO's would take gigabytes."""

    segmentation: msgspec.Raw = msgspec.Raw()


class CocoRunLengths(msgspec.Struct, gc=False):
    """COCO's run-length code of a mask: size is (height, width), counts its compressed text or a list. Writers may put 5.0 for 5."""

    size: tuple[float, float]
    counts: str | list[float]


class CocoFile(msgspec.Struct):
    """The three lists of an instances file."""

    images: list[CocoImage]
    annotations: list[CocoObject]
    categories: list[CocoCategory]


class CocoFileWithMasks(msgspec.Struct):
    """The same with segmentations."""

    images: list[CocoImage]
    annotations: list[CocoObjectWithMask]
    categories: list[CocoCategory]


_SEGMENTATION = msgspec.json.Decoder(list[list[float]] | CocoRunLengths)


def read_segmentation(record: CocoObjectWithMask) -> list[list[float]] | CocoRunLengths:
    """Polygons or a run-length code, each number checked to be one. Raises ValueError saying what else is there."""
    if not bytes(record.segmentation):
        raise ValueError("the annotation has none; masks need a list of polygons or a run-length code")
    try:
        return _SEGMENTATION.decode(record.segmentation)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        text, _, place = str(error).replace("$", "").partition(" - at ")
        found = f"{text[0].lower()}{text[1:]}{' at ' if place else ''}{place}".replace("`null`", "`null` (or NaN)")
        raise ValueError(f"{found}; write polygons [[x1, y1, x2, y2, …], …] or {{size: [height, width], counts}}") from None


def read_coco_file(path: Path, log: ProblemLog, *, masks: bool) -> CocoFile | CocoFileWithMasks | None:
    """The records of a COCO file; damaged ones are left out and noted in `log`. None where nothing can be read."""
    data = path.read_bytes()
    try:
        kind: type[Any] = CocoFileWithMasks if masks else CocoFile
        return msgspec.json.decode(data, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return _read_leniently(data, path, log, masks=masks)


def _read_leniently(data: bytes, path: Path, log: ProblemLog, *, masks: bool) -> CocoFile | CocoFileWithMasks | None:
    """The slow way: Python's own parser (it accepts NaN), then each record on its own."""
    try:
        content = json.loads(data)
    except json.JSONDecodeError as error:
        log.add("not_json", f"not valid JSON at line {error.lineno}, column {error.colno} ({error.msg}); is the file cut off?", file=path)
        return None
    except UnicodeDecodeError:
        log.add("not_json", "not valid JSON: the file is not UTF-8 text", file=path)
        return None
    except RecursionError:
        log.add("not_json", "its lists are nested too deeply to be read", file=path)
        return None
    except ValueError as error:  # a whole number of more than 4300 digits
        log.add("not_json", f"it cannot be read: {error}", file=path)
        return None
    if not isinstance(content, dict):
        log.add(
            "wrong_type", f"a COCO file is an object with images, annotations and categories; this is a {type(content).__name__}", file=path
        )
        return None
    lists = {key: _list_of(content, key, path, log) for key in ("images", "annotations", "categories")}
    kind: type[Any] = CocoFileWithMasks if masks else CocoFile
    return kind(
        images=_records(lists["images"], CocoImage, "image", path, log),
        annotations=_records(lists["annotations"], CocoObjectWithMask if masks else CocoObject, "annotation", path, log),
        categories=_records(lists["categories"], CocoCategory, "category", path, log),
    )


def _list_of(content: dict[str, Any], key: str, path: Path, log: ProblemLog) -> list[Any]:
    if key not in content:
        log.add("missing_key", f"the key {key!r} is missing; a COCO file has images, annotations and categories", file=path)
        return []
    if not isinstance(content[key], list):
        log.add("wrong_type", f"{key!r} must be a list, it is a {type(content[key]).__name__}", file=path)
        return []
    return content[key]


def _records(raw: list[Any], kind: type, what: str, path: Path, log: ProblemLog) -> list[Any]:
    """Each entry as `kind`; one that does not fit is noted under its id, or its position where it has none."""
    good = []
    for position, entry in enumerate(raw):
        fields = dict(entry) if isinstance(entry, dict) else entry
        segmentation = fields.pop("segmentation", None) if isinstance(fields, dict) else None
        try:
            record: Any = msgspec.convert(fields, kind)
        except msgspec.ValidationError as error:
            _note(error, entry, position, what, path, log)
            continue
        if isinstance(record, CocoObjectWithMask) and segmentation is not None:
            record.segmentation = msgspec.Raw(_as_json(segmentation))
        good.append(record)
    return good


def _as_json(value: Any) -> bytes:
    try:
        return msgspec.json.encode(value)  # NaN becomes null
    except (UnicodeEncodeError, OverflowError):
        return json.dumps(value).encode()  # half a character of UTF-16 stays escaped, for `read_segmentation` to refuse


def _note(error: msgspec.ValidationError, entry: Any, position: int, what: str, path: Path, log: ProblemLog) -> None:
    number = entry.get("id", f"#{position + 1}") if isinstance(entry, dict) else f"#{position + 1}"
    kind = "missing_key" if "missing required field" in str(error) else "wrong_type"
    words = _in_words(str(error), entry)
    if what == "category":
        log.add(kind, f"category {number}: {words}", file=path)
    else:
        log.add(kind, words, file=path, **{what: number})


def _in_words(error: str, entry: Any) -> str:
    """msgspec's message with the value it speaks of: "`id` must be an int, it is '1' (a str); write the number without quotes"."""
    text, _, place = error.partition(" - at `$")
    key = place.strip("`.[").split("[")[0].split(".")[0]
    if not key or not isinstance(entry, dict) or key not in entry:
        return text
    value = repr(entry[key])
    hint = "; write the number without quotes" if isinstance(entry[key], str) and key not in ("file_name", "name") else ""
    return f"`{key}`: {text[0].lower()}{text[1:]}; the value is {value if len(value) < 60 else value[:57] + '...'}{hint}"
