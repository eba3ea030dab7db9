"""Measure whether memory stays flat while the dynamic batcher serves for minutes: `DetectorBatcher` on a real engine.

    python benchmarks/soak.py --bundle demo/fp32 --machine epyc-2core --name demo

Images of random sizes arrive at random times: alternately for half a minute at 0.7 and for ten seconds at 1.5 times
what the engine does one by one, so that queues fill and requests are rejected. One in fifty is taken back at once,
one in fifty makes its batch fail, one in a hundred leaves no time. Every `--every` seconds the resident memory,
Python's allocated blocks and its objects are sampled. What was done, the curve, and the growth from the second tenth of
the time to the last go to results/MACHINE/checks/NAME_soak.json beside this script. Exits with 1 if a request was never
answered, or if resident memory grew by more than `--most-growth`.
"""

from __future__ import annotations

import argparse
import gc
import random
import sys
import threading
import time
from collections import Counter
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import psutil

from gfldeploy.batching.batcher import Counts, DetectorBatcher
from gfldeploy.batching.buckets import Size
from gfldeploy.batching.latency import LatencyModel
from gfldeploy.batching.policy import Adaptive
from gfldeploy.bench.scenarios import measure_points
from gfldeploy.bundle import Bundle
from gfldeploy.engines.base import EngineOptions
from gfldeploy.engines.hardware import usable_threads
from gfldeploy.engines.registry import open_engine
from gfldeploy.errors import RejectedError
from gfldeploy.files import write_json
from gfldeploy.images.preprocess import Prepared
from gfldeploy.machine import describe_machine

HERE = Path(__file__).resolve().parent
_PHASES = ((30.0, 0.7), (40.0, 1.5))  # until that many seconds of a round: how high the load is
_MOST = 8
_BOUND = 6.0  # the deadline, times what the largest batch takes
_LEAST, _LARGEST = 64, 224  # sides of the images, pixels


@dataclass(frozen=True)
class Sample:
    """`rss_mb`: resident memory, 10^6 bytes; `blocks`: `sys.getallocatedblocks`; `objects`: that the collector
    knows."""

    seconds: float
    submitted: int
    rss_mb: float
    blocks: int
    objects: int


class Outcomes:
    """Counts how futures end, and keeps none of them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.counts: Counter[str] = Counter()

    def add(self, name: str) -> None:
        with self._lock:
            self.counts[name] += 1

    def done(self, future: Future[Any]) -> None:
        if future.cancelled():
            return self.add("cancelled")
        error = future.exception()
        if isinstance(error, RejectedError):
            return self.add(f"rejected: {error.reason}")
        return self.add("answered" if error is None else "failed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--engine", default="onnxruntime")
    parser.add_argument("--machine", required=True, help="folder of results/ for this machine, such as epyc-2core")
    parser.add_argument("--name", required=True, help="of the results file")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--every", type=float, default=5.0, metavar="SECONDS")
    parser.add_argument("--most-growth", type=float, default=1.05, metavar="RATIO")
    args = parser.parse_args()
    bundle = Bundle.open(args.bundle)
    options = EngineOptions(bundle.manifest.precision, "cpu", usable_threads())
    curve: list[Sample] = []
    with open_engine(args.engine, bundle, options) as engine:
        preprocess = bundle.manifest.preprocess
        prepared = random_images(preprocess.pad_stride or 32)
        points, _ = measure_points(engine, prepared, preprocess, _MOST)
        model = LatencyModel.fit(points)
        sizes = [preprocess.padded_size(*one.tensor.shape[1:]) for one in prepared]
        rate = 1e3 / fmean(model.predict(1, size) for size in sizes)
        bound_ms = _BOUND * max(model.predict(_MOST, size) for size in sizes)
        outcomes = Outcomes()
        with DetectorBatcher(engine, bundle, Adaptive(model, _MOST)) as batcher:
            serve(batcher, prepared, sizes, rate, bound_ms, args, outcomes, curve)
        counts = batcher.counts
    found = record(args, counts, outcomes, curve)
    output = HERE / "results" / args.machine / "checks" / f"{args.name}_soak.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    write_json(output, found)
    print(line(found))
    if found["unanswered"] or found["growth"]["rss"] > args.most_growth:
        sys.exit("requests were never answered, or memory grew")


def random_images(step: int) -> list[Prepared]:
    """One of every size whose sides are such multiples within the limits, ready for the network."""
    draw, sides = np.random.default_rng(0), range(-(-_LEAST // step) * step, _LARGEST + 1, step)
    return [Prepared(draw.standard_normal((3, *size), np.float32), (1.0, 1.0)) for size in product(sides, sides)]


def serve(
    batcher: DetectorBatcher,
    prepared: list[Prepared],
    sizes: list[Size],
    rate: float,
    bound_ms: float,
    args: argparse.Namespace,
    outcomes: Outcomes,
    curve: list[Sample],
) -> None:
    """Submit until the time is over, as the module says."""
    draw, process = random.Random(0), psutil.Process()
    begin = time.monotonic()
    due, following = 0.0, args.every
    while (now := time.monotonic() - begin) < 60 * args.minutes:
        if now >= following:
            curve.append(
                Sample(
                    now,
                    batcher.counts.submitted,
                    process.memory_info().rss / 1e6,
                    sys.getallocatedblocks(),
                    len(gc.get_objects()),
                )
            )
            following += args.every
        if now < due:
            time.sleep(min(due - now, 0.01))
            continue
        load = next(load for end, load in _PHASES if now % _PHASES[-1][0] < end)
        due = max(due, now - 1.0) + draw.expovariate(rate * load)
        which, kind = draw.randrange(len(prepared)), draw.random()
        image: Any = None if kind < 0.02 else prepared[which]  # None: the batch fails, then that image alone
        try:
            future = batcher.submit(image, sizes[which], 0.01 if 0.02 <= kind < 0.03 else bound_ms)
        except RejectedError as error:
            outcomes.add(f"rejected: {error.reason}")
            continue
        future.add_done_callback(outcomes.done)
        if 0.03 <= kind < 0.05:
            future.cancel()


def record(args: argparse.Namespace, counts: Counts, outcomes: Outcomes, curve: list[Sample]) -> dict[str, Any]:
    """What is written: settings, counts, growth and curve."""
    last = curve[-1].seconds
    early = [one for one in curve if last / 10 <= one.seconds < 2 * last / 10] or curve[:1]
    late = [one for one in curve if one.seconds >= 9 * last / 10]
    means = {
        name: tuple(fmean(getattr(one, field) for one in part) for part in (early, late))
        for name, field in (("rss", "rss_mb"), ("blocks", "blocks"), ("objects", "objects"))
    }
    return {
        "machine": asdict(describe_machine()),
        "engine": args.engine,
        "minutes": args.minutes,
        "counts": asdict(counts),
        "outcomes": dict(sorted(outcomes.counts.items())),
        "unanswered": counts.submitted - sum(outcomes.counts.values()),
        "means": means,
        "growth": {name: late / early for name, (early, late) in means.items()},
        "curve": [asdict(one) for one in curve],
    }


def line(found: dict[str, Any]) -> str:
    """The figures on one line."""
    before, after = found["means"]["rss"]
    blocks = found["growth"]["blocks"]
    outcomes = ", ".join(f"{name} {count:,}" for name, count in found["outcomes"].items())
    return (
        f"{found['counts']['submitted']:,} requests in {found['minutes']:g} minutes ({outcomes}): "
        f"{before:.1f} MB, then {after:.1f} MB; Python's blocks {blocks:.3f} times as many"
    )


if __name__ == "__main__":
    main()
