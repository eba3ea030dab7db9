"""A detector that is loaded, warm and ready to serve: the content of image files in, detections out, in batches.

The threads of the batcher do all of the work on a batch: they decode its images straight into the network's input, run
it, and do NMS. So an image is decoded when its batch begins, which only those are that will be answered in time; what
the policy knows of times is from file to boxes; and an answer takes two changes of thread.
"""

from __future__ import annotations

import io
import itertools
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from gfldeploy.batching.batcher import DynamicBatcher
from gfldeploy.batching.buckets import Size, area
from gfldeploy.batching.latency import LatencyModel, Point
from gfldeploy.batching.policy import Adaptive
from gfldeploy.bench.cpu_parity import CpuCheck
from gfldeploy.bench.timing import StreamThreads
from gfldeploy.detections import Detections
from gfldeploy.engines.base import ClosesOnExit
from gfldeploy.engines.detect import check_outputs, detections_of
from gfldeploy.engines.registry import ENGINES, open_engine
from gfldeploy.engines.tensorrt import possible_shapes
from gfldeploy.errors import DataError, GfldeployError, RejectedError
from gfldeploy.images.decode import decode_image, load_cv2, read_file, read_image, size_of
from gfldeploy.images.preprocess import Preprocess
from gfldeploy.nms import NmsParams
from gfldeploy.predict.engine_selection import Choice
from gfldeploy.predict.pipeline import PREPARED, room
from gfldeploy.predict.sources import is_video, list_inputs, picture_sizes
from gfldeploy.progress import SILENT, Progress
from gfldeploy.storage import Source

# Aspect ratios of photographs, width by height, the most common first; each upright, too.
_FORMATS = (4 / 3, 3 / 2, 16 / 9, 1.0)
_LONGER_SIDE = 4000  # pixels, of such a photograph
# Of the folder of --warm-up: files whose headers are read, and input sizes that are made warm.
_MOST_FILES, _MOST_SIZES = 1000, 32
_MOST_DECODERS = 8
# Times that a batch is timed, unless these take so many seconds together.
_POINT_TIMES, _POINT_S = 5, 1.0
# Input sizes of which every number of images is timed; the others are run once.
_TIMED_SIZES = 2


@dataclass(frozen=True)
class AnswerTimes:
    """Milliseconds of one image. `queue`: until its batch began. `infer`: the network and NMS of its whole batch."""

    decode: float
    preprocess: float
    queue: float
    infer: float


@dataclass(frozen=True)
class Answer:
    """What is in an image of this `size`, (h, w) in pixels: all detections that NMS leaves, in original pixels."""

    detections: Detections
    size: tuple[int, int]
    times: AnswerTimes


@dataclass(frozen=True)
class _Job:
    """An image file's content, the size (h, w) that its header says, and when it arrived, by `time.perf_counter`.

    `nms`: another one than the detector's, for this image; None for that.
    """

    content: bytes
    size: tuple[int, int]
    arrived: float
    nms: NmsParams | None = None


class _Filled(NamedTuple):
    """What became of an image that was prepared: its scale (y, x), and how long that took."""

    scale: tuple[float, float]
    decode_ms: float
    preprocess_ms: float


