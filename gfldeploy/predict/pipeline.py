"""From pictures to detections, with all stages at work at once: decoding and preprocessing, the network, NMS.

Each stage but the last has a thread of its own and works one batch ahead of the next, so that memory is bounded and the
network waits for the others only if they are slower. Batches depend on the sizes alone: the same images always make the
same batches. In the bucketed order they hold images of one input size, and an image has the detections that it has by
itself.
"""

from __future__ import annotations

import math
import queue
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from numpy.typing import NDArray

from gfldeploy.batching.buckets import Order, Size, stream_batches
from gfldeploy.bundle import Manifest
from gfldeploy.detections import Detections
from gfldeploy.engines.base import Engine, EngineOptions, Tensors
from gfldeploy.engines.detect import check_outputs, detections_of
from gfldeploy.errors import DataError
from gfldeploy.predict.sources import Picture

if TYPE_CHECKING:  # `gfldeploy predict --help` need not wait for it
    from gfldeploy.bench.cpu_parity import CpuCheck

T = TypeVar("T")
_NOWHERE: Size = (0, 0)  # the bucket of what cannot be read
_MOST_DECODERS = 8


@dataclass(frozen=True)
class Found:
    """What became of one image.

    `index`: its place among all, from 0. `name`: its file, or "array". `size`: (h, w) in pixels. Either `detections`,
    best first, boxes in original pixels; or `error`, why there are none. `frame`, `time_s`: of a video's frame.
    """

    index: int
    name: str
    size: tuple[int, int] | None
    detections: Detections | None
    error: DataError | None = None
    frame: int | None = None
    time_s: float | None = None


@dataclass(frozen=True)
class _Batch:
    """A batch on its way to the network.

    `tensor`: the network's input, None if no image could be read; `rows`: of its first rows, the image's place in
    `group` and its scale. `errors`: of images that could not be read, by place. `memory`: of which `tensor` is a view.
    `inputs`: `tensor` where the engine reads it.
    """

    group: Sequence[tuple[int, Picture]]
    tensor: NDArray[np.float32] | None
    rows: Sequence[tuple[int, tuple[float, float]]]
    errors: Mapping[int, DataError]
    memory: NDArray[np.float32]
    inputs: Tensors | None = None


def detect_groups(
    engine: Engine,
    manifest: Manifest,
    pictures: Iterable[Picture],
    *,
    batch_size: int = 1,
    order: Order = "bucketed",
    look_ahead: int = 0,
    skip: int = 0,
    reduced: bool = False,
    check: CpuCheck | None = None,
) -> Generator[list[Found]]:
    """What was found, batch by batch.

    `order`: "bucketed" or "listed", see `batching.buckets`. `look_ahead`: how many pictures may come after one before
    its bucketed batch runs though it is not full. `skip`: so many batches are left out, without reading their files.
    `reduced`: decode JPEGs at 1/2, 1/4 or 1/8 if that is no smaller than the network's input; the pixels then differ.
    `check`: compares what the engine gives with the CPU. Detections of channels without a class are left out.

    While it runs the engine must not be used by others, and OpenCV has the threads that the engine leaves it. Closing
    the iterator ends the threads after their current batch. Raises `EngineError`.
    """
    preprocess, chosen = manifest.preprocess, manifest.candidates is not None
    items = (
        ((index, picture), preprocess.input_size(*picture.size) if picture.size else _NOWHERE)
        for index, picture in enumerate(pictures)
    )
    groups = islice(stream_batches(items, batch_size, order, look_ahead), skip, None)
    with _cpu_shared(engine.options) as decoders:
        batches = _uploaded(engine, ahead(_prepared(manifest, groups, reduced, decoders, _Memory(engine.host_array))))
        if engine.options.device == "gpu":  # to which one batch is copied while it computes another
            batches = ahead(batches)
        with closing(ahead(_inferred(engine, batches, check))) as done:
            for batch, scores, boxes in done:
                scales = [scale for _, scale in batch.rows]
                found = detections_of(scores, boxes, scales, manifest.nms, chosen) if scales else []
                detections = {row[0]: one.named(manifest.classes) for row, one in zip(batch.rows, found, strict=True)}
                yield [
                    Found(
                        *(index, picture.name, picture.size, detections.get(place), batch.errors.get(place)),
                        *(picture.frame, picture.time_s),
                    )
                    for place, (index, picture) in enumerate(batch.group)
                ]


def in_order(groups: Iterable[Iterable[tuple[int, T]]]) -> Iterator[T]:
    """The items of these groups in the order of their numbers from 0; items that come early wait."""
    waiting: dict[int, T] = {}
    following = 0
    for group in groups:
        waiting |= group
        while following in waiting:
            yield waiting.pop(following)
            following += 1


