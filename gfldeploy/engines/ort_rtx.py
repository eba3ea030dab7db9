"""ONNX Runtime with TensorRT-RTX, NVIDIA's TensorRT for RTX 30, 40 and 50 cards, as a plug-in of ONNX Runtime.

The plug-in's wheel brings TensorRT-RTX and the CUDA runtime, and needs no GPU build of ONNX Runtime: pip alone installs
this way to TensorRT. Its networks are strongly typed, so that each bundle's file says what is computed in which
precision: the FP16 file its FP32 decode, the INT8 file its convolutions. Kernels for an input shape are compiled when
it first comes, in the background: slower ones run until then, unless there is one shape only.

What `compile_model` does has been run, with the real plug-in and without a GPU (benchmarks/tensorrt_rtx.py). Inference
has not run on a GPU.
"""

from __future__ import annotations

import os
import re
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from gfldeploy.bundle import Bundle, GraphName
from gfldeploy.engines.base import EngineOptions, ExecutedConvolution, Tensors
from gfldeploy.engines.dependencies import require
from gfldeploy.engines.hardware import set_tf32
from gfldeploy.engines.ort_engine import OnnxRuntimeEngine
from gfldeploy.engines.ort_tensorrt import parts_in_words, shape_text, tensorrt_session_options
from gfldeploy.engines.registry import TENSORRT_RTX
from gfldeploy.engines.tensorrt import Profile, TensorRtOptions, example
from gfldeploy.errors import EngineError, summary
from gfldeploy.files import native_writes

_COMPILED = "compiled.onnx"  # the graph with TensorRT-RTX's engine inside
_KERNELS = "kernels"  # those that TensorRT-RTX compiles for the card when they first run


def _told(error: Exception) -> str:
    """What the plug-in says, without the places and codes that ONNX Runtime puts before it."""
    return summary(RuntimeError(re.sub(r".*\] : \d+ : [A-Z_]+ : ", "", str(error), flags=re.DOTALL).rstrip("; ")))


class OnnxRuntimeRtxEngine(OnnxRuntimeEngine):
    """ONNX Runtime with the TensorRT-RTX plug-in; what that does not take runs on the CPU.

    The graph is compiled once and kept in the engine's folder: the next start builds nothing.
    """

    name = "onnxruntime-tensorrt-rtx"
    graph_options: Mapping[str, str] = {"enable_cuda_graph": "1"}
    own_sessions = 1
    later_sessions = 0  # TensorRT's own plans are for a range of shapes
    _detail = staticmethod(_told)

    def __init__(self, bundle: Bundle, options: EngineOptions, graph: GraphName) -> None:
        """Load the graph, compiled if it is not yet. Raises `MissingDependencyError`, `BundleError`, `OutputError` or
        `EngineError`."""
        start = time.perf_counter()
        set_tf32(options.tf32)  # the provider has no option for it
        self._tensorrt = TensorRtOptions.of(options)
        super().__init__(bundle, options, graph)
        self.infer(example(self._tensorrt.most_common))
        self.build_s = time.perf_counter() - start

    def executed_convolutions(self, inputs: Tensors) -> tuple[ExecutedConvolution, ...]:
        """None: TensorRT-RTX does not report them; see `delegated`."""
        return ()

    def _session_options(self) -> Any:
        return tensorrt_session_options(self._ort, self.options.threads)

    def _choose_providers(self, bundle: Bundle) -> list[tuple[str, dict[str, str]]]:
        plugin = load_plugin(self._ort)
        self._device = plugin.device
        self.version = f"{self.version}, TensorRT-RTX {plugin.version}"
        self.directory = directory = self._tensorrt.directory(self, bundle)
        self._compiled = directory / _COMPILED
        return [(plugin.provider, rtx_options(self._tensorrt, directory / _KERNELS))]

    def _open_on_gpu(self, cuda_graph: bool) -> Sequence[Any]:
        (provider, options), *_ = self._providers
        if not self._compiled.exists():
            with self._explained(f"cannot compile {self._model}"):
                compile_model(self._ort, self._session_options(), self._model, self._compiled, self._device, options)
        if cuda_graph:  # which TensorRT-RTX captures and replays itself
            options = {**options, **self.graph_options}
        session_options = self._session_options()
        session_options.add_provider_for_devices([self._device], options)
        try:
            parts, outside = compiled_parts(self._compiled)
            if not parts:
                self._compiled.unlink()
                raise EngineError(f"TensorRT-RTX takes no part of {self._model}", "Use the engine onnxruntime.")
            self.delegated = parts_in_words(parts, outside, "TensorRT-RTX")
            session = self._ort.InferenceSession(str(self._compiled), session_options, enable_fallback=0)
        except EngineError:
            raise
        except Exception as error:
            remedy = "Check the GPU and its driver. Delete that file to have it compiled again."
            raise EngineError(f"{self.title} cannot load {self._compiled}: {_told(error)}", remedy) from error
        if (used := session.get_providers()[0]) != provider:
            raise EngineError(f"ONNX Runtime fell back to {used}", "Check the GPU and its driver.")
        return [session]


