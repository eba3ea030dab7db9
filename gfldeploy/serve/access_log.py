"""The access log: a line of JSON for each request, also for those whose clients vanished."""

from __future__ import annotations

import json
import logging
import os
import stat
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from queue import Empty, Full, Queue
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gfldeploy.errors import OutputError
from gfldeploy.serve.problems import CLIENT_GONE

_log = logging.getLogger(__name__)
_LONGEST_TEXT = 200  # characters of a path, or of anything else that a client chose
_MOST_LINES = 10_000  # that wait to be written; they take a few MB
_AT_ONCE = 256
_CLOSING_S = 5.0
_STANDARD_OUTPUT = Path("-")

# A line, for its schema: `path` where there is no `route`, `replica` where there are several processes.
LOGGED: Mapping[str, Any] = {
    "time": str,
    "client": str | None,
    "method": str,
    "route": str | None,
    "status": int,
    "received": int,
    "sent": int,
    "images": int | None,
    "ms": float,
    "code": str | None,
    "path?": str,
    "replica?": int,
}


@dataclass(frozen=True)
class Exchange:
    """A request, and what became of it.

    `began`: UTC. `client`: its address; None on a Unix socket. `route`: the path in the application's own words, None
    where there is no such route. `path`: what the client asked for, cut, without the query. `status`: `CLIENT_GONE` if
    the client left before its answer began. `received`, `sent`: bytes of the bodies. `images`: in the request; None if
    it was not read so far. `code`: of the error that was the answer; None if it was none.
    """

    began: datetime
    client: str | None
    method: str
    route: str | None
    path: str
    status: int
    received: int
    sent: int
    images: int | None
    code: str | None
    seconds: float

    def line(self, replica: int | None = None) -> bytes:
        """As a line of the access log, with the number of the process where there are several.

        Whatever the client sent is inside a JSON string, in ASCII: it cannot end the line, nor forge a field.
        """
        record: dict[str, Any] = {
            "time": self.began.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "client": self.client,
            "method": self.method,
            "route": self.route,
            "status": self.status,
            "received": self.received,
            "sent": self.sent,
            "images": self.images,
            "ms": round(self.seconds * 1e3, 1),
            "code": self.code,
        }
        if self.route is None:
            record["path"] = self.path
        if replica is not None:
            record["replica"] = replica
        return json.dumps(record, ensure_ascii=True).encode() + b"\n"


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST_TEXT else f"{text[:_LONGEST_TEXT]}..."


class Exchanges:
    """ASGI middleware that tells of every request when it ends, however it ends.

    The application says of a request what only it knows in `request.state`: the number of `images`, and the `code` of
    the error that it answers.
    """

    def __init__(self, app: ASGIApp, begin: Callable[[], None], end: Iterable[Callable[[Exchange], object]]) -> None:
        """`begin` is called at the beginning of each request, each of `end` at its end; they must not raise or wait."""
        self._app, self._begin, self._end = app, begin, tuple(end)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, and watch."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, start = datetime.now(UTC), time.perf_counter()
        state = scope.setdefault("state", {})
        received = sent = status = 0
        gone = False

        async def watched_receive() -> Message:
            nonlocal received, gone
            message = await receive()
            if message["type"] == "http.request":
                received += len(message.get("body", b""))
            elif message["type"] == "http.disconnect":
                gone = gone or not status
            return message

        async def watched_send(message: Message) -> None:
            nonlocal sent, status
            await send(message)
            if message["type"] == "http.response.start":
                status = message["status"]
            elif message["type"] == "http.response.body":
                sent += len(message.get("body", b""))

        self._begin()
        try:
            await self._app(scope, watched_receive, watched_send)
        except Exception:
            if not status and not gone:  # the error's answer is sent outside of this
                state.setdefault("code", "internal")
            raise
        finally:
            client = scope.get("client")
            exchange = Exchange(
                began,
                _cut(client[0]) if client else None,
                _cut(scope["method"]),
                getattr(scope.get("route"), "path", None),
                _cut(scope["path"]),
                CLIENT_GONE if gone else status or 500,
                received,
                sent,
                state.get("images"),
                state.get("code"),
                time.perf_counter() - start,
            )
            for tell in self._end:
                tell(exchange)


class AccessLog:
    """Writes lines to a file or to standard output, in a thread of its own: no request waits for a disk or a reader.

    A line is appended, whole, to whatever the file is then: a tool may truncate it at any time (`copytruncate` of
    logrotate). Lines that cannot be written, or come while too many others wait, are dropped and counted.
    """

    def __init__(self, path: Path, dropped: Callable[[int], None], replica: int | None = None) -> None:
        """`path`: "-" for standard output. `dropped` is told how many lines were, in any thread. `replica`: the number
        of this process, where several write to the same file.

        Raises `OutputError` where the file cannot be opened.
        """
        self._dropped, self._replica = dropped, replica
        self._lines: Queue[bytes | None] = Queue(_MOST_LINES)
        self._failing = self._cut_short = False
        try:
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
            self._file = os.dup(1) if path == _STANDARD_OUTPUT else os.open(path, flags, 0o640)
        except OSError as error:
            what = "standard output" if path == _STANDARD_OUTPUT else str(path)
            raise OutputError(
                f"the access log cannot be written to {what}: {error.strerror or error}",
                "Give --access-log a file in a folder that this user may write, or - for standard output.",
            ) from error
        # Of several processes, a pipe keeps apart only what is shorter than a page.
        alone = replica is None or not stat.S_ISFIFO(os.fstat(self._file).st_mode)
        self._at_once = _AT_ONCE if alone else 1
        self._thread = threading.Thread(target=self._work, name="gfldeploy-access-log", daemon=True)
        self._thread.start()

    def write(self, exchange: Exchange) -> None:
        """Write a line, soon."""
        try:
            self._lines.put_nowait(exchange.line(self._replica))
        except Full:
            self._dropped(1)

    def close(self) -> None:
        """Write what waits, but not for longer than 5 seconds."""
        with suppress(Full):
            self._lines.put(None, timeout=_CLOSING_S)
            self._thread.join(_CLOSING_S)

    def _work(self) -> None:
        ended = False
        while not ended:
            lines = [self._lines.get()]
            with suppress(Empty):
                while len(lines) < self._at_once:
                    lines.append(self._lines.get_nowait())
            ended = None in lines
            self._append([line for line in lines if line is not None])
        os.close(self._file)

    def _append(self, lines: list[bytes]) -> None:
        """Write them, and end a line first that an earlier failure cut short."""
        data = (b"\n" if self._cut_short else b"") + b"".join(lines)
        written = 0
        try:
            while written < len(data):
                written += os.write(self._file, data[written:])
            self._failing = self._cut_short = False
        except OSError as error:
            self._cut_short = data[written - 1 : written] != b"\n" if written else self._cut_short
            self._dropped(len(lines) - data[:written].count(b"\n"))
            if not self._failing:
                _log.warning("the access log cannot be written, lines are dropped: %s", error.strerror or error)
            self._failing = True
