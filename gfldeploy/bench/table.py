"""Results as rows of a table, and its columns: statistics are computed here, from the raw samples.

The terminal, the CSV file and the page all go through the one list of `COLUMNS`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from textwrap import shorten

from gfldeploy.bench.estimates import Estimate, median, percentile, supports
from gfldeploy.bench.results import BenchResults, CellResult, Peak, Run, Scenario, ServerPolicy, Status
from gfldeploy.engines.base import Device, Precision

__all__ = [
    "COLUMNS",
    "FLAGS",
    "NOT_MEASURED",
    "STREAMS",
    "TEXT_KEYS",
    "UNKNOWN",
    "BoundCheck",
    "Column",
    "Row",
    "Served",
    "Value",
    "best_of_each",
    "notes",
    "rows",
    "several_bundles",
    "text_of",
]

# What is said of a measured cell without an mAP, and of one without times from file to boxes.
UNKNOWN, NOT_MEASURED = "unknown", "not measured"

# The two scenarios that a batch size tells apart.
STREAMS: tuple[Scenario, ...] = ("single-stream", "multi-stream")

# Why a measured cell is to be read with care.
FLAGS: Mapping[str, str] = {
    "quick": "measured too briefly for figures to be quoted: a first look",
    "unstable": "the latencies had not settled when the time was up",
    "overloaded": "the server fell behind the arrivals, or turned many away",
    "busy": "other processes used more than 20 % of the CPUs or of the GPU before a run",
    "throttled": "the hardware ran below full speed",
    "padded": "batches hold images of several sizes, padded to the largest, which changes boxes and scores (group "
    "normalisation takes in the padding); mAP is of batch 1",
}
_BUSY_PERCENT = 20.0

# Percentiles that the bound of the server scenario may be judged by, the best first.
_BOUND_PERCENTS = (99, 95, 90, 50)

# Characters of a reason, which names every convolution that it holds for; results.json has it whole.
_REASON_WIDTH = 120
# oneDNN names a convolution by its shape, batch and image size included, which tell no reason apart.
_SHAPES = re.compile(r"\bmb\d+_(?:g\d+)?(ic\d+oc\d+)_\w+")


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

    `bundle` is the name of its directory. `file_ms`, `file_p90_ms`, `file_p99_ms`: of the latency of a batch from file
    to boxes (decode, preprocess, network, NMS), all rounds together, with intervals; the percentiles only where the
    samples support them (`estimates.supports`). `file_images_per_s`: of the same batches, one after the other, nothing
    overlapping. `median_ms`, `p90_ms`, `p99_ms`, `images_per_s`: of the network alone on prepared batches, by wall
    time; of servers, from the arrival of an image to the end of its batch.
    `ap`: COCO's, 0 to 1; see `accuracy`. `low_precision`: convolutions that ran in less than FP32, of all, such as
    "53 of 53". `memory_mb`: the peak resident memory less the prepared inputs, 10^6 bytes.

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
    file_ms: Estimate | None
    file_p90_ms: Estimate | None
    file_p99_ms: Estimate | None
    file_images_per_s: float | None
    median_ms: Estimate | None
    p90_ms: Estimate | None
    p99_ms: Estimate | None
    images_per_s: float | None
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


def rows(results: BenchResults) -> list[Row]:
    """One row for each cell, in the results' order."""
    return [_row(cell, results) for cell in results.cells]


def best_of_each(shown: Sequence[Row]) -> list[Row]:
    """The best batch of each bundle, engine, precision, device and number of threads, the fastest first.

    The best is that with most images a second from file to boxes; of the network alone where none of the rows has that.
    Servers are left out: they are compared by what they answer in time.
    """
    best: dict[Hashable, Row] = {}
    for row in shown:
        if row.status != "ok" or row.scenario == "server":
            continue
        key = (row.bundle, row.engine, row.precision, row.device, row.threads)
        if key not in best or _speed(row) > _speed(best[key]):
            best[key] = row
    return sorted(best.values(), key=_speed, reverse=True)


