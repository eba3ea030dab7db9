"""`verify` runs what is installed, and says what it did not compare."""

from __future__ import annotations

from pathlib import Path

import pytest

from gfldeploy.engines import registry
from gfldeploy.engines.base import Device, EngineSpec, Obstacle, Precision
from gfldeploy.inspection import verify

pytest.importorskip("onnxruntime")


def install(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    def unavailable(spec: EngineSpec, precision: Precision, device: Device) -> Obstacle | None:
        return None if spec.name in names else Obstacle(f"{spec.name} is not installed", "install it")

    monkeypatch.setattr(registry, "_unavailable", unavailable)


def test_one_engine_runs_the_graph(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "onnxruntime")
    assert verify(tiny_bundle, threads=1) == [
        "1 files are as they were made",
        "onnxruntime runs it: 1280 candidates of 2 classes",
        "its outputs were not compared: no second engine can run it here",
        "not run in paddle: paddle is not installed",
        "not run in openvino: openvino is not installed",
    ]


def test_no_engine(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)
    assert "no graph was run: no engine can run one here" in verify(tiny_bundle, threads=1)


def test_two_engines_are_compared_without_paddle(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("openvino")
    install(monkeypatch, "onnxruntime", "openvino", "paddle")
    found = verify(tiny_bundle, threads=1)
    assert found[1].startswith("onnxruntime and openvino at 1x3x320x256: scores differ by at most ")
    assert found[-1].startswith("not run in paddle: the bundle tiny has no paddle graph")
