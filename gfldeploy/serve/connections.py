"""uvicorn's connections, with limits that it does not have: on the time and size of headers, and on their number."""

from __future__ import annotations

import asyncio
import re
import socket
import time
from collections.abc import Callable
from typing import Any

from uvicorn.protocols.http.auto import AutoHTTPProtocol

from gfldeploy.system import allow_open_files

HEADER_S = 10.0
"""Seconds from the first byte of a connection, or of its next request, to the end of the header."""
KEEP_ALIVE_S = 75
"""Seconds that a connection may be idle: longer than reverse proxies keep theirs, so that these never send into one
that is being closed (nginx: 60)."""
MOST_HEADER_BYTES = 1 << 16
_MOST_CONNECTIONS, _OTHER_FILES = 4096, 128
_SENDING_S = 30.0
_TELLS = hasattr(AutoHTTPProtocol, "on_headers_complete")  # httptools tells what a byte belongs to
_UPGRADE = re.compile(rb"(?<=\n)upgrade(?=:)", re.IGNORECASE)


class Connection(AutoHTTPProtocol):  # type: ignore[misc, valid-type]  # one of two classes, whichever is installed
    """A connection that is closed if its next header is not there in time, or too large.

    Where there are `most` connections, one that is idle makes room for a new one; else the new one is closed.
    """

    most = 1000
    to_shed = 0  # so many kept connections are to end with their next answers, for the clients to find another process

    _gone: Callable[[], None] | None = None
    _timer: asyncio.TimerHandle | None = None
    _header_bytes = 0

    def connection_made(self, transport: Any) -> None:
        """Begin to wait for a header."""
        super().connection_made(transport)
        self._await_header()
        if len(self.connections) > self.most:
            idle = (one for one in self.connections if one is not self and isinstance(one, Connection) and one.idle)
            # Kept ones first, then those that have waited the longest: a request may be on its way on a new one.
            min(idle, key=lambda one: one._timer.when() if one._timer else 0.0, default=self).transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget it."""
        self._forget_timer()
        super().connection_lost(exc)
        if self._gone is not None:
            self._gone()

    def tell_when_gone(self, tell: Callable[[], None] | None) -> None:
        """Call it once, when the client has left, while its request is being answered. None: call nothing any more."""
        self._gone = tell
        if tell is not None and self.transport.is_closing():
            tell()

    def data_received(self, data: bytes) -> None:
        """Begin to wait for a header with its first byte."""
        if self.idle or _TELLS:
            self._header_bytes += len(data)
        super().data_received(_without_upgrade(data) if self.idle else data)
        if not self.idle:
            self._forget_timer()
            state = self.scope["state"]
            state["arrived"], state["tell_when_gone"] = time.perf_counter(), self.tell_when_gone
        # httptools keeps all that is no body, also the trailers of one and the next header; h11 has a limit for these.
        unending = _TELLS or (self.idle and not (self.cycle and self.cycle.more_body))
        if self._header_bytes > MOST_HEADER_BYTES and unending:
            self.transport.close()
        elif self.idle and self._timer is None and self.timeout_keep_alive_task is None:
            self._await_header()

    def on_headers_complete(self) -> None:
        """Of httptools: a header has ended."""
        self._header_bytes = 0
        self._unset_keepalive_if_required()
        super().on_headers_complete()
        if Connection.to_shed > 0 and self.cycle is not None:
            Connection.to_shed -= 1
            self.cycle.keep_alive = False

    def on_body(self, body: bytes) -> None:
        """Of httptools: a piece of a body."""
        self._header_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """Of httptools: a body has ended. After one that was refused unread, no header is awaited but the next one."""
        super().on_message_complete()
        if self.idle:
            self._forget_timer()
            self.timeout_keep_alive_task = self.loop.call_later(KEEP_ALIVE_S, self.timeout_keep_alive_handler)

    @property
    def idle(self) -> bool:
        """Whether no request is being answered."""
        return self.cycle is None or self.cycle.response_complete

    def _await_header(self) -> None:
        self._timer = self.loop.call_later(HEADER_S, self._late)

    def _forget_timer(self) -> None:
        if not _TELLS:
            self._header_bytes = 0
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _late(self) -> None:
        self._timer = None
        if self.idle:
            self.transport.close()


def _without_upgrade(data: bytes) -> bytes:
    """What begins with a header, with another name for its field Upgrade, which nothing here heeds.

    httptools takes all that follows for another protocol, the body too, and Java's clients ask for HTTP/2 in this way.
    """
    end = data.find(b"\r\n\r\n")
    found = _UPGRADE.search(data, 0, len(data) if end < 0 else end)
    return data if found is None else data[: found.start()] + b"Ignored" + data[found.end() :]


def share_files() -> int:
    """Raise the limit on open files as far as this user may, and return how many connections that leaves room for."""
    return max(allow_open_files(_MOST_CONNECTIONS + _OTHER_FILES) - _OTHER_FILES, 16)


def give_up_on_the_slow(sock: socket.socket) -> None:
    """End connections of this listening socket whose clients do not take what is sent to them."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(_SENDING_S * 1e3))
