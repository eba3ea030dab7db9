"""gfldeploy beside what its users would run instead, from files to boxes and in the network alone.

    python benchmarks/files_to_boxes.py --bundle demo/int8 --machine epyc-2core --name demo_int8 [--before CHECKOUT] \\
        [-- OPTIONS]

Every leg is a process of its own; all are interleaved, `--rounds` times, after one that fills the caches: engines', and
Python's of compiled modules, as an installed package has them. Where a machine is quiet for minutes only, run it with
`--rounds 0` and PYTHONPYCACHEPREFIX set to a folder that stays, which fills them, and then with `--append` each time.

From files to boxes, from the start of a process to its end, on the same `--images` images of the built-in detector's
data, or those in `--folder`: "plain script" is `rivals.openvino_throughput` on the bundle's ONNX file at `--size`, with
OpenVINO's throughput hint; it keeps the boxes and writes nothing. "predict" also takes what follows `--`, such as
`--engine onnxruntime`. `--before` adds `predict` of another checkout, and says whether its files have the same bytes.
"network alone" is the inferences that `predict` makes, one after the other in one thread, on inputs that lie ready: its
CPU time is of these inferences alone, so that the difference is what everything else takes.

In the network alone, for `--seconds` on random inputs of `--size`: OpenVINO's own benchmark_app with its hints on the
bundle's ONNX file, a loop around one session of ONNX Runtime, and what `bench` times in its offline scenario, by
engine, streams and `--batch-sizes`. Left to itself OpenVINO computes in BF16 what is not INT8, where the processor has
BF16: the legs with "f32" must not. `--no-files` and `--no-network` leave out one half.

Prints images a second, milliseconds of CPU an image, how many processors were busy, and images a second by the plain
script's or by benchmark_app's with the throughput hint, each the median over the rounds with the least and the most;
writes all rounds to results/MACHINE/checks/NAME_files_to_boxes.json beside this script.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import gfldeploy
from gfldeploy.batching.buckets import stream_batches
from gfldeploy.bench.timing import Settings, measure
from gfldeploy.bundle import Bundle
from gfldeploy.demo.dataset import generate
from gfldeploy.engines.base import EngineOptions, Precision, Shape
from gfldeploy.engines.hardware import usable_threads
from gfldeploy.engines.registry import capability, open_engine
from gfldeploy.files import files_below, read_json, write_json
from gfldeploy.images.decode import image_size, read_image
from gfldeploy.machine import describe_machine
from gfldeploy.predict.engine_selection import choose
from gfldeploy.serialization import plain

HERE = Path(__file__).resolve().parent
PLAIN = "plain script"
PREDICT, BEFORE, NETWORK = "predict", "predict before", "network alone"
APP = "benchmark_app, throughput hint"
NOTE = "predict.json"  # which names the time and the version
READY = 64  # inputs that lie ready at once

Round = tuple[float, float]  # seconds, and seconds of CPU


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, required=True, help="of the built-in detector")
    parser.add_argument("--before", type=Path, metavar="CHECKOUT", help="another version of this project")
    parser.add_argument("--name", default="demo", help="of the results file")
    parser.add_argument("--machine", required=True, help="folder of results/ for this machine, such as epyc-2core")
    parser.add_argument("--images", type=int, default=1000, metavar="I", help="generated ones (default: 1000)")
    parser.add_argument("--folder", type=Path, help="of images, in place of generated ones")
    parser.add_argument("--size", type=int, nargs=2, default=(320, 448), metavar=("H", "W"), help="of the network")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=(1, 2), metavar="B", help="of the network alone")
    parser.add_argument("--seconds", type=float, default=4.0, metavar="S", help="of the network alone, each round")
    parser.add_argument("--rounds", type=int, default=3, metavar="R")
    parser.add_argument("--append", action="store_true", help="to the rounds in the results file; the caches are full")
    parser.add_argument("--no-files", action="store_true")
    parser.add_argument("--no-network", action="store_true")
    parser.add_argument("options", nargs="*", metavar="OPTION", help="of `gfldeploy predict`, after --")
    args = parser.parse_args()
    files: dict[str, list[Round]] = {}
    rates: dict[str, list[float]] = {}
    same_bytes = True
    output = HERE / "results" / args.machine / "checks" / f"{args.name}_files_to_boxes.json"
    first = -1  # round: it fills caches, and does not count
    if args.append:
        before = read_json(output)
        files = {name: [*map(tuple, rounds)] for name, rounds in before["rounds"].items()}
        rates, same_bytes = before["network_images_per_s"], before.get("same_bytes", True)
        first = max(map(len, [*files.values(), *rates.values()]), default=0)
    with tempfile.TemporaryDirectory() as scratch:
        os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
        os.environ.setdefault("PYTHONPYCACHEPREFIX", str(Path(scratch) / "bytecode"))
        folder = args.folder or generate(Path(scratch), "val", args.images).parent / "images"
        images = len(list(folder.iterdir()))
        checkouts = {PREDICT: Path(gfldeploy.__file__).parents[1]} | ({BEFORE: args.before} if args.before else {})
        legs = network_legs(args.bundle, args.size, args.batch_sizes, args.seconds)
        for number in range(first, max(first, 0) + args.rounds):
            if not args.no_files:
                took, same = race(args.bundle, folder, Path(scratch), checkouts, args.size, number, args.options)
                same_bytes &= same
                if number >= 0:
                    files = {name: [*files.get(name, ()), one] for name, one in took.items()}
            if number >= 0 and not args.no_network:
                for name in turned(legs, number):
                    rates.setdefault(name, []).append(legs[name]())
    record = {
        "machine": plain(describe_machine()), "images": images, "size": list(args.size), "options": args.options,
        "rounds": {name: [list(one) for one in rounds] for name, rounds in files.items()},
        "network_images_per_s": {name: rates[name] for name in legs if name in rates},
        **({"same_bytes": same_bytes} if args.before else {}),
    }  # fmt: skip
    output.parent.mkdir(parents=True, exist_ok=True)
    write_json(output, record)
    if not same_bytes:
        print(f"{BEFORE} wrote other bytes")
    if files:
        print(table({name: files[name] for name in (PLAIN, *checkouts, NETWORK)}, images))
    if rates:
        print(network_table({name: rates[name] for name in legs}))


def turned(names: Iterable[str], number: int) -> list[str]:
    """The names, from another one on in each round."""
    all_of_them = list(names)
    return all_of_them[number % len(all_of_them) :] + all_of_them[: number % len(all_of_them)]


def race(
    bundle: Path,
    folder: Path,
    scratch: Path,
    checkouts: Mapping[str, Path],
    size: Sequence[int],
    number: int,
    options: Sequence[str],
) -> tuple[dict[str, Round], bool]:
    """What each leg from files to boxes took in this round, and whether all checkouts wrote the same bytes."""
    model, _ = Bundle.open(bundle).graph("onnx")
    rival: list[object] = [sys.executable, HERE / "rivals.py", model, folder, *size]
    found: dict[str, Round] = {}
    bytes_of = {}
    for name in turned((PLAIN, *checkouts, NETWORK), number):
        if name == NETWORK:
            found[name] = network_alone(bundle, folder, options)
        elif name == PLAIN:
            found[name] = process(rival)[0]
        else:
            output = scratch / name
            command = [sys.executable, "-P", "-m", "gfldeploy", "predict", bundle, folder, "-o", output, "--force"]
            found[name], _ = process([*command, *options], PYTHONPATH=str(checkouts[name].absolute()))
            bytes_of[name] = {one: (output / one).read_bytes() for one in files_below(output) if one != NOTE}
    return found, all(one == bytes_of[PREDICT] for one in bytes_of.values())


def network_legs(
    bundle: Path, size: Sequence[int], batch_sizes: Sequence[int], seconds: float
) -> dict[str, Callable[[], float]]:
    """What measures images a second of the network alone, by name; benchmark_app's throughput hint comes first."""
    opened = Bundle.open(bundle)
    model, cpus = opened.graph("onnx")[0], usable_threads()
    precision = choose(bundle, "openvino").options.precision
    legs: dict[str, Callable[[], float]] = {
        APP: partial(benchmark_app, model, size, seconds, "throughput"),
        "benchmark_app, latency hint": partial(benchmark_app, model, size, seconds, "latency"),
        f"{APP}, f32": partial(benchmark_app, model, size, seconds, "throughput", "-infer_precision", "f32"),
        "onnxruntime, one session": partial(apart, onnxruntime_rate, model, size, seconds),
    }
    cells: list[tuple[str, Precision]] = [("openvino", precision), ("onnxruntime", precision)]
    bf16 = capability("openvino", "bf16", "cpu")
    if precision == "fp32" and bf16.works and bf16.note is None:
        cells.insert(0, ("openvino", "bf16"))
    for engine, computed in cells:
        for streams in sorted({1, cpus}):
            options = EngineOptions(computed, threads=cpus // streams, streams=streams)
            for batch in batch_sizes:
                name = f"gfldeploy, {engine} {computed}, {streams} stream{'s' * (streams > 1)}, batch {batch}"
                legs[name] = partial(apart, network_rate, bundle, engine, options, (batch, *size), seconds)
    return legs


def benchmark_app(model: Path, size: Sequence[int], seconds: float, hint: str, *more: str) -> float:
    """Images a second, as OpenVINO's own tool tells them of one image an inference."""
    run = "from openvino.tools.benchmark.main import main; main()"
    shape = f"image[1,3,{size[0]},{size[1]}]"
    options = ["-m", model, "-shape", shape, "-hint", hint, "-t", max(1, round(seconds)), *more]
    _, said = process([sys.executable, "-c", run, *options])
    told = re.search(r"Throughput:\s+([0-9.]+) FPS", said)
    if told is None:
        raise SystemExit(f"benchmark_app told no throughput: {said[-1000:]}")
    return float(told[1])


def apart(measure_rate: Callable[..., float], *arguments: object) -> float:
    """What it measures in a process of its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measure_rate, *arguments).result()


def onnxruntime_rate(model: Path, size: Sequence[int], seconds: float) -> float:
    """Images a second of one session, one image after the other."""
    import rivals

    infer, image = rivals.onnxruntime_fp32(model, usable_threads()), random_images(1, *size)
    infer(image)
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        infer(image)
        count += 1
    return count / (time.perf_counter() - start)


def network_rate(bundle: Path, engine: str, options: EngineOptions, shape: Shape, seconds: float) -> float:
    """Images a second as `bench` times them in its offline scenario."""
    with open_engine(engine, Bundle.open(bundle), options, [shape]) as opened:
        samples = measure(opened, [{"image": random_images(*shape)}], Settings(seconds, 1, seconds))
    return samples.images / samples.wall_s


def random_images(count: int, height: int, width: int) -> NDArray[np.float32]:
    return np.random.default_rng(0).standard_normal((count, 3, height, width), np.float32)


def process(command: Sequence[object], **environment: str) -> tuple[Round, str]:
    """What a process takes from its start to its end, and what it says. Ends the script if it fails."""
    start = time.perf_counter()
    with tempfile.TemporaryFile() as said:
        child = subprocess.Popen(list(map(str, command)), env=os.environ | environment, stdout=said, stderr=said)
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.perf_counter() - start
        said.seek(0)
        text = said.read().decode(errors="replace")
        if child.returncode:
            raise SystemExit(text)
    return (seconds, usage.ru_utime + usage.ru_stime), text


def network_alone(bundle: Path, folder: Path, options: Sequence[str]) -> Round:
    """The inferences of the batches that `predict` makes, one after the other in one thread."""
    given = argparse.ArgumentParser()
    given.add_argument("--engine")
    given.add_argument("--batch-size", type=int)
    known, _ = given.parse_known_args(options)
    choice = choose(bundle, known.engine, threads=1, batch_size=known.batch_size)
    preprocess, paths = choice.bundle.manifest.preprocess, sorted(folder.iterdir())
    sized = [(path, preprocess.input_size(*image_size(path))) for path in paths]
    formed = list(stream_batches(sized, choice.batch_size, choice.order))
    batches = [batch for batch, _ in formed]
    options = choice.options.expecting((len(batch), *size) for batch, size in formed)
    seconds = cpu = 0.0
    with open_engine(choice.engine, choice.bundle, options) as engine:
        warmed = set()
        for place in range(0, len(batches), READY):
            ready = [preprocess.batch_of(list(map(read_image, one)))[0] for one in batches[place : place + READY]]
            for tensor in ready:
                if tensor.shape not in warmed:
                    engine.infer({"image": tensor})
                    warmed.add(tensor.shape)
            start, used = time.perf_counter(), time.process_time()
            for tensor in ready:
                engine.infer({"image": tensor})
            seconds, cpu = seconds + time.perf_counter() - start, cpu + time.process_time() - used
    return seconds, cpu


def table(found: Mapping[str, Sequence[Round]], images: int) -> str:
    """A row for each leg."""
    lines = ["| | images/s | CPU, ms an image | processors busy | times the plain script |", "|---|---|---|---|---|"]
    for name, rounds in found.items():
        rates = [images / seconds for seconds, _ in rounds]
        ratios = [plain_s / seconds for (plain_s, _), (seconds, _) in zip(found[PLAIN], rounds, strict=True)]
        busy = [cpu / seconds for seconds, cpu in rounds]
        used = [cpu / images * 1e3 for _, cpu in rounds]
        lines.append(f"| {name} | {' | '.join(map(spread, (rates, used, busy, ratios)))} |")
    return "\n".join(lines)


def network_table(rates: Mapping[str, Sequence[float]]) -> str:
    """A row for each leg of the network alone."""
    lines = ["| network alone | images/s | times benchmark_app |", "|---|---|---|"]
    for name, each in rates.items():
        ratios = [one / app for one, app in zip(each, rates[APP], strict=True)]
        lines.append(f"| {name} | {spread(each)} | {spread(ratios)} |")
    return "\n".join(lines)


def spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.3g} ({min(values):.3g} to {max(values):.3g})"


if __name__ == "__main__":
    main()
