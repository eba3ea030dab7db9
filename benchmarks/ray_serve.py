"""Kill a replica of `gfldeploy serve --ray local --replicas 2` under load, and count what becomes of every request.

    python benchmarks/ray_serve.py --bundle demo/int8 --images demo/data/val/images --machine epyc-2core --name demo

Clients send images at `--rate` a second, at random times (Poisson), whatever becomes of those before. After `--before`
seconds one replica is killed (SIGKILL); they go on for `--after` seconds, and until the replica that Ray Serve starts
in its place answers. Then SIGTERM, with requests under way, and a look at what is left running. Each answer is held
against what `gfldeploy predict` finds in the image with the same engine, to the last digit that it writes. What became
of the requests, by replica and by second, and their latencies go to results/MACHINE/checks/NAME_ray_serve.json beside
this script. Exits with 1 if an answer differs, if a request got no answer at all, if an answer came later than its
deadline (`--timeout-ms`) and a tenth of it, or if a process is left.

Lost is what was admitted by the replica that was killed: it gets 503 `replica_lost` and may be sent again.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

import gfldeploy
from gfldeploy.bench.estimates import percentile
from gfldeploy.files import write_json
from gfldeploy.images.coco import list_images
from gfldeploy.machine import describe_machine
from gfldeploy.serialization import plain

HERE = Path(__file__).resolve().parent
REPLICA = "ray::ServeReplica:gfldeploy"  # how Ray names the process
START_S, END_S = 180.0, 90.0
THRESHOLD = 0.3

Found = list[tuple[str, float, list[float]]]  # class, score, box of each detection


@dataclass(frozen=True)
class Sent:
    """A request and what became of it: seconds since the start, milliseconds, replica, and if it is `predict`'s."""

    began: float
    ms: float
    ending: str
    replica: str | None = None
    same: bool | None = None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--images", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--engine", default="onnxruntime")
    parser.add_argument("--machine", required=True, help="folder of results/ for this machine, such as epyc-2core")
    parser.add_argument("--name", required=True, help="of the results file")
    parser.add_argument("--limit", type=int, default=64, help="images, the first of the folder (default: 64)")
    parser.add_argument("--rate", type=float, default=15.0, metavar="IMAGES", help="images a second (default: 15)")
    parser.add_argument("--before", type=float, default=8.0, metavar="SECONDS")
    parser.add_argument("--after", type=float, default=30.0, metavar="SECONDS")
    parser.add_argument("--timeout-ms", type=float, default=1000.0)
    args = parser.parse_args()
    images = list_images(args.images)[: args.limit]
    with tempfile.TemporaryDirectory() as scratch:
        expected = predicted(args, images, Path(scratch))
        record, wrong = measure(args, [path.read_bytes() for path in images], expected, Path(scratch))
    output = HERE / "results" / args.machine / "checks" / f"{args.name}_ray_serve.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    settings = {name: value for name, value in vars(args).items() if isinstance(value, int | float)}
    settings["engine"] = args.engine
    write_json(output, plain({"machine": describe_machine(), "settings": settings, **record}))
    print(json.dumps({name: value for name, value in record.items() if name != "by_second"}, indent=2))
    if wrong:
        sys.exit("; ".join(wrong))


def predicted(args: argparse.Namespace, images: list[Path], scratch: Path) -> list[Found]:
    output = scratch / "found"
    gfldeploy.predict_images(
        args.bundle, images, output=output, threshold=THRESHOLD, engine=args.engine, threads=1, streams=1
    )
    lines = map(json.loads, (output / "detections.jsonl").read_text().splitlines())
    return [
        [
            (one["class"], one["score"], [x, y, x + width, y + height])
            for one in line["detections"]
            for x, y, width, height in [one["bbox"]]
        ]
        for line in lines
    ]


def rounded(one: tuple[str, float, list[float]]) -> tuple[str, float, list[float]]:
    """To what `predict` writes of a box, as x, y, width and height, leaves of its corners."""
    return one[0], round(one[1], 6), [round(corner, 2) for corner in one[2]]


