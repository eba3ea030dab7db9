"""Results as rows of a table, and its columns: statistics are computed here, from the raw samples.

The terminal, the CSV file and the page all go through the one list of `COLUMNS`; the CSV file is written here.
"""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from statistics import fmean
from textwrap import shorten
from typing import Literal

from gfldeploy.batching.buckets import size_in_words
from gfldeploy.bench.cell import STREAMS, Cell, names
from gfldeploy.bench.columns import Column, Value
from gfldeploy.bench.estimates import Estimate, percentile, supports
from gfldeploy.bench.monitor import BUSY_PERCENT
from gfldeploy.bench.results import BenchResults, CellResult, Parity, Run
from gfldeploy.files import write_text
from gfldeploy.text import spreadsheet_cell

# What is said of a measured cell without an mAP, and of one without times from file to boxes.
UNKNOWN, NOT_MEASURED = "unknown", "not measured"

# Why a measured cell is to be read with care.
FLAGS: Mapping[str, str] = {
    "quick": "measured too briefly for figures to be quoted: a first look",
    "unstable": "the latencies had not settled when the time was up",
    "overloaded": "the server fell behind the arrivals, or rejected many of them",
    "late": "the load generator itself sent requests late, by more than a tenth of the latency bound, and these "
    "latencies have its own delays in them",
    "busy": "other processes used more than 20 % of the CPUs or of the GPU before a run",
    "throttled": "the hardware ran below full speed",
    "padded": "batches hold images of several sizes, padded to the largest, which changes boxes and scores (group "
    "normalisation takes in the padding); mAP is of batch 1",
}

# The window over which a GPU averages what it says of itself; its energy counter is coarse below that, too.
_SETTLED_S = 1.0

# Of the latency bound: what a load generator may be late itself.
_LATE = 0.1

# Percentiles that the bound of the server scenario may be judged by, the best first.
_BOUND_PERCENTS = (99, 95, 90, 50)

# Characters of a reason, which names every convolution that it holds for; results.json has it whole.
_REASON_WIDTH = 120
# oneDNN names a convolution by its shape, batch and image size included, which tell no reason apart.
_SHAPES = re.compile(r"\bmb\d+_(?:g\d+)?(ic\d+oc\d+)_\w+")


@dataclass(frozen=True)
class Served:
    """What became of the images that arrived at a server, in all rounds.

    `in_time`: how many were answered within the bound, in `seconds`. `rejected`: the share that was, 0 to 1, and
    `failed` that had no answer, or an error. `mean_batch`: images in a batch, None where that is not known.
    `percent_of_possible`: answered within the bound, of what no policy could do better than with batches up to this
    size (`Serving.most_kept`); None if that is nothing. `kept`: answered within the bound, of all that arrived, 0 to 1.
    `percent`: the highest percentile up to 99 that so many images support, None for too few to judge by. `late_ms`:
    over HTTP, the 99th percentile of how late the client sent (the largest of fewer), else None.
    """

    in_time: int
    seconds: float
    rejected: float
    failed: float
    mean_batch: float | None
    percent_of_possible: float | None
    kept: float
    percent: int | None
    late_ms: float | None

    @property
    def in_time_per_s(self) -> float:
        """Images answered within the bound, a second."""
        return self.in_time / self.seconds

    @property
    def bound_held(self) -> str | None:
        """Whether that percentile kept the bound: "yes (p99)"."""
        if self.percent is None:
            return None
        return f"{'yes' if self.kept >= self.percent / 100 else 'no'} (p{self.percent})"


