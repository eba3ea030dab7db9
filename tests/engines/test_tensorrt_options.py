"""What TensorRT would be told, held against the signatures and names of the libraries: no GPU, no TensorRT."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gfldeploy.engines import tensorrt
from gfldeploy.engines.base import EngineOptions, Precision
from gfldeploy.engines.nvidia_libraries import tensorrt_library
from gfldeploy.engines.ort_tensorrt import describe_delegation, tensorrt_options
from gfldeploy.engines.paddle_engine import use_tensorrt
from gfldeploy.engines.registry import TENSORRT_ENGINES, capability, graph_for
from gfldeploy.engines.tensorrt import TensorRtOptions
from gfldeploy.errors import EngineError, OutputError

OPTIONS = TensorRtOptions((1, 800, 800), (4, 800, 1216), (8, 1216, 1344), Path("cache"))


def test_the_shapes_bound_each_dimension() -> None:
    shapes = ((2, 1216, 800), (2, 800, 1216), (1, 1088, 1088))
    found = TensorRtOptions.of(EngineOptions(device="gpu", shapes=shapes, cache_dir=Path("cache")))
    assert found == TensorRtOptions((1, 800, 800), (2, 1216, 800), (2, 1216, 1216), Path("cache"))
    with pytest.raises(EngineError, match="open_engine"):
        TensorRtOptions.of(EngineOptions(device="gpu"))


@pytest.mark.parametrize(
    ("precision", "fp16", "int8"), [("fp32", "False", "False"), ("fp16", "True", "False"), ("int8", "False", "True")]
)
def test_tensorrt_options(precision: Precision, fp16: str, int8: str) -> None:
    found = tensorrt_options(precision, OPTIONS, Path("cache/engine"))
    assert (found["trt_fp16_enable"], found["trt_int8_enable"]) == (fp16, int8)
    assert found["trt_profile_min_shapes"] == "image:1x3x800x800"
    assert found["trt_profile_opt_shapes"] == "image:4x3x800x1216"
    assert found["trt_profile_max_shapes"] == "image:8x3x1216x1344"
    assert (found["trt_max_workspace_size"], found["trt_min_subgraph_size"]) == (str(4 * 2**30), "3")
    assert (found["trt_engine_cache_enable"], found["trt_engine_cache_path"]) == ("True", "cache/engine")
    assert (found["trt_timing_cache_enable"], found["trt_timing_cache_path"]) == ("True", "cache")
    # Explicit Q/DQ: a calibration table would be in its way.
    assert not any("calibration" in name for name in found)
    # Those of the provider's documentation ("Execution Provider Options" of the TensorRT execution provider).
    known = {
        "trt_fp16_enable", "trt_int8_enable", "trt_max_workspace_size", "trt_min_subgraph_size",
        "trt_profile_min_shapes", "trt_profile_opt_shapes", "trt_profile_max_shapes", "trt_engine_cache_enable",
        "trt_engine_cache_path", "trt_timing_cache_enable", "trt_timing_cache_path",
    }  # fmt: skip
    assert set(found) == known and all(isinstance(value, str) for value in found.values())


class Spy:
    """A `paddle.inference.Config` that notes its calls."""

    def __init__(self) -> None:
        self.calls: dict[str, dict[str, Any]] = {}

    def __getattr__(self, method: str) -> Callable[..., None]:
        return lambda *values, **named: self.calls.update({method: {"": values, **named}})


@pytest.mark.parametrize(("precision", "mode"), [("fp32", "Float32"), ("fp16", "Half"), ("int8", "Int8")])
def test_paddle(precision: Precision, mode: str) -> None:
    spy = Spy()
    use_tensorrt(spy, SimpleNamespace(Float32="Float32", Half="Half", Int8="Int8"), precision, OPTIONS, Path("cache/e"))
    engine = spy.calls["enable_tensorrt_engine"]
    assert engine["precision_mode"] == mode
    assert (engine["workspace_size"], engine["max_batch_size"], engine["min_subgraph_size"]) == (4 * 2**30, 8, 3)
    assert engine["use_static"] and not engine["use_calib_mode"], "kept on disk, and by the program's own scales"
    assert spy.calls["set_optim_cache_dir"] == {"": ("cache/e",)}
    assert spy.calls["enable_tuned_tensorrt_dynamic_shape"]["shape_range_info_path"] == "cache/e/shapes.pbtxt"
    assert ("enable_tensorrt_explicit_quantization" in spy.calls) == (precision == "int8")


@pytest.mark.slow
def test_paddle_takes_the_calls(tmp_path: Path) -> None:
    """Names and arguments, by the real Config: a wheel without TensorRT refuses the calls only after it took them."""
    pytest.importorskip("paddle")
    code = (
        "import os, sys; from pathlib import Path; from paddle import inference\n"
        "from gfldeploy.engines.paddle_engine import use_tensorrt\n"
        "from gfldeploy.engines.tensorrt import TensorRtOptions\n"
        "class Tried:\n"
        "    def __getattr__(self, method):\n"
        "        def call(*values, **named):\n"
        "            try:\n"
        "                getattr(inference.Config(), method)(*values, **named)\n"
        "            except RuntimeError as error:\n"
        "                assert 'TENSORRT' in str(error), error\n"
        "            print(method, flush=True)\n"
        "        return call\n"
        "options = TensorRtOptions(*[(2, 800, 1216)] * 3, Path(sys.argv[1]))\n"
        "for precision in ('fp32', 'fp16', 'int8'):\n"
        "    use_tensorrt(Tried(), inference.PrecisionType, precision, options, Path(sys.argv[1]))\n"
        "inference.Config().collect_shape_range_info(sys.argv[1] + '/shapes')\n"
        "os._exit(0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    every = ["set_optim_cache_dir", "enable_tensorrt_engine", "enable_tuned_tensorrt_dynamic_shape"]
    assert done.stdout.split() == [*every * 3, "enable_tensorrt_explicit_quantization"]


def folder(options: TensorRtOptions, engine: str, version: str, precision: Precision, digest: str) -> Path:
    """Where the engine of this name and version keeps what it builds of the bundle with this digest."""
    opened: Any = SimpleNamespace(name=engine, version=version, options=EngineOptions(precision, "gpu"))
    bundle: Any = SimpleNamespace(digest=digest)
    return options.directory(opened, bundle)


def test_an_engine_is_built_again_when_anything_that_it_depends_on_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = replace(OPTIONS, cache_dir=tmp_path)
    one: tuple[str, str, Precision, str] = ("onnxruntime-tensorrt", "1.2", "fp16", "ab")
    found = [folder(options, *one), folder(replace(options, most_common=(4, 800, 800)), *one)]
    changes = {"gpu_models": ("H200",), "nvidia_driver": "580.2", "tensorrt_library": "10.10"}
    for function, value in {**changes, "WORKSPACE_BYTES": 2**20, "MIN_SUBGRAPH": 6}.items():
        with monkeypatch.context() as patch:
            patch.setattr(tensorrt, function, (lambda value=value: value) if function in changes else value)
            found.append(folder(options, *one))
    assert len(set(found)) == 7
    # Not where the caches lie: the folder can be moved.
    assert folder(replace(options, cache_dir=tmp_path / "elsewhere"), *one).name == found[0].name


def test_the_folder_of_an_engine(tmp_path: Path) -> None:
    options = replace(OPTIONS, cache_dir=tmp_path / "new")
    one = folder(options, "onnxruntime-tensorrt", "1.2", "fp16", "ab")
    assert one.is_dir() and one.parent == tmp_path / "new"
    assert folder(options, "onnxruntime-tensorrt", "1.2", "fp16", "ab") == one
    others = {
        folder(options, "paddle-tensorrt", "1.2", "fp16", "ab"),
        folder(options, "onnxruntime-tensorrt", "1.3", "fp16", "ab"),
        folder(options, "onnxruntime-tensorrt", "1.2", "int8", "ab"),
        folder(options, "onnxruntime-tensorrt", "1.2", "fp16", "cd"),
    }
    assert len(others | {one}) == 5
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="--engine-cache"):
        folder(replace(options, cache_dir=tmp_path / "file"), "x", "1", "fp16", "ab")


@pytest.mark.parametrize(
    ("engine", "precision", "graph"),
    [
        ("paddle-tensorrt", "fp32", "paddle_program"),
        ("paddle-tensorrt", "fp16", "paddle_program"),
        ("paddle-tensorrt", "int8", "paddle_program"),
        ("onnxruntime-tensorrt", "fp32", "onnx"),
        ("onnxruntime-tensorrt", "fp16", "onnx_fp16"),
        ("onnxruntime-tensorrt", "int8", "onnx_tensorrt"),
        ("onnxruntime", "fp16", "onnx_fp16"),
        ("paddle", "fp32", "paddle"),
    ],
)
def test_the_graph_that_each_runs_on_a_gpu(engine: str, precision: Precision, graph: str) -> None:
    assert graph_for(engine, precision, "gpu") == graph


def test_what_ran_where() -> None:
    def node(provider: str, name: str) -> dict[str, object]:
        return {"cat": "Node", "args": {"provider": provider, "op_name": name}}

    events: list[dict[str, Any]] = [
        node("TensorrtExecutionProvider", "TRTKernel_graph_1"),
        node("CUDAExecutionProvider", "Cast"),
        node("CUDAExecutionProvider", "Cast"),
        node("CPUExecutionProvider", "Shape"),
        {"cat": "Session", "args": {}},
    ]
    assert describe_delegation(events) == "1 part in TensorRT, 3 nodes outside: Cast x2, Shape x1"
    assert describe_delegation(events[:1]) == "1 part in TensorRT, 0 nodes outside"


@pytest.mark.skipif(tensorrt_library() is not None, reason="TensorRT is installed")
def test_without_tensorrt_the_option_is_one_line_and_at_once(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "gfldeploy", "bench", "x", "--data", "y", "--trt", "-o", str(tmp_path / "r.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("Error: --trt cannot work here: ")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("engine", TENSORRT_ENGINES)
def test_capabilities(engine: str) -> None:
    assert "GPUs alone" in (capability(engine, "fp16", "cpu").reason or "")
    assert not capability(engine, "bf16", "gpu").works
