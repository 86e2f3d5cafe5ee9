"""Plain data (TOML, JSON) into frozen dataclasses, and back, strictly.

An unknown key, a missing one or a value of another type is a `ConfigError` that names the key by its path and, for an
unknown key, the nearest valid name. Nothing is coerced but a whole number where a float is wanted. What a component's
values mean (ranges, combinations) is the component's own business.
"""

from __future__ import annotations

import dataclasses
import json
import math
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeGuard, TypeVar, Union, get_args, get_origin, get_type_hints

from dseek.core.errors import ConfigError

T = TypeVar("T")

_hints_of_kinds: dict[type[Any], dict[str, Any]] = {}
"""Resolved field types of every dataclass met, since resolving them is slow."""


def from_mapping(kind: type[T], data: object, *, where: str = "") -> T:
    """Build a dataclass from plain data.

    Args:
        kind: a dataclass whose fields are str, int, float, bool, Path, None, Literal, tuples, dictionaries with string
            keys, unions of these, or such dataclasses again.
        data: a mapping from field names to plain values.
        where: what the data is, as the start of every path in a message (a file's name, say).

    Returns:
        An instance of `kind`; fields that are absent have their defaults.

    Raises:
        ConfigError: an unknown or missing key, or a value of another type.
    """
    if not isinstance(data, Mapping):
        raise _wrong_type(where, data, "a table of " + ", ".join(field.name for field in _fields(kind)))
    hints = _hints(kind)
    values: dict[str, Any] = {}
    for key, value in data.items():
        if key not in hints:
            raise _unknown_key(key, hints, where)
        values[key] = _convert(hints[key], value, _join(where, key))
    for field in _fields(kind):
        has_default = field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING
        if field.name not in values and not has_default:
            raise ConfigError(f"{_join(where, field.name)} is missing", needed=_name_of(hints[field.name]))
    return kind(**values)


