"""What is installed and what works here, answered without importing any engine."""

from __future__ import annotations

import textwrap
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

from gfldeploy.engines.base import Device, Obstacle, installed_version, is_installed, remedy_sentence
from gfldeploy.engines.dependencies import TOOL_CHAINS, install_command
from gfldeploy.engines.hardware import nvidia_driver
from gfldeploy.engines.nvidia_libraries import doubt
from gfldeploy.engines.registry import (
    BROKEN_PLUGINS,
    ENGINES,
    PREFERRED_ENGINES,
    TENSORRT_ENGINES,
    Capability,
    capabilities,
    title_of,
)
from gfldeploy.machine import Machine, describe_machine, installed_packages

_MOST_LINES, _MOST_ENGINES, _MOST_WARNINGS, _MOST_INSTALLS = 15, 8, 3, 3
_LABEL, _TEXT = 10, 70  # columns


@dataclass(frozen=True)
class Diagnosis:
    """`packages`: every package looked for, None where it is not installed; `capabilities`: every engine x device x
    precision; `lacking`: the modules that commands which need more than an engine lack; `warnings`: problem and remedy,
    one line each."""

    machine: Machine
    packages: Mapping[str, str | None]
    capabilities: tuple[Capability, ...]
    lacking: Mapping[str, tuple[str, ...]]
    warnings: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {**asdict(self), "capabilities": [{**asdict(one), "works": one.works} for one in self.capabilities]}


def diagnose() -> Diagnosis:
    """Say what works on this machine, and what would make it faster or complete; no engine is imported for it.

    Where there is an NVIDIA driver, NVIDIA's libraries are loaded in a process of its own, to see whether they do.

    Returns:
        The machine, the packages, and each engine, device and precision with what hinders it.
    """
    packages = installed_packages()
    lacking = {
        command: tuple(module for module in tools.modules if not is_installed(module))
        for command, tools in TOOL_CHAINS.items()
    }
    broken = tuple(f"The engine plug-in {name} is left out: {why}." for name, why in BROKEN_PLUGINS.items())
    found = tuple(capabilities())
    gpu = gpu_warnings(found)
    twins = () if any("overwrites" in one for one in gpu) else twin_warnings(packages)
    warnings = (*gpu, *twins, *broken)
    return Diagnosis(describe_machine(), packages, found, lacking, warnings)


def gpu_warnings(found: Iterable[Capability]) -> tuple[str, ...]:
    """Why engines whose packages for GPUs are installed do not work here, or may not, each reason once."""
    if nvidia_driver() is None:
        return ()
    engines: dict[tuple[str, str], dict[str, None]] = defaultdict(dict)
    for one in found:
        spec = ENGINES[one.engine]
        never = isinstance(spec.graph(one.precision, one.device), Obstacle) or one.device == "cpu"
        if never or installed_version(spec.library.builds["gpu"].distribution) is None:
            continue
        if one.reason and one.remedy:
            engines[one.reason, one.remedy][one.engine] = None
        elif doubtful := doubt(spec):
            engines[doubtful][one.engine] = None
    return tuple(
        f"{', '.join(names)}: {reason}. {remedy_sentence(remedy)}" for (reason, remedy), names in engines.items()
    )


def twin_warnings(packages: Mapping[str, str | None]) -> tuple[str, ...]:
    """One warning for each engine's module of which the CPU and the GPU build are both installed."""
    builds = {spec.library.module: spec.library.distributions for spec in ENGINES.values()}
    return tuple(
        f"{' and '.join(names)} are both installed and overwrite each other's {module} module. "
        f"Run `pip uninstall {' '.join(names)}`, then install the one you need again."
        for module, names in builds.items()
        if len(names) > 1 and all(packages.get(name) for name in names)
    )


