"""ONNX Runtime, on the CPU or on an NVIDIA GPU."""

from __future__ import annotations

import json
import math
import re
import threading
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gfldeploy.bundle import Bundle, GraphName
from gfldeploy.engines.base import (
    NOT_ASKED,
    CopyTimes,
    Engine,
    EngineOptions,
    ExecutedConvolution,
    Shape,
    Tensors,
    remedy_sentence,
)
from gfldeploy.engines.dependencies import require
from gfldeploy.engines.hardware import set_tf32
from gfldeploy.engines.nvidia_libraries import load_libraries, why_not_loaded
from gfldeploy.engines.ort_binding import BoundSessions, DeviceMemory, pinned_array
from gfldeploy.engines.ort_graph import convolutions
from gfldeploy.engines.ort_rewrite import BY_CHANNEL, rewritten
from gfldeploy.engines.registry import ENGINES
from gfldeploy.errors import EngineError, summary
from gfldeploy.files import scratch_directory

PROVIDERS = {"cpu": "CPUExecutionProvider", "gpu": "CUDAExecutionProvider"}
_ERRORS_ONLY, _FATAL_ONLY = 3, 4
_MOST_REMEMBERED = 1000  # shapes that came once
_CHANNELS = 3
_FAILED_NODE = re.compile(
    r"(?:Error in execution: )?Non-zero status code returned while running (\w+) node\. Name:'(.*?)' Status Message: "
)
Providers = Sequence[tuple[str, dict[str, str]]]


