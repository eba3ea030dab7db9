"""Sends requests to a server, at planned times or from clients that wait for their answers, and records what comes."""

from __future__ import annotations

import asyncio
import functools
import json
import math
import random
import re
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from gfldeploy.bench.results import Traffic
from gfldeploy.bench.scenarios import arrival_times
from gfldeploy.load.connection import HttpConnection, Reply, Target

# What a server answers that does not take a request now, rather than that it cannot.
_REJECTED = (429, 503)
# A connection that was idle for longer may be closed by the server just now (uvicorn: after 5 s).
_IDLE_S = 2.0
_PAUSE_S = 0.1  # of a client whose request had no answer, before its next one
_CODE = re.compile(r"[\w.-]{1,40}", re.ASCII)
_MOST_ENDINGS = 50  # of which a server can invent any number


@dataclass(frozen=True)
class Load:
    """What is sent: `rate` requests a second at random times (a Poisson process), or one after the other by so many
    `clients`, each when its last one has ended; one of the two.

    For `warmup_s` seconds, which do not count, then for `duration_s`. `timeout_s`: how long an answer is waited for.
    `connections`: how many may be open at once.
    """

    rate: float | None
    clients: int | None
    duration_s: float
    warmup_s: float = 0.0
    timeout_s: float = 10.0
    connections: int = 512
    seed: int = 0

    def __post_init__(self) -> None:
        if (self.rate is None) == (self.clients is None):
            raise ValueError("there is either a rate or a number of clients")
        if self.connections < (self.clients or 1):
            raise ValueError("each client needs a connection")


@dataclass(frozen=True)
class Seen:
    """What became of the `requests` that count: those planned after the warm-up, or of clients those that end after it.

    `latency_ms`, of those that were answered with 200: from the time that a request was planned for, whenever it was
    sent, to the end of the answer. So a server that falls behind cannot hide it by keeping its client from sending
    (coordinated omission). Clients that wait for answers have no other plan than to send then: theirs is from there.
    `warmup_ms`: of those that do not count. `rejected`: those answered with 429 or 503. `wall_s`: in which the requests
    were planned; of clients, to the end of the last one.
    """

    requests: int
    rejected: int
    latency_ms: tuple[float, ...]
    warmup_ms: tuple[float, ...]
    wall_s: float
    traffic: Traffic

    @property
    def failed(self) -> int:
        """Requests without an answer, or with an error that is no rejection."""
        return self.requests - self.rejected - len(self.latency_ms)


@dataclass(eq=False)
class _Sent:
    """One that has not ended; `planned`, `sent`: by the loop's clock."""

    body: int
    planned: float
    sent: float
    timer: asyncio.TimerHandle | None = None
    connection: HttpConnection | None = None
    opening: asyncio.Task[None] | None = None
    resent: bool = False


@dataclass
class _Record:
    endings: Counter[str] = field(default_factory=Counter)
    latency_ms: list[float] = field(default_factory=list)
    warmup_ms: list[float] = field(default_factory=list)
    late_ms: list[float] = field(default_factory=list)
    rejected: int = 0
    resent: int = 0
    unasked: int = 0
    last: float = 0.0


