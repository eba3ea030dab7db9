"""What a search knows of a cell: speed, latency and memory, from the runs that `bench` keeps."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from functools import cached_property

from gfldeploy.bench.estimates import Estimate, median, percentile, ratio_of_medians, supports
from gfldeploy.bench.results import CellResult, Run

__all__ = ["NOISE", "TAIL_PERCENTS", "Measured", "speed", "speed_ratio", "tail"]

# Assumed: by how much of itself the throughput of one short run differs from that of another run of the same cell.
NOISE = 0.05
# Percentiles that a latency bound may be judged by, the best first.
TAIL_PERCENTS = (99, 95, 90, 50)


@dataclass(frozen=True)
class Measured:
    """One cell.

    `passes`: images a second of every whole pass through the timed images, a tuple for each run. `median_ms`: of the
    latency of a batch; `tail_ms`: its highest percentile that the samples support (`tail`), the `tail_percent`-th.
    `memory_mb`: peak resident memory less the prepared inputs, 10^6 bytes.
    """

    passes: tuple[tuple[float, ...], ...]
    median_ms: float
    tail_ms: float
    tail_percent: int
    memory_mb: float

    @cached_property
    def images_per_s(self) -> float:
        """The median of all passes: a pause of the machine moves one of them."""
        return statistics.median(value for run in self.passes for value in run)

    @classmethod
    def of(cls, result: CellResult) -> Measured:
        """Of a cell that was measured. Raises `ValueError` for another."""
        if result.status != "ok" or result.batch_size is None:
            raise ValueError("the cell was not measured")
        high = tail(result)
        return cls(
            passes=tuple(_passes(run, result.batch_size) for run in result.runs),
            median_ms=statistics.median(result.latency_ms),
            tail_ms=high[1].value,
            tail_percent=high[0],
            memory_mb=max(run.peak_rss_mb - run.inputs_mb for run in result.runs),
        )


def tail(result: CellResult) -> tuple[int, Estimate]:
    """The highest of `TAIL_PERCENTS` that the samples support, and it in milliseconds; of under 6 the median.

    It is never too high a percentile: what exceeds a bound by a lower one exceeds it by the 99th as well.
    """
    latency_ms = result.latency_ms
    percent = next((one for one in TAIL_PERCENTS if supports(len(latency_ms), one)), TAIL_PERCENTS[-1])
    return percent, percentile(latency_ms, percent)


def speed_ratio(base: Measured, other: Measured) -> Estimate:
    """Images a second of `other` by those of `base`, with the interval of `estimates.ratio_of_medians`.

    Where a side has a single run, or too few passes for an interval, `NOISE` is allowed for on either side of it.
    """
    ratio = ratio_of_medians(base.passes, other.passes)
    low, high = (ratio.value, ratio.value) if ratio.low is None or ratio.high is None else (ratio.low, ratio.high)
    if ratio.low is None or min(len(base.passes), len(other.passes)) == 1:
        low, high = low / (1 + NOISE), high * (1 + NOISE)
    return Estimate(ratio.value, low, high, ratio.n)


def speed(measured: Measured) -> Estimate:
    """Images a second with the interval of the median of the passes: none below 6 of them."""
    return median([value for run in measured.passes for value in run])


def _passes(run: Run, batch_size: int) -> tuple[float, ...]:
    """The timing goes on in whole passes; one that was cut counts as a pass of what there is."""
    count = sum(run.shapes.values())
    latency_ms = run.samples.latency_ms
    cuts = [latency_ms[start : start + count] for start in range(0, len(latency_ms), count)]
    return tuple(1e3 * len(cut) * batch_size / sum(cut) for cut in cuts)
