"""JSON Schemas (draft 2020-12) of what is written, from the types that `serialization` writes and reads it by."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from inspect import cleandoc
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from gfldeploy.serialization import Versioned, is_never_negative, plain

_DRAFT = "https://json-schema.org/draft/2020-12/schema"
_TYPES = {str: "string", Path: "string", int: "integer", float: "number", bool: "boolean", NoneType: "null"}
# Fields that a docstring is about to describe, such as "`low`, `high`: ".
_DESCRIBED = re.compile(r"(?P<names>`\w+`(?:, and `\w+`|, `\w+`| and `\w+`)*): ")
# Fields of a class that are computed as it is written, by their names.
Computed = Mapping[type, Mapping[str, Any]]


def json_schema(
    kind: Any, name: str, title: str, description: str, computed: Computed | None = None, closed: bool = True
) -> dict[str, Any]:
    """The schema of a file or line, `name` and `title`, that holds a `kind`.

    A kind is a dataclass, a type as its fields have, or what `serialization.check` takes: `{"name": kind}`, in which
    names that end in `?` may be absent, `{str: kind}`, and `[kind]`. In place of any, `(kind, kind)` is one of several.
    `closed`: objects of the form `{"name": kind}` have no other fields. Descriptions of fields are those in the
    docstrings of their classes. Raises `TypeError` for a type that is none of these.
    """
    making = _Schemas(computed or {}, closed, isinstance(kind, type) and issubclass(kind, Versioned))
    root = making.record(kind) if isinstance(kind, type) and is_dataclass(kind) else making.schema(kind)
    head = {"$schema": _DRAFT, "$id": f"urn:gfldeploy:schema:{name}", "title": title, "description": description}
    shared = {"$defs": dict(sorted(making.shared.items()))} if making.shared else {}
    return {**head, **{key: value for key, value in root.items() if key != "description"}, **shared}


class _Schemas:
    """`shared`: those of the classes that were asked for so far. `read`: whether `serialization.build` reads what is
    written, and refuses negative numbers by the names of fields."""

    def __init__(self, computed: Computed, closed: bool, read: bool) -> None:
        self.shared: dict[str, dict[str, Any]] = {}
        self._computed, self._closed, self._read = computed, closed, read

    def schema(self, kind: Any) -> dict[str, Any]:
        """Of any kind."""
        origin, arguments = get_origin(kind), get_args(kind)
        if kind is Any:
            return {}
        if isinstance(kind, type) and kind in _TYPES:
            return {"type": _TYPES[kind]}
        if isinstance(kind, type) and is_dataclass(kind):
            return self._reference(kind)
        if origin is Literal:
            return {"enum": list(arguments)}
        if origin in (Union, UnionType) or isinstance(kind, tuple):
            return _one_of([self.schema(one) for one in arguments or kind])
        if isinstance(kind, list):
            return {"type": "array", "items": self.schema(kind[0])}
        if origin is tuple:
            return self._array(arguments)
        if origin is Mapping or (isinstance(kind, dict) and str in kind):
            return self._mapping(*(arguments or (str, kind[str])))
        if isinstance(kind, dict):
            properties = {key.removesuffix("?"): self.schema(one) for key, one in kind.items()}
            required = [key for key in kind if not key.endswith("?")]
            return _object(properties, required, self._closed)
        raise TypeError(f"no schema is known for {kind!r}")

    def record(self, cls: type) -> dict[str, Any]:
        """Of a dataclass, its fields in place."""
        kinds, told = get_type_hints(cls), _descriptions(cls)
        properties: dict[str, Any] = {}
        if issubclass(cls, Versioned):
            properties["schema"] = {"const": cls.FORMAT.schema}
        for one in fields(cls):
            schema = self.schema(kinds[one.name])
            if self._read and is_never_negative(one.name):
                schema = _not_negative(schema)
            description = {"description": told[one.name]} if one.name in told else {}
            properties[one.name] = {**schema, **description, **_default(one)}
        required = [name for name, one in properties.items() if "default" not in one]
        for name, kind in self._computed.get(cls, {}).items():
            properties[name] = self.schema(kind)
            required.append(name)
        return {**({"description": told[""]} if told[""] else {}), **_object(properties, required, True)}

    def _reference(self, cls: type) -> dict[str, Any]:
        if cls.__name__ not in self.shared:
            self.shared[cls.__name__] = {}  # it may hold others of its own
            self.shared[cls.__name__] = self.record(cls)
        return {"$ref": f"#/$defs/{cls.__name__}"}

    def _array(self, arguments: tuple[Any, ...]) -> dict[str, Any]:
        if arguments[-1] is ...:
            return {"type": "array", "items": self.schema(arguments[0])}
        members = [self.schema(one) for one in arguments]
        return {"type": "array", "prefixItems": members, "items": False, "minItems": len(members)}

    def _mapping(self, keys: Any, values: Any) -> dict[str, Any]:
        schema: dict[str, Any] = {"type": "object"}
        if keys is int:
            schema["propertyNames"] = {"pattern": "^-?[0-9]+$"}
        elif keys is not str:
            schema["propertyNames"] = self.schema(keys)
        if values is not Any:
            schema["additionalProperties"] = self.schema(values)
        return schema


def _object(properties: Mapping[str, Any], required: list[str], closed: bool) -> dict[str, Any]:
    needed = {"required": required} if required else {}
    return {"type": "object", "properties": properties, **needed, **({"additionalProperties": False} if closed else {})}


def _one_of(schemas: list[dict[str, Any]]) -> dict[str, Any]:
    if all(one.keys() == {"type"} for one in schemas):
        return {"type": [one["type"] for one in schemas]}
    null = {"type": "null"}
    if null in schemas and len(schemas) == 2:
        other = next(one for one in schemas if one != null)
        if other.keys() == {"enum"}:
            return {"enum": [*other["enum"], None]}
    return {"anyOf": schemas}


def _not_negative(schema: dict[str, Any], nested: bool = False) -> dict[str, Any]:
    """With numbers of 0 or more: the value, or the members of a list."""
    if "anyOf" in schema:
        return {**schema, "anyOf": [_not_negative(one, nested) for one in schema["anyOf"]]}
    kinds = schema.get("type", ())
    if kinds == "array" and not nested:
        members = {key: schema[key] for key in ("items", "prefixItems") if schema.get(key)}
        return {
            **schema,
            **{
                key: [_not_negative(one, True) for one in some] if isinstance(some, list) else _not_negative(some, True)
                for key, some in members.items()
            },
        }
    numbers = {"number", "integer"} & ({kinds} if isinstance(kinds, str) else {*kinds})
    return {**schema, "minimum": 0} if numbers else schema


def _default(one: Field[Any]) -> dict[str, Any]:
    if one.default is not MISSING:
        return {"default": plain(one.default)}
    return {} if one.default_factory is MISSING else {"default": plain(one.default_factory())}


def _descriptions(cls: type) -> dict[str, str]:
    """What the docstring says of each field, and, under "", of the class, before it comes to fields."""
    names = {one.name for one in fields(cls)}
    first, *others = (" ".join(one.split()) for one in cleandoc(cls.__doc__ or "").split("\n\n"))
    told = {"": "" if first.startswith(f"{cls.__name__}(") else first}  # of a dataclass without a docstring
    for paragraph in (first, *others):
        found = [one for one in _DESCRIBED.finditer(paragraph) if names.issuperset(_names(one["names"]))]
        if found and paragraph is first:
            told[""] = paragraph[: found[0].start()]
        ends = [*(one.start() for one in found[1:]), len(paragraph)]
        for one, end in zip(found, ends, strict=False):
            told.update(dict.fromkeys(_names(one["names"]), paragraph[one.end() : end]))
    return {name: _sentence(text) for name, text in told.items()}


def _names(code: str) -> Iterator[str]:
    return iter(re.findall(r"\w+(?=`)", code))


def _sentence(text: str) -> str:
    text = re.sub(r"(,? and|[ .,;:])+$", "", re.sub(r"\bNone\b", "null", text))
    return f"{text[:1].upper()}{text[1:]}." if text else ""
