"""From a plain dict to a dataclass, with every name and type checked and every error naming the field."""

from __future__ import annotations

import dataclasses
import sys
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from .errors import ConfigError, UserError, name_message

T = TypeVar("T")


def from_dict(cls: type[T], values: Mapping[str, Any], where: str = "") -> T:
    """Build a dataclass from a mapping, nested dataclasses included.

    Accepted field types: bool, int, float (whole numbers are taken), str, Path (from text), Literal, X | Y, list,
    tuple, set, dict, dataclasses, Any; any other type is left unchecked. Nothing is converted: "3" is no number.

    Args:
        where: dotted name of the mapping, put before the field's name in errors.
    Raises: ConfigError for an unknown field (the nearest is named), a missing one, a wrong type, a float that is not
        finite; and whatever the dataclass's own __post_init__ raises.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where or cls.__name__} must be a group of key: value, got {values!r}")
    known = {item.name: item for item in dataclasses.fields(cls) if item.init}  # type: ignore[arg-type]
    for key in values:
        if key not in known:
            raise ConfigError(name_message(f"field{f' in {where}' if where else ''}", key, known))
    hints = typing.get_type_hints(cls)
    taken = {}
    for name, item in known.items():
        path = f"{where}.{name}" if where else name
        if name in values:
            taken[name] = convert(values[name], hints[name], path)
        elif item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING:
            raise ConfigError(f"field {path!r} has no value; give {path}=...")
    try:
        return cls(**taken)
    except UserError:
        raise
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{where + ': ' if where else ''}{error}") from error


def convert(value: Any, kind: Any, path: str) -> Any:
    """The value, checked against a type. Raises ConfigError that says what `path` must be."""
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any or isinstance(kind, TypeVar):
        return value
    if origin in (Union, types.UnionType):
        return _convert_union(value, kind, arguments, path)
    if origin is Literal:
        if value in arguments and type(value) in {type(allowed) for allowed in arguments}:
            return value
        raise ConfigError(name_message(path, value, arguments))
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return value if isinstance(value, kind) else from_dict(kind, value, path)
    if origin in (list, tuple, set) or kind in (list, tuple, set):
        return _convert_sequence(value, origin or kind, arguments, path)
    if origin in (dict, Mapping) or kind in (dict, Mapping):
        if not isinstance(value, Mapping):
            raise _wrong(path, kind, value)
        key_kind, item_kind = arguments or (Any, Any)
        return {
            convert(key, key_kind, f"key of {path}"): convert(item, item_kind, f"{path}.{key}")
            for key, item in value.items()
        }
    return _convert_scalar(value, kind, path)


def _convert_scalar(value: Any, kind: Any, path: str) -> Any:
    if kind is None or kind is type(None):
        if value is None:
            return None
        raise _wrong(path, kind, value)
    if kind is float:
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            if not abs(value) <= sys.float_info.max:  # NaN, infinity, or a whole number that no float can hold
                raise ConfigError(f"{path} must be finite, got {value!r:.60}")
            return float(value)
        raise _wrong(path, kind, value)
    if kind is int:
        if isinstance(value, int) and not isinstance(value, bool):
            return value
        raise _wrong(path, kind, value)
    if kind is Path:
        if isinstance(value, (str, Path)) and str(value):
            return Path(value)
        raise _wrong(path, kind, value)
    if kind in (str, bool) and not isinstance(value, kind):
        raise _wrong(path, kind, value)
    return value


def _convert_union(value: Any, kind: Any, arguments: tuple[Any, ...], path: str) -> Any:
    if value is None and type(None) in arguments:
        return None
    choices = [choice for choice in arguments if choice is not type(None)]
    exact = [choice for choice in choices if choice is type(value)]
    if exact:
        return convert(value, exact[0], path)
    errors = []
    for choice in choices:
        try:
            return convert(value, choice, path)
        except ConfigError as error:
            errors.append(error)
    raise errors[0] if len(errors) == 1 else _wrong(path, kind, value)


def _convert_sequence(value: Any, kind: Any, arguments: tuple[Any, ...], path: str) -> Any:
    if not isinstance(value, (list, tuple)):
        raise _wrong(path, kind, value)
    if kind is tuple and arguments and arguments[-1] is not Ellipsis:
        if len(value) != len(arguments):
            raise ConfigError(f"{path} must have {len(arguments)} entries, got {len(value)}")
        kinds = list(arguments)
    else:
        kinds = [arguments[0] if arguments else Any] * len(value)
    return kind(convert(value[i], item_kind, f"{path}[{i}]") for i, item_kind in enumerate(kinds))


_NAMES = {int: "a whole number", float: "a number", str: "text", bool: "true or false", Path: "a path"}
_NAMES |= {dict: "a group of key: value", list: "a list", tuple: "a list", set: "a list", Mapping: "a group"}


def _name_of(kind: Any) -> str:
    if kind is None or kind is type(None):
        return "null"
    if get_origin(kind) in (Union, types.UnionType):
        return " or ".join(_name_of(choice) for choice in get_args(kind))
    if get_origin(kind) is Literal:
        return " or ".join(map(repr, get_args(kind)))
    return _NAMES.get(get_origin(kind) or kind, getattr(kind, "__name__", str(kind)))


def _wrong(path: str, kind: Any, value: Any) -> ConfigError:
    return ConfigError(f"{path} must be {_name_of(kind)}, got {value!r}")
