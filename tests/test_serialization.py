"""Records to JSON or YAML and back; older schemas are upgraded, and what is wrong is named by its field."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import pytest

from gfldeploy.errors import BundleError, DataError, GfldeployError
from gfldeploy.serialization import FileFormat, Versioned, build, check, part, plain


@dataclass(frozen=True)
class Inner:
    count: int
    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.count == 13:
            raise ValueError("13 is no count")


def _from_1(data: dict[str, Any]) -> dict[str, Any]:
    return {"inner": {"count": data["count"]}, "pair": data["pair"]}


def _from_2(data: dict[str, Any]) -> dict[str, Any]:
    return {**data, "pair": part(data, "pair", kind=list)[::-1]}


@dataclass(frozen=True)
class Outer(Versioned):
    FORMAT = FileFormat("a test file", "gfldeploy test", 3, {1: _from_1, 2: _from_2})

    inner: Inner
    pair: tuple[int, str]
    kind: Literal["a", "b"] = "a"
    place: Path | None = None
    more: Mapping[Literal["x", "y"], Inner] = field(default_factory=dict)
    free: Any = None
    ratio: float = 1.0


OUTER = Outer(Inner(1, ("n",)), (2, "two"), "b", Path("here"), {"x": Inner(2)}, {"any": [1, None]}, 0.5)


class YamlOuter(Outer):
    FORMAT = FileFormat("a test file", "gfldeploy test", 3, {1: _from_1, 2: _from_2}, BundleError, yaml=True)


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    assert build(Outer, json.loads(json.dumps(plain(OUTER)))) == OUTER
    no_utf8 = replace(OUTER, place=Path(os.fsdecode(b"caf\xe9")))
    assert build(Outer, json.loads(json.dumps(plain(no_utf8)))) == no_utf8
    OUTER.write(tmp_path / "new" / "a.json")
    assert Outer.read(tmp_path / "new" / "a.json") == OUTER
    assert next(iter(json.loads((tmp_path / "new" / "a.json").read_text()).items())) == ("schema", 3)
    in_yaml = YamlOuter(OUTER.inner, OUTER.pair)
    in_yaml.write(tmp_path / "a.yml")
    assert (tmp_path / "a.yml").read_text().startswith("schema: 3\ninner:\n  count: 1\n")
    assert YamlOuter.read(tmp_path / "a.yml") == in_yaml


def test_absent_fields_take_their_defaults() -> None:
    assert build(Outer, {"inner": {"count": 1}, "pair": [2, "two"]}) == Outer(Inner(1), (2, "two"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"surprise": 1}, "it has unknown fields: surprise"),
        ({"inner": {"count": 1, "surprise": 1}}, "inner has unknown fields: surprise"),
        ({"inner": {}}, "inner lacks count"),
        ({"inner": 3}, "inner must be an object, not 3"),
        ({"inner": {"count": True}}, "inner.count must be of type int, not True"),
        ({"inner": {"count": -1}}, "inner.count must be 0 or more"),
        ({"inner": {"count": 13}}, "inner: 13 is no count"),
        ({"inner": {"count": 10**30}}, "inner.count must be a finite number of a sensible size, not a number of 100 b"),
        ({"inner": {"count": 1, "names": ["n", 1]}}, r"inner.names\[1\] must be of type str"),
        ({"pair": [2]}, "pair must be a list of 2"),
        ({"pair": "2a"}, "pair must be a list, "),
        ({"pair": [2, "\ud800"]}, r"pair\[1\] must be text of a sensible length"),
        ({"kind": "c"}, "kind must be one of a, b, not 'c'"),
        ({"kind": []}, "kind must be one of a, b"),
        ({"place": "a\0b"}, "place must be a path"),
        ({"more": {"z": {"count": 1}}}, "more must be one of x, y, not 'z'"),
        ({"more": {"x": None}}, "more.x must be an object"),
        ({"ratio": float("nan")}, "ratio must be a finite number"),
        ({"ratio": -0.1}, "ratio must be 0 or more"),
        ({1: 2}, "it has unknown fields: 1"),
    ],
)
def test_what_is_wrong_is_named(change: dict[Any, Any], message: str) -> None:
    with pytest.raises(DataError, match=message) as wrong:
        build(Outer, plain(OUTER) | change)
    assert wrong.value.remedy
    with pytest.raises(DataError, match=r"^the answer"):
        build(Outer, plain(OUTER) | change, "the answer")


def test_older_schemas_are_upgraded_step_by_step() -> None:
    assert Outer.from_dict({"schema": 1, "count": 4, "pair": ["two", 2]}) == Outer(Inner(4), (2, "two"))
    assert Outer.from_dict({"schema": 2, "inner": {"count": 4}, "pair": ["two", 2]}) == Outer(Inner(4), (2, "two"))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "a test file with no schema number. Give what `gfldeploy test` wrote"),
        ({"schema": True}, "no schema number"),
        ({"schema": 4}, "a newer gfldeploy: schema 4, this one reads schema 1 to 3. Update gfldeploy"),
        ({"schema": 0}, "an older gfldeploy: schema 0, this one reads schema 1 to 3. Make it again with `gfldeploy t"),
        ({"schema": 1}, "a test file of schema 1 cannot be read: 'count'. Give what"),
        ({"schema": 2, "pair": 3}, "a test file of schema 2 cannot be read: pair must be a list, not 3"),
        ({"schema": 3}, "it lacks inner, pair. Give what `gfldeploy test` wrote"),
    ],
)
@pytest.mark.parametrize(("cls", "error"), [(Outer, DataError), (YamlOuter, BundleError)])
def test_a_schema_that_is_not_read(
    data: object, message: str, cls: type[Outer], error: type[GfldeployError], tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        cls.from_dict(data)
    path = tmp_path / "x.json"
    path.write_text(json.dumps(data))
    with pytest.raises(error, match=rf"x\.json: .*{message}"):
        cls.read(path)


@pytest.mark.parametrize("cls", [Outer, YamlOuter])
def test_what_is_no_file_of_records(cls: type[Outer], tmp_path: Path) -> None:
    for content in (None, b"\xff", b"{", b"[" * 100_000):
        path = tmp_path / "x.json"
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(cls.FORMAT.error, match=r"x\.json cannot be read: ") as wrong:
            cls.read(path)
        assert wrong.value.remedy


def test_objects_of_which_more_is_allowed() -> None:
    kind = {"name": str, "size?": int, "parts": [{"ap": float | None}], "by_name?": {str: int}}
    good = {"name": "a", "parts": [{"ap": None}, {"ap": 1, "more": 2}], "by_name": {"x": 1}, "more": 3}
    check(kind, good)
    for change, message in (
        ({"name": 1}, "name must be of type str"),
        ({"size": "1"}, "size must be of type int"),
        ({"parts": [{}]}, r"parts\[0\] must be an object with ap"),
        ({"parts": {}}, "parts must be a list"),
        ({"by_name": {"x": None}}, "by_name.x must be of type int"),
    ):
        with pytest.raises(DataError, match=message):
            check(kind, good | change)