class OnnxRuntimeEngine(Engine):
    """`Engine` over an ONNX Runtime `InferenceSession`. FP32 and INT8 (QDQ) alike run the bundle's ONNX file."""

    name = "onnxruntime"
    title = "ONNX Runtime"
    rewrites = True  # an INT8 graph before it is loaded for a CPU, see `ort_rewrite`
    # Of its first provider, to replay inputs of one shape as a CUDA graph; none: it is not tried.
    graph_options: Mapping[str, str] = {"enable_cuda_graph": "True"}
    own_sessions = 2  # opened at once for so many known shapes, one each: two orientations
    # Opened as they are needed, for shapes that are known or come again, one each, while there is memory; 0: for none.
    # Each has the weights once more, but in a session for any shape cuDNN plans every convolution anew, a tenth of a
    # second or more, whenever the shape is not that of the inference before.
    later_sessions = 64
    memory = "cuda"  # of the device that is not the CPU, as `OrtValue` calls it

    def __init__(self, bundle: Bundle, options: EngineOptions, graph: GraphName) -> None:
        """Load the graph. Raises `MissingDependencyError`, `BundleError` or `EngineError`."""
        super().__init__(bundle, options, graph)
        self._ort = require("onnxruntime", "the ONNX Runtime engine")
        self.version: str = self._ort.__version__
        if options.device == "gpu":
            if options.tf32 or options.precision == "fp16":
                set_tf32(options.tf32)  # in the environment: see `cuda_options`
            load_libraries(ENGINES[self.name])
        self._providers = self._choose_providers(bundle)
        self._manifest = bundle.manifest
        self._session: Any = None
        self._on_gpu: dict[Shape | None, BoundSessions] = {}  # None: for every shape that has none of its own
        self._opening = threading.Lock()
        if options.device == "cpu":
            self._session = self._open(self._session_options())
            return
        known = dict.fromkeys(options.shapes)
        self._known = set(list(known)[: self.later_sessions])
        self._came: set[Shape] = set()  # shapes that ran in the sessions for any
        self._last: Shape | None = None  # that of the last inference there
        self._full = False
        self._memory = DeviceMemory()
        own = known if self.graph_options and len(known) <= self.own_sessions else {}
        self._on_gpu = {shape: self._bound(cuda_graph=True) for shape in own} or {None: self._bound(cuda_graph=False)}
        self._note_graphs()

    def close(self) -> None:
        self._session = None
        while self._on_gpu:
            self._on_gpu.popitem()[1].close()

    def infer_timed(self, inputs: Tensors) -> tuple[dict[str, NDArray[Any]], CopyTimes]:
        """On a GPU through bound inputs and outputs; on a CPU nothing is copied."""
        with self._explained():
            if self.options.device == "gpu":
                return self._infer_on_gpu(inputs)
            start = time.perf_counter()
            arrays = self._session.run(self._outputs, dict(inputs))
            ran = time.perf_counter()
        return dict(zip(self._outputs, arrays, strict=True)), CopyTimes.between(start, start, ran, ran)

    def upload(self, inputs: Tensors) -> Tensors:
        if self.options.device == "cpu":
            return inputs
        with self._explained(), self._opening:
            sessions = self._on_gpu.get(_shape(inputs)) or self._for_any()
        with self._explained():
            return sessions.upload(inputs)

    def host_array(self, values: int) -> NDArray[np.float32]:
        on_gpu = self.options.device == "gpu" and self.memory != "cpu"
        return pinned_array(values) if on_gpu else super().host_array(values)

    def _infer_on_gpu(self, inputs: Tensors) -> tuple[dict[str, NDArray[Any]], CopyTimes]:
        try:
            return self._sessions_for(inputs).infer_timed(inputs)
        except Exception as error:
            shape = _shape(inputs)
            if len(self._on_gpu) == 1 or shape is None or shape not in self._on_gpu:
                raise
            why = summary(error)
        finally:
            self._note_graphs()
        # The memory that the sessions of other shapes hold may be what is missing.
        with self._opening:
            self.close()
            self._full = True
        self.cuda_graph = f"no CUDA graph: {why}"
        return self._sessions_for(inputs).infer_timed(inputs)

    def _sessions_for(self, inputs: Tensors) -> BoundSessions:
        """To run these inputs: those of their shape, or those for any, which are opened when they are needed."""
        shape = _shape(inputs)
        with self._opening:
            if shape in self._on_gpu:
                return self._on_gpu[shape]
            if shape is not None and self._deserves_its_own(shape):
                try:
                    self._on_gpu[shape] = self._bound(cuda_graph=bool(self.graph_options))
                    return self._on_gpu[shape]
                except EngineError:  # no room: the others go on
                    self._full = True
            self._last = shape
            return self._for_any()

    def _deserves_its_own(self, shape: Shape) -> bool:
        """Whether the shape is known, or comes back after another, and there is room for one more."""
        if self._full or len(self._on_gpu) > self.later_sessions:
            return False
        wanted = shape in self._known or (shape in self._came and shape != self._last)
        if len(self._came) < _MOST_REMEMBERED:
            self._came.add(shape)
        return wanted and self._memory.has_room(len(self._on_gpu))

    def _for_any(self) -> BoundSessions:
        if None not in self._on_gpu:
            self._on_gpu[None] = self._bound(cuda_graph=False)
        return self._on_gpu[None]

    def _bound(self, cuda_graph: bool) -> BoundSessions:
        return BoundSessions(self._ort, self._open_on_gpu, self.memory, self._outputs, cuda_graph)

    def _note_graphs(self) -> None:
        """Say what the sessions do that have one shape each."""
        if notes := Counter(note for one in self._on_gpu.values() if (note := one.graph_note)):
            self.cuda_graph = "; ".join(f"{count} x {note}" if count > 1 else note for note, count in notes.items())

    def executed_convolutions(self, inputs: Tensors) -> tuple[ExecutedConvolution, ...]:
        """From the graph that ONNX Runtime optimised; it is the same for all inputs."""
        import onnx

        with scratch_directory() as directory:
            path = directory / "optimized.onnx"
            options = self._session_options()
            options.optimized_model_filepath = str(path)
            self._open(options)
            found = convolutions(onnx.load(str(path)), onnx.load(str(self._model)))
        if self.options.precision == "fp32":
            return tuple(replace(one, why=NOT_ASKED) for one in found)
        return found

    def convolution_share(self, inputs: Tensors) -> float | None:
        """From ONNX Runtime's profile, in a session of its own; None on a GPU, where it times only the launches."""
        if self.options.device == "gpu":
            return None
        return convolution_share(self.profile(inputs, self._share_runs))

    def profile(self, inputs: Tensors, runs: int, optimized: Path | None = None) -> list[dict[str, Any]]:
        """ONNX Runtime's own events of so many inferences, in a session of its own.

        Its graph, after all optimisations, is written to `optimized`.
        """
        with scratch_directory() as directory:
            options = self._session_options()
            options.enable_profiling = True
            options.profile_file_prefix = str(directory / "profile")
            if optimized is not None:
                options.optimized_model_filepath = str(optimized)
            session = self._open(options)
            for _ in range(runs):
                session.run(None, dict(inputs))
            events: list[dict[str, Any]] = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
        return events

    @staticmethod
    def _detail(error: Exception) -> str:
        """The line that says what is wrong, and in which node; cuDNN's messages have pages of JSON behind it."""
        return _FAILED_NODE.sub(r"\1 \2: ", summary(error, 400)).removesuffix(" with the cudnn frontend json:")

    def _session_options(self) -> Any:
        return session_options(self._ort, self.options.threads, self.options.streams)

    def _open_on_gpu(self, cuda_graph: bool) -> Sequence[Any]:
        """The sessions that run one after the other."""
        return [self._open(self._session_options(), cuda_graph)]

    def _open(
        self,
        session_options: Any,
        cuda_graph: bool = False,
        model: str | bytes | None = None,
        providers: Providers | None = None,
    ) -> Any:
        """A session; `model`, a path or the content of a file, and `providers` are by default those of the engine."""
        (first, options), *others = providers or self._providers
        if cuda_graph:
            options = {**options, **self.graph_options}
        if first not in self._ort.get_available_providers():
            raise self._without(first, "has no")
        with self._explained(f"cannot load {self._model}"):
            # Its own fallback would run on the CPU, without an error, what fails on the GPU.
            session = self._ort.InferenceSession(
                model or self._source(), session_options, providers=[(first, options), *others], enable_fallback=0
            )
        used = session.get_providers()[0]
        if used != first:
            # Without this, a machine whose CUDA libraries are missing silently measures its CPU.
            raise self._without(first, f"fell back to {used} instead of")
        return session

    def _source(self) -> str | bytes:
        """What a session loads: the file, or its content with changes that make INT8 faster on CPUs."""
        if not self.rewrites or (self.options.precision, self.options.device) != ("int8", "cpu"):
            return str(self._model)
        preprocess, strides = self._manifest.preprocess, self._manifest.strides
        even = (preprocess.pad_stride or math.gcd(*preprocess.target_size)) % 2 == 0
        return rewritten(self._model, strides, math.prod(preprocess.target_size), even) or str(self._model)

    def _without(self, provider: str, what: str) -> EngineError:
        why = why_not_loaded(ENGINES[self.name])
        return EngineError(f"ONNX Runtime {what} {provider}: {why.reason}", remedy_sentence(why.remedy))

    def _choose_providers(self, bundle: Bundle) -> Providers:
        """The execution providers with their options, the one that must not be missing first."""
        if self.options.device == "cpu":
            return [(PROVIDERS["cpu"], {})]
        # cuDNN's attempts that come to nothing are no errors, and are hundreds of lines: what fails is raised.
        self._ort.set_default_logger_severity(_FATAL_ONLY)
        return [(PROVIDERS["gpu"], cuda_options(self.options))]


