"""The server scenario: images arrive at random times, whether or not the earlier ones are done.

The other scenarios are `timing.measure` over batches in one order or another.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from gfldeploy.bench.timing import Samples, warm_up
from gfldeploy.engines.base import Engine
from gfldeploy.images.preprocess import Prepared, Preprocess

__all__ = ["arrival_times", "serve"]

# A server that completes less than this share of what arrives is falling behind.
_KEEPS_UP = 0.95


def arrival_times(rate: float, count: int, seed: int) -> NDArray[np.float64]:
    """Seconds at which `count` images arrive: a Poisson process of `rate` images a second, as in MLPerf Inference."""
    return np.cumsum(np.random.default_rng(seed).exponential(1 / rate, count))


def serve(
    engine: Engine,
    images: Sequence[Prepared],
    preprocess: Preprocess,
    batch_size: int,
    arrivals: NDArray[np.float64],
    warmup: int = 2,
) -> Samples:
    """Serve images as they arrive, in real time; they are taken in their order, over and over.

    Whenever the engine is free it takes all that wait, `batch_size` at most, and pads them to a common size. That
    counts, decoding and preprocessing do not. `Samples.latency_ms` is of each image from arrival to the end of its
    batch; `Samples.stable` says whether the server kept up with the arrivals. Every batch size is warmed up first.
    Raises `EngineError` when the engine fails.
    """
    if batch_size < 1 or len(arrivals) == 0:
        raise ValueError("batch_size must be at least 1, and there must be arrivals")
    first = [images[number % len(images)] for number in range(batch_size)]
    warmup_ms = warm_up(engine, [preprocess.batch(first[:size]) for size in range(1, batch_size + 1)], warmup)
    latency_ms: list[float] = []
    start = time.perf_counter()
    while (done := len(latency_ms)) < len(arrivals):
        now = time.perf_counter() - start
        waiting = int(np.searchsorted(arrivals, now, side="right")) - done
        if waiting <= 0:
            time.sleep(max(arrivals[done] - now, 0))
            continue
        taken = range(done, done + min(waiting, batch_size))
        engine.infer({"image": preprocess.batch([images[number % len(images)] for number in taken])})
        now = time.perf_counter() - start
        latency_ms += [float(now - arrivals[number]) * 1e3 for number in taken]
    wall_s = time.perf_counter() - start
    kept_up = bool(arrivals[-1] >= _KEEPS_UP * wall_s)
    return Samples(tuple(latency_ms), warmup_ms, batch_size, len(latency_ms), wall_s, kept_up)