def several_bundles(some: Sequence[Row]) -> bool:
    """Whether an engine ran several bundles in one precision, so that only the bundle tells the rows apart."""
    return len({(row.engine, row.precision, row.bundle) for row in some}) > len(
        {(row.engine, row.precision) for row in some}
    )


def notes(shown: Sequence[Row]) -> list[tuple[str, str]]:
    """Each note of the rows once, with the names of those that it holds for: "paddle bf16 batch 1, 2; ..."."""
    found: dict[str, dict[tuple[str, str], list[int]]] = {}
    bundles = len({row.bundle for row in shown if row.bundle}) > 1
    for row in shown:
        if row.note:
            more = "" if row.scenario in (None, *STREAMS) else f" {row.scenario}"
            more += f" {row.rate:g}/s {row.policy}" if row.rate else ""
            for name, several in (("device", "on {}"), ("threads", "with {} threads")):
                if len({getattr(one, name) for one in shown}) > 1:
                    more += f" {several.format(getattr(row, name))}"
            more += f" of {row.bundle}" if row.bundle and bundles else ""
            sizes = found.setdefault(row.note, {}).setdefault((f"{row.engine} {row.precision}", more), [])
            if row.batch_size and row.batch_size not in sizes:
                sizes.append(row.batch_size)
    return [
        (
            note,
            "; ".join(
                f"{name}{' batch ' + ', '.join(map(str, sizes)) if sizes else ''}{more}"
                for (name, more), sizes in some.items()
            ),
        )
        for note, some in found.items()
    ]


def _speed(row: Row) -> tuple[float, float]:
    return row.file_images_per_s or 0.0, row.images_per_s or 0.0


def _images_per_s(cell: CellResult) -> float:
    """Completed images by wall time through the network alone, over all rounds of a measured cell."""
    return sum(run.samples.images for run in cell.runs) / sum(run.samples.wall_s for run in cell.runs)


def _row(cell: CellResult, results: BenchResults) -> Row:
    ok = cell.status == "ok"
    latency_ms = cell.latency_ms if ok else ()
    file_ms = cell.file_ms if ok else ()
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
        file_ms=median(file_ms) if file_ms else None,
        file_p90_ms=_supported(file_ms, 90),
        file_p99_ms=_supported(file_ms, 99),
        file_images_per_s=_file_images_per_s(cell, file_ms),
        median_ms=median(latency_ms) if ok else None,
        p90_ms=_supported(latency_ms, 90),
        p99_ms=_supported(latency_ms, 99),
        images_per_s=_images_per_s(cell) if ok else None,
        ap=cell.ap if ok else None,
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


def _file_images_per_s(cell: CellResult, file_ms: Sequence[float]) -> float | None:
    seconds = sum(file_ms) / 1e3
    return len(file_ms) * (cell.batch_size or 0) / seconds if seconds > 0 else None


def _gmac_per_s(cell: CellResult) -> float | None:
    return cell.work.padded_macs * _images_per_s(cell) / 1e9 if cell.work else None


def _traffic_gb_per_s(cell: CellResult) -> float | None:
    return cell.work.traffic_mb * _images_per_s(cell) / 1e3 if cell.work else None


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
        "padded": any(_is_mixed(run, cell, results) for run in cell.runs),
    }
    return tuple(flag for flag in FLAGS if holds[flag])


def _is_mixed(run: Run, cell: CellResult, results: BenchResults) -> bool:
    """Whether batches held images of several sizes; where that was not recorded, whether they are padded more than the
    same bundle's images one at a time."""
    if run.mixed_batches is not None:
        return run.mixed_batches > 0
    alone = [
        one.padding_ratio
        for other in results.cells
        if other.bundle == cell.bundle and other.batch_size == 1
        for one in other.runs
    ]
    return bool(alone) and run.padding_ratio > min(alone) * (1 + 1e-9)


def _low_precision(cell: CellResult) -> str | None:
    convolutions = cell.runs[-1].convolutions
    if not convolutions:
        return None
    total = sum(convolutions.values())
    return f"{total - convolutions.get('fp32', 0)} of {total}"


