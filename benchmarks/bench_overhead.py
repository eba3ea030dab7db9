"""Hold `gfldeploy bench` against a bare loop around ONNX Runtime, and its hardware monitor against none.

    python benchmarks/bench_overhead.py --bundle demo/bundle --data annotations.json --machine epyc-2core

Interleaved, `--rounds` times, each in a process of its own and on the same input: `InferenceSession.run` in a loop with
nothing else of this project, `gfldeploy bench` with its monitor, and `gfldeploy bench` without. Their order turns with
each round. Prints the medians over all rounds, and the median over the rounds of each ratio; writes all samples to
results/MACHINE/checks/bench_overhead.json beside this script.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from gfldeploy.bench.results import BenchResults
from gfldeploy.bundle import Bundle
from gfldeploy.files import write_json
from gfldeploy.images.coco import CocoDataset
from gfldeploy.images.decode import read_image
from gfldeploy.machine import describe_machine
from gfldeploy.serialization import plain

HERE = Path(__file__).resolve().parent
# As one would write it: default options, one input, two inferences to warm up.
BARE_LOOP = """
import json, sys, time
import numpy, onnxruntime
model, tensor, seconds = sys.argv[1], numpy.load(sys.argv[2]), float(sys.argv[3])
session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
for _ in range(2):
    session.run(None, {"image": tensor})
latency_ms, begin = [], time.perf_counter()
while time.perf_counter() - begin < seconds:
    start = time.perf_counter()
    session.run(None, {"image": tensor})
    latency_ms.append((time.perf_counter() - start) * 1e3)
print(json.dumps(latency_ms))
"""
Samples = dict[str, list[list[float]]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, required=True, help="an FP32 bundle")
    parser.add_argument("--data", type=Path, required=True, help="COCO annotations; the first image is the input")
    parser.add_argument("--machine", required=True, help="folder of results/ for this machine, such as epyc-2core")
    parser.add_argument("--rounds", type=int, default=9, metavar="R")
    parser.add_argument("--seconds", type=float, default=5.0, metavar="S", help="of each of the three in each round")
    args = parser.parse_args()
    samples = measure(args.bundle, args.data, args.rounds, args.seconds)
    output = HERE / "results" / args.machine / "checks" / "bench_overhead.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    write_json(output, {"machine": plain(describe_machine()), "latency_ms": samples})
    print(summary(samples))


def measure(bundle: Path, data: Path, rounds: int, seconds: float) -> Samples:
    """Latencies in milliseconds of the three, by name, a list for each round."""
    opened = Bundle.open(bundle)
    preprocess = opened.manifest.preprocess
    model, _ = opened.graph("onnx")
    with tempfile.TemporaryDirectory() as folder:
        tensor = Path(folder, "image.npy")
        np.save(tensor, preprocess.batch([preprocess(read_image(CocoDataset.load(data, None, 1).images[0].path))]))

        def bare() -> list[float]:
            command = [sys.executable, "-c", BARE_LOOP, str(model), str(tensor), str(seconds)]
            answer = subprocess.run(command, check=True, stdout=subprocess.PIPE)
            return list(json.loads(answer.stdout))

        def bench(monitor_hz: float) -> list[float]:
            results = Path(folder, "results.json")
            command = [
                *(sys.executable, "-m", "gfldeploy", "bench", str(bundle), "--data", str(data), "--limit", "1"),
                *("--engines", "onnxruntime", "--precisions", "fp32", "--batch-sizes", "1", "--rounds", "1"),
                *("--min-seconds", str(seconds), "--max-seconds", str(seconds), "--no-accuracy", "--no-peak"),
                *("--monitor-hz", str(monitor_hz), "--output", str(results), "--force"),
            ]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            return list(BenchResults.read(results).cells[0].latency_ms)

        legs: Mapping[str, Callable[[], list[float]]] = {
            "bare": bare,
            "monitored": lambda: bench(5.0),
            "unmonitored": lambda: bench(0.0),
        }
        samples: Samples = {name: [] for name in legs}
        names = list(legs)
        for number in range(rounds):
            turn = number % len(names)
            for name in names[turn:] + names[:turn]:
                samples[name].append(legs[name]())
    return samples


def summary(samples: Samples) -> str:
    """The medians, and two ratios: the median over the rounds, and in brackets the least and the largest."""
    lines = [
        f"{name:12} {statistics.median(x for one in rounds for x in one):8.2f} ms" for name, rounds in samples.items()
    ]
    for name, base, what in (
        ("monitored", "bare", "bench / bare loop"),
        ("monitored", "unmonitored", "with / without the monitor"),
    ):
        found = ratios(samples[name], samples[base])
        lines.append(f"{what}: {statistics.median(found):.4f} ({min(found):.4f} to {max(found):.4f})")
    return "\n".join(lines)


def ratios(rounds: Sequence[Sequence[float]], base: Sequence[Sequence[float]]) -> list[float]:
    """Of the medians of each round."""
    return [statistics.median(a) / statistics.median(b) for a, b in zip(rounds, base, strict=True)]


if __name__ == "__main__":
    main()
