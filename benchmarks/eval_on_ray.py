"""Whether mAP on a Ray cluster is that of one process, to the last digit, while workers are killed.

    python benchmarks/eval_on_ray.py --bundle demo/int8 --data demo/data/val/annotations.json --machine epyc-2core

Measures mAP with `evaluate`, in this process and by two workers of a local cluster, in every order, batch size and
input size; in every second comparison one worker is killed with SIGKILL a random while after the first images came.
Prints a line for each, and writes results/MACHINE/checks/NAME_eval_on_ray.json beside this script.
"""

from __future__ import annotations

import argparse
import random
import threading
import time
from pathlib import Path

import psutil

from gfldeploy import evaluate
from gfldeploy.batching.buckets import ORDERS, Size, size_in_words
from gfldeploy.cluster.ray_cluster import ClusterOptions
from gfldeploy.files import write_json
from gfldeploy.machine import describe_machine
from gfldeploy.progress import Silent
from gfldeploy.serialization import plain

HERE = Path(__file__).resolve().parent
WORKER = "RemoteWorker"


class Killing(Silent):
    """Kills one worker, a while after the first images are done; `killed`: whether it did."""

    def __init__(self, after_s: float | None) -> None:
        self.after_s = after_s
        self.killed = False

    def step(self, label: str, done: int, total: int) -> None:
        if self.after_s is not None:
            threading.Timer(self.after_s, self._kill).start()
            self.after_s = None

    def _kill(self) -> None:
        workers = [one for one in psutil.Process().children(recursive=True) if WORKER in " ".join(one.cmdline())]
        if workers:
            random.choice(workers).kill()
            self.killed = True


def size_of(text: str) -> Size:
    height, width = text.split("x")
    return int(height), int(width)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True, help="COCO annotations")
    parser.add_argument("--machine", required=True, help="folder of results/ for this machine, such as epyc-2core")
    parser.add_argument("--name", default="demo", help="of the results file")
    parser.add_argument("--engines", nargs="+", default=["openvino", "onnxruntime"])
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--input-sizes", type=size_of, nargs="+", default=[(320, 448), (256, 384)])
    parser.add_argument("--limit", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    random.seed(args.seed)
    rows = []
    with ClusterOptions("local", workers=2).connected():
        cells = [(engine, size, order) for engine in args.engines for size in args.batch_sizes for order in ORDERS]
        for number, (engine, batch_size, order) in enumerate(cells):
            question = {
                "data": args.data, "engine": engine, "input_sizes": args.input_sizes, "batch_size": batch_size,
                "order": order, "limit": args.limit,
            }  # fmt: skip
            here = evaluate(args.bundle, **question)
            killing = Killing(random.uniform(0, 0.5) if number % 2 else None)
            begin = time.monotonic()
            there = evaluate(args.bundle, **question, ray="local", workers=2, progress=killing)
            row = {"engine": engine, "batch_size": batch_size, "order": order, "killed": killing.killed}
            row |= {"same": here == there, "ap": {size_in_words(size): one.ap for size, one in there.at_sizes.items()}}
            rows.append(row | {"seconds_on_ray": time.monotonic() - begin})
            print(rows[-1], flush=True)
    path = HERE / "results" / args.machine / "checks" / f"{args.name}_eval_on_ray.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"machine": plain(describe_machine()), "images": args.limit, "rows": rows})
    same, killed = (sum(row[key] for row in rows) for key in ("same", "killed"))
    print(f"{same} of {len(rows)} the same, {killed} killed: {path}")


if __name__ == "__main__":
    main()
