"""What `gfldeploy serve` costs, how it compares, and whether it holds: one script, four measurements, on loopback.

    python benchmarks/serving.py clients --bundle demo/int8 --images val/images --machine epyc-2core --name demo_int8
    python benchmarks/serving.py overload --bundle ... [--factors 0.5 0.8 1.5 10 --seconds 60]
    python benchmarks/serving.py soak --bundle ... [--minutes 10]
    python benchmarks/serving.py generator --images val/images --machine epyc-2core

clients: the server beside `Detector` in this process with the same engine options, interleaved, `--rounds` times for
`--seconds` each: one client against one image after the other (one stream of all threads on both sides), and
`--clients` clients against `Detector.stream` (a stream for each CPU); beside them the servers of `serving_rivals.py`
around the same bundle's end_to_end.onnx, `--rivals` of them, run by `--rival-python`, with the same clients. The images
are those of the folder, in random order: of both orientations, if the folder has both. Before anything is timed, what
the server answers for each image is compared with what `gfldeploy predict` finds.

overload: first the capacity, with `--clients` clients; then `gfldeploy load` at each of the `--factors` of it, for
`--seconds` each, with `--bound-ms` for every request, while the server's memory is sampled.

soak: for `--minutes` clients of every kind at random: good ones, whose detections are compared with those of
`gfldeploy predict`; corrupt files; slow ones; ones that go away before the answer; and what is no HTTP. Then SIGTERM,
with 32 requests under way: each must be answered or refused.

generator: processor time that a request takes of `gfldeploy load` itself, and of aiohttp, where it is installed, which
send the images to a server in another process that looks at nothing; interleaved, `--rounds` times for `--seconds`.

Writes results/MACHINE/checks/NAME_serving_COMMAND.json beside this script, and prints the figures. Exits with 1 where
the server answered wrongly, lost a request, grew or did not end.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import math
import multiprocessing
import os
import random
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import uvloop

import gfldeploy
from gfldeploy import Detector
from gfldeploy.bench.estimates import percentile, supports
from gfldeploy.bench.table import rows
from gfldeploy.bundle import Bundle
from gfldeploy.engines.hardware import usable_threads
from gfldeploy.files import write_json
from gfldeploy.images.coco import list_images
from gfldeploy.images.decode import image_size
from gfldeploy.load.connection import HttpConnection, Reply, Target
from gfldeploy.load.generator import Load, LoadGenerator, Seen
from gfldeploy.load.session import load_server
from gfldeploy.machine import describe_machine
from gfldeploy.serialization import plain

HERE = Path(__file__).resolve().parent
ANY = "application/octet-stream"

Found = list[tuple[str, float, list[float]]]  # of an image: class, score and box (x1, y1, x2, y2) of each detection

START_S, END_S = 120.0, 60.0  # that a server may take to start, and to end
# What two runs of an engine may differ by, score and pixels. OpenVINO has a model of its own for the most common shapes
# and one for the rest, which rounds INT8 elsewhere; `predict` and the server may have others among the most common.
# Detections so near the threshold may be on one side alone.
SAME = {"int8": (0.05, 8.0)}
SAME_ELSE = (1e-3, 0.1)
THRESHOLD = 0.4
IN_FLIGHT = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--images", type=Path, required=True, metavar="FOLDER")
    shared.add_argument("--machine", required=True, help="folder of results/ for this machine, such as epyc-2core")
    shared.add_argument("--name", default="demo", help="of the results file")
    shared.add_argument("--limit", type=int, default=64, help="images, the first of the folder (default: 64)")
    shared.add_argument("--clients", type=int, default=16)
    shared.add_argument("--bound-ms", type=float, default=500.0, help="deadline of every request (default: 500)")
    serving = argparse.ArgumentParser(add_help=False, parents=[shared])
    serving.add_argument("--bundle", type=Path, required=True)
    serving.add_argument("--engine", help="of the server and `Detector`")
    one = commands.add_parser("clients", parents=[serving])
    one.add_argument("--rounds", type=int, default=3)
    one.add_argument("--seconds", type=float, default=4.0)
    one.add_argument("--rivals", nargs="*", default=["paddlex", "litserve", "fastapi"])
    one.add_argument("--rival-python", default=sys.executable, help="that has fastapi and litserve")
    two = commands.add_parser("overload", parents=[serving])
    two.add_argument("--factors", type=float, nargs="+", default=[0.5, 0.8, 1.5, 10.0])
    two.add_argument("--seconds", type=float, default=60.0)
    three = commands.add_parser("soak", parents=[serving])
    three.add_argument("--minutes", type=float, default=10.0)
    three.add_argument("--most-growth", type=float, default=1.05, metavar="RATIO", help="of memory")
    four = commands.add_parser("generator", parents=[shared])
    four.add_argument("--rounds", type=int, default=3)
    four.add_argument("--seconds", type=float, default=3.0)
    args = parser.parse_args()
    run = {"clients": clients, "overload": overload, "soak": soak, "generator": generator}[args.command]
    with tempfile.TemporaryDirectory() as scratch:
        paths = [Path(shutil.copy(path, scratch)) for path in list_images(args.images)[: args.limit]]
        args.images = Path(scratch)
        found, shown, wrong = run(args, [path.read_bytes() for path in paths])
    output = HERE / "results" / args.machine / "checks" / f"{args.name}_serving_{args.command}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    settings = {name: value for name, value in vars(args).items() if isinstance(value, int | float | list)}
    write_json(output, plain({"machine": describe_machine(), "settings": settings, **found}))
    print(shown)
    if wrong:
        sys.exit("; ".join(wrong))


# ---- processes


@dataclass
class Server:
    """A server that was started, and what of its memory was sampled."""

    process: subprocess.Popen[bytes]
    target: Target
    log: Path

    @property
    def url(self) -> str:
        return f"http://{self.target.authority}"

    def rss_mb(self) -> float:
        return float(psutil.Process(self.process.pid).memory_info().rss / 1e6)


@contextmanager
def started(command: Sequence[object], port: int, path: str, **environment: str) -> Iterator[Server]:
    """A server, once it answers `path` with 200; ended with SIGTERM, unless it has ended before."""
    with tempfile.TemporaryDirectory() as scratch:
        log = Path(scratch) / "log"
        with log.open("wb") as said:
            process = subprocess.Popen(list(map(str, command)), stdout=said, stderr=said, env=os.environ | environment)
        server = Server(process, Target("127.0.0.1", port, False, ""), log)
        try:
            end = time.monotonic() + START_S
            while asyncio.run(status_of(server.target, path)) != 200:
                if process.poll() is not None or time.monotonic() > end:
                    raise SystemExit(f"a server did not start: {log.read_text(errors='replace')[-2000:]}")
                time.sleep(0.1)
            yield server
        finally:
            workers = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
            process.terminate()
            try:
                process.wait(END_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            for worker in workers:  # LitServe leaves its own behind
                with suppress(psutil.NoSuchProcess):
                    worker.kill()


def served(args: argparse.Namespace, *options: object) -> Any:
    """`gfldeploy serve` of the bundle, warmed up for the images."""
    port = free_port()
    engine = ("--engine", args.engine) if args.engine else ()
    command = [sys.executable, "-P", "-m", "gfldeploy", "serve", args.bundle, "--port", port]
    root = str(Path(gfldeploy.__file__).parents[1])
    return started([*command, "--warm-up", args.images, *engine, *options], port, "/health/ready", PYTHONPATH=root)


def rival(args: argparse.Namespace, name: str) -> Any:
    port, bundle = free_port(), Bundle.open(args.bundle)
    model = args.bundle / "onnx" / "end_to_end.onnx"
    if not model.is_file():
        raise SystemExit("the rivals run end_to_end.onnx, which this bundle lacks: export it without --no-end-to-end")
    sides = sorted(bundle.manifest.preprocess.target_size)
    command = [args.rival_python, HERE / "serving_rivals.py", name, model, *sides, port]
    return started(command, port, "/health" if name == "litserve" else "/docs")


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


# ---- requests


async def ask(target: Target, method: str, path: str, body: bytes = b"", content_type: str = ANY) -> Reply:
    """One request on a connection of its own. Raises `OSError`, also where there is no answer."""
    connection = HttpConnection()
    answer: asyncio.Future[Reply | Exception] = asyncio.get_running_loop().create_future()
    try:
        async with asyncio.timeout(START_S):
            await target.connect(connection)
            connection.send(
                target.header(method, path, len(body), content_type if body else None), body, answer.set_result
            )
            found = await answer
    finally:
        connection.close()
    if isinstance(found, Reply):
        return found
    raise ConnectionError(type(found).__name__)


async def status_of(target: Target, path: str) -> int:
    try:
        return (await ask(target, "GET", path)).status
    except OSError:
        return 0


def send(target: Target, path: str, bodies: Sequence[bytes], load: Load, content_type: str = ANY) -> Seen:
    async def run() -> Seen:
        return await LoadGenerator(target, path, bodies, content_type, load).run()

    # uvloop takes less of the CPUs, which the server shares.
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(run())


@dataclass
class Differences:
    """Between the server's answers and what `predict` finds: how many are the same but for the last digits, the largest
    of a score and of a corner, and what is beyond the limits (of score and corner)."""

    limits: tuple[float, float]
    images: int = 0
    same: int = 0
    score: float = 0.0
    box_px: float = 0.0
    wrong: list[str] = field(default_factory=list)

    def add(self, number: int, body: bytes, known: Found) -> None:
        """An answer with 200 to this image."""
        (image,) = json.loads(body)["images"]
        found: Found = [(one["class"], one["score"], one["box"]) for one in image["detections"]]
        self.images += 1
        self.same += [rounded(one) for one in found] == [rounded(one) for one in known]
        for some, others in ((known, found), (found, known)):
            for name, score, box in some:
                near = [
                    (max(abs(a - b) for a, b in zip(box, other[2], strict=True)), abs(score - other[1]))
                    for other in others
                    if other[0] == name
                ]
                box_px, off = min(near, default=(math.inf, math.inf))
                if off <= self.limits[0] and box_px <= self.limits[1]:
                    self.box_px, self.score = max(self.box_px, box_px), max(self.score, off)
                elif score > THRESHOLD + self.limits[0]:
                    self.wrong.append(f"image {number}: {name} {score:.4f} at {box} is on one side alone")


def rounded(one: tuple[str, float, list[float]]) -> tuple[str, float, list[float]]:
    """To what `predict` writes of a box, as x, y, width and height, leaves of its corners."""
    return one[0], round(one[1], 6), [round(corner, 2) for corner in one[2]]


def predicted(args: argparse.Namespace, folder: Path) -> list[Found]:
    """What `gfldeploy predict` finds in each image, which knows all shapes before the first, as the server does."""
    with tempfile.TemporaryDirectory() as scratch:
        output = Path(scratch) / "found"
        gfldeploy.predict_images(args.bundle, [folder], output=output, threshold=THRESHOLD, engine=args.engine)
        lines = map(json.loads, (output / "detections.jsonl").read_text().splitlines())
        return [
            [
                (one["class"], one["score"], [x, y, x + width, y + height])
                for one in line["detections"]
                for x, y, width, height in [one["bbox"]]
            ]
            for line in lines
        ]


def limits(args: argparse.Namespace) -> tuple[float, float]:
    return SAME.get(Bundle.open(args.bundle).manifest.precision, SAME_ELSE)


def compared(
    args: argparse.Namespace, target: Target, bodies: Sequence[bytes], expected: Sequence[Found]
) -> Differences:
    """The server's answers, one image after the other, and what `predict` finds."""
    found = Differences(limits(args))
    for number, body in enumerate(bodies):
        reply = asyncio.run(ask(target, "POST", f"/v1/detect?threshold={THRESHOLD}&timeout_ms=60000", body))
        if reply.status == 200:
            found.add(number, reply.body, expected[number])
        else:
            found.wrong.append(f"image {number}: status {reply.status}")
    return found


