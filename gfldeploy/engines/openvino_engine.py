"""OpenVINO, on the CPU."""

from __future__ import annotations

import io
import os
import threading
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gfldeploy.bundle import Bundle, GraphName
from gfldeploy.engines import openvino_rewrite
from gfldeploy.engines.base import CopyTimes, Engine, EngineOptions, ExecutedConvolution, OneForEachThread, Tensors
from gfldeploy.engines.cache import DEFAULT_ENGINE_CACHE, engine_directory, keep, kept
from gfldeploy.engines.dependencies import require
from gfldeploy.engines.hardware import CPU_FLAGS, cpu_flags, cpu_model
from gfldeploy.engines.heap import freed_at_exit, give_memory_back
from gfldeploy.engines.openvino_graph import convolutions, in_low_precision
from gfldeploy.engines.openvino_rewrite import add_operators, rewrite
from gfldeploy.errors import EngineError, OutputError
from gfldeploy.files import sha256

Shape = tuple[int, ...]

_making = threading.Lock()  # of the core

# FP32 has to be said: processors with BF16 use it on their own.
_PRECISIONS = {"fp32": "f32", "bf16": "bf16", "int8": "f32"}
# Input shapes with a compiled model of their own. Each holds a copy of the weights, in its own layout.
_OWN_MODELS = 4
# Of fewer images to come, none pays. Compiling takes as long as 2 inferences of GFL-R50 or 100 of a small detector, and
# gains a tenth to four tenths of each: it pays after 30 to 300 of them, or 10 to 80 where the model is in the cache.
_FEWEST = 10
# A shape replaces another when it came more than twice as often, and this many times more: compiling takes as long as a
# few inferences.
_LEAD = 16
_REMEMBERED = 512  # inferences, after which earlier ones count half
_DYNAMIC: Shape = ()
# Kernels that the model for any shape keeps for shapes it has seen: some six shapes' worth. OpenVINO's own 5000 hold
# the memory of thirty.
_KEPT_KERNELS = 1000
_TRIM_EVERY = 100  # inferences of that model: its buffers change size all the time, which leaves holes in the heap


