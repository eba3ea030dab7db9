"""A line for every request, whatever the client does, that nobody can forge."""

from __future__ import annotations

import asyncio
import json
import os
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from schema_checks import check_schema
from served import talk
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, StreamingResponse
from starlette.routing import Mount, Route
from starlette.types import Message

from gfldeploy.errors import OutputError
from gfldeploy.serve.access_log import AccessLog, Exchange, Exchanges
from gfldeploy.serve.problems import CLIENT_GONE


class Recorder:
    """The exchanges that ended, and how many requests began."""

    def __init__(self) -> None:
        self.begun = 0
        self.ended: list[Exchange] = []

    def begin(self) -> None:
        self.begun += 1


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture
def app(recorder: Recorder) -> Starlette:
    async def detect(request: Request) -> PlainTextResponse:
        body = await request.body()
        request.state.images = len(body) // 4
        if not body:
            request.state.code = "empty"
            return PlainTextResponse("nothing", 422)
        return PlainTextResponse("found")

    async def stream(request: Request) -> StreamingResponse:
        return StreamingResponse(iter([b"ab", b"cde"]))

    async def broken(request: Request) -> PlainTextResponse:
        raise RuntimeError("a bug")

    async def patient(request: Request) -> PlainTextResponse:
        await request.body()
        while not await request.is_disconnected():
            await asyncio.sleep(0)
        return PlainTextResponse("nobody reads this")

    app = Starlette(
        routes=[
            Route("/v1/detect", detect, methods=["POST"]),
            Route("/stream", stream),
            Route("/broken", broken),
            Route("/patient", patient, methods=["POST"]),
            Mount("/page", routes=[Route("/{name}", stream)]),
        ]
    )
    app.add_middleware(Exchanges, begin=recorder.begin, end=[recorder.ended.append])
    return app


def test_what_is_known_of_a_request(app: Starlette, recorder: Recorder) -> None:
    async def work(client: httpx.AsyncClient) -> None:
        await client.post("/v1/detect?threshold=0.5", content=b"12345678")
        await client.post("/v1/detect")
        for path in ("/v1/detect", "/stream", "/broken", "/absent?key=secret"):
            await client.get(path)

    talk(app, work)
    asked = [
        (one.method, one.route, one.status, one.received, one.sent, one.images, one.code) for one in recorder.ended
    ]
    assert asked == [
        ("POST", "/v1/detect", 200, 8, 5, 2, None),
        ("POST", "/v1/detect", 422, 0, 7, 0, "empty"),
        ("GET", "/v1/detect", 405, 0, 18, None, None),
        ("GET", "/stream", 200, 0, 5, None, None),
        ("GET", "/broken", 500, 0, 0, None, "internal"),
        ("GET", None, 404, 0, 9, None, None),
    ]
    assert recorder.begun == 6 and all(one.seconds > 0 and one.client == "127.0.0.1" for one in recorder.ended)
    assert recorder.ended[-1].path == "/absent"


def ask(app: Starlette, path: str, messages: list[Message]) -> list[Message]:
    """Send a request by hand; the client leaves where `messages` end. Returns what it would have got."""
    sent: list[Message] = []
    given = iter(messages)

    async def receive() -> Message:
        return next(given, {"type": "http.disconnect"})

    async def send(message: Message) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "method": "POST",
        "path": path,
        "query_string": b"",
        "headers": [],
        "client": ("192.0.2.1", 5),
        "server": ("testserver", 80),
        "scheme": "http",
        "http_version": "1.1",
    }
    with suppress(ClientDisconnect):
        asyncio.run(app(scope, receive, send))
    return sent


def test_clients_that_leave_are_seen(app: Starlette, recorder: Recorder) -> None:
    ask(app, "/v1/detect", [{"type": "http.request", "body": b"1234", "more_body": True}])
    ask(app, "/patient", [{"type": "http.request", "body": b"12"}])
    assert [(one.route, one.status, one.received) for one in recorder.ended] == [
        ("/v1/detect", CLIENT_GONE, 4),
        ("/patient", CLIENT_GONE, 2),
    ]
    ask(app, "/v1/detect", [{"type": "http.request", "body": b"1234"}])
    assert recorder.ended[-1].status == 200, "leaving after the answer is how it ends"


def none_dropped(lines: int) -> None:
    pytest.fail(f"{lines} lines were dropped")


HOSTILE = '/x"}\n{"status": 200}\r\x1b[2J\u2028\u202e\x7f' + "a" * 1000


@pytest.fixture
def exchange(app: Starlette, recorder: Recorder) -> Exchange:
    ask(app, HOSTILE, [{"type": "http.request"}])
    return recorder.ended[0]


def lines_of(path: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in path.read_text(encoding="ascii").split("\n")[:-1]]
    for line in lines:
        check_schema("access-log", line)
    return lines


def test_nobody_forges_a_line(exchange: Exchange, tmp_path: Path) -> None:
    log = AccessLog(tmp_path / "access.log", none_dropped)
    log.write(exchange)
    log.write(exchange)
    log.close()
    content = (tmp_path / "access.log").read_bytes()
    assert content.count(b"\n") == 2 and not any(byte < 0x20 for byte in content.replace(b"\n", b""))
    first, _ = lines_of(tmp_path / "access.log")
    assert first["path"] == HOSTILE[:200] + "..." and first["status"] == 404 and first["client"] == "192.0.2.1"
    assert first["route"] is None and first["time"].endswith("Z")


def test_the_file_may_be_truncated_at_any_time(exchange: Exchange, tmp_path: Path) -> None:
    path = tmp_path / "access.log"
    for _ in range(2):  # the second one appends
        log = AccessLog(path, none_dropped)
        log.write(exchange)
        log.close()
    assert len(lines_of(path)) == 2
    log = AccessLog(path, none_dropped)
    os.truncate(path, 0)
    log.write(exchange)
    log.close()
    assert len(lines_of(path)) == 1
    assert path.stat().st_mode & 0o027 == 0


def test_a_reader_that_is_stuck_holds_nobody_up(exchange: Exchange) -> None:
    dropped: list[int] = []
    reader, writer = os.pipe()
    log = AccessLog(Path(f"/dev/fd/{writer}"), dropped.append)
    os.close(writer)
    for _ in range(12_000):
        log.write(exchange)
    assert 1_000 < sum(dropped) < 2_000, "10,000 wait, the pipe holds some, and the thread others"
    lines = 0

    def read() -> None:
        nonlocal lines
        while content := os.read(reader, 1 << 20):
            lines += content.count(b"\n")

    late = threading.Thread(target=read)
    late.start()
    log.close()
    late.join()
    os.close(reader)
    assert lines + sum(dropped) == 12_000


def test_what_cannot_be_written_is_counted(
    exchange: Exchange, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    dropped: list[int] = []
    log = AccessLog(Path("/dev/full"), dropped.append)
    log.write(exchange)
    log.write(exchange)
    log.close()
    assert sum(dropped) == 2
    assert [record.getMessage() for record in caplog.records] == [
        "the access log cannot be written, lines are dropped: No space left on device"
    ]


def test_a_place_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="No such file or directory"):
        AccessLog(tmp_path / "absent" / "access.log", none_dropped)
