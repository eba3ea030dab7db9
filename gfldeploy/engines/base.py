"""What every inference engine looks like from outside, and what the engines here share.

An engine is a class that extends `Engine`, in a module of its own, and an `EngineSpec` in `registry.ENGINES`.
"""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib import metadata, util
from pathlib import Path
from queue import LifoQueue
from typing import Any, Generic, Literal, NamedTuple, Self, TypeVar, get_args

import numpy as np
from numpy.typing import NDArray

from gfldeploy.bundle import END_TO_END, Bundle, GraphName
from gfldeploy.engines.hardware import FIRST_WITH_TF32, compute_capabilities, usable_threads
from gfldeploy.errors import EngineError, UnsupportedError
from gfldeploy.progress import SILENT, Progress
from gfldeploy.serialization import build, plain

Precision = Literal["fp32", "fp16", "bf16", "int8"]
Device = Literal["cpu", "gpu"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
DEVICES: tuple[Device, ...] = get_args(Device)

T = TypeVar("T")
Tensors = Mapping[str, NDArray[Any]]
# (batch, height, width) of the network's input.
Shape = tuple[int, int, int]

NOT_ASKED = "FP32 was asked for"
_MOST_THREADS = 1024


class Obstacle(NamedTuple):
    """Why something cannot run, and what to do instead, as clauses without a full stop."""

    reason: str
    remedy: str


def remedy_sentence(remedy: str) -> str:
    """A remedy as a sentence of its own; a command stays as it is typed, without a full stop."""
    if remedy.startswith(("pip ", "uv ")):
        return f"Run: {remedy}"
    return f"{remedy[0].upper()}{remedy[1:].rstrip('.')}."


class Build(NamedTuple):
    """A distribution of a library, and how to install it, as a command or clause."""

    distribution: str
    install: str


@dataclass(frozen=True)
class Library:
    """A package that engines run on: its module, and what provides it for each device."""

    module: str
    builds: Mapping[Device, Build]

    @property
    def distributions(self) -> tuple[str, ...]:
        """Each once."""
        return tuple(dict.fromkeys(build.distribution for build in self.builds.values()))


@dataclass(frozen=True)
class EngineSpec:
    """The one declaration of an engine: all that is decided by its name is read from here.

    `name`: in options and results. `title`: in sentences. `entry`: "module:callable", which is called with a `Bundle`,
    `EngineOptions` and the name of the graph to run, and returns an `Engine`; imported when the engine is opened.
    `runs`: the graph of a bundle that it runs, by device and precision, or why it never does.
    `rank`: place among the engines that run a bundle where none is named, the fastest has 1; None: never unless named.
    `default`: `bench` and `tune` measure it unless told otherwise. `judges`: where it is installed, what `export` and
    `quantize` publish must hold in it. `needs_shapes`: it is built for the range of `EngineOptions.shapes` and refuses
    other inputs; for those another one is opened (`tensorrt.AnyShapeEngine`). `tensorrt`: it runs in TensorRT.
    `streams`: on CPUs, one that is loaded runs several inferences at once (`EngineOptions.streams`). `small_batches`:
    there it runs several small images faster in one inference, and another number of images costs it nothing.
    `beside`: a library that must be installed too, in whatever build, of `beside_version` or newer. `gpus`: the compute
    capabilities of the GPUs that it runs on, where the last stands for all newer ones too; () for any GPU. `gpu_files`:
    the native libraries of its GPU build which say by their needs what else must be installed. `gpu_opens`: what of
    TensorRT its library opens by a bare name, where the linker must find it.
    """

    name: str
    title: str
    entry: str
    library: Library
    runs: Mapping[Device, Mapping[Precision, GraphName | Obstacle] | Obstacle]
    rank: int | None = None
    default: bool = False
    judges: bool = False
    needs_shapes: bool = False
    tensorrt: bool = False
    streams: bool = False
    small_batches: bool = False
    beside: Library | None = None
    beside_version: tuple[int, int] = (0, 0)
    gpus: tuple[tuple[int, int], ...] = ()
    gpu_files: tuple[str, ...] = ()
    gpu_opens: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for device, graphs in self.runs.items():
            if not (isinstance(graphs, Obstacle) or device in self.library.builds):
                raise ValueError(f"{self.name} runs on {device}, but its library has no build for it")

    @property
    def graphs(self) -> set[GraphName]:
        """All that it runs, in whatever precision and on whatever device."""
        found = {self.graph(precision, device) for device in DEVICES for precision in PRECISIONS}
        return {one for one in found if not isinstance(one, Obstacle)}

    def obstacle_to_streams(self, device: Device) -> Obstacle | None:
        """Why one engine that is loaded runs no more than one inference at once on this device, or None."""
        if device == "gpu":
            return Obstacle("gfldeploy runs one inference at once on a GPU", "use larger batches there, and 1 stream")
        return None if self.streams else Obstacle(f"{self.title} runs one inference at once", "use 1 stream")

    def runs_on_gpu(self, capability: tuple[int, int]) -> bool:
        """Whether it runs on GPUs of this compute capability."""
        return not self.gpus or capability in self.gpus or capability >= self.gpus[-1]

    def graph(self, precision: Precision, device: Device) -> GraphName | Obstacle:
        """The graph that it runs in this precision, or why it never does, whatever is installed."""
        absent = Obstacle(f"{self.title} has no {precision} on {device}", "choose another engine or precision")
        of_device = self.runs.get(device, absent)
        return of_device if isinstance(of_device, Obstacle) else of_device.get(precision, absent)


@dataclass(frozen=True)
class EngineOptions:
    """How an engine runs a bundle.

    `threads`: CPU threads of one inference, at least 1; `EngineError` is raised for more than any machine runs, as
    engines start them all. `streams`: inferences at once from one engine, at least 1: so many threads may call `infer`
    at the same time. `EngineError` is raised for several that together have more threads than there are usable CPUs:
    they would wait for each other. `cache_dir`: where engines keep what they compiled; None for nowhere, or for the
    default place where compiling takes minutes. `shapes`: (batch, height, width) of the inputs to come, the most common
    first, for engines that compile for shapes: which of its compiled models runs an input then depends on these, not on
    the inputs before it; () where they are not known. `counts`: how many inputs of each of them will come; () where
    they may be any number.
    `tf32`: FP32 on a GPU may multiply in TF32, NVIDIA's tensor-core format of 19 bits (8 of exponent, 10 of mantissa),
    which libraries allow unless told otherwise; `UnsupportedError` is raised for it where there is no such choice.
    `progress`: told before something takes minutes, as building with TensorRT does.
    """

    precision: Precision = "fp32"
    device: Device = "cpu"
    threads: int = 1
    cache_dir: Path | None = None
    shapes: tuple[Shape, ...] = ()
    counts: tuple[int, ...] = ()
    tf32: bool = False
    streams: int = 1
    progress: Progress = field(default=SILENT, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, not {self.precision!r}")
        if self.device not in DEVICES:
            raise ValueError(f"device must be one of {', '.join(DEVICES)}, not {self.device!r}")
        if self.threads < 1:
            raise ValueError(f"threads must be at least 1, not {self.threads}")
        if self.threads > (most := max(_MOST_THREADS, os.cpu_count() or 1)):
            raise EngineError(f"{self.threads:,} threads are more than {most:,}", "Use as many as there are CPU cores.")
        if self.streams < 1:
            raise ValueError(f"streams must be at least 1, not {self.streams}")
        if obstacle := oversubscribed(self.streams, self.threads):
            raise EngineError(obstacle.reason, remedy_sentence(obstacle.remedy))
        if self.tf32:
            check_tf32((self.precision,), self.device)

    def expecting(self, shapes: Iterable[Shape]) -> Self:
        """These options for inputs of these shapes, one for each inference."""
        found = Counter(shapes).most_common()
        return replace(self, shapes=tuple(shape for shape, _ in found), counts=tuple(count for _, count in found))

    def to_plain(self) -> dict[str, Any]:
        """As JSON-ready data for another process, which has a `progress` of its own."""
        data: dict[str, Any] = plain(self)
        del data["progress"]
        return data

    @classmethod
    def from_plain(cls, data: object) -> Self:
        """The inverse of `to_plain`. Raises `DataError`, also for what does not fit this machine."""
        return build(cls, data, "the engine's options")


@dataclass(frozen=True)
class CopyTimes:
    """Milliseconds of one inference: host to device, the inference itself, device to host.

    On a CPU the copies are those into and out of the engine's own buffers, 0 where it has none.
    """

    input_copy_ms: float
    inference_ms: float
    output_copy_ms: float

    @classmethod
    def between(cls, start: float, copied: float, ran: float, end: float) -> Self:
        """From `time.perf_counter` before it, and after each part."""
        return cls((copied - start) * 1e3, (ran - copied) * 1e3, (end - ran) * 1e3)


@dataclass(frozen=True)
class ExecutedConvolution:
    """One convolution of one inference, as the engine reports it.

    `precision`: the precision it ran in. `what`: its weight's name where the engine knows it, with "use N" (0 is the
    first in the file) where several share the weight, else its shape or the name of its node. `why`: the reason why it
    ran in FP32; None if it ran in less.
    """

    precision: str
    what: str
    why: str | None = None


class ClosesOnExit:
    """A context manager that calls its own `close`."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free what it holds."""


class OneForEachThread(Generic[T]):
    """Up to `count` objects that `make` makes as they are needed, each of which one thread uses at a time."""

    def __init__(self, make: Callable[[], T], count: int) -> None:
        self._make = make
        self._free: LifoQueue[T | None] = LifoQueue()
        for _ in range(count):
            self._free.put(None)  # one to be made: those that there are come first

    @contextmanager
    def one(self) -> Iterator[T]:
        """One that nobody else uses in the block; waits where all are used. Raises what `make` raises."""
        kept = self._free.get()
        try:
            if kept is None:
                kept = self._make()
            yield kept
        finally:
            self._free.put(kept)


class Engine(ClosesOnExit):
    """A loaded model, used as a context manager; leaving the block frees it.

    Subclasses set `name`, `version` (of the library) and `title` (in messages), load the graph in `__init__`, and
    implement `infer_timed`. `graph` is its name, `_model` and `_params` its files, `_outputs` the names of its outputs.
    `build_s`: seconds to load the graph and to run the most common shape once, where that builds an engine or reads it
    from a cache. `queued`: inferences beyond the streams that should wait in the engine: where threads of its own run
    them, a stream then never waits for the next. `delegated`: which parts of the graph run in another library, in
    words. `cuda_graph`: whether inferences replay a CUDA graph, or why not, in words; None where there was no reason to
    try. `directory`: where it keeps what it built, None for nowhere. `by_itself`: the graph takes what
    `Preprocess.pixels_of` gives, and gives detections.
    """

    name: str
    title: str
    version: str
    options: EngineOptions
    graph: GraphName
    build_s: float | None = None
    queued: int = 0
    delegated: str | None = None
    cuda_graph: str | None = None
    directory: Path | None = None
    by_itself: bool = False
    _share_runs = 3  # inferences that `convolution_share` measures

    def __init__(self, bundle: Bundle, options: EngineOptions, graph: GraphName) -> None:
        """Find the graph's files. Raises `BundleError`."""
        self.options = options
        self.graph = graph
        self.by_itself = graph in END_TO_END.values()
        self._model, self._params = bundle.graph(graph)
        self._outputs = list(bundle.outputs(graph))

    def infer(self, inputs: Tensors) -> dict[str, NDArray[Any]]:
        """Takes `{"image": float32 [N, 3, H, W]}`, returns `{"scores": float32 [N, A, C], "boxes": float32 [N, A, 4]}`.

        Boxes are x1, y1, x2, y2 in pixels of the network input. Of a bundle that decodes K candidates, A is K, and
        `"anchors"` int32 [N, K] says which they are, -1 for none. The arrays returned are the caller's to keep: a later
        `infer` never overwrites them. As many threads may call it at once as the options have streams, and `queued`
        more. Raises `EngineError` when the engine refuses the input or fails.
        """
        return self.infer_timed(inputs)[0]

    def infer_timed(self, inputs: Tensors) -> tuple[dict[str, NDArray[Any]], CopyTimes]:
        """As `infer`, with the times of its parts."""
        raise NotImplementedError

    def upload(self, inputs: Tensors) -> Tensors:
        """Copy inputs to where the engine reads them, if that is elsewhere; what is returned is for one `infer`.

        Another thread may infer meanwhile: the copy of one batch and the inference of another overlap. Raises
        `EngineError`.
        """
        return inputs

    def prepare(self, shape: Shape) -> None:
        """Load what runs batches of this shape, one of those that are to come; otherwise the first `infer` of it does.

        Other threads may infer meanwhile. Raises `EngineError`.
        """

    def host_array(self, values: int) -> NDArray[np.float32]:
        """Memory for so many values of an input, uninitialised, from which the engine copies as fast as it can."""
        return np.empty(values, np.float32)

    def executed_convolutions(self, inputs: Tensors) -> tuple[ExecutedConvolution, ...]:
        """The convolutions of one inference of `inputs`; none where the engine cannot tell. Raises `EngineError`."""
        return ()

    def convolution_share(self, inputs: Tensors) -> float | None:
        """The share, 0 to 1, of the time of one inference that its convolutions take; None where it cannot be told.

        It infers `inputs` a few times. Raises `EngineError`.
        """
        return None

    @contextmanager
    def _explained(self, what: str = "failed") -> Iterator[None]:
        """Whatever the library raises in the block becomes an `EngineError`: "TITLE WHAT: DETAIL"."""
        try:
            yield
        except EngineError:
            raise
        except Exception as error:
            fewer = ", or use fewer images at once" if what == "failed" else ""
            raise EngineError(
                f"{self.title} {what}: {self._detail(error)}", f"Check the bundle with `gfldeploy verify`{fewer}."
            ) from error

    @staticmethod
    def _detail(error: Exception) -> str:
        """What of the library's message is worth showing."""
        return str(error)


def oversubscribed(streams: int, threads: int) -> Obstacle | None:
    """Why so many inferences at once, of so many threads each, cannot run here without waiting for each other."""
    usable = usable_threads()
    if streams == 1 or streams * threads <= usable:
        return None
    each = "1 thread each" if threads == 1 else f"{threads:,} threads each"
    have = f"{usable} usable CPU{'' if usable == 1 else 's'}"
    return Obstacle(f"{streams:,} streams of {each} are more than the {have}", "use fewer streams, or fewer threads")


def with_tf32(precision: str, tf32: bool) -> str:
    """The precision in words: "fp32", or "fp32 in TF32"."""
    return f"{precision} in TF32" if tf32 else precision


def check_tf32(precisions: Iterable[Precision], device: Device) -> None:
    """Raise `UnsupportedError` where none of the precisions has TF32 on this device, so that it cannot be chosen."""
    if device != "gpu":
        raise UnsupportedError(
            "TF32 is a format of GPUs, and this is the CPU", "Leave --tf32 out, or add --device gpu."
        )
    if "fp32" not in (given := tuple(precisions)):
        what = ", ".join(given)
        raise UnsupportedError(f"TF32 is a way to compute FP32, and this is {what}", "Leave --tf32 out, or use fp32.")
    if (found := compute_capabilities()) and max(found) < FIRST_WITH_TF32:
        here = ".".join(map(str, max(found)))
        raise UnsupportedError(
            f"GPUs have TF32 from compute capability 8.0 on, and here is {here}", "Leave --tf32 out."
        )


def installed_version(distribution: str) -> str | None:
    """The version of an installed distribution, None if it is not installed. Read from metadata, not imported."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def is_installed(module: str) -> bool:
    """Whether a module could be imported. A plain folder of its name, as a bundle's `onnx/`, is no module."""
    try:
        found = util.find_spec(module)
    except (ModuleNotFoundError, ValueError):  # the package that it would be in; a stand-in without a specification
        return False
    return found is not None and found.origin is not None


def count_precisions(convolutions: Iterable[ExecutedConvolution]) -> dict[str, int]:
    """Number of convolutions by the precision that they ran in."""
    return dict(sorted(Counter(one.precision for one in convolutions).items()))


def reasons(convolutions: Iterable[ExecutedConvolution]) -> tuple[str, ...]:
    """Why those convolutions that did not run in less than FP32 did not: a line for each reason, the most common first.

    A line reads `REASON (COUNT): WHAT, WHAT xCOUNT, ...`.
    """
    found: dict[str, Counter[str]] = defaultdict(Counter)
    for one in convolutions:
        if one.why is not None:
            found[one.why][one.what] += 1
    return tuple(
        f"{why} ({which.total()}): {', '.join(f'{what} x{n}' if n > 1 else what for what, n in which.items())}"
        for why, which in sorted(found.items(), key=lambda item: -item[1].total())
    )
