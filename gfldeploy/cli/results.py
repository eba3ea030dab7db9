"""Benchmark results as a terminal table."""

from __future__ import annotations

import click

from gfldeploy.bench.results import BenchResults
from gfldeploy.bench.table import rows
from gfldeploy.cli.console import console

__all__ = ["show_results"]


def show_results(results: BenchResults) -> None:
    """The measured cells as a table, then a line for each of the others: reasons are too long for a column."""
    from rich.markup import escape
    from rich.table import Table

    shown = rows(results)
    threads = results.cells[0].threads
    table = Table(title=escape(f"{results.machine.cpu}, {threads} thread{'s' if threads > 1 else ''}"))
    measured = [row for row in shown if row.median_ms is not None]
    several = len({row.bundle for row in measured}) > 1
    for header in (*(["bundle"] if several else []), "engine", "precision"):
        table.add_column(header)
    for header in ("batch", "median ms", "p90 ms", "images/s", "mAP", "low-prec. convs", "memory MB"):
        table.add_column(header, justify="right")
    for row in measured:
        table.add_row(
            *([escape(row.bundle or "")] if several else []),
            row.engine,
            row.precision,
            str(row.batch_size),
            _number(row.median_ms.value),
            _number(row.p90_ms.value if row.p90_ms else None),
            _number(row.images_per_s),
            _number(row.ap, 3),
            row.low_precision or "",
            _number(row.memory_mb, 0),
        )
    if measured:
        console().print(table)
    for row in shown:
        if row.note:
            batch = f" batch {row.batch_size}" if row.batch_size else ""
            bundle = f" of {row.bundle}" if row.bundle and several else ""
            click.echo(f"{row.engine} {row.precision}{batch}{bundle}: {row.note}")


def _number(value: float | None, decimals: int | None = None) -> str:
    """With so many decimals; by default as many as its size deserves."""
    if value is None:
        return ""
    if decimals is None:
        decimals = 3 if value < 1 else 2 if value < 100 else 1
    return f"{value:.{decimals}f}"
