"""From a folder of files to boxes with a small detector: `gfldeploy predict` against a plain script for OpenVINO.

    python benchmarks/files_to_boxes.py --bundle demo/int8 --machine epyc-2core [--before CHECKOUT] [-- OPTIONS]

Every leg is a process of its own, from its start to its end, on the same `--images` images of the built-in detector's
data; interleaved, `--rounds` times. "plain script" is `rivals.openvino_throughput` on the bundle's ONNX file at
`--size`, with OpenVINO's throughput hint; it keeps the boxes and writes nothing. "predict" also takes what follows
`--`, such as `--engine onnxruntime`. `--before` adds `predict` of another checkout, whose files must have the same
bytes. "network alone" is the inferences that `predict` makes, one after the other in one thread, on inputs that lie
ready: its CPU time is of these inferences alone, so that the difference is what everything else takes.

Prints images a second, milliseconds of CPU an image, how many processors were busy, and images a second by the plain
script's, each the median over the rounds with the least and the most; writes all rounds to
results/MACHINE/checks/NAME_files_to_boxes.json beside this script.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import gfldeploy
from gfldeploy.batching.buckets import stream_batches
from gfldeploy.bundle import Bundle
from gfldeploy.demo.dataset import generate
from gfldeploy.engines.registry import open_engine
from gfldeploy.files import files_below, write_json
from gfldeploy.images.decode import image_size, read_image
from gfldeploy.machine import describe_machine
from gfldeploy.predict.engine_selection import choose
from gfldeploy.serialization import plain

HERE = Path(__file__).resolve().parent
PLAIN = "plain script"
PREDICT, BEFORE, NETWORK = "predict", "predict before", "network alone"
NOTE = "predict.json"  # which names the time and the version
READY = 64  # inputs that lie ready at once

Round = tuple[float, float]  # seconds, and seconds of CPU


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, required=True, help="of the built-in detector")
    parser.add_argument("--before", type=Path, metavar="CHECKOUT", help="another version of this project")
    parser.add_argument("--name", default="demo", help="of the results file")
    parser.add_argument("--machine", required=True, help="folder of results/ for this machine, such as epyc-2core")
    parser.add_argument("--images", type=int, default=1000, metavar="I")
    parser.add_argument("--size", type=int, nargs=2, default=(320, 448), metavar=("H", "W"), help="of the plain script")
    parser.add_argument("--rounds", type=int, default=3, metavar="R")
    parser.add_argument("options", nargs="*", metavar="OPTION", help="of `gfldeploy predict`, after --")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = generate(Path(scratch), "val", args.images).parent / "images"
        checkouts = {PREDICT: Path(gfldeploy.__file__).parents[1]} | ({BEFORE: args.before} if args.before else {})
        found = race(args.bundle, folder, Path(scratch), checkouts, args.size, args.rounds, args.options)
    record = {
        "machine": plain(describe_machine()), "images": args.images, "size": list(args.size),
        "options": args.options, "rounds": {name: [list(one) for one in rounds] for name, rounds in found.items()},
    }  # fmt: skip
    output = HERE / "results" / args.machine / "checks" / f"{args.name}_files_to_boxes.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    write_json(output, record)
    print(table(found, args.images))


def race(
    bundle: Path,
    folder: Path,
    scratch: Path,
    checkouts: Mapping[str, Path],
    size: Sequence[int],
    rounds: int,
    options: Sequence[str],
) -> dict[str, list[Round]]:
    """What each round of each leg took."""
    model, _ = Bundle.open(bundle).graph("onnx")
    rival: list[object] = [sys.executable, HERE / "rivals.py", model, folder, *size]
    found: dict[str, list[Round]] = {name: [] for name in (PLAIN, *checkouts, NETWORK)}
    names = list(found)
    for number in range(-1, rounds):  # the first fills caches, and does not count
        bytes_of = {}
        for name in names[number % len(names) :] + names[: number % len(names)]:
            if name == NETWORK:
                took = network_alone(bundle, folder, options)
            elif name == PLAIN:
                took = process(rival)
            else:
                output = scratch / name
                command = [sys.executable, "-P", "-m", "gfldeploy", "predict", bundle, folder, "-o", output, "--force"]
                took = process([*command, *options], PYTHONPATH=str(checkouts[name].absolute()))
                bytes_of[name] = {one: (output / one).read_bytes() for one in files_below(output) if one != NOTE}
            if number >= 0:
                found[name].append(took)
        if any(one != bytes_of[PREDICT] for one in bytes_of.values()):
            raise SystemExit(f"{BEFORE} wrote other bytes")
    return found


def process(command: Sequence[object], **environment: str) -> Round:
    """A process from its start to its end. Ends the script if it fails."""
    start = time.perf_counter()
    with tempfile.TemporaryFile() as said:
        child = subprocess.Popen(list(map(str, command)), env=os.environ | environment, stdout=said, stderr=said)
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.perf_counter() - start
        if child.returncode:
            said.seek(0)
            raise SystemExit(said.read().decode())
    return seconds, usage.ru_utime + usage.ru_stime


def network_alone(bundle: Path, folder: Path, options: Sequence[str]) -> Round:
    """The inferences of the batches that `predict` makes, one after the other in one thread."""
    given = argparse.ArgumentParser()
    given.add_argument("--engine")
    given.add_argument("--batch-size", type=int)
    known, _ = given.parse_known_args(options)
    choice = choose(bundle, known.engine, threads=1, batch_size=known.batch_size)
    preprocess, paths = choice.bundle.manifest.preprocess, sorted(folder.iterdir())
    sized = [(path, preprocess.input_size(*image_size(path))) for path in paths]
    batches = [batch for batch, _ in stream_batches(sized, choice.batch_size, choice.order)]
    seconds = cpu = 0.0
    with open_engine(choice.engine, choice.bundle, choice.options) as engine:
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


def spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.3g} ({min(values):.3g} to {max(values):.3g})"


if __name__ == "__main__":
    main()
