"""ONNX Runtime with its TensorRT execution provider. None of this has run on a GPU."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gfldeploy.bundle import Bundle, GraphName
from gfldeploy.engines.base import EngineOptions, ExecutedConvolution, Precision, Shape, Tensors
from gfldeploy.engines.hardware import set_tf32
from gfldeploy.engines.nvidia_libraries import Typing, tensorrt_library, typing_of
from gfldeploy.engines.onnx_split import split_decode
from gfldeploy.engines.ort_engine import PROVIDERS, OnnxRuntimeEngine, Providers, cuda_options, session_options
from gfldeploy.engines.registry import ENGINES
from gfldeploy.engines.tensorrt import MIN_SUBGRAPH, WORKSPACE_BYTES, TensorRtOptions, example

_TENSORRT = "TensorrtExecutionProvider"
# What ONNX Runtime would do to the graph before TensorRT sees it, by the names of its optimisers: this one turns float
# biases into int32 behind a DequantizeLinear, which TensorRT's parser refuses.
_SPOILS_THE_GRAPH = "WeightBiasQuantization"


class OnnxRuntimeTensorRtEngine(OnnxRuntimeEngine):
    """ONNX Runtime with its TensorRT execution provider; what that does not take runs in CUDA.

    Where TensorRT chooses precisions itself, FP16 is for the network alone: the decode is a session of its own in CUDA.
    """

    name = "onnxruntime-tensorrt"
    graph_options: Mapping[str, str] = {"trt_cuda_graph_enable": "True"}
    own_sessions = 1
    later_sessions = 0  # TensorRT's own plans are for a range of shapes

    def __init__(self, bundle: Bundle, options: EngineOptions, graph: GraphName) -> None:
        """Load the graph and build it. Raises `MissingDependencyError`, `BundleError` or `EngineError`."""
        start = time.perf_counter()
        set_tf32(options.tf32)  # the provider has no option for it
        tensorrt = tensorrt_library(ENGINES[self.name])  # the one that it loads: others may be installed
        self._typing = typing_of(tensorrt)
        self._decode_apart = options.precision == "fp16" and self._typing == "weak"
        super().__init__(bundle, options, graph)
        inputs = example(TensorRtOptions.of(options).most_common)
        self.infer(inputs)
        self.build_s = time.perf_counter() - start
        # In a session of its own; the engine is in the cache by now.
        apart = ", the decode in CUDA" if self._decode_apart else ""
        self.delegated = f"{describe_delegation(self.profile(inputs, 1))}{apart}"
        self.version = f"{self.version}, TensorRT {tensorrt}"

    def executed_convolutions(self, inputs: Tensors) -> tuple[ExecutedConvolution, ...]:
        """None: TensorRT does not report them; see `delegated`."""
        return ()

    def _session_options(self) -> Any:
        return tensorrt_session_options(self._ort, self.options.threads)

    def _open_on_gpu(self, cuda_graph: bool) -> Sequence[Any]:
        if not self._decode_apart:
            return super()._open_on_gpu(cuda_graph)
        network, decode = self._parts()
        return [
            self._open(self._session_options(), cuda_graph, network),
            # It has arithmetic on shapes, which is done on the CPU, where no CUDA graph reaches.
            self._open(self._session_options(), False, decode, self._providers[1:]),
        ]

    def _open(
        self,
        session_options: Any,
        cuda_graph: bool = False,
        model: str | bytes | None = None,
        providers: Providers | None = None,
    ) -> Any:
        if model is None and self._decode_apart:
            model, _ = self._parts()
        return super()._open(session_options, cuda_graph, model, providers)

    def _parts(self) -> tuple[bytes, bytes]:
        """The network and the decode, as files."""
        import onnx

        with self._explained(f"cannot load {self._model}"):
            network, decode = split_decode(onnx.load(str(self._model)))
        return network.SerializeToString(), decode.SerializeToString()

    def _choose_providers(self, bundle: Bundle) -> Providers:
        tensorrt = TensorRtOptions.of(self.options)
        self.directory = tensorrt.directory(self, bundle)
        options = tensorrt_options(self.options.precision, tensorrt, self.directory, self._typing)
        return [(_TENSORRT, options), (PROVIDERS["gpu"], cuda_options(self.options))]


def tensorrt_session_options(ort: Any, threads: int) -> Any:
    """Those with which a graph reaches TensorRT as it is in the file; `ort`: the `onnxruntime` module."""
    options = session_options(ort, threads)
    options.add_session_config_entry("optimization.disable_specified_optimizers", _SPOILS_THE_GRAPH)
    return options


def tensorrt_options(
    precision: Precision, options: TensorRtOptions, directory: Path, typing: Typing = "weak"
) -> dict[str, str]:
    """Provider options of ONNX Runtime's TensorrtExecutionProvider, by the names in its documentation.

    A weakly typed network may run in the precisions that are allowed here, a strongly typed one in those of the graph.
    INT8 is by the graph's own Q/DQ: no calibration table. FP16 is not allowed beside it: TensorRT would take it for the
    box arithmetic too, which FP16 cannot hold. TF32 is not among the options: see `set_tf32`. `directory`: of the
    engine; the timing cache serves all engines.
    """
    allowed = {"trt_fp16_enable": str(precision == "fp16"), "trt_int8_enable": str(precision == "int8")}
    return {
        **(allowed if typing == "weak" else {}),
        "trt_max_workspace_size": str(WORKSPACE_BYTES),
        "trt_min_subgraph_size": str(MIN_SUBGRAPH),
        "trt_profile_min_shapes": shape_text(options.smallest),
        "trt_profile_opt_shapes": shape_text(options.most_common),
        "trt_profile_max_shapes": shape_text(options.largest),
        "trt_engine_cache_enable": "True",
        "trt_engine_cache_path": str(directory),
        "trt_timing_cache_enable": "True",
        "trt_timing_cache_path": str(options.cache_dir),
    }


def shape_text(shape: Shape) -> str:
    """A shape as the provider options of both TensorRTs take it."""
    batch, height, width = shape
    return f"image:{batch}x3x{height}x{width}"


def describe_delegation(events: list[dict[str, Any]]) -> str:
    """How much ran in TensorRT, from the events of an ONNX Runtime profile."""
    nodes = [event["args"] for event in events if event.get("cat") == "Node" and "provider" in event.get("args", {})]
    outside = Counter(node.get("op_name", "?") for node in nodes if node["provider"] != _TENSORRT)
    return parts_in_words(len(nodes) - outside.total(), outside, "TensorRT")


def parts_in_words(parts: int, outside: Counter[str], library: str) -> str:
    """How many parts of a graph run in TensorRT, and which operators outside."""
    listed = ", ".join(f"{name} x{count}" for name, count in outside.most_common())
    more = f": {listed}" if listed else ""
    return f"{parts} part{'' if parts == 1 else 's'} in {library}, {outside.total()} nodes outside{more}"
