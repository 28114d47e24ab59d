"""TOML files read into frozen dataclasses, with errors that say file, key and what is allowed."""

import dataclasses
import difflib
import json
import tomllib
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import tomli_w

from fedward.canonical import canonical_json
from fedward.errors import ConfigurationError, InvalidValue

T = TypeVar("T")

REST = "rest"
"""Metadata key of the one field that takes every key the dataclass does not name."""

LATER = "later"
"""Metadata key of a field that came when hashes had been approved: at its default it is not in a
plan's JSON, so that a plan without it has the hash that it had."""

_KINDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}


def load(cls: type[T], path: Path) -> T:
    """Read a TOML file into ``cls``.

    Raises:
        ConfigurationError: The file is missing, is not TOML, or does not fit ``cls``; the message
            starts with the file's name.
    """
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigurationError(f"{path}: no such file") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{path}: cannot be read as UTF-8 text: {error}") from error
    except (ValueError, RecursionError) as error:  # plain ValueError for 5000 digits
        raise ConfigurationError(f"{path}: not valid TOML: {error}") from error
    try:
        return parse(cls, data)
    except ConfigurationError as error:
        raise ConfigurationError(f"{path}: {error}") from error


def parse(cls: type[T], data: Mapping[str, Any], section: str = "") -> T:
    """Build ``cls`` from a mapping, section by section.

    Args:
        cls: A dataclass of scalars, literals, tuples, dataclasses and unions with None.
        data: Keys and values as ``tomllib`` gives them.
        section: Where ``data`` stands in the file, for messages.

    Raises:
        ConfigurationError: An unknown or missing key, or a value that does not fit.
    """
    where = f"[{section}] " if section else ""
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]  # T is one
    hints = typing.get_type_hints(cls)
    rest = next((name for name, field in fields.items() if field.metadata.get(REST)), None)
    unknown = [key for key in data if key not in fields or key == rest]
    if unknown and rest is None:
        raise ConfigurationError(f"{where}{_unknown(unknown[0], list(fields))}")
    values: dict[str, Any] = {
        key: _convert(hints[key], value, key, f"{section}.{key}" if section else key, where)
        for key, value in data.items()
        if key not in unknown
    }
    if rest is not None:
        values[rest] = {key: data[key] for key in unknown}
    missing = [
        name
        for name, field in fields.items()
        if name not in values
        and field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ConfigurationError(f"{where}missing key {missing[0]!r}")
    try:
        return cls(**values)
    except InvalidValue as error:
        raise ConfigurationError(f"{where}{error}") from error


def _unknown(key: str, known: list[str]) -> str:
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
    return f"unknown key {key!r}; {hint}"


def _convert(hint: Any, value: Any, key: str, section: str, where: str) -> Any:  # noqa: ANN401  # TOML values
    """Check one TOML value against one type hint and return it as that type."""

    def check(holds: bool, allowed: str) -> None:
        if not holds:
            raise ConfigurationError(f"{where}{InvalidValue(key, value, allowed)}")

    hint = _without_none(hint)
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        check(isinstance(value, Mapping), "a section")
        return parse(typing.cast("type[Any]", hint), value, section)
    if origin is tuple:
        check(isinstance(value, list), "a list")
        return tuple(_convert(options[0], item, key, section, where) for item in value)
    if origin is Mapping:
        check(isinstance(value, Mapping), "a section")
        inner = f"{where}{key}."
        return {
            name: _convert(options[1], item, name, section, inner) for name, item in value.items()
        }
    if origin is typing.Literal:
        # By type too, because 32.0 and 32 are equal.
        holds = any(type(value) is type(option) and value == option for option in options)
        check(holds, "one of " + ", ".join(repr(option) for option in options))
        return value
    if hint is float and type(value) is int:
        check(abs(value) < 2**1023, "a number that a float holds")
        return float(value)
    check(type(value) is hint and value == value, _KINDS[hint])  # NaN differs from itself
    return value


def _without_none(hint: Any) -> Any:  # noqa: ANN401  # a type
    """``X`` for the hint ``X | None``; any other hint as it is."""
    if typing.get_origin(hint) is types.UnionType:
        return next(option for option in typing.get_args(hint) if option is not types.NoneType)
    return hint


def parse_json(cls: type[T], data: bytes) -> T:
    """Build ``cls`` from the JSON of its ``dataclasses.asdict``; nulls mean left out.

    Raises:
        ConfigurationError: Not JSON, not an object, or it does not fit ``cls``.
    """
    try:
        values = json.loads(data)
        canonical_json(values)  # half a surrogate pair can be read but not written
    except (ValueError, RecursionError) as error:
        raise ConfigurationError(f"not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise ConfigurationError("expected a JSON object")
    return parse(cls, _flatten_rest(cls, values))


def _flatten_rest(cls: Any, values: Mapping[str, Any]) -> dict[str, Any]:  # noqa: ANN401  # a type
    """Undo ``asdict``: drop nulls, and lift the keys of a ``REST`` field back into its section."""
    hints, flat = typing.get_type_hints(cls), dict[str, Any]()
    rest = {field.name for field in dataclasses.fields(cls) if field.metadata.get(REST)}
    for key, value in values.items():
        inner = _without_none(hints.get(key))
        if value is None:
            continue
        if key in rest and isinstance(value, Mapping):
            flat.update(value)
        elif dataclasses.is_dataclass(inner) and isinstance(value, Mapping):
            flat[key] = _flatten_rest(inner, value)
        else:
            flat[key] = value
    return flat


def dump(value: Any) -> str:  # noqa: ANN401  # any dataclass
    """Write a dataclass as TOML, which :func:`parse` reads back equal; None is left out.

    The keys of a ``REST`` field stand in their section, as they are read.
    """
    return tomli_w.dumps(_values(value))


def _values(value: Any) -> dict[str, Any]:  # noqa: ANN401  # any dataclass
    values = dict[str, Any]()
    for field in dataclasses.fields(value):
        item = vars(value)[field.name]
        if field.metadata.get(REST):
            values.update(item)
        elif item is not None:
            values[field.name] = _values(item) if dataclasses.is_dataclass(item) else item
    return values