@dataclass(frozen=True, eq=False)
class Row:
    """One cell of the `results`, with its statistics: None where there is nothing to show, as of cells that are not ok.

    Those whose name begins with `file` are of whole batches from file to boxes (decode, preprocess, network, NMS), one
    after the other, nothing overlapping. The other latencies and speeds are of the network alone on prepared batches,
    by wall time; of servers, from the arrival of an image that was not rejected to the end of its batch, over HTTP to
    its answer. All rounds
    count together. Percentiles are only there where the samples support them (`estimates.supports`). `on_front`:
    whether no other row is as fast and as accurate, and better in one of them (`rows`).
    """

    result: CellResult
    results: BenchResults
    on_front: bool = False

    @property
    def cell(self) -> Cell:
        """What was measured."""
        return self.result.cell

    @property
    def ok(self) -> bool:
        """Whether it was measured."""
        return self.result.status == "ok"

    @property
    def is_server(self) -> bool:
        """Whether its latencies are those of a server."""
        return self.cell.is_server

    def file_ms(self, percent: int = 50) -> Estimate | None:
        """A percentile of the latency of a batch from file to boxes; the median even of few."""
        return self._percentile(self.result.file_ms, percent)

    @cached_property
    def file_images_per_s(self) -> float | None:
        """Images a second from file to boxes, while all streams are at work."""
        seconds = sum(self.result.file_ms) / 1e3 / self.cell.streams if self.ok else 0
        return len(self.result.file_ms) * self.cell.query_images / seconds if seconds > 0 else None

    def latency_ms(self, percent: int = 50) -> Estimate | None:
        """A percentile of the latency of a batch through the network alone; of servers, of an image."""
        return self._percentile(self.result.latency_ms, percent)

    @cached_property
    def images_per_s(self) -> float | None:
        """Images a second through the network alone."""
        runs = self.result.runs
        return sum(run.samples.images for run in runs) / sum(run.samples.wall_s for run in runs) if self.ok else None

    @property
    def deciding_images_per_s(self) -> float | None:
        """From file to boxes; where none of the results has that, of the network alone. None of servers."""
        if self.is_server:
            return None
        whole = any(one.status == "ok" and one.file_ms for one in self.results.cells)
        return self.file_images_per_s if whole else self.images_per_s

    @property
    def ap(self) -> float | None:
        """COCO's mAP, 0 to 1."""
        return self.result.ap if self.ok else None

    @property
    def low_precision(self) -> str | None:
        """Convolutions that ran in less than FP32, of all, such as "53 of 53"."""
        convolutions = self.result.runs[-1].convolutions if self.ok else None
        if not convolutions:
            return None
        total = sum(convolutions.values())
        return f"{total - convolutions.get('fp32', 0)} of {total}"

    @property
    def parity(self) -> Parity | None:
        """How far the engine is from the CPU, of the round in which it is farthest; None where it was not compared."""
        found = [run.parity for run in self.result.runs if run.parity] if self.ok else []
        return max(found, key=lambda one: (one.score_difference_max, one.box_difference_max_px), default=None)

    @property
    def memory_mb(self) -> float | None:
        """The peak resident memory less the prepared inputs, 10^6 bytes."""
        found = [run.peak_rss_mb - run.inputs_mb for run in self.result.runs if run.peak_rss_mb is not None]
        return max(found) if self.ok and found else None

    @property
    def gpu_memory_mb(self) -> float | None:
        """Memory of the GPU that was taken since before the run, 10^6 bytes: the library's own, weights, maps."""
        found = [
            max(run.monitored.gpu_memory_mb) - run.idle.gpu_memory_mb
            for run in self.result.runs
            if run.monitored and run.monitored.gpu_memory_mb and run.idle and run.idle.gpu_memory_mb is not None
        ]
        return max(found) if self.ok and found else None

    @cached_property
    def gpu_percent(self) -> float | None:
        """Of the time of the network alone, how much a kernel ran on the GPU at all."""
        seen = [one for run in self.result.runs for one in _while_timed(run, "gpu_percent")]
        return fmean(seen) if self.ok and seen else None

    @cached_property
    def gpu_clock_mhz(self) -> float | None:
        """The GPU's multiprocessors, during the network alone."""
        seen = [one for run in self.result.runs for one in _while_timed(run, "gpu_clock_mhz")]
        return fmean(seen) if self.ok and seen else None

    @cached_property
    def gpu_power_w(self) -> float | None:
        """The GPU's board, during the network alone: by its own counter, else the samples of its power."""
        counted = [run.samples for run in self.result.runs if run.samples.energy_j is not None]
        seconds = sum(one.wall_s for one in counted)
        if self.ok and seconds >= _SETTLED_S:
            return sum(one.energy_j or 0.0 for one in counted) / seconds
        seen = [one for run in self.result.runs for one in _while_timed(run, "gpu_power_w")]
        return fmean(seen) if self.ok and seen else None

    @property
    def joules_per_image(self) -> float | None:
        """Of the GPU's board for an image through the network alone, the power that it takes idle included."""
        power, speed = self.gpu_power_w, self.images_per_s
        return power / speed if power and speed else None

    @property
    def gmac_per_s(self) -> float | None:
        """10^9 multiply-accumulates a second that the images took, padding included."""
        cost, speed = self.result.cost, self.images_per_s
        return cost.padded_macs * speed / 1e9 if cost and speed else None

    @property
    def percent_of_peak(self) -> float | None:
        """Of the multiply-accumulates a second that the engine reaches here at best."""
        return _percent(self.gmac_per_s, self.result.peak.gmac_per_s if self.result.peak else None)

    @property
    def percent_of_bandwidth(self) -> float | None:
        """Of what a large copy reaches here: the memory traffic of the images, each byte counted once."""
        cost, speed, peak = self.result.cost, self.images_per_s, self.result.peak
        if not cost or not speed or not peak:
            return None
        return _percent(cost.traffic_mb * speed / 1e3, peak.memory_gb_per_s)

    @property
    def padding(self) -> float | None:
        """Pixels of the batches by those of the images."""
        found = [run.padding_ratio for run in self.result.runs if run.padding_ratio is not None]
        return max(found) if self.ok and found else None

    @cached_property
    def served(self) -> Served | None:
        """What a server did with the images that arrived."""
        runs = [(run, run.serving) for run in self.result.runs if run.serving]
        bound_ms = self.results.settings.latency_bound_ms
        if not self.ok or not runs or bound_ms is None:
            return None
        requests = sum(serving.requests for _, serving in runs)
        kept = sum(value <= bound_ms for value in self.result.latency_ms)
        possible = sum(serving.most_kept or 0 for _, serving in runs)
        batches = sum(sum(run.shapes.values()) for run, _ in runs)
        late_ms = [late for _, serving in runs if serving.traffic for late in serving.traffic.late_ms]
        percent = next((percent for percent in _BOUND_PERCENTS if supports(requests, percent)), None)
        return Served(
            in_time=kept,
            seconds=sum(run.samples.wall_s for run, _ in runs),
            rejected=sum(serving.rejected for _, serving in runs) / requests,
            failed=sum(serving.failed for _, serving in runs) / requests,
            mean_batch=sum(run.samples.images for run, _ in runs) / batches if batches else None,
            percent_of_possible=100 * kept / possible if possible else None,
            kept=kept / requests,
            percent=percent,
            late_ms=percentile(late_ms, 99).value if supports(len(late_ms), 99) else max(late_ms, default=None),
        )

    @cached_property
    def flags(self) -> tuple[str, ...]:
        """Those of `FLAGS` that hold."""
        runs = self.result.runs if self.ok else ()
        unstable = not all(run.samples.stable for run in runs)
        bound_ms = self.results.settings.latency_bound_ms
        holds = {
            "quick": self.ok and self.results.settings.quick,
            "unstable": unstable and not self.is_server,
            "overloaded": unstable and self.is_server,
            "late": self.served is not None and (self.served.late_ms or 0) > _LATE * (bound_ms or math.inf),
            "busy": any(
                max(run.idle.cpu_percent, run.idle.gpu_percent or 0) > BUSY_PERCENT for run in runs if run.idle
            ),
            "throttled": any(run.monitored and run.monitored.throttled for run in runs),
            "padded": any(self._is_mixed(run) for run in runs),
        }
        return tuple(flag for flag in FLAGS if holds[flag])

    @cached_property
    def note(self) -> str | None:
        """Why it was skipped or failed, why there is no mAP, what did not run in the low precision asked for, and
        why it was not compared with the CPU."""
        result = self.result
        if not self.ok:
            remedy = f"; {result.remedy.rstrip('.')}" if result.remedy else ""
            return f"{result.status}: {result.reason}{remedy}"
        no_accuracy = f"no mAP: {result.accuracy_reason}" if result.accuracy_reason else None
        if result.accuracy and result.ap is None:
            no_accuracy = "no mAP: it is undefined, as the images have no objects to find"
        lacking = result.runs[-1].not_compared
        not_compared = f"not compared with the CPU: {lacking}" if lacking else None
        return "; ".join(filter(None, (self._not_lowered(), no_accuracy, not_compared))) or None

    def _percentile(self, latency_ms: Sequence[float], percent: int) -> Estimate | None:
        if not self.ok or not latency_ms or not (percent == 50 or supports(len(latency_ms), percent)):
            return None
        return percentile(latency_ms, percent)

    def _is_mixed(self, run: Run) -> bool:
        """Whether batches held images of several sizes; where that was not recorded, whether they are padded more than
        the same bundle's images one at a time."""
        if run.mixed_batches is not None:
            return run.mixed_batches > 0
        alone = [
            one.padding_ratio
            for other in self.results.cells
            if (other.cell.bundle, other.cell.input_size) == (self.cell.bundle, self.cell.input_size)
            and other.cell.batch_size == 1
            for one in other.runs
            if one.padding_ratio is not None
        ]
        return bool(alone) and run.padding_ratio is not None and run.padding_ratio > min(alone) * (1 + 1e-9)

    def _not_lowered(self) -> str | None:
        run = self.result.runs[-1]
        if self.cell.precision == "fp32" or not run.convolutions or not run.convolutions.get("fp32"):
            return None
        lines = [_SHAPES.sub(r"\1", line) for line in run.not_low_precision or ()]
        first = f": {shorten(lines[0], _REASON_WIDTH, placeholder=' ...')}" if lines else ""
        more = f", and {len(lines) - 1} more reason{'s' if len(lines) > 2 else ''}" if len(lines) > 1 else ""
        total = sum(run.convolutions.values())
        return f"{run.convolutions['fp32']} of {total} convolutions not in {self.cell.precision}{first}{more}"