class LoadedDetector(ClosesOnExit):
    """One engine with its batcher, a context manager. `submit` is thread-safe.

    Attributes:
        most: Images of a batch at most.
        load_s: Seconds until the engine was open.
        engine_version: Of the engine's library.
        sizes: The input sizes that were run before the first request, the most common first.
        sample: The content of an image file that was run then.
    """

    def __init__(
        self,
        choice: Choice,
        most_waiting: int,
        warm_up: Path | None = None,
        reduced: bool = False,
        ran: Callable[[int, int, int], object] = lambda images, pixels, own_pixels: None,
        progress: Progress = SILENT,
    ) -> None:
        """Load it, run the input sizes to come, and measure what batches take.

        `warm_up`: a folder of images such as those to come. Without it the sizes are those of `deploy.yml`, else those
        of photographs. `reduced`: decode a JPEG at 1/2, 1/4 or 1/8 where that is no smaller than the network's input.
        `ran`: told of each batch, as `Watch.batch`. Raises as `open_engine`, `DataError` for a folder without images,
        and `EngineError`.
        """
        self._choice, self._reduced = choice, reduced
        self._ran: Callable[[int, int, int], object] = lambda images, pixels, own_pixels: None  # not of the warm-up
        self._manifest = manifest = choice.manifest
        self._preprocess = manifest.preprocess
        self._fixed = manifest.inputs[0].shape[0]
        self.most = self._fixed or choice.batch_size
        load_cv2().setNumThreads(1)  # the threads of the batcher share the CPUs
        samples = dict(self._samples(warm_up))
        self.sizes = tuple(samples)
        self._smallest = min(self.sizes, key=area)
        # On a GPU every number of images is a shape to plan for: batches are filled up to a power of two. TensorRT,
        # which is built for a range of shapes, runs them as they are.
        needs_shapes = ENGINES[choice.engine].needs_shapes
        self._fills = self._fixed is not None or (choice.options.device == "gpu" and not needs_shapes)
        powers = [2**power for power in range(self.most.bit_length())] if self._fills else [1]
        self._counts = [self._fixed] if self._fixed else sorted({*powers, self.most})
        expected = tuple((count, *size) for size in samples for count in self._counts)
        options = replace(choice.options, progress=progress)
        if not needs_shapes:
            options = replace(options, shapes=expected)
        progress.stage(f"loading {choice}")
        start = time.perf_counter()
        self._engine = open_engine(choice.engine, choice.bundle, options)
        self.load_s, self.engine_version = time.perf_counter() - start, self._engine.version
        self.sample = next(content for contents in samples.values() for content in contents)
        try:
            self._check = CpuCheck(choice.engine, self._engine, choice.bundle, progress.note)
            self._checking, self._uploading = threading.Lock(), threading.Lock()
            self._inferring = threading.Semaphore(options.streams + self._engine.queued)
            at_once = options.streams + self._engine.queued + PREPARED[options.device]
            self._decoders = (
                ThreadPoolExecutor(min(options.threads, _MOST_DECODERS), "gfldeploy-decode")
                if options.device == "gpu" and self.most > 1
                else None
            )
            self._memory = threading.local()
            self._signs: dict[int, float] = {}  # of life: by thread that runs a batch, when it began the last step
            model = self._settle(samples, at_once, progress)
        except BaseException:
            self._engine.close()
            raise
        self._ran = ran
        self.batcher: DynamicBatcher[_Job, Answer] = DynamicBatcher(
            self._run, Adaptive(model, self.most, at_once), None, most_waiting, at_once
        )

    def submit(
        self, content: bytes, size: tuple[int, int], timeout_ms: float, nms: NmsParams | None = None
    ) -> Future[Answer]:
        """Ask for what is in an image file whose header says this size, (h, w).

        `nms`: in place of the detector's. Raises as `DynamicBatcher.submit`.
        """
        job = _Job(content, size, time.perf_counter(), nms)
        self._preprocess.resized_size(*size)  # raises DataError where nothing would be left of it
        return self.batcher.submit(job, self._preprocess.input_size(*size), timeout_ms)

    def refusal(self, timeout_ms: float) -> RejectedError | None:
        """What the smallest image would be refused by now; None if nothing. Takes microseconds, and no lock."""
        return self.batcher.refusal(self._smallest, timeout_ms)

    def close(self, drain: bool = True) -> None:
        """End its threads and free the engine. `drain`: answer what waits first, else reject it."""
        self.batcher.close(drain)
        if self._decoders is not None:
            self._decoders.shutdown()
        self._engine.close()

    def abandon(self, error: Exception) -> None:
        """Give it up though it may never return: all that waits or runs is answered with this error."""
        self.batcher.abandon(error)

    def stuck(self, seconds: float) -> str | None:
        """Why the engine is of no use if a batch has run for longer than that, or an image is decoded, else None."""
        now = time.monotonic()
        busy_s = max((now - sign for sign in self._signs.copy().values()), default=0.0)
        return f"a batch has not ended after {busy_s:.0f} s" if busy_s > seconds else None

    def probe(self, seconds: float) -> str | None:
        """Why the engine is of no use if it fails on an image on which it did not before, else None."""
        try:
            self.submit(self.sample, size_of(io.BytesIO(self.sample)), seconds * 1e3).result(seconds)
        except RejectedError as error:
            return error.problem if error.reason == "closed" else None
        except TimeoutError:
            return None  # of which `stuck` tells
        except Exception as error:  # noqa: BLE001 - whatever it is, this image was answered before
            return error.problem if isinstance(error, GfldeployError) else f"{type(error).__name__}: {error}"
        return None

    def _run(self, jobs: Sequence[_Job], size: Size) -> list[Answer | Exception]:
        """The answer of each image of a batch of this input size, or why it has none."""
        try:
            return self._answers(jobs, size, threading.get_ident())
        finally:
            self._signs.pop(threading.get_ident(), None)

    def _answers(self, jobs: Sequence[_Job], size: Size, thread: int) -> list[Answer | Exception]:
        start = time.perf_counter()
        self._signs[thread] = time.monotonic()
        tensor = room(self._memory, self._engine.host_array, (self._rows(len(jobs)), 3, *size))
        filled = list((self._decoders.map if self._decoders else map)(partial(self._fill, thread), jobs, tensor))
        kept = [place for place, one in enumerate(filled) if not isinstance(one, DataError)]
        for row, place in enumerate(kept):
            if row != place:  # close the gap of an image that could not be read
                tensor[row] = tensor[place]
        scales = [one.scale for one in filled if not isinstance(one, DataError)]
        prepared = time.perf_counter()
        self._signs[thread] = time.monotonic()
        nms = [job.nms for job, one in zip(jobs, filled, strict=True) if not isinstance(one, DataError)]
        found = iter(self._infer(tensor, scales, nms) if scales else ())
        infer_ms = (time.perf_counter() - prepared) * 1e3
        own = sum(area(self._preprocess.input_size(*job.size)) for job in jobs)
        self._ran(len(jobs), len(jobs) * area(size), own)
        return [
            one
            if isinstance(one, DataError)
            else Answer(
                next(found),
                job.size,
                AnswerTimes(one.decode_ms, one.preprocess_ms, (start - job.arrived) * 1e3, infer_ms),
            )
            for job, one in zip(jobs, filled, strict=True)
        ]

    def _rows(self, count: int) -> int:
        """Of the input for so many images."""
        return next(rows for rows in self._counts if rows >= count) if self._fills else count

    def _fill(self, thread: int, job: _Job, row: NDArray[np.float32]) -> _Filled | DataError:
        """Decode and preprocess an image into a row of the network's input, of a batch of this thread."""
        start = time.perf_counter()
        self._signs[thread] = time.monotonic()
        try:
            reduction = self._preprocess.reduction(*job.size) if self._reduced else 1
            image = decode_image(job.content, reduction=reduction)
            if reduction == 1 and image.shape[:2] != job.size:
                raise DataError("the image has another size than its header says", "Convert it to JPEG or PNG.")
            decoded = time.perf_counter()
            scale = self._preprocess.into(image, row, job.size)
        except DataError as error:
            return error
        return _Filled(scale, (decoded - start) * 1e3, (time.perf_counter() - decoded) * 1e3)

    def _infer(
        self, tensor: NDArray[np.float32], scales: list[tuple[float, float]], nms: Sequence[NmsParams | None]
    ) -> list[Detections]:
        """The detections in the first rows of the tensor; `nms`: as for `submit`, of each."""
        count = len(scales)
        tensor = tensor[: self._rows(count)]
        tensor[count:] = 0
        with self._uploading:
            inputs = self._engine.upload({"image": tensor})
        with self._inferring:
            outputs = self._engine.infer(inputs)
        scores, boxes = check_outputs(self._engine, outputs, len(tensor))
        with self._checking:
            self._check(tensor, outputs, count)
        chosen = self._manifest.candidates is not None
        found = detections_of(scores[:count], boxes[:count], scales, self._manifest.nms, chosen)
        for row, other in enumerate(nms):
            if other not in (None, self._manifest.nms):
                one = slice(row, row + 1)
                found[one] = detections_of(scores[one], boxes[one], scales[one], other, chosen)
        return [one.named(self._manifest.classes) for one in found]

    def _settle(self, samples: Mapping[Size, Sequence[bytes]], at_once: int, progress: Progress) -> LatencyModel:
        """Run the shapes to come, in as many threads as will serve, and fit a model to what batches of them take.

        Of some sizes every number of images is timed, of the others the smallest and the largest are run once. Last
        come sizes at the limits of what an image can have: what runs all other shapes may be something else, and is
        made then.
        """
        points: list[Point] = []
        counts = self._counts
        limits = {(height, width) for _, height, width in possible_shapes(self._manifest)} - samples.keys()
        total = len(samples) + len(limits)
        with StreamThreads(at_once) as threads:
            for number, (size, contents) in enumerate(samples.items()):
                progress.step("warming up", number, total)
                timed = number < _TIMED_SIZES
                for count in range(1, self.most + 1) if timed else counts:
                    now = time.perf_counter()
                    some = itertools.islice(itertools.cycle(contents), count)
                    jobs = [_Job(content, size_of(io.BytesIO(content)), now) for content in some]
                    for times in threads.each(partial(self._time, jobs, size, timed)):
                        points += [Point(count, size, ms) for ms in times]
            for number, (count, size) in enumerate(itertools.product(counts, sorted(limits))):
                progress.step("warming up", len(samples) + number // len(counts), total)
                nothing = {"image": np.zeros((count, 3, *size), np.float32)}
                threads.each(partial(self._engine.infer, nothing))
        progress.step("warming up", total, total)
        model = LatencyModel.fit(points)
        for point in points:  # what three numbers cannot say, such as that a shape runs in a slower model
            model.observe(point.images, point.size, point.ms)
        return model

    def _time(self, jobs: Sequence[_Job], size: Size, timed: bool) -> list[float]:
        """Milliseconds of a batch, several times after a first one; nothing but the first one unless it is `timed`."""

        def once() -> float:
            start = time.perf_counter()
            for answer in self._run(jobs, size):
                if isinstance(answer, Exception):
                    raise answer
            return (time.perf_counter() - start) * 1e3

        once()
        times: list[float] = []
        until = time.perf_counter() + _POINT_S
        while timed and len(times) < _POINT_TIMES and (not times or time.perf_counter() <= until):
            times.append(once())
        return times

    def _samples(self, folder: Path | None) -> Iterator[tuple[Size, Sequence[bytes]]]:
        """Image files of each input size to come, the most common size first."""
        if folder is not None:
            yield from self._samples_of(folder)
            return
        sizes = [(height, width) for _, height, width in self._choice.expected] or [
            self._preprocess.input_size(*sides)
            for ratio in _FORMATS
            for sides in ((round(_LONGER_SIDE / ratio), _LONGER_SIDE), (_LONGER_SIDE, round(_LONGER_SIDE / ratio)))
        ]
        cv2 = load_cv2()
        for size in dict.fromkeys(sizes):
            noise = np.random.default_rng(0).integers(0, 256, (*(max(side // 8, 1) for side in size), 3), np.uint8)
            _, content = cv2.imencode(".jpg", cv2.resize(noise, size[::-1], interpolation=cv2.INTER_LINEAR))
            yield self._preprocess.input_size(*size), [content.tobytes()]

    def _samples_of(self, folder: Path) -> Iterator[tuple[Size, Sequence[bytes]]]:
        for common, paths in images_by_size(folder, self._preprocess).items():
            some = paths[: self.most]
            for path in some:
                read_image(path)  # raises DataError for a damaged one
            yield common, [read_file(path) for path in some]


def images_by_size(folder: Path, preprocess: Preprocess) -> dict[Size, list[Source]]:
    """The images of a folder by their input size, the most common first. Raises `DataError` if none can be read."""
    paths = [path for path in list_inputs([folder]) if not is_video(path)][:_MOST_FILES]
    found: dict[Size, list[Source]] = {}
    for path, size in zip(paths, picture_sizes(paths), strict=True):
        if size is not None:
            found.setdefault(preprocess.input_size(*size), []).append(path)
    if not found:
        raise DataError(f"there is no image that can be read in {folder}", "Give a folder of images.")
    return dict(sorted(found.items(), key=lambda one: -len(one[1]))[:_MOST_SIZES])
