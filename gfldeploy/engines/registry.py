"""Which engines there are, and which engine x precision x device works on this machine.

Answered from package metadata, the processor's flags and the driver: nothing heavy is imported.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import util

from gfldeploy.bundle import Bundle, GraphName
from gfldeploy.dependencies import INSTALL_ENGINE
from gfldeploy.engines.base import DEVICES, PRECISIONS, Device, Engine, EngineOptions, Precision
from gfldeploy.engines.tensorrt import tensorrt_library
from gfldeploy.errors import UnsupportedError
from gfldeploy.machine import cpu_flags, installed_packages, nvidia_driver

__all__ = [
    "DEFAULT_ENGINES",
    "ENGINES",
    "TENSORRT_ENGINES",
    "Capability",
    "capabilities",
    "capability",
    "check_bundle",
    "check_possible",
    "graph_for",
    "missing_graph",
    "open_engine",
    "preferred_engine",
]

ENGINES: dict[str, str] = {
    "paddle": "gfldeploy.engines.paddle_engine:PaddleEngine",
    "paddle-plain": "gfldeploy.engines.paddle_engine:PlainPaddleEngine",
    "paddle-tensorrt": "gfldeploy.engines.paddle_engine:PaddleTensorRtEngine",
    "onnxruntime": "gfldeploy.engines.ort_engine:OnnxRuntimeEngine",
    "onnxruntime-tensorrt": "gfldeploy.engines.ort_engine:OnnxRuntimeTensorRtEngine",
    "openvino": "gfldeploy.engines.openvino_engine:OpenVinoEngine",
}
# They build an engine for the shapes of the data: `gfldeploy bench` alone knows those.
TENSORRT_ENGINES = ("paddle-tensorrt", "onnxruntime-tensorrt")
# Those worth measuring without being asked for: Paddle's kernels without oneDNN are there to be compared with.
DEFAULT_ENGINES = ("paddle", "onnxruntime", "openvino")

# The module that each engine is in; its name is also the key of `INSTALL_ENGINE`.
_MODULES = {name: name.partition("-")[0] for name in ENGINES}

# The first that runs a precision: the fastest by the results in benchmarks/. `gfldeploy tune` measures all of them.
_PREFERRED = ("openvino", "onnxruntime", "paddle")

# The distributions that provide each module: the CPU build first.
_DISTRIBUTIONS = {
    "paddle": ("paddlepaddle", "paddlepaddle-gpu"),
    "onnxruntime": ("onnxruntime", "onnxruntime-gpu"),
    "openvino": ("openvino",),
}
# What no installation changes: the engine has no such kernels, or gfldeploy makes no such file yet.
_NEVER: dict[tuple[str, Precision, Device], tuple[str, str]] = {
    ("paddle", "fp16", "cpu"): ("Paddle's oneDNN kernels have no FP16 convolution", "use bf16 or int8 on CPUs"),
    ("onnxruntime", "fp16", "cpu"): (
        "ONNX Runtime's CPU kernels have no FP16 convolution: it would convert to FP32 and back",
        "use int8 on CPUs",
    ),
    ("openvino", "fp16", "cpu"): ("gfldeploy's FP16 file is for GPUs", "use bf16 or int8 on CPUs"),
    ("onnxruntime", "bf16", "cpu"): (
        "ONNX Runtime's CPU kernels have no BF16 convolution",
        "use the engines paddle or openvino for bf16",
    ),
    ("paddle", "bf16", "gpu"): ("gfldeploy has no BF16 on GPUs yet", "use fp16"),
    ("onnxruntime", "bf16", "gpu"): ("gfldeploy has no BF16 on GPUs yet", "use fp32"),
    ("paddle", "int8", "gpu"): ("INT8 on GPUs needs TensorRT", "use the engine paddle-tensorrt, or fp16"),
    ("onnxruntime", "int8", "gpu"): ("INT8 on GPUs needs TensorRT", "use the engine onnxruntime-tensorrt, or fp16"),
}


@dataclass(frozen=True)
class Capability:
    """Whether a combination works here; if not, the `reason` and what to do (`remedy`)."""

    engine: str
    precision: Precision
    device: Device
    reason: str | None = None
    remedy: str | None = None
    note: str | None = None

    @property
    def works(self) -> bool:
        return self.reason is None


def capabilities() -> Iterator[Capability]:
    """Every engine x device x precision, in that order."""
    for engine in ENGINES:
        for device in DEVICES:
            for precision in PRECISIONS:
                yield capability(engine, precision, device)


def capability(engine: str, precision: Precision, device: Device) -> Capability:
    """Whether this combination works on this machine. Raises `UnsupportedError` for an unknown engine."""
    if engine not in ENGINES:
        raise UnsupportedError(f"there is no engine {engine!r}", f"Choose from: {', '.join(ENGINES)}.")
    if engine == "openvino" and device == "gpu":
        return Capability(
            engine, precision, device, "OpenVINO does not run on NVIDIA GPUs", "use the engine onnxruntime"
        )
    if engine == "paddle-plain" and (precision, device) != ("fp32", "cpu"):
        return Capability(engine, precision, device, "it is Paddle's FP32 kernels for CPUs", "use the engine paddle")
    if engine in TENSORRT_ENGINES and device != "gpu":
        return Capability(engine, precision, device, "TensorRT runs on NVIDIA GPUs alone", "add --device gpu")
    if engine in TENSORRT_ENGINES and precision == "bf16":
        return Capability(engine, precision, device, "gfldeploy has no BF16 on GPUs yet", "use fp16")
    if never := _NEVER.get((engine, precision, device)):
        return Capability(engine, precision, device, *never)
    if device == "gpu" and nvidia_driver() is None:
        return Capability(
            engine, precision, device, "no NVIDIA driver is loaded", "run on a machine with an NVIDIA GPU"
        )
    module = _MODULES[engine]
    if util.find_spec(module) is None:
        return Capability(engine, precision, device, f"{module} is not installed", INSTALL_ENGINE[module, device])
    if device == "gpu" and installed_packages()[_DISTRIBUTIONS[module][1]] is None:
        return Capability(
            engine, precision, device, f"the CPU build of {module} is installed", INSTALL_ENGINE[module, "gpu"]
        )
    if engine in TENSORRT_ENGINES and tensorrt_library() is None:
        return Capability(
            engine, precision, device, "TensorRT is not installed", "pip install tensorrt, in the version of your CUDA"
        )
    flags = cpu_flags()
    note = None
    if device == "cpu" and precision == "bf16" and not flags & {"avx512_bf16", "amx_bf16"}:
        return Capability(
            engine, precision, device, "this CPU has neither AVX512-BF16 nor AMX", "use fp32 or int8 on this CPU"
        )
    if device == "cpu" and precision == "int8" and not flags & {"avx512_vnni", "avx_vnni", "amx_int8"}:
        note = "this CPU has neither VNNI nor AMX: expect INT8 to be little faster than FP32, if at all"
    return Capability(engine, precision, device, note=note)


def check_bundle(bundle: Bundle, precision: Precision) -> tuple[str, str] | None:
    """Reason and remedy why this bundle cannot run in this precision, or None."""
    has = bundle.manifest.precision
    if precision == "int8" and has != "int8":
        return f"{bundle.directory} is {has.upper()}", "make an INT8 bundle with `gfldeploy quantize`"
    if precision != "int8" and has == "int8":
        return f"{bundle.directory} is INT8", "use the bundle that `gfldeploy export` wrote"
    return None


def graph_for(engine: str, precision: Precision, device: Device) -> GraphName:
    """The graph of a bundle that an engine runs in this precision."""
    if _MODULES[engine] == "paddle":
        # Paddle's passes for INT8 and for TensorRT know the older program format.
        return "paddle_program" if precision == "int8" or engine in TENSORRT_ENGINES else "paddle"
    if precision == "int8" and engine in TENSORRT_ENGINES:
        return "onnx_tensorrt"
    return "onnx_fp16" if precision == "fp16" and device == "gpu" else "onnx"


def missing_graph(bundle: Bundle, engine: str, precision: Precision, device: Device) -> tuple[str, str] | None:
    """Reason and remedy why this engine finds no graph of this precision in the bundle, or None."""
    graph = graph_for(engine, precision, device)
    if bundle.has_graph(graph):
        return None
    if why := bundle.manifest.left_out.get(graph):
        return f"the bundle {bundle.directory.name} has no {graph} graph: {why}", "use another engine"
    return f"the bundle {bundle.directory.name} has no {graph} graph", "export the model again"


def preferred_engine(bundle: Bundle, precision: Precision, device: Device) -> tuple[str, str]:
    """The engine to run this bundle in where none is named, the fastest that works here, and why, in words.

    Raises `UnsupportedError` where none does.
    """
    if problem := check_bundle(bundle, precision):
        raise UnsupportedError(f"{precision} is not possible: {problem[0]}", f"Remedy: {problem[1]}.")
    refused: list[tuple[str, str, str | None]] = []
    for name in _PREFERRED:
        can = capability(name, precision, device)
        if can.reason is not None:
            refused.append((name, can.reason, can.remedy))
        elif problem := missing_graph(bundle, name, precision, device):
            refused.append((name, *problem))
        else:
            others = "".join(f"; {other}: {reason}" for other, reason, _ in refused)
            return name, f"first of {', '.join(_PREFERRED)} that runs {precision} on {device} here{others}"
    reasons = "; ".join(f"{name}: {reason}" for name, reason, _ in refused)
    raise UnsupportedError(f"no engine runs {precision} on {device}: {reasons}", f"Remedy: {refused[0][2]}.")


def check_possible(engine: str, bundle: Bundle, options: EngineOptions) -> None:
    """Raise `UnsupportedError`, with the reason, where `open_engine` would, before anything is loaded."""
    can = capability(engine, options.precision, options.device)
    problem = (can.reason, can.remedy) if can.reason else check_bundle(bundle, options.precision)
    problem = problem or missing_graph(bundle, engine, options.precision, options.device)
    if problem:
        reason, remedy = problem
        combination = f"{engine} {options.precision} on {options.device}"
        raise UnsupportedError(f"{combination} is not possible: {reason}", f"Remedy: {remedy}.")


def open_engine(engine: str, bundle: Bundle, options: EngineOptions) -> Engine:
    """Load `bundle` into an engine. Raises `UnsupportedError` with the reason where that cannot work."""
    check_possible(engine, bundle, options)
    module, name = ENGINES[engine].split(":")
    loaded: Engine = getattr(importlib.import_module(module), name)(bundle, options)
    return loaded
