"""One run's settings: YAML differences and `key.path=value` overrides, checked into frozen dataclasses.

A schema is a frozen, keyword-only dataclass whose fields are int, float, bool, str, None unions, `Literal`, `tuple[T, ...]`,
`dict[str, T]` or another such dataclass. Every error names the place (file:line or "command line"), the key, the value and the fix.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar, get_type_hints

import yaml

from resbackbone.errors import InputError, nearest
from resbackbone.runtime.atomic import write_atomically
from resbackbone.runtime.config_types import Mismatch, Typed, as_dataclass, convert, show

T = TypeVar("T")
KeyPath = tuple[str, ...]
COMMAND_LINE = "command line"


def load_config(schema: type[T], path: Path | str | None, overrides: Sequence[str] = ()) -> T:
    """Read a YAML file (None: only the defaults), apply `key.path=value` overrides and check everything against `schema`.

    Raises InputError for a missing file, broken YAML, an unknown key, a wrong type or a value the schema itself refuses.
    """
    if path is None:
        return load_config_text(schema, "", source="defaults", overrides=overrides)
    return load_config_text(schema, _read_text(Path(path)), source=str(path), overrides=overrides)


def load_config_text(schema: type[T], text: str, *, source: str, overrides: Sequence[str] = ()) -> T:
    """As `load_config`, for YAML that is already in memory, such as the config inside a weights file. `source` names it in errors."""
    settings, lines = _parse_yaml(text, source)
    places = _Places(schema, source, lines)
    for override in overrides:
        _apply_override(schema, settings, override, places)
    return _build(schema, settings, (), places)


def parse_config(schema: type[T], mapping: Mapping[str, Any], source: str) -> T:
    """Check a mapping against `schema`; `source` names it in errors. Raises InputError."""
    return _build(schema, dict(mapping), (), _Places(schema, source, {}))


def dump_config(config: Any) -> str:
    """Return the resolved config as YAML; loading it again gives an equal config."""
    return yaml.safe_dump(_plain(config), sort_keys=False, default_flow_style=None, width=120, allow_unicode=True)


def save_config(config: Any, path: Path) -> None:
    """Write `dump_config(config)` to `path`, all of it or nothing. Raises InputError where the folder cannot be written."""
    write_atomically(path, dump_config(config).encode())


def changed_settings(before: Any, after: Any) -> list[str]:
    """Every setting in which two configs of one schema differ, as `key.path: old → new`."""
    old, new = (dict(_flat(dataclasses.asdict(config))) for config in (before, after))
    return [f"{key}: {old.get(key)} → {new.get(key)}" for key in {**old, **new} if old.get(key) != new.get(key)]  # options come and go


# ---------------------------------------------------------------------------------------------------------------- where a value came from


class _Places:
    """Tells, for a key path, where the user wrote it: `file:line`, the command line, or just the file."""

    def __init__(self, root: type, source: str, lines: dict[KeyPath, int]) -> None:
        self.root, self.source, self.lines, self.overridden = root, source, lines, set[KeyPath]()

    def of(self, path: KeyPath) -> str:
        for end in range(len(path), 0, -1):
            if path[:end] in self.overridden:
                return COMMAND_LINE
            if path[:end] in self.lines:
                return f"{self.source}:{self.lines[path[:end]]}"
        return self.source

    def fail(self, path: KeyPath, problem: str) -> NoReturn:
        raise InputError(f"{self.of(path)}: {problem}")


# ------------------------------------------------------------------------------------------------------------------------------- reading


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        siblings = [str(sibling) for sibling in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        raise InputError(f"{path}: there is no such config file;{nearest(str(path), siblings) or ' check the path'}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: is not a text file ({error.reason} at byte {error.start}); a config is YAML in UTF-8") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); --config takes one YAML file") from None


def _parse_yaml(text: str, source: str) -> tuple[dict[str, Any], dict[KeyPath, int]]:
    """Return the settings and the line of each key path, refusing duplicate keys (YAML would silently keep the last)."""
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        lines = dict(_key_lines(node, (), source, set()))
        settings = {} if node is None else loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{source}:{mark.line + 1}" if mark else source
        raise InputError(f"{where}: broken YAML: {error.problem or error.context}; check indentation, colons and brackets there") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InputError(f"{source}: broken YAML: {' '.join(str(error).split())}") from None
    if not isinstance(settings, dict):
        raise InputError(f"{source}: a config is `key: value` lines, but this holds {show(settings)}")
    return settings, lines


def _key_lines(node: yaml.Node | None, path: KeyPath, source: str, seen: set[int]) -> Iterator[tuple[KeyPath, int]]:
    # `seen` keeps a file of nested aliases ("billion laughs") from being walked more than once.
    if not isinstance(node, yaml.MappingNode) or id(node) in seen:
        return
    seen.add(id(node))
    first_line: dict[str, int] = {}
    for key, value in node.value:
        name, line = str(key.value), key.start_mark.line + 1
        if name in first_line and name != "<<":
            raise InputError(f"{source}:{line}: {'.'.join((*path, name))} was already set in line {first_line[name]}; keep one of the two")
        first_line[name] = line
        yield (*path, name), line
        yield from _key_lines(value, (*path, name), source, seen)


# ----------------------------------------------------------------------------------------------------------------------------- overrides


def _apply_override(schema: type, settings: dict[str, Any], override: str, places: _Places) -> None:
    dotted, equals, text = override.partition("=")
    path = tuple(dotted.strip().split("."))
    if not equals or not all(path) or dotted.startswith("-"):
        hint = " options come before it, as --name VALUE" if override.startswith("-") else " for example train.lr=0.01"
        raise InputError(f"{COMMAND_LINE}: '{override}' is not of the form key.path=value;{hint}")
    places.overridden.add(path)
    section = settings
    annotation: Any = schema
    for depth, name in enumerate(path, start=1):
        group = as_dataclass(annotation)
        if group is not None:
            fields = _field_types(group)
            if name not in fields:
                raise InputError(f"{COMMAND_LINE}: {_unknown(schema, group, path[:depth], written=override)}")
            annotation = fields[name]
        if depth == len(path):
            section[name] = Typed(_parse_word(text), text)
        else:
            section = _descend(section, path[:depth], is_group=as_dataclass(annotation) is not None)


def _descend(section: dict[str, Any], path: KeyPath, *, is_group: bool) -> dict[str, Any]:
    inner = section.get(path[-1])
    if (inner is None and not is_group) or not isinstance(inner, (dict, type(None))):
        name = ".".join(path)
        raise InputError(f"{COMMAND_LINE}: {name} is a single value, not a group of settings; write {name}=VALUE")
    # A copy, because a YAML alias may share this mapping with another key.
    section[path[-1]] = dict(inner or {})
    return section[path[-1]]


def _parse_word(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError):
        return text


# ------------------------------------------------------------------------------------------------------------------------------ checking


def _build(schema: type[T], settings: Any, path: KeyPath, places: _Places) -> T:
    fields = _field_types(schema)
    if not isinstance(settings, dict):
        names = ", ".join(list(fields)[:6])
        places.fail(path, f"{'.'.join(path)}={show(settings)} should be a group of settings, such as {names}")
    values: dict[str, Any] = {}
    for key, value in settings.items():
        key_path = (*path, str(key))
        if key not in fields:
            places.fail(key_path, _unknown(places.root, schema, key_path, written=f"{'.'.join(key_path)}={show(value)}"))
        values[key] = _convert_field(fields[key], value, key_path, places)
    _fail_missing(schema, values, path, places)
    try:
        return schema(**values)
    except ValueError as error:  # the schema's own __post_init__; InputError is a ValueError
        blamed = next((at for at in ((*path, key) for key in values) if at[-1] in str(error)), path)
        prefix = f"{'.'.join(path)}: " if path and not str(error).startswith(".".join(path)) else ""
        raise InputError(f"{places.of(blamed)}: {prefix}{error}") from None


def _convert_field(annotation: Any, value: Any, path: KeyPath, places: _Places) -> Any:
    try:
        return convert(annotation, value, lambda group, inner: _build(group, inner, path, places))
    except Mismatch as mismatch:
        places.fail(path, f"{'.'.join(path)}={show(value)} {mismatch}")


def _field_types(schema: type) -> dict[str, Any]:
    hints = get_type_hints(schema)
    return {field.name: hints[field.name] for field in dataclasses.fields(schema) if field.init}


def _fail_missing(schema: type, values: dict[str, Any], path: KeyPath, places: _Places) -> None:
    for field in dataclasses.fields(schema):
        required = field.init and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and field.name not in values:
            key = ".".join((*path, field.name))
            places.fail(path, f"{key} is required and not set; add it to the file or pass {key}=VALUE")


def _unknown(root: type, group: type, path: KeyPath, *, written: str) -> str:
    names = list(_field_types(group))
    hint = nearest(path[-1], names)
    if not hint:
        elsewhere = [".".join(known) for known in _all_paths(root, ()) if known[-1] == path[-1]]
        hint = f" did you mean '{elsewhere[0]}'?" if elsewhere else f" it has: {', '.join(names)}"
    return f"{written} is not a setting of {'.'.join(path[:-1]) or 'the config'};{hint}"


def _all_paths(schema: type, path: KeyPath) -> Iterator[KeyPath]:
    for name, annotation in _field_types(schema).items():
        yield (*path, name)
        group = as_dataclass(annotation)
        if group is not None:
            yield from _all_paths(group, (*path, name))


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value) if field.init}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value


def _flat(settings: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
