"""What a search knows of a cell: speed, latency and memory, from the runs that `bench` keeps."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from functools import cached_property

from gfldeploy.bench.estimates import Estimate, lower_limit, percentile, ratio_of_medians, samples_for, supports
from gfldeploy.bench.results import CellResult, Run

# Assumed: the relative difference in throughput between two short runs of one cell.
NOISE = 0.05
# The percentile that a latency bound applies to, and the number of batches that it takes to know it.
BOUND_PERCENT = 99
TAIL_COUNT = samples_for(BOUND_PERCENT)


@dataclass(frozen=True)
class Tail:
    """What `samples` batches say of the 99th percentile of their latency, in milliseconds.

    `ms`: the percentile where it is `known`, which takes `TAIL_COUNT` of them; else the largest sample, which the
    percentile may exceed. `low_ms`: the percentile's lower limit, for any number of samples.
    """

    ms: float
    low_ms: float
    samples: int
    known: bool

    @classmethod
    def of(cls, latency_ms: tuple[float, ...]) -> Tail:
        """Raises `ValueError` without any."""
        known = supports(len(latency_ms), BOUND_PERCENT)
        ms = percentile(latency_ms, BOUND_PERCENT).value if known else max(latency_ms)
        return cls(ms, lower_limit(latency_ms, BOUND_PERCENT), len(latency_ms), known)

    @property
    def what(self) -> str:
        """What `ms` is: "p99", or "the largest of 40, which are too few to know p99"."""
        if self.known:
            return f"p{BOUND_PERCENT}"
        return f"the largest of {self.samples}, which are too few to know p{BOUND_PERCENT}"


@dataclass(frozen=True)
class Measured:
    """One cell, from file to boxes: the batches of a stream one after the other, nothing overlapping.

    `passes`: images a second of every whole pass through the timed images, a tuple for each run. `median_ms`: of the
    latency of a batch; `tail`: of its 99th percentile. `memory_mb`: peak resident memory less the prepared inputs,
    10^6 bytes.
    """

    passes: tuple[tuple[float, ...], ...]
    median_ms: float
    tail: Tail
    memory_mb: float

    @cached_property
    def images_per_s(self) -> float:
        """The median of all passes: a pause of the machine moves one of them."""
        return statistics.median(value for run in self.passes for value in run)

    @classmethod
    def of(cls, result: CellResult) -> Measured | None:
        """None for a cell that was not measured from file to boxes, or in no time at all."""
        if result.status != "ok" or min(result.file_ms, default=0.0) <= 0:
            return None
        return cls(
            passes=tuple(_passes(run, result.cell.streams * result.cell.batch_size) for run in result.runs),
            median_ms=statistics.median(result.file_ms),
            tail=Tail.of(result.file_ms),
            memory_mb=max((run.peak_rss_mb or 0.0) - run.inputs_mb for run in result.runs),
        )


def speed_ratio(base: Measured, other: Measured) -> Estimate:
    """Images a second of `other` by those of `base`, with the interval of `estimates.ratio_of_medians`.

    Where a side has a single run, or too few passes for an interval, `NOISE` is allowed for on either side of it.
    """
    ratio = ratio_of_medians(base.passes, other.passes)
    low, high = (ratio.value, ratio.value) if ratio.low is None or ratio.high is None else (ratio.low, ratio.high)
    if ratio.low is None or min(len(base.passes), len(other.passes)) == 1:
        low, high = low / (1 + NOISE), high * (1 + NOISE)
    return Estimate(ratio.value, low, high, ratio.n)


def _passes(run: Run, at_once: int) -> tuple[float, ...]:
    """Batches are timed in whole passes; a pass that was cut short counts with the batches that it has.

    `at_once`: images that are under way at any time, in all streams.
    """
    count = max(sum(run.shapes.values()), 1)
    latency_ms = run.stages.end_to_end_ms if run.stages else ()
    cuts = [latency_ms[start : start + count] for start in range(0, len(latency_ms), count)]
    return tuple(1e3 * len(cut) * at_once / sum(cut) for cut in cuts)
