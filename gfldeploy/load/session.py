"""One load test from its options to results: what `gfldeploy load` runs."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from gfldeploy.bench.cell import Cell
from gfldeploy.bench.results import BenchResults, CellResult, DataDescription, Run, Serving
from gfldeploy.bench.timing import Samples, Settings
from gfldeploy.errors import DataError, OutputError, ServerError, UsageError, reading
from gfldeploy.files import StrPath, check_file
from gfldeploy.images.coco import list_images
from gfldeploy.images.decode import open_file
from gfldeploy.load.connection import HttpConnection, MalformedAnswerError, Reply, Target
from gfldeploy.load.generator import Load, LoadGenerator, Seen, ending_of
from gfldeploy.machine import describe_machine
from gfldeploy.progress import SILENT, Progress
from gfldeploy.serialization import build, check
from gfldeploy.signals import hold_interrupts
from gfldeploy.system import allow_open_files

_MODEL = "/v1/model"
_DETECT = "/v1/detect"
_ANY = "application/octet-stream"
_MOST_BYTES = 1 << 30  # of all images, which are held in memory
_MOST_REQUESTS = 1_000_000  # of one load, each of which is a sample
_OTHER_FILES = 64  # that the process has open beside its connections
_MOST_KEY = 4096  # bytes of a file with a key
_KEEPS_UP = 0.95  # a server that answers less than this share of what arrives is falling behind
_QUOTABLE = 30  # requests of a load, from which on figures are more than a first look (`Settings.quick`)
_AXES = ("engine", "precision", "device", "tf32", "threads", "streams", "input_size", "batch_size")


def load_server(
    url: str,
    *,
    images: StrPath,
    rates: Sequence[float] = (),
    clients: Sequence[int] = (),
    duration: float = 30.0,
    warm_up: float = 3.0,
    latency_bound_ms: float = 1000.0,
    timeout_s: float = 10.0,
    connections: int = 512,
    limit: int | None = 256,
    seed: int = 0,
    api_key_file: StrPath | None = None,
    output: StrPath | None = None,
    force: bool = False,
    progress: Progress = SILENT,
) -> BenchResults:
    """Send images to a running `gfldeploy serve` and measure what it answers.

    At a rate, images are sent at random times that were drawn before, whatever the server does, and each latency counts
    from its planned time: a server that falls behind cannot make its client ask less (coordinated omission). Clients
    send one image after the other, each when it has its last answer.

    Args:
        url: The server, such as "http://127.0.0.1:8000".
        images: A folder of images, which are sent as they are, in random order.
        rates: Images a second to send, one load after the other.
        clients: Numbers of clients to send from, one load after the other, after the rates.
        duration: Seconds of each load.
        warm_up: Seconds of the same load before, which do not count.
        latency_bound_ms: What the server is asked to answer within (its `timeout_ms`). Later answers do not count.
        timeout_s: Seconds after which a request without an answer is given up.
        connections: How many are open at most. Where all are in use, what is due fails.
        limit: The number of images, the first by name; None for all.
        seed: Seed of the times and of the order of the images.
        api_key_file: A file with the key that the server asks for.
        output: The file to write (.json); None for none. An interruption leaves a file of the loads that were done.
        force: Replace this file if it exists and gfldeploy made it.
        progress: Told of each load as it begins.

    Returns:
        A result for each load.

    Raises:
        UsageError: The options contradict each other, or the URL is none.
        DataError: The images or the key cannot be read.
        ServerError: The server cannot be reached, is none of `gfldeploy serve`, or does not answer the first image.
        OutputError: The output exists already, or cannot be written.
    """
    loads = [
        Load(rate, count, duration, warm_up, timeout_s, connections, seed)
        for rate, count in (*((rate, None) for rate in rates), *((None, count) for count in clients))
        if _fits(rate, count, duration + warm_up, connections)
    ]
    if not loads:
        raise UsageError("there is nothing to send: neither --rates nor --clients are given")
    if latency_bound_ms > timeout_s * 1e3:
        raise UsageError("--timeout-s is less than --latency-bound-ms: answers in time would be given up")
    path = None if output is None else Path(output)
    if path is not None:
        if path.suffix != ".json" and not path.is_dir():
            raise OutputError(f"{path} does not end in .json", "Name it so: it is a file of results.")
        check_file(path, "json", force=force)
    target = Target.parse(url, None if api_key_file is None else _key(Path(api_key_file)))
    bodies, data = _read(Path(images), limit)
    detect = f"{_DETECT}?timeout_ms={latency_bound_ms:g}"
    _allow_files(max(load.connections for load in loads))
    target, server = asyncio.run(_look(target, detect, bodies[0]))
    cells: list[CellResult] = []
    machine = describe_machine()
    fewest = _QUOTABLE

    def results() -> BenchResults:
        settings = Settings(
            min_seconds=duration,
            min_count=max(fewest, 1),
            max_seconds=duration,
            warmup=0,
            seed=seed,
            latency_bound_ms=latency_bound_ms,
            monitor_hz=0.0,
            warmup_s=warm_up,
        )
        made = BenchResults(created=_now(), machine=machine, data=data, settings=settings, cells=tuple(cells))
        if path is not None:
            check_file(path, "json", force=force)  # another process may have written it meanwhile
            made.write(path)
        return made

    try:
        for load in loads:
            cell = server.cell(load)
            progress.stage(f"{cell.load.removeprefix(', http ')}: {duration:g} s after {warm_up:g} s of warm-up")
            started = _now()
            seen = asyncio.run(_send(target, detect, bodies, load))
            fewest = min(fewest, seen.requests)
            cells.append(_result(cell, server, seen, started))
    except KeyboardInterrupt as stopped:
        if path is not None and cells:
            results()
            stopped.add_note(f"{path} has the {len(cells)} of {len(loads)} loads that were done")
        raise
    with hold_interrupts():
        return results()


@dataclass(frozen=True)
class _Described:
    """What a server says of itself."""

    axes: dict[str, Any]
    engine_version: str
    load_s: float | None

    @classmethod
    def of(cls, data: Any) -> _Described:
        """From the answer to /v1/model. Raises `DataError`."""
        text = {"name": str, "directory": str, "digest": str}
        check({"bundle": text, "engine": str, "engine_version": str, "load_s?": float | None}, data)
        axes = {
            "bundle": {key: data["bundle"][key] for key in text},
            **{key: data[key] for key in _AXES if key in data},
        }
        found = cls({**axes, "scenario": "http"}, data["engine_version"], data.get("load_s"))
        found.cell(Load(1.0, None, 1.0))
        return found

    def cell(self, load: Load) -> Cell:
        return build(Cell, {**self.axes, "rate": load.rate, "clients": load.clients})


async def _look(target: Target, detect: str, body: bytes) -> tuple[Target, _Described]:
    """The server's address and what it says of itself; it must take an image, if it has time. Raises `ServerError`."""
    target = await target.resolved()
    shown = f"{target.authority}{target.path}"
    reply = await _ask(target, target.header("GET", _MODEL), b"", f"{shown}{_MODEL}")
    try:
        with reading("it", DataError, _REMEDY):
            server = _Described.of(json.loads(reply.body))
    except DataError as error:
        raise ServerError(f"what {shown}{_MODEL} answers is not as expected: {error.problem}", _REMEDY) from error
    await _ask(target, target.header("POST", detect, len(body), _ANY), body, f"{shown}{_DETECT}")
    return target, server


