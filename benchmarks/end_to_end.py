"""From JPEG to boxes: our INT8 against our FP32, and against plain uses of ONNX Runtime and of OpenVINO with NNCF.

    python benchmarks/materials.py --output materials
    python benchmarks/end_to_end.py --materials materials --machine epyc-2core

Every leg is a process that has its model loaded and its shapes warmed up. Interleaved, `--rounds` times, each goes
through all images; the others rest meanwhile. "network alone" is the engine on prepared inputs, one image at a time:
what is left when everything but inference costs nothing. Prints images a second and the ratios that matter, each the
median over the rounds with the least and the most; writes all of it to results/MACHINE/checks/end_to_end.json beside
this script. Needs `pip install openvino nncf` for the legs that use them.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path

from gfldeploy.bundle import Bundle
from gfldeploy.detector import Detector
from gfldeploy.engines.base import EngineOptions, Precision
from gfldeploy.engines.hardware import usable_threads
from gfldeploy.engines.registry import open_engine
from gfldeploy.files import write_json
from gfldeploy.images.coco import CocoDataset
from gfldeploy.images.decode import read_image
from gfldeploy.machine import describe_machine
from gfldeploy.serialization import plain

HERE = Path(__file__).resolve().parent
REFERENCE = "paddle fp32, batch 1"


@dataclass(frozen=True)
class Leg:
    """One way from JPEG to boxes. `way`: "detect", "network", or a rival's; `size`: the batch size."""

    name: str
    way: str
    engine: str = ""
    precision: Precision = "fp32"
    size: int = 1


def legs(engine: str) -> list[Leg]:
    """All of them; `engine` runs our INT8."""
    return [
        Leg(REFERENCE, "detect", "paddle"),
        *(Leg(f"{engine} int8, batch {size}", "detect", engine, "int8", size) for size in (1, 4, 8)),
        Leg(f"{engine} int8, network alone", "network", engine, "int8"),
        Leg("plain onnxruntime fp32, letterbox", "onnxruntime letterbox"),
        Leg("openvino + nncf int8, letterbox", "openvino letterbox"),
        Leg("openvino + nncf int8, stretch", "openvino stretch"),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--materials", type=Path, required=True, metavar="DIR", help="what materials.py wrote")
    parser.add_argument("--engine", default="openvino", help="of our INT8 (default: openvino)")
    parser.add_argument("--machine", required=True, help="folder of results/ for this machine, such as epyc-2core")
    parser.add_argument("--rounds", type=int, default=3, metavar="R")
    parser.add_argument("--only", nargs="+", metavar="WORD", help="legs whose names have all these words")
    args = parser.parse_args()
    chosen = [leg for leg in legs(args.engine) if all(word in leg.name for word in args.only or ())]
    images = len(CocoDataset.load(args.materials / "photos" / "annotations.json").images)
    context = multiprocessing.get_context("spawn")
    workers = {}
    for leg in chosen:
        here, there = context.Pipe()
        process = context.Process(target=work, args=(leg, args.materials, there), daemon=True)
        process.start()
        workers[leg.name] = here
        print(f"{leg.name}: ready after {ask(here):.1f} s", file=sys.stderr, flush=True)
    seconds: dict[str, list[float]] = {leg.name: [] for leg in chosen}
    names = list(seconds)
    for number in range(args.rounds):
        turn = number * len(names) // args.rounds
        for name in names[turn:] + names[:turn]:
            workers[name].send("go")
            seconds[name].append(ask(workers[name]))
    output = HERE / "results" / args.machine / "checks" / "end_to_end.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    record = {
        "machine": plain(describe_machine()),
        "images": images,
        "legs": [asdict(leg) | {"seconds": seconds[leg.name]} for leg in chosen],
    }
    write_json(output, record)
    print(table(seconds, images))


def ask(worker: Connection) -> float:
    """The seconds that a worker took. Ends the script with what went wrong there."""
    answer = worker.recv()
    if isinstance(answer, str):
        raise SystemExit(answer)
    return float(answer)


def work(leg: Leg, materials: Path, pipe: Connection) -> None:
    """Get ready, say so, and go through the images whenever asked; answers are seconds, or what went wrong."""
    try:
        paths = [one.path for one in CocoDataset.load(materials / "photos" / "annotations.json").images]
        start = time.perf_counter()
        run = prepare(leg, materials, paths)
        run()
        pipe.send(time.perf_counter() - start)
        while pipe.recv() == "go":
            start = time.perf_counter()
            run()
            pipe.send(time.perf_counter() - start)
    except EOFError:
        return
    except BaseException:  # noqa: BLE001 - for the script to end with
        pipe.send(f"{leg.name}:\n{traceback.format_exc()}")


def prepare(leg: Leg, materials: Path, paths: Sequence[Path]) -> Callable[[], object]:
    """What goes through all images once."""
    threads = usable_threads()
    if leg.way == "detect":
        bundle = materials / ("int8" if leg.precision == "int8" else "fp32")
        detector = Detector(bundle, engine=leg.engine, precision=leg.precision, threads=threads, batch_size=leg.size)
        return lambda: detector.detect(paths)
    if leg.way == "network":
        opened = Bundle.open(materials / "int8")
        preprocess = opened.manifest.preprocess
        engine = open_engine(leg.engine, opened, EngineOptions(leg.precision, "cpu", threads))
        tensors = [preprocess.batch([preprocess(read_image(path))]) for path in paths]
        return lambda: [engine.infer({"image": tensor}) for tensor in tensors]
    sys.path.insert(0, str(HERE))
    import rivals

    library, way = leg.way.split()
    model, _ = Bundle.open(materials / "exact").graph("onnx")
    if library == "onnxruntime":
        infer = rivals.onnxruntime_fp32(model, threads)
    else:
        calibration = sorted((materials / "calib" / "images").iterdir())
        infer = rivals.openvino_int8(model, calibration, way, threads)
    return lambda: rivals.detect_all(infer, paths, way)


def table(seconds: dict[str, list[float]], images: int) -> str:
    """Images a second of each leg, and how many times as long as our INT8 at batch 1 it takes."""
    lines = ["| | images/s | times as long as our INT8 at batch 1 |", "|---|---|---|"]
    ours = next((name for name in seconds if "int8, batch 1" in name), None)
    for name, rounds in seconds.items():
        ratio = ratios(seconds[name], seconds[ours]) if ours else ""
        lines.append(f"| {name} | {images / statistics.median(rounds):.3g} | {ratio} |")
    return "\n".join(lines)


def ratios(one: Sequence[float], other: Sequence[float]) -> str:
    """How many times as long `one` took, round by round: the median, the least and the most."""
    found = [a / b for a, b in zip(one, other, strict=True)]
    return f"{statistics.median(found):.2f} ({min(found):.2f} to {max(found):.2f})"


if __name__ == "__main__":
    main()
