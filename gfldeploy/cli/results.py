"""Benchmark results as a terminal table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import click

from gfldeploy.bench.cell import several_bundles
from gfldeploy.bench.results import BenchResults
from gfldeploy.bench.table import COLUMNS, FLAGS, Row, notes, rows
from gfldeploy.cli.tables import show_table


def show_results(results: BenchResults) -> None:
    """The measured cells as a table, servers as another, then each reason why others were not measured: too long for a
    column."""
    shown = rows(results)
    measured = [row for row in shown if row.ok]
    for served in (False, True):
        if some := [row for row in measured if row.is_server is served]:
            _show_table(results, some)
    for flag in FLAGS:
        if count := sum(flag in row.flags for row in measured):
            click.echo(f"{flag} ({count} of {len(measured)}): {FLAGS[flag]}")
    for note, names in notes(shown):
        click.echo(f"{names}: {note}")


def _show_table(results: BenchResults, some: Sequence[Row]) -> None:
    several = several_bundles([row.cell for row in some])
    columns = [replace(one, drop=0) if several and one.key == "bundle" else one for one in COLUMNS]
    show_table(columns, some, _title(results, some), "The CSV file has every column.")


def _title(results: BenchResults, measured: Sequence[Row]) -> str:
    """The machine, and what all cells have in common."""
    parts = [results.machine.cpu]
    if len(threads := {(row.cell.streams, row.cell.threads) for row in measured}) == 1:
        ((streams, count),) = threads
        parts.append(f"{f'{streams} streams of ' if streams > 1 else ''}{count} thread{'s' if count > 1 else ''}")
    if len(devices := {row.cell.device for row in measured}) == 1:
        parts += [*devices]
    if len(scenarios := {row.cell.scenario for row in measured}) == 1:
        parts += [str(scenario) for scenario in scenarios]
    return ", ".join(parts)