class OpenVinoEngine(Engine):
    """`Engine` over OpenVINO's CPU plugin. Every precision runs the bundle's ONNX file, INT8 that of ONNX Runtime.

    The most common input shapes have a compiled model each, the others share one for any shape, which is slower: it
    fuses fewer operators, and is prepared again when the shape changes. A model for every shape would fill the memory,
    replacing the oldest of a few would compile all the time, and one for a few images would take longer than it saves.
    In INT8 results of the two kinds differ a little; with `EngineOptions.shapes` it is fixed in advance which one runs
    an input. Every compiled model has the streams of the options: threads that call at once are each in one stream of
    one model, so that no more CPUs are taken than allowed.
    """

    name = "openvino"
    title = "OpenVINO"
    rewrites = True  # the graph before it is compiled, see `openvino_rewrite`

    def __init__(self, bundle: Bundle, options: EngineOptions, graph: GraphName) -> None:
        """Read the graph, which is compiled when the first input of a shape comes, unless some of it is in the cache.

        Raises `MissingDependencyError`, `BundleError`, `OutputError` or `EngineError`.
        """
        super().__init__(bundle, options, graph)
        self.queued = int(options.streams > 1)
        self._openvino = require("openvino", "the OpenVINO engine")
        self.version: str = self._openvino.__version__.partition("-")[0]
        self._cache = self._cache_directory(bundle)
        self._core: Any = shared_core()
        self._any_shape = any(side is None for side in bundle.manifest.inputs[0].shape)
        self._network: Any = None
        if self._cache is None or not any(self._cache.glob("*.model")):
            self._network = self._read()
            self._any_shape = self._network.is_dynamic()
        self._compiled: dict[Shape, _Compiled] = {}
        self._choosing = threading.Lock()
        self._settled = self._worth_a_model() if options.shapes else None
        self._asked: Counter[Shape] = Counter()
        self._shared = 0

    def close(self) -> None:
        freed_at_exit(self._compiled)
        self._compiled = {}
        self._network = self._core = None

    @property
    def models(self) -> Mapping[Shape, bool]:
        """The input shapes with a model of their own, () for the one of all others: whether it was in the cache."""
        return {shape: one.loaded.was_cached for shape, one in self._compiled.items() if one.loaded is not None}

    def infer_timed(self, inputs: Tensors) -> tuple[dict[str, NDArray[Any]], CopyTimes]:
        """The input is read where it lies; outputs are copied out."""
        arrays = {
            # Writable, which OpenVINO wants of memory that it reads where it lies.
            name: np.require(array, None if array.dtype.kind in "iu" else np.float32, ("C", "W"))
            for name, array in inputs.items()
        }
        with self._explained():
            loaded = self._loaded_for(_shape(arrays))
            with loaded.requests.one() as request:
                start = time.perf_counter()
                # Not `request.infer`, whose conversions take as long as a hundredth of a small detector's inference.
                for name, array in arrays.items():
                    request.set_tensor(name, self._openvino.Tensor(array, shared_memory=True))
                try:
                    request.start_async()
                finally:  # after Ctrl-C too: it reads the arrays, which are freed then
                    request.wait()
                ran = time.perf_counter()
                outputs = {name: np.array(request.get_output_tensor(place).data) for name, place in loaded.places}
        return outputs, CopyTimes.between(start, start, ran, time.perf_counter())

    def prepare(self, shape: tuple[int, int, int]) -> None:
        if self._settled is not None:
            with self._explained():
                batch, *size = shape
                self._loaded_for((batch, 3, *size))

    def executed_convolutions(self, inputs: Tensors) -> tuple[ExecutedConvolution, ...]:
        """From the runtime model of what runs inputs of this shape."""
        import onnx

        return convolutions(self.runtime_model(inputs), onnx.load(str(self._model)), self.options.precision)

    def runtime_model(self, inputs: Tensors) -> Any:
        """OpenVINO's own account of what runs inputs of this shape. Raises `EngineError`."""
        with self._explained():
            return self._loaded_for(_shape(inputs)).model.get_runtime_model()

    def convolution_share(self, inputs: Tensors) -> float | None:
        """From OpenVINO's own times, in a model of its own."""
        spent: Counter[bool] = Counter()
        with self._explained():
            request = self._compile(_shape(inputs), PERF_COUNT=True).create_infer_request()
            for _ in range(self._share_runs):
                request.infer(dict(inputs))
                for one in request.profiling_info:
                    spent[one.node_type == "Convolution"] += one.real_time.total_seconds()
        return spent[True] / spent.total() if spent.total() else None

    def _loaded_for(self, shape: Shape) -> _Loaded:
        """The model that serves inputs of this shape."""
        if _process_of_threads() != os.getpid():  # they would be waited for without end
            raise EngineError(
                "OpenVINO ran in the process that this one was forked from, and its threads are there alone",
                'Start processes by "spawn", as multiprocessing.get_context("spawn") does.',
            )
        with self._choosing:
            shape = self._model_shape(shape)
            if self._any_shape and shape == _DYNAMIC:
                self._shared += 1
                if self._shared % _TRIM_EVERY == 0:
                    give_memory_back()
            one = self._compiled.setdefault(shape, _Compiled())
        with one.loading:  # or two threads would load the same; others go on meanwhile
            if one.loaded is None:
                one.loaded = self._load(shape)
            return one.loaded

    def _load(self, shape: Shape) -> _Loaded:
        """The model from the cache; compiled, and put there, if it is not in it or of no use."""
        place = None if self._cache is None else self._cache / f"{'x'.join(map(str, shape)) or 'any'}.model"
        model, content = None, kept(place) if place else None
        if content is not None:
            # Not OpenVINO's own cache, which wants to be given the very model, set to the shape and rewritten.
            with suppress(RuntimeError):
                model = self._core.import_model(content, "CPU", self._settings(shape))
        was_cached = model is not None
        if model is None:
            model = self._compile(shape)
            if place is not None:
                exported = io.BytesIO()
                model.export_model(exported)
                try:
                    keep(place, exported.getvalue())
                except OutputError:
                    if self._cache_wanted:
                        raise
        names = [output.get_names() for output in model.outputs]  # an output can have several
        return _Loaded(
            model,
            OneForEachThread(model.create_infer_request, self.options.streams + self.queued),
            tuple((name, place) for name in self._outputs for place, one in enumerate(names) if name in one),
            was_cached,
        )

    def _worth_a_model(self) -> frozenset[Shape]:
        """The input shapes with a model of their own, where those to come are known: by their number alone."""
        common = self.options.shapes[:_OWN_MODELS]
        counts = self.options.counts or [_FEWEST] * len(common)
        pairs = zip(common, counts, strict=False)
        return frozenset((batch, 3, *size) for (batch, *size), count in pairs if count * batch >= _FEWEST)

    def _model_shape(self, shape: Shape) -> Shape:
        """The shape itself if it has, or now gets, a model of its own; else that of the model for any shape."""
        if not self._any_shape or (self._settled is not None and shape not in self._settled):
            return _DYNAMIC
        self._asked[shape] += 1
        if self._asked.total() > _REMEMBERED:
            self._asked = Counter({other: count // 2 for other, count in self._asked.items() if count > 1})
        own = [other for other in self._compiled if other != _DYNAMIC]
        if shape in own or len(own) < _OWN_MODELS:
            return shape
        rarest = min(own, key=self._asked.__getitem__)
        if self._asked[shape] <= 2 * self._asked[rarest] + _LEAD:
            return _DYNAMIC
        del self._compiled[rarest]
        return shape

    def _read(self) -> Any:
        with self._explained(f"cannot read {self._model}"):
            add_operators(self._core)
            return self._core.read_model(str(self._model))

    def _compile(self, shape: Shape, **more: object) -> Any:
        with self._choosing:
            if self._network is None:
                self._network = self._read()
            model = self._network.clone()
        if shape != _DYNAMIC:
            batch = shape[0]  # of what the graph that deploys by itself takes beside the image, too
            others = {one.any_name: [batch, *list(one.partial_shape)[1:]] for one in model.inputs}
            model.reshape({**others, "image": list(shape)})
        if self.rewrites:
            rewrite(model, self.options.precision)
        compiled = self._core.compile_model(model, "CPU", self._settings(shape) | more)
        if self.options.precision == "bf16" and (low := in_low_precision(compiled.get_runtime_model())):
            raise EngineError(f"OpenVINO runs the decode in BF16 ({', '.join(low)}), which puts boxes off by pixels")
        return compiled

    def _settings(self, shape: Shape) -> dict[str, object]:
        streams = self.options.streams
        return {
            "PERFORMANCE_HINT": "LATENCY" if streams == 1 else "THROUGHPUT",
            "NUM_STREAMS": streams,
            "INFERENCE_NUM_THREADS": streams * self.options.threads,
            "INFERENCE_PRECISION_HINT": _PRECISIONS[self.options.precision],
            # Pinned threads would share their processors with the pinned threads of another process.
            "ENABLE_CPU_PINNING": False,
            **({"CPU_RUNTIME_CACHE_CAPACITY": _KEPT_KERNELS} if self._any_shape and shape == _DYNAMIC else {}),
        }

    def _cache_directory(self, bundle: Bundle) -> Path | None:
        if self.options.cache_dir is None:
            return None
        flags = [flag for flag in CPU_FLAGS if flag in cpu_flags()]
        machine = {
            "threads": self.options.threads, "streams": self.options.streams, "cpu": cpu_model(), "flags": flags
        }  # fmt: skip
        code = [sha256(Path(one)) for one in (__file__, openvino_rewrite.__file__)]  # which says what is compiled
        try:
            return engine_directory(self.options.cache_dir, self, bundle, **machine, code=code, graph=self.graph)
        except OutputError:
            if self._cache_wanted:
                raise
            return None

    @property
    def _cache_wanted(self) -> bool:
        """Whether somebody asked for this cache: another that cannot be written is left out."""
        return self.options.cache_dir != DEFAULT_ENGINE_CACHE

    @staticmethod
    def _detail(error: Exception) -> str:
        """The last line with text: OpenVINO writes where it happened first, then what."""
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return (lines or [type(error).__name__])[-1]


def shared_core() -> Any:
    """The one `Core` of this process, which is never freed.

    The first model that a core compiles gives the thread a stack for handlers of signals, and the core takes it away
    when it is freed. Of two cores, freed in the order in which they were made, the first one's stack comes back after
    it was unmapped: the next Ctrl-C or SIGTERM is a segmentation fault (OpenVINO 2026.4).
    """
    with _making:
        return _core()


@cache
def _process_of_threads() -> int:
    """The process in which OpenVINO started its threads: the first that asks for it."""
    return os.getpid()


@cache
def _core() -> Any:
    return require("openvino", "the OpenVINO engine").Core()


class _Loaded(NamedTuple):
    """A compiled model, its inference requests, which share its weights, and the outputs with their places in it."""

    model: Any
    requests: OneForEachThread[Any]
    places: tuple[tuple[str, int], ...]
    was_cached: bool


@dataclass
class _Compiled:
    """A model to be loaded by the first thread that needs it."""

    loaded: _Loaded | None = None
    loading: threading.Lock = field(default_factory=threading.Lock)


def _shape(inputs: Tensors) -> Shape:
    return tuple(inputs["image"].shape)
