"""The table of engines agrees with the engines, and no engine knows another."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

from gfldeploy.engines import base, registry
from gfldeploy.engines.base import DEVICES, PRECISIONS, Build, Engine, EngineSpec, Library, Obstacle
from gfldeploy.engines.registry import ENGINES, PREFERRED_ENGINES, capability, graph_for, title_of
from gfldeploy.errors import UnsupportedError

LIBRARY = Library("numpy", {"cpu": Build("numpy", "pip install numpy")})


@pytest.mark.parametrize("spec", ENGINES.values(), ids=ENGINES)
def test_an_entry_is_complete_and_names_its_class(spec: EngineSpec) -> None:
    module, _, name = spec.entry.partition(":")
    engine = getattr(importlib.import_module(module), name)
    assert issubclass(engine, Engine) and engine.name == spec.name and spec.title.startswith(engine.title)
    for device in DEVICES:
        for precision in PRECISIONS:
            said = spec.graph(precision, device)
            assert not isinstance(said, Obstacle) or "choose another engine or precision" not in said.remedy


def test_ranks_are_an_order() -> None:
    assert [ENGINES[name].rank for name in PREFERRED_ENGINES] == list(range(1, len(PREFERRED_ENGINES) + 1))


def test_what_an_entry_leaves_out_never_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = EngineSpec("toy", "Toy", "toy:Toy", LIBRARY, {"cpu": {"fp32": "onnx"}})
    monkeypatch.setattr(registry, "ENGINES", {**ENGINES, "toy": spec})
    assert capability("toy", "fp32", "cpu").works and title_of("toy") == "Toy" and title_of("gone") == "gone"
    assert capability("toy", "int8", "cpu").reason == "Toy has no int8 on cpu"
    assert capability("toy", "fp32", "gpu").remedy == "choose another engine or precision"
    assert spec.graphs == {"onnx"}
    with pytest.raises(UnsupportedError, match="toy int8 on cpu is not possible: Toy has no int8 on cpu"):
        graph_for("toy", "int8", "cpu")
    with pytest.raises(ValueError, match="toy runs on gpu, but its library has no build for it"):
        EngineSpec("toy", "Toy", "toy:Toy", LIBRARY, {"gpu": {"fp32": "onnx"}})


def test_a_library_inside_a_package_that_is_not_there() -> None:
    inner = Library("no_such_package.inner", {"cpu": Build("inner", "pip install inner")})
    spec = EngineSpec("toy", "Toy", "toy:Toy", inner, {"cpu": {"fp32": "onnx"}})
    assert registry._unavailable(spec, "fp32", "cpu") == ("no_such_package.inner is not installed", "pip install inner")


def test_no_engine_imports_another() -> None:
    kinds = ("ort", "openvino", "paddle")
    for path in Path(base.__file__).parent.glob("*.py"):
        imported = set(re.findall(r"gfldeploy\.engines\.([a-z]+)_", path.read_text(encoding="utf-8")))
        own = path.stem.partition("_")[0]
        assert path.stem == "registry" or not (imported & set(kinds)) - {own}, path
