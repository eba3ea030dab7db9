"""Benchmark results as a terminal table."""

from __future__ import annotations

from collections.abc import Sequence

import click

from gfldeploy.bench.estimates import Estimate
from gfldeploy.bench.results import BenchResults
from gfldeploy.bench.table import FLAGS, Row, rows
from gfldeploy.cli.console import console

__all__ = ["interval", "number", "show_results"]


def show_results(results: BenchResults) -> None:
    """The measured cells as a table, then a line for each of the others: reasons are too long for a column."""
    from rich.markup import escape
    from rich.table import Table

    shown = rows(results)
    measured = [row for row in shown if row.status == "ok"]
    threads = results.cells[0].threads
    table = Table(title=escape(f"{results.machine.cpu}, {threads} thread{'s' if threads > 1 else ''}"))
    several = len({row.bundle for row in measured}) > 1
    scenarios = not {row.scenario for row in measured} <= {"single-stream", "multi-stream"}
    for header in (*(["bundle"] if several else []), "engine", "precision", *(["scenario"] if scenarios else [])):
        table.add_column(header)
    for header in ("batch", "median ms", "p90 ms", "images/s", "mAP", "low", "peak %", "MB"):
        table.add_column(header, justify="right")
    flagged = any(row.flags for row in measured)
    if flagged:
        table.add_column("note")
    for row in measured:
        table.add_row(
            *([escape(row.bundle or "")] if several else []),
            row.engine,
            row.precision,
            *([_scenario(row)] if scenarios else []),
            str(row.batch_size),
            interval(row.median_ms),
            number(row.p90_ms.value if row.p90_ms else None),
            number(row.images_per_s),
            row.accuracy,
            row.low_precision or "",
            number(row.percent_of_peak, 0),
            number(row.memory_mb, 0),
            *([", ".join(row.flags)] if flagged else []),
        )
    if measured:
        console().print(table)
        for line in _legend(measured):
            click.echo(line)
    for row in shown:
        if row.note:
            batch = f" batch {row.batch_size}" if row.batch_size else ""
            bundle = f" of {row.bundle}" if row.bundle and several else ""
            click.echo(f"{row.engine} {row.precision}{batch}{bundle}: {row.note}")


def _legend(measured: Sequence[Row]) -> list[str]:
    lines = ["low: convolutions below FP32; peak: of what the engine reaches here; MB: memory without the inputs."]
    lines += [f"{flag}: {what}." for flag, what in FLAGS.items() if any(flag in row.flags for row in measured)]
    for row in measured:
        if row.bound:
            held = "within" if row.bound.held else "beyond"
            lines.append(
                f"{row.engine} {row.precision} batch {row.batch_size} at {row.rate:g} images/s: p{row.bound.percent} "
                f"{number(row.bound.value_ms)} ms, {held} the bound of {row.bound.bound_ms:g} ms."
            )
    return lines


def _scenario(row: Row) -> str:
    return f"{row.scenario} {row.rate:g}/s" if row.rate else str(row.scenario)


def interval(estimate: Estimate | None) -> str:
    """The value with half the width of its interval, such as `12.3 ±0.2`."""
    if estimate is None:
        return ""
    if estimate.low is None or estimate.high is None:
        return number(estimate.value)
    return f"{number(estimate.value)} ±{number((estimate.high - estimate.low) / 2)}"


def number(value: float | None, decimals: int | None = None) -> str:
    """With so many decimals; by default as many as its size deserves."""
    if value is None:
        return ""
    if decimals is None:
        decimals = 3 if value < 1 else 2 if value < 100 else 1
    return f"{value:.{decimals}f}"
