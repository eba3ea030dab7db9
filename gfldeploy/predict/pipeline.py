"""From pictures to detections, in several threads at once: each decodes a batch, has it inferred, and does its NMS.

There are two such threads more than inferences that run at once, so that the network waits for the rest only if that is
slower; few batches are under way, so that memory is bounded. Batches depend on the sizes alone: the same images always
make the same batches. In the bucketed order they hold images of one input size, and an image has the detections that it
has by itself.

In tiles an image is a batch of its own here, and several inferences: it is decoded once, by the first of them, and its
pixels are let go after the last.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from gfldeploy.at_once import at_once
from gfldeploy.batching.buckets import Order, Size, stream_batches
from gfldeploy.batching.tiles import InTiles, Region
from gfldeploy.bundle import Manifest
from gfldeploy.detections import Detections
from gfldeploy.engines.base import Device, Engine, EngineOptions, Tensors
from gfldeploy.engines.detect import check_outputs, detections_of
from gfldeploy.errors import DataError
from gfldeploy.images.preprocess import Preprocess
from gfldeploy.nms import NmsParams
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
_sharing = threading.Lock()
_before: list[int] = []  # OpenCV's threads before the first that shares the CPU, once for each that does


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
    cut: InTiles | None = None,
) -> Generator[list[Found]]:
    """What was found, batch by batch.

    `order`: "bucketed" or "listed", see `batching.buckets`. `look_ahead`: how many pictures may come after one before
    its bucketed batch runs though it is not full. `skip`: so many batches are left out, without reading their files.
    `reduced`: decode JPEGs at 1/2, 1/4 or 1/8 if that is no smaller than the network's input; the pixels then differ.
    `check`: compares what the engine gives with the CPU. `streams`: how many inferences the engine runs at once; each,
    and what is queued in the engine, has a thread of its own, since libraries keep threads and buffers for each thread
    that calls them. `cut`: images are cut into tiles; each image is a batch then. Detections of channels without a
    class are left out.

    While it runs the engine must not be used by others, and OpenCV has the threads that the engine leaves it. Closing
    the iterator ends the threads after their current batch. Raises `EngineError`.
    """
    batches = batches_of(pictures, manifest, batch_size, order, look_ahead, cut)
    return detect_batches(
        engine, manifest, islice(batches, skip, None), reduced=reduced, check=check, streams=streams, cut=cut
    )


def batches_of(
    pictures: Iterable[Picture],
    manifest: Manifest,
    batch_size: int,
    order: Order,
    look_ahead: int,
    cut: InTiles | None = None,
) -> Iterator[PictureBatch]:
    """The batches of these pictures, as `detect_groups` says: by the sizes in their headers alone."""
    if cut is not None:
        return (([numbered], _NOWHERE) for numbered in enumerate(pictures))
    input_size = manifest.preprocess.input_size
    items = (
        ((index, picture), input_size(*picture.size) if picture.size else _NOWHERE)
        for index, picture in enumerate(pictures)
    )
    return stream_batches(items, batch_size, order, look_ahead)


# What fills a row of the network's input, and returns by which factors (y, x) the image was resized.
_Fill: TypeAlias = Callable[[NDArray[np.float32]], tuple[float, float]]


@dataclass(frozen=True)
class _Inference:
    """What one inference takes: what fills the rows of its input of this `size`, (h, w) in pixels.

    `group`: the pictures that its rows are of; or the one of which they are these `regions`. `last`: of the group.
    """

    group: Sequence[tuple[int, Picture]]
    size: Size
    fills: Sequence[_Fill]
    regions: Sequence[Region] = ()
    last: bool = True


def detect_batches(
    engine: Engine,
    manifest: Manifest,
    batches: Iterable[PictureBatch],
    *,
    reduced: bool = False,
    check: CpuCheck | None = None,
    streams: int = 1,
    cut: InTiles | None = None,
) -> Generator[list[Found]]:
    """What was found in batches that are formed, for each in order, nothing for one without pictures.

    As `detect_groups`. `batches` is taken from by one thread, and may wait: what came before is found meanwhile. With
    `cut` each has one picture.
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

        def detect(job: _Inference) -> tuple[_Inference, list[Detections | DataError]]:
            """Of each row what is found, or why nothing is."""
            if not job.fills:
                return job, []
            tensor = room(memory, engine.host_array, (fixed or len(job.fills), 3, *job.size))
            filled = _filled(job.fills, tensor, readers)
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
            return job, [one if isinstance(one, DataError) else next(found) for one in filled]

        ahead = _fetched(batches)
        jobs = _in_tiles(ahead, preprocess, cut) if cut else _whole(ahead, preprocess, reduced)
        results = stack.enter_context(closing(at_once(detect, jobs, inferring + PREPARED[engine.options.device])))
        parts: list[tuple[Region, Detections | DataError]] = []
        for job, each in results:
            if cut is not None and job.regions:
                parts += zip(job.regions, each, strict=True)
                if not job.last:
                    continue
                each, parts = [_together(cut, parts, job.group[0][1], nms)], []
            yield [
                Found(
                    *(index, picture.name, picture.size, None if isinstance(one, DataError) else one),
                    *(_of(picture, one) if isinstance(one, DataError) else None, picture.frame, picture.time_s),
                )
                for (index, picture), one in zip(job.group, each, strict=True)
            ]


