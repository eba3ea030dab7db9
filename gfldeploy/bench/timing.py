"""Timing one engine: over prepared batches, and over whole batches from file to detections."""

from __future__ import annotations

import math
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import fmean
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from gfldeploy.batching.tiles import InTiles, Region
from gfldeploy.bundle import Bundle
from gfldeploy.detections import Detections
from gfldeploy.engines.base import ClosesOnExit, Engine, Tensors
from gfldeploy.engines.detect import found_in, given_detections, inputs_of
from gfldeploy.images.decode import read_image
from gfldeploy.images.preprocess import new_memory
from gfldeploy.nms import postprocess

T = TypeVar("T")
# How many windows the samples are cut into, the latest of which must agree.
_WINDOWS = 5
# Of its last piece of work, so long a stream waits for others that are about to end, before it does one that no longer
# counts: the others' last pieces run by themselves for no longer than that.
_ABOUT_TO_END = 0.1


# Figures of less than this, over all rounds, are good for a first look alone.
_QUOTABLE_SECONDS, _QUOTABLE_COUNT = 3.0, 30


@dataclass(frozen=True)
class Settings:
    """How it was measured: every cell in each of `rounds` rounds, after `warmup` inferences of each shape.

    Several streams share them, or a warm-up would take them longer than one inference with all CPUs; each does one of
    each shape at least.

    A round is not over before `min_seconds` have passed and `min_count` inferences are done; then it is as soon as the
    samples are stable (`is_stable`), and in any case once `max_seconds` have passed. With a `min_count` of 0 the
    network alone runs once in each stream: what goes by the time from file to boxes needs no more.

    `seed`: of the arrival times. `latency_bound_ms`: from arrival to answer, in the server scenario; None without it.
    `monitor_hz`: hardware samples per second, 0 for none.
    `tail_count`: batches from file to boxes that are timed in each round unless `max_seconds` pass before. `warmup_s`:
    seconds of the same load before what counts, over HTTP, in the place of `warmup`.
    """

    min_seconds: float
    min_count: int
    max_seconds: float
    warmup: int = 2
    rounds: int = 1
    seed: int = 0
    latency_bound_ms: float | None = None
    monitor_hz: float = 5.0
    tail_count: int = 0
    warmup_s: float = 0.0

    def __post_init__(self) -> None:
        if self.warmup < 0 or self.rounds < 1 or self.monitor_hz < 0 or self.tail_count < 0:
            raise ValueError("rounds must be at least 1, warmup, monitor_hz and tail_count not negative")
        if self.latency_bound_ms is not None and self.latency_bound_ms <= 0:
            raise ValueError("latency_bound_ms must be positive")
        if self.min_count < 0 or self.min_seconds < 0 or self.max_seconds < self.min_seconds:
            raise ValueError("min_count and min_seconds must not be negative, max_seconds not less than min_seconds")

    @property
    def quick(self) -> bool:
        """Whether all rounds together are too short for figures to be quoted: good for a first look alone."""
        return self.rounds * self.min_seconds < _QUOTABLE_SECONDS or self.rounds * self.min_count < _QUOTABLE_COUNT


@dataclass(frozen=True)
class Samples:
    """One timed run, raw.

    `latency_ms`: in the order of completion, those of several streams together. Of each query, a batch of `batch_size`
    images, or an image with all its tiles; in the server scenario of each image served, from its arrival to the end of
    its batch; over HTTP of each image answered with 200, from the time it was planned for to the end of the answer.
    `warmup_ms`: of the inferences before them, which count for nothing. `batch_size`: images in each query, at most
    that many of servers. `images`: completed ones. `wall_s`: seconds from the start of the first timed inference
    (server: of the arrivals) to the end of the last; of several streams, the mean of theirs; over HTTP at a rate, the
    seconds in which the requests were planned. `stable`: whether the run ended because the samples had become stable,
    rather than because time was up (server: whether it kept up with the arrivals). `energy_j`: joules that the GPU's
    board took in `wall_s`, idle power included; None where that is not known.
    """

    latency_ms: tuple[float, ...]
    warmup_ms: tuple[float, ...]
    batch_size: int
    images: int
    wall_s: float
    stable: bool
    energy_j: float | None = None

    def __post_init__(self) -> None:
        if not self.latency_ms:
            raise ValueError("there must be at least one latency")
        if min(self.latency_ms) <= 0 or min(self.warmup_ms, default=0.0) < 0 or self.wall_s <= 0:
            raise ValueError("times must be positive")
        if self.batch_size < 1 or self.images < 1:
            raise ValueError("batch_size and images must be at least 1")


