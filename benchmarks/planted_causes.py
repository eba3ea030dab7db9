"""Whether `gfldeploy analyze` names a cause that is known: four cases with one planted cause each.

    python benchmarks/planted_causes.py --bundle demo/fp32 --data annotations.json --machine epyc-2core

padding: both orientations in turn. host: the same scene as photographs of 24 megapixels, of one orientation.
saturated: one orientation at batch 2. starved: one orientation, while a process that never rests holds one of the CPUs.
Prints what was named at the largest batch and the sentences; writes them to
results/MACHINE/checks/planted_causes.json beside this script. Exit code 1 if a cause was missed.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import cv2

from gfldeploy.analysis.sweep import input_sizes
from gfldeploy.bundle import Bundle
from gfldeploy.files import write_json
from gfldeploy.images.coco import CocoDataset
from gfldeploy.machine import describe_machine
from gfldeploy.serialization import plain

HERE = Path(__file__).resolve().parent
IMAGES, LARGE = 16, (4000, 6000)  # height, width


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, required=True, help="of a detector without random weights")
    parser.add_argument("--data", type=Path, required=True, help="COCO annotations (.json), images/ beside them")
    parser.add_argument("--engine", default="onnxruntime")
    parser.add_argument("--machine", required=True, help="folder of results/ for this machine, such as epyc-2core")
    parser.add_argument("--rounds", type=int, default=9, metavar="R", help="one may be bad (default: 9)")
    args = parser.parse_args()
    paths = [image.path for image in CocoDataset.load(args.data).images]
    sizes = input_sizes(paths, Bundle.open(args.bundle))
    wide = [path for path, size in zip(paths, sizes, strict=True) if size[1] > size[0]][:IMAGES]
    tall = [path for path, size in zip(paths, sizes, strict=True) if size[0] > size[1]][:IMAGES]
    mixed = [path for pair in zip(wide, tall, strict=True) for path in pair][:IMAGES]
    named = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)

        def analyze(case: str, bundle: Path, images: list[Path], batch_size: int) -> None:
            found = run(bundle, images, batch_size, args.engine, args.rounds, folder / case)
            named[case] = {"cause": found["batches"][-1]["cause"], "answer": found["answer"], **found["batches"][-1]}
            print(f"{case}: {named[case]['cause']}. {found['answer'][-1]}", flush=True)

        analyze("padding", args.bundle, mixed, 8)
        analyze("host", args.bundle, enlarged(wide[:4], folder), 4)
        analyze("saturated", args.bundle, wide, 2)
        with busy_cpu():
            analyze("starved", args.bundle, wide, 8)
    output = HERE / "results" / args.machine / "checks" / "planted_causes.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    write_json(output, {"machine": plain(describe_machine()), "engine": args.engine, "cases": named})
    sys.exit(any(case != one["cause"] for case, one in named.items()))


def run(bundle: Path, images: list[Path], batch_size: int, engine: str, rounds: int, folder: Path) -> dict:  # type: ignore[type-arg]
    """What `gfldeploy analyze` writes for these images."""
    folder.mkdir()
    entries = []
    for number, path in enumerate(images, start=1):
        height, width = cv2.imread(str(path)).shape[:2]
        entries.append({"id": number, "file_name": str(path), "height": height, "width": width})
        (folder / f"{number}{path.suffix}").symlink_to(path)
        entries[-1]["file_name"] = f"{number}{path.suffix}"
    data = folder / "annotations.json"
    data.write_text(json.dumps({"images": entries, "annotations": [], "categories": [{"id": 1, "name": "any"}]}))
    output = folder / "analysis.json"
    command = [
        *(sys.executable, "-m", "gfldeploy", "analyze", str(bundle), "--data", str(data), "--images", str(folder)),
        *("--engine", engine, "--batch-sizes", str(batch_size), "--rounds", str(rounds), "--no-invariance"),
        *("--output", str(output)),
    ]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return dict(json.loads(output.read_text()))


def enlarged(paths: list[Path], folder: Path) -> list[Path]:
    """The images as large photographs."""
    written = []
    for path in paths:
        target = (folder / f"large_{path.stem}.jpg").resolve()
        cv2.imwrite(str(target), cv2.resize(cv2.imread(str(path)), LARGE[::-1], interpolation=cv2.INTER_CUBIC))
        written.append(target)
    return written


@contextmanager
def busy_cpu() -> Iterator[None]:
    """A process that never rests on the first CPU that may be used."""
    process = multiprocessing.get_context("spawn").Process(
        target=spin, args=(min(os.sched_getaffinity(0)),), daemon=True
    )
    process.start()
    try:
        yield
    finally:
        process.kill()
        process.join()


def spin(cpu: int) -> None:
    os.sched_setaffinity(0, {cpu})
    while True:
        pass


if __name__ == "__main__":
    main()
