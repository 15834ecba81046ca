"""What one config value may be: the conversion of a YAML value to a field's annotated type."""

from __future__ import annotations

import dataclasses
import math
import reprlib
import types
from collections.abc import Callable
from typing import Any, Literal, Union, get_args, get_origin

from resbackbone.errors import nearest

BuildGroup = Callable[[type, Any], Any]


class Mismatch(Exception):
    """A value is not of the field's type. The text completes the sentence "key=value …"."""


@dataclasses.dataclass(frozen=True)
class Typed:
    """A value from the command line: as YAML reads it, and as the user typed it (a text field takes `2012` as text)."""

    value: Any
    text: str


def show(value: Any) -> str:
    """A value for an error message: as the user wrote it, shortened where it is long (a repr of nested aliases can be endless)."""
    return value.text if isinstance(value, Typed) else reprlib.repr(value)


def as_dataclass(annotation: Any) -> type | None:
    """The dataclass that an annotation (`Group` or `Group | None`) names, if it names one."""
    members = get_args(annotation) if _is_union(annotation) else (annotation,)
    return next((member for member in members if isinstance(member, type) and dataclasses.is_dataclass(member)), None)


def convert(annotation: Any, value: Any, build_group: BuildGroup) -> Any:
    """Return `value` as `annotation` wants it. Raises Mismatch; errors inside a nested group come from `build_group` itself."""
    if _is_union(annotation):
        return _to_union(get_args(annotation), value, build_group)
    group = as_dataclass(annotation)
    if group is not None:
        return build_group(group, _read(value))
    origin = get_origin(annotation)
    if origin is Literal:
        return _to_literal(get_args(annotation), value)
    if origin is tuple:
        return _to_tuple(get_args(annotation), value, build_group)
    if origin is dict:
        return _to_dict(get_args(annotation), value, build_group)
    if annotation is Any:
        return _read(value)
    assert annotation in _SCALARS, f"a config schema cannot hold {annotation}"
    return _SCALARS[annotation](value)


def _is_union(annotation: Any) -> bool:
    return get_origin(annotation) in (Union, types.UnionType)


def _read(value: Any) -> Any:
    return value.value if isinstance(value, Typed) else value


def _to_union(members: tuple[Any, ...], value: Any, build_group: BuildGroup) -> Any:
    if _read(value) is None and type(None) in members:
        return None
    reasons = []
    # Text last: on the command line it would swallow every number and list.
    for member in sorted((member for member in members if member is not type(None)), key=lambda member: member is str):
        try:
            return convert(member, value, build_group)
        except Mismatch as reason:
            reasons.append(str(reason))
    null = ", or write null" if type(None) in members else ""
    raise Mismatch("; or it ".join(dict.fromkeys(reasons)) + null)


def _to_literal(choices: tuple[Any, ...], value: Any) -> Any:
    plain = _read(value)
    for choice in choices:
        if (plain == choice and type(plain) is type(choice)) or (isinstance(value, Typed) and value.text == choice):
            return choice
    listed = ", ".join(str(choice) for choice in choices)
    raise Mismatch(f"is not one of {listed};{nearest(show(value), choices) or ' choose one of these'}")


def _to_tuple(arguments: tuple[Any, ...], value: Any, build_group: BuildGroup) -> tuple[Any, ...]:
    plain = _read(value)
    if arguments[-1] is Ellipsis:
        # One word where a list of words is wanted is a list of one.
        items = plain if isinstance(plain, (list, tuple)) else [value]
        if plain is None or isinstance(plain, dict):
            raise Mismatch("should be a list, such as [a, b]")
        wanted = (arguments[0],) * len(items)
    else:
        items, wanted = plain, arguments
        if not isinstance(plain, (list, tuple)) or len(plain) != len(wanted):
            raise Mismatch(f"should be a list of {len(wanted)} values")
    converted = []
    for position, (annotation, item) in enumerate(zip(wanted, items, strict=True), start=1):
        try:
            converted.append(convert(annotation, item, build_group))
        except Mismatch as mismatch:
            raise Mismatch(f"{mismatch} (value {position} of {len(items)})") from None
    return tuple(converted)


def _to_dict(arguments: tuple[Any, ...], value: Any, build_group: BuildGroup) -> dict[str, Any]:
    plain = _read(value)
    if not isinstance(plain, dict):
        raise Mismatch("should be a group of settings, such as {name: value}")
    return {str(key): convert(arguments[1], item, build_group) for key, item in plain.items()}


def _to_bool(value: Any) -> bool:
    plain = _read(value)
    if not isinstance(plain, bool):
        raise Mismatch("should be true or false")
    return plain


def _to_int(value: Any) -> int:
    plain = _read(value)
    if isinstance(plain, int) and not isinstance(plain, bool):
        return plain
    number = _parse_float(plain)
    hint = f"; write {int(number)}" if number is not None and math.isfinite(number) and number == int(number) else ""
    raise Mismatch(f"should be a whole number{hint}")


def _to_float(value: Any) -> float:
    # YAML 1.1 reads 1e-4 (no dot) as text: it is understood here, because every user means the number.
    number = _parse_float(_read(value))
    if number is None:
        raise Mismatch("should be a number")
    if not math.isfinite(number):
        raise Mismatch("should be a finite number")
    return number


def _parse_float(plain: Any) -> float | None:
    if isinstance(plain, bool) or not isinstance(plain, (int, float, str)):
        return None
    try:
        return float(plain)
    except (ValueError, OverflowError):
        return None


def _to_str(value: Any) -> str:
    plain = _read(value)
    if isinstance(plain, str):
        return plain
    if isinstance(value, Typed) and isinstance(plain, (bool, int, float)):
        return value.text
    if plain is None or isinstance(plain, (list, dict)):
        raise Mismatch("should be text")
    raise Mismatch(f"should be text; YAML reads it as {type(plain).__name__}, so put it in quotes")


_SCALARS: dict[type, Callable[[Any], Any]] = {bool: _to_bool, int: _to_int, float: _to_float, str: _to_str}
