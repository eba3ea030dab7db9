"""Batching policies on a real engine: the same arrivals, by turns, in real time.

    python benchmarks/serve_policies.py --bundle demo/fp32 --data annotations.json --engine onnxruntime \\
        --name demo_onnxruntime_fp32 --machine epyc-2core

Measures batches of 1 to `--most` at the two commonest input sizes of the data, fits the latency model to them, and lets
images of both sizes arrive at random (Poisson), at 80% of what the engine does in its best batches. The bound is
`--bound` times what the largest batch takes. By turns, `--rounds` times on the same trace: the adaptive policy, no
batching, and a fixed batch with a timeout of a tenth of the bound (Triton's rule). Requests that a policy has not
served in time count for nothing. Prints for each policy how many images a second were served within the bound, and the
99th percentile of the latency of those served; writes all of it to results/MACHINE/checks/NAME_serve.json beside this
script.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from gfldeploy.analysis.passes import input_sizes
from gfldeploy.batching.buckets import Size
from gfldeploy.batching.latency import LatencyModel, Point
from gfldeploy.batching.play import Played, RealClock, play
from gfldeploy.batching.policy import Adaptive, FixedWithTimeout, NoBatching, Policy, Request
from gfldeploy.batching.traces import make_trace
from gfldeploy.bench.records import plain
from gfldeploy.bundle import Bundle
from gfldeploy.engines.base import Engine, EngineOptions
from gfldeploy.engines.registry import open_engine
from gfldeploy.files import write_json
from gfldeploy.images.coco import CocoDataset
from gfldeploy.images.decode import read_image
from gfldeploy.images.preprocess import Prepared, Preprocess
from gfldeploy.machine import describe_machine, usable_threads

HERE = Path(__file__).resolve().parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True, help="COCO annotations (.json), images/ beside them")
    parser.add_argument("--engine", default="onnxruntime")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--name", required=True, help="of the results file")
    parser.add_argument("--machine", required=True, help="folder of results/ for this machine, such as epyc-2core")
    parser.add_argument("--most", type=int, default=8, metavar="N", help="images in a batch (default: 8)")
    parser.add_argument("--load", type=float, default=0.8)
    parser.add_argument("--bound", type=float, default=4.0, help="times the largest batch's latency (default: 4)")
    parser.add_argument("--seconds", type=float, default=20.0, help="of the trace (default: 20)")
    parser.add_argument("--rounds", type=int, default=3, metavar="R")
    args = parser.parse_args()
    bundle = Bundle.open(args.bundle)
    preprocess = bundle.manifest.preprocess
    images = choose(bundle, args.data)
    with open_engine(args.engine, bundle, EngineOptions(args.precision, "cpu", usable_threads())) as engine:
        points = measure(engine, preprocess, images, args.most)
        truth = LatencyModel.fit(points)
        best = {size: min(one.ms / one.images for one in points if one.size == size) for size in images}
        rate = args.load * 1e3 / statistics.fmean(best.values())
        bound_s = args.bound * max(one.ms for one in points) / 1e3
        trace = make_trace("poisson", rate, max(int(rate * args.seconds), 50), dict.fromkeys(images, 1.0), bound_s, 0)

        def run(batch: Sequence[Request], size: Size) -> None:
            engine.infer({"image": preprocess.batch([images[one.size] for one in batch], size)})

        found: dict[str, list[Played]] = {"adaptive": [], "no batching": [], "fixed with timeout": []}
        for number in range(args.rounds):
            names = list(found)
            turn = number % len(names)
            for name in names[turn:] + names[:turn]:
                policies: dict[str, Policy] = {
                    "adaptive": Adaptive(LatencyModel.fit(points), args.most),
                    "no batching": NoBatching(),
                    "fixed with timeout": FixedWithTimeout(args.most, bound_s / 10),
                }
                found[name].append(play(trace, policies[name], run, RealClock()))
    print(f"{len(trace)} images at {rate:.1f} a second, bound {bound_s * 1e3:.0f} ms; by the image, batch 1 to best:")
    for size in images:
        single = next(one.ms for one in points if one.size == size and one.images == 1)
        print(f"  {size[0]}x{size[1]}: {single:.1f} to {best[size]:.1f} ms")
    print(f"Latency model: {', '.join(f'{value:.2f}' for value in truth.coefficients)} ms a batch, image, megapixel\n")
    print(table(found))
    output = HERE / "results" / args.machine / "checks" / f"{args.name}_serve.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    record = {
        "machine": plain(describe_machine()), "engine": args.engine, "precision": args.precision,
        "rate": rate, "bound_ms": bound_s * 1e3, "points": plain(points),
        "policies": {name: [summary(one) for one in rounds] for name, rounds in found.items()},
    }  # fmt: skip
    write_json(output, record)


def choose(bundle: Bundle, data: Path) -> dict[Size, Prepared]:
    """An image of each of the two commonest input sizes."""
    paths = [image.path for image in CocoDataset.load(data).images]
    sizes = input_sizes(paths, bundle)
    chosen = [size for size, _ in Counter(sizes).most_common(2)]
    return {size: bundle.manifest.preprocess(read_image(paths[sizes.index(size)])) for size in chosen}


def measure(engine: Engine, preprocess: Preprocess, images: dict[Size, Prepared], most: int) -> list[Point]:
    """The median of five batches of every number of images at each size."""
    points = []
    for size, image in images.items():
        for count in range(1, most + 1):
            tensor = preprocess.batch([image] * count)
            times = []
            for _ in range(6):
                start = time.perf_counter()
                engine.infer({"image": tensor})
                times.append((time.perf_counter() - start) * 1e3)
            points.append(Point(count, size, statistics.median(times[1:])))
    return points


def summary(played: Played) -> dict[str, object]:
    return {
        "requests": len(played.outcomes),
        "kept": played.kept,
        "kept_per_s": played.served_per_s,
        "rejected": sum(not one.served for one in played.outcomes),
        "p99_ms": float(np.percentile(played.latency_ms, 99)),
        "padding": played.padding,
        "batch_sizes": dict(sorted(Counter(one.batch for one in played.outcomes if one.served).items())),
    }


def table(found: dict[str, list[Played]]) -> str:
    lines = [
        "| policy | in time, images/s | against adaptive | in time | p99 ms | padding |",
        "|---|---|---|---|---|---|",
    ]
    base = [one.served_per_s for one in found["adaptive"]]
    for name, rounds in found.items():
        ratios = [one / other for one, other in zip([x.served_per_s for x in rounds], base, strict=True)]
        share = statistics.fmean(one.kept / len(one.outcomes) for one in rounds)
        p99 = max(float(np.percentile(one.latency_ms, 99)) for one in rounds)
        lines.append(
            f"| {name} | {statistics.median(one.served_per_s for one in rounds):.1f} "
            f"| {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) "
            f"| {share:.1%} | {p99:.0f} | {rounds[0].padding:.2f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
