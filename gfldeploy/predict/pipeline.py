"""From pictures to detections, in several threads at once: each decodes a batch, has it inferred, and does its NMS.

There are two such threads more than inferences that run at once, so that the network waits for the rest only if that is
slower; few batches are under way, so that memory is bounded. Batches depend on the sizes alone: the same images always
make the same batches. In the bucketed order they hold images of one input size, and an image has the detections that it
has by itself.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from gfldeploy.at_once import at_once
from gfldeploy.batching.buckets import Order, Size, stream_batches
from gfldeploy.bundle import Manifest
from gfldeploy.detections import Detections
from gfldeploy.engines.base import Device, Engine, EngineOptions, Tensors
from gfldeploy.engines.detect import check_outputs, detections_of
from gfldeploy.errors import DataError
from gfldeploy.images.preprocess import Preprocess
from gfldeploy.predict.sources import REQUESTS, Picture

if TYPE_CHECKING:  # `gfldeploy predict --help` need not wait for it
    from gfldeploy.bench.cpu_parity import CpuCheck

T = TypeVar("T")
# Pictures with their numbers, and the size of the network's input that they are padded to.
PictureBatch: TypeAlias = tuple[Sequence[tuple[int, Picture]], Size]
_NOWHERE: Size = (0, 0)  # the bucket of what cannot be read
_MOST_DECODERS = 8
# Batches that are prepared, or in NMS, beside those in the network. On a CPU one would do if the threads never waited
# for each other, as for Python's lock; what a GPU leaves to the CPU may take longer than the network.
PREPARED: Mapping[Device, int] = {"cpu": 2, "gpu": 3}


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
    streams: int = 1,
) -> Generator[list[Found]]:
    """What was found, batch by batch.

    `order`: "bucketed" or "listed", see `batching.buckets`. `look_ahead`: how many pictures may come after one before
    its bucketed batch runs though it is not full. `skip`: so many batches are left out, without reading their files.
    `reduced`: decode JPEGs at 1/2, 1/4 or 1/8 if that is no smaller than the network's input; the pixels then differ.
    `check`: compares what the engine gives with the CPU. `streams`: how many inferences the engine runs at once; each,
    and what is queued in the engine, has a thread of its own, since libraries keep threads and buffers for each thread
    that calls them. Detections of channels without a class are left out.

    While it runs the engine must not be used by others, and OpenCV has the threads that the engine leaves it. Closing
    the iterator ends the threads after their current batch. Raises `EngineError`.
    """
    batches = batches_of(pictures, manifest, batch_size, order, look_ahead)
    return detect_batches(engine, manifest, islice(batches, skip, None), reduced=reduced, check=check, streams=streams)


def batches_of(
    pictures: Iterable[Picture], manifest: Manifest, batch_size: int, order: Order, look_ahead: int
) -> Iterator[PictureBatch]:
    """The batches of these pictures, as `detect_groups` says: by the sizes in their headers alone."""
    input_size = manifest.preprocess.input_size
    items = (
        ((index, picture), input_size(*picture.size) if picture.size else _NOWHERE)
        for index, picture in enumerate(pictures)
    )
    return stream_batches(items, batch_size, order, look_ahead)


def detect_batches(
    engine: Engine,
    manifest: Manifest,
    batches: Iterable[PictureBatch],
    *,
    reduced: bool = False,
    check: CpuCheck | None = None,
    streams: int = 1,
) -> Generator[list[Found]]:
    """What was found in batches that are formed, for each in order, nothing for one without pictures.

    As `detect_groups`. `batches` is taken from by one thread, and may wait: what came before is found meanwhile.
    """
    preprocess, chosen = manifest.preprocess, manifest.candidates is not None
    classes, nms = manifest.classes, manifest.nms
    fixed = manifest.inputs[0].shape[0]  # a network that takes so many images and no other number
    with ExitStack() as stack:
        decoders = stack.enter_context(_cpu_shared(engine.options))
        readers = stack.enter_context(ThreadPoolExecutor(decoders, "gfldeploy-read")) if decoders > 1 else None
        inferring = streams + engine.queued
        runners = stack.enter_context(ThreadPoolExecutor(inferring, "gfldeploy-infer"))
        memory, uploading, checking = threading.local(), threading.Lock(), threading.Lock()

        def infer(tensor: NDArray[np.float32], inputs: Tensors, count: int) -> dict[str, NDArray[Any]]:
            outputs = engine.infer(inputs)
            check_outputs(engine, outputs, len(tensor))
            if check is not None:
                with checking:
                    check(tensor, outputs, count)
            return outputs

        def detect(job: PictureBatch) -> list[Found]:
            group, size = job
            if not group:
                return []
            tensor = room(memory, engine.host_array, (fixed or len(group), 3, *size))
            filled = _fill(preprocess, [picture for _, picture in group], tensor, reduced, readers)
            scales = [one for one in filled if not isinstance(one, DataError)]
            found: Iterator[Detections] = iter(())
            if scales:
                tensor = tensor[: fixed or len(scales)]
                with uploading:  # beside the inference of another batch
                    inputs = engine.upload({"image": tensor})
                outputs = runners.submit(infer, tensor, inputs, len(scales)).result()
                scores, boxes = outputs["scores"][: len(scales)], outputs["boxes"][: len(scales)]
                each = detections_of(scores, boxes, scales, nms, chosen)
                found = (one.named(classes) for one in each)
            return [
                Found(
                    *(index, picture.name, picture.size, None if isinstance(one, DataError) else next(found)),
                    *(one if isinstance(one, DataError) else None, picture.frame, picture.time_s),
                )
                for (index, picture), one in zip(group, filled, strict=True)
            ]

        ahead = _fetched(batches)
        yield from stack.enter_context(closing(at_once(detect, ahead, inferring + PREPARED[engine.options.device])))


def _fetched(batches: Iterable[PictureBatch]) -> Generator[PictureBatch]:
    """The same batches; files at addresses are on their way while those before them run."""
    pool = ThreadPoolExecutor(REQUESTS, "gfldeploy-fetch")  # which has no threads until it is asked
    try:
        for group, size in batches:
            yield [(index, picture.fetched_by(pool)) for index, picture in group], size
    except GeneratorExit:
        pool.shutdown(cancel_futures=True)
        raise
    finally:
        pool.shutdown(wait=False)
        if isinstance(batches, Generator):
            batches.close()


def in_order(groups: Iterable[Iterable[tuple[int, T]]]) -> Iterator[T]:
    """The items of these groups in the order of their numbers from 0; items that come early wait.

    Raises `ValueError` at the end where a number is missing or came twice.
    """
    waiting: dict[int, T] = {}
    following = count = 0
    for group in groups:
        for number, item in group:
            waiting[number] = item
            count += 1
        while following in waiting:
            yield waiting.pop(following)
            following += 1
    if following != count:
        raise ValueError(f"of {count} numbers {count - following} are missing or came twice")


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


def _fill(
    preprocess: Preprocess,
    pictures: Sequence[Picture],
    tensor: NDArray[np.float32],
    reduced: bool,
    readers: Executor | None,
) -> list[tuple[float, float] | DataError]:
    """Decode and preprocess the pictures of a batch straight into the network's input, whose other rows become zero.

    Of each picture its scale, or why it has none; those that have one are in the first rows, in order.
    """

    def fill(picture: Picture, row: NDArray[np.float32]) -> tuple[float, float] | DataError:
        if picture.size is None:
            return picture.error or DataError(f"{picture.name} has no size")
        try:
            factor = preprocess.reduction(*picture.size) if reduced else 1
            return preprocess.into(picture.read(factor), row, picture.size)
        except DataError as error:
            return error

    filled = list((readers.map if readers else map)(fill, pictures, tensor))
    kept = [place for place, one in enumerate(filled) if not isinstance(one, DataError)]
    for row, place in enumerate(kept):
        if row != place:  # close the gap of an image that could not be read
            tensor[row] = tensor[place]
    tensor[len(kept) :] = 0
    return filled


def room(
    memory: threading.local, new: Callable[[int], NDArray[np.float32]], shape: tuple[int, ...]
) -> NDArray[np.float32]:
    """An array of this shape in the memory of this thread, which is as large as its largest batch so far."""
    values = math.prod(shape)
    block: NDArray[np.float32] | None = getattr(memory, "block", None)
    if block is None or block.size < values:
        memory.block = block = new(values)
    return block[:values].reshape(shape)
