"""Timing one engine over prepared batches."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gfldeploy.engines.base import Engine

__all__ = ["Samples", "Settings", "is_stable", "measure", "warm_up"]

# How many windows the samples are cut into, the latest of which must agree.
_WINDOWS = 5


# Figures of less than this, over all rounds, are good for a first look alone.
_QUOTABLE_SECONDS, _QUOTABLE_COUNT = 3.0, 30


@dataclass(frozen=True)
class Settings:
    """How it was measured: every cell in each of `rounds` rounds, after `warmup` inferences of each shape.

    A round is not over before `min_seconds` have passed and `min_count` inferences are done; then it is as soon as the
    samples are stable (`is_stable`), and in any case once `max_seconds` have passed.

    `seed`: of the arrival times. `latency_bound_ms`: from arrival to answer, in the server scenario; None without it.
    `monitor_hz`: hardware samples per second, 0 for none. `quick`: the times were too short for figures to be quoted.
    `tail_count`: batches from file to boxes that are timed in each round unless `max_seconds` pass before.
    """

    min_seconds: float
    min_count: int
    max_seconds: float
    warmup: int = 2
    rounds: int = 1
    seed: int = 0
    latency_bound_ms: float | None = None
    monitor_hz: float = 5.0
    quick: bool = False
    tail_count: int = 0

    def __post_init__(self) -> None:
        if self.warmup < 0 or self.rounds < 1 or self.monitor_hz < 0 or self.tail_count < 0:
            raise ValueError("rounds must be at least 1, warmup, monitor_hz and tail_count not negative")
        if self.latency_bound_ms is not None and self.latency_bound_ms <= 0:
            raise ValueError("latency_bound_ms must be positive")
        if self.min_count < 1 or self.min_seconds < 0 or self.max_seconds < self.min_seconds:
            raise ValueError("min_count must be at least 1, min_seconds not negative, max_seconds not less than that")

    @staticmethod
    def is_quick(rounds: int, min_seconds: float, min_count: int) -> bool:
        """Whether all rounds together are good for a first look alone."""
        return rounds * min_seconds < _QUOTABLE_SECONDS or rounds * min_count < _QUOTABLE_COUNT


@dataclass(frozen=True)
class Samples:
    """One timed run, raw.

    `latency_ms`: in the order of completion. Of each query, a batch of `batch_size` images; in the server scenario of
    each image served, from its arrival to the end of its batch. `warmup_ms`: of the inferences before them, which count
    for nothing. `batch_size`: images in each inference, at most that many in the server scenario. `images`: completed
    ones. `wall_s`: seconds from the start of the first timed inference (server: of the arrivals) to the end of the
    last. `stable`: whether the run ended because the samples had become stable, rather than because time was up
    (server: whether it kept up with the arrivals).
    """

    latency_ms: tuple[float, ...]
    warmup_ms: tuple[float, ...]
    batch_size: int
    images: int
    wall_s: float
    stable: bool

    def __post_init__(self) -> None:
        if not self.latency_ms:
            raise ValueError("there must be at least one latency")
        if min(self.latency_ms) <= 0 or min(self.warmup_ms, default=0.0) < 0 or self.wall_s <= 0:
            raise ValueError("times must be positive")
        if self.batch_size < 1 or self.images < 1:
            raise ValueError("batch_size and images must be at least 1")


def measure(engine: Engine, batches: Sequence[NDArray[np.float32]], settings: Settings) -> Samples:
    """Time `engine.infer` on batches float32 [N, 3, H, W], all of the same N, one after the other.

    The warm-up is of every distinct shape, because engines compile or plan for each shape anew. Then the batches are
    run in their order, all of them again and again, until the settings say so: every engine and batch size is timed on
    the same images. Raises `EngineError` when the engine fails.
    """
    sizes = {len(batch) for batch in batches}
    if len(sizes) != 1:
        raise ValueError(f"all batches must have the same size, and there must be one; sizes: {sorted(sizes)}")
    (batch_size,) = sizes
    warmup_ms = warm_up(engine, batches, settings.warmup)
    latency_ms: list[float] = []
    start = time.perf_counter_ns()
    while True:
        latency_ms += [_inference_ms(engine, batch) for batch in batches]
        wall_s = (time.perf_counter_ns() - start) / 1e9
        if wall_s < settings.min_seconds or len(latency_ms) < settings.min_count:
            continue
        stable = is_stable(latency_ms, len(batches))
        if stable or wall_s >= settings.max_seconds:
            break
    return Samples(tuple(latency_ms), tuple(warmup_ms), batch_size, len(latency_ms) * batch_size, wall_s, stable)


def warm_up(engine: Engine, batches: Sequence[NDArray[np.float32]], times: int) -> tuple[float, ...]:
    """Infer every distinct shape of the batches so many `times`; the latencies in milliseconds."""
    shapes: dict[tuple[int, ...], NDArray[np.float32]] = {}
    for batch in batches:
        shapes.setdefault(batch.shape, batch)
    return tuple(_inference_ms(engine, batch) for batch in shapes.values() for _ in range(times))


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


def _inference_ms(engine: Engine, batch: NDArray[np.float32]) -> float:
    start = time.perf_counter_ns()
    engine.infer({"image": batch})
    return (time.perf_counter_ns() - start) / 1e6
