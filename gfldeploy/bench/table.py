"""Results as rows of a table: statistics are computed here, from the raw samples."""

from __future__ import annotations

from dataclasses import dataclass
from textwrap import shorten

from gfldeploy.bench.results import BenchResults, CellResult
from gfldeploy.bench.timing import median, percentile

__all__ = ["Row", "images_per_s", "rows"]

# Characters of a reason, which names every convolution that it holds for; results.json has it whole.
_REASON_WIDTH = 120


@dataclass(frozen=True)
class Row:
    """One line. None where there is nothing to show.

    `latency_ms` is the median and `p90_ms` the 90th percentile of a whole batch; `images_per_s` are the completed
    images by the wall time. `low_precision`: convolutions that ran in less than FP32, of all, such as "53/53".
    `memory_mb`: the peak resident memory less the prepared inputs, 10^6 bytes. `note`: why a cell was skipped or
    failed, why there is no accuracy, how many convolutions did not run in the low precision asked for and why.
    """

    bundle: str | None
    engine: str
    precision: str
    batch_size: int | None
    latency_ms: float | None
    p90_ms: float | None
    images_per_s: float | None
    ap: float | None
    low_precision: str | None
    memory_mb: float | None
    note: str | None


def rows(results: BenchResults) -> list[Row]:
    """One row for each cell, in the results' order. Of a failed cell nothing but the reason is shown."""
    return [_row(cell) for cell in results.cells]


def _row(cell: CellResult) -> Row:
    ok = cell.status == "ok"
    latency_ms = cell.latency_ms
    return Row(
        bundle=cell.bundle.directory if cell.bundle else None,
        engine=cell.engine,
        precision=cell.precision,
        batch_size=cell.batch_size,
        latency_ms=median(latency_ms) if ok else None,
        p90_ms=percentile(latency_ms, 90) if ok else None,
        images_per_s=images_per_s(cell) if ok else None,
        ap=cell.accuracy.ap if ok and cell.accuracy else None,
        low_precision=_low_precision(cell) if ok else None,
        memory_mb=max(run.peak_rss_mb - run.inputs_mb for run in cell.runs) if ok else None,
        note=_note(cell),
    )


def images_per_s(cell: CellResult) -> float:
    """Completed images by wall time, over all rounds of a measured cell."""
    return sum(run.samples.images for run in cell.runs) / sum(run.samples.wall_s for run in cell.runs)


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
