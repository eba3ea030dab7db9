"""What a client of HTTP/1.1 makes of the bytes that come, and which URLs it takes."""

from __future__ import annotations

import asyncio

import pytest

from gfldeploy.errors import UsageError
from gfldeploy.load.connection import HttpConnection, MalformedAnswerError, Reply, Target

OK = b"HTTP/1.1 200 OK\r\n"


class Wire(asyncio.Transport):
    """Remembers what is written to it."""

    def __init__(self) -> None:
        super().__init__()
        self.written = b""
        self.closed = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.written += bytes(data)

    def is_closing(self) -> bool:
        return self.closed

    def abort(self) -> None:
        self.closed = True


def heard(data: bytes, step: int, end: bool = False) -> tuple[list[Reply | Exception], HttpConnection]:
    """What a request ends with whose answer comes in pieces of `step` bytes; `end`: then the connection ends."""
    connection, answers = HttpConnection(), list[Reply | Exception]()
    connection.connection_made(Wire())
    connection.send(b"GET / HTTP/1.1\r\n\r\n", b"", answers.append)
    for start in range(0, len(data), step):
        connection.data_received(data[start : start + step])
    if end:
        connection.connection_lost(None)
    return answers, connection


@pytest.mark.parametrize("step", [1, 3, 10_000])
@pytest.mark.parametrize(
    ("data", "reply"),
    [
        (OK + b"Content-Length: 5\r\n\r\nabcde", Reply(200, b"abcde", False)),
        (b"HTTP/1.1 429\r\ncontent-length:0\r\n\r\n", Reply(429, b"", False)),
        (OK + b"content-length: 2\r\nConnection: Close\r\n\r\nab", Reply(200, b"ab", True)),
        (b"HTTP/1.0 200 OK\r\ncontent-length: 2\r\n\r\nab", Reply(200, b"ab", True)),
        (b"HTTP/1.1 204 No Content\r\n\r\n", Reply(204, b"", False)),
        (b"HTTP/1.1 100 Continue\r\n\r\n" + OK + b"content-length: 1\r\n\r\na", Reply(200, b"a", False)),
        (
            OK + b"Transfer-Encoding: chunked\r\n\r\n3;name=x\r\nabc\r\nA\r\n0123456789\r\n0\r\nTrailer: x\r\n\r\n",
            Reply(200, b"abc0123456789", False),
        ),
        (OK + b"content-length: 100000\r\n\r\n" + b"x" * 100_000, Reply(200, b"x" * 65_536, False)),
    ],
    ids=["length", "empty", "close", "1.0", "no body", "interim", "chunked", "long"],
)
def test_an_answer_is_the_same_however_it_is_cut(data: bytes, reply: Reply, step: int) -> None:
    answers, connection = heard(data, step)
    assert answers == [reply] and connection.is_open is not reply.closes and not connection.unasked


def test_an_answer_without_a_length_ends_with_the_connection() -> None:
    answers, _ = heard(OK + b"\r\nabc", 2)
    assert answers == []
    answers, _ = heard(OK + b"\r\nabc", 2, end=True)
    assert answers == [Reply(200, b"abc", True)]


@pytest.mark.parametrize(
    "data",
    [
        b"SSH-2.0-OpenSSH_9.6\r\n\r\n",
        b"HTTP/2 200\r\n\r\n",
        b"HTTP/1.1 999 X\r\n\r\n",
        b"HTTP/1.1 101 Switching\r\n\r\n",
        OK + b"no colon\r\n\r\n",
        OK + b"content-length: -1\r\n\r\n",
        OK + b"content-length: 1_0\r\n\r\n",
        OK + b"transfer-encoding: chunked\r\n\r\nxyz\r\n",
        OK + b"transfer-encoding: chunked\r\n\r\n1\r\nabc\r\n",
        OK + b"x: " + b"y" * 70_000,
        OK + b"content-length: 0\r\n\r\n" + OK + b"content-length: 0\r\n\r\n",
    ],
    ids=["ssh", "2", "status", "101", "header", "negative", "underscore", "chunk", "long chunk", "endless", "two"],
)
def test_what_is_no_answer_ends_the_request_and_the_connection(data: bytes) -> None:
    (ended,), connection = heard(data, len(data))
    assert isinstance(ended, MalformedAnswerError) and not connection.is_open


def test_a_connection_that_ends_too_early() -> None:
    """Before the first byte a request may be sent again, later not."""
    (ended,), _ = heard(b"", 1, end=True)
    assert isinstance(ended, ConnectionAbortedError)
    for data in (b"HTTP/1.1", OK + b"content-length: 9\r\n\r\nabc", OK + b"transfer-encoding: chunked\r\n\r\n5\r\nabc"):
        (ended,), _ = heard(data, 1, end=True)
        assert isinstance(ended, ConnectionResetError)


def test_a_second_answer_is_noticed() -> None:
    answer = OK + b"content-length: 0\r\n\r\n"
    answers, connection = heard(answer, len(answer))
    connection.data_received(answer)
    assert len(answers) == 1 and connection.unasked and not connection.is_open


def test_urls() -> None:
    assert Target.parse("http://127.0.0.1:8000/") == Target("127.0.0.1", 8000, False, "")
    behind = Target.parse("https://example.org/detector/", "secret")
    assert behind == Target("example.org", 443, True, "/detector", "secret") and "secret" not in repr(behind)
    header = behind.header("POST", "/v1/detect?timeout_ms=9", 3, "image/png").decode()
    assert header.startswith("POST /detector/v1/detect?timeout_ms=9 HTTP/1.1\r\nHost: example.org:443\r\n")
    assert "Content-Length: 3\r\n" in header and "Authorization: Bearer secret\r\n" in header
    assert Target.parse("http://[::1]:80").authority == "[::1]:80"
    assert Target.parse("http://[::1]:80").loopback and not Target.parse("http://192.0.2.1").loopback


@pytest.mark.parametrize(
    "url",
    ["", "localhost:8000", "ftp://a", "http://", "http://a:b", "http://a:99999", "http://u:p@a", "http://a?b", "http://a#b",
     "http://a/\r\nX: y", "http://ü", "http://[::1"],
)  # fmt: skip
def test_what_is_no_url(url: str) -> None:
    with pytest.raises(UsageError, match=r"no URL of a server. Give one such as http://127\.0\.0\.1:8000"):
        Target.parse(url)
