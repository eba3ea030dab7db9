"""What the processes of one server say to each other: lines of JSON over a socket, news and questions both ways."""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import socket
import threading
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from typing import Any

from gfldeploy.cluster.worker import as_plain, raised
from gfldeploy.errors import GfldeployError, ServerError, summary

_log = logging.getLogger(__name__)
_LONGEST_LINE = 1 << 28  # the metrics of many processes; both ends are this package's own
# What is told, or asked, by its name: returns the answer to a question.
Handler = Callable[[Any], Awaitable[Any]]


class Channel:
    """One end. What is told before `run` is sent at once, from any thread; what is asked needs `run` at both ends."""

    def __init__(self, sock: socket.socket, handlers: Mapping[str, Handler]) -> None:
        self._sock, self._handlers = sock, handlers
        self._sending = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._numbers = itertools.count()
        self._asked: dict[int, asyncio.Future[Any]] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def tell(self, what: str, content: Any = None) -> None:
        """Send news; nothing happens where the other end has gone. In any thread."""
        self._send({"what": what, "content": content})

    async def ask(self, what: str, content: Any = None) -> Any:
        """The answer. Raises the `GfldeployError` that it is, and `ServerError` where the other end has gone."""
        number, answer = next(self._numbers), asyncio.get_running_loop().create_future()
        if self._writer is None or self._writer.is_closing():
            raise _gone()
        self._asked[number] = answer
        try:
            self._send({"what": what, "content": content, "ask": number})
            return await answer
        finally:
            del self._asked[number]

    async def run(self) -> None:
        """Hear what the other end says, until it ends."""
        self._sock.setblocking(False)
        reader, writer = await asyncio.open_unix_connection(sock=self._sock, limit=_LONGEST_LINE)
        with self._sending:
            self._loop, self._writer = asyncio.get_running_loop(), writer
        try:
            with suppress(OSError):
                while line := await reader.readline():
                    self._hear(json.loads(line))
        finally:
            writer.close()
            for answer in self._asked.values():
                if not answer.done():
                    answer.set_exception(_gone())

    def _hear(self, said: dict[str, Any]) -> None:
        if "answer" in said:
            answer = self._asked.get(said["answer"])
            if answer is not None and not answer.done():
                if "error" in said:
                    answer.set_exception(raised(said["error"]))
                else:
                    answer.set_result(said["content"])
            return
        task = asyncio.create_task(self._handle(said))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _handle(self, said: dict[str, Any]) -> None:
        number = said.get("ask")
        try:
            content = await self._handlers[said["what"]](said["content"])
        except Exception as error:  # noqa: BLE001 - whoever asked would wait for ever
            if not isinstance(error, GfldeployError):
                _log.exception("an error that nobody foresaw")
                error = ServerError(f"a process of this server failed: {summary(error)}", "Look into its log.")
            if number is not None:
                self._send({"answer": number, "error": as_plain(error)})
            return
        if number is not None:
            self._send({"answer": number, "content": content})

    def _send(self, said: dict[str, Any]) -> None:
        line = json.dumps(said).encode() + b"\n"
        with self._sending:
            loop, writer = self._loop, self._writer
            if writer is None:
                with suppress(OSError):
                    self._sock.sendall(line)
                return
        assert loop is not None
        with suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(_write, writer, line)


def _write(writer: asyncio.StreamWriter, line: bytes) -> None:
    if not writer.is_closing():
        writer.write(line)


def _gone() -> ServerError:
    return ServerError("a process of this server has ended", "Try again.")