@dataclass(frozen=True)
class Stages:
    """Milliseconds of whole batches, from file to boxes, batch after batch: the k-th of each is the k-th batch.

    They are the batches of the network alone, in whole passes; nothing overlaps, so that they say how long a batch
    takes, and images a second one batch after the other: `predict`, which decodes the next meanwhile, may do more. Each
    of several streams does one batch after the other. In tiles each is of an image with all its inferences.

    `decode_ms` (from the file), `preprocess_ms` (resize, normalise, pad, collate), `input_copy_ms` (host to device),
    `inference_ms`, `output_copy_ms` (device to host), `postprocess_ms` (NMS), and `end_to_end_ms` around all of them.
    On a CPU the copies are those into and out of the engine's own buffers, 0 where it reads and writes the caller's. Of
    the file that deploys by itself, preprocessing is resizing alone, and NMS is part of the inference.
    """

    decode_ms: tuple[float, ...]
    preprocess_ms: tuple[float, ...]
    input_copy_ms: tuple[float, ...]
    inference_ms: tuple[float, ...]
    output_copy_ms: tuple[float, ...]
    postprocess_ms: tuple[float, ...]
    end_to_end_ms: tuple[float, ...]

    def __post_init__(self) -> None:
        if len({len(getattr(self, field.name)) for field in fields(self)}) != 1:
            raise ValueError("every stage must have one value for each batch")


class BatchTimes(NamedTuple):
    """Milliseconds of one batch from file to detections; what they are of is said at `Stages`."""

    decode_ms: float
    preprocess_ms: float
    input_copy_ms: float
    inference_ms: float
    output_copy_ms: float
    postprocess_ms: float
    end_to_end_ms: float


def measure(
    engine: Engine,
    batches: Sequence[Tensors],
    settings: Settings,
    energy_j: Callable[[], float | None] = lambda: None,
    images: Sequence[Sequence[int]] | None = None,
) -> Samples:
    """Time `engine.infer` on batches, inputs of the engine, of as many images each, one after the other in each stream.

    `energy_j`: a counter of the joules that the hardware took, read before and after what is timed. `images`: in tiles,
    the places of the batches of each image, which are timed together, and may have other sizes.

    The warm-up is of every distinct shape, because engines compile or plan for each shape anew. Then the batches are
    run in their order, all of them again and again, until the settings say so: every engine and batch size is timed on
    the same images. Raises `EngineError` when the engine fails.
    """
    sizes = {len(batch["image"]) for batch in batches} if images is None else {1}
    if len(sizes) != 1:
        raise ValueError(f"all batches must have the same size, and there must be one; sizes: {sorted(sizes)}")
    (batch_size,) = sizes
    queries = [(batch,) for batch in batches] if images is None else [[batches[k] for k in one] for one in images]
    if not settings.min_count:
        queries = queries[: engine.options.streams]
    with StreamThreads(engine.options.streams) as streams:
        share = math.ceil(settings.warmup / engine.options.streams)
        warmup_ms = [ms for some in streams.each(lambda: warm_up(engine, batches, share)) for ms in some]

        def is_over(latency_ms: Sequence[float], count: int, seconds: float) -> bool:
            if not settings.min_count:
                return True
            if seconds < settings.min_seconds or count < settings.min_count:
                return False
            return seconds >= settings.max_seconds or is_stable(latency_ms, len(queries))

        joules = energy_j()
        latency_ms, wall_s = streams.passes(lambda place: _query_ms(engine, queries[place]), len(queries), is_over)
    end = energy_j()
    return Samples(
        latency_ms=tuple(latency_ms),
        warmup_ms=tuple(warmup_ms),
        batch_size=batch_size,
        images=len(latency_ms) * batch_size,
        wall_s=wall_s,
        stable=is_stable(latency_ms, len(queries)),
        energy_j=end - joules if end is not None and joules is not None else None,
    )


