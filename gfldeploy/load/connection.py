"""HTTP/1.1 from the client's side, as little of it as loading a server takes: requests are sent as bytes that were
made before, and of an answer its status and the beginning of its body are kept.

A general client takes several times the processor time for a request (docs/decisions.md), which a server on the same
machine then lacks. Redirects are not followed, and nothing but the URL that was given is asked.
"""

from __future__ import annotations

import asyncio
import functools
import ipaddress
import re
import socket
import ssl
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Any, Self, cast
from urllib.parse import SplitResult, urlsplit

from gfldeploy.errors import ServerError, UsageError

_MOST_HEADER = 1 << 16  # bytes of status line and headers, and of a line between chunks
_MOST_KEPT = 1 << 16  # bytes of a body; the rest is read and dropped
_STATUS = re.compile(rb"HTTP/1\.[01] ([1-5]\d\d)(?: |\r|$)")
_NO_BODY = (204, 304)


class MalformedAnswerError(Exception):
    """What came is no HTTP/1.1."""


@dataclass(frozen=True)
class Reply:
    """`body`: its first 64 KiB. `closes`: whether the server closes the connection after it."""

    status: int
    body: bytes
    closes: bool


@dataclass(frozen=True)
class Target:
    """Where requests go: `path` comes before the paths of the API, as behind a proxy. `address`: once resolved."""

    host: str
    port: int
    tls: bool
    path: str
    key: str | None = field(default=None, repr=False)
    address: str | None = None

    @classmethod
    def parse(cls, url: str, key: str | None = None) -> Self:
        """Raises `UsageError` for what is no URL of a server."""
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError:
            parts, port = SplitResult("", "", "", "", ""), None
        named = parts.scheme in ("http", "https") and parts.hostname and parts.username is None
        if not named or parts.query or parts.fragment or not url.isascii() or re.search(r"[\x00-\x20\x7f]", url):
            raise UsageError(f"{url!r:.200} is no URL of a server", "Give one such as http://127.0.0.1:8000.")
        tls = parts.scheme == "https"
        return cls(parts.hostname or "", port or (443 if tls else 80), tls, parts.path.rstrip("/"), key)

    @property
    def authority(self) -> str:
        """Host and port."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def loopback(self) -> bool:
        """Whether the server is on this machine; of a name, once it is resolved."""
        try:
            return ipaddress.ip_address(self.address or self.host).is_loopback
        except ValueError:
            return False

    async def resolved(self) -> Target:
        """With an address, so that no connection waits for a name server. Raises `ServerError`."""
        try:
            found = await asyncio.get_running_loop().getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:  # the second for a name with two dots in a row
            reason = getattr(error, "strerror", None) or error
            raise ServerError(f"{self.host} has no address: {reason}", "Check the host in the URL.") from error
        return Target(self.host, self.port, self.tls, self.path, self.key, str(found[0][4][0]))

    def header(self, method: str, path: str, length: int = 0, content_type: str | None = None) -> bytes:
        """Request line and headers of a request for a path of the API, whose body has so many bytes."""
        lines = [f"{method} {self.path}{path} HTTP/1.1", f"Host: {self.authority}", "Accept: application/json"]
        if content_type:
            lines += [f"Content-Type: {content_type}", f"Content-Length: {length}"]
        if self.key:
            lines.append(f"Authorization: Bearer {self.key}")
        return "\r\n".join([*lines, "", ""]).encode("ascii")

    async def connect(self, connection: HttpConnection) -> None:
        """Open it. Raises `OSError`."""
        secure: dict[str, Any] = {"ssl": _trusted(), "server_hostname": self.host} if self.tls else {}
        address = self.address or self.host
        await asyncio.get_running_loop().create_connection(lambda: connection, address, self.port, **secure)


@functools.cache  # reading the system's certificates takes tens of milliseconds
def _trusted() -> ssl.SSLContext:
    return ssl.create_default_context()


class HttpConnection(asyncio.Protocol):
    """One connection, which carries one request at a time."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._done: Callable[[Reply | Exception], None] | None = None
        self._reader: Generator[None, bytes, Reply] | None = None
        self._heard = False
        self.uses = 0
        self.unasked = False  # whether something came that nobody had asked for, such as a second answer

    @property
    def is_open(self) -> bool:
        """Whether a request can be sent."""
        return self._transport is not None and not self._transport.is_closing()

    def send(self, header: bytes, body: bytes, done: Callable[[Reply | Exception], None]) -> None:
        """`done` is called once: with the answer, with `MalformedAnswerError`, or with `ConnectionError`: then it has
        been closed before the whole answer came, as a `ConnectionAbortedError` before any of it."""
        assert self._transport is not None and self._done is None
        self._done, self._reader, self._heard = done, _reply(), False
        self.uses += 1
        next(self._reader)
        self._transport.writelines((header, body) if body else (header,))

    def close(self) -> None:
        """Close it at once; whoever waits for an answer is not told."""
        self._done = self._reader = None
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's are none by their class

    def data_received(self, data: bytes) -> None:
        self._heard = True
        self._feed(data)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._reader is not None:
            self._feed(b"")

    def _feed(self, data: bytes) -> None:
        if self._reader is None:
            self.unasked = True
            self.close()
            return
        try:
            self._reader.send(data)
        except StopIteration as ended:
            reply: Reply = ended.value
            self._end(reply, close=reply.closes)
        except (MalformedAnswerError, ConnectionError) as error:
            self._end(error if self._heard else ConnectionAbortedError(), close=True)

    def _end(self, answer: Reply | Exception, close: bool = False) -> None:
        done, self._done, self._reader = self._done, None, None
        if close and self._transport is not None:
            self._transport.abort()
        if done is not None:
            done(answer)


