"""Measure what INT8 is worth in each engine: an FP32 bundle and the INT8 one made of it interleaved, at batch 1.

    python benchmarks/int8_speed.py --bundle FP32 --int8 INT8 --data annotations.json --name r50 --machine epyc-2core

Runs `gfldeploy bench`, every cell once a round, writes its results to results/MACHINE/NAME.json beside this script and
prints a row of a table for each engine: the medians over all rounds, how many times as fast as FP32 INT8 is, and in
brackets the least and the largest of that in a single round. All of it is computed from the file.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from gfldeploy.bench.results import BenchResults, CellResult
from gfldeploy.bundle import Bundle
from gfldeploy.images.coco import CocoDataset
from gfldeploy.images.decode import read_image

HERE = Path(__file__).resolve().parent
HEADER = "| model | engine | FP32 ms | INT8 ms | INT8 is faster by | convolutions in INT8 |\n|---|---|---|---|---|---|"


@dataclass(frozen=True)
class Speedup:
    """INT8 against FP32 in `engine`: median milliseconds over all rounds.

    `ratio`: how many times as fast as FP32 INT8 is; `least` and `most`: the same of the medians of a single round.
    `convolutions`: of one INT8 inference, by precision; None where the engine cannot tell.
    """

    engine: str
    fp32_ms: float
    int8_ms: float
    ratio: float
    least: float
    most: float
    convolutions: dict[str, int] | None

    def row(self, name: str) -> str:
        """As a row under `HEADER`."""
        ran = self.convolutions
        share = f"{ran.get('int8', 0)}/{sum(ran.values())}" if ran else "?"
        return (
            f"| {name} | {self.engine} | {self.fp32_ms:.1f} | {self.int8_ms:.1f} "
            f"| {self.ratio:.2f} ({self.least:.2f} to {self.most:.2f}) | {share} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, required=True, metavar="FP32", help="the FP32 bundle")
    parser.add_argument("--int8", type=Path, required=True, help="the INT8 bundle made of it")
    parser.add_argument("--data", type=Path, required=True, help="COCO annotations (.json), images/ beside them")
    parser.add_argument("--name", required=True, help="of the results file and in the table")
    parser.add_argument("--machine", required=True, help="folder of results/ for this machine, such as epyc-2core")
    parser.add_argument("--rounds", type=int, default=5, metavar="R")
    parser.add_argument("--min-seconds", type=float, default=10.0, metavar="S", help="for each cell in each round")
    parser.add_argument("--limit", type=int, default=8, metavar="L", help="images, all of them timed (default: 8)")
    args = parser.parse_args()
    output = HERE / "results" / args.machine / f"{args.name}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    command = [
        *(sys.executable, "-m", "gfldeploy", "bench", str(args.bundle), str(args.int8), "--data", str(args.data)),
        *("--batch-sizes", "1", "--precisions", "fp32,int8", "--no-accuracy", "--limit", str(args.limit)),
        *("--rounds", str(args.rounds), "--min-seconds", str(args.min_seconds), "--output", str(output), "--force"),
    ]
    subprocess.run(command, check=True)
    results = BenchResults.read(output)
    print(HEADER)
    for speedup in speedups(results):
        print(speedup.row(args.name))
    print(f"\nInputs: {shapes(Bundle.open(args.bundle), args.data, args.limit)}")
    for problem in problems(results):
        print(problem)


def speedups(results: BenchResults) -> list[Speedup]:
    """One for each engine that ran both precisions at batch 1."""
    single = [one for one in results.cells if one.status == "ok" and one.cell.batch_size == 1]
    done = {(one.cell.engine, one.cell.precision): one for one in single}
    engines = dict.fromkeys(engine for engine, _ in done)
    return [
        speedup(done[engine, "fp32"], done[engine, "int8"])
        for engine in engines
        if {(engine, "fp32"), (engine, "int8")} <= set(done)
    ]


def speedup(fp32: CellResult, int8: CellResult) -> Speedup:
    """Two measured cells of one engine."""
    slow, fast = statistics.median(fp32.latency_ms), statistics.median(int8.latency_ms)
    by_round = [
        statistics.median(base.samples.latency_ms) / statistics.median(run.samples.latency_ms)
        for base, run in zip(fp32.runs, int8.runs, strict=True)
    ]
    ran = int8.runs[-1].convolutions
    return Speedup(int8.cell.engine, slow, fast, slow / fast, min(by_round), max(by_round), dict(ran) if ran else None)


def problems(results: BenchResults) -> Iterable[str]:
    """Why a cell failed, and why convolutions of INT8 did not run in INT8."""
    for cell in results.cells:
        if cell.status == "failed":
            yield f"{cell.cell.setup()} failed: {cell.reason}"
        elif cell.status == "ok" and cell.cell.precision == "int8":
            yield from (f"{cell.cell.engine} not in int8: {reason}" for reason in cell.runs[-1].not_low_precision or ())


def shapes(bundle: Bundle, annotations: Path, limit: int) -> str:
    """The shapes of the images as the network's input, the most frequent first."""
    preprocess = bundle.manifest.preprocess
    images = CocoDataset.load(annotations, None, limit).images
    found = Counter(preprocess.batch([preprocess(read_image(image.path))]).shape for image in images)
    return ", ".join(f"{count} of {'x'.join(map(str, shape))}" for shape, count in found.most_common())


if __name__ == "__main__":
    main()
