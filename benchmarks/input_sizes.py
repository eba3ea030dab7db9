"""Input sizes of a detector: mAP and images/s of each, and whether `gfldeploy tune` picks what measuring all picks.

    python benchmarks/input_sizes.py --fp32 FP32 --int8 INT8 --data annotations.json --machine epyc-2core --work FOLDER

`gfldeploy tune` runs without sizes, and with them for each `--max-drop`. Then every engine, precision, size, batch size
and number of threads, in as many streams as there are CPUs for, is measured at length, `--rounds` times interleaved,
with the mAP of each on all images: the fastest that keeps a bound is the exhaustive choice. Where tune chose another,
both are measured once more, interleaved. Writes results/MACHINE/checks/NAME_input_sizes.json beside this script,
results.json and results.html in FOLDER, and prints the table of benchmarks/README.md. What an interrupted run measured
is in FOLDER and not measured again.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from typing import Any

from gfldeploy.batching.buckets import size_in_words
from gfldeploy.bench.cell import BundleIdentity, Cell
from gfldeploy.bench.journal import Journal
from gfldeploy.bench.report.page import write_report
from gfldeploy.bench.results import BenchResults, CellResult
from gfldeploy.bench.runner import Data, Runner
from gfldeploy.bench.table import Row, rows
from gfldeploy.bench.timing import Settings
from gfldeploy.bundle import Bundle
from gfldeploy.engines.base import Precision
from gfldeploy.engines.hardware import usable_threads
from gfldeploy.engines.registry import title_of
from gfldeploy.engines.selection import MOST_AT_ONCE
from gfldeploy.files import write_json
from gfldeploy.machine import describe_machine
from gfldeploy.progress import Silent
from gfldeploy.serialization import plain
from gfldeploy.tune.deploy_file import Deploy
from gfldeploy.tune.measured import Measured, speed_ratio
from gfldeploy.tune.search import TIE, choose

HERE = Path(__file__).resolve().parent
PRECISIONS: tuple[Precision, ...] = ("fp32", "int8")


class Told(Silent):
    """Each step on a line of its own."""

    def stage(self, text: str) -> None:
        """Print it."""
        print(text, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fp32", type=Path, required=True, help="the FP32 bundle")
    parser.add_argument("--int8", type=Path, required=True, help="the INT8 bundle made of it")
    parser.add_argument("--data", type=Path, required=True, help="COCO annotations (.json), images/ beside them")
    parser.add_argument("--machine", required=True, help="folder of results/ for this machine, such as epyc-2core")
    parser.add_argument("--work", type=Path, required=True, metavar="FOLDER", help="for what was measured so far")
    parser.add_argument("--sizes", default="320x512,320x448,256x384,224x320,192x320", help="HEIGHTxWIDTH,...")
    parser.add_argument("--max-drop", type=float, nargs="+", default=[0.02, 0.1], metavar="D", help="mAP that may go")
    parser.add_argument("--engines", default="onnxruntime,openvino")
    parser.add_argument("--batch-sizes", default="1")
    parser.add_argument("--limit", type=int, default=32, metavar="L", help="images that are timed")
    parser.add_argument("--rounds", type=int, default=2, metavar="R", help="of every cell")
    parser.add_argument("--min-seconds", type=float, default=1.5, metavar="S", help="of a cell in each round")
    parser.add_argument("--name", default="demo", help="of the detector, in the name of the file")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    own = tune(args, "own", args.max_drop[0])
    sized = {drop: tune(args, f"sizes_{drop:g}", drop, "--input-sizes", args.sizes) for drop in args.max_drop}
    bundles = {BundleIdentity.of(bundle): bundle for bundle in (Bundle.open(args.fp32), Bundle.open(args.int8))}
    results = measure(args, bundles)
    choices = []
    for drop, deploy in sized.items():
        chosen, exhaustive = deploy.choice.cell, best_of(results, drop)
        ratio = side_by_side(args, bundles, chosen, exhaustive)
        choices.append(
            {"max_drop": drop, "tune": found(deploy), "exhaustive": plain(exhaustive), "images_per_s_ratio": ratio}
        )
    record = {
        "machine": plain(results.machine),
        "images": results.data.accuracy_images,
        "cells": len(results.cells),
        "sizes": list(table(results, bundles)),
        "tune_without_sizes": found(own),
        "choices": choices,
    }
    write_json(HERE / "results" / args.machine / "checks" / f"{args.name}_input_sizes.json", record)
    write_report(results, args.work / "results.html")
    print("\n".join(shown(record)))


def found(deploy: Deploy) -> dict[str, Any]:
    """What a run chose and how, without the machine, which all share."""
    return {"summary": deploy.summary, "search": plain(deploy.search), "cell": plain(deploy.choice.cell)}


def tune(args: argparse.Namespace, name: str, max_drop: float, *more: str) -> Deploy:
    """What `gfldeploy tune` chose, in a process of its own."""
    output = args.work / f"{name}.yml"
    if not output.exists():
        words = [args.fp32, args.int8, "--data", args.data, "--max-drop", max_drop, "--engines", args.engines]
        words += ["--precisions", ",".join(PRECISIONS), "--batch-sizes", args.batch_sizes, "--orders", "bucketed"]
        words += ["--limit", args.limit, "--output", output, *more]
        subprocess.run([sys.executable, "-m", "gfldeploy", "tune", *map(str, words)], check=True)
    return Deploy.read(output)


def cells(args: argparse.Namespace, bundles: dict[BundleIdentity, Bundle]) -> Iterator[Cell]:
    """Those that tune chooses from."""
    by_precision = {bundle.manifest.precision: (identity, bundle) for identity, bundle in bundles.items()}
    sizes = [tuple(map(int, size.split("x"))) for size in args.sizes.split(",")]
    batch_sizes = list(map(int, args.batch_sizes.split(",")))
    most = usable_threads()
    counts = sorted({*(1 << power for power in range(most.bit_length())), most})
    for size, engine, precision, batch in product(sizes, args.engines.split(","), PRECISIONS, batch_sizes):
        identity, bundle = by_precision[precision]
        for threads in counts:
            streams = min(most // threads, MOST_AT_ONCE)
            yield Cell(
                bundle=identity,
                engine=engine,
                precision=precision,
                device="cpu",
                threads=threads,
                batch_size=batch,
                order="listed" if batch == 1 else "bucketed",
                scenario="single-stream" if batch == streams == 1 else "offline",
                streams=streams,
                input_size=None if size == bundle.manifest.preprocess.target_size else (size[0], size[1]),
            )


def measure(args: argparse.Namespace, bundles: dict[BundleIdentity, Bundle]) -> BenchResults:
    """Every cell at length, and the mAP of each engine, precision and size."""
    output = args.work / "results.json"
    if not output.exists():
        settings = Settings(args.min_seconds, 10, 5 * args.min_seconds, rounds=args.rounds)
        data = Data.load(args.data, None, args.limit, accuracy=True, accuracy_limit=None, bundles=[*bundles.values()])
        every = tuple(dict.fromkeys(cells(args, bundles)))
        found = runner(args, bundles, data).measure(every, settings, accuracy=True, progress=Told())
        created = datetime.now(UTC).isoformat(timespec="seconds")
        BenchResults(created, describe_machine(), data.description, settings, found).write(output)
    return BenchResults.read(output)


def runner(args: argparse.Namespace, bundles: dict[BundleIdentity, Bundle], data: Data) -> Runner:
    """It keeps what it measures in the folder."""
    journal = args.work / "journal"
    journal.mkdir(exist_ok=True)
    directories = {identity: bundle.directory for identity, bundle in bundles.items()}
    return Runner(directories, data, Journal(journal), engine_cache=args.work / "engines")


def best_of(results: BenchResults, max_drop: float) -> Cell:
    """The fastest cell that keeps the bound on mAP, as `tune` decides between cells that were measured at length."""
    base = {
        one.cell.engine: one.ap
        for one in results.cells
        if one.ap is not None and one.cell.precision == "fp32" and one.cell.input_size is None
    }
    kept: dict[Cell, Measured] = {}
    for one in results.cells:
        if one.ap is not None and base[one.cell.engine] - one.ap <= max_drop and (found := Measured.of(one)):
            kept[one.cell] = found
    return choose(kept)[0]


def side_by_side(
    args: argparse.Namespace, bundles: dict[BundleIdentity, Bundle], chosen: Cell, exhaustive: Cell
) -> dict[str, Any] | None:
    """Images a second of the first by the second's, interleaved; None for the same."""
    if chosen == exhaustive:
        return None
    data = Data.load(args.data, None, args.limit, accuracy=False, accuracy_limit=None, bundles=())
    settings = Settings(args.min_seconds, 10, 5 * args.min_seconds, rounds=args.rounds + 3)
    one, two = map(Measured.of, runner(args, bundles, data).measure((chosen, exhaustive), settings, progress=Told()))
    if one is None or two is None:
        raise SystemExit("a choice could not be measured again")
    ratio: dict[str, Any] = plain(speed_ratio(two, one))
    return ratio


