"""Settings as TOML and back: frozen dataclasses, nested ones as tables. An unknown key is an error, never ignored."""

import difflib
import json
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, TypeVar


T = TypeVar("T")


def to_toml(settings: Any, comment: str = "") -> str:
    """A dataclass as TOML. Fields that are None are left out: TOML has no word for it."""
    lines = [f"# {line}".rstrip() for line in comment.splitlines()]
    return "\n".join([*lines, *_table(_values(settings), "")]) + "\n"


def from_toml(kind: type[T], text: str, name: str = "the job file") -> T:
    """The dataclass that `to_toml` wrote. ValueError for text that is no TOML, an unknown key and a wrong type.

    Needs Python 3.11, whose standard library reads TOML.
    """
    try:
        import tomllib
    except ModuleNotFoundError as error:
        raise ValueError("job files need Python 3.11 or newer, whose standard library reads TOML") from error
    try:
        found = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{name} is not TOML: {error}") from error
    return build(kind, found, name)


def build(kind: type[T], found: Mapping[str, Any], where: str) -> T:
    """A dataclass from nested mappings. ValueError names the key and the place."""
    hints = typing.get_type_hints(kind)
    known = {field.name: field for field in fields(kind)}  # type: ignore[arg-type]
    for key in found:
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
            hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(known)}"
            raise ValueError(f"{where} has {key!r}, which is not a setting: {hint}")
    required = [n for n, f in known.items() if f.default is MISSING and f.default_factory is MISSING]
    for key in required:
        if key not in found:
            raise ValueError(f"{where} has no {key!r}, which it needs")
    values = {key: _read(hints[key], value, f"{where}, {key}") for key, value in found.items()}
    try:
        return kind(**values)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _read(hint: Any, value: Any, where: str) -> Any:
    choices = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    for choice in choices:
        if is_dataclass(choice) and isinstance(value, Mapping):
            return build(choice, value, where)  # type: ignore[arg-type]
    if isinstance(value, list):
        return tuple(tuple(item) if isinstance(item, list) else item for item in value)
    plain = [type(typing.get_args(c)[0]) if typing.get_origin(c) is typing.Literal else c for c in choices]
    if float in plain and type(value) is int:
        return float(value)
    if type(value) not in plain:
        names = " or ".join(kind.__name__ for kind in plain if isinstance(kind, type) and kind is not types.NoneType)
        raise ValueError(f"{where} is {value!r}, a {type(value).__name__}, but it must be {names}")
    return value


def _values(settings: Any) -> dict[str, Any]:
    """Nested dataclasses as nested dicts, in the order of their fields, without None."""
    found = {field.name: getattr(settings, field.name) for field in fields(settings)}
    return {k: _values(v) if is_dataclass(v) else v for k, v in found.items() if v is not None}


def _table(values: Mapping[str, Any], path: str) -> Iterator[str]:
    for key, value in values.items():
        if not isinstance(value, Mapping):
            yield f"{key} = {_literal(value)}"
    for key, value in values.items():
        if isinstance(value, Mapping):
            inner = f"{path}.{key}" if path else key
            yield from ("", f"[{inner}]")
            yield from _table(value, inner)


def _literal(value: Any) -> str:
    if isinstance(value, list | tuple):
        return f"[{', '.join(_literal(item) for item in value)}]"
    if isinstance(value, str | bool):
        # TOML's basic strings take JSON's escapes, except for halves of surrogate pairs, and want DEL escaped.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, int | float):
        return repr(value)
    raise TypeError(f"a job file cannot hold {value!r}, a {type(value).__name__}")