def warm_up(engine: Engine, batches: Sequence[Tensors], times: int) -> tuple[float, ...]:
    """Infer every distinct shape of the batches so many `times`; the latencies in milliseconds."""
    shapes: dict[tuple[int, ...], Tensors] = {}
    for batch in batches:
        shapes.setdefault(batch["image"].shape, batch)
    return tuple(_query_ms(engine, (batch,)) for batch in shapes.values() for _ in range(times))


def is_stable(latency_ms: Sequence[float], period: int, within: float = 0.02) -> bool:
    """Whether the timing has settled: of five windows, the medians of the last three differ by `within` at most.

    The windows are equal, and whole multiples of `period`, the number of inferences after which the inputs repeat:
    else their medians would differ because their inputs do. False while there are fewer than five periods.
    """
    size = len(latency_ms) // period // _WINDOWS * period
    if size == 0:
        return False
    medians = [statistics.median(latency_ms[len(latency_ms) - (k + 1) * size :][:size]) for k in range(3)]
    return max(medians) <= min(medians) * (1 + within)


def _query_ms(engine: Engine, batches: Sequence[Tensors]) -> float:
    start = time.perf_counter_ns()
    for batch in batches:
        engine.infer(batch)
    return (time.perf_counter_ns() - start) / 1e6


def time_stages(
    engine: Engine,
    batches: Sequence[Sequence[Path]],
    bundle: Bundle,
    settings: Settings,
    cut: InTiles | None = None,
) -> Stages:
    """Time the stages of these batches of image files, in whole passes, so that every cell is timed on the same images.

    `cut`: each is one image, in tiles.

    Passes are timed until `min_seconds` have passed, and then until `tail_count` batches are timed or `max_seconds`
    have passed. Nothing overlaps: the stages of a batch follow each other, and the batches of a stream too. The engine
    must be warm for their shapes. Raises `DataError` and `EngineError`.
    """

    def is_over(rows: Sequence[BatchTimes], count: int, seconds: float) -> bool:
        return seconds >= settings.min_seconds and (count >= settings.tail_count or seconds >= settings.max_seconds)

    # Memory that is used again is for one thread, and for GPUs.
    memory = HostMemory(engine) if engine.options.streams == 1 else None
    with StreamThreads(engine.options.streams) as streams:
        rows, _ = streams.passes(
            lambda place: time_batch(engine, batches[place], bundle, memory, cut), len(batches), is_over
        )
    return Stages(*zip(*rows, strict=True))


class HostMemory:
    """Where inputs lie that are copied to a GPU: as in `predict`, in memory that is used again; else in new memory."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._memory = np.empty(0, np.float32)

    def __call__(self, values: int) -> NDArray[np.float32]:
        """So many values."""
        if self._engine.options.device == "cpu" or self._memory.size < values:
            self._memory = self._engine.host_array(values)
        return self._memory[:values]


class StreamThreads(ClosesOnExit):
    """So many threads that work at once, the same all the time; a single one is the thread that calls.

    Libraries keep buffers for each thread that calls them: those that were warmed up must be those that are timed.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._pool = ThreadPoolExecutor(count, "gfldeploy-stream") if count > 1 else None
        self._together = threading.Barrier(count)  # each thread takes its part, and all begin at once

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown()

    @property
    def submit(self) -> Callable[[Callable[[], None]], object] | None:
        """Has one of them work, while the caller goes on; None where the caller is the only one."""
        return self._pool.submit if self._pool else None

    def each(self, work: Callable[[], T]) -> list[T]:
        """What `work` returns in every one of them."""
        if self._pool is None:
            return [work()]

        def begin() -> T:
            self._together.wait()
            return work()

        return [one.result() for one in [self._pool.submit(begin) for _ in range(self.count)]]

    def passes(
        self, work: Callable[[int], T], period: int, is_over: Callable[[Sequence[T], int, float], bool]
    ) -> tuple[list[T], float]:
        """`work(0)` to `work(period - 1)`, again and again, until after a whole pass it is over.

        `is_over` is asked with the results so far, how many there will be if it is, and the seconds since the start.
        Returns the results in the order in which they came, and the seconds from the start to the end of a stream's
        last one: the mean of the streams. One that finds no more to do goes on, uncounted, until the others end or are
        about to: all that counts ran beside as many others.
        """
        results: list[T] = []
        lock, ended = threading.Lock(), threading.Event()
        taken, busy, over = 0, self.count, False
        start = time.perf_counter()

        def take(seconds: float) -> int | None:
            nonlocal taken, over
            with lock:
                if taken >= period and taken % period == 0:
                    over = over or is_over(results, taken, seconds)
                if over:
                    return None
                taken += 1
                return (taken - 1) % period

        def run() -> float:
            nonlocal over, busy
            seconds = took = 0.0
            try:
                while (place := take(seconds)) is not None:
                    begun = time.perf_counter() - start
                    result = work(place)
                    seconds = time.perf_counter() - start
                    took = seconds - begun
                    with lock:
                        results.append(result)
            except BaseException:
                over = True
                raise
            finally:
                with lock:
                    busy -= 1
                    if not busy:
                        ended.set()
            while not ended.wait(_ABOUT_TO_END * took):
                work(0)
            return seconds

        walls = self.each(run)
        return results, fmean(seconds for seconds in walls if seconds)


