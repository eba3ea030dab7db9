"""`gfldeploy doctor`."""

from __future__ import annotations

import json
from operator import attrgetter
from typing import TYPE_CHECKING

import click

from gfldeploy.bench.columns import Column
from gfldeploy.cli import options
from gfldeploy.cli.tables import show_table

if TYPE_CHECKING:
    from gfldeploy.doctor import Diagnosis
    from gfldeploy.engines.nvidia_libraries import BuiltFor
    from gfldeploy.engines.registry import Capability


@click.command(name="doctor")
@click.option("--all", "show_all", is_flag=True, help="Show every package, and every engine, device and precision.")
@options.JSON
def command(show_all: bool, as_json: bool) -> None:
    """Show what works on this machine, and which installations would make it faster or complete.

    No engine is imported for it: one that is listed as working can still fail on a damaged installation. Where there is
    an NVIDIA driver, NVIDIA's libraries are loaded once, in a process of its own.
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
    from gfldeploy.doctor import summarize_report
    from gfldeploy.engines.hardware import CPU_FLAGS

    machine = report.machine
    click.echo("\n".join(summarize_report(report)[:-1]))  # the last line names this option
    facts = {
        "processor": machine.cpu,
        "system": machine.os,
        "physical cores": str(machine.cores or "unknown"),
        "CPU has": ", ".join(machine.flags) or "none of the flags that matter",
        "CPU lacks": ", ".join(flag for flag in CPU_FLAGS if flag not in machine.flags) or "none of them",
        **report.packages,
        **{f"{name} is for": str(built) for name, built in _built_for().items()},
    }
    click.echo()
    width = max(map(len, facts))
    for name, value in facts.items():
        click.echo(f"{name:{width}} {value or 'not installed'}")
    click.echo()
    columns: tuple[Column[Capability], ...] = (
        *(Column(name, name, attrgetter(name), words=True) for name in ("engine", "device", "precision")),
        Column("works", "works", lambda one: "yes" if one.works else "no", words=True),
        Column("why", "why not, and what to do", _why, words=True, wrap=True),
    )
    show_table(columns, report.capabilities)
    for warning in report.warnings:
        click.echo(f"Warning: {warning}")


def _built_for() -> dict[str, BuiltFor]:
    """What the installed packages for GPUs were built for, by their names."""
    from gfldeploy.engines.nvidia_libraries import built_for
    from gfldeploy.engines.registry import ENGINES

    specs = [spec for spec in ENGINES.values() if "gpu" in spec.library.builds]
    built = {spec.library.builds["gpu"].distribution: built_for(spec) for spec in specs}  # the last needs the most
    return {name: one for name, one in built.items() if one}


def _why(one: Capability) -> str | None:
    return one.note if one.works else f"{one.reason}; {one.remedy}"
