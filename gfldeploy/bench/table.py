"""Results as rows of a table: statistics are computed here, from the raw samples."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from textwrap import shorten

from gfldeploy.bench.estimates import Estimate, median, percentile, supports
from gfldeploy.bench.results import BenchResults, CellResult, Peak, Scenario, ServerPolicy, Status
from gfldeploy.engines.base import Device, Precision

__all__ = ["FLAGS", "UNKNOWN", "BoundCheck", "Row", "Served", "images_per_s", "rows"]

# What is said of a measured cell without an mAP.
UNKNOWN = "unknown"

# Why a measured cell is to be read with care.
FLAGS: Mapping[str, str] = {
    "quick": "measured too briefly for figures to be quoted",
    "unstable": "the latencies had not settled when the time was up",
    "overloaded": "the server fell behind the arrivals, or turned many away",
    "busy": "other processes used more than 20 % of the CPUs or of the GPU before a run",
    "throttled": "the hardware ran below full speed",
}
_BUSY_PERCENT = 20.0

# Percentiles that the bound of the server scenario may be judged by, the best first.
_BOUND_PERCENTS = (99, 95, 90, 50)

# Characters of a reason, which names every convolution that it holds for; results.json has it whole.
_REASON_WIDTH = 120


@dataclass(frozen=True)
class BoundCheck:
    """Whether of all images that arrived `percent` were answered within the latency bound.

    `percent`: the highest percentile up to 99 that so many images support; `share`: that were, 0 to 1.
    """

    percent: int
    share: float

    @property
    def held(self) -> bool:
        """Whether the server kept the bound."""
        return self.share >= self.percent / 100


@dataclass(frozen=True)
class Served:
    """What became of the images that arrived at a server, in all rounds.

    `in_time_per_s`: answered within the bound, a second. `rejected`: turned away, 0 to 1. `mean_batch`: images in a
    batch. `percent_of_possible`: answered within the bound, of what no policy could do better than with batches up to
    this size (`Serving.most_kept`); None if that is nothing. `bound`: None if there were too few images to judge by.
    """

    in_time_per_s: float
    rejected: float
    mean_batch: float
    percent_of_possible: float | None
    bound: BoundCheck | None


@dataclass(frozen=True)
class Row:
    """One cell. None where there is nothing to show; of a cell that is not ok, everything but its reason, in `note`.

    `bundle` is the name of its directory. `median_ms`, `p90_ms`, `p99_ms`: of the latency of a query, all rounds
    together, with intervals; the percentiles only where the samples support them (`estimates.supports`).
    `images_per_s`: completed images by wall time. `end_to_end_ms`: the median of a whole batch from file to detections.
    `ap`: COCO's, 0 to 1; see `accuracy`. `low_precision`: convolutions that ran in less than FP32, of all, such as
    "53/53". `memory_mb`: the peak resident memory less the prepared inputs, 10^6 bytes.

    `gmac_per_s`: 10^9 multiply-accumulates a second that the images took, padding included; `percent_of_peak`: of what
    the same engine, precision, device and number of threads reach here; `percent_of_bandwidth`: the images' least
    memory traffic, of what a large copy reaches here. `padding`: pixels of the batches by those of the images.
    `served`: of the server scenario, whose latencies are those of the images that were not turned away. `flags`: those
    of `FLAGS` that hold. `note`: why a cell was skipped or failed, why there is no accuracy, how many convolutions did
    not run in the low precision asked for and why.
    """

    bundle: str | None
    engine: str
    precision: Precision
    device: Device
    batch_size: int | None
    threads: int
    scenario: Scenario | None
    rate: float | None
    policy: ServerPolicy | None
    status: Status
    median_ms: Estimate | None
    p90_ms: Estimate | None
    p99_ms: Estimate | None
    images_per_s: float | None
    end_to_end_ms: float | None
    ap: float | None
    low_precision: str | None
    memory_mb: float | None
    gmac_per_s: float | None
    percent_of_peak: float | None
    percent_of_bandwidth: float | None
    padding: float | None
    served: Served | None
    flags: tuple[str, ...]
    note: str | None

    @property
    def accuracy(self) -> str:
        """The mAP with three decimals; "unknown" of a measured cell without one, nothing of any other."""
        if self.status != "ok":
            return ""
        return UNKNOWN if self.ap is None else f"{self.ap:.3f}"


def rows(results: BenchResults) -> list[Row]:
    """One row for each cell, in the results' order."""
    return [_row(cell, results) for cell in results.cells]


def images_per_s(cell: CellResult) -> float:
    """Completed images by wall time, over all rounds of a measured cell."""
    return sum(run.samples.images for run in cell.runs) / sum(run.samples.wall_s for run in cell.runs)