def ahead(items: Iterable[T], most: int = 1) -> Generator[T]:
    """The same items, none of them None, made in a thread of its own, up to `most` before they are needed.

    Errors of that thread are raised here. Closing the iterator ends the thread after its current item.
    """
    ready: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(most)  # neither: the end
    stopped = threading.Event()

    def put(item: T | None = None, error: BaseException | None = None) -> None:
        while not stopped.is_set():
            with suppress(queue.Full):
                ready.put((item, error), timeout=0.1)  # then look whether anybody is still there
                return

    def work() -> None:
        iterator = iter(items)
        try:
            for item in iterator:
                put(item)
                if stopped.is_set():
                    return
            put()
        except BaseException as error:  # noqa: BLE001 - raised in the other thread
            put(error=error)
        finally:
            if isinstance(iterator, Generator):
                iterator.close()

    thread = threading.Thread(target=work, name="gfldeploy-ahead", daemon=True)
    thread.start()
    try:
        while True:
            item, error = ready.get()
            if error is not None:
                raise error
            if item is None:
                return
            yield item
    finally:
        stopped.set()
        if thread is not threading.current_thread():  # which it is if the garbage collector closes this
            thread.join()


@contextmanager
def _cpu_shared(options: EngineOptions) -> Iterator[int]:
    """How many threads decode, while OpenCV has no threads of its own. The CPU is split in this place alone.

    An engine on the CPU keeps it, and one decoding thread keeps up with it. A GPU leaves the CPU to decoding.
    """
    import cv2

    before = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        yield 1 if options.device == "cpu" else min(options.threads, _MOST_DECODERS)
    finally:
        cv2.setNumThreads(before)


class _Memory:
    """Arrays that batches take in turn: one for each batch at work, each as large as its largest batch so far."""

    def __init__(self, new: Callable[[int], NDArray[np.float32]]) -> None:
        self._new = new
        self._free: queue.SimpleQueue[NDArray[np.float32]] = queue.SimpleQueue()

    def take(self, values: int) -> NDArray[np.float32]:
        """At least so many values."""
        try:
            memory = self._free.get_nowait()
        except queue.Empty:
            memory = np.empty(0, np.float32)
        return memory if memory.size >= values else self._new(values)

    def give(self, memory: NDArray[np.float32]) -> None:
        self._free.put(memory)


def _prepared(
    manifest: Manifest,
    groups: Iterable[tuple[Sequence[tuple[int, Picture]], Size]],
    reduced: bool,
    decoders: int,
    memory: _Memory,
) -> Iterator[tuple[_Batch, _Memory]]:
    """Decode and preprocess, batch by batch, straight into the network's input."""
    preprocess = manifest.preprocess
    fixed = manifest.inputs[0].shape[0]  # a network that takes so many images and no other number

    def fill(job: tuple[Picture, NDArray[np.float32]]) -> tuple[float, float] | DataError:
        picture, row = job
        if picture.size is None:
            return picture.error or DataError(f"{picture.name} has no size")
        try:
            factor = preprocess.reduction(*picture.size) if reduced else 1
            return preprocess.into(picture.read(factor), row, picture.size)
        except DataError as error:
            return error

    with ThreadPoolExecutor(decoders) as pool:
        for group, size in groups:
            if size == _NOWHERE:
                errors = {place: picture.error for place, (_, picture) in enumerate(group) if picture.error}
                yield _Batch(group, None, (), errors, memory.take(0)), memory
                continue
            shape = (fixed or len(group), 3, *size)
            block = memory.take(math.prod(shape))
            tensor = block[: math.prod(shape)].reshape(shape)
            jobs = [(picture, tensor[place]) for place, (_, picture) in enumerate(group)]
            filled = list(map(fill, jobs) if decoders == 1 else pool.map(fill, jobs))
            rows = [(place, one) for place, one in enumerate(filled) if not isinstance(one, DataError)]
            errors = {place: one for place, one in enumerate(filled) if isinstance(one, DataError)}
            for row, (place, _) in enumerate(rows):
                if row != place:  # close the gap of an image that could not be read
                    tensor[row] = tensor[place]
            tensor[len(rows) :] = 0
            yield _Batch(group, tensor[: fixed or len(rows)] if rows else None, rows, errors, block), memory


def _uploaded(engine: Engine, batches: Generator[tuple[_Batch, _Memory]]) -> Generator[tuple[_Batch, _Memory]]:
    with closing(batches):
        for batch, memory in batches:
            inputs = None if batch.tensor is None else engine.upload({"image": batch.tensor})
            yield replace(batch, inputs=inputs), memory


def _inferred(
    engine: Engine, batches: Generator[tuple[_Batch, _Memory]], check: CpuCheck | None
) -> Iterator[tuple[_Batch, NDArray[np.float32], NDArray[np.float32]]]:
    """Run the network; its input's memory is free again afterwards."""
    nothing = np.empty(0, np.float32)
    with closing(batches):
        for batch, memory in batches:
            scores, boxes = nothing, nothing
            if batch.tensor is not None and batch.inputs is not None:
                outputs = engine.infer(batch.inputs)
                scores, boxes = check_outputs(engine, outputs, len(batch.tensor))
                if check is not None:
                    check(batch.tensor, outputs, len(batch.rows))
            memory.give(batch.memory)
            yield batch, scores[: len(batch.rows)], boxes[: len(batch.rows)]