def table(results: BenchResults, bundles: dict[BundleIdentity, Bundle]) -> Iterator[dict[str, Any]]:
    """A line for each engine, precision and size: its mAP, and its fastest cell."""
    groups: dict[tuple[Any, ...], list[CellResult]] = {}
    for one in results.cells:
        cell = one.cell
        groups.setdefault((cell.engine, cell.precision, cell.input_size), []).append(one)
    by_cell = {row.cell: row for row in rows(results)}
    for (engine, precision, size), some in groups.items():
        fastest = max((by_cell[one.cell] for one in some), key=speed_of)
        own = bundles[some[0].cell.bundle].manifest.preprocess.target_size
        yield {
            "engine": engine,
            "precision": precision,
            "size": size_in_words(size or own),
            "ap": some[0].ap,
            "images_per_s": speed_of(fastest),
            "batch_size": fastest.cell.batch_size,
            "streams": fastest.cell.streams,
            "on_front": fastest.on_front,
        }


def speed_of(row: Row) -> float:
    return row.file_images_per_s or 0.0


def shown(record: dict[str, Any]) -> Iterator[str]:
    """The table of the README, then what both found."""
    lines = record["sizes"]
    columns = list(dict.fromkeys((one["engine"], one["precision"]) for one in lines))
    yield f"| input size | {' | '.join(f'{title_of(engine)} {precision.upper()}' for engine, precision in columns)} |"
    yield f"|---{'|---' * len(columns)}|"
    for size in dict.fromkeys(one["size"] for one in lines):
        found = {(one["engine"], one["precision"]): one for one in lines if one["size"] == size}
        texts = (entry(found[column]) if column in found else "" for column in columns)
        yield f"| {size} | {' | '.join(texts)} |"
    yield "\nmAP, images/s from file to boxes; * nothing is faster and as accurate.\n"
    runs = [("tune without sizes", record["tune_without_sizes"])]
    for one in record["choices"]:
        runs.append((f"tune --max-drop {one['max_drop']:g}", one["tune"]))
        yield f"--max-drop {one['max_drop']:g}:"
        yield f"  tune:       {named(one['tune']['cell'])}"
        yield f"  exhaustive: {named(one['exhaustive'])}"
        if ratio := one["images_per_s_ratio"]:
            interval = f"{ratio['value']:.3f} ({ratio['low']:.3f} to {ratio['high']:.3f})"
            yield f"  images/s of the first by those of the second: {interval}; within {TIE:.0%} they count as equal"
    for name, run in runs:
        search = run["search"]
        yield f"{name}: {search['measured']} of {search['cells']} cells measured in {search['seconds']:.0f} s"
    yield f"exhaustive: {record['cells']} cells"


def named(cell: dict[str, Any]) -> str:
    """A cell in words."""
    size = size_in_words(cell["input_size"]) if cell["input_size"] else "its own size"
    how = f"{cell['streams']} streams of {cell['threads']} threads"
    return f"{title_of(cell['engine'])} {cell['precision'].upper()} at {size}, batch {cell['batch_size']}, {how}"


def entry(one: dict[str, Any]) -> str:
    """Such as "0.868, 61.2 *"."""
    ap = "unknown" if one["ap"] is None else f"{one['ap']:.4f}"
    return f"{ap}, {one['images_per_s']:.1f}{' *' if one['on_front'] else ''}"


if __name__ == "__main__":
    main()
