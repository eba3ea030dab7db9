"""The server scenario: images arrive at random times, whether or not the earlier ones are done.

The other scenarios are `timing.measure` over batches in one order or another.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from gfldeploy.batching.buckets import Size, area
from gfldeploy.batching.latency import LatencyModel, Point
from gfldeploy.batching.policy import Adaptive, FixedWithTimeout, NoBatching, Policy, Request
from gfldeploy.batching.simulator import RealClock, VirtualClock, most_kept, play
from gfldeploy.bench.cell import Cell, ServerPolicy
from gfldeploy.bench.inputs import Formed
from gfldeploy.bench.results import Serving
from gfldeploy.bench.timing import Samples, Settings, StreamThreads, warm_up
from gfldeploy.engines.base import Engine
from gfldeploy.errors import EngineError
from gfldeploy.images.preprocess import Prepared, Preprocess

# A server that answers less than this share of what arrives is falling behind.
_KEEPS_UP = 0.95
# How long a fixed batch waits to fill, of the latency bound.
_FIXED_DELAY = 0.1
# Times that each batch is timed before the first arrival, unless these take so many seconds together.
_POINT_TIMES, _POINT_S = 5, 1.0


def arrival_times(rate: float, count: int, seed: int) -> NDArray[np.float64]:
    """Seconds at which `count` images arrive: a Poisson process of `rate` images a second, as in MLPerf Inference."""
    return np.cumsum(np.random.default_rng(seed).exponential(1 / rate, count))


def serve(
    engine: Engine, images: Sequence[Prepared], preprocess: Preprocess, cell: Cell, settings: Settings
) -> tuple[Samples, Serving, list[Formed]]:
    """Serve images as they arrive, in real time; they are taken in their order, over and over. Returns the batches too.

    Whenever a stream is free and something waits, the cell's policy decides what runs, in a batch of the cell's size at
    most, and what is rejected; everything is due `latency_bound_ms` after its arrival. Padding to a common size
    counts, decoding and preprocessing do not. Batches of every number of images are run and timed before the first
    arrival, for every policy alike, then once all shapes that the policy would form by these times: engines prepare for
    each shape. `Samples.latency_ms` is of each image that was served, from arrival to the end of its batch;
    `Samples.stable` says whether the server kept up with the arrivals. Raises `EngineError` when the engine fails, and
    when every image was rejected.
    """
    if cell.rate is None or cell.policy is None or settings.latency_bound_ms is None:
        raise ValueError("a server has a rate, a policy and a latency bound")
    batch_size, bound_s = cell.batch_size, settings.latency_bound_ms / 1e3
    arrivals = arrival_times(
        cell.rate, max(settings.min_count, math.ceil(cell.rate * settings.min_seconds)), settings.seed
    )
    make = functools.partial(_POLICIES[cell.policy], most=batch_size, bound_s=bound_s, streams=cell.streams)
    sizes = [preprocess.padded_size(*one.tensor.shape[1:]) for one in images]
    trace = [
        Request(number, sizes[number % len(sizes)], float(at), float(at) + bound_s)
        for number, at in enumerate(arrivals)
    ]
    batches: list[Formed] = []

    def run(batch: Sequence[Request], size: Size) -> None:
        taken = [images[one.id % len(images)] for one in batch]
        tensor = preprocess.batch(taken, size)
        engine.infer({"image": tensor})
        batches.append(Formed.of(taken, tensor.shape, preprocess))

    with StreamThreads(cell.streams) as streams:
        points, warmup_ms = measure_points(engine, images, preprocess, batch_size, settings.warmup, streams)
        warmup_ms += _rehearse(engine, images, preprocess, trace, make(points), points, streams)
        played = play(trace, make(points), run, RealClock(streams.submit), cell.streams)
    if not played.latency_ms:
        raise EngineError(
            f"none of the {len(trace)} images that arrived could be answered within {settings.latency_bound_ms:g} ms",
            "Raise the latency bound, or use a faster engine.",
        )
    wall_s = max(one.at for one in played.outcomes)
    served = len(played.latency_ms)
    kept_up = served / wall_s >= _KEEPS_UP * len(trace) / float(arrivals[-1])
    samples = Samples(tuple(played.latency_ms), warmup_ms, batch_size, served, wall_s, kept_up)
    model = fastest(points)
    # No streams do more than one that is as many times as fast.
    possible = most_kept(trace, lambda count, size: model.predict(count, size) / cell.streams, batch_size)
    return samples, Serving(len(trace), len(trace) - served, tuple(points), possible), batches


def measure_points(
    engine: Engine,
    images: Sequence[Prepared],
    preprocess: Preprocess,
    most: int,
    warmup: int = 2,
    streams: StreamThreads | None = None,
) -> tuple[list[Point], tuple[float, ...]]:
    """What batches of 1 to `most` images take, padding included, each timed several times; and the warm-up's times.

    At two input sizes: the most common of the images, and the one whose area differs most from it. In several `streams`
    each beside the others. Raises `EngineError`.
    """
    by_size: dict[Size, list[Prepared]] = {}
    for image in images:
        by_size.setdefault(preprocess.padded_size(*image.tensor.shape[1:]), []).append(image)
    common = max(by_size, key=lambda size: len(by_size[size]))
    other = max(by_size, key=lambda size: (abs(area(size) - area(common)), size != common))
    points: list[Point] = []
    warmup_ms: list[float] = []

    def once(batch: Sequence[Prepared]) -> float:
        start = time.perf_counter()
        engine.infer({"image": preprocess.batch(batch)})
        return (time.perf_counter() - start) * 1e3

    def timed(batch: Sequence[Prepared]) -> tuple[list[float], list[float]]:
        warm = [once(batch) for _ in range(warmup)]
        until, times = time.perf_counter() + _POINT_S, list[float]()
        while len(times) < _POINT_TIMES and (not times or time.perf_counter() <= until):
            times.append(once(batch))
        return warm, times

    for size in dict.fromkeys((common, other)):
        for count in range(1, most + 1):
            batch = [by_size[size][number % len(by_size[size])] for number in range(count)]
            for warm, times in (streams or StreamThreads(1)).each(functools.partial(timed, batch)):
                warmup_ms += warm
                points += [Point(count, size, ms) for ms in times]
    return points, tuple(warmup_ms)


def _rehearse(
    engine: Engine,
    images: Sequence[Prepared],
    preprocess: Preprocess,
    trace: Sequence[Request],
    policy: Policy,
    points: Sequence[Point],
    streams: StreamThreads,
) -> tuple[float, ...]:
    """Run every shape once that the policy forms in virtual time and that is not among the points; milliseconds."""
    model = LatencyModel.fit(points)
    formed: dict[tuple[int, Size], Sequence[Request]] = {}

    def run(batch: Sequence[Request], size: Size) -> float:
        formed.setdefault((len(batch), size), batch)
        return model.predict(len(batch), size)

    play(trace, policy, run, VirtualClock(), streams.count)
    for known in {(one.images, one.size) for one in points}:
        formed.pop(known, None)
    times: list[float] = []
    for (_, size), batch in formed.items():  # one at a time: together they may not fit into memory
        tensor = preprocess.batch([images[one.id % len(images)] for one in batch], size)
        for warm in streams.each(functools.partial(warm_up, engine, [{"image": tensor}], 1)):
            times += warm
    return tuple(times)


def fastest(points: Sequence[Point]) -> LatencyModel:
    """The fitted model, made so fast that no point is faster: what bounds a server from above must not be too slow."""
    model = LatencyModel.fit(points)
    smallest = min(one.ms / model.predict(one.images, one.size) for one in points)
    return LatencyModel(*(value * smallest for value in model.coefficients))


_POLICIES: Mapping[ServerPolicy, Callable[..., Policy]] = {
    "no-batching": lambda points, most, bound_s, streams: NoBatching(),
    "fixed-timeout": lambda points, most, bound_s, streams: FixedWithTimeout(most, _FIXED_DELAY * bound_s),
    "adaptive": lambda points, most, bound_s, streams: Adaptive(LatencyModel.fit(points), most, streams),
}