def _shape(inputs: Tensors) -> Shape | None:
    """(batch, height, width) of images; None where they are none."""
    batch, channels, height, width = inputs["image"].shape
    return (batch, height, width) if channels == _CHANNELS else None


def cuda_options(options: EngineOptions) -> dict[str, str]:
    """Provider options of ONNX Runtime's CUDAExecutionProvider; what is not here is left as it is.

    `cudnn_conv_algo_search`: which of cuDNN's heuristics chooses kernels; since 1.20 nothing is searched. For tensor
    cores HEURISTIC (A) chooses faster ones, for plain FP32 EXHAUSTIVE (B), and more exact ones (docs/decisions.md,
    "cuDNN's heuristics"). Sessions for one shape and for any have the same, so that they give the same.
    `use_tf32`: without it, tensor cores are left out of the choice altogether, of FP16 too. So FP16 has it, and what
    there is of FP32, the decode, is kept from TF32 by the environment.
    The memory arena stays at its default, which grows by doubling: by what each shape needs it would be fragmented.
    """
    tensor_cores = options.tf32 or options.precision == "fp16"
    return {
        "use_tf32": str(int(tensor_cores)),
        "cudnn_conv_algo_search": "HEURISTIC" if tensor_cores else "EXHAUSTIVE",
    }


def session_options(ort: Any, threads: int, streams: int = 1) -> Any:
    """The session options of every session; `ort`: the `onnxruntime` module.

    A thread that calls `run` works too, and all of them share the threads of the session: with its calling threads it
    has `threads` for each of the `streams`.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = streams * (threads - 1) + 1
    options.inter_op_num_threads = 1
    options.log_severity_level = _ERRORS_ONLY
    return options


def convolution_share(events: Iterable[Mapping[str, Any]]) -> float | None:
    """The share of the nodes' time that convolutions took, by an ONNX Runtime profile; None without nodes.

    The first inference counts too: its share differs little, and its events cannot be told from the others. A Scan's
    time is that of the nodes inside, which have events of their own.
    """
    spent: Counter[bool] = Counter()
    for event in events:
        name = event.get("args", {}).get("op_name")
        if event.get("cat") == "Node" and name and name != "Scan":
            spent["Conv" in name and not event["name"].startswith(BY_CHANNEL)] += event.get("dur", 0)
    return spent[True] / spent.total() if spent.total() else None