@dataclass(frozen=True)
class Plugin:
    """The plug-in, registered with ONNX Runtime in this process.

    `provider`: the name of its execution provider. `device`: the first card that it runs on, an `OrtEpDevice`.
    `version`: of the TensorRT-RTX that it brings, with its own.
    """

    provider: str
    device: Any
    version: str


@cache
def load_plugin(ort: Any) -> Plugin:
    """Register the plug-in, whose libraries are loaded by now.

    Raises `MissingDependencyError`, or `EngineError` where it does not load or runs on no GPU here.
    """
    provider, library = _register(ort)
    device = next((one for one in ort.get_ep_devices() if one.ep_name == provider), None)
    if device is None:
        problem = "the TensorRT-RTX plug-in finds no GPU that it runs on: an RTX 30, 40, 50 or newer"
        raise EngineError(problem, "Use the engine onnxruntime-tensorrt.")
    if number := _number(ort, device):  # everything on GPUs here uses the first
        problem = f"TensorRT-RTX does not run on the first GPU, but on number {number}"
        raise EngineError(problem, f"Set CUDA_VISIBLE_DEVICES={number}, which makes that the first.")
    version = next((path.name.partition(".so.")[2] for path in library.parent.glob("libtensorrt_rtx.so.*.*")), "?")
    return Plugin(provider, device, f"{version} (plug-in {device.ep_metadata.get('version', '?')})")


@cache
def _register(ort: Any) -> tuple[str, Path]:
    """Once in a process, as ONNX Runtime wants it. Returns the provider's name and the plug-in's file."""
    module = require(TENSORRT_RTX.module, "the TensorRT-RTX engine")
    library = Path(module.get_library_path())
    provider: str = module.get_ep_name()
    try:
        ort.register_execution_provider_library(provider, str(library))
    except Exception as error:
        remedy = "Check the NVIDIA driver; in a container, start it with access to the GPUs."
        raise EngineError(f"the TensorRT-RTX plug-in cannot be loaded: {_told(error)}", remedy) from error
    return provider, library


def _number(ort: Any, device: Any) -> int:
    """CUDA's number of the card, from 0."""
    return int(device.memory_info(ort.OrtDeviceMemoryType.DEFAULT).device_id)


def rtx_options(profile: Profile, kernels: Path) -> dict[str, str]:
    """Provider options, by the names in tensorrt_rtx_provider_options.h, which the plug-in's wheel holds.

    There is none for a precision, which is the graph's, and none for TF32, which the environment says. `kernels`: the
    folder in which what is compiled for the card is kept.
    """
    return {
        "nv_profile_min_shapes": shape_text(profile.smallest),
        "nv_profile_opt_shapes": shape_text(profile.most_common),
        "nv_profile_max_shapes": shape_text(profile.largest),
        "nv_runtime_cache_path": str(kernels),
    }


def compile_model(
    ort: Any, session_options: Any, model: Path, target: Path, device: Any, options: Mapping[str, str]
) -> None:
    """Write `target`: the graph of `model` with TensorRT-RTX's engine in the place of all that TensorRT-RTX takes.

    ONNX Runtime does not optimise the graph first: TensorRT-RTX gets the bundle's file, float biases included.
    `options`: of the provider. Raises what ONNX Runtime raises, or `OutputError`; then there is no `target`.
    """
    session_options.add_provider_for_devices([device], dict(options))
    compiler = ort.ModelCompiler(session_options, str(model), embed_compiled_data_into_model=True)
    unfinished = target.with_name(f"{target.name}.{os.getpid()}")
    try:
        with native_writes(target.parent):
            compiler.compile_to_file(str(unfinished))
        unfinished.replace(target)
    finally:
        unfinished.unlink(missing_ok=True)


def compiled_parts(compiled: Path) -> tuple[int, Counter[str]]:
    """How many parts of a compiled graph run in TensorRT-RTX, and the operators of the nodes outside."""
    import onnx

    operators = Counter(node.op_type for node in onnx.load(str(compiled)).graph.node)
    return operators.pop("EPContext", 0), operators
