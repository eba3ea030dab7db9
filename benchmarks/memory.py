"""Measure whether the memory of each engine stays flat: images of varying size, one after the other.

    python benchmarks/memory.py --bundles demo/fp32 demo/int8 --machine epyc-2core --name demo

Every engine and precision gets a process of its own and the same sequence of sizes, drawn at random from all whose
sides are multiples of the padding within the limits. Resident memory after the first `--early` images and after the
last one goes to results/MACHINE/checks/NAME_memory.json beside this script, where what was measured with the same
settings stays unless it is measured again; printed is a row of a table for each.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from gfldeploy.bundle import Bundle
from gfldeploy.engines.base import PRECISIONS, EngineOptions, Precision
from gfldeploy.engines.hardware import usable_threads
from gfldeploy.engines.registry import DEFAULT_ENGINES, capability, check_bundle, open_engine
from gfldeploy.files import write_json
from gfldeploy.machine import describe_machine

HERE = Path(__file__).resolve().parent
HEADER = "| engine | precision | MB after {early} images | MB after {images} | ratio | ms |\n|---|---|---|---|---|---|"
_SAMPLES = 100  # of the memory, over a run


@dataclass(frozen=True)
class Growth:
    """Resident memory of one process, 10^6 bytes, after `early` images and after all of them.

    `curve`: (images, MB) on the way. `ms`: mean milliseconds of an inference, of the second half.
    """

    engine: str
    precision: str
    early_mb: float
    late_mb: float
    ms: float
    curve: tuple[tuple[int, float], ...]

    @property
    def ratio(self) -> float:
        """Late by early: 1 where nothing grows."""
        return self.late_mb / self.early_mb

    def row(self) -> str:
        """As a row under `HEADER`."""
        return (
            f"| {self.engine} | {self.precision} | {self.early_mb:.0f} | {self.late_mb:.0f} | {self.ratio:.3f} "
            f"| {self.ms:.1f} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundles", type=Path, nargs="+", required=True, help="an FP32 and an INT8 bundle")
    parser.add_argument("--machine", required=True, help="folder of results/ for this machine, such as epyc-2core")
    parser.add_argument("--name", required=True, help="of the results file")
    parser.add_argument("--engines", default=",".join(DEFAULT_ENGINES), help="(default: %(default)s)")
    parser.add_argument("--images", type=int, default=10_000, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--early", type=int, default=500, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--least", type=int, default=64, metavar="PX", help="shortest side (default: %(default)s)")
    parser.add_argument("--most", type=int, default=320, metavar="PX", help="longest side (default: %(default)s)")
    args = parser.parse_args()
    found = []
    print(HEADER.format(early=args.early, images=args.images))
    for directory, engine, precision in product(args.bundles, args.engines.split(","), PRECISIONS):
        bundle = Bundle.open(directory)
        if not capability(engine, precision, "cpu").works or check_bundle(bundle, precision):
            continue
        sizes = sequence(args.least, args.most, bundle.manifest.preprocess.pad_stride or 32, args.images)
        found.append(apart(directory, engine, precision, sizes, args.early))
        print(found[-1].row(), flush=True)
    output = HERE / "results" / args.machine / "checks" / f"{args.name}_memory.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    settings = {"images": args.images, "early": args.early, "least_px": args.least, "most_px": args.most}
    record = {"machine": asdict(describe_machine()), "settings": settings, "sizes": len(set(sizes))}
    again = {(one.engine, one.precision) for one in found}
    kept = [one for one in kept_of(output, record) if (one["engine"], one["precision"]) not in again]
    write_json(output, record | {"engines": kept + [asdict(one) for one in found]})


def kept_of(output: Path, record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The engines in the file `output`, none if it has another machine or other settings."""
    if not output.exists():
        return []
    before: dict[str, Any] = json.loads(output.read_text(encoding="utf-8"))
    same = all(before.get(key) == json.loads(json.dumps(value)) for key, value in record.items())
    return list(before["engines"]) if same else []


def sequence(least: int, most: int, step: int, count: int) -> list[tuple[int, int]]:
    """Height and width of so many images, at random but always the same."""
    sides = range(-(-least // step) * step, most + 1, step)
    return random.Random(0).choices(list(product(sides, sides)), k=count)


def apart(bundle: Path, engine: str, precision: Precision, sizes: Sequence[tuple[int, int]], early: int) -> Growth:
    """`measure` in a process of its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measure, bundle, engine, precision, sizes, early).result()


def measure(bundle: Path, engine: str, precision: Precision, sizes: Sequence[tuple[int, int]], early: int) -> Growth:
    """Infer an image of each size in turn, in this process."""
    process, pixels = psutil.Process(), np.random.default_rng(0)
    curve, early_mb, half = [], 0.0, 0.0
    every = max(1, len(sizes) // _SAMPLES)
    with open_engine(engine, Bundle.open(bundle), EngineOptions(precision, "cpu", usable_threads())) as opened:
        for done, (height, width) in enumerate(sizes, 1):
            image = pixels.standard_normal((1, 3, height, width), np.float32)
            start = time.perf_counter()
            opened.infer({"image": image})
            half += (time.perf_counter() - start) * (done > len(sizes) // 2)
            if done == early:
                early_mb = process.memory_info().rss / 1e6
            if done % every == 0:
                curve.append((done, process.memory_info().rss / 1e6))
        late_mb = process.memory_info().rss / 1e6
    return Growth(engine, precision, early_mb, late_mb, half / (len(sizes) - len(sizes) // 2) * 1e3, tuple(curve))


if __name__ == "__main__":
    main()
