"""Batching policies on a real engine, at a load and a bound that suit it: `gfldeploy bench --scenarios server`.

    python benchmarks/serve_policies.py --bundle demo/fp32 --data annotations.json --engine onnxruntime \\
        --name demo_onnxruntime_fp32 --machine epyc-2core

Times batches of 1 to `--most` of the first `--limit` images. They are then to arrive at `--load` of the rate that the
engine reaches in its best batches, and to be answered within `--bound` times what the largest batch takes. `bench`
measures no batching, a fixed batch with a timeout and the dynamic batcher on that, interleaved, in `--rounds` rounds of
`--seconds`. Writes results/MACHINE/checks/NAME_serve.json beside this script (`gfldeploy report` shows it) and prints a
row for each policy.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from statistics import fmean

from gfldeploy.batching.latency import LatencyModel
from gfldeploy.bench.inputs import prepare_images
from gfldeploy.bench.results import BenchResults
from gfldeploy.bench.scenarios import measure_points
from gfldeploy.bench.table import Row, rows
from gfldeploy.bundle import Bundle
from gfldeploy.engines.base import DEVICES, EngineOptions
from gfldeploy.engines.hardware import usable_threads
from gfldeploy.engines.registry import open_engine
from gfldeploy.images.coco import CocoDataset

HERE = Path(__file__).resolve().parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True, help="COCO annotations (.json), images/ beside them")
    parser.add_argument("--engine", default="onnxruntime")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--device", default="cpu", choices=DEVICES)
    parser.add_argument("--name", required=True, help="of the results file")
    parser.add_argument("--machine", required=True, help="folder of results/ for this machine, such as epyc-2core")
    parser.add_argument("--most", type=int, default=8, metavar="N", help="images in a batch (default: 8)")
    parser.add_argument("--load", type=float, default=0.8)
    parser.add_argument("--bound", type=float, default=4.0, help="times the largest batch's latency (default: 4)")
    parser.add_argument("--seconds", type=float, default=20.0, help="of arrivals, in each round (default: 20)")
    parser.add_argument("--rounds", type=int, default=3, metavar="R")
    parser.add_argument("--limit", type=int, default=32, metavar="L", help="images that arrive, over and over")
    args = parser.parse_args()
    rate, bound_ms = load(args)
    output = HERE / "results" / args.machine / "checks" / f"{args.name}_serve.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    command = [
        *(sys.executable, "-m", "gfldeploy", "bench", str(args.bundle), "--data", str(args.data)),
        *("--engines", args.engine, "--precisions", args.precision, "--device", args.device),
        *("--batch-sizes", f"1,{args.most}"),
        *("--scenarios", "server", "--rates", f"{rate:.3g}", "--latency-bound-ms", f"{bound_ms:.0f}"),
        *("--rounds", str(args.rounds), "--min-seconds", str(args.seconds), "--limit", str(args.limit)),
        *("--no-accuracy", "--no-peak", "--output", str(output), "--force"),
    ]
    subprocess.run(command, check=True)
    output.with_suffix(".csv").unlink()
    output.with_suffix(".html").unlink()
    print(f"\n{rate:.3g} images a second, {bound_ms:.0f} ms\n\n{table(rows(BenchResults.read(output)))}")


def load(args: argparse.Namespace) -> tuple[float, float]:
    """Images a second that are to arrive, and milliseconds in which they are to be answered."""
    bundle = Bundle.open(args.bundle)
    preprocess = bundle.manifest.preprocess
    images = prepare_images([one.path for one in CocoDataset.load(args.data, None, args.limit).images], preprocess)
    with open_engine(args.engine, bundle, EngineOptions(args.precision, args.device, usable_threads())) as engine:
        points, _ = measure_points(engine, images, preprocess, args.most)
    model = LatencyModel.fit(points)
    sizes = [preprocess.padded_size(*one.tensor.shape[1:]) for one in images]
    best_ms = fmean(min(model.predict(count, size) / count for count in (1, args.most)) for size in sizes)
    return args.load * 1e3 / best_ms, args.bound * max(model.predict(args.most, size) for size in sizes)


def table(found: Iterable[Row]) -> str:
    lines = [
        "| policy | in time, images/s | of what is possible | rejected | p99 ms | mean batch | padding |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in found:
        if (served := row.served) is None:
            continue
        possible = "" if served.percent_of_possible is None else f"{served.percent_of_possible:.0f}%"
        p99 = "" if (tail := row.latency_ms(99)) is None else f"{tail.value:.0f}"
        lines.append(
            f"| {row.cell.policy} | {served.in_time_per_s:.1f} | {possible} | {served.rejected:.0%} | {p99} "
            f"| {served.mean_batch:.1f} | {row.padding:.2f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