def _of(picture: Picture, error: DataError) -> DataError:
    """The error with the name of the picture's file, which errors of its size alone do not know."""
    if isinstance(picture.source, bytes) or picture.name in error.problem:
        return error
    return DataError(f"{picture.name}: {error.problem}", error.remedy)


def _together(
    cut: InTiles, parts: Sequence[tuple[Region, Detections | DataError]], picture: Picture, nms: NmsParams
) -> Detections | DataError:
    """What is in a picture, by what is in its regions."""
    found: list[tuple[Region, Detections]] = []
    for region, one in parts:
        if isinstance(one, DataError):
            return one
        found.append((region, one))
    assert picture.size is not None
    return cut.merged(found, picture.size, nms)


def _whole(batches: Generator[PictureBatch], preprocess: Preprocess, reduced: bool) -> Generator[_Inference]:
    """An inference for each batch of pictures."""

    def fill(picture: Picture, row: NDArray[np.float32]) -> tuple[float, float]:
        if picture.size is None:
            raise picture.error or DataError(f"{picture.name} has no size")
        factor = preprocess.reduction(*picture.size) if reduced else 1
        return preprocess.into(picture.read(factor), row, picture.size)

    with closing(batches):
        for group, size in batches:
            yield _Inference(group, size, [partial(fill, picture) for _, picture in group])


def _in_tiles(batches: Generator[PictureBatch], preprocess: Preprocess, cut: InTiles) -> Generator[_Inference]:
    """The inferences of each picture, which is decoded once for all of them."""

    def fill(shared: _SharedPixels, region: Region, row: NDArray[np.float32]) -> tuple[float, float]:
        with shared.pixels() as image:
            return preprocess.into(region.of(image), row)

    def fail(error: DataError, row: NDArray[np.float32]) -> tuple[float, float]:
        raise error

    with closing(batches):
        for group, nowhere in batches:
            if not group:
                yield _Inference(group, nowhere, [])
            for numbered in group:
                _, picture = numbered
                try:
                    if picture.size is None:
                        raise picture.error or DataError(f"{picture.name} has no size")
                    planned = cut.batches(picture.size, preprocess)
                except DataError as error:
                    yield _Inference([numbered], nowhere, [partial(fail, error)])
                    continue
                shared = _SharedPixels(picture, sum(len(regions) for regions, _ in planned))
                for left, (regions, size) in zip(reversed(range(len(planned))), planned, strict=True):
                    fills = [partial(fill, shared, region) for region in regions]
                    yield _Inference([numbered], size, fills, regions, last=left == 0)


class _SharedPixels:
    """The pixels of a picture that several inferences need: decoded for the first region, let go after the last."""

    def __init__(self, picture: Picture, regions: int) -> None:
        self._picture = picture
        self._left = regions
        self._read: NDArray[np.uint8] | DataError | None = None
        self._lock = threading.Lock()

    @contextmanager
    def pixels(self) -> Iterator[NDArray[np.uint8]]:
        """RGB, uint8 [h, w, 3], for one of the regions. Raises `DataError`, the same for each of them."""
        with self._lock:
            if self._read is None:
                try:
                    self._read = self._picture.read()
                except DataError as error:
                    self._read = error
            found = self._read
        try:
            if isinstance(found, DataError):
                raise found
            yield found
        finally:
            with self._lock:
                self._left -= 1
                if self._left == 0:
                    self._read = None


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

    An engine on the CPU keeps it, and one decoding thread keeps up with it. A GPU leaves the CPU to decoding. Several
    may be in such blocks at once, which need not end in order: OpenCV has its threads again after the last.
    """
    import cv2

    with _sharing:
        _before.append(_before[0] if _before else cv2.getNumThreads())
        cv2.setNumThreads(1)
    try:
        yield 1 if options.device == "cpu" else min(options.threads, _MOST_DECODERS)
    finally:
        with _sharing:
            before = _before.pop()
            if not _before:
                cv2.setNumThreads(before)


def _filled(
    fills: Sequence[_Fill], tensor: NDArray[np.float32], readers: Executor | None
) -> list[tuple[float, float] | DataError]:
    """Decode and preprocess the images of a batch straight into the network's input, whose other rows become zero.

    Of each image its scale, or why it has none; those that have one are in the first rows, in order.
    """

    def fill(one: _Fill, row: NDArray[np.float32]) -> tuple[float, float] | DataError:
        try:
            return one(row)
        except DataError as error:
            return error

    filled = list((readers.map if readers else map)(fill, fills, tensor))
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