def _not_lowered(cell: CellResult) -> str | None:
    run = cell.runs[-1]
    if cell.precision == "fp32" or not run.convolutions or not run.convolutions.get("fp32"):
        return None
    lines = [_SHAPES.sub(r"\1", line) for line in run.not_low_precision or ()]
    first = f": {shorten(lines[0], _REASON_WIDTH, placeholder=' ...')}" if lines else ""
    more = f", and {len(lines) - 1} more reason{'s' if len(lines) > 2 else ''}" if len(lines) > 1 else ""
    total = sum(run.convolutions.values())
    return f"{run.convolutions['fp32']} of {total} convolutions not in {cell.precision}{first}{more}"


def _note(cell: CellResult) -> str | None:
    if cell.status == "ok":
        no_accuracy = f"no mAP: {cell.accuracy_reason}" if cell.accuracy_reason else None
        if cell.accuracy and cell.ap is None:
            no_accuracy = "no mAP: it is undefined, as the images have no objects to find"
        return "; ".join(filter(None, (_not_lowered(cell), no_accuracy))) or None
    remedy = f"; {cell.remedy.rstrip('.')}" if cell.remedy else ""
    return f"{cell.status}: {cell.reason}{remedy}"


Value = str | int | float | Estimate | None


@dataclass(frozen=True)
class Column:
    """One column of the table, wherever it is shown.

    `key`: its name in the CSV file. `header`: what people read, units included. `value`: of a row, None for nothing to
    show. `digits`: of a number; None for as many as its size deserves. `drop`: of a terminal that is too narrow, the
    highest goes first; 0 for never. `interval`: the value is an `Estimate`, which takes three columns of the CSV file.
    `constant`: shown only if the rows differ in it.
    """

    key: str
    header: str
    value: Callable[[Row], Value]
    digits: int | None = None
    drop: int = 0
    interval: bool = False
    constant: bool = False

    def shown(self, some: Sequence[Row]) -> bool:
        """Whether it says anything of these rows."""
        values = {self.value(row) for row in some}
        return len(values) > 1 if self.constant else values != {None}


def text_of(value: Value, digits: int | None = None, interval: bool = True) -> str:
    """A value as text.

    An estimate has its interval, unless `interval` is False: "12.3 ±0.2" where that is as wide on both sides, else
    "12.3 (12.2-12.8)".
    """
    if isinstance(value, Estimate):
        digits = _digits(value.value) if digits is None else digits
        text = f"{value.value:.{digits}f}"
        if not interval or value.low is None or value.high is None:
            return text
        below, above = (f"{width:.{digits}f}" for width in (value.value - value.low, value.high - value.value))
        return f"{text} ±{above}" if below == above else f"{text} ({value.low:.{digits}f}-{value.high:.{digits}f})"
    if isinstance(value, float):
        return f"{value:.{_digits(value) if digits is None else digits}f}"
    return "" if value is None else str(value)


def _digits(value: float) -> int:
    return 3 if abs(value) < 1 else 2 if abs(value) < 100 else 1


def _streams(value: Callable[[Row], Value]) -> Callable[[Row], Value]:
    """Of all scenarios but the server's, whose latencies are not of the network alone."""
    return lambda row: None if row.scenario == "server" else value(row)


def _servers(value: Callable[[Row], Value]) -> Callable[[Row], Value]:
    return lambda row: value(row) if row.scenario == "server" else None


def _of_served(value: Callable[[Served], Value]) -> Callable[[Row], Value]:
    return lambda row: value(row.served) if row.served else None


def _file(value: Callable[[Row], Value]) -> Callable[[Row], Value]:
    """What is measured of whole batches from file to boxes; not of servers."""

    def of(row: Row) -> Value:
        if row.status != "ok" or row.scenario == "server":
            return None
        found = value(row)
        return NOT_MEASURED if found is None else found

    return of


def _scenario(row: Row) -> str | None:
    return None if row.scenario in STREAMS else row.scenario


