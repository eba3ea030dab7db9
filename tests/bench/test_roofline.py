"""Peaks, really measured: that there is one, what ran, and that nothing raises; never how high it is."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import numpy as np
import psutil
import pytest

from gfldeploy.bench import roofline
from gfldeploy.bench.results import Peak
from gfldeploy.bench.roofline import Stack, measure_peak
from gfldeploy.bundle import Bundle
from gfldeploy.engines.base import Device, EngineOptions, Precision
from gfldeploy.engines.ort_engine import OnnxRuntimeEngine
from gfldeploy.engines.registry import capability
from gfldeploy.errors import EngineError
from gfldeploy.macs import count_work

SMALL = Stack(depth=2, batch=1)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two convolutions and copies of 8 MB, which are enough to see that it works."""
    monkeypatch.setattr(roofline, "_STACKS", dict.fromkeys(get_args(Device), SMALL))
    monkeypatch.setattr(roofline, "_copy_bytes", lambda: 8 * 10**6)


# Measures Paddle's peak in the precisions given, and computes the same stack once more for its outputs.
PADDLE = """
import json, sys
from dataclasses import asdict
from pathlib import Path
from gfldeploy.bench import roofline
from gfldeploy.bench.roofline import Stack
from gfldeploy.engines.base import EngineOptions
from gfldeploy.engines.registry import graph_for, open_engine
small = Stack(depth=2, batch=1)
roofline._STACKS, roofline._copy_bytes = {"cpu": small}, lambda: 8 * 10**6
answers = {}
for precision in sys.argv[2:]:
    found = roofline.measure_peak("paddle", EngineOptions(precision, "cpu", 1), seconds=0)
    bundle = small.write(Path(sys.argv[1]) / precision, graph_for("paddle", precision, "cpu"), precision)
    with open_engine("paddle", bundle, EngineOptions(precision)) as engine:
        scores = engine.infer({"image": small.image()})["scores"].ravel().tolist()
    answers[precision] = {"peak": asdict(found), "scores": scores}
print(json.dumps(answers))
"""


def alike(found: np.ndarray, expected: np.ndarray) -> bool:
    """Whether they are the same but for rounding, that of INT8 included."""
    return bool(found.shape == expected.shape and np.corrcoef(found.ravel(), expected.ravel())[0, 1] > 0.99)


def reference(bundle: Bundle) -> np.ndarray:
    with OnnxRuntimeEngine(bundle, EngineOptions(), "onnx") as engine:
        return engine.infer({"image": SMALL.image()})["scores"]


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_onnxruntime(precision: Precision) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    found = measure_peak("onnxruntime", EngineOptions(precision, "cpu", 1), seconds=0)
    assert found.reason is None
    assert found.gmac_per_s is not None and found.gmac_per_s > 0
    assert found.memory_gb_per_s is not None and found.memory_gb_per_s > 0


@pytest.fixture(scope="module")
def paddles_answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """By precision, for those that this CPU has."""
    pytest.importorskip("paddle")
    pytest.importorskip("onnx")
    precisions = [each for each in get_args(Precision) if capability("paddle", each, "cpu").works]
    command = [sys.executable, "-c", PADDLE, str(tmp_path_factory.mktemp("peak")), *precisions]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=240)
    answers: dict[str, Any] = json.loads(done.stdout)
    return answers


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
def test_paddle_in_a_process_of_its_own(precision: Precision, paddles_answers: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    if precision not in paddles_answers:
        pytest.skip("this CPU has no BF16")
    answer = paddles_answers[precision]
    found = Peak(**answer["peak"])
    assert found.reason is None
    assert found.gmac_per_s is not None and found.gmac_per_s > 0
    expected = reference(SMALL.write(tmp_path / "fp32", "onnx", "fp32"))
    assert alike(np.array(answer["scores"], np.float32).reshape(expected.shape), expected)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    ("engine", "precision", "device", "why"),
    [
        ("onnxruntime", "bf16", "cpu", "no BF16 convolution"),
        ("nonesuch", "fp32", "cpu", "nonesuch"),
    ],
)
def test_what_cannot_run_is_a_reason(engine: str, precision: Precision, device: Device, why: str) -> None:
    found = measure_peak(engine, EngineOptions(precision, device, 1), seconds=0)
    assert found.gmac_per_s is None
    assert found.reason is not None and found.reason.startswith("convolutions: ") and why in found.reason
    assert found.memory_gb_per_s is not None, "memory is measured all the same"


@pytest.mark.usefixtures("small")
def test_too_little_memory_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline, "_copy_bytes", lambda: 2**60)
    found = measure_peak("onnxruntime", EngineOptions("bf16", "cpu", 1), seconds=0)
    assert found.memory_gb_per_s is None
    assert found.reason is not None and "; memory: " in found.reason


def test_a_graph_that_runs_in_another_precision_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    bundle = SMALL.write(tmp_path / "fp32", "onnx", "fp32")
    with (
        OnnxRuntimeEngine(bundle, EngineOptions("int8"), "onnx") as engine,
        pytest.raises(EngineError, match=r"0 of 3 ran in int8: kept in float in the ONNX file \(3\)"),
    ):
        roofline._check_precision(engine, {"image": SMALL.image()}, SMALL.depth)


def test_the_macs_are_those_of_the_graph(tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    bundle = SMALL.write(tmp_path / "peak", "onnx", "fp32")
    height, width = bundle.manifest.preprocess.target_size
    assert count_work(bundle.graph("onnx")[0], [(height, width)], (1,))[height, width].macs == SMALL.macs
    assert Stack(SMALL.depth, batch=4).macs == 4 * SMALL.macs


@pytest.mark.parametrize("name", ["onnx", "onnx_tensorrt", "onnx_fp16"])
def test_every_onnx_graph_computes_the_same(name: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    expected = reference(SMALL.write(tmp_path / "fp32", "onnx", "fp32"))
    assert expected.shape == (1, 256, 1, 1)
    precision: Precision = "fp16" if name == "onnx_fp16" else "int8"
    bundle = SMALL.write(tmp_path / "low", name, precision)  # type: ignore[arg-type]
    with OnnxRuntimeEngine(bundle, EngineOptions(), name) as engine:  # type: ignore[arg-type]
        found = engine.infer({"image": SMALL.image()})["scores"]
    assert alike(found, expected)


def test_an_array_is_larger_than_the_cache_and_leaves_memory_free() -> None:
    assert 0 < roofline._copy_bytes() < psutil.virtual_memory().total / 4
