"""`gfldeploy inspect`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from gfldeploy.bundle import Bundle
from gfldeploy.cli.console import console
from gfldeploy.cli.options import InputShapeType, bundle_argument, json_option
from gfldeploy.inspection import describe

__all__ = ["command"]


@click.command("inspect")
@bundle_argument
@click.option("--size", type=InputShapeType(), help="Count MACs at this size, HxW. Default: the largest in use.")
@json_option
def command(bundle: Path, size: tuple[int | None, int, int] | None, as_json: bool) -> None:
    """Show what a bundle holds: inputs, outputs, classes, parameters, MACs, size, provenance, parity."""
    facts = describe(Bundle.open(bundle), size[1:] if size else None)
    if as_json:
        click.echo(json.dumps(facts, indent=2))
        return
    from rich.table import Table

    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for key, value in facts.items():
        table.add_row(key.replace("_", " "), _text(value))
    console().print(table)


def _text(value: Any) -> str:
    if isinstance(value, list):
        return "\n".join(_text(item) for item in value)
    if isinstance(value, dict):
        return ", ".join(f"{key} {_text(item)}" for key, item in value.items())
    return str(value)
