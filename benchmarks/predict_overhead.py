"""What everything but inference costs `gfldeploy predict`: its pipeline against the network alone.

    python benchmarks/predict_overhead.py --source r50 --data annotations.json --name gfl_r50 --machine epyc-2core

Interleaved, `--rounds` times, on the same images: the network alone on inputs that lie ready in memory; the pipeline,
from files to detections; and the same steps one after the other. All in the batches of one input size that `predict`
makes. Prints seconds an image, and the share of the pipeline's time that the network alone does not take, each the
median over the rounds with the least and the most; writes all rounds to
results/MACHINE/checks/NAME_predict_overhead.json beside this script. The network alone has all the CPU: what decoding
takes from it while it runs counts as overhead.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

from gfldeploy.batching.buckets import group
from gfldeploy.engines.base import Engine
from gfldeploy.engines.detect import detect_batch
from gfldeploy.engines.registry import open_engine
from gfldeploy.files import write_json
from gfldeploy.images.coco import CocoDataset
from gfldeploy.images.decode import image_size, read_image
from gfldeploy.machine import describe_machine
from gfldeploy.predict.engine_selection import Choice, choose
from gfldeploy.predict.pipeline import detect_groups
from gfldeploy.predict.sources import picture_of
from gfldeploy.serialization import plain

HERE = Path(__file__).resolve().parent
NAMES = ("network", "pipeline", "in_turn")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, required=True, help="a bundle or a deploy.yml")
    parser.add_argument("--data", type=Path, required=True, help="COCO annotations (.json), images/ beside them")
    parser.add_argument("--engine")
    parser.add_argument("--precision")
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--name", required=True, help="of the results file")
    parser.add_argument("--machine", required=True, help="folder of results/ for this machine, such as epyc-2core")
    parser.add_argument("--images", type=int, default=16, metavar="I", help="the first so many (default: 16)")
    parser.add_argument("--rounds", type=int, default=5, metavar="R")
    args = parser.parse_args()
    choice = choose(args.source, args.engine, args.precision, None, args.threads, args.batch_size)
    paths = [image.path for image in CocoDataset.load(args.data, limit=args.images).images]
    with open_engine(choice.engine, choice.bundle, choice.options) as engine:
        seconds = measure(ways(engine, choice, paths), args.rounds, len(paths))
    record = {
        "machine": plain(describe_machine()), "engine": choice.engine, "precision": choice.options.precision,
        "threads": choice.options.threads, "batch_size": choice.batch_size, "images": len(paths), "seconds": seconds,
    }  # fmt: skip
    output = HERE / "results" / args.machine / "checks" / f"{args.name}_predict_overhead.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    write_json(output, record)
    print(table(seconds))


def ways(engine: Engine, choice: Choice, paths: list[Path]) -> dict[str, Callable[[], object]]:
    """What is timed, by name."""
    manifest = choice.bundle.manifest
    preprocess = manifest.preprocess
    sizes = [preprocess.input_size(*image_size(path)) for path in paths]
    groups = [[paths[index] for index in one.indices] for one in group(sizes, choice.batch_size)]
    ready = [preprocess.batch_of([read_image(path) for path in one])[0] for one in groups]

    def network() -> None:
        for tensor in ready:
            engine.infer({"image": tensor})

    def pipeline() -> None:
        for _ in detect_groups(
            engine, manifest, map(picture_of, paths), batch_size=choice.batch_size, look_ahead=len(paths)
        ):
            pass

    def in_turn() -> None:
        for one in groups:
            tensor, scales = preprocess.batch_of([read_image(path) for path in one])
            detect_batch(engine, tensor, scales, manifest.nms)

    return dict(zip(NAMES, (network, pipeline, in_turn), strict=True))


def measure(legs: dict[str, Callable[[], object]], rounds: int, images: int) -> dict[str, list[float]]:
    """Seconds an image of every round, after one that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in legs}
    for number in range(-1, rounds):
        for place in range(len(legs)):
            name = list(legs)[(number + place) % len(legs)]
            start = time.perf_counter()
            legs[name]()
            if number >= 0:
                seconds[name].append((time.perf_counter() - start) / images)
    return seconds


def table(seconds: dict[str, list[float]]) -> str:
    lines = ["| | ms an image | not the network |", "|---|---|---|"]
    for name in NAMES:
        ms = [value * 1e3 for value in seconds[name]]
        shares = [100 * (1 - base / value) for base, value in zip(seconds["network"], seconds[name], strict=True)]
        lines.append(f"| {name.replace('_', ' ')} | {spread(ms)} | {spread(shares)} % |")
    return "\n".join(lines)


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.3g} ({min(values):.3g} to {max(values):.3g})"


if __name__ == "__main__":
    main()