# ---- clients


@dataclass(frozen=True)
class Timed:
    """`per_s`: images a second; of servers those answered in time. `ms`: of each image."""

    per_s: float
    ms: tuple[float, ...]
    failed: int = 0


def clients(args: argparse.Namespace, bodies: list[bytes]) -> tuple[dict[str, Any], str, list[str]]:
    cpus = usable_threads()
    with (
        Detector(args.bundle, engine=args.engine) as single,
        Detector(args.bundle, engine=args.engine, streams=cpus) as several,
        served(args, "--streams", 1) as quick,
        served(args, "--streams", cpus) as server,
        each_of([rival(args, name) for name in args.rivals]) as others,
    ):
        for detector in (single, several):  # engines prepare for each shape
            detector.detect([*bodies, *bodies])
        expected = predicted(args, args.images)
        differences = {
            "serve, one stream": compared(args, quick.target, bodies, expected),
            "serve": compared(args, server.target, bodies, expected),
        }
        wrong = [f"{name}: {one}" for name, found in differences.items() for one in found.wrong]
        path = f"/v1/detect?timeout_ms={args.bound_ms:g}"
        legs: dict[str, Callable[[], Timed]] = {
            "Detector, one image after the other": partial(one_by_one, single, bodies, args.seconds),
            "serve, one stream, 1 client": partial(by_clients, args, quick.target, path, bodies, 1),
            "serve, 1 client": partial(by_clients, args, server.target, path, bodies, 1),
            f"Detector.stream, {cpus} streams": partial(streamed, several, bodies, args.seconds),
            f"serve, {args.clients} clients": partial(by_clients, args, server.target, path, bodies, args.clients),
        }
        for name, other in zip(args.rivals, others, strict=True):
            sent, kind = (bodies, ANY) if name == "fastapi" else ([as_json(one) for one in bodies], "application/json")
            leg = partial(by_clients, args, other.target, "/predict", sent, args.clients, kind)
            legs[f"{name}, {args.clients} clients"] = leg
        timed: dict[str, list[Timed]] = {name: [] for name in legs}
        for number in range(-1, args.rounds):  # the first warms up, and does not count
            names = [*legs]
            for name in names[number % len(names) :] + names[: number % len(names)]:
                one = legs[name]()
                if number >= 0:
                    timed[name].append(one)
        memory = {
            "serve": server.rss_mb(),
            **{name: one.rss_mb() for name, one in zip(args.rivals, others, strict=True)},
        }
        found = {
            "orientations": orientations(args),
            "legs": {name: leg_record(each) for name, each in timed.items()},
            "rss_mb": memory,
            "by_predict": {name: replace(one, wrong=one.wrong[:10]) for name, one in differences.items()},
        }
    ratios = {
        "one client's time by Detector's": by_rounds(timed, 1, 0, lambda one: statistics.median(one.ms)),
        "goodput by Detector.stream": by_rounds(timed, 4, 3, lambda one: one.per_s),
    }
    names = [*timed]
    for place in range(5, len(names)):
        if not all(one.per_s for one in timed[names[place]]):
            continue  # nothing in time, which is no speed
        ratios[f"goodput by {names[place]}"] = by_rounds(timed, 4, place, lambda one: one.per_s)
    found["ratios"] = ratios
    failed = {name: sum(one.failed for one in each) for name, each in timed.items()}
    wrong += [f"{name}: {count} requests failed" for name, count in failed.items() if count and "serve" in name[:5]]
    return found, clients_table(timed, ratios), wrong


