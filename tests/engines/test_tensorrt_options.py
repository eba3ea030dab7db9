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
from gfldeploy.engines.ort_engine import OnnxRuntimeEngine, cuda_options
from gfldeploy.engines.ort_tensorrt import OnnxRuntimeTensorRtEngine, describe_delegation, tensorrt_options
from gfldeploy.engines.paddle_engine import use_tensorrt
from gfldeploy.engines.registry import TENSORRT_ENGINES, capability, graph_for
from gfldeploy.engines.tensorrt import TensorRtOptions
from gfldeploy.errors import EngineError, OutputError

# The options that the libraries of onnxruntime-gpu 1.31.1 name. It refuses others, "1" for a TensorRT option that is to
# be "True", and takes those that are given here: seen with these libraries on stand-ins for CUDA's and TensorRT's.
TENSORRT_OPTIONS = {
    "device_id", "has_user_compute_stream", "trt_auxiliary_streams", "trt_bf16_enable", "trt_build_heuristics_enable",
    "trt_builder_optimization_level", "trt_context_memory_sharing_enable", "trt_cuda_graph_enable",
    "trt_detailed_build_log", "trt_dla_core", "trt_dla_enable", "trt_dump_ep_context_model", "trt_dump_subgraphs",
    "trt_engine_cache_enable", "trt_engine_cache_path", "trt_engine_cache_prefix", "trt_engine_decryption_enable",
    "trt_engine_decryption_lib_path", "trt_engine_hw_compatible", "trt_ep_context_embed_mode",
    "trt_ep_context_file_path", "trt_external_data_bytestream", "trt_external_data_bytestream_size",
    "trt_extra_plugin_lib_paths", "trt_force_sequential_engine_build", "trt_force_timing_cache", "trt_fp16_enable",
    "trt_int8_calibration_table_name", "trt_int8_enable", "trt_int8_use_native_calibration_table",
    "trt_layer_norm_fp32_fallback", "trt_load_user_initializer", "trt_max_partition_iterations",
    "trt_max_workspace_size", "trt_min_subgraph_size", "trt_onnx_bytestream", "trt_onnx_bytestream_size",
    "trt_onnx_model_folder_path", "trt_op_types_to_exclude", "trt_preview_features", "trt_profile_max_shapes",
    "trt_profile_min_shapes", "trt_profile_opt_shapes", "trt_sparsity_enable", "trt_tactic_sources",
    "trt_timing_cache_enable", "trt_timing_cache_path", "trt_weight_stripped_engine_enable",
}  # fmt: skip
CUDA_OPTIONS = {
    "arena_extend_strategy", "cudnn_conv1d_pad_to_nc1d", "cudnn_conv_algo_search", "cudnn_conv_use_max_workspace",
    "device_id", "do_copy_in_default_stream", "enable_cuda_graph", "enable_skip_layer_norm_strict_mode",
    "fuse_conv_bias", "gpu_mem_limit", "has_user_compute_stream", "prefer_nhwc", "sdpa_kernel", "tunable_op_enable",
    "tunable_op_max_tuning_duration_ms", "tunable_op_tuning_enable", "use_ep_level_unified_stream", "use_tf32",
}  # fmt: skip
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
    assert set(found) < TENSORRT_OPTIONS and all(isinstance(value, str) for value in found.values())
    # A strongly typed network has no flags that allow precisions.
    strong = tensorrt_options(precision, OPTIONS, Path("cache/engine"), "strong")
    assert set(found) - set(strong) == {"trt_fp16_enable", "trt_int8_enable"} and strong.items() < found.items()


def test_options_that_providers_have() -> None:
    assert set(OnnxRuntimeTensorRtEngine.graph_options) < TENSORRT_OPTIONS
    assert set(OnnxRuntimeEngine.graph_options) < CUDA_OPTIONS
    assert set(cuda_options(EngineOptions(device="gpu"))) < CUDA_OPTIONS
    assert cuda_options(EngineOptions(device="gpu"))["use_tf32"] == "0"
    assert cuda_options(EngineOptions(device="gpu", tf32=True))["use_tf32"] == "1"
    # Else tensor cores are left out, of FP16 too; its decode in FP32 is kept from TF32 by the environment.
    assert cuda_options(EngineOptions("fp16", "gpu"))["use_tf32"] == "1"
    # TF32 in TensorRT is up to the environment alone.
    assert not any("tf32" in name for name in TENSORRT_OPTIONS)


class Spy:
    """A `paddle.inference.Config` that notes its calls."""

    def __init__(self) -> None:
        self.calls: dict[str, dict[str, Any]] = {}

    def __getattr__(self, method: str) -> Callable[..., None]:
        return lambda *values, **named: self.calls.update({method: {"": values, **named}})


@pytest.mark.parametrize(("precision", "mode"), [("fp32", "Float32"), ("fp16", "Half"), ("int8", "Int8")])
def test_paddle(precision: Precision, mode: str) -> None:
    spy = Spy()
    modes = SimpleNamespace(Float32="Float32", Half="Half", Int8="Int8")
    decode = () if precision == "fp32" else ("boxes", "scores")
    use_tensorrt(spy, modes, precision, OPTIONS, Path("cache/e"), decode)
    engine = spy.calls["enable_tensorrt_engine"]
    assert engine["precision_mode"] == mode
    assert (engine["workspace_size"], engine["max_batch_size"], engine["min_subgraph_size"]) == (4 * 2**30, 8, 3)
    assert engine["use_static"] and not engine["use_calib_mode"], "kept on disk, and by the program's own scales"
    assert spy.calls["set_optim_cache_dir"] == {"": ("cache/e",)}
    assert spy.calls["enable_tuned_tensorrt_dynamic_shape"]["shape_range_info_path"] == "cache/e/shapes.pbtxt"
    assert ("enable_tensorrt_explicit_quantization" in spy.calls) == (precision == "int8")
    assert spy.calls.get("exp_disable_tensorrt_ops", {"": ([],)}) == {"": (list(decode),)}


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
        "    decode = () if precision == 'fp32' else ('tmp_1', 'tmp_2')\n"
        "    use_tensorrt(Tried(), inference.PrecisionType, precision, options, Path(sys.argv[1]), decode)\n"
        "inference.Config().exp_disable_mixed_precision_ops({'pd_op.add', 'add'})\n"
        "inference.Config().collect_shape_range_info(sys.argv[1] + '/shapes')\n"
        "os._exit(0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    every = ["set_optim_cache_dir", "enable_tensorrt_engine", "enable_tuned_tensorrt_dynamic_shape"]
    without = "exp_disable_tensorrt_ops"
    assert done.stdout.split() == [*every, *every, without, *every, "enable_tensorrt_explicit_quantization", without]


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
