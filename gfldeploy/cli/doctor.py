"""`gfldeploy doctor`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click

from gfldeploy.cli.options import JSON
from gfldeploy.cli.tables import TableColumn, show_table

if TYPE_CHECKING:
    from gfldeploy.doctor import Report
    from gfldeploy.engines.registry import Capability

__all__ = ["command"]


@click.command(name="doctor")
@JSON
def command(as_json: bool) -> None:
    """Show what is installed, what works on this machine, and why the rest does not.

    Nothing is imported or run for it: an engine that is listed as working can still fail on a damaged installation.
    """
    from gfldeploy.doctor import examine

    report = examine()
    if as_json:
        click.echo(json.dumps(report.to_dict(), indent=2))
    else:
        _show(report)


def _show(report: Report) -> None:
    from gfldeploy.machine import CPU_FLAGS

    machine = report.machine
    cores = f"{machine.cores} cores, " if machine.cores else ""
    click.echo(f"Python     {machine.python} on {machine.os}")
    click.echo(f"CPU        {machine.cpu}, {cores}{machine.threads} usable threads, {machine.memory_gb} GB memory")
    click.echo(f"           has: {', '.join(machine.flags) or 'none of the flags that matter'}")
    if lacking := [flag for flag in CPU_FLAGS if flag not in machine.flags]:
        click.echo(f"           lacks: {', '.join(lacking)}")
    if machine.driver:
        click.echo(f"GPU        {', '.join(machine.gpus) or 'unknown model'}, NVIDIA driver {machine.driver}")
    else:
        click.echo("GPU        no NVIDIA driver is loaded")
    label = "Packages"
    for name, version in report.packages.items():
        click.echo(f"{label:10} {name:24} {version or 'not installed'}")
        label = ""
    click.echo()
    _show_capabilities(report)
    for warning in report.warnings:
        click.echo(f"Warning: {warning}")


def _show_capabilities(report: Report) -> None:
    columns = (
        *(TableColumn(header, right=False) for header in ("engine", "device", "precision", "works")),
        TableColumn("why not, and what to do", text=True),
    )
    lines = [
        (one.engine, one.device, one.precision, "yes" if one.works else "no", _explain(one))
        for one in report.capabilities
    ]
    show_table(columns, lines)


def _explain(capability: Capability) -> str:
    if capability.works:
        return capability.note or ""
    return "; ".join(part for part in (capability.reason, capability.remedy) if part)
