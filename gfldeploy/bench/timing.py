"""Timing one engine over prepared batches."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gfldeploy.engines.base import Engine

__all__ = ["Samples", "measure", "median", "percentile"]


@dataclass(frozen=True)
class Samples:
    """One timed run, raw.

    `latency_ms`: of each inference of one batch, in the order they ran; `warmup_ms`: of the inferences before them,
    which count for nothing; `batch_size`: images in each inference; `wall_s`: seconds from the start of the first timed
    inference to the end of the last.
    """

    latency_ms: tuple[float, ...]
    warmup_ms: tuple[float, ...]
    batch_size: int
    wall_s: float

    def __post_init__(self) -> None:
        if not self.latency_ms:
            raise ValueError("there must be at least one latency")
        if min(*self.latency_ms, *self.warmup_ms, 0.0) < 0 or self.wall_s <= 0:
            raise ValueError("times must be positive")
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {self.batch_size}")

    @property
    def images(self) -> int:
        """Images that the timed inferences completed."""
        return len(self.latency_ms) * self.batch_size


def measure(
    engine: Engine, batches: Sequence[NDArray[np.float32]], min_seconds: float, min_count: int, warmup: int = 2
) -> Samples:
    """Time `engine.infer` on batches float32 [N, 3, H, W], all of the same N.

    First come `warmup` inferences of every distinct shape, because engines compile or plan for each shape anew. Then
    the batches go round in their order, whole rounds only, until at least `min_seconds` have passed and `min_count`
    inferences are done: every engine and batch size is timed on the same images. Raises `EngineError` when the engine
    fails.
    """
    sizes = {len(batch) for batch in batches}
    if len(sizes) != 1:
        raise ValueError(f"all batches must have the same size, and there must be one; sizes: {sorted(sizes)}")
    if min_count < 1 or min_seconds < 0 or warmup < 0:
        raise ValueError("min_count must be at least 1, min_seconds and warmup not negative")
    shapes: dict[tuple[int, ...], NDArray[np.float32]] = {}
    for batch in batches:
        shapes.setdefault(batch.shape, batch)
    warmup_ms = [_inference_ms(engine, batch) for batch in shapes.values() for _ in range(warmup)]
    latency_ms: list[float] = []
    wall_ns = 0
    start = time.perf_counter_ns()
    while wall_ns < min_seconds * 1e9 or len(latency_ms) < min_count:
        latency_ms += [_inference_ms(engine, batch) for batch in batches]
        wall_ns = time.perf_counter_ns() - start
    return Samples(tuple(latency_ms), tuple(warmup_ms), sizes.pop(), wall_ns / 1e9)


def median(values: Sequence[float]) -> float:
    """The median; the mean of the two middle values of an even number. Raises `ValueError` for none at all."""
    return float(statistics.median(values))


def percentile(values: Sequence[float], percent: float) -> float:
    """The percentile (0 to 100) by linear interpolation between the two nearest values, NumPy's default.

    Raises `ValueError` for no values at all.
    """
    if not values:
        raise ValueError("there is no percentile of no values")
    return float(np.percentile(values, percent))


def _inference_ms(engine: Engine, batch: NDArray[np.float32]) -> float:
    start = time.perf_counter_ns()
    engine.infer({"image": batch})
    return (time.perf_counter_ns() - start) / 1e6