async def _ask(target: Target, header: bytes, body: bytes, shown: str) -> Reply:
    """What the server answers, which must be a 200, or that it is too busy now. Raises `ServerError`."""
    connection = HttpConnection()
    answer: asyncio.Future[Reply | Exception] = asyncio.get_running_loop().create_future()
    try:
        async with asyncio.timeout(_FIRST_S):
            await target.connect(connection)
            connection.send(header, body, answer.set_result)
            found = await answer
    except TimeoutError as error:
        raise ServerError(f"{shown} did not answer within {_FIRST_S:g} s", "Look whether the server is up.") from error
    except OSError as error:
        raise ServerError(
            f"{shown} cannot be reached: {error.strerror or error}", "Start the server, or check the URL."
        ) from error
    finally:
        connection.close()
    if isinstance(found, Exception):
        what = "answers no HTTP/1.1" if isinstance(found, MalformedAnswerError) else "closed the connection"
        raise ServerError(f"{shown} {what}", "Check the URL: the port, and http or https.")
    if found.status != 200 and ending_of(found) not in _BUSY:
        raise ServerError(f"{shown} answered {found.status}{_told(found.body)}", _REMEDIES.get(found.status, _REMEDY))
    return found


_FIRST_S = 30.0  # that the first answers may take
_BUSY = ("429 queue_full", "503 deadline")  # others send to it too, say
_REMEDY = "Give the URL of a running `gfldeploy serve` that is ready."
_REMEDIES = {
    401: "Give the file with its key: --api-key-file.",
    403: "Give the file with its key: --api-key-file.",
    **dict.fromkeys((301, 302, 303, 307, 308), "Give the URL that it redirects to: redirects are not followed."),
}


