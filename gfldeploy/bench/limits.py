"""What keeps a cell of a benchmark from running faster, and from which batch size on, by what `bench` measured."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from statistics import fmean

from gfldeploy.batching.buckets import Order
from gfldeploy.bench.cell import Cell, Scenario
from gfldeploy.bench.table import Row
from gfldeploy.bench.timing import Stages

# Throughputs that differ by less count as the same: short runs of one cell do so.
_NOTICEABLE = 0.05
# From these shares on a limit is named. Of the peak, and of the memory's bandwidth, in per cent:
_SATURATED = 70.0
# Of the time of the network and its copies:
_TRANSFERS = 0.2
# Of the time from file to boxes:
_HOST = 0.5
# Of the time of the network, in per cent, in which no kernel runs and nothing is copied:
_IDLE = 10.0
# Of the highest clock:
_LOWERED = 0.95


@dataclass(frozen=True)
class StageTimes:
    """Milliseconds of one image in a batch from file to boxes, means; the fields are those of `Stages`.

    `input_gb_per_s`: 10^9 bytes a second of the copy to the device; None where nothing is copied.
    """

    decode_ms: float
    preprocess_ms: float
    input_copy_ms: float
    inference_ms: float
    output_copy_ms: float
    postprocess_ms: float
    end_to_end_ms: float
    input_gb_per_s: float | None

    @property
    def host_share(self) -> float:
        """Decoding, preprocessing and NMS, of the time from file to boxes."""
        return (self.decode_ms + self.preprocess_ms + self.postprocess_ms) / self.end_to_end_ms

    @property
    def transfer_share(self) -> float:
        """Both copies, of their time and that of the network."""
        copies = self.input_copy_ms + self.output_copy_ms
        return copies / (copies + self.inference_ms) if copies else 0.0


def stage_times(row: Row) -> StageTimes | None:
    """Of all rounds; None where no stages were timed."""
    stages = [run.stages for run in row.result.runs if run.stages and min(run.stages.end_to_end_ms, default=0) > 0]
    if not row.ok or not stages:
        return None
    means = {
        field.name: fmean(value for one in stages for value in getattr(one, field.name)) / row.cell.query_images
        for field in fields(Stages)
    }
    counted = [(math.prod(map(int, shape.split("x"))), n) for shape, n in row.result.runs[0].shapes.items()]
    images = row.cell.batch_size * sum(n for _, n in counted)
    if row.cell.tiling is not None:
        images = row.results.data.timed_images
    values = sum(size * n for size, n in counted) / images
    # A copy of no time is none: the engine reads the caller's memory.
    copied = means["input_copy_ms"] > 1e-3 and row.cell.device == "gpu"
    return StageTimes(**means, input_gb_per_s=4 * values / means["input_copy_ms"] / 1e6 if copied else None)


def network_limits(row: Row) -> list[str]:
    """What limits the network alone in this cell, as clauses: all that was measured, () where nothing was.

    The peak is that of the same engine at the clocks of this machine.
    """
    found = []
    times = stage_times(row)
    transfers = times.transfer_share if times else 0.0
    if times and transfers >= _TRANSFERS:
        speed = f", {times.input_gb_per_s:.1f} GB/s to the device" if times.input_gb_per_s else ""
        found.append(f"transfers take {transfers:.0%} of its time{speed}")
    arithmetic, memory = row.percent_of_peak, row.percent_of_bandwidth
    if arithmetic and arithmetic >= _SATURATED:
        found.append(f"the arithmetic is saturated: {arithmetic:.0f}% of what the engine reaches on convolutions alone")
    if memory and memory >= _SATURATED:
        found.append(f"the memory is saturated: {memory:.0f}% of its bandwidth")
    if clocks := _lowered(row):
        found.append(clocks)
    idle = 100 - row.gpu_percent - 100 * transfers if row.gpu_percent is not None else 0.0
    if idle >= _IDLE:
        found.append(f"no kernel runs for {idle:.0f}% of the time: the host does not launch them fast enough")
    if not found and arithmetic:
        more = f" and {memory:.0f}% of the memory's bandwidth, so that neither is the limit" if memory else ""
        kernels = "small kernels and " if row.cell.device == "gpu" else ""
        found.append(
            f"it reaches {arithmetic:.0f}% of what the engine does on convolutions alone{more}: {kernels}the operators "
            "between the convolutions remain"
        )
    return found


def explain(rows: Sequence[Row]) -> list[str]:
    """For each engine and precision: from which batch size on throughput rises no more and why, in sentences."""
    measured = [row for row in rows if row.ok and not row.is_server and row.images_per_s]
    cells = [row.cell for row in measured]
    told = []
    for setup in dict.fromkeys(map(alone, cells)):
        mine = [row for row in measured if alone(row.cell) == setup]
        lines = {order: line(mine, order) for order in ("bucketed", "listed")}
        own = max(lines.values(), key=lambda some: (len(some), some is lines["bucketed"]))
        sentences = [*_rise(own), *_padding(lines["bucketed"], lines["listed"]), *_host(own)]
        told.append(f"{setup.setup(cells)}: {' '.join(sentences)}")
    return told


def explain_padding(rows: Sequence[Row]) -> list[str]:
    """For each engine and precision, what padding to a common size costs, where both orders were measured."""
    cells = [row.cell for row in rows]
    told = []
    for setup in dict.fromkeys(map(alone, cells)):
        mine = [row for row in rows if row.ok and not row.is_server and row.images_per_s and alone(row.cell) == setup]
        told += [f"{setup.setup(cells)}: {one}" for one in _padding(line(mine, "bucketed"), line(mine, "listed"))]
    return told


def alone(cell: Cell) -> Cell:
    """The cell of batches of 1 with the same engine, precision, device, threads, streams and bundle."""
    scenario: Scenario = "single-stream" if cell.streams == 1 else "offline"
    return replace(cell, batch_size=1, order="listed", scenario=scenario, rate=None, policy=None)


def line(rows: Sequence[Row], order: Order) -> list[Row]:
    """Those of one order by batch size, batch 1, which has none, included."""
    return sorted(
        (row for row in rows if row.cell.batch_size == 1 or row.cell.order == order),
        key=lambda row: row.cell.batch_size,
    )


def knee(some: Sequence[Row]) -> Row:
    """The smallest batch of which no other is faster beyond the noise, by the network alone."""
    most = max(row.images_per_s or 0.0 for row in some)
    return next(row for row in some if (row.images_per_s or 0.0) * (1 + _NOTICEABLE) >= most)


def _rise(some: Sequence[Row]) -> Iterator[str]:
    last, found = some[-1], knee(some)
    if len(some) == 1:
        yield f"{_speed(last)}, the one batch size measured."
    elif found is last:
        yield f"{_speed(some[0])}, {_speed(last)}: throughput still rises there, and a larger batch may gain more."
    else:
        more = f", {_speed(found)}" if found is not some[0] else ""
        yield f"{_speed(some[0])}{more}, {_speed(last)}: no larger batch is faster than batch {found.cell.batch_size}."
    if reasons := network_limits(last):
        yield f"At batch {last.cell.batch_size} {'; '.join(reasons)}."
    else:
        yield "What limits it was not measured."


def _padding(bucketed: Sequence[Row], listed: Sequence[Row]) -> Iterator[str]:
    """What batches of both orientations cost at the largest size measured both ways."""
    pairs = [
        (one, other)
        for one in bucketed
        for other in listed
        if one.cell.batch_size == other.cell.batch_size > 1 and "padded" in other.flags
    ]
    if not pairs:
        return
    one, other = pairs[-1]
    ratio = (one.images_per_s or 0.0) / (other.images_per_s or 1.0)
    pixels = (other.padding or 1.0) / (one.padding or 1.0)
    yield (
        f"Batches of several sizes have {pixels:.2f} times the pixels; those of one size are {ratio:.2f} times "
        f"as fast at batch {one.cell.batch_size}."
    )


def _host(some: Sequence[Row]) -> Iterator[str]:
    timed = [(row, times) for row in some if row.file_images_per_s and (times := stage_times(row))]
    if not timed:
        return
    row, times = max(timed, key=lambda one: one[0].file_images_per_s or 0.0)
    yield f"From file to boxes {row.file_images_per_s:.4g} images/s at best (batch {row.cell.batch_size})"
    yield (
        f"with {times.host_share:.0%} of the time in decoding, preprocessing and NMS"
        f"{', which no larger batch shortens: run them beside the network' if times.host_share >= _HOST else ''}."
    )


def _lowered(row: Row) -> str | None:
    """That the GPU's clock is lowered, to what and why."""
    records = [run.monitored for run in row.result.runs if run.monitored]
    most = max((one.gpu_most_clock_mhz or 0.0 for one in records), default=0.0)
    why = dict.fromkeys(reason for one in records for reason in one.throttled if reason.startswith("GPU: "))
    if not row.gpu_clock_mhz or not most or not why or row.gpu_clock_mhz >= _LOWERED * most:
        return None
    power = next((one.gpu_most_power_w for one in records if one.gpu_most_power_w), None)
    watts = f", {row.gpu_power_w:.0f} of {power:.0f} W" if row.gpu_power_w and power else ""
    reasons = "; ".join(reason.removeprefix("GPU: ") for reason in why)
    return f"the clock is lowered to {row.gpu_clock_mhz:.0f} of {most:.0f} MHz ({reasons}{watts})"


def _speed(row: Row) -> str:
    return f"{row.images_per_s:.4g} images/s at batch {row.cell.batch_size}"
