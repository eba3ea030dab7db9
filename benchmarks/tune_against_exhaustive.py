"""Hold `gfldeploy tune` against the same with `--exhaustive`: the time of each, and both choices side by side.

    python benchmarks/tune_against_exhaustive.py --bundles FP32 INT8 --data annotations.json --machine epyc-2core

Runs the search, then the exhaustive search, each with a journal of its own, then both choices interleaved through the
benchmark's runner, `--rounds` times. Prints the seconds of each, what each chose, and how fast both choices are; writes
that with both deploy files to results/MACHINE/checks/tune_demo.json beside this script. What follows `--` goes to both
runs.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gfldeploy.bench.cell import Cell
from gfldeploy.bench.journal import Journal
from gfldeploy.bench.runner import Data, Runner
from gfldeploy.bench.timing import Settings
from gfldeploy.files import write_json
from gfldeploy.machine import describe_machine
from gfldeploy.serialization import plain
from gfldeploy.tune.deploy_file import Deploy
from gfldeploy.tune.measured import Measured, speed_ratio

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Tuned:
    """One run: its wall time in seconds, its file's content, and its choice as a cell of the benchmark."""

    wall_s: float
    deploy: Deploy
    cell: Cell
    bundle: Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundles", type=Path, nargs="+", required=True, help="the FP32 bundle and INT8 ones of it")
    parser.add_argument("--data", type=Path, required=True, help="COCO annotations (.json), images/ beside them")
    parser.add_argument("--machine", required=True, help="folder of results/ for this machine, such as epyc-2core")
    parser.add_argument("--rounds", type=int, default=5, metavar="R", help="of both choices interleaved")
    parser.add_argument("--min-seconds", type=float, default=3.0, metavar="S", help="of each in each round")
    parser.add_argument("--limit", type=int, default=32, metavar="L", help="images, all of them timed")
    parser.add_argument("--output", type=Path, help="instead of results/MACHINE/checks/tune_demo.json")
    words = sys.argv[1:]
    own = words.index("--") if "--" in words else len(words)
    args, more = parser.parse_args(words[:own]), words[own + 1 :]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        common = [*map(str, args.bundles), "--data", str(args.data), "--limit", str(args.limit), *more]
        search = tune([*common], folder / "search.yml")
        exhaustive = tune([*common, "--exhaustive"], folder / "exhaustive.yml")
        ratio = side_by_side(search, exhaustive, args, folder)
    output = args.output or HERE / "results" / args.machine / "checks" / "tune_demo.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    record = {
        "machine": plain(describe_machine()),
        "search": {"wall_s": search.wall_s, **found(search.deploy)},
        "exhaustive": {"wall_s": exhaustive.wall_s, **found(exhaustive.deploy)},
        "side_by_side": ratio,
    }
    write_json(output, record)
    print(summary(record))


def tune(arguments: Sequence[str], output: Path) -> Tuned:
    """Run the command in a process of its own."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "gfldeploy", "tune", *arguments, "--output", str(output)], check=True)
    wall_s = time.perf_counter() - start
    deploy = Deploy.read(output)
    return Tuned(wall_s, deploy, deploy.choice.cell, deploy.bundle_path(output).resolve())


def side_by_side(search: Tuned, exhaustive: Tuned, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Images a second of both choices, interleaved, and the first's by the second's; the same choice is timed once."""
    bundles = {one.cell.bundle: one.bundle for one in (search, exhaustive)}
    cells = tuple(dict.fromkeys((search.cell, exhaustive.cell)))
    data = Data.load(args.data, None, args.limit, accuracy=False, accuracy_limit=None, bundles=())
    settings = Settings(args.min_seconds, 10, 5 * args.min_seconds, rounds=args.rounds)
    results = Runner(bundles, data, Journal(folder)).measure(cells, settings)
    one, two = Measured.of(results[0]), Measured.of(results[-1])
    if one is None or two is None:
        raise SystemExit("a choice could not be measured again")
    ratio = None if len(cells) == 1 else plain(speed_ratio(two, one))
    return {"search_images_per_s": one.images_per_s, "exhaustive_images_per_s": two.images_per_s, "ratio": ratio}


def found(deploy: Deploy) -> dict[str, Any]:
    """What a run chose and how, without the machine, which both share."""
    data = deploy.to_dict()
    return {key: data[key] for key in ("summary", "choice", "runner_up", "bounds", "knee", "search", "data")}


def summary(record: dict[str, Any]) -> str:
    """Three lines: each run, then both choices."""
    lines = []
    for name in ("search", "exhaustive"):
        one, cells = record[name]["choice"]["cell"], record[name]["search"]
        lines.append(
            f"{name:10} {record[name]['wall_s']:7.1f} s, {cells['measured']} of {cells['cells']} cells: "
            f"{one['engine']} {one['precision']}, batch {one['batch_size']} {one['order']}, threads {one['threads']}"
        )
    both, part = record["side_by_side"], record["search"]["wall_s"] / record["exhaustive"]["wall_s"]
    share = both["search_images_per_s"] / both["exhaustive_images_per_s"]
    lines.append(
        f"{part:.2f} of the time; side by side {both['search_images_per_s']:.1f} and "
        f"{both['exhaustive_images_per_s']:.1f} images/s: {100 * share:.1f}%"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