def orientations(args: argparse.Namespace) -> dict[str, int]:
    sizes = [image_size(path) for path in list_images(args.images)[: args.limit]]
    return dict(Counter("portrait" if height > width else "landscape" for height, width in sizes))


@contextmanager
def each_of(managers: Sequence[Any]) -> Iterator[list[Server]]:
    if not managers:
        yield []
        return
    with managers[0] as first, each_of(managers[1:]) as rest:
        yield [first, *rest]


def as_json(body: bytes) -> bytes:
    return json.dumps({"image": base64.b64encode(body).decode()}).encode()


def one_by_one(detector: Detector, bodies: Sequence[bytes], seconds: float) -> Timed:
    """`Detector.detect` of one image, again and again, in random order."""
    draw, times, start = random.Random(0), list[float](), time.perf_counter()
    while (now := time.perf_counter()) - start < seconds:
        detector.detect(draw.choice(bodies))
        times.append((time.perf_counter() - now) * 1e3)
    return Timed(len(times) / (time.perf_counter() - start), tuple(times))


def streamed(detector: Detector, bodies: Sequence[bytes], seconds: float) -> Timed:
    """`Detector.stream` over images without end, for so long."""
    draw, start, count = random.Random(0), time.perf_counter(), 0

    def endless() -> Iterator[bytes]:
        while time.perf_counter() - start < seconds:
            yield draw.choice(bodies)

    for _ in detector.stream(endless()):
        count += 1
    return Timed(count / (time.perf_counter() - start), ())


