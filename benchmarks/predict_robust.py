"""Whether a `gfldeploy predict` that is killed again and again ends with the bytes of an undisturbed one, and how its
memory grows.

    python benchmarks/predict_robust.py --source demo/int8 --images demo/data/val/images --machine xeon-2core

Cuts `--count` images of random shapes, each a JPEG, out of those of a folder; runs `gfldeploy predict` on them
undisturbed, watching its resident memory; runs it once more and kills it with SIGKILL `--kills` times, each time a
random while after it did something; lets it end and compares every file. Prints both, and writes them to
results/MACHINE/checks/NAME_predict_robust.json beside this script.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import cv2
import psutil

from gfldeploy.files import write_json
from gfldeploy.images.coco import list_images
from gfldeploy.machine import describe_machine
from gfldeploy.serialization import plain

HERE = Path(__file__).resolve().parent
SAMPLE_S = 0.25


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, required=True, help="a bundle or a deploy.yml")
    parser.add_argument("--images", type=Path, required=True, help="a folder of images to cut from")
    parser.add_argument("--name", default="demo", help="of the results file")
    parser.add_argument("--machine", required=True, help="folder of results/ for this machine, such as epyc-2core")
    parser.add_argument("--count", type=int, default=2000, metavar="C", help="of images (default: 2000)")
    parser.add_argument("--kills", type=int, default=5, metavar="K")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("options", nargs="*", help="of `gfldeploy predict`, after --")
    args = parser.parse_args()
    chooser = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        cut_images(list_images(args.images), folder / "images", args.count, chooser)
        command = [sys.executable, "-m", "gfldeploy", "predict", str(args.source), str(folder / "images")]
        command += [*args.options, "-o"]
        seconds, memory = watch([*command, str(folder / "whole")])
        done = kill(command, folder, args.kills, seconds, chooser)
        whole, killed = digests(folder / "whole"), digests(folder / "out")
    later = memory[len(memory) // 4 :]  # loading is over
    record = {
        "machine": plain(describe_machine()), "images": args.count, "options": args.options, "seconds": seconds,
        "memory_mb": memory, "kills": len(done), "images_done_at_kills": done, "same": whole == killed, "files": whole,
    }  # fmt: skip
    output = HERE / "results" / args.machine / "checks" / f"{args.name}_predict_robust.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    write_json(output, record)
    print(f"{args.count} images in {seconds:.0f} s; killed after {', '.join(map(str, done))} images")
    print(f"{len(whole)} files, {'the same bytes' if whole == killed else 'DIFFERENT BYTES'}")
    print(f"memory after a quarter of the time: {later[0]:.0f} MB, later {min(later):.0f} to {max(later):.0f} MB")
    if whole != killed:
        raise SystemExit(1)


def cut_images(sources: Sequence[Path], folder: Path, count: int, chooser: random.Random) -> None:
    """Crops with sides from half to all of the image's, each image in turn."""
    folder.mkdir()
    for number in range(count):
        image = cv2.imread(str(sources[number % len(sources)]))
        height, width = (round(side * chooser.uniform(0.5, 1)) for side in image.shape[:2])
        top, left = chooser.randint(0, image.shape[0] - height), chooser.randint(0, image.shape[1] - width)
        assert cv2.imwrite(str(folder / f"{number:06d}.jpg"), image[top : top + height, left : left + width])


def watch(command: list[str]) -> tuple[float, list[float]]:
    """Seconds that it takes, and its resident memory in 10^6 bytes every so often."""
    memory: list[float] = []
    start = time.monotonic()
    with subprocess.Popen(command) as process:
        watched = psutil.Process(process.pid)
        while process.poll() is None:
            memory.append(watched.memory_info().rss / 1e6)
            time.sleep(SAMPLE_S)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed")
    return time.monotonic() - start, [value for value in memory if value]


def kill(command: list[str], folder: Path, kills: int, seconds: float, chooser: random.Random) -> list[int]:
    """Run it, killed so many times, to its end; the images that were done at each kill."""
    done: list[int] = []
    working = folder / "out.unfinished" / "working.jsonl"
    size = 0
    while True:
        with subprocess.Popen([*command, str(folder / "out")], stderr=subprocess.DEVNULL) as process:
            if len(done) < kills:
                while process.poll() is None and (not working.exists() or working.stat().st_size <= size):
                    time.sleep(0.01)
                try:
                    process.wait(seconds * chooser.uniform(0, 1) / (kills + 1))
                except subprocess.TimeoutExpired:
                    process.kill()
        if (folder / "out").exists():
            return done
        size = working.stat().st_size
        done.append(working.read_bytes().count(b'"file"'))


def digests(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


if __name__ == "__main__":
    main()
