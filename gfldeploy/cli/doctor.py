"""`gfldeploy doctor`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click

from gfldeploy.bench.columns import Column
from gfldeploy.cli.options import JSON
from gfldeploy.cli.tables import show_table

if TYPE_CHECKING:
    from gfldeploy.doctor import Diagnosis
    from gfldeploy.engines.registry import Capability

__all__ = ["command"]


@click.command(name="doctor")
@click.option("--all", "show_all", is_flag=True, help="Show every package, and every engine, device and precision.")
@JSON
def command(show_all: bool, as_json: bool) -> None:
    """Show what works on this machine, and which installations would make it faster or complete.

    Nothing is imported or run for it: an engine that is listed as working can still fail on a damaged installation.
    """
    from gfldeploy.doctor import diagnose, summarize_report

    report = diagnose()
    if as_json:
        click.echo(json.dumps(report.to_dict(), indent=2))
    elif show_all:
        _show_all(report)
    else:
        click.echo("\n".join(summarize_report(report)))


def _show_all(report: Diagnosis) -> None:
    from gfldeploy.engines.dependencies import install_command
    from gfldeploy.engines.hardware import CPU_FLAGS

    machine = report.machine
    cores = f"{machine.cores} cores, " if machine.cores else ""
    lacking_flags = [flag for flag in CPU_FLAGS if flag not in machine.flags]
    gpus = f"{', '.join(machine.gpus) or 'unknown model'}, NVIDIA driver {machine.driver}"
    facts = [
        ("Python", f"{machine.python} on {machine.os}"),
        ("CPU", f"{machine.cpu}, {cores}{machine.threads} usable threads, {machine.memory_gb} GB memory"),
        ("", f"has: {', '.join(machine.flags) or 'none of the flags that matter'}"),
        *([("", f"lacks: {', '.join(lacking_flags)}")] if lacking_flags else []),
        ("GPU", gpus if machine.driver else "no NVIDIA driver is loaded"),
    ]
    for command, modules in report.lacking.items():
        commands = dict.fromkeys(map(install_command, modules))
        lacks = f"{', '.join(modules)} not installed: {'; '.join(commands)}"
        facts.append((command.capitalize(), lacks if modules else "works"))
    for number, (name, version) in enumerate(report.packages.items()):
        facts.append(("" if number else "Packages", f"{name:24} {version or 'not installed'}"))
    for label, text in facts:
        click.echo(f"{label:10} {text}")
    click.echo()
    columns: tuple[Column[Capability], ...] = (
        Column("engine", "engine", lambda one: one.engine, words=True),
        Column("device", "device", lambda one: one.device, words=True),
        Column("precision", "precision", lambda one: one.precision, words=True),
        Column("works", "works", lambda one: "yes" if one.works else "no", words=True),
        Column("why", "why not, and what to do", _why, words=True, wrap=True),
    )
    show_table(columns, report.capabilities)
    for warning in report.warnings:
        click.echo(f"Warning: {warning}")


def _why(one: Capability) -> str | None:
    return one.note if one.works else f"{one.reason}; {one.remedy}"