def by_clients(
    args: argparse.Namespace, target: Target, path: str, bodies: Sequence[bytes], count: int, kind: str = ANY
) -> Timed:
    load = Load(None, count, args.seconds, warmup_s=min(0.5, args.seconds / 4), connections=max(count, 64))
    seen = send(target, path, bodies, load, kind)
    kept = sum(one <= args.bound_ms for one in seen.latency_ms)
    return Timed(kept / seen.wall_s, seen.latency_ms, seen.failed)


def leg_record(each: Sequence[Timed]) -> dict[str, Any]:
    ms = [one for timed in each for one in timed.ms]
    return {
        "per_s": [one.per_s for one in each],
        "median_ms": statistics.median(ms) if ms else None,
        "p99_ms": percentile(ms, 99).value if supports(len(ms), 99) else None,
        "images": len(ms),
        "failed": sum(one.failed for one in each),
    }


def by_rounds(
    timed: Mapping[str, Sequence[Timed]], one: int, other: int, value: Callable[[Timed], float]
) -> list[float]:
    """The first leg's value by the other's, in each round."""
    each = [*timed.values()]
    return [value(a) / value(b) for a, b in zip(each[one], each[other], strict=True)]


def clients_table(timed: Mapping[str, Sequence[Timed]], ratios: Mapping[str, Sequence[float]]) -> str:
    lines = ["| | images/s in time | median ms | p99 ms |", "|---|---|---|---|"]
    for name, each in timed.items():
        found = leg_record(each)
        tail, middle = (f"{found[key]:.1f}" if found[key] else "" for key in ("p99_ms", "median_ms"))
        lines.append(f"| {name} | {spread([one.per_s for one in each])} | {middle} | {tail} |")
    return "\n".join([*lines, "", *(f"{what}: {spread(values)}" for what, values in ratios.items())])


def spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.3g} ({min(values):.3g} to {max(values):.3g})"


# ---- overload


@contextmanager
def sampled(server: Server, every_s: float = 0.5) -> Iterator[list[float]]:
    """The server's resident memory meanwhile."""
    found, done = [server.rss_mb()], threading.Event()

    def sample() -> None:
        while not done.wait(every_s):
            found.append(server.rss_mb())

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        done.set()
        thread.join()


def overload(args: argparse.Namespace, bodies: list[bytes]) -> tuple[dict[str, Any], str, list[str]]:
    with served(args) as server:
        path = f"/v1/detect?timeout_ms={args.bound_ms:g}"
        closed = Load(None, args.clients, min(args.seconds, 10.0), warmup_s=min(args.seconds / 4, 2.0))
        seen = send(server.target, path, bodies, closed)
        capacity = len(seen.latency_ms) / seen.wall_s
        loads, lines, wrong = [], [OVERLOAD_HEADER], list[str]()
        for factor in args.factors:
            with sampled(server) as rss:
                results = load_server(
                    server.url,
                    images=args.images,
                    rates=[factor * capacity],
                    duration=args.seconds,
                    warm_up=min(args.seconds / 4, 2.0),
                    latency_bound_ms=args.bound_ms,
                    limit=args.limit,
                    connections=4096,
                )
            (row,) = rows(results)
            if row.served is None:
                wrong.append(f"nothing was answered at {factor:g} times the capacity: {row.result.reason}")
                continue
            serving = row.result.runs[0].serving
            assert serving is not None and serving.traffic is not None
            tail, middle = row.latency_ms(99), row.latency_ms(50)
            loads.append(
                {
                    "factor": factor,
                    "rate": row.cell.rate,
                    "requests": serving.requests,
                    "endings": dict(serving.traffic.endings),
                    "in_time_per_s": row.served.in_time_per_s,
                    "median_ms": middle and middle.value,
                    "p99_ms": tail and tail.value,
                    "client_late_p99_ms": row.served.late_ms,
                    "client_cpu_percent": serving.traffic.client_cpu_percent,
                    "rss_mb": {"first": rss[0], "most": max(rss), "last": rss[-1]},
                    "unasked": serving.traffic.unasked,
                    "resent": serving.traffic.resent,
                    "flags": list(row.flags),
                }
            )
            lines.append(overload_line(loads[-1]))
            if serving.traffic.unasked:
                wrong.append(f"{serving.traffic.unasked} answers that nobody had asked for")
            if sum(serving.traffic.endings.values()) != serving.requests:
                wrong.append("a request had no end, or more than one")
    kept = {one["factor"]: one["in_time_per_s"] for one in loads}
    below = [rate for factor, rate in kept.items() if factor < 1]
    flat = kept[max(kept)] / below[-1] if below and max(kept) > 1 else None
    if flat is not None:
        lines.append(f"\nin time at {max(kept):g} times the capacity, by that below it: {flat:.3g}")
    return {"capacity_per_s": capacity, "loads": loads, "in_time_beyond_by_below": flat}, "\n".join(lines), wrong


