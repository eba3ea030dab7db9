"""Benchmark results as a terminal table."""

from __future__ import annotations

from collections.abc import Sequence

import click

from gfldeploy.bench.results import BenchResults
from gfldeploy.bench.table import COLUMNS, FLAGS, TEXT_KEYS, Row, notes, rows, several_bundles, text_of
from gfldeploy.cli.tables import TableColumn, show_table

__all__ = ["show_results"]


def show_results(results: BenchResults) -> None:
    """The measured cells as a table, servers as another, then each reason why others were not measured: too long for a
    column."""
    shown = rows(results)
    measured = [row for row in shown if row.status == "ok"]
    for served in (False, True):
        if some := [row for row in measured if (row.scenario == "server") is served]:
            _show_table(results, some)
    for flag in FLAGS:
        if count := sum(flag in row.flags for row in measured):
            click.echo(f"{flag} ({count} of {len(measured)}): {FLAGS[flag]}")
    for note, names in notes(shown):
        click.echo(f"{names}: {note}")


def _show_table(results: BenchResults, some: Sequence[Row]) -> None:
    columns = [column for column in COLUMNS if column.shown(some)]
    several = several_bundles(some)
    show_table(
        [
            TableColumn(one.header, 0 if several and one.key == "bundle" else one.drop, one.key not in TEXT_KEYS)
            for one in columns
        ],
        [[text_of(one.value(row), one.digits) for one in columns] for row in some],
        _title(results, some),
        "The CSV file has every column.",
        [[text_of(one.value(row), one.digits, interval=False) for one in columns] for row in some],
    )


def _title(results: BenchResults, measured: Sequence[Row]) -> str:
    """The machine, and what all cells have in common."""
    parts = [results.machine.cpu]
    if len(threads := {row.threads for row in measured}) == 1:
        (count,) = threads
        parts.append(f"{count} thread{'s' if count > 1 else ''}")
    if len(devices := {row.device for row in measured}) == 1:
        parts += [*devices]
    if len(scenarios := {row.scenario for row in measured}) == 1:
        parts += [str(scenario) for scenario in scenarios]
    return ", ".join(parts)