def _row(cell: CellResult, results: BenchResults) -> Row:
    ok = cell.status == "ok"
    latency_ms = cell.latency_ms if ok else ()
    gmac_per_s = _gmac_per_s(cell) if ok else None
    peak = _peak(cell, results.peaks)
    return Row(
        bundle=cell.bundle.directory if cell.bundle else None,
        engine=cell.engine,
        precision=cell.precision,
        device=cell.device,
        batch_size=cell.batch_size,
        threads=cell.threads,
        scenario=cell.scenario,
        rate=cell.rate,
        policy=cell.policy,
        status=cell.status,
        median_ms=median(latency_ms) if ok else None,
        p90_ms=_supported(latency_ms, 90),
        p99_ms=_supported(latency_ms, 99),
        images_per_s=images_per_s(cell) if ok else None,
        end_to_end_ms=_end_to_end_ms(cell) if ok else None,
        ap=cell.accuracy.ap if ok and cell.accuracy and cell.accuracy.ap >= 0 else None,
        low_precision=_low_precision(cell) if ok else None,
        memory_mb=max(run.peak_rss_mb - run.inputs_mb for run in cell.runs) if ok else None,
        gmac_per_s=gmac_per_s,
        percent_of_peak=_percent(gmac_per_s, peak.gmac_per_s if peak else None),
        percent_of_bandwidth=_percent(_traffic_gb_per_s(cell) if ok else None, peak.memory_gb_per_s if peak else None),
        padding=max(run.padding_ratio for run in cell.runs) if ok else None,
        served=_served(cell, results.settings.latency_bound_ms) if ok else None,
        flags=_flags(cell, results) if ok else (),
        note=_note(cell),
    )


def _supported(latency_ms: Sequence[float], percent: int) -> Estimate | None:
    return percentile(latency_ms, percent) if supports(len(latency_ms), percent) else None


def _end_to_end_ms(cell: CellResult) -> float | None:
    values = [value for run in cell.runs for value in run.stages.end_to_end_ms]
    return statistics.median(values) if values else None


def _gmac_per_s(cell: CellResult) -> float | None:
    return cell.work.padded_macs * images_per_s(cell) / 1e9 if cell.work else None


def _traffic_gb_per_s(cell: CellResult) -> float | None:
    return cell.work.traffic_mb * images_per_s(cell) / 1e3 if cell.work else None


def _peak(cell: CellResult, peaks: Sequence[Peak]) -> Peak | None:
    wanted = (cell.engine, cell.precision, cell.device, cell.threads)
    return next((one for one in peaks if (one.engine, one.precision, one.device, one.threads) == wanted), None)


def _percent(reached: float | None, most: float | None) -> float | None:
    return 100 * reached / most if reached and most else None


def _served(cell: CellResult, bound_ms: float | None) -> Served | None:
    runs = [(run, run.serving) for run in cell.runs if run.serving]
    if not runs or bound_ms is None:
        return None
    requests = sum(serving.requests for _, serving in runs)
    kept = sum(value <= bound_ms for value in cell.latency_ms)
    possible = sum(serving.most_kept for _, serving in runs)
    percent = next((percent for percent in _BOUND_PERCENTS if supports(requests, percent)), None)
    return Served(
        in_time_per_s=kept / sum(run.samples.wall_s for run, _ in runs),
        rejected=sum(serving.rejected for _, serving in runs) / requests,
        mean_batch=sum(run.samples.images for run, _ in runs) / sum(sum(run.shapes.values()) for run, _ in runs),
        percent_of_possible=100 * kept / possible if possible else None,
        bound=BoundCheck(percent, kept / requests) if percent else None,
    )


def _flags(cell: CellResult, results: BenchResults) -> tuple[str, ...]:
    stable = all(run.samples.stable for run in cell.runs)
    holds = {
        "quick": results.settings.quick,
        "unstable": not stable and cell.scenario != "server",
        "overloaded": not stable and cell.scenario == "server",
        "busy": any(max(run.idle.cpu_percent, run.idle.gpu_percent or 0) > _BUSY_PERCENT for run in cell.runs),
        "throttled": any(run.monitored and run.monitored.throttled for run in cell.runs),
    }
    return tuple(flag for flag in FLAGS if holds[flag])


def _low_precision(cell: CellResult) -> str | None:
    convolutions = cell.runs[-1].convolutions
    if not convolutions:
        return None
    total = sum(convolutions.values())
    return f"{total - convolutions.get('fp32', 0)}/{total}"


def _not_lowered(cell: CellResult) -> str | None:
    run = cell.runs[-1]
    if cell.precision == "fp32" or not run.convolutions or not run.convolutions.get("fp32"):
        return None
    lines = run.not_low_precision
    first = f": {shorten(lines[0], _REASON_WIDTH, placeholder=' ...')}" if lines else ""
    more = f", and {len(lines) - 1} more reason{'s' if len(lines) > 2 else ''}" if lines and len(lines) > 1 else ""
    total = sum(run.convolutions.values())
    return f"{run.convolutions['fp32']} of {total} convolutions not in {cell.precision}{first}{more}"


def _note(cell: CellResult) -> str | None:
    if cell.status == "ok":
        no_accuracy = f"no mAP: {cell.accuracy_reason}" if cell.accuracy_reason else None
        return "; ".join(filter(None, (_not_lowered(cell), no_accuracy))) or None
    remedy = f"; {cell.remedy.rstrip('.')}" if cell.remedy else ""
    return f"{cell.status}: {cell.reason}{remedy}"