def rows(results: BenchResults) -> list[Row]:
    """One row for each cell, in the results' order."""
    found = [Row(result, results) for result in results.cells]
    speeds = {row: row.deciding_images_per_s for row in found if row.ap is not None}
    points = {row: (speed, row.ap) for row, speed in speeds.items() if speed is not None and row.ap is not None}
    front = set(pareto_front(list(points.values())))
    return [replace(row, on_front=points.get(row) in front) for row in found]


def pareto_front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Those points (x, y) that no other is as good as in both and better than in one, by rising x; more is better."""
    front: list[tuple[float, float]] = []
    for x, y in sorted(set(points), key=lambda point: (-point[0], -point[1])):
        if not front or y > front[-1][1]:
            front.append((x, y))
    return front[::-1]


def best_of_each(shown: Sequence[Row]) -> list[Row]:
    """The best of the cells that differ in batch size, order, streams and scenario alone; the fastest first.

    Those of several streams are compared with others that have as many threads in all.

    The best is that with most images a second from file to boxes; of the network alone where none of the rows has that.
    Servers are left out: they are compared by what they answer in time.
    """
    best: dict[Cell, Row] = {}
    for row in shown:
        if not row.ok or row.is_server:
            continue
        threads = row.cell.threads * row.cell.streams
        key = replace(row.cell, batch_size=1, order="listed", scenario="single-stream", threads=threads, streams=1)
        if key not in best or _speed(row) > _speed(best[key]):
            best[key] = row
    return sorted(best.values(), key=_speed, reverse=True)


def notes(shown: Sequence[Row]) -> list[tuple[str, str]]:
    """Each note of the rows once, with the names of those that it holds for: "paddle bf16, batch 1, 2; ..."."""
    every = [row.cell for row in shown]
    found: dict[str, list[Cell]] = {}
    for row in shown:
        if row.note:
            found.setdefault(row.note, []).append(row.cell)
    return [(note, names(cells, every)) for note, cells in found.items()]


def _speed(row: Row) -> tuple[float, float]:
    return row.file_images_per_s or 0.0, row.images_per_s or 0.0


def _while_timed(run: Run, what: Literal["gpu_percent", "gpu_power_w", "gpu_clock_mhz"]) -> list[float]:
    """The samples from a second after the start of the timing of the network alone to its end.

    The GPU answers with means of up to the second before.
    """
    if run.monitored is None or run.serving:
        return []
    start = sum(run.samples.warmup_ms) / 1e3
    times = zip(run.monitored.t_s, getattr(run.monitored, what), strict=False)
    return [value for t, value in times if start + _SETTLED_S <= t <= start + run.samples.wall_s]


def _percent(reached: float | None, most: float | None) -> float | None:
    return 100 * reached / most if reached and most else None


def _percentiles(
    name: str, value: Callable[[Row, int], Value], drops: tuple[int, int, int], first: bool = False
) -> list[Column[Row]]:
    """The median, the 90th and the 99th percentile of latencies in milliseconds."""

    def column(percent: int, drop: int) -> Column[Row]:
        what = "" if percent == 50 else f" p{percent}"
        return Column(
            f"{name}_{'median' if percent == 50 else what.strip()}_ms",
            f"{name.replace('_', ' ')}{what}",
            lambda row: value(row, percent),
            "ms",
            drop=drop,
            interval=True,
            first=first and percent == 50,
        )

    return [column(percent, drop) for percent, drop in zip((50, 90, 99), drops, strict=True)]


def _of_served(value: Callable[[Served], Value]) -> Callable[[Row], Value]:
    return lambda row: value(row.served) if row.served else None


def _of_parity(value: Callable[[Parity], Value]) -> Callable[[Row], Value]:
    return lambda row: value(row.parity) if row.parity else None


def _file_ms(row: Row, percent: int) -> Value:
    found = None if row.is_server else row.file_ms(percent)
    return found or (NOT_MEASURED if percent == 50 and row.ok and not row.is_server else None)


def _file_images_per_s(row: Row) -> Value:
    if not row.ok or row.is_server:
        return None
    return NOT_MEASURED if row.file_images_per_s is None else row.file_images_per_s


def _network_images_per_s(row: Row) -> Value:
    return None if row.is_server else row.images_per_s


def _scenario(row: Row) -> Value:
    return None if row.cell.scenario in STREAMS else row.cell.scenario


def _input_size(row: Row) -> Value:
    """None where all cells of the results have the bundle's own."""
    if row.cell.input_size is not None:
        return size_in_words(row.cell.input_size)
    return "own" if any(one.cell.input_size for one in row.results.cells) else None