def _reply() -> Generator[None, bytes, Reply]:
    """Takes what arrives, piece by piece, b"" for the end of the connection, and returns the answer.

    Raises `MalformedAnswerError`, also if something follows the answer, and `ConnectionError` where it ends too early.
    """
    buffer = bytearray()
    reply = yield from _read(buffer)
    if buffer:
        raise MalformedAnswerError
    return reply


def _read(buffer: bytearray) -> Generator[None, bytes, Reply]:
    status = 100
    while 100 <= status < 200:  # an interim answer, which another follows
        header = yield from _until(buffer, b"\r\n\r\n")
        first, *lines = header.split(b"\r\n")
        if (match := _STATUS.match(first)) is None or (status := int(match[1])) == 101:
            raise MalformedAnswerError
    headers = dict(_field(line) for line in lines)
    closes = b"close" in headers.get(b"connection", b"").lower() or first.startswith(b"HTTP/1.0")
    if status in _NO_BODY:
        return Reply(status, b"", closes)
    if b"chunked" in headers.get(b"transfer-encoding", b"").lower():
        return Reply(status, (yield from _chunks(buffer)), closes)
    if (length := headers.get(b"content-length")) is not None:
        return Reply(status, (yield from _exactly(buffer, _number(length, 10))), closes)
    kept = bytes(buffer[:_MOST_KEPT])
    buffer.clear()
    while data := (yield):
        kept += data[: _MOST_KEPT - len(kept)]
    return Reply(status, kept, True)


def _field(line: bytes) -> tuple[bytes, bytes]:
    name, colon, value = line.partition(b":")
    if not colon or not name or name != name.strip():
        raise MalformedAnswerError
    return name.lower(), value.strip()


def _number(digits: bytes, base: int) -> int:
    if not re.fullmatch(rb"[0-9a-fA-F]{1,15}" if base == 16 else rb"[0-9]{1,15}", digits):
        raise MalformedAnswerError
    return int(digits, base)


def _until(buffer: bytearray, mark: bytes) -> Generator[None, bytes, bytes]:
    """What comes before the mark, which are both taken out of the buffer."""
    while (end := buffer.find(mark)) < 0:
        if len(buffer) > _MOST_HEADER:
            raise MalformedAnswerError
        yield from _more(buffer)
    found = bytes(buffer[:end])
    del buffer[: end + len(mark)]
    return found


def _exactly(buffer: bytearray, length: int) -> Generator[None, bytes, bytes]:
    """So many bytes, of which only the first are kept."""
    kept = bytearray()
    while True:
        some = buffer[:length]
        del buffer[:length]
        length -= len(some)
        kept += some[: _MOST_KEPT - len(kept)]
        if not length:
            return bytes(kept)
        yield from _more(buffer)


def _chunks(buffer: bytearray) -> Generator[None, bytes, bytes]:
    kept = b""
    while size := _number((yield from _until(buffer, b"\r\n")).partition(b";")[0].strip(), 16):
        some = yield from _exactly(buffer, size)
        kept += some[: _MOST_KEPT - len(kept)]
        if (yield from _exactly(buffer, 2)) != b"\r\n":
            raise MalformedAnswerError
    while (yield from _until(buffer, b"\r\n")):
        pass  # trailers
    return kept


def _more(buffer: bytearray) -> Generator[None, bytes, None]:
    data = yield
    if not data:
        raise ConnectionResetError
    buffer += data