def time_batch(
    engine: Engine,
    paths: Sequence[Path],
    bundle: Bundle,
    memory: HostMemory | None = None,
    cut: InTiles | None = None,
) -> BatchTimes:
    """Run one batch of these image files, one stage after the other. Raises `DataError` and `EngineError`.

    `cut`: each is one image, in tiles, whose inferences follow one another.
    """
    if cut is not None:
        (path,) = paths
        return _time_tiles(engine, path, bundle, memory or new_memory, cut)
    preprocess, nms = bundle.manifest.preprocess, bundle.manifest.nms
    start = time.perf_counter()
    images = [read_image(path) for path in paths]
    decoded = time.perf_counter()
    inputs, scales = inputs_of(engine, images, preprocess, memory or new_memory)
    preprocessed = time.perf_counter()
    outputs, copies = engine.infer_timed(inputs)
    inferred = time.perf_counter()
    if engine.by_itself:
        list(given_detections(outputs))
    else:
        postprocess(outputs["scores"], outputs["boxes"], scales, nms)
    end = time.perf_counter()
    return BatchTimes(
        decode_ms=(decoded - start) * 1e3,
        preprocess_ms=(preprocessed - decoded) * 1e3,
        input_copy_ms=copies.input_copy_ms,
        inference_ms=copies.inference_ms,
        output_copy_ms=copies.output_copy_ms,
        postprocess_ms=(end - inferred) * 1e3,
        end_to_end_ms=(end - start) * 1e3,
    )


def _time_tiles(
    engine: Engine, path: Path, bundle: Bundle, memory: Callable[[int], NDArray[np.float32]], cut: InTiles
) -> BatchTimes:
    preprocess, nms = bundle.manifest.preprocess, bundle.manifest.nms
    start = time.perf_counter()
    image = read_image(path)
    decode_s = time.perf_counter() - start
    size = image.shape[0], image.shape[1]
    found: list[tuple[Region, Detections]] = []
    preprocess_s = postprocess_s = input_copy_ms = inference_ms = output_copy_ms = 0.0
    for regions, _ in cut.batches(size, preprocess):
        begun = time.perf_counter()
        inputs, scales = inputs_of(engine, [region.of(image) for region in regions], preprocess, memory)
        preprocessed = time.perf_counter()
        outputs, copies = engine.infer_timed(inputs)
        inferred = time.perf_counter()
        found += zip(regions, found_in(engine, outputs, scales, nms), strict=True)
        postprocess_s += time.perf_counter() - inferred
        preprocess_s += preprocessed - begun
        input_copy_ms += copies.input_copy_ms
        inference_ms += copies.inference_ms
        output_copy_ms += copies.output_copy_ms
    begun = time.perf_counter()
    cut.merged(found, size, nms)
    end = time.perf_counter()
    return BatchTimes(
        decode_ms=decode_s * 1e3,
        preprocess_ms=preprocess_s * 1e3,
        input_copy_ms=input_copy_ms,
        inference_ms=inference_ms,
        output_copy_ms=output_copy_ms,
        postprocess_ms=(postprocess_s + end - begun) * 1e3,
        end_to_end_ms=(end - start) * 1e3,
    )