class LoadGenerator:
    """Posts the same bodies to one server, in random order, once (`run`).

    Requests are sent when they are due, whatever the server does. What is under way is bounded by the connections:
    where all are in use, a request that is due is not sent, and has failed.
    """

    def __init__(self, target: Target, path: str, bodies: Sequence[bytes], content_type: str, load: Load) -> None:
        """`path`: where each body is posted, with its query."""
        self._target, self._bodies, self._load = target, bodies, load
        self._headers = [target.header("POST", path, len(body), content_type) for body in bodies]
        self._order = _shuffled(len(bodies), load.seed)
        self._idle: list[tuple[HttpConnection, float]] = []
        self._under_way: set[_Sent] = set()
        self._open = self._most_open = 0
        self._begin = self._end = 0.0
        self._record = _Record()

    async def run(self) -> Seen:
        """Send everything, and wait until each request has ended. Nothing stays open."""
        load, self._loop, self._all_ended = self._load, asyncio.get_running_loop(), asyncio.Event()
        start = self._loop.time()
        self._begin = start + load.warmup_s
        self._end = self._begin + load.duration_s
        cpu_s = [0.0]
        self._loop.call_at(self._begin, lambda: cpu_s.append(time.process_time()))
        try:
            if load.rate is not None:
                await self._send_at(start, load.rate)
            else:
                for _ in range(load.clients or 0):
                    self._due(start)
            await asyncio.sleep(self._end - self._loop.time())
            cpu_s.append(time.process_time())
            while self._under_way:
                self._all_ended.clear()
                await self._all_ended.wait()
        finally:
            for request in [*self._under_way]:
                self._give_up(request)
            for connection, _ in self._idle:
                self._drop(connection)
        return self._seen(100 * (cpu_s[-1] - cpu_s[-2]) / load.duration_s)

    async def _send_at(self, start: float, rate: float) -> None:
        seconds = self._end - start
        expected = rate * seconds
        times = arrival_times(rate, math.ceil(expected + 10 * math.sqrt(expected)) + 10, self._load.seed)
        for planned in (start + times[times < seconds]).tolist():
            # Also where there is nothing to wait for, so that answers are read. The loop's clock ticks in milliseconds.
            await asyncio.sleep(max(0.0, planned - self._loop.time()))
            self._due(planned)

    def _due(self, planned: float) -> None:
        request = _Sent(next(self._order), planned, self._loop.time())
        request.timer = self._loop.call_at(planned + self._load.timeout_s, self._time_out, request)
        self._under_way.add(request)
        self._send(request, self._reused())

    def _send(self, request: _Sent, connection: HttpConnection | None) -> None:
        if connection is not None:
            self._post(request, connection)
        elif self._open >= self._load.connections:
            self._ended(request, "no connection")
        else:
            self._open += 1
            self._most_open = max(self._most_open, self._open)
            connection = HttpConnection()
            request.opening = self._loop.create_task(self._target.connect(connection))
            request.opening.add_done_callback(functools.partial(self._opened, request, connection))

    def _reused(self) -> HttpConnection | None:
        """The connection that was idle for the shortest time."""
        while self._idle:
            connection, since = self._idle.pop()
            if connection.is_open and self._loop.time() - since < _IDLE_S:
                return connection
            self._drop(connection)
        return None

    def _opened(self, request: _Sent, connection: HttpConnection, task: asyncio.Task[None]) -> None:
        request.opening = None
        if task.cancelled():  # by whoever gave the request up
            self._drop(connection)
        elif task.exception() is not None:
            self._drop(connection)
            self._ended(request, "refused")
        else:
            self._post(request, connection)

    def _post(self, request: _Sent, connection: HttpConnection) -> None:
        request.connection = connection
        done = functools.partial(self._answered, request, connection)
        connection.send(self._headers[request.body], self._bodies[request.body], done)

    def _answered(self, request: _Sent, connection: HttpConnection, answer: Reply | Exception) -> None:
        if isinstance(answer, Reply) and not answer.closes:
            self._idle.append((connection, self._loop.time()))
        else:
            self._drop(connection)
        if isinstance(answer, Reply):
            self._ended(request, ending_of(answer), answer.status)
        elif isinstance(answer, ConnectionAbortedError) and connection.uses > 1 and not request.resent:
            # The server closed an idle connection as the request was on its way: what HTTP leaves to the client.
            request.resent, request.connection = True, None
            self._record.resent += request.planned >= self._begin
            self._send(request, None)
        else:
            self._ended(request, "closed" if isinstance(answer, ConnectionError) else "malformed")

    def _time_out(self, request: _Sent) -> None:
        self._give_up(request)
        self._ended(request, "timed out")

    def _give_up(self, request: _Sent) -> None:
        if request.opening is not None:
            request.opening.cancel()
        elif request.connection is not None:
            self._drop(request.connection)
        if request.timer is not None:
            request.timer.cancel()

    def _drop(self, connection: HttpConnection) -> None:
        connection.close()
        self._open -= 1
        self._record.unasked += connection.unasked

    def _ended(self, request: _Sent, ending: str, status: int | None = None) -> None:
        now, record = self._loop.time(), self._record
        self._under_way.discard(request)
        if request.timer is not None:
            request.timer.cancel()
        latency_ms = (now - request.planned) * 1e3
        # What clients wait for keeps the server at work, however early it was sent: what ends in a time is its rate.
        if (now if self._load.rate is None else request.planned) < self._begin:
            record.warmup_ms += [latency_ms] if status == 200 else []
        else:
            record.last = now
            record.rejected += status in _REJECTED
            record.latency_ms += [latency_ms] if status == 200 else []
            known = ending in record.endings or len(record.endings) < _MOST_ENDINGS
            record.endings[ending if known else "others"] += 1
            if self._load.rate is not None:
                record.late_ms.append((request.sent - request.planned) * 1e3)
        if self._load.clients is not None:
            self._loop.call_later(0 if status else _PAUSE_S, self._next)
        if not self._under_way:
            self._all_ended.set()

    def _next(self) -> None:
        """A client's next request."""
        if (now := self._loop.time()) < self._end:
            self._due(now)

    def _seen(self, cpu_percent: float) -> Seen:
        record = self._record
        end = self._end if self._load.clients is None else max(record.last, self._end)
        return Seen(
            requests=record.endings.total(),
            rejected=record.rejected,
            latency_ms=tuple(record.latency_ms),
            warmup_ms=tuple(record.warmup_ms),
            wall_s=end - self._begin,
            traffic=Traffic(
                endings=dict(sorted(record.endings.items())),
                late_ms=tuple(record.late_ms),
                most_connections=self._most_open,
                resent=record.resent,
                unasked=record.unasked,
                client_cpu_percent=cpu_percent,
                loopback=self._target.loopback,
            ),
        )


def _shuffled(count: int, seed: int) -> Iterator[int]:
    """Every number below `count` once in each round, each round in an order of its own."""
    draw, numbers = random.Random(seed), list(range(count))
    while True:
        draw.shuffle(numbers)
        yield from numbers


def ending_of(reply: Reply) -> str:
    """Such as "200", or "429 queue_full" with the code of an error."""
    code = ""
    if reply.status >= 400:
        with suppress(ValueError, KeyError, TypeError, RecursionError):
            code = json.loads(reply.body)["error"]["code"]
    return f"{reply.status} {code}" if isinstance(code, str) and _CODE.fullmatch(code) else str(reply.status)
