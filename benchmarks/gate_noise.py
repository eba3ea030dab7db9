"""How often `compare --fail-if-slower` fails though nothing has changed, and how often it sees what has.

    python benchmarks/gate_noise.py --bundle int8 --data val.json --name demo_int8 --machine epyc-2core --runs 6

Measures a bundle and a copy of it `--runs` times with `gfldeploy bench`. Compares the runs of the bundle, each with
every other one, as files; and in each run the bundle with its copy, whose rounds are interleaved (`compare --bundles`).
Each as it is, and with all latencies of one cell after the other multiplied by each of `--planted`. Counts the gates
that fail for a slower cell, by PERCENT. Prints the shares, and writes results/MACHINE/checks/NAME_gate_noise.json
beside this script. `--folder` keeps the runs: another call adds what is missing. Arguments of `benchmark`
follow as NAME=VALUE.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import permutations
from pathlib import Path
from typing import Any

import yaml

from gfldeploy import Comparison, benchmark, compare, speed_gate
from gfldeploy.bench.results import BenchResults, CellResult, Run
from gfldeploy.files import write_json
from gfldeploy.machine import describe_machine
from gfldeploy.serialization import plain

HERE = Path(__file__).resolve().parent
PERCENTS = (0.0, 5.0, 10.0, 20.0, 30.0)
COPY = "copy"


def runs(arguments: argparse.Namespace) -> list[BenchResults]:
    """Those that are there, and those that are missing."""
    found = []
    copy = arguments.folder / COPY
    if not copy.exists():
        shutil.copytree(arguments.bundle, copy)
    for number in range(arguments.runs):
        file = arguments.folder / f"run_{number}.json"
        if not file.exists():
            given = {key: yaml.safe_load(value) for key, _, value in (one.partition("=") for one in arguments.options)}
            both = (arguments.bundle, copy)
            benchmark(both, data=arguments.data, accuracy=False, peak=False, output=file, **given)
            print(f"run {number + 1} of {arguments.runs} is done", flush=True)
        found.append(BenchResults.read(file))
    return found


def slowed(result: CellResult, factor: float) -> CellResult:
    """With every latency, of the network and from file to boxes, times `factor`."""

    def run(one: Run) -> Run:
        samples = replace(one.samples, latency_ms=tuple(factor * ms for ms in one.samples.latency_ms))
        stages = one.stages and replace(one.stages, end_to_end_ms=tuple(factor * ms for ms in one.stages.end_to_end_ms))
        return replace(one, samples=samples, stages=stages)

    return replace(result, runs=tuple(map(run, result.runs)))


def altered(results: BenchResults, factor: float, directory: str) -> Iterator[BenchResults]:
    """As they are for a factor of 1; else one for each cell of the bundle in the directory, which is slowed."""
    if factor == 1:
        yield results
        return
    for number, cell in enumerate(results.cells):
        if cell.status == "ok" and cell.cell.bundle.directory == directory:
            cells = (*results.cells[:number], slowed(cell, factor), *results.cells[number + 1 :])
            yield replace(results, cells=cells)


def apart(measured: Sequence[BenchResults], factor: float) -> Iterator[Comparison]:
    """Each run with every other one."""
    directory = measured[0].cells[0].cell.bundle.directory
    alone = [
        replace(one, cells=tuple(cell for cell in one.cells if cell.cell.bundle.directory == directory))
        for one in measured
    ]
    for one, other in permutations(alone, 2):
        for changed in altered(other, factor, directory):
            yield compare(one, changed)


def interleaved(measured: Sequence[BenchResults], factor: float) -> Iterator[Comparison]:
    """In each run the bundle with its copy."""
    directory = measured[0].cells[0].cell.bundle.directory
    for one in measured:
        for a, b in permutations((directory, COPY)):
            for changed in altered(one, factor, b):
                yield compare(changed, bundles=(a, b))


def failing(found: Sequence[Comparison]) -> dict[str, list[int]]:
    """By PERCENT, how many gates fail for a slower cell, and how many there were."""
    gates = {percent: [speed_gate(one, percent) for one in found] for percent in PERCENTS}
    failed = {
        percent: sum(not one.passed and "slower by more than" in one.text for one in some)
        for percent, some in gates.items()
    }
    return {f"{percent:g}": [count, len(found)] for percent, count in failed.items()}


def largest(found: Sequence[Comparison]) -> dict[str, Any]:
    """The largest ratio of all."""
    ratios = [
        (each.ratio.value, pair.cell.name(), each.figure)
        for one in found
        for pair in one.pairs
        for each in pair.slowness
    ]
    return dict(zip(("ratio", "cell", "figure"), max(ratios), strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--name", required=True)
    parser.add_argument("--machine", required=True)
    parser.add_argument("--runs", type=int, default=6)
    parser.add_argument("--planted", type=float, nargs="*", default=[1.1, 1.2, 1.5])
    parser.add_argument("--folder", type=Path, default=Path("gate_noise"))
    parser.add_argument("options", nargs="*", metavar="NAME=VALUE")
    arguments = parser.parse_args()
    measured = runs(arguments)
    ways: dict[str, Callable[[Sequence[BenchResults], float], Iterator[Comparison]]]
    ways = {"two files": apart, "interleaved": interleaved}
    record: dict[str, Any] = {
        "what": "gates of compare --fail-if-slower that fail for a slower cell, and of how many, by factor and PERCENT",
        "machine": plain(describe_machine()),
        "settings": plain(measured[0].settings),
        "runs": len(measured),
        "cells": [one.cell.name() for one in measured[0].cells if one.cell.bundle.directory == COPY],
    }
    for name, way in ways.items():
        failed = {f"{factor:g}": failing(list(way(measured, factor))) for factor in (1.0, *arguments.planted)}
        record[name] = {"largest": largest(list(way(measured, 1.0))), "failed": failed}
        print(f"{name}, {len(measured)} runs: the largest ratio is {record[name]['largest']}")
        print("| one cell slowed by | " + " | ".join(f"{one:g}%" for one in PERCENTS) + " |")
        for factor, counts in failed.items():
            print(f"| {factor} | " + " | ".join(f"{some} of {of}" for some, of in counts.values()) + " |")
    write_json(HERE / f"results/{arguments.machine}/checks/{arguments.name}_gate_noise.json", record)


if __name__ == "__main__":
    main()
