"""What is timed, in which order and how often; never how long it took."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import gfldeploy
from gfldeploy.bench.timing import Samples, Settings, is_stable, measure
from gfldeploy.engines import base
from gfldeploy.engines.base import Engine, EngineOptions, Tensors
from gfldeploy.errors import EngineError


class Recorder(Engine):
    """An engine that notes the batches it gets."""

    name = "recorder"
    version = "1"
    options = EngineOptions()

    def __init__(self, fail_at: int | None = None) -> None:
        self.seen: list[float] = []
        self.fail_at = fail_at

    def infer(self, inputs: Tensors) -> dict[str, np.ndarray]:
        if len(self.seen) == self.fail_at:
            raise EngineError("no more")
        self.seen.append(float(inputs["image"].flat[0]))
        return {}


def batch(mark: int, width: int, size: int = 2) -> Tensors:
    return {"image": np.full((size, 3, 4, width), mark, np.float32)}


def test_warms_up_every_shape_then_goes_round_in_order_and_ends_with_a_round() -> None:
    engine = Recorder()
    samples = measure(engine, [batch(1, 8), batch(2, 6), batch(3, 8)], Settings(0, 5, 0, warmup=2))
    assert engine.seen == [1, 1, 2, 2, 1, 2, 3, 1, 2, 3]
    assert (len(samples.warmup_ms), len(samples.latency_ms)) == (4, 6)
    assert (samples.batch_size, samples.images) == (2, 12)
    # The wall time holds the latencies and what lies between them.
    assert samples.wall_s >= sum(samples.latency_ms) / 1e3


def test_energy_is_that_of_what_is_timed() -> None:
    """A counter that rises by 3 J with every inference, the warm-up included."""
    engine = Recorder()
    samples = measure(engine, [batch(1, 8)], Settings(0, 5, 0, warmup=4), lambda: 100 + 3.0 * len(engine.seen))
    assert samples.energy_j == 3.0 * len(samples.latency_ms) == 15
    assert measure(Recorder(), [batch(1, 8)], Settings(0, 5, 0), lambda: None).energy_j is None


def test_both_minima_are_met() -> None:
    by_time = measure(Recorder(), [batch(1, 8)], Settings(0.05, 1, 0.05))
    assert by_time.wall_s >= 0.05
    assert len(measure(Recorder(), [batch(1, 8)], Settings(0, 7, 0, warmup=0)).latency_ms) == 7


def test_an_engines_failure_passes_through() -> None:
    with pytest.raises(EngineError, match="no more"):
        measure(Recorder(fail_at=3), [batch(1, 8)], Settings(0, 5, 0, warmup=1))


@pytest.mark.parametrize("batches", [[], [batch(1, 8, 1), batch(1, 8, 2)]])
def test_batches_must_be_of_one_size(batches: list[Tensors]) -> None:
    with pytest.raises(ValueError, match="same size"):
        measure(Recorder(), batches, Settings(0, 1, 0))


def test_goes_on_until_the_latencies_have_settled_or_time_is_up() -> None:
    class Sleeper(Recorder):
        """Takes longer and longer for as long as `grows`."""

        def __init__(self, grows: int) -> None:
            super().__init__()
            self.grows = grows

        def infer(self, inputs: Tensors) -> dict[str, np.ndarray]:
            time.sleep(0.001 * min(len(self.seen), self.grows))
            return super().infer(inputs)

    restless = measure(Sleeper(1000), [batch(1, 8)], Settings(0, 5, 0.3, warmup=0))
    assert not restless.stable and restless.wall_s >= 0.3
    # Windows of a fifth: 10 of 50 samples, of which the first two may be anything.
    settled = measure(Sleeper(4), [batch(1, 8)], Settings(0, 5, 60, warmup=0))
    assert settled.stable and len(settled.latency_ms) < 1000


@pytest.mark.parametrize(
    ("latencies", "period", "stable"),
    [
        ([9, 9, 1, 1, 1], 1, True),
        ([1, 1, 1, 1], 1, False),  # fewer than five windows
        ([1, 1, 1, 1, 1.03], 1, False),
        ([1, 1, 1, 1, 1.01], 1, True),
        ([1, 5] * 5, 2, True),  # two inputs of different size: the windows hold both
        ([5, 9, 1, 1, 1, 1], 1, True),  # what is left over lies before the windows
    ],
)
def test_stable_means_that_the_last_three_windows_agree(latencies: list[float], period: int, stable: bool) -> None:
    assert is_stable(latencies, period) is stable


@pytest.mark.parametrize("arguments", [(-1, 1, 1), (0, -1, 1), (2, 1, 1)])
def test_limits_must_make_sense(arguments: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="must not be negative"):
        Settings(*arguments)


@pytest.mark.parametrize(
    "values",
    [
        ((), (), 1, 1, 1.0, True),
        ((-1.0,), (), 1, 1, 1.0, True),
        ((1.0,), (), 0, 1, 1.0, True),
        ((1.0,), (), 1, 0, 1.0, True),
        ((1.0,), (), 1, 1, 0.0, True),
    ],
)
def test_impossible_samples(values: tuple[tuple[float, ...], tuple[float, ...], int, int, float, bool]) -> None:
    with pytest.raises(ValueError):
        Samples(*values)


class Crowd(Recorder):
    """An engine of several streams that notes which threads are in it, and how many at most at once."""

    def __init__(self, streams: int, fail_at: int | None = None) -> None:
        super().__init__(fail_at)
        self.options = replace(Recorder.options, streams=streams)
        self.inside, self.most, self.threads = 0, 0, set[str]()

    def infer(self, inputs: Tensors) -> dict[str, np.ndarray]:
        self.threads.add(threading.current_thread().name)
        self.inside += 1
        self.most = max(self.most, self.inside)
        time.sleep(0.002)
        self.inside -= 1
        return super().infer(inputs)


@pytest.fixture
def cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "usable_threads", lambda: 8)


def test_streams_infer_at_once_and_whole_passes_count(cpus: None) -> None:
    """Every image counts as often as every other. A stream that has nothing left goes on until the others end."""
    engine = Crowd(3)
    samples = measure(engine, [batch(mark, 8) for mark in range(1, 6)], Settings(0, 7, 0, warmup=2))
    # Of one shape, and no more than two: the streams share them, and each does one at least.
    assert len(samples.warmup_ms) == 3 and len(engine.threads) == engine.most == 3
    # Two passes: those that run when the second ends count, too, so that no third is needed.
    assert len(samples.latency_ms) == 10 and samples.images == 2 * 10
    # Of each stream it holds the latencies and what lies between them.
    assert samples.wall_s >= 0.9 * sum(samples.latency_ms) / 1e3 / 3


@pytest.mark.parametrize("streams", [1, 3])
def test_what_goes_by_the_time_from_file_to_boxes_runs_the_network_alone_once(cpus: None, streams: int) -> None:
    batches = [batch(mark, 8) for mark in range(1, 6)]
    samples = measure(Crowd(streams), batches, Settings(60, 0, 60, warmup=0))
    assert len(samples.latency_ms) == streams and samples.images == 2 * streams


@pytest.mark.parametrize("measured_by", [gfldeploy.benchmark, gfldeploy.tune_bundles])
def test_who_asks_for_figures_has_the_network_alone_timed(measured_by: Callable[..., object], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="min_count must be at least 1, not 0"):
        measured_by([tmp_path], data=tmp_path / "none.json", output=tmp_path / "out", min_count=0)


def test_a_failure_of_one_stream_ends_all(cpus: None) -> None:
    with pytest.raises(EngineError, match="no more"):
        measure(Crowd(3, fail_at=20), [batch(1, 8)], Settings(0, 100, 0, warmup=1))