def summarize_report(report: Diagnosis) -> list[str]:
    """What works here, and what would make it faster or complete, in at most 15 lines of 80 columns."""
    machine = report.machine
    gpus = ", ".join(machine.gpus) or "unknown model"
    more = f"{machine.threads} usable CPUs, {machine.memory_gb} GB memory, Python {machine.python}"
    commands = {
        command.capitalize(): [f"not installed: {', '.join(modules)}" if modules else "works"]
        for command, modules in report.lacking.items()
    }
    for extra in (name for name, tools in TOOL_CHAINS.items() if not tools.libraries):
        commands.pop(extra.capitalize(), None)  # for those who want it: `serve` and `--ray` say what they lack
    if not any(lines != ["works"] for lines in commands.values()):
        commands = {"Works": [", ".join(command for command, modules in report.lacking.items() if not modules)]}
    warnings = _wrap(" ".join(report.warnings), _MOST_WARNINGS)
    taken = 4 + len(commands) + len(warnings)  # with the last line
    blocks = [
        ("Machine", [machine.cpu, more]),
        ("GPU", [f"{gpus}, driver {machine.driver}" if machine.driver else "no NVIDIA driver is loaded"]),
        *commands.items(),
        ("Engines", _engine_lines(report, min(_MOST_LINES - taken, _MOST_ENGINES))),
        ("Warning", warnings),
    ]
    room = _MOST_LINES - 1 - sum(len(lines) for _, lines in blocks)
    blocks += [("Install", _install_lines(report, room)), ("Details", ["gfldeploy doctor --all"])]
    return [
        f"{'' if number else label:{_LABEL}}{line if len(line) <= _TEXT else f'{line[: _TEXT - 3]}...'}"
        for label, lines in blocks
        for number, line in enumerate(lines)
    ]


def _wrap(text: str, most: int | None = None) -> list[str]:
    """Lines that end between words: the names of packages, which have hyphens, stay whole."""
    return textwrap.wrap(text, _TEXT, max_lines=most, break_on_hyphens=False)


def _engine_lines(report: Diagnosis, most: int) -> list[str]:
    """A line for each engine that runs something here, and one for the others."""
    runs: dict[str, str] = {}
    works = [one for one in report.capabilities if one.works]
    for (name, device), found in groupby(works, lambda one: (one.engine, one.device)):
        precisions = ", ".join(f"{one.precision} (slow)" if one.note else one.precision for one in found)
        runs[name] = f"{runs[name]}; {precisions} on {device}" if name in runs else f"{precisions} on {device}"
    lacking = ", ".join(name for name in ENGINES if name not in runs)
    not_here = _wrap(f"not here: {lacking}", 2) if lacking else []
    most -= len(not_here)
    shown = list(runs) if len(runs) <= most else list(runs)[: most - 1]
    lines = [f"{name}: {runs[name]}" for name in shown]
    if more := [name for name in runs if name not in shown]:
        lines.append(f"and {', '.join(more)}")
    return lines + not_here


def _install_lines(report: Diagnosis, room: int) -> list[str]:
    """The commands that would help most, with what for, as far as there is room for them."""
    purposes: dict[str, dict[str, None]] = defaultdict(dict)
    for purpose, command in _improvements(report):
        purposes[command][purpose] = None
    lines: list[str] = []
    for command, names in list(purposes.items())[:_MOST_INSTALLS]:
        line = f"{command}  # {'; '.join(names)}"
        entry = [line] if len(line) <= _TEXT else [f"# {'; '.join(names)}:", *_wrap(command)]
        lines += entry if len(lines) + len(entry) <= room else []
    return lines


def _improvements(report: Diagnosis) -> Iterator[tuple[str, str]]:
    """What could be had by installing something, the most useful first, and the command."""
    device: Device = "gpu" if report.machine.driver else "cpu"
    possible = [name for name, spec in ENGINES.items() if not isinstance(spec.graph("fp32", device), Obstacle)]
    absent = {
        one.engine: one.remedy
        for one in report.capabilities
        if (one.precision, one.device) == ("fp32", device) and one.engine in possible and one.remedy
    }
    first = next((name for name in PREFERRED_ENGINES if name in possible), None)
    if first in absent:
        yield f"{title_of(first)}, the first choice on {device}", absent[first]
    for name in (*PREFERRED_ENGINES, *TENSORRT_ENGINES):
        build = ENGINES[name].library.builds.get(device)
        if name in absent and build and report.packages.get(build.distribution):  # nearly there
            yield title_of(name), absent[name]
    for command, modules in report.lacking.items():
        for module in modules:
            yield command, install_command(module, device)
    for name in (*PREFERRED_ENGINES, *TENSORRT_ENGINES):
        if name in absent and name != first:
            yield title_of(name), absent[name]
