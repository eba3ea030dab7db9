"""What engines that compile for shapes build, for which shapes, and where it is kept. Nothing here needs a GPU.

Such an engine, as all with TensorRT are, is built for a `Profile`: a range of input shapes. `AnyShapeEngine` makes it
run inputs of any shape.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, closing, suppress
from contextvars import ContextVar
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from gfldeploy.bundle import Bundle, Manifest
from gfldeploy.engines.base import (
    CopyTimes,
    Engine,
    EngineOptions,
    ExecutedConvolution,
    Shape,
    Tensors,
)
from gfldeploy.engines.cache import DEFAULT_ENGINE_CACHE, engine_directory
from gfldeploy.engines.hardware import gpu_models, nvidia_driver
from gfldeploy.engines.nvidia_libraries import tensorrt_library as tensorrt_library
from gfldeploy.errors import EngineError, OutputError
from gfldeploy.files import write_json
from gfldeploy.progress import Progress
from gfldeploy.system import DirectoryLock

# What TensorRT's tactics may use: more than the convolutions of a GFL need at 800x1344. With too little, TensorRT
# silently chooses slower ones.
WORKSPACE_BYTES = 4096 * 2**20
# Nodes below which a part of the graph is not worth the copies around it.
MIN_SUBGRAPH = 3
# In the folder of what was built, once it is whole: what it is, for people who look there.
NOTE = "built.json"
_PHOTOGRAPH = (3000, 4000)  # (height, width): what most cameras take
_SMALLEST = 32  # pixels: what the real TensorRT builds for, and the usual stride
# What ends when the engine that is being opened is open, or cannot be.
_locks: ContextVar[ExitStack | None] = ContextVar("locks", default=None)
# Engines of a detector that are open at once; each has the weights, and memory for its largest input.
_OPEN = 2


@dataclass(frozen=True)
class Profile:
    """The inputs that an engine is built for, as (batch, height, width).

    TensorRT refuses what is smaller than `smallest` or larger than `largest` in any dimension, and is fastest at
    `most_common`.
    """

    smallest: Shape
    most_common: Shape
    largest: Shape

    @classmethod
    def spanning(cls, shapes: Sequence[Shape]) -> Profile:
        """The smallest that covers these shapes, of which the first is the most common. `ValueError` for none."""
        smallest, largest = (_corner(pick, shapes) for pick in (min, max))
        return Profile(smallest, shapes[0], largest)

    @property
    def shapes(self) -> tuple[Shape, ...]:
        """Those that `spanning` makes this profile from, each once."""
        return tuple(dict.fromkeys((self.most_common, self.smallest, self.largest)))

    def covers(self, *shapes: Shape) -> bool:
        """Whether inputs of all of these shapes run."""
        return all(
            low <= side <= high
            for shape in shapes
            for low, side, high in zip(self.smallest, shape, self.largest, strict=True)
        )

    def __str__(self) -> str:
        smallest, most_common, largest = ("x".join(map(str, one)) for one in self._corners())
        return most_common if smallest == largest else f"{smallest} to {largest}, fastest at {most_common}"

    def _corners(self) -> tuple[Shape, Shape, Shape]:
        return self.smallest, self.most_common, self.largest


def _corner(pick: Callable[[Iterable[int]], int], shapes: Sequence[Shape]) -> Shape:
    batch, height, width = (pick(sides) for sides in zip(*shapes, strict=True))
    return batch, height, width


def possible_shapes(manifest: Manifest, batch_size: int = 1) -> tuple[Shape, ...]:
    """Shapes that span the inputs of a detector in batches of up to `batch_size`; the first is of a photograph.

    They follow from what is done to images: whatever these are, resizing bounds their sides. Only where inputs are not
    padded, elongated images can have a side below the smallest here.
    """
    preprocess = manifest.preprocess
    fixed, _, *sides = manifest.inputs[0].shape
    usual = preprocess.input_size(*_PHOTOGRAPH)
    if None not in sides or preprocess.fixed or not preprocess.keep_ratio:
        smallest = largest = usual
    else:
        longest = max(preprocess.target_size)
        smallest, largest = preprocess.padded_size(_SMALLEST, _SMALLEST), preprocess.padded_size(longest, longest)
    most, fewest = fixed or batch_size, fixed or 1
    return tuple(dict.fromkeys(((most, *usual), (fewest, *smallest), (most, *largest))))


class AnyShapeEngine(Engine):
    """An engine that is built for a profile, for inputs of every shape: outside of the profile another is opened.

    The first profile spans the `shapes` of the options, or all that the detector can be given. Any other is as large as
    all that the detector can be given, so that few are ever built. Which of them runs an input follows from the options
    and from the input's shape, not from inputs before it. The engines used last stay open, two at most; `directory` is
    that of the last.
    """

    def __init__(self, open_one: Callable[[EngineOptions], Engine], bundle: Bundle, options: EngineOptions) -> None:
        """Open the engine for the shapes of the options, which may take minutes. Raises what `open_one` raises."""
        self.options = options
        self._open_one = open_one
        self._bundle = bundle
        self._first = Profile.spanning(options.shapes or possible_shapes(bundle.manifest))
        self._opened: dict[Profile, Engine] = {}
        self._infers, self._closes = threading.Lock(), threading.Lock()  # or one would close what another is in
        opened = self._engine(self._first)
        self.name, self.title, self.version = opened.name, opened.title, opened.version
        self.build_s, self.delegated = opened.build_s, opened.delegated
        self._any = opened  # though it may be closed: memory of the host belongs to none of them

    def close(self) -> None:
        while self._opened:
            self._close_one()

    def infer_timed(self, inputs: Tensors) -> tuple[dict[str, NDArray[Any]], CopyTimes]:
        with self._infers:
            engine = self._engine_for(inputs)
            try:
                return engine.infer_timed(inputs)
            finally:
                self.cuda_graph = engine.cuda_graph

    def upload(self, inputs: Tensors) -> Tensors:
        with self._closes:
            engine = self._opened.get(self.profile_of(_shape(inputs)))  # the thread that infers opens them
            return inputs if engine is None else engine.upload(inputs)

    def host_array(self, values: int) -> NDArray[np.float32]:
        return self._any.host_array(values)

    def executed_convolutions(self, inputs: Tensors) -> tuple[ExecutedConvolution, ...]:
        return self._engine_for(inputs).executed_convolutions(inputs)

    def convolution_share(self, inputs: Tensors) -> float | None:
        return self._engine_for(inputs).convolution_share(inputs)

    def profile_of(self, shape: Shape) -> Profile:
        """The one in which an input of this shape runs."""
        if self._first.covers(shape):
            return self._first
        batch_size = max(self._first.largest[0], 1 << (shape[0] - 1).bit_length())  # few sizes: powers of two
        return Profile.spanning((*self._first.shapes, *possible_shapes(self._bundle.manifest, batch_size), shape))

    def _engine_for(self, inputs: Tensors) -> Engine:
        return self._engine(self.profile_of(_shape(inputs)))

    def _engine(self, profile: Profile) -> Engine:
        engine = self._opened.pop(profile, None)
        if engine is None:
            while len(self._opened) >= _OPEN:
                self._close_one()
            try:
                engine = self._open(profile)
            except EngineError:
                if not self._opened:
                    raise
                self.close()  # the GPU's memory may be too little for two
                engine = self._open(profile)
        self._opened[profile] = engine
        self.directory = engine.directory
        return engine

    def _close_one(self) -> None:
        """That which was used the longest time ago."""
        with self._closes:
            self._opened.pop(next(iter(self._opened))).close()

    def _open(self, profile: Profile) -> Engine:
        with ExitStack() as locks:
            outer = _locks.set(locks)
            try:
                engine = self._open_one(replace(self.options, shapes=profile.shapes))
            finally:
                _locks.reset(outer)
            _leave_note(engine, self._bundle, profile)
        return engine


@dataclass(frozen=True)
class TensorRtOptions(Profile):
    """How a graph is built with TensorRT: for which inputs, and `cache_dir`, the folder of all engines."""

    cache_dir: Path

    @classmethod
    def of(cls, options: EngineOptions) -> Self:
        """For the shapes of `options`. Raises `EngineError` if there are none."""
        if not options.shapes:
            raise EngineError("TensorRT has to know the shapes of its inputs before", "Open it with `open_engine`.")
        profile = Profile.spanning(options.shapes)
        return cls(profile.smallest, profile.most_common, profile.largest, options.cache_dir or DEFAULT_ENGINE_CACHE)

    def directory(self, engine: Engine, bundle: Bundle) -> Path:
        """The folder of what `engine` builds of `bundle` on this machine, created if it is absent; `OutputError`.

        Where nothing was built yet, the `progress` of the engine's options is told that this takes a while; or another
        process is building just this, and is waited for. What a build left that did not end, such as half a file, which
        TensorRT would refuse at every start, is deleted.
        """
        machine = {"tensorrt": tensorrt_library(), "gpus": gpu_models(), "driver": nvidia_driver()}
        settings = (WORKSPACE_BYTES, MIN_SUBGRAPH)
        directory = engine_directory(
            self.cache_dir, engine, bundle, **machine, shapes=self._corners(), settings=settings
        )
        note = directory / NOTE
        try:
            alone = not note.exists() and _lock(directory, engine.options.progress)
            if not (built := note.exists()) and alone:
                _clear(directory)
        except OSError as error:
            problem = f"cannot use {directory}: {error.strerror or error}"
            raise OutputError(problem, "Choose another --engine-cache.") from error
        if not built:
            kept = f"which may take minutes; it is kept in {self.cache_dir}"
            engine.options.progress.stage(f"{engine.name} is built for inputs of {self}, {kept}")
        return directory


def _lock(directory: Path, progress: Progress) -> bool:
    """Keep other processes from building there until the engine is open; wait for one that does.

    Returns whether that could be done.
    """
    if (locks := _locks.get()) is None:
        return False
    # Not through a link, which who can write to a shared cache might have put there: the folder may be emptied.
    lock = locks.enter_context(closing(DirectoryLock(directory)))
    with suppress(OSError):  # a file system without locks
        if not lock.acquire():
            progress.stage("waiting for another process that builds the same engine")
            lock.acquire(wait=True)
        return True
    return False


def _clear(directory: Path) -> None:
    for path in directory.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _leave_note(engine: Engine, bundle: Bundle, profile: Profile) -> None:
    """Say in the folder of what was built that it is whole, and what it is."""
    if engine.directory is None or (engine.directory / NOTE).exists():
        return
    about = {"engine": engine.name, "version": engine.version, "precision": engine.options.precision}
    note = {"what": "built by gfldeploy", **about, "bundle": bundle.name, "digest": bundle.digest}
    write_json(engine.directory / NOTE, {**note, "shapes": list(profile.shapes)})


def _shape(inputs: Tensors) -> Shape:
    batch, _, height, width = inputs["image"].shape
    return batch, height, width


def example(shape: Shape) -> Tensors:
    """An input of this shape, to build an engine with."""
    batch, height, width = shape
    return {"image": np.zeros((batch, 3, height, width), np.float32)}