def _rate(row: Row) -> Value:
    return int(row.rate) if row.rate and row.rate.is_integer() else row.rate


def _ap(row: Row) -> Value:
    if row.status != "ok":
        return None
    return UNKNOWN if row.ap is None else row.ap


def _bound_held(served: Served) -> str | None:
    return None if served.bound is None else f"{'yes' if served.bound.held else 'no'} (p{served.bound.percent})"


COLUMNS: tuple[Column, ...] = (
    Column("engine", "engine", lambda row: row.engine),
    Column("precision", "precision", lambda row: row.precision),
    Column("bundle", "bundle", lambda row: row.bundle, drop=7, constant=True),
    Column("device", "device", lambda row: row.device, constant=True),
    Column("threads", "threads", lambda row: row.threads, constant=True),
    Column("scenario", "scenario", _scenario, constant=True),
    Column("rate_per_s", "arriving/s", _rate, constant=True),
    Column("policy", "policy", lambda row: row.policy),
    Column("batch_size", "batch", lambda row: row.batch_size),
    Column("file_to_boxes_images_per_s", "file to\nboxes,\nimages/s", _file(lambda row: row.file_images_per_s)),
    Column("in_time_per_s", "in time,\nimages/s", _of_served(lambda served: served.in_time_per_s)),
    Column("ap", "mAP", _ap, 4),
    Column("file_to_boxes_median_ms", "file to\nboxes,\nms", _file(lambda row: row.file_ms), drop=4, interval=True),
    Column("file_to_boxes_p90_ms", "file to\nboxes,\np90 ms", lambda row: row.file_p90_ms, drop=13, interval=True),
    Column("file_to_boxes_p99_ms", "file to\nboxes,\np99 ms", lambda row: row.file_p99_ms, drop=11, interval=True),
    Column("percent_of_possible", "% of\npossible", _of_served(lambda served: served.percent_of_possible), 0, drop=2),
    Column("rejected_percent", "turned\naway, %", _of_served(lambda served: 100 * served.rejected), 0, drop=3),
    Column("answer_median_ms", "arrival to\nanswer, ms", _servers(lambda row: row.median_ms), drop=4, interval=True),
    Column("answer_p90_ms", "answer,\np90 ms", _servers(lambda row: row.p90_ms), drop=13, interval=True),
    Column("answer_p99_ms", "answer,\np99 ms", _servers(lambda row: row.p99_ms), drop=6, interval=True),
    Column("bound_held", "bound\nheld", _of_served(_bound_held), drop=6),
    Column("mean_batch", "mean\nbatch", _of_served(lambda served: served.mean_batch), 1, drop=9),
    Column("memory_mb", "memory\nMB", lambda row: row.memory_mb, 0, drop=5),
    Column("network_images_per_s", "network,\nimages/s", _streams(lambda row: row.images_per_s), drop=3),
    Column("network_median_ms", "network,\nms", _streams(lambda row: row.median_ms), drop=8, interval=True),
    Column("network_p90_ms", "network,\np90 ms", _streams(lambda row: row.p90_ms), drop=14, interval=True),
    Column("network_p99_ms", "network,\np99 ms", _streams(lambda row: row.p99_ms), drop=12, interval=True),
    Column("low_precision_convolutions", "low-prec.\nconvs", lambda row: row.low_precision, drop=10),
    Column("gmac_per_s", "GMAC/s", lambda row: row.gmac_per_s, 1, drop=15),
    Column("percent_of_peak", "% of\npeak", lambda row: row.percent_of_peak, 0, drop=11),
    Column("percent_of_bandwidth", "% of\nbandwidth", lambda row: row.percent_of_bandwidth, 0, drop=15),
    Column("padding", "padding", lambda row: row.padding, 2, drop=9),
    Column("flags", "flags", lambda row: " ".join(row.flags) or None, drop=6),
)
# Columns of words, which stand at the left edge; all others are numbers.
TEXT_KEYS = ("engine", "precision", "bundle", "device", "scenario", "policy", "bound_held", "flags")