def measure(
    args: argparse.Namespace, bodies: list[bytes], expected: list[Found], scratch: Path
) -> tuple[dict[str, Any], list[str]]:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = int(one.getsockname()[1])
    log = scratch / "log"
    command = [sys.executable, "-P", "-m", "gfldeploy", "serve", args.bundle, "--ray", "local", "--replicas", 2]
    command += ["--port", port, "--engine", args.engine, "--threads", 1, "--streams", 1]
    environment = os.environ | {"PYTHONPATH": str(Path(gfldeploy.__file__).parents[1])}
    with log.open("wb") as said:
        server = subprocess.Popen(list(map(str, command)), stdout=said, stderr=said, env=environment)
    try:
        begun = time.monotonic()
        while b"ready on http" not in log.read_bytes():
            if server.poll() is not None or time.monotonic() - begun > START_S:
                raise SystemExit(f"the server did not start: {log.read_text(errors='replace')[-2000:]}")
            time.sleep(0.2)
        start_s = time.monotonic() - begun
        return asyncio.run(drive(args, server, port, bodies, expected, start_s))
    finally:
        print(log.read_text(errors="replace"), file=sys.stderr)
        left = psutil.Process(server.pid).children(recursive=True) if server.poll() is None else []
        server.kill()
        server.wait()
        for process in left:
            process.kill()


def replicas(server: subprocess.Popen[bytes]) -> list[psutil.Process]:
    found = []
    for process in psutil.Process(server.pid).children(recursive=True):
        try:
            if REPLICA in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


async def ask(port: int, path: str, body: bytes) -> tuple[int, str | None, bytes]:
    """Status, replica and body of the answer to one request. Raises `OSError` where there is none."""
    async with asyncio.timeout(60):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            header = f"POST {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
            writer.write(header.encode() + body)
            answer = await reader.read()
        finally:
            writer.close()
    first, _, rest = answer.partition(b"\r\n")
    headers, end, content = rest.partition(b"\r\n\r\n")
    if not end:
        raise ConnectionError("the connection was closed before the answer")
    fields = dict(line.lower().split(": ", 1) for line in headers.decode("latin-1").split("\r\n"))
    return int(first.split()[1]), fields.get("x-gfldeploy-replica"), content


async def drive(
    args: argparse.Namespace,
    server: subprocess.Popen[bytes],
    port: int,
    bodies: list[bytes],
    expected: list[Found],
    start_s: float,
) -> tuple[dict[str, Any], list[str]]:
    path = f"/v1/detect?threshold={THRESHOLD}&timeout_ms={args.timeout_ms:g}"
    known = [[rounded(one) for one in found] for found in expected]
    sent: list[Sent] = []
    tasks: set[asyncio.Task[None]] = set()
    zero = time.perf_counter()
    ended = False

    async def send(place: int) -> None:
        began = time.perf_counter()
        try:
            status, replica, body = await ask(port, path, bodies[place])
            content = json.loads(body)
        except (OSError, TimeoutError, ValueError) as error:
            sent.append(Sent(began - zero, (time.perf_counter() - began) * 1e3, f"no answer: {type(error).__name__}"))
            return
        ms = (time.perf_counter() - began) * 1e3
        if status != 200:
            sent.append(Sent(began - zero, ms, f"{status} {content['error']['code']}", replica))
            return
        rows = [(one["class"], one["score"], one["box"]) for one in content["images"][0]["detections"]]
        same = [rounded(one) for one in rows] == known[place]
        sent.append(Sent(began - zero, ms, "answered", replica, same))

    async def clients() -> None:
        chance, due = random.Random(0), time.perf_counter()
        while not ended:
            due += chance.expovariate(args.rate)
            await asyncio.sleep(max(due - time.perf_counter(), 0))
            task = asyncio.create_task(send(chance.randrange(len(bodies))))
            tasks.add(task)
            task.add_done_callback(tasks.discard)

    sending = asyncio.create_task(clients())
    await asyncio.sleep(args.before)
    before = replicas(server)
    killed = before[0]
    names = {one.replica for one in sent if one.replica}
    for _ in range(5000):  # with requests under way
        if len(tasks) > 2:
            break
        await asyncio.sleep(0.001)
    under_way = len(tasks)
    killed.send_signal(signal.SIGKILL)
    killed_at = time.perf_counter() - zero
    replaced_at: float | None = None
    while (now := time.perf_counter() - zero) < killed_at + args.after or (
        replaced_at is None and now < killed_at + START_S
    ):
        await asyncio.sleep(0.2)
        new = [one.began for one in sent if one.replica and one.replica not in names]
        replaced_at = min(new) if new and replaced_at is None else replaced_at
    everything = psutil.Process(server.pid).children(recursive=True)
    server.send_signal(signal.SIGTERM)
    stopped_at = time.perf_counter() - zero
    await asyncio.sleep(1)
    ended = True
    await sending
    while tasks:
        await asyncio.sleep(0.1)
    code = await asyncio.to_thread(server.wait, END_S)
    stop_s = time.perf_counter() - zero - stopped_at
    await asyncio.sleep(1)
    left = [process.name() for process in everything if process.is_running() and process.status() != "zombie"]
    return report(args, sent, under_way, killed_at, replaced_at, stopped_at, names, left, code, start_s, stop_s)


