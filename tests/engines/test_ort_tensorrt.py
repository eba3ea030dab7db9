"""ONNX Runtime with TensorRT, its own code on the CPU provider: what it opens, and what that gives."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from gfldeploy.bundle import Bundle, Graph, GraphName
from gfldeploy.engines import ort_engine, ort_tensorrt
from gfldeploy.engines.base import EngineOptions, Precision
from gfldeploy.engines.nvidia_libraries import Typing
from gfldeploy.engines.ort_binding import BoundSessions
from gfldeploy.engines.ort_tensorrt import OnnxRuntimeTensorRtEngine
from gfldeploy.export.half import write_half_onnx

pytest.importorskip("onnxruntime")

SHAPES = ((1, 64, 96), (2, 96, 64))
PROVIDERS: list[tuple[str, dict[str, str]]] = [("AzureExecutionProvider", {}), ("CPUExecutionProvider", {})]


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Providers of the CPU wheel, the first of which runs no operator, and the CPU's memory instead of a GPU's."""
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "as it was")
    monkeypatch.setattr(
        ort_engine, "BoundSessions", lambda ort, sessions, _, *more: BoundSessions(ort, sessions, "cpu", *more)
    )
    monkeypatch.setattr(OnnxRuntimeTensorRtEngine, "_choose_providers", lambda *_: PROVIDERS)


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Bundle:
    """With an FP16 graph."""
    source, target = tiny_bundle / "onnx" / "model.onnx", tmp_path / "model_fp16.onnx"
    write_half_onnx(source, target)
    return Bundle(tmp_path, replace(Bundle.open(tiny_bundle).manifest, graphs={"onnx_fp16": Graph(target.name)}))


def opened(bundle: Bundle, precision: Precision, graph: GraphName, tf32: bool = False) -> OnnxRuntimeTensorRtEngine:
    return OnnxRuntimeTensorRtEngine(bundle, EngineOptions(precision, "gpu", shapes=SHAPES, tf32=tf32), graph)


def inputs_of(engine: Any) -> list[list[str]]:
    return [[one.name for one in session.get_inputs()] for session in engine._open_on_gpu(False)]


@pytest.mark.usefixtures("on_cpu")
def test_fp16_is_the_network_and_a_decode_apart(bundle: Bundle, tmp_path: Path) -> None:
    whole = ort_engine.OnnxRuntimeEngine(bundle, EngineOptions(), "onnx_fp16")
    with opened(bundle, "fp16", "onnx_fp16") as engine:
        assert inputs_of(engine) == [["image"], ["map"]]
        for batch, height, width in (*SHAPES, *SHAPES):
            inputs = {"image": np.random.default_rng(batch).random((batch, 3, height, width), np.float32)}
            found, expected = engine.infer(inputs), whole.infer(inputs)
            assert found.keys() == expected.keys()
            assert all(np.array_equal(found[name], expected[name]) for name in found)
        assert engine.delegated is not None and engine.delegated.endswith(", the decode in CUDA")
        # Only the network was profiled: its operators are all that there is.
        assert "Sigmoid" not in engine.delegated and "Conv" in engine.delegated
    assert [path.name for path in tmp_path.iterdir()] == ["model_fp16.onnx"]


@pytest.mark.usefixtures("on_cpu")
def test_a_strongly_typed_tensorrt_gets_the_whole_fp16_graph(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    strong: Typing = "strong"
    monkeypatch.setattr(ort_tensorrt, "typing_of", lambda version: strong)
    with opened(bundle, "fp16", "onnx_fp16") as engine:
        assert inputs_of(engine) == [["image"]]
        assert engine.delegated is not None and "CUDA" not in engine.delegated


@pytest.mark.usefixtures("on_cpu")
def test_fp32_is_whole_and_in_tf32_only_if_asked_for(tiny_bundle: Path) -> None:
    with opened(Bundle.open(tiny_bundle), "fp32", "onnx") as engine:
        assert inputs_of(engine) == [["image"]]
        assert os.environ["NVIDIA_TF32_OVERRIDE"] == "0"
    with opened(Bundle.open(tiny_bundle), "fp32", "onnx", tf32=True):
        assert "NVIDIA_TF32_OVERRIDE" not in os.environ


@pytest.mark.usefixtures("on_cpu")
def test_only_the_network_has_a_cuda_graph(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = opened(bundle, "fp16", "onnx_fp16")
    asked: list[tuple[bool, int]] = []

    def noted(self: Any, options: Any, cuda_graph: bool = False, model: Any = None, providers: Any = None) -> None:
        asked.append((cuda_graph, len(providers or self._providers)))
        onnx.checker.check_model(onnx.load_from_string(model))

    monkeypatch.setattr(ort_engine.OnnxRuntimeEngine, "_open", noted)
    engine._open_on_gpu(True)
    assert asked == [(True, 2), (False, 1)]
    assert set(engine.graph_options) == {"trt_cuda_graph_enable"}
