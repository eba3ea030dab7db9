"""Dataclasses to JSON or YAML and back, strictly, and the files with a schema number that hold them.

Whatever the data says, reading it ends in a record or in an error that names the field.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, ClassVar, Literal, Self, TypeVar, Union, get_args, get_origin, get_type_hints

from gfldeploy.errors import DataError, GfldeployError, UsageError, reading
from gfldeploy.files import StrPath, read_json, write_json, write_text

Record = TypeVar("Record")
# From the data of one schema to that of the next, the schema number left out of both.
Upgrade = Callable[[dict[str, Any]], dict[str, Any]]

_REMEDY = "Use a file that gfldeploy wrote."
# Of numbers but 0, by magnitude: what is computed of a few of them is finite.
_SMALLEST, _LARGEST = 1e-100, 1e18
_MOST_TEXT = 20_000
_YAML_WIDTH = 120
# Fields that are counted or measured and are never negative, by the units and nouns that their names end in.
_NEVER_NEGATIVE = re.compile(
    r"(_ms|_s|_mb|_gb|_w|_hz|_mhz|_percent|images|detections|count|rounds|runs|requests|macs|traffic|bytes"
    r"|cells|measured|reused|seconds|threads|cores|batch_size|rate|ratio|warmup)$"
)
_kinds: Callable[[type], dict[str, Any]] = cache(get_type_hints)


def plain(value: Any) -> Any:
    """A record as JSON-ready data: dataclasses become dictionaries, tuples lists, paths text."""
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def build(cls: type[Record], data: object, where: str = "") -> Record:
    """The inverse of `plain`. `where` names the data in messages.

    Fields that the data lacks take their defaults. Raises `DataError` for unknown fields, for a missing one without a
    default, for values of another type, NaN and infinity, and for what the class itself refuses.
    """
    if not isinstance(data, dict):
        raise _wrong(where, "an object", data)
    declared = {one.name: one for one in fields(cls)}  # type: ignore[arg-type]
    if unknown := sorted(str(key) for key in data.keys() - declared.keys()):
        raise DataError(f"{where or 'it'} has unknown fields: {', '.join(unknown):.200}", _REMEDY)
    required = (name for name, one in declared.items() if one.default is MISSING and one.default_factory is MISSING)
    if missing := sorted(name for name in required if name not in data):
        raise DataError(f"{where or 'it'} lacks {', '.join(missing)}", _REMEDY)
    kinds = _kinds(cls)
    values = {name: _convert(kinds[name], value, _inside(where, name)) for name, value in data.items()}
    for name, value in values.items():
        numbers = value if isinstance(value, tuple) else (value,)
        if is_never_negative(name) and any(isinstance(one, int | float) and one < 0 for one in numbers):
            raise _wrong(_inside(where, name), "0 or more", value)
    try:
        return cls(**values)
    except GfldeployError as error:
        raise DataError(f"{where}: {error.problem}" if where else error.problem, error.remedy) from error
    except (ValueError, TypeError, ArithmeticError) as error:
        raise DataError(f"{where}: {error}" if where else str(error), _REMEDY) from error


def is_never_negative(name: str) -> bool:
    """Whether a field of this name is counted or measured, and never below 0."""
    return _NEVER_NEGATIVE.search(name) is not None


def check(kind: Any, data: object, where: str = "") -> None:
    """Raise `DataError` unless the data is of this kind: a type as fields of dataclasses have, or `{"name": kind}`.

    The latter is an object with these keys, of which those that end in `?` may be absent, and any others. `[kind]` is
    a list, `{str: kind}` an object with any keys.
    """
    _convert(kind, data, where)


def _convert(kind: Any, value: object, where: str) -> Any:
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if origin in (Union, UnionType):
        (other,) = (item for item in arguments if item is not NoneType)
        return None if value is None else _convert(other, value, where)
    if origin is Literal:
        if value not in arguments:
            raise _wrong(where, f"one of {', '.join(map(str, arguments))}", value)
        return value
    if isinstance(kind, list) or origin is tuple:
        if not isinstance(value, list):
            raise _wrong(where, "a list", value)
        kinds = (*kind, ...) if isinstance(kind, list) else arguments
        kinds = kinds[:1] * len(value) if kinds[-1] is ... else kinds
        if len(value) != len(kinds):
            raise _wrong(where, f"a list of {len(kinds)}", value)
        pairs = zip(kinds, value, strict=True)
        return tuple(_convert(one, item, f"{where}[{number}]") for number, (one, item) in enumerate(pairs))
    if origin is Mapping or isinstance(kind, dict):
        if not isinstance(value, dict):
            raise _wrong(where, "an object", value)
        if origin is Mapping or str in kind:
            of_keys, of_values = arguments or (str, kind[str])
            return {
                _convert(of_keys, key, where): _convert(of_values, item, _inside(where, f"{key!s:.60}"))
                for key, item in value.items()
            }
        for key, inner in kind.items():
            name = key.removesuffix("?")
            if name in value:
                _convert(inner, value[name], _inside(where, name))
            elif name == key:
                raise _wrong(where, f"an object with {name}", value)
        return value
    if isinstance(kind, type) and is_dataclass(kind):
        return build(kind, value, where)
    return _scalar(kind, value, where)


def _scalar(kind: Any, value: object, where: str) -> Any:
    if kind is Path and isinstance(value, str) and "\0" not in value:
        return Path(value)  # half a surrogate pair stands for a byte that is not UTF-8
    if isinstance(value, str) and (len(value) > _MOST_TEXT or any("\ud800" <= one <= "\udfff" for one in value)):
        raise _wrong(where, "text of a sensible length", value)
    if isinstance(value, int | float) and not isinstance(value, bool) and not _is_sensible(value):
        raise _wrong(where, "a finite number of a sensible size", value)
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if kind in (int, str, bool) and type(value) is kind:
        return value
    raise _wrong(where, {Path: "a path", float: "a finite number"}.get(kind, f"of type {kind.__name__}"), value)


def _is_sensible(number: float) -> bool:
    return number == 0 or _SMALLEST <= abs(number) <= _LARGEST  # NaN is neither


def _inside(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name


def _wrong(where: str, expected: str, value: object) -> DataError:
    shown = (
        f"a number of {value.bit_length()} bits" if isinstance(value, int) and value > _LARGEST else f"{value!r:.60}"
    )
    return DataError(f"{where or 'it'} must be {expected}, not {shown}", _REMEDY)


@dataclass(frozen=True)
class FileFormat:
    """A kind of file with a schema number, in JSON or YAML, and how files of older schemas are read.

    `what`: its name in messages, such as "results"; `writer`: the command that writes it. `schema`: the number that is
    written; `upgrades`: by older number, the function that makes data of the next schema from it. Upgrades need not
    check what they are given. `error`: what reading raises.
    """

    what: str
    writer: str
    schema: int
    upgrades: Mapping[int, Upgrade] = field(default_factory=dict)
    error: type[GfldeployError] = DataError
    yaml: bool = False

    @property
    def remedy(self) -> str:
        """What to do about a file that is none of these."""
        return f"Give what `{self.writer}` wrote, or make it again."

    def upgraded(self, data: object) -> dict[str, Any]:
        """The data in the present schema, without its number. Raises `error`."""
        found = data.get("schema") if isinstance(data, dict) else None
        if not isinstance(data, dict) or type(found) is not int:
            raise self.error(f"{self.what} with no schema number", self.remedy)
        oldest = min(self.upgrades, default=self.schema)
        if not oldest <= found <= self.schema:
            newer = found > self.schema
            raise self.error(
                f"{self.what} written by {'a newer' if newer else 'an older'} gfldeploy: schema {found}, this one "
                f"reads schema {f'{oldest} to ' if oldest < self.schema else ''}{self.schema}",
                "Update gfldeploy." if newer else f"Make it again with `{self.writer}`.",
            )
        upgraded = {key: value for key, value in data.items() if key != "schema"}
        for number in range(found, self.schema):
            with reading(f"{self.what} of schema {number}", self.error, self.remedy):
                upgraded = self.upgrades[number](upgraded)
        return upgraded


class Versioned:
    """A dataclass that is the content of a file with a schema number: its `FORMAT`."""

    FORMAT: ClassVar[FileFormat]

    def to_dict(self) -> dict[str, Any]:
        """As JSON-ready data, the schema number first; `from_dict` is the inverse."""
        return {"schema": self.FORMAT.schema, **plain(self)}

    @classmethod
    def from_dict(cls, data: object) -> Self:
        """Upgrade, check and build. Raises the error of the `FORMAT` for a schema that is not read, and as `build`."""
        data = cls.FORMAT.upgraded(data)
        try:
            return build(cls, data)
        except DataError as error:
            # Of the class itself, or of what users turn: with a remedy for just this.
            own = isinstance(error.__cause__, cls.FORMAT.error | UsageError)
            raise cls.FORMAT.error(error.problem, error.remedy if own else cls.FORMAT.remedy) from error

    def write(self, path: StrPath) -> None:
        """Write the file in one step, replacing any other. Raises `OutputError`."""
        path = Path(path)
        if not self.FORMAT.yaml:
            write_json(path, self.to_dict())
            return
        import yaml

        write_text(path, yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True, width=_YAML_WIDTH))

    @classmethod
    def read(cls, path: StrPath) -> Self:
        """Read a file that `write` wrote, with this version or an older one. Raises as `from_dict`."""
        path = Path(path)
        with reading(path, cls.FORMAT.error, cls.FORMAT.remedy):
            if cls.FORMAT.yaml:
                from gfldeploy.yaml_file import read_yaml

                data = read_yaml(path)
            else:
                data = read_json(path)
        try:
            return cls.from_dict(data)
        except cls.FORMAT.error as error:
            raise cls.FORMAT.error(f"{path}: {error.problem}", error.remedy) from error


def part(data: Any, *path: str, kind: type = dict) -> Any:
    """The value at a path of keys, for upgrades, which are given unchecked data.

    Raises `ValueError` unless it is there and of this kind.
    """
    value = data
    for key in path:
        value = value.get(key) if isinstance(value, dict) else None
    if not isinstance(value, kind):
        raise ValueError(f"{'.'.join(path)} must be {'an object' if kind is dict else 'a list'}, not {value!r:.60}")
    return value
