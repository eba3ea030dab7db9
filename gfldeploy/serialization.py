"""Frozen dataclasses to JSON and back, strictly: unknown keys, missing keys and wrong types are errors."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from gfldeploy.errors import DataError

__all__ = ["build", "check_schema", "plain"]

Record = TypeVar("Record")

_LARGEST = 1e18
_MOST_TEXT = 20_000
# What is counted or measured and cannot be less than nothing, by the units and nouns that names of fields end in.
_NEVER_NEGATIVE = re.compile(
    r"(_ms|_s|_mb|_gb|_w|_hz|_mhz|_percent|images|detections|count|rounds|runs|requests|macs|traffic|bytes"
    r"|cells|measured|reused|seconds|threads|cores|batch_size|rate|ratio|warmup)$"
)


def plain(value: Any) -> Any:
    """A record as JSON-ready data: dataclasses become dictionaries, tuples lists, paths text."""
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def build(cls: type[Record], data: object, where: str) -> Record:
    """The inverse of `plain`. `where` names the data in messages.

    Raises `DataError` for unknown or missing keys, values of another type, NaN and infinity.
    """
    if not isinstance(data, dict):
        raise _wrong(where, "an object", data)
    names = {field.name for field in fields(cls)}  # type: ignore[arg-type]
    if unknown := sorted(str(key) for key in set(data) - names):
        raise DataError(f"{where} has unknown keys: {', '.join(unknown):.200}", "Use a file that gfldeploy wrote.")
    if missing := sorted(names - set(data)):
        raise DataError(f"{where} lacks {', '.join(missing)}", "Use a file that gfldeploy wrote.")
    hints = get_type_hints(cls)
    values = {name: _convert(hints[name], data[name], f"{where}.{name}") for name in names}
    for name, value in values.items():
        numbers = value if isinstance(value, tuple) else (value,)
        if _NEVER_NEGATIVE.search(name) and any(isinstance(one, int | float) and one < 0 for one in numbers):
            raise _wrong(f"{where}.{name}", "0 or more", value)
    try:
        return cls(**values)
    except (ValueError, TypeError, ArithmeticError) as error:
        raise DataError(f"{where}: {error}", "Use a file that gfldeploy wrote.") from error


def _convert(kind: Any, value: object, where: str) -> Any:
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        (other,) = (item for item in arguments if item is not NoneType)
        return None if value is None else _convert(other, value, where)
    if origin is Literal:
        if value not in arguments:
            raise _wrong(where, f"one of {', '.join(map(str, arguments))}", value)
        return value
    if origin is tuple:
        if not isinstance(value, list):
            raise _wrong(where, "a list", value)
        return tuple(_convert(arguments[0], item, f"{where}[{number}]") for number, item in enumerate(value))
    if origin is Mapping:
        if not isinstance(value, dict):
            raise _wrong(where, "an object", value)
        return {
            _convert_scalar(arguments[0], key, where): _convert(arguments[1], item, f"{where}.{key!s:.60}")
            for key, item in value.items()
        }
    if is_dataclass(kind):
        assert isinstance(kind, type)
        return build(kind, value, where)
    return _convert_scalar(kind, value, where)


def _convert_scalar(kind: Any, value: object, where: str) -> Any:
    if isinstance(value, str) and (len(value) > _MOST_TEXT or any("\ud800" <= one <= "\udfff" for one in value)):
        raise _wrong(where, "text of a sensible length", value)
    if kind is Path and isinstance(value, str) and "\0" not in value:
        return Path(value)
    if isinstance(value, int | float) and not isinstance(value, bool) and not abs(value) <= _LARGEST:  # NaN is not
        raise _wrong(where, "a finite number of a sensible size", value)
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if kind in (int, str, bool) and type(value) is kind:
        return value
    raise _wrong(where, {Path: "a path", float: "a finite number"}.get(kind, f"of type {kind.__name__}"), value)


def _wrong(where: str, expected: str, value: object) -> DataError:
    shown = (
        f"a number of {value.bit_length()} bits" if isinstance(value, int) and value > _LARGEST else f"{value!r:.60}"
    )
    return DataError(f"{where} must be {expected}, not {shown}", "Use a file that gfldeploy wrote.")


def check_schema(data: object, schema: int, what: str, writer: str, again: str) -> None:
    """Raise `DataError` unless `data` is of this schema. `what`: names the data; `writer`, `again`: remedies for what
    is no such file, and for one of an older version."""
    found = data.get("schema") if isinstance(data, dict) else None
    if type(found) is not int:
        raise DataError(f"{what} with no schema number", writer)
    if found != schema:
        newer = found > schema
        raise DataError(
            f"{what} written by {'a newer' if newer else 'an older'} gfldeploy: schema {found}, this one reads schema "
            f"{schema}",
            "Update gfldeploy." if newer else again,
        )
