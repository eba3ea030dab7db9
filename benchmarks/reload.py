"""Replace the bundle of a server again and again while clients send, and look for anything that was lost.

    python benchmarks/reload.py --bundle demo/int8 --other demo/fp32 --data demo/data/val/annotations.json \
        --machine epyc-2core --name demo

Starts `gfldeploy serve` on a copy of `--bundle`. Clients send images at `--rate` a second, at random times (Poisson),
whatever becomes of those before (`pip install aiohttp`). Every `--every` seconds the other bundle takes the place of
the one that serves, by renaming, and a reload is asked for: by POST /v1/reload and by SIGHUP in turn. Each answer is
held against what `Detector` finds with either bundle. What became of the requests, latencies during reloads and between
them, and resident memory after each go to results/MACHINE/checks/NAME_reload.json beside this script. Exits with 1 if a
request failed, if an answer is of neither bundle, or if memory after the last reload is more than `--most-growth` times
that after the second with the same bundle.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import psutil

from gfldeploy import Bundle, Detections, Detector
from gfldeploy.files import write_json
from gfldeploy.machine import describe_machine
from gfldeploy.serialization import plain

HERE = Path(__file__).resolve().parent
_PICTURES = 40
_NEAR_SCORE, _NEAR_PX = 1e-3, 0.1  # answers are rounded; batches of INT8 may round otherwise


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--other", type=Path, required=True, help="the bundle to change to and back from")
    parser.add_argument("--data", type=Path, required=True, help="COCO annotations, whose images are sent")
    parser.add_argument("--engine", default="onnxruntime")
    parser.add_argument("--machine", required=True, help="folder of results/ for this machine, such as epyc-2core")
    parser.add_argument("--name", required=True, help="of the results file")
    parser.add_argument("--reloads", type=int, default=10)
    parser.add_argument("--every", type=float, default=6.0, metavar="SECONDS")
    parser.add_argument("--rate", type=float, default=15.0, metavar="IMAGES", help="images a second")
    parser.add_argument("--timeout-ms", type=float, default=2000.0)
    parser.add_argument("--most-growth", type=float, default=1.1, metavar="RATIO")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = asyncio.run(measure(args, Path(folder)))
    output = HERE / "results" / args.machine / "checks" / f"{args.name}_reload.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    write_json(output, found)
    print(json.dumps({name: value for name, value in found.items() if name not in ("machine", "reloads")}, indent=2))
    if found["failed"] or found["of_neither_bundle"] or found["memory_growth"] > args.most_growth:
        sys.exit("requests failed, answers were of neither bundle, or memory grew")


async def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    pictures = [path.read_bytes() for path in picture_paths(args.data)]
    expected = []
    for bundle in (args.bundle, args.other):
        with Detector(bundle, engine=args.engine) as detector:
            expected.append(detector.detect(pictures, threshold=0.3))
    shutil.copytree(args.bundle, folder / "serving")
    shutil.copytree(args.other, folder / "next")
    key = secrets.token_hex(32)
    (folder / "keys").touch(0o600)
    (folder / "keys").write_text(key)
    port = free_port()
    command = ["serve", folder / "serving", "--engine", args.engine, "--port", port, "--api-key-file", folder / "keys"]
    server = subprocess.Popen(
        [sys.executable, "-m", "gfldeploy", *map(str, command)], stderr=subprocess.PIPE, text=True
    )
    headers = {"Authorization": f"Bearer {key}"}
    try:
        async with aiohttp.ClientSession(f"http://127.0.0.1:{port}", headers=headers) as session:
            await until_ready(session)
            return await drive(args, folder, session, server.pid, pictures, expected)
    finally:
        server.send_signal(signal.SIGTERM)
        print(server.communicate()[1], file=sys.stderr)


async def drive(
    args: argparse.Namespace,
    folder: Path,
    session: aiohttp.ClientSession,
    pid: int,
    pictures: list[bytes],
    expected: list[list[Detections]],
) -> dict[str, Any]:
    process = psutil.Process(pid)
    outcomes: Counter[str] = Counter()
    latencies: dict[bool, list[float]] = {True: [], False: []}
    reloading = ended = False
    tasks: set[asyncio.Task[None]] = set()

    async def send(place: int) -> None:
        start, during = time.perf_counter(), reloading
        try:
            query = {"threshold": "0.3", "timeout_ms": str(args.timeout_ms)}
            async with session.post("/v1/detect", params=query, data=pictures[place]) as answer:
                body = await answer.json()
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:
            outcomes[type(error).__name__] += 1
            return
        latencies[during or reloading].append((time.perf_counter() - start) * 1e3)
        if answer.status != 200:
            outcomes[f"{answer.status} {body['error']['code']}"] += 1
            return
        outcomes["answered"] += 1
        rows = body["images"][0]["detections"]
        of = [number for number, found in enumerate(expected) if same(rows, found[place])]
        outcomes["of either bundle" if len(of) == 2 else f"of bundle {of[0]}" if of else "of neither bundle"] += 1

    async def clients() -> None:
        chance = random.Random(0)
        due = time.perf_counter()
        while not ended:
            due += chance.expovariate(args.rate)
            await asyncio.sleep(max(due - time.perf_counter(), 0))
            task = asyncio.create_task(send(chance.randrange(len(pictures))))
            tasks.add(task)
            task.add_done_callback(tasks.discard)

    sending = asyncio.create_task(clients())
    await asyncio.sleep(args.every)
    reloads: list[dict[str, Any]] = [{"digest": await digest(session), "rss_mb": process.memory_info().rss / 1e6}]
    for number in range(args.reloads):
        (folder / "serving").rename(folder / "aside")
        (folder / "next").rename(folder / "serving")
        (folder / "aside").rename(folder / "next")
        wanted, start, reloading, largest = Bundle.open(folder / "serving").digest, time.perf_counter(), True, 0.0
        if number % 2:
            os.kill(pid, signal.SIGHUP)
        else:
            asked = asyncio.create_task(reload(session))
        while await digest(session) != wanted:
            largest = max(largest, process.memory_info().rss / 1e6)
            await asyncio.sleep(0.05)
        seconds = time.perf_counter() - start
        how = {"by": "SIGHUP"} if number % 2 else {"by": "POST", **await asked}
        reloading = False
        await asyncio.sleep(args.every)
        rss = process.memory_info().rss / 1e6
        reloads.append({**how, "digest": wanted, "seconds": seconds, "rss_mb": rss, "largest_rss_mb": largest})
    ended = True
    await sending
    await asyncio.gather(*tasks)
    same_bundle = [one["rss_mb"] for one in reloads if one["digest"] == reloads[-1]["digest"]]
    answered = outcomes["answered"]
    sent = (
        len(latencies[True])
        + len(latencies[False])
        + sum(count for name, count in outcomes.items() if name.endswith("Error"))
    )
    return {
        "rate": args.rate,
        "timeout_ms": args.timeout_ms,
        "sent": sent,
        "failed": sent - answered,
        "of_neither_bundle": outcomes["of neither bundle"],
        "outcomes": dict(outcomes),
        "latency_ms": {
            name: dict(
                zip(("p50", "p99", "max"), np.percentile(latencies[during], (50, 99, 100)).tolist(), strict=True)
            )
            for name, during in (("during reloads", True), ("otherwise", False))
        },
        "memory_growth": same_bundle[-1] / same_bundle[min(1, len(same_bundle) - 1)],
        "reloads": reloads,
        "machine": plain(describe_machine()),
    }


async def reload(session: aiohttp.ClientSession) -> dict[str, Any]:
    async with session.post("/v1/reload") as answer:
        body: dict[str, Any] = await answer.json()
        if answer.status != 200:
            sys.exit(f"a reload failed: {body}")
        return {"golden": body["golden"]}


async def digest(session: aiohttp.ClientSession) -> str:
    async with session.get("/v1/model") as answer:
        return str((await answer.json())["bundle"]["digest"])


async def until_ready(session: aiohttp.ClientSession) -> None:
    for _ in range(600):
        try:
            async with session.get("/health/ready") as answer:
                if answer.status == 200:
                    return
        except aiohttp.ClientError:
            pass
        await asyncio.sleep(0.1)
    sys.exit("the server is not ready after a minute")


def same(rows: list[dict[str, Any]], found: Detections) -> bool:
    """Whether the answer is that, but for rounding. Detections that score the threshold may be in one alone."""
    if len(rows) != len(found):
        return False
    scores = np.array([one["score"] for one in rows])
    boxes = np.array([one["box"] for one in rows]).reshape(-1, 4)
    return bool(
        [one["class_id"] for one in rows] == found.classes.tolist()
        and np.abs(scores - found.scores).max(initial=0) <= _NEAR_SCORE
        and np.abs(boxes - found.boxes).max(initial=0) <= _NEAR_PX
    )


def picture_paths(data: Path) -> list[Path]:
    names = [one["file_name"] for one in json.loads(data.read_text())["images"][:_PICTURES]]
    folder = data.parent / "images"
    return [(folder if folder.is_dir() else data.parent) / name for name in names]


def free_port() -> int:
    with socket.socket() as some:
        some.bind(("127.0.0.1", 0))
        port: int = some.getsockname()[1]
        return port


if __name__ == "__main__":
    main()
