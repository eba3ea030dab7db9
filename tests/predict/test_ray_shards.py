"""What a worker makes of the shards that it is given, without Ray."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from conftest import SIZES

from gfldeploy.cluster.worker import Todo
from gfldeploy.engines.base import EngineOptions
from gfldeploy.errors import DataError
from gfldeploy.predict.engine_selection import choose
from gfldeploy.predict.ray_shards import RayShards
from gfldeploy.predict.shards import ShardJob
from gfldeploy.serialization import plain


@pytest.fixture
def setting(tiny_bundle: Path, tiny_coco: Path) -> Mapping[str, Any]:
    pytest.importorskip("onnxruntime")
    choice = choose(tiny_bundle, "onnxruntime", threads=1)
    job = ShardJob.of(choice, EngineOptions(threads=1), reduced=False)
    return {"job": plain(job), "own_cache": False, "folder": str(tiny_coco.parent / "images")}


def found(setting: Mapping[str, Any], bundle: Path, *todos: Todo) -> list[tuple[int, list[Any]]]:
    work = RayShards(setting, bundle)
    try:
        return list(work.run(todos))
    finally:
        work.close()


def test_relative_names_are_of_the_folder_of_the_command(
    setting: Mapping[str, Any], tiny_bundle: Path, tiny_coco: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)  # and back afterwards
    size = (tiny_coco.parent / "images" / "1.jpg").stat().st_size
    values = found(
        setting, tiny_bundle, Todo(4, {"inputs": ["1.jpg", "2.jpg"], "bytes": size, "sizes": [None, SIZES[1]]}, skip=1)
    )
    assert [(number, [entry["file"] for entry in batch]) for number, batch in values] == [(4, ["2.jpg"]), (4, [])]


def test_bad_inputs_are_errors_and_are_not_opened(
    setting: Mapping[str, Any], tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    task = {"inputs": ["1.jpg", "no such.jpg", "2.jpg"], "bytes": None, "sizes": [None] * 3}
    values = found(setting, tiny_bundle, Todo(0, task, bad={1: "every worker that detects in it dies"}))
    entries = [entry for _, batch in values for entry in batch]
    assert sorted(entry["file"] for entry in entries) == ["1.jpg", "2.jpg", "no such.jpg"]
    assert [entry["error"] for entry in entries if "error" in entry] == [
        "no such.jpg cannot be used: every worker that detects in it dies"
    ]


@pytest.mark.parametrize(("name", "problem"), [("no such.jpg", "cannot read no such.jpg"), ("1.jpg", "1.jpg has")])
def test_inputs_that_are_not_those_of_the_command_are_one_error(
    setting: Mapping[str, Any],
    tiny_bundle: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    name: str,
    problem: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=problem):
        found(setting, tiny_bundle, Todo(0, {"inputs": [name], "bytes": 3, "sizes": [None]}))
