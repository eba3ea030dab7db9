"""What is timed, in which order and how often; never how long it took."""

from __future__ import annotations

from types import TracebackType
from typing import Self

import numpy as np
import pytest

from gfldeploy.bench.timing import Samples, measure, median, percentile
from gfldeploy.engines.base import EngineOptions, Tensors
from gfldeploy.errors import EngineError


class Recorder:
    """An engine that notes the batches it gets."""

    name = "recorder"
    version = "1"
    options = EngineOptions()

    def __init__(self, fail_at: int | None = None) -> None:
        self.seen: list[float] = []
        self.fail_at = fail_at

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def close(self) -> None: ...

    def infer(self, inputs: Tensors) -> dict[str, np.ndarray]:
        if len(self.seen) == self.fail_at:
            raise EngineError("no more")
        self.seen.append(float(inputs["image"].flat[0]))
        return {}


def batch(mark: int, width: int, size: int = 2) -> np.ndarray:
    return np.full((size, 3, 4, width), mark, np.float32)


def test_warms_up_every_shape_then_goes_round_in_order_and_ends_with_a_round() -> None:
    engine = Recorder()
    samples = measure(engine, [batch(1, 8), batch(2, 6), batch(3, 8)], min_seconds=0, min_count=5, warmup=2)
    assert engine.seen == [1, 1, 2, 2, 1, 2, 3, 1, 2, 3]
    assert (len(samples.warmup_ms), len(samples.latency_ms)) == (4, 6)
    assert (samples.batch_size, samples.images) == (2, 12)
    # The wall time holds the latencies and what lies between them.
    assert samples.wall_s >= sum(samples.latency_ms) / 1e3


def test_both_minima_are_met() -> None:
    by_time = measure(Recorder(), [batch(1, 8)], min_seconds=0.05, min_count=1)
    assert by_time.wall_s >= 0.05
    assert len(measure(Recorder(), [batch(1, 8)], min_seconds=0, min_count=7, warmup=0).latency_ms) == 7


def test_an_engines_failure_passes_through() -> None:
    with pytest.raises(EngineError, match="no more"):
        measure(Recorder(fail_at=3), [batch(1, 8)], min_seconds=0, min_count=5, warmup=1)


@pytest.mark.parametrize("batches", [[], [batch(1, 8, 1), batch(1, 8, 2)]])
def test_batches_must_be_of_one_size(batches: list[np.ndarray]) -> None:
    with pytest.raises(ValueError, match="same size"):
        measure(Recorder(), batches, 0, 1)


@pytest.mark.parametrize("arguments", [(-1, 1, 1), (0, 0, 1), (0, 1, -1)])
def test_limits_must_make_sense(arguments: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        measure(Recorder(), [batch(1, 8)], *arguments)


def test_statistics() -> None:
    assert median([3, 1, 2]) == 2 and median([1, 2, 3, 10]) == 2.5
    # Linear between the neighbours: 90 % of the way through 4 steps lies 0.6 between 4 and 5.
    assert percentile([5, 1, 2, 3, 4], 90) == pytest.approx(4.6)
    assert percentile([7], 90) == 7
    for statistic in (median, lambda values: percentile(values, 90)):
        with pytest.raises(ValueError):
            statistic([])


@pytest.mark.parametrize(
    "values", [((), (), 1, 1.0), ((-1.0,), (), 1, 1.0), ((1.0,), (), 0, 1.0), ((1.0,), (), 1, 0.0)]
)
def test_impossible_samples(values: tuple[tuple[float, ...], tuple[float, ...], int, float]) -> None:
    with pytest.raises(ValueError):
        Samples(*values)
