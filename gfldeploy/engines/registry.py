"""Which engines there are, and which engine x precision x device works on this machine.

`ENGINES` is the one table of engines; whatever depends on an engine's name asks it. Answers come from package metadata,
the processor's flags and the driver: no engine is imported for them.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from importlib import metadata

from gfldeploy.bundle import END_TO_END, Bundle, GraphName
from gfldeploy.engines.base import (
    DEVICES,
    PRECISIONS,
    Build,
    Device,
    Engine,
    EngineOptions,
    EngineSpec,
    Library,
    Obstacle,
    Precision,
    Shape,
    installed_version,
    is_installed,
    remedy_sentence,
)
from gfldeploy.engines.hardware import compute_capabilities, cpu_flags, nvidia_driver
from gfldeploy.engines.nvidia_libraries import obstacle_to_loading
from gfldeploy.engines.tensorrt import AnyShapeEngine
from gfldeploy.errors import UnsupportedError

# The CPU and the GPU wheel of these are one module: the user chooses.
PADDLE = Library(
    "paddle",
    {
        "cpu": Build("paddlepaddle", "pip install paddlepaddle==3.2.2"),
        "gpu": Build(
            "paddlepaddle-gpu", "install the paddlepaddle-gpu 3.2.2 wheel for your CUDA from Paddle's own package index"
        ),
    },
)
ONNXRUNTIME = Library(
    "onnxruntime",
    {
        "cpu": Build("onnxruntime", "pip install onnxruntime"),
        "gpu": Build(  # with CUDA and cuDNN; pip only warns if the other is not installed
            "onnxruntime-gpu", 'pip uninstall -y onnxruntime && pip install "onnxruntime-gpu[cuda,cudnn]"'
        ),
    },
)
# A plug-in of ONNX Runtime, which brings TensorRT-RTX and the CUDA runtime that it was built for.
TENSORRT_RTX = Library(
    "onnxruntime_ep_nv_tensorrt_rtx",
    {"gpu": Build("onnxruntime-ep-nv-tensorrt-rtx-cu13", "pip install onnxruntime-ep-nv-tensorrt-rtx-cu13")},
)
_NO_FP16_IN_ONEDNN = Obstacle("Paddle's oneDNN kernels have no FP16 convolution", "use bf16 or int8 on CPUs")
_NO_FP16_IN_ORT = Obstacle("ONNX Runtime's CPU kernels have no FP16 convolution", "use int8 on CPUs")
_NO_BF16_IN_ORT = Obstacle(
    "ONNX Runtime's CPU kernels have no BF16 convolution", "use the engines paddle or openvino for bf16"
)
_FP16_FILE_FOR_GPUS = Obstacle("gfldeploy's FP16 file is for GPUs", "use bf16 or int8 on CPUs")
_NO_BF16_ON_GPUS = Obstacle("gfldeploy has no BF16 on GPUs yet", "use fp16")
_NEEDS_TENSORRT = Obstacle("INT8 on GPUs needs TensorRT", "use an engine with TensorRT, or fp16")
_PLAIN = Obstacle("it is Paddle's FP32 kernels for CPUs", "use the engine paddle")
_ORT_CUDA = "libonnxruntime_providers_cuda.so"
_PADDLE_FILES = ("libpaddle.so",)
_GPUS_ALONE = Obstacle("TensorRT runs on NVIDIA GPUs alone", "add --device gpu")

_BUILT_IN = (
    EngineSpec(
        name="paddle",
        title="Paddle Inference",
        entry="gfldeploy.engines.paddle_engine:PaddleEngine",
        library=PADDLE,
        runs={  # Paddle's passes for INT8 and for TensorRT know the older program format only
            "cpu": {"fp32": "paddle", "fp16": _NO_FP16_IN_ONEDNN, "bf16": "paddle", "int8": "paddle_program"},
            "gpu": {"fp32": "paddle", "fp16": "paddle", "bf16": _NO_BF16_ON_GPUS, "int8": _NEEDS_TENSORRT},
        },
        rank=3,
        default=True,
        judges=True,
        gpu_files=_PADDLE_FILES,
        streams=True,
    ),
    EngineSpec(
        name="paddle-plain",
        title="Paddle Inference without oneDNN",
        entry="gfldeploy.engines.paddle_engine:PlainPaddleEngine",
        library=PADDLE,
        runs={"cpu": {"fp32": "paddle", "fp16": _PLAIN, "bf16": _PLAIN, "int8": _PLAIN}, "gpu": _PLAIN},
        streams=True,
    ),
    EngineSpec(
        name="paddle-tensorrt",
        title="Paddle Inference with TensorRT",
        entry="gfldeploy.engines.paddle_engine:PaddleTensorRtEngine",
        library=PADDLE,
        runs={
            "cpu": _GPUS_ALONE,
            "gpu": {
                "fp32": "paddle_program",
                "fp16": "paddle_program",
                "bf16": _NO_BF16_ON_GPUS,
                "int8": "paddle_program",
            },
        },
        needs_shapes=True,
        tensorrt=True,
        gpu_files=_PADDLE_FILES,
        gpu_opens=("libnvinfer.so", "libnvinfer_plugin.so"),
    ),
    EngineSpec(
        name="onnxruntime",
        title="ONNX Runtime",
        entry="gfldeploy.engines.ort_engine:OnnxRuntimeEngine",
        library=ONNXRUNTIME,
        runs={
            "cpu": {"fp32": "onnx", "fp16": _NO_FP16_IN_ORT, "bf16": _NO_BF16_IN_ORT, "int8": "onnx"},
            "gpu": {"fp32": "onnx", "fp16": "onnx_fp16", "bf16": _NO_BF16_ON_GPUS, "int8": _NEEDS_TENSORRT},
        },
        rank=2,
        default=True,
        judges=True,
        gpu_files=(_ORT_CUDA,),
        streams=True,
        small_batches=True,
    ),
    EngineSpec(
        name="onnxruntime-tensorrt",
        title="ONNX Runtime with TensorRT",
        entry="gfldeploy.engines.ort_tensorrt:OnnxRuntimeTensorRtEngine",
        library=ONNXRUNTIME,
        runs={
            "cpu": _GPUS_ALONE,
            "gpu": {"fp32": "onnx", "fp16": "onnx_fp16", "bf16": _NO_BF16_ON_GPUS, "int8": "onnx_tensorrt"},
        },
        needs_shapes=True,
        tensorrt=True,
        gpu_files=(_ORT_CUDA, "libonnxruntime_providers_tensorrt.so"),
    ),
    EngineSpec(
        name="onnxruntime-tensorrt-rtx",
        title="ONNX Runtime with TensorRT-RTX",
        entry="gfldeploy.engines.ort_rtx:OnnxRuntimeRtxEngine",
        library=TENSORRT_RTX,
        runs={
            "cpu": _GPUS_ALONE,
            "gpu": {"fp32": "onnx", "fp16": "onnx_fp16", "bf16": _NO_BF16_ON_GPUS, "int8": "onnx_tensorrt"},
        },
        needs_shapes=True,
        tensorrt=True,
        beside=ONNXRUNTIME,
        beside_version=(1, 27),  # the first in which all of benchmarks/tensorrt_rtx.py works
        gpu_files=("libonnxruntime_providers_nv_tensorrt_rtx.so",),
        gpus=((8, 6), (8, 9), (12, 0)),  # RTX 30, 40, 50: tensorrt_rtx_provider_options.h in the plug-in's wheel
    ),
    EngineSpec(
        name="openvino",
        title="OpenVINO",
        entry="gfldeploy.engines.openvino_engine:OpenVinoEngine",
        library=Library("openvino", {"cpu": Build("openvino", "pip install openvino")}),
        runs={
            "cpu": {"fp32": "onnx", "fp16": _FP16_FILE_FOR_GPUS, "bf16": "onnx", "int8": "onnx"},
            "gpu": Obstacle("OpenVINO does not run on NVIDIA GPUs", "use the engine onnxruntime"),
        },
        rank=1,  # by the results in benchmarks/
        default=True,
        judges=True,
        streams=True,
    ),
)

BROKEN_PLUGINS: dict[str, str] = {}  # by the name of the entry point: why it adds no engine


def _all_engines() -> dict[str, EngineSpec]:
    """Those of this package, then those that installed packages declare as entry points.

    An entry point is an `EngineSpec`; one that is broken must not stop the others.
    """
    found = {spec.name: spec for spec in _BUILT_IN}
    for entry in metadata.entry_points(group="gfldeploy.engines"):
        try:
            spec = entry.load()
        except (Exception, SystemExit) as error:  # noqa: BLE001 - it is somebody else's code
            BROKEN_PLUGINS[entry.name] = f"{entry.value} cannot be loaded: {type(error).__name__}: {error}"
            continue
        if not isinstance(spec, EngineSpec):
            BROKEN_PLUGINS[entry.name] = f"{entry.value} is no EngineSpec"
        elif spec.name in found:
            BROKEN_PLUGINS[entry.name] = f"there is an engine {spec.name} already"
        else:
            found[spec.name] = spec
    return found


ENGINES: Mapping[str, EngineSpec] = _all_engines()
DEFAULT_ENGINES = tuple(name for name, spec in ENGINES.items() if spec.default)
JUDGES = tuple(name for name, spec in ENGINES.items() if spec.judges)
TENSORRT_ENGINES = tuple(name for name, spec in ENGINES.items() if spec.tensorrt)
PREFERRED_ENGINES = tuple(
    spec.name for spec in sorted(ENGINES.values(), key=lambda spec: spec.rank or 0) if spec.rank is not None
)
# INT8 is compared with FP32 in this engine: it runs the file that INT8 is made of, and its library makes that.
REFERENCE_ENGINE = "onnxruntime"


@dataclass(frozen=True)
class Capability:
    """Whether an engine runs a precision on a device here; if not, why (`reason`) and what to do (`remedy`)."""

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
    if obstacle := _unavailable(_spec(engine), precision, device):
        return Capability(engine, precision, device, *obstacle)
    slow = device == "cpu" and precision == "int8" and not cpu_flags() & {"avx512_vnni", "avx_vnni", "amx_int8"}
    note = "this CPU has neither VNNI nor AMX: expect INT8 to be little faster than FP32, if at all" if slow else None
    return Capability(engine, precision, device, note=note)


def _spec(engine: str) -> EngineSpec:
    if engine not in ENGINES:
        raise UnsupportedError(f"there is no engine {engine!r}", f"Choose from: {', '.join(ENGINES)}.")
    return ENGINES[engine]


def _unavailable(spec: EngineSpec, precision: Precision, device: Device) -> Obstacle | None:
    """Why the engine never runs this, or what this machine lacks for it; None where it runs."""
    graph, library = spec.graph(precision, device), spec.library
    if isinstance(graph, Obstacle):
        return graph
    if device == "gpu" and nvidia_driver() is None:
        remedy = "run on a machine with an NVIDIA GPU; start a container with access to it"
        return Obstacle("no NVIDIA driver is loaded", remedy)
    if device == "gpu" and spec.gpus and (obstacle := _wrong_gpu(spec)):
        return obstacle
    if not is_installed(library.module):
        return Obstacle(f"{library.module} is not installed", library.builds[device].install)
    if spec.beside and (obstacle := _lacks_beside(spec, spec.beside)):
        return obstacle
    if device == "gpu" and installed_version(library.builds["gpu"].distribution) is None:
        which = "the CPU build" if "cpu" in library.builds else "another build"
        return Obstacle(f"{which} of {library.module} is installed", library.builds["gpu"].install)
    if device == "gpu" and (obstacle := obstacle_to_loading(spec)):
        return obstacle
    if device == "cpu" and precision == "bf16" and not cpu_flags() & {"avx512_bf16", "amx_bf16"}:
        return Obstacle("this CPU has neither AVX512-BF16 nor AMX", "use fp32 or int8 on this CPU")
    return None


def _lacks_beside(spec: EngineSpec, beside: Library) -> Obstacle | None:
    """Whether the library that the engine needs beside its own is missing or too old."""
    if not is_installed(beside.module):
        return Obstacle(f"{beside.module} is not installed", beside.builds["cpu"].install)
    installed = ((name, version) for name in beside.distributions if (version := installed_version(name)))
    name, version = next(installed, (beside.module, ""))
    found = re.match(r"(\d+)\.(\d+)", version)
    if found is None or (int(found[1]), int(found[2])) >= spec.beside_version:
        return None
    first = ".".join(map(str, spec.beside_version))
    needs = f"{name} {version} is installed, {spec.title} needs {first} or newer"
    return Obstacle(needs, f'pip install --upgrade "{name}>={first}"')


def _wrong_gpu(spec: EngineSpec) -> Obstacle | None:
    """Whether none of the GPUs here is one that the engine runs on."""
    found = compute_capabilities()
    if not found or any(map(spec.runs_on_gpu, found)):
        return None
    *some, last = (f"{major}.{minor}" for major, minor in spec.gpus)
    here = ", ".join(f"{major}.{minor}" for major, minor in sorted(set(found)))
    needs = f"{spec.title} needs a GPU of compute capability {', '.join(some)}, or {last} and newer"
    return Obstacle(f"{needs}, not {here}", "use the engine onnxruntime-tensorrt")


def title_of(engine: str) -> str:
    """The engine's name in sentences; of one that is not known here, from another machine's file, its plain name."""
    return ENGINES[engine].title if engine in ENGINES else engine


def check_bundle(bundle: Bundle, precision: Precision) -> Obstacle | None:
    """Why this bundle cannot run in this precision, or None."""
    has = bundle.manifest.precision
    if precision == "int8" and has != "int8":
        return Obstacle(f"{bundle.directory} is {has.upper()}", "make an INT8 bundle with `gfldeploy quantize`")
    if precision != "int8" and has == "int8":
        return Obstacle(f"{bundle.directory} is INT8", "use the bundle that `gfldeploy export` wrote")
    return None


def graph_for(engine: str, precision: Precision, device: Device) -> GraphName:
    """The graph of a bundle that an engine runs in this precision. Raises `UnsupportedError` where it runs none."""
    graph = _spec(engine).graph(precision, device)
    if isinstance(graph, Obstacle):
        raise _impossible(engine, precision, device, graph)
    return graph


def missing_graph(bundle: Bundle, engine: str, precision: Precision, device: Device) -> Obstacle | None:
    """Why this engine finds no graph of this precision in the bundle, or None."""
    graph = _spec(engine).graph(precision, device)
    return graph if isinstance(graph, Obstacle) else _lacking(bundle, graph, "use another engine")


def file_by_itself(bundle: Bundle, engine: str, precision: Precision, device: Device) -> GraphName | Obstacle:
    """The file that deploys by itself which this engine runs in this precision, or why it runs none of the bundle."""
    spec = _spec(engine)
    inside = spec.graph(precision, device)
    graph = None if isinstance(inside, Obstacle) else END_TO_END.get(inside)
    if graph is None or not spec.judges or device != "cpu":
        problem = f"gfldeploy does not run the file that deploys by itself in {engine} on {device}"
        return Obstacle(problem, "use the engine onnxruntime or openvino, on the CPU")
    return _lacking(bundle, graph, "leave --end-to-end out, or make the bundle again") or graph


def _lacking(bundle: Bundle, graph: GraphName, if_left_out: str) -> Obstacle | None:
    """That the bundle has no such graph, if it has none; `if_left_out`: the remedy where that was for a reason."""
    if bundle.has_graph(graph):
        return None
    lacks = f"the bundle {bundle.directory.name} has no {graph} graph"
    if why := bundle.manifest.left_out.get(graph):
        return Obstacle(f"{lacks}: {why}", if_left_out)
    return Obstacle(lacks, "make the bundle again")


def open_by_itself(engine: str, bundle: Bundle, options: EngineOptions) -> Engine:
    """Load the file that deploys by itself. Raises `UnsupportedError` with the reason where that cannot work."""
    check_possible(engine, bundle, options)
    graph = file_by_itself(bundle, engine, options.precision, options.device)
    if isinstance(graph, Obstacle):
        raise UnsupportedError(graph.reason, remedy_sentence(graph.remedy))
    return load_graph(engine, bundle, replace(options, shapes=(), counts=()), graph)


def check_possible(engine: str, bundle: Bundle, options: EngineOptions) -> None:
    """Raise `UnsupportedError`, with the reason, where `open_engine` would, before anything is loaded."""
    obstacle = obstacle_to(engine, bundle, options.precision, options.device)
    if obstacle is None and options.streams > 1:
        obstacle = ENGINES[engine].obstacle_to_streams(options.device)
    if obstacle:
        raise _impossible(engine, options.precision, options.device, obstacle)


def obstacle_to(engine: str, bundle: Bundle, precision: Precision, device: Device) -> Obstacle | None:
    """Why this engine cannot run this bundle here, or None: it does not work, or the bundle is not made for it."""
    return (
        _unavailable(_spec(engine), precision, device)
        or check_bundle(bundle, precision)
        or missing_graph(bundle, engine, precision, device)
    )


def _impossible(engine: str, precision: Precision, device: Device, why: Obstacle) -> UnsupportedError:
    problem = f"{engine} {precision} on {device} is not possible: {why.reason}"
    return UnsupportedError(problem, remedy_sentence(why.remedy))


def open_engine(engine: str, bundle: Bundle, options: EngineOptions, shapes: Iterable[Shape] | None = None) -> Engine:
    """Load `bundle` into an engine. Raises `UnsupportedError` with the reason where that cannot work.

    `shapes`: of the inputs to come, one for each inference. They become those of the options where the engine is built
    for them, and on GPUs. On CPUs no engine needs them, and they are not looked at.
    """
    check_possible(engine, bundle, options)
    if shapes is not None and (ENGINES[engine].needs_shapes or options.device == "gpu"):
        options = options.expecting(shapes)
    return load_graph(engine, bundle, options, graph_for(engine, options.precision, options.device))


def is_compared(engine: str, device: Device) -> bool:
    """Whether the engine did not judge bundles, on this device, when they were published: `bench.cpu_parity` does."""
    return device == "gpu" or not ENGINES[engine].judges


def load_graph(engine: str, bundle: Bundle, options: EngineOptions, graph: GraphName) -> Engine:
    """Load this graph of the bundle, whatever the table says of the precision, to compare it with others.

    Raises `MissingDependencyError`, `BundleError`, `OutputError` or `EngineError`.
    """
    spec = _spec(engine)
    module, _, name = spec.entry.partition(":")

    def load(options: EngineOptions) -> Engine:
        loaded: Engine = getattr(importlib.import_module(module), name)(bundle, options, graph)
        return loaded

    return AnyShapeEngine(load, bundle, options) if spec.needs_shapes else load(options)
