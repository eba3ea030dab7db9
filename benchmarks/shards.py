"""Whether parts of a prediction, done by jobs that know nothing of each other, merge into the bytes of one run, and how
much memory `gfldeploy predict` takes of many images.

    python benchmarks/shards.py --bundle demo/int8 --images demo/data/val/images --machine epyc-2core

First `--count` images, links to the ones that are given: one run, then `--parts` jobs with `--shard`, each killed
(SIGKILL) once at a random moment and run again; merged in `--orders` random orders, the bytes of one run each time;
then once more without each part, which has to be named. Then the peak memory of one process for each number of
`--memory` small images: of `predict`, of a job that does a third of them, and of `merge`. Prints a line for each and
writes results/MACHINE/checks/NAME_shards.json beside this script.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from gfldeploy.files import sha256, write_json
from gfldeploy.images.coco import list_images
from gfldeploy.machine import describe_machine
from gfldeploy.serialization import plain

HERE = Path(__file__).resolve().parent
LINKS = 20_000  # to one file: file systems allow no more than some ten thousand
SMALL = ((24, 32), (32, 24), (32, 32))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--images", type=Path, required=True, help="folder of images")
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--parts", type=int, default=7)
    parser.add_argument("--orders", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--small-bundle", type=Path, help="for the small images (default: that of --bundle)")
    parser.add_argument("--memory", type=int, nargs="*", default=[1000, 10_000, 100_000])
    parser.add_argument("--name", default="demo", help="of the results file")
    parser.add_argument("--machine", required=True, help="folder of results/ for this machine, such as epyc-2core")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    chooser = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        parts = merged(args, work, chooser) if args.count else {}
        memory = [peaks(args.small_bundle or args.bundle, work, count) for count in args.memory]
    output = HERE / "results" / args.machine / "checks" / f"{args.name}_shards.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    write_json(output, {"machine": plain(describe_machine()), "parts": parts, "memory": memory})
    if not parts.get("same", True):
        raise SystemExit(1)


def merged(args: argparse.Namespace, work: Path, chooser: random.Random) -> dict[str, Any]:
    """One run against parts."""
    folder = work / "images"
    folder.mkdir()
    given = list_images(args.images)
    for number in range(args.count):
        source = given[number % len(given)].resolve()
        (folder / f"{number:06d}{source.suffix}").symlink_to(source)
    command = ["predict", args.bundle, folder, "--batch-size", args.batch_size, "--threads", 1]
    start = time.monotonic()
    run(*command, "-o", work / "one")
    seconds = time.monotonic() - start
    whole = digests(work / "one")
    folders, kills, resumed = [], 0, 0
    for number in range(1, args.parts + 1):
        folders.append(work / f"part{number}")
        job = [*command, "--shard", f"{number}/{args.parts}", "-o", folders[-1]]
        process = subprocess.Popen(line(*job), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            process.wait(timeout=chooser.uniform(1, max(seconds / args.parts, 2)))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills += 1
        if not folders[-1].exists():
            resumed += "by an earlier run" in run(*job)
    same, named = [], []
    for order in range(args.orders):
        shuffled = chooser.sample(folders, len(folders))
        run("merge", *shuffled, "-o", work / f"found{order}")
        same.append(digests(work / f"found{order}") == whole)
    for place in range(args.parts):
        others = [one for number, one in enumerate(folders) if number != place]
        said = run("merge", *others, "-o", work / "not", code=2)
        named.append(f"of {args.parts} parts {place + 1} is missing" in said)
    found = {
        "images": args.count, "parts": args.parts, "killed": kills, "resumed_with_images_done": resumed,
        "orders_merged": len(same), "same": all(same), "missing_named": sum(named),
    }  # fmt: skip
    print(found, flush=True)
    return found


def peaks(bundle: Path, work: Path, count: int) -> dict[str, Any]:
    """Peak resident memory of each command, in MB, for so many small images."""
    folder = work / f"small{count}"
    folder.mkdir()
    source = np.random.default_rng(0)
    for number in range(count):
        path = folder / f"{number:07d}.jpg"
        if number % LINKS < len(SMALL):
            assert cv2.imwrite(str(path), source.integers(0, 256, (*SMALL[number % len(SMALL)], 3), np.uint8))
        else:
            first = number // LINKS * LINKS
            os.link(folder / f"{first + (number - first) % len(SMALL):07d}.jpg", path)
    command = ["predict", bundle, folder, "--engine", "onnxruntime", "--input-size", "32x48", "--threads", 1]
    found: dict[str, Any] = {"images": count}
    found["predict_mb"] = peak(*command, "-o", work / f"small{count}-one")
    parts = [work / f"small{count}-{number}" for number in range(1, 4)]
    jobs = [peak(*command, "--shard", f"{number}/3", "-o", part) for number, part in enumerate(parts, start=1)]
    found["shard_mb"] = max(jobs)
    found["merge_mb"] = peak("merge", *parts, "-o", work / f"small{count}-merged")
    found["same"] = digests(work / f"small{count}-merged") == digests(work / f"small{count}-one")
    print(found, flush=True)
    return found


def line(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "gfldeploy", *map(str, arguments)]


def run(*arguments: object, code: int = 0) -> str:
    """What it says; it has to end with this code."""
    done = subprocess.run(line(*arguments), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode != code:
        raise SystemExit(f"{line(*arguments)} ended with {done.returncode}:\n{done.stderr}")
    return done.stderr


def peak(*arguments: object) -> float:
    process = subprocess.Popen(line(*arguments), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{line(*arguments)} ended with {process.returncode}")
    return round(usage.ru_maxrss / 1024, 1)


def digests(folder: Path) -> dict[str, str]:
    return {path.name: sha256(path) for path in sorted(folder.iterdir())}


if __name__ == "__main__":
    main()
