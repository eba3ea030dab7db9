"""Results as comma-separated values, for a spreadsheet or a data frame."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from pathlib import Path

from gfldeploy.bench.estimates import Estimate
from gfldeploy.bench.results import BenchResults
from gfldeploy.bench.table import UNKNOWN, Row, rows
from gfldeploy.files import write_text
from gfldeploy.text import spreadsheet_cell

__all__ = ["write_csv"]

Value = str | int | float | None


def write_csv(results: BenchResults, path: Path) -> None:
    """Write one line for each cell below a line of column names, which hold the units; replaces any other file.

    Columns are those of `table.Row`; `_low` and `_high` are the bounds of 95 % intervals. A field is empty where there
    is nothing to show, but `ap` is "unknown" of a measured cell without one. Text that a spreadsheet would take for a
    formula has an apostrophe before it. Raises `OutputError`.
    """
    text = io.StringIO()
    lines = [{name: spreadsheet_cell(value) for name, value in _fields(row)} for row in rows(results)]
    writer = csv.DictWriter(text, _COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    write_text(path, text.getvalue())


_COLUMNS = (
    "bundle",
    "engine",
    "precision",
    "device",
    "batch_size",
    "threads",
    "scenario",
    "rate_per_s",
    "policy",
    "status",
    *(f"{name}{bound}_ms" for name in ("median", "p90", "p99") for bound in ("", "_low", "_high")),
    "samples",
    "images_per_s",
    "end_to_end_ms",
    "ap",
    "low_precision_convolutions",
    "convolutions",
    "memory_mb",
    "gmac_per_s",
    "percent_of_peak",
    "percent_of_bandwidth",
    "padding",
    "in_time_per_s",
    "rejected",
    "mean_batch",
    "percent_of_possible",
    "bound_percentile",
    "bound_held",
    "flags",
    "note",
)


def _fields(row: Row) -> Iterator[tuple[str, Value]]:
    for name in ("bundle", "engine", "precision", "device", "batch_size", "threads", "scenario", "policy", "status"):
        yield name, getattr(row, name)
    yield "rate_per_s", row.rate
    for name, estimate in (("median", row.median_ms), ("p90", row.p90_ms), ("p99", row.p99_ms)):
        yield from _bounds(name, estimate)
    yield "samples", row.median_ms.n if row.median_ms else None
    for name in ("images_per_s", "end_to_end_ms", "memory_mb", "gmac_per_s", "percent_of_peak", "percent_of_bandwidth"):
        yield name, getattr(row, name)
    yield "padding", row.padding
    for name in ("in_time_per_s", "rejected", "mean_batch", "percent_of_possible"):
        yield name, getattr(row.served, name, None)
    yield "note", row.note
    yield "ap", UNKNOWN if row.status == "ok" and row.ap is None else row.ap
    # Two columns: a spreadsheet takes 5/12 for a date.
    low, _, total = (row.low_precision or "").partition("/")
    yield "low_precision_convolutions", low
    yield "convolutions", total
    bound = row.served.bound if row.served else None
    yield "bound_percentile", bound.percent if bound else None
    yield "bound_held", {None: None, True: "yes", False: "no"}[bound.held if bound else None]
    yield "flags", " ".join(row.flags)


def _bounds(name: str, estimate: Estimate | None) -> Iterator[tuple[str, Value]]:
    if estimate is not None:
        yield f"{name}_ms", estimate.value
        yield f"{name}_low_ms", estimate.low
        yield f"{name}_high_ms", estimate.high