def _told(body: bytes) -> str:
    """The message of an error, if there is one."""
    try:
        message = json.loads(body)["error"]["message"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return ""
    return f": {message:.200}" if isinstance(message, str) else ""


async def _send(target: Target, detect: str, bodies: Sequence[bytes], load: Load) -> Seen:
    return await LoadGenerator(target, detect, bodies, _ANY, load).run()


def _result(cell: Cell, server: _Described, seen: Seen, started: str) -> CellResult:
    if not seen.requests:
        return CellResult(cell, "failed", "no request was due in so short a time", "Send for longer: --duration.")
    if not seen.latency_ms:
        endings = ", ".join(f"{count} x {ending}" for ending, count in seen.traffic.endings.items())
        reason = f"none of {seen.requests} requests was answered: {endings}"
        return CellResult(cell, "failed", reason, "Look at the server's log, or send less.")
    answered = len(seen.latency_ms)
    samples = Samples(
        latency_ms=seen.latency_ms,
        warmup_ms=seen.warmup_ms,
        batch_size=cell.batch_size,
        images=answered,
        wall_s=seen.wall_s,
        stable=answered >= _KEEPS_UP * seen.requests,
    )
    run = Run(
        started=started,
        samples=samples,
        engine_version=server.engine_version,
        load_s=server.load_s,
        first_inference_ms=None,
        peak_rss_mb=None,
        inputs_mb=0.0,
        shapes={},
        padding_ratio=None,
        idle=None,
        mixed_batches=None,
        serving=Serving(seen.requests, seen.rejected, (), None, seen.failed, seen.traffic),
    )
    return CellResult(cell, "ok", runs=(run,))


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _fits(rate: float | None, clients: int | None, seconds: float, connections: int) -> bool:
    """Raises `UsageError` for a load that is too large."""
    if rate is not None and rate * seconds > _MOST_REQUESTS:
        raise UsageError(
            f"{rate:g} images/s for {seconds:g} s are more than {_MOST_REQUESTS:,} requests",
            "Send less, or for less long.",
        )
    if clients is not None and clients > connections:
        raise UsageError(f"{clients} clients need as many connections", f"Raise --connections from {connections}.")
    return True


def _read(folder: Path, limit: int | None) -> tuple[list[bytes], DataDescription]:
    """The images' files. Raises `DataError`."""
    bodies: list[bytes] = []
    for path in list_images(folder)[:limit]:
        with open_file(path) as file:
            bodies.append(file.read())
        if sum(map(len, bodies)) > _MOST_BYTES:
            raise DataError(f"the images in {folder} take more than 1 GiB", "Use fewer of them: --limit.")
    digest = hashlib.sha256("".join(hashlib.sha256(body).hexdigest() for body in bodies).encode()).hexdigest()
    return bodies, DataDescription("", digest, len(bodies), None)


def _key(path: Path) -> str:
    """The first key of the file, which may be the server's own, with remarks in it. Raises `DataError`."""
    remedy = "Give a file with the key on a line of its own, such as the server's."
    with reading(path, DataError, remedy):
        with path.open("rb") as file:
            lines = [line.split() for line in file.read(_MOST_KEY).splitlines()]
        key = next((words[0] for words in lines if words and not words[0].startswith(b"#")), None)
        if key is None:
            raise DataError(f"{path} has no key", remedy)
        return key.decode("ascii")


def _allow_files(connections: int) -> None:
    """Let this process have so many connections. Raises `UsageError`."""
    needed = connections + _OTHER_FILES
    if (most := allow_open_files(needed)) < needed:
        raise UsageError(f"{connections} connections are more than this process may open: {most - _OTHER_FILES}")