OVERLOAD_HEADER = (
    "| times capacity | requests/s | in time, images/s | p50 ms | p99 ms | ended | memory MB, first, most, last | "
    "client: % of a CPU, late p99 ms |\n|---|---|---|---|---|---|---|---|"
)


def overload_line(one: Mapping[str, Any]) -> str:
    ended = ", ".join(f"{count} {name}" for name, count in one["endings"].items())
    memory = ", ".join(f"{value:.0f}" for value in one["rss_mb"].values())
    middle, tail, late = (
        "" if one[key] is None else f"{one[key]:.1f}" for key in ("median_ms", "p99_ms", "client_late_p99_ms")
    )
    return (
        f"| {one['factor']:g} | {one['rate']:.1f} | {one['in_time_per_s']:.1f} | {middle} | {tail} | {ended} "
        f"| {memory} | {one['client_cpu_percent']:.0f}, {late} |"
    )


# ---- soak


class Soak:
    """Clients of every kind, and what became of what they sent."""

    def __init__(
        self, args: argparse.Namespace, target: Target, bodies: Sequence[bytes], expected: Sequence[Found]
    ) -> None:
        self.target, self.bodies, self.expected = target, bodies, expected
        self.path = f"/v1/detect?threshold={THRESHOLD}&timeout_ms={args.bound_ms:g}"
        self.differences = Differences(limits(args))
        self.endings: Counter[str] = Counter()
        self.wrong: list[str] = []

    async def client(self, seed: int, end: float) -> None:
        draw = random.Random(seed)
        kinds: list[tuple[int, str, Callable[[random.Random], Awaitable[str]]]] = [
            (12, "good", self.good),
            (3, "corrupt", self.corrupt),
            (1, "slow", self.slow),
            (2, "gone", self.gone),
            (1, "no HTTP", self.no_http),
        ]
        while time.monotonic() < end:
            _, name, act = draw.choices(kinds, [weight for weight, _, _ in kinds])[0]
            try:
                self.endings[f"{name}: {await act(draw)}"] += 1
            except (OSError, TimeoutError) as error:
                self.endings[f"{name}: {type(error).__name__}"] += 1
                self.wrong.append(f"{name}: {type(error).__name__} {error}")
            await asyncio.sleep(draw.expovariate(20.0))

    async def good(self, draw: random.Random) -> str:
        number = draw.randrange(len(self.bodies))
        reply = await ask(self.target, "POST", self.path, self.bodies[number])
        if reply.status == 200:
            self.differences.add(number, reply.body, self.expected[number])
        return self._allowed("good", reply, 200, 429, 503)

    async def corrupt(self, draw: random.Random) -> str:
        body = bytearray(draw.choice(self.bodies))
        if draw.random() < 0.5:
            body = body[: draw.randrange(1, len(body) // 2)]
        else:
            body[: draw.randrange(2, 40)] = draw.randbytes(40)
        reply = await ask(self.target, "POST", self.path, bytes(body))
        return self._allowed("corrupt", reply, 422, 400, 415, 429, 503)

    async def slow(self, draw: random.Random) -> str:
        """Sends a few bytes at a time; half of them stop in the middle, and go away then."""
        body = draw.choice(self.bodies)
        reader, writer = await asyncio.open_connection("127.0.0.1", self.target.port)
        stops = draw.random() < 0.5
        try:
            writer.write(self.target.header("POST", self.path, len(body), ANY))
            step = max(1, len(body) // 10)
            for start in range(0, len(body) // 2 if stops else len(body), step):
                writer.write(body[start : start + step])
                await writer.drain()
                await asyncio.sleep(draw.uniform(0.0, 0.1))
            if stops:
                return "stopped"
            status = int((await asyncio.wait_for(reader.readuntil(b"\r\n"), 30)).split()[1])
            return self._allowed("slow", Reply(status, b"", True), 200, 408, 429, 503)
        except asyncio.IncompleteReadError as error:
            raise ConnectionError("no answer") from error
        finally:
            writer.close()
            with suppress(OSError):
                await writer.wait_closed()

    async def gone(self, draw: random.Random) -> str:
        """Sends a whole request and goes away, at once or after a moment."""
        body = draw.choice(self.bodies)
        connection = HttpConnection()
        await self.target.connect(connection)
        connection.send(self.target.header("POST", self.path, len(body), ANY), body, lambda answer: None)
        await asyncio.sleep(draw.choice((0.0, 0.002, 0.02)))
        connection.close()
        return "gone"

    async def no_http(self, draw: random.Random) -> str:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.target.port)
        try:
            writer.write(draw.choice((draw.randbytes(200), b"GET /\r\n\r\n", b"POST /v1/detect HTTP/1.1\r\nX\r\n\r\n")))
            if draw.random() < 0.5:
                writer.write_eof()
            with suppress(TimeoutError, OSError):
                await asyncio.wait_for(reader.read(1000), 1.0)
            return "sent"
        finally:
            writer.close()
            with suppress(OSError):
                await writer.wait_closed()

    def _allowed(self, kind: str, reply: Reply, *allowed: int) -> str:
        if reply.status not in allowed:
            self.wrong.append(f"{kind}: status {reply.status} {reply.body[:200]!r}")
        return str(reply.status)


@dataclass(frozen=True)
class Held:
    """What the server's process holds."""

    seconds: float
    rss_mb: float
    files: int
    threads: int


def soak(args: argparse.Namespace, bodies: list[bytes]) -> tuple[dict[str, Any], str, list[str]]:
    expected = predicted(args, args.images)
    with served(args) as server:
        clients_of = Soak(args, server.target, bodies, expected)
        curve = asyncio.run(soaked(args, server, clients_of))
        still = asyncio.run(status_of(server.target, "/health/ready"))
        ended = asyncio.run(terminated(server, args, bodies))
        code = server.process.wait(END_S)
    differences = clients_of.differences
    wrong = [*clients_of.wrong[:10], *differences.wrong[:10]]
    last = curve[-1].seconds
    early = [one for one in curve if last / 10 <= one.seconds < 2 * last / 10] or curve[:1]
    late = [one for one in curve if one.seconds >= 9 * last / 10]
    growth = statistics.fmean(one.rss_mb for one in late) / statistics.fmean(one.rss_mb for one in early)
    if growth > args.most_growth:
        wrong.append(f"memory grew {growth:.3f} times")
    if still != 200:
        wrong.append("the server was not ready at the end")
    if lost := {name: count for name, count in ended.items() if name not in ("200", "429", "503")}:
        wrong.append(f"of {IN_FLIGHT} requests at SIGTERM: {lost}")
    if code != 0:
        wrong.append(f"the server ended with {code}")
    found = {
        "minutes": args.minutes,
        "endings": dict(sorted(clients_of.endings.items())),
        "wrong": len(clients_of.wrong) + len(differences.wrong),
        "by_predict": replace(differences, wrong=differences.wrong[:10]),
        "growth": growth,
        "first": plain(early[0]),
        "last": plain(late[-1]),
        "at_sigterm": dict(ended),
        "exit_code": code,
    }
    ends = ", ".join(f"{name} {count:,}" for name, count in found["endings"].items())
    shown = (
        f"{sum(clients_of.endings.values()):,} requests in {args.minutes:g} minutes ({ends}), {found['wrong']} of them "
        "wrong; "
        f"memory {growth:.3f} times, {early[0].files} then {late[-1].files} files, {early[0].threads} then "
        f"{late[-1].threads} threads; SIGTERM with {IN_FLIGHT} under way: {dict(ended)}, exit code {code}"
    )
    return found, shown, wrong


async def soaked(args: argparse.Namespace, server: Server, soak: Soak) -> list[Held]:
    """Everything that the clients do, and the server's process meanwhile; the last when they are gone."""
    begin = time.monotonic()
    tasks = [asyncio.create_task(soak.client(seed, begin + 60 * args.minutes)) for seed in range(args.clients)]
    process, curve = psutil.Process(server.process.pid), list[Held]()

    def held() -> Held:
        with process.oneshot():
            rss_mb = process.memory_info().rss / 1e6
            return Held(time.monotonic() - begin, rss_mb, process.num_fds(), process.num_threads())

    while not all(task.done() for task in tasks):
        await asyncio.sleep(min(5.0, args.minutes * 2))
        curve.append(held())
    await asyncio.gather(*tasks)
    await asyncio.sleep(1.0)
    return [*curve, held()]


async def terminated(server: Server, args: argparse.Namespace, bodies: Sequence[bytes]) -> Counter[str]:
    """How requests end that are under way when the server gets SIGTERM."""
    opened = [HttpConnection() for _ in range(IN_FLIGHT)]
    for one in opened:
        await server.target.connect(one)
    loop = asyncio.get_running_loop()
    answers: list[asyncio.Future[Reply | Exception]] = [loop.create_future() for _ in opened]
    path = "/v1/detect?timeout_ms=60000"
    for number, (one, answer) in enumerate(zip(opened, answers, strict=True)):
        body = bodies[number % len(bodies)]
        one.send(server.target.header("POST", path, len(body), ANY), body, answer.set_result)
    await asyncio.sleep(0.01)  # on their way
    server.process.send_signal(signal.SIGTERM)
    async with asyncio.timeout(END_S):
        found = await asyncio.gather(*answers)
    return Counter(str(one.status) if isinstance(one, Reply) else type(one).__name__ for one in found)


# ---- generator


def generator(args: argparse.Namespace, bodies: list[bytes]) -> tuple[dict[str, Any], str, list[str]]:
    port = free_port()
    stub = multiprocessing.get_context("spawn").Process(target=answer_all, args=(port,), daemon=True)
    stub.start()
    target = Target("127.0.0.1", port, False, "")
    while asyncio.run(status_of(target, "/")) != 200:
        time.sleep(0.05)
    legs = {"gfldeploy load": ours_cpu_ms, **({"aiohttp": aiohttp_cpu_ms} if find_spec("aiohttp") else {})}
    cpu_ms: dict[str, list[float]] = {name: [] for name in legs}
    try:
        for _ in range(args.rounds):
            for name, leg in legs.items():
                cpu_ms[name].append(leg(target, bodies, args.clients, args.seconds))
    finally:
        stub.terminate()
    shown = "; ".join(f"{name}: {spread(each)} ms of a CPU for a request" for name, each in cpu_ms.items())
    return {"cpu_ms_per_request": cpu_ms}, shown, []


def answer_all(port: int) -> None:
    """200 for whatever comes, in a process of its own."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(asyncio.IncompleteReadError, ConnectionError):
            while header := await reader.readuntil(b"\r\n\r\n"):
                length = re.search(rb"(?i)content-length: (\d+)", header)
                await reader.readexactly(int(length[1]) if length else 0)
                writer.write(b'HTTP/1.1 200 OK\r\ncontent-length: 13\r\n\r\n{"images":[]}')
        writer.close()

    async def run() -> None:
        async with await asyncio.start_server(talk, "127.0.0.1", port) as server:
            await server.serve_forever()

    asyncio.run(run())


def ours_cpu_ms(target: Target, bodies: Sequence[bytes], count: int, seconds: float) -> float:
    seen = send(target, "/v1/detect", bodies, Load(None, count, seconds, connections=count))
    return seen.traffic.client_cpu_percent / 100 * seconds * 1e3 / seen.requests


def aiohttp_cpu_ms(target: Target, bodies: Sequence[bytes], count: int, seconds: float) -> float:
    import aiohttp

    async def run() -> float:
        sent, draw, end = 0, random.Random(0), time.monotonic() + seconds
        headers = {"Content-Type": ANY}
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=count)) as session:

            async def client() -> None:
                nonlocal sent
                while time.monotonic() < end:
                    url = f"http://{target.authority}/v1/detect"
                    async with session.post(url, data=draw.choice(bodies), headers=headers) as reply:
                        await reply.read()
                    sent += 1

            begin = time.process_time()
            await asyncio.gather(*(client() for _ in range(count)))
            return (time.process_time() - begin) * 1e3 / sent

    return asyncio.run(run())


if __name__ == "__main__":
    main()
