"""How often `compare --fail-if-slower` fails though nothing has changed, and how often it sees what has.

    python benchmarks/gate_noise.py --bundle int8 --data val.json --name demo_int8 --machine epyc-2core --runs 6

Measures the same bundle `--runs` times with `gfldeploy bench`, and gates each run against every other one as it is,
and with all latencies of one cell after the other multiplied by each of `--planted`. Counts the gates that fail for a
slower cell, by PERCENT. Prints the shares, and writes results/MACHINE/checks/NAME_gate_noise.json beside this script.
`--folder` keeps the runs: another call adds what is missing. Options after `--` go to `benchmark`, as NAME=VALUE.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import replace
from itertools import permutations
from pathlib import Path
from typing import Any

import yaml

from gfldeploy import benchmark, compare, speed_gate
from gfldeploy.bench.results import BenchResults, CellResult, Run
from gfldeploy.files import write_json
from gfldeploy.machine import describe_machine
from gfldeploy.serialization import plain

HERE = Path(__file__).resolve().parent
PERCENTS = (0.0, 5.0, 10.0, 20.0)


def runs(arguments: argparse.Namespace) -> list[BenchResults]:
    """Those that are there, and those that are missing."""
    found = []
    for number in range(arguments.runs):
        file = arguments.folder / f"run_{number}.json"
        if not file.exists():
            given = {key: yaml.safe_load(value) for key, _, value in (one.partition("=") for one in arguments.options)}
            benchmark(arguments.bundle, data=arguments.data, accuracy=False, peak=False, output=file, **given)
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


def altered(results: BenchResults, factor: float) -> Iterator[BenchResults]:
    """As they are for a factor of 1; else one for each cell, which is slowed."""
    if factor == 1:
        yield results
        return
    for number, cell in enumerate(results.cells):
        if cell.status == "ok":
            cells = (*results.cells[:number], slowed(cell, factor), *results.cells[number + 1 :])
            yield replace(results, cells=cells)


def failing(measured: list[BenchResults], factor: float) -> dict[str, list[int]]:
    """By PERCENT, how many gates fail for a slower cell, and how many there were."""
    counts = {f"{percent:g}": [0, 0] for percent in PERCENTS}
    for one, other in permutations(measured, 2):
        for changed in altered(other, factor):
            found = compare(one, changed)
            for percent, count in zip(PERCENTS, counts.values(), strict=True):
                count[0] += "slower by more than" in (gate := speed_gate(found, percent)).text and not gate.passed
                count[1] += 1
    return counts


def largest(measured: list[BenchResults]) -> dict[str, Any]:
    """The largest ratio of two runs of one cell."""
    found = (
        (each.ratio.value, pair.cell.name(), each.figure)
        for one, other in permutations(measured, 2)
        for pair in compare(one, other).pairs
        for each in pair.slowness
    )
    ratio, cell, figure = max(found)
    return {"ratio": ratio, "cell": cell, "figure": figure}


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
    cells = sum(one.status == "ok" for one in measured[0].cells)
    failed = {f"{factor:g}": failing(measured, factor) for factor in (1.0, *arguments.planted)}
    record = {
        "what": "gates of compare --fail-if-slower that fail for a slower cell, and of how many, by factor and PERCENT",
        "machine": plain(describe_machine()),
        "settings": plain(measured[0].settings),
        "runs": len(measured),
        "cells": cells,
        "largest_ratio_of_two_runs": largest(measured),
        "failed": failed,
    }
    print(f"{len(measured)} runs of {cells} cells; {json.dumps(record['largest_ratio_of_two_runs'])}")
    print("one cell slowed by | " + " | ".join(f"PERCENT {one:g}" for one in PERCENTS))
    for factor, counts in failed.items():
        print(f"{factor} | " + " | ".join(f"{some} of {of}" for some, of in counts.values()))
    write_json(HERE / f"results/{arguments.machine}/checks/{arguments.name}_gate_noise.json", record)


if __name__ == "__main__":
    main()