def _tiles(row: Row) -> Value:
    tiling = row.cell.tiling
    return None if tiling is None else f"{size_in_words(tiling.tile)}, overlap {tiling.overlap:g}"


def _rate(row: Row) -> Value:
    rate = row.cell.rate
    return int(rate) if rate and rate.is_integer() else rate


def _ap(row: Row) -> Value:
    if not row.ok or (row.ap is None and row.cell.scenario == "http"):
        return None
    return UNKNOWN if row.ap is None else row.ap


# In the order in which they are shown. A new column is one entry here.
COLUMNS: list[Column[Row]] = [
    Column("engine", "engine", lambda row: row.cell.engine, words=True, first=True),
    Column("precision", "precision", lambda row: row.cell.precision, words=True, first=True),
    Column("tf32", "TF32", lambda row: "yes" if row.cell.tf32 else None, words=True, first=True),
    Column("bundle", "bundle", lambda row: row.cell.bundle.directory, words=True, drop=7, constant=True, first=True),
    Column("device", "device", lambda row: row.cell.device, words=True, constant=True, first=True),
    Column("threads", "threads", lambda row: row.cell.threads, constant=True, first=True),
    Column("streams", "streams", lambda row: row.cell.streams, constant=True, first=True),
    Column("end_to_end", "by itself", lambda row: "yes" if row.cell.end_to_end else None, words=True, first=True),
    Column("input_size", "input size", _input_size, words=True, first=True),
    Column("tiles", "tiles", _tiles, words=True, first=True),
    Column("scenario", "scenario", _scenario, words=True, constant=True, first=True),
    Column("rate_per_s", "arriving/s", _rate, constant=True),
    Column("clients", "clients", lambda row: row.cell.clients, constant=True),
    Column("policy", "policy", lambda row: row.cell.policy, words=True),
    Column("batch_size", "batch", lambda row: row.cell.batch_size, first=True),
    Column("file_to_boxes_images_per_s", "file to boxes", _file_images_per_s, "images/s", first=True),
    Column("in_time_per_s", "in time", _of_served(lambda served: served.in_time_per_s), "images/s"),
    Column("ap", "mAP", _ap, digits=4, first=True),
    Column("pareto_front", "front", lambda row: "yes" if row.on_front else None, words=True, drop=1, first=True),
    *_percentiles("file_to_boxes", _file_ms, (4, 13, 11), first=True),
    Column("percent_of_possible", "% of possible", _of_served(lambda one: one.percent_of_possible), digits=0, drop=2),
    Column("rejected_percent", "rejected", _of_served(lambda served: 100 * served.rejected), "%", digits=0, drop=3),
    Column("failed_percent", "failed", _of_served(lambda one: 100 * one.failed or None), "%", digits=1, drop=3),
    *_percentiles("answer", lambda row, percent: row.latency_ms(percent) if row.is_server else None, (4, 13, 6)),
    Column("bound_held", "bound held", _of_served(lambda served: served.bound_held), words=True, drop=6),
    Column("client_late_ms", "sent late", _of_served(lambda served: served.late_ms), "ms", drop=8),
    Column("mean_batch", "mean batch", _of_served(lambda served: served.mean_batch), digits=1, drop=9),
    Column("memory_mb", "memory", lambda row: row.memory_mb, "MB", digits=0, drop=5, first=True),
    Column("network_images_per_s", "network", _network_images_per_s, "images/s", drop=3, first=True),
    *_percentiles("network", lambda row, percent: None if row.is_server else row.latency_ms(percent), (8, 14, 12)),
    Column("low_precision_convolutions", "low-prec. convs", lambda row: row.low_precision, drop=10),
    Column("gpu_memory_mb", "GPU memory", lambda row: row.gpu_memory_mb, "MB", digits=0, drop=7),
    Column("gpu_percent", "GPU busy", lambda row: row.gpu_percent, "%", digits=0, drop=12),
    Column("gpu_clock_mhz", "GPU clock", lambda row: row.gpu_clock_mhz, "MHz", digits=0, drop=14),
    Column("gpu_power_w", "GPU power", lambda row: row.gpu_power_w, "W", digits=0, drop=12),
    Column("joules_per_image", "energy", lambda row: row.joules_per_image, "J/image", drop=8),
    Column("gmac_per_s", "GMAC/s", lambda row: row.gmac_per_s, digits=1, drop=15),
    Column("percent_of_peak", "% of peak", lambda row: row.percent_of_peak, digits=0, drop=11),
    Column("percent_of_bandwidth", "% of bandwidth", lambda row: row.percent_of_bandwidth, digits=0, drop=15),
    Column("padding", "padding", lambda row: row.padding, digits=2, drop=9),
    Column(
        "cpu_score_difference", "score off CPU", _of_parity(lambda one: one.score_difference_max), digits=6, drop=16
    ),
    Column("cpu_box_difference_px", "box off CPU", _of_parity(lambda one: one.box_difference_max_px), "px", drop=16),
    Column("flags", "flags", lambda row: " ".join(row.flags) or None, words=True, drop=6, first=True),
]


def write_csv(results: BenchResults, path: Path) -> None:
    """Write one line for each cell below a line of column names, which hold the units; replaces any other file.

    Columns are `COLUMNS`, `status` and `note`; `_low` and `_high` are the bounds of 95 % intervals. A field is
    empty where there is nothing to show, but `ap` is "unknown" of a measured cell without one. Text that a spreadsheet
    would take for a formula has an apostrophe before it. Raises `OutputError`.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_names())
    for row in rows(results):
        writer.writerow([spreadsheet_cell(value) for value in (*_fields(row), row.result.status, row.note)])
    write_text(path, text.getvalue())


def _names() -> Iterator[str]:
    for column in COLUMNS:
        if column.interval:
            name = column.key.removesuffix("_ms")
            yield from (f"{name}{bound}_ms" for bound in ("", "_low", "_high"))
        else:
            yield column.key
    yield from ("status", "note")


def _fields(row: Row) -> Iterator[str | int | float | None]:
    """The values of the columns, as they are."""
    for column in COLUMNS:
        value = column.value(row)
        if value == NOT_MEASURED:
            value = None
        if isinstance(value, Estimate):
            yield from (value.value, value.low, value.high)
        else:
            yield value
            if column.interval:
                yield from (None, None)