def report(
    args: argparse.Namespace,
    sent: list[Sent],
    under_way: int,
    killed_at: float,
    replaced_at: float | None,
    stopped_at: float,
    names: set[str],
    left: list[str],
    code: int,
    start_s: float,
    stop_s: float,
) -> tuple[dict[str, Any], list[str]]:
    """What goes into the file, and what is wrong."""
    up = replaced_at or stopped_at
    phases = {
        "before the kill": (0.0, killed_at),
        "one replica": (killed_at, up),
        "two again": (up, stopped_at),
        "stopping": (stopped_at, float("inf")),
    }
    phase_records = {}
    for name, (start, end) in phases.items():
        some = [one for one in sent if start <= one.began < end]
        ms = [one.ms for one in some if one.ending == "answered"]
        phase_records[name] = {
            "requests": len(some),
            "endings": dict(Counter(one.ending for one in some)),
            "p50_ms": percentile(ms, 50).value if ms else None,
            "p99_ms": percentile(ms, 99).value if ms else None,
            "most_ms": max(ms, default=None),
        }
    answered = [one for one in sent if one.ending == "answered"]
    lost = [one for one in sent if "replica_lost" in one.ending]
    silent = [one for one in sent if one.ending.startswith("no answer")]
    late = [one for one in answered if one.ms > 1.1 * args.timeout_ms]
    # Once the application is deleted and its proxies have ended, nobody listens.
    silent_before = [one for one in silent if one.began < stopped_at]
    by_second: dict[int, Counter[str]] = {}
    for one in sent:
        by_second.setdefault(int(one.began), Counter())[one.replica or one.ending] += 1
    record = {
        "requests": len(sent),
        "answered": len(answered),
        "the_same_as_predict": sum(one.same is True for one in answered),
        "under_way_at_the_kill": under_way,
        "lost_with_the_replica": len(lost),
        "without_any_answer": len(silent_before),
        "late": len(late),
        "replaced_after_s": None if replaced_at is None else round(replaced_at - killed_at, 2),
        "ready_after_s": round(start_s, 1),
        "stopped_after_s": round(stop_s, 1),
        "exit_code": code,
        "left_running": left,
        "replicas": dict(Counter(one.replica for one in answered)),
        "phases": phase_records,
        "by_second": {second: dict(count) for second, count in sorted(by_second.items())},
    }
    wrong = []
    if different := len(answered) - record["the_same_as_predict"]:
        wrong.append(f"{different} answers are not those of predict")
    if silent_before:
        wrong.append(f"{len(silent_before)} requests got no answer")
    if late:
        wrong.append(f"{len(late)} answers came after their deadline")
    if replaced_at is None:
        wrong.append("the replica was not replaced")
    if len(names) != 2:
        wrong.append(f"{len(names)} replicas answered before the kill, not 2")
    if code != 0 or left:
        wrong.append(f"the server ended with {code} and left {left}")
    return record, wrong


if __name__ == "__main__":
    main()