def to_plain(value: Any) -> Any:
    """Turn a dataclass (or any value inside one) into dictionaries, lists and scalars, ready for JSON.

    Args:
        value: a dataclass instance, tuple, list, dictionary, Path or scalar.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [to_plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    return value


def load_toml(kind: type[T], path: str | Path) -> T:
    """Read a TOML file into a dataclass.

    Args:
        kind: see `from_mapping`.
        path: the file.

    Raises:
        ConfigError: the file is not there, is not TOML, or does not fit `kind`.
    """
    return from_mapping(kind, read_toml(path), where=str(path))


def read_toml(path: str | Path) -> dict[str, Any]:
    """Read a TOML file as plain data.

    Args:
        path: the file.

    Raises:
        ConfigError: the file is not there or is not TOML.
    """
    import tomllib  # what starts quickly reads JSON only

    text = _read_text(Path(path))
    try:
        return tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise ConfigError(f"{path} is not TOML: {error}") from None


def parse_json(text: str, *, where: str) -> Any:
    """Parse JSON strictly: no NaN or infinity, no key twice, no bottomless nesting.

    Args:
        text: the JSON document.
        where: what it is, for messages.

    Raises:
        ConfigError: the text is not such JSON.
    """
    try:
        return json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_unique_pairs)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where} is not the JSON expected: {error}") from None


def load_json(kind: type[T], path: str | Path) -> T:
    """Read a JSON file into a dataclass.

    Args:
        kind: see `from_mapping`.
        path: the file.

    Raises:
        ConfigError: the file is not there, is not JSON, or does not fit `kind`.
    """
    return from_mapping(kind, parse_json(_read_text(Path(path)), where=str(path)), where=str(path))


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}") from None
    except ValueError as error:
        raise ConfigError(f"{path} is not UTF-8 text: {error}") from None


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a number that JSON has")


def _unique_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        names = [key for key, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"key {twice!r} appears twice")
    return result


def _fields(kind: type[Any]) -> tuple[dataclasses.Field[Any], ...]:
    return dataclasses.fields(kind)


def _is_dataclass(hint: Any) -> TypeGuard[type[Any]]:
    return isinstance(hint, type) and dataclasses.is_dataclass(hint)


def _hints(kind: type[Any]) -> dict[str, Any]:
    known = _hints_of_kinds.get(kind)
    if known is None:
        assert _is_dataclass(kind), kind
        hints = get_type_hints(kind)
        known = {field.name: hints[field.name] for field in _fields(kind) if field.init}
        _hints_of_kinds[kind] = known
    return known


def _join(where: str, key: str) -> str:
    return f"{where}.{key}" if where else key


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _name_of(hint: Any) -> str:
    """The type as a reader of a configuration file would say it."""
    origin = get_origin(hint)
    if origin is Literal:
        return "one of " + ", ".join(str(value) for value in get_args(hint))
    if origin in (Union, types.UnionType):
        return " or ".join(_name_of(option) for option in get_args(hint))
    if origin is tuple:
        return "a list of " + _name_of(get_args(hint)[0])
    if origin is dict:
        return "a table of " + _name_of(get_args(hint)[1])
    if _is_dataclass(hint):
        return "a table of " + ", ".join(_hints(hint))
    names = {int: "a whole number", float: "a number", str: "a text", bool: "true or false", Path: "a path"}
    return names.get(hint, "nothing" if hint is type(None) else str(hint))


def _wrong_type(where: str, value: object, needed: str) -> ConfigError:
    return ConfigError(f"{where or 'the value'} is {_shown(value)}", needed=needed)


def _unknown_key(key: object, hints: Mapping[str, Any], where: str) -> ConfigError:
    import difflib  # for a misspelt key only

    near = difflib.get_close_matches(str(key), hints, n=1, cutoff=0.0)
    return ConfigError(
        f"unknown key {_shown(key)}{' in ' + where if where else ''}",
        needed="one of " + ", ".join(hints),
        remedy=f"did you mean {near[0]!r}?" if near else None,
    )


def _convert(hint: Any, value: object, where: str) -> Any:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return _convert_union(hint, value, where)
    if origin is Literal:
        if any(type(value) is type(option) and value == option for option in arguments):
            return value
    elif origin is tuple:
        if isinstance(value, (list, tuple)):
            return _convert_tuple(hint, value, where)
    elif origin is dict:
        if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
            return {key: _convert(arguments[1], item, _join(where, key)) for key, item in value.items()}
    elif _is_dataclass(hint):
        return from_mapping(hint, value, where=where)
    elif hint is float:
        if isinstance(value, (int, float)) and not isinstance(value, bool) and _is_finite(value):
            return float(value)
    elif hint is Path:
        if isinstance(value, (str, Path)):
            return Path(value)
    elif hint in (int, bool, str, type(None)):
        if type(value) is hint:
            return value
    else:
        raise AssertionError(f"{where}: a field of type {hint} cannot be read from plain data")
    raise _wrong_type(where, value, _name_of(hint))


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def _convert_union(hint: Any, value: object, where: str) -> Any:
    """The first alternative that fits; where none does, the fault of the only alternative besides None, else of all."""
    options = [option for option in get_args(hint) if option is not type(None)]
    if value is None and len(options) < len(get_args(hint)):
        return None
    if len(options) == 1:
        return _convert(options[0], value, where)
    for option in options:
        try:
            return _convert(option, value, where)
        except ConfigError:
            continue
    raise _wrong_type(where, value, _name_of(hint))


def _convert_tuple(hint: Any, value: list[Any] | tuple[Any, ...], where: str) -> tuple[Any, ...]:
    arguments = get_args(hint)
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        # Long rows of numbers, which a measured machine is made of: nothing to convert and no path to make for each.
        if arguments[0] is int and all(type(item) is int for item in value):
            return tuple(value)
        if arguments[0] is float and all(type(item) is float and math.isfinite(item) for item in value):
            return tuple(value)
        return tuple(_convert(arguments[0], item, f"{where}[{index}]") for index, item in enumerate(value))
    if len(value) != len(arguments):
        raise _wrong_type(where, value, f"a list of {len(arguments)} values")
    return tuple(
        _convert(kind, item, f"{where}[{index}]")
        for index, (kind, item) in enumerate(zip(arguments, value, strict=True))
    )
