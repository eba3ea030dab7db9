"""Requests for detections: three forms of one request, every limit, and what is malformed."""

from __future__ import annotations

import asyncio
import base64
import json
import socket
import threading
import tracemalloc
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message

from gfldeploy.serve.problems import HANDLERS, Problem, json_response
from gfldeploy.serve.requests import BodyGuard, DetectRequest, RequestLimits, class_ids, read_request

CLASSES = ("box", "ball", "traffic light", "7", "cup, of tea")
LIMITS = RequestLimits(body_bytes=100_000, total_bytes=150_000, body_s=5, images=3, timeout_ms=250)
FIRST, SECOND = b"\xff\xd8\xff first \r\n--x\r\n", bytes(range(256)) * 9
FORM = "multipart/form-data; boundary=x-y"
SLOW = 0.15  # seconds


@dataclass
class Asked:
    """What became of a request."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    taken: int = 0  # messages of the body that the application took
    request: DetectRequest | None = None

    @property
    def error(self) -> dict[str, str]:
        error: dict[str, str] = json.loads(self.body)["error"]
        assert set(error) == {"code", "message", "remedy"}
        assert error["message"]
        return error


def ask(
    body: bytes | Sequence[bytes | float] = b"",
    kind: str | None = None,
    query: str = "",
    limits: RequestLimits = LIMITS,
    **headers: str | None,
) -> Asked:
    """Send a request to an application that only reads it. Numbers in the body are seconds that nothing comes."""
    asked = Asked()

    async def read(request: Request) -> Response:
        asked.request = await read_request(request, limits, CLASSES)
        return json_response({})

    app = Starlette(routes=[Route("/", read, methods=["POST"])], exception_handlers=HANDLERS)
    return asyncio.run(
        send(BodyGuard(app, limits), [body] if isinstance(body, bytes) else body, kind, query, headers, asked)
    )


async def send(
    app: ASGIApp,
    body: Sequence[bytes | float],
    kind: str | None,
    query: str,
    headers: dict[str, str | None],
    asked: Asked,
) -> Asked:
    """One request over ASGI, so that the parts in which a body comes are those given."""
    given = {"content-type": kind, **{name.replace("_", "-"): value for name, value in headers.items()}}

    left = list(enumerate(body, start=1))

    async def receive() -> Message:
        asked.taken += 1
        while left:
            number, part = left.pop(0)
            if isinstance(part, bytes):
                return {"type": "http.request", "body": part, "more_body": number < len(body)}
            await asyncio.sleep(part)
        return {"type": "http.disconnect"}

    async def take(message: Message) -> None:
        if message["type"] == "http.response.start":
            asked.status = message["status"]
            asked.headers = {name.decode(): value.decode() for name, value in message["headers"]}
        else:
            asked.body += message.get("body", b"")

    scope = {
        "type": "http",
        "method": "POST",
        "path": "/",
        "raw_path": b"/",
        "query_string": query.encode(),
        "headers": [(name.encode(), value.encode("latin-1")) for name, value in given.items() if value is not None],
    }
    await app(scope, receive, take)
    return asked


def part(content: bytes, name: str = "image", extra: str = "") -> bytes:
    head = f'--x-y\r\nContent-Disposition: form-data; name="{name}"; filename="a.jpg"{extra}\r\n\r\n'
    return head.encode() + content + b"\r\n"


def form(*parts: bytes) -> bytes:
    return b"".join(parts) + b"--x-y--\r\n"


def in_json(*images: bytes) -> bytes:
    return json.dumps({"images": [base64.b64encode(image).decode() for image in images]}).encode()


def images(asked: Asked) -> tuple[bytes, ...]:
    assert asked.status == 200, asked.body
    assert asked.request is not None
    return asked.request.images


@pytest.mark.parametrize(
    "kind", [None, "image/jpeg", "application/octet-stream", "Image/PNG; x=y", "application/x-www-form-urlencoded"]
)
def test_raw_bytes_are_one_image(kind: str | None) -> None:
    assert images(ask([SECOND[:100], SECOND[100:]], kind)) == (SECOND,)


def test_a_form_has_any_number_of_files_by_any_name() -> None:
    body = form(part(FIRST), part(SECOND, "b", "\r\nContent-Type: image/png"), part(b"\r\n", "c"))
    assert images(ask(body, FORM)) == (FIRST, SECOND, b"\r\n")
    assert images(ask(b"before\r\n" + body + b"behind", FORM)) == (FIRST, SECOND, b"\r\n")
    assert images(ask(body, 'multipart/form-data; charset=utf-8; boundary="x-y"')) == (FIRST, SECOND, b"\r\n")
    assert images(ask(body.replace(b"--x-y\r\n", b"--x-y \t\r\n"), FORM)) == (FIRST, SECOND, b"\r\n")


def test_a_form_may_come_in_any_pieces() -> None:
    body = form(part(FIRST), part(SECOND))
    assert images(ask([body[place : place + 7] for place in range(0, len(body), 7)], FORM)) == (FIRST, SECOND)


def test_a_part_without_a_file_name_is_a_file_if_its_type_is_that_of_images() -> None:
    body = form(b'--x-y\r\nContent-Disposition: form-data; name="a"\r\nContent-Type: image/png\r\n\r\nabc\r\n')
    assert images(ask(body, FORM)) == (b"abc",)


def test_json_has_images_in_base64() -> None:
    assert images(ask(in_json(FIRST, SECOND), "application/json; charset=utf-8")) == (FIRST, SECOND)


def test_base64_may_have_line_breaks_and_be_a_data_url() -> None:
    wrapped = json.dumps({"images": [base64.encodebytes(SECOND).decode()]}).encode()
    assert images(ask(wrapped, "application/json")) == (SECOND,)
    url = f"data:image/png;base64,{base64.b64encode(FIRST).decode()}"
    assert images(ask(json.dumps({"images": [url]}).encode(), "application/json")) == (FIRST,)


def test_base64_of_line_breaks_takes_no_memory() -> None:
    body = b'{"images": ["%s"]}' % (b"AAA=" + b" \\n" * 500_000)
    tracemalloc.start()
    try:
        assert images(ask(body, "application/json", limits=RequestLimits())) == (b"\0\0",)
        assert tracemalloc.get_traced_memory()[1] < 10 * len(body)
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("filler", [';"', ";", 'a="' + ";" * 5])
def test_headers_whose_parsing_takes_minutes_are_refused(filler: str) -> None:
    # One quote that does not end, and nothing but semicolons behind it: 23 seconds in Python's own parser.
    kind = 'multipart/form-data; a="' + filler * (60_000 // len(filler))
    assert ask(form(part(FIRST)), kind).status == 400
    assert ask(form(part(FIRST, extra='; a="' + filler * (7_000 // len(filler)))), FORM).status == 400


def test_a_file_may_have_a_name_of_semicolons() -> None:
    assert images(ask(form(part(FIRST, name=";" * 90)), FORM)) == (FIRST,)


def test_base64_longer_than_what_is_decoded_at_once() -> None:
    limits = replace(LIMITS, body_bytes=5_000_000, total_bytes=5_000_000)
    image = SECOND * 1000
    assert images(ask(in_json(image), "application/json", limits=limits)) == (image,)


def test_the_query_says_what_is_wanted() -> None:
    asked = ask(b"x", query="threshold=.25&timeout_ms=1e3&classes=ball,box&classes=cup,+of+tea")
    assert asked.request == DetectRequest((b"x",), 0.25, 1000, ("ball,box", "cup, of tea"))
    assert ask(b"x").request == DetectRequest((b"x",), None, 250, None)


def test_classes_are_names_or_ids() -> None:
    assert class_ids(None, CLASSES) is None
    assert class_ids(["ball,0, traffic light"], CLASSES) == (1, 0, 2)
    assert class_ids(["7", "cup, of tea", "4,ball"], CLASSES) == (3, 4, 1)  # a name first, then an id
    assert class_ids(["b", "b"], ("a", "b", "b")) == (1,)


@pytest.mark.parametrize(
    ("query", "code", "told"),
    [
        ("treshold=0.3", "bad_parameter", "'threshold'"),
        ("quite=other", "bad_parameter", "classes, threshold, timeout_ms"),
        ("threshold=", "bad_parameter", "0 to 1"),
        ("threshold=nan", "bad_parameter", "0 to 1"),
        ("threshold=1_0", "bad_parameter", "0 to 1"),
        ("threshold=1.01", "bad_parameter", "0 to 1"),
        ("threshold=-0.1", "bad_parameter", "0 to 1"),
        ("threshold=0.1&threshold=0.2", "bad_parameter", "one number"),
        ("threshold=%FF", "bad_parameter", "0 to 1"),
        ("timeout_ms=0", "bad_parameter", "600000"),
        ("timeout_ms=1e9999", "bad_parameter", "600000"),
        ("classes=bal", "unknown_class", "'ball'"),
        ("classes=Traffic+Lights", "unknown_class", "'traffic light'"),
        ("classes=box,5", "unknown_class", "box, ball"),
        ("classes=", "unknown_class", "box, ball"),
        ("classes=%ED%A0%80\x00", "unknown_class", "box, ball"),
    ],
)
def test_a_wrong_query_is_refused_before_the_body_is_read(query: str, code: str, told: str) -> None:
    asked = ask(b"x", query=query, content_length="1")
    assert (asked.status, asked.error["code"]) == (400, code)
    assert told in asked.error["remedy"]
    assert asked.taken == 0
    assert "connection" not in asked.headers  # the server discards what is left of a body that may be sent


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"nonsense",
        b"--x-y",
        b"--x-y--",
        b"--x-y--\r\n",
        form(b"--x-y\r\n\r\n\r\n"),
        form(part(FIRST))[:-5],
        part(FIRST),
        form(part(FIRST).replace(b"\r\n\r\n", b"\r\n")),
        form(part(FIRST).replace(b"--x-y", b"--x-yz")),
        form(b"--x-y\r\n" + b"a: b\r\n" * 5000 + b"\r\n\r\n"),
        form(part(FIRST, extra="\r\nContent-Transfer-Encoding: base64")),
        form(b'--x-y\r\nContent-Disposition: form-data; name="threshold"\r\n\r\n0.5\r\n'),
        form(b"--x-y\r\n\xff\xfe: \xff\r\nContent-Disposition: \xff\r\n\r\nx\r\n"),
    ],
)
def test_a_malformed_form_is_refused(body: bytes) -> None:
    asked = ask(body, FORM)
    assert (asked.status, asked.error["code"]) == (400, "bad_body")


@pytest.mark.parametrize(
    "kind",
    [
        "multipart/form-data",
        "multipart/form-data; boundary=",
        "multipart/form-data; boundary=" + "x" * 71,
        "multipart/form-data; boundary*=utf-8''%FF",
        "multipart/form-data; boundary=\xff",
    ],
)
def test_a_form_without_a_usable_boundary_is_refused(kind: str) -> None:
    assert ask(form(part(FIRST)), kind).status == 400


def test_a_field_of_a_form_that_belongs_into_the_query_is_refused_with_the_remedy() -> None:
    field = b'--x-y\r\nContent-Disposition: form-data; name="threshold"\r\n\r\n0.3\r\n'
    assert "threshold in the query" in ask(form(part(FIRST), field), FORM).error["remedy"]
    body = json.dumps({"images": ["AA=="], "threshold": 0.3}).encode()
    assert "threshold in the query" in ask(body, "application/json").error["remedy"]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[]",
        b"null",
        b"{}",
        b'{"images": "AA=="}',
        b'{"images": [1]}',
        b'{"images": []}',
        b'{"images": ["AA=="], "other": 1}',
        b'{"images": ["AA=="], "\\ud800": NaN}',
        b'{"images": ["AA=="], "threshold": Infinity}',
        b'{"images": ["A"]}',
        b'{"images": ["AA=A"]}',
        b'{"images": ["AA==AAAA"]}',
        b'{"images": ["A-_A"]}',
        b'{"images": ["\\u00e9AAA"]}',
        b'{"images": ["\\ud800"]}',
        b'{"images": ["data:image/png;base64,!"]}',
        b'{"images": ' + b"[" * 9000,
        b'{"images": ' + b"9" * 5000 + b"}",
        b'{"images": [' + b"[]," * 20_000 + b"[]]}",
    ],
)
def test_malformed_json_is_refused(body: bytes) -> None:
    asked = ask(body, "application/json")
    assert (asked.status, asked.error["code"]) == (400, "bad_body")


@pytest.mark.parametrize("body", [FIRST.translate(None, b"\0\r\n"), in_json(FIRST)])
def test_what_curl_sends_without_being_told_that_it_is_binary_is_refused_with_the_remedy(body: bytes) -> None:
    asked = ask(body, "application/x-www-form-urlencoded")
    assert (asked.status, asked.error["code"]) == (400, "bad_body")
    assert "--data-binary @FILE" in asked.error["remedy"]


def test_an_empty_image_is_an_image_that_cannot_be_used() -> None:
    """Which the service says of it, so that of several images only that one has an error."""
    assert images(ask(b'{"images": ["", "data:;base64,"]}', "application/json")) == (b"", b"")
    assert images(ask(b"", "image/png")) == (b"",)
    assert images(ask(form(part(b"")), FORM)) == (b"",)


@pytest.mark.parametrize("address", ["http://example.org/a.jpg", "HTTPS://example.org", "file:///etc/passwd", "ftp:x"])
def test_no_address_is_fetched(address: str) -> None:
    asked = ask(json.dumps({"images": [address]}).encode(), "application/json")
    assert (asked.status, asked.error["code"]) == (400, "no_urls")
    assert "base64" in asked.error["remedy"]


@pytest.mark.parametrize(("kind", "coding"), [("text/plain", None), ("\xff", None), ("image/jpeg", "gzip")])
def test_another_type_of_body_is_refused(kind: str, coding: str | None) -> None:
    asked = ask(FIRST, kind, content_encoding=coding)
    assert (asked.status, asked.error["code"]) == (415, "unsupported_type")


# --- limits -----------------------------------------------------------------------------------------------------------


def test_a_body_that_says_it_is_too_large_is_refused_unread() -> None:
    asked = ask([b"x"], "image/jpeg", content_length="100001")
    assert (asked.status, asked.error["code"]) == (413, "too_large")
    assert asked.headers["connection"] == "close"
    assert ask([b"x"], "image/jpeg", content_length="9" * 5000).status == 413


def test_a_body_without_a_length_is_refused_as_soon_as_it_is_too_large() -> None:
    asked = ask([b"x" * 30_000] * 100, "image/jpeg", transfer_encoding="chunked")
    assert (asked.status, asked.error["code"]) == (413, "too_large")
    # Four parts until then, and after the answer so many bytes are discarded as a body may have.
    assert asked.taken == 4 + 4
    assert asked.request is None


def test_a_body_may_have_exactly_as_much_as_allowed() -> None:
    assert images(ask([b"x" * 50_000] * 2, "image/jpeg", content_length="100000")) == (b"x" * 100_000,)


def test_a_slow_body_is_refused() -> None:
    limits = replace(LIMITS, body_s=SLOW)
    asked = ask([b"x", 60.0, b"y"], "image/jpeg", limits=limits, transfer_encoding="chunked")
    assert (asked.status, asked.error["code"]) == (408, "slow_body")


def test_a_body_that_comes_in_drops_has_one_limit_of_time() -> None:
    limits = replace(LIMITS, body_s=SLOW)
    drops: list[bytes | float] = [b"x", SLOW / 4] * 100
    asked = ask(drops, "image/jpeg", limits=limits, transfer_encoding="chunked")
    assert asked.status == 408


@pytest.mark.parametrize("kind", [FORM, "application/json"])
def test_too_many_images_are_refused(kind: str) -> None:
    body = form(*[part(b"x")] * 4) if kind == FORM else in_json(*[b"x"] * 4)
    asked = ask(body, kind)
    assert (asked.status, asked.error["code"]) == (413, "too_many_images")
    many = form(*[part(b"x")] * 900)
    assert ask(many, FORM).error["code"] == "too_many_images"


def test_a_client_that_goes_away_is_no_failure() -> None:
    assert ask([b"x", 0.0], "image/jpeg").status == 499


def test_all_bodies_together_have_a_limit() -> None:
    release = asyncio.Event()

    async def hold(request: Request) -> Response:
        await read_request(request, LIMITS, CLASSES)
        await release.wait()
        return json_response({})

    app = BodyGuard(Starlette(routes=[Route("/", hold, methods=["POST"])], exception_handlers=HANDLERS), LIMITS)

    async def several() -> tuple[Asked, Asked, Asked]:
        def one(size: int) -> asyncio.Task[Asked]:
            return asyncio.create_task(send(app, [b"x" * size], "image/jpeg", "", {}, Asked()))

        first = one(90_000)
        await asyncio.sleep(0.01)
        second = await one(90_000)
        release.set()
        return await first, second, await one(90_000)

    first, second, third = asyncio.run(several())
    assert (first.status, second.status, third.status) == (200, 503, 200)
    assert second.error["code"] == "bodies_full"
    assert second.headers["retry-after"] == "1"


def test_an_answer_to_an_unread_body_is_sent_at_once_and_the_rest_discarded() -> None:
    """Without Content-Length, and with more to come than is ever discarded."""
    events: list[str] = []

    async def refuse(request: Request) -> Response:
        raise Problem(401, "unauthorized", "no")

    app = BodyGuard(Starlette(routes=[Route("/", refuse, methods=["POST"])], exception_handlers=HANDLERS), LIMITS)

    async def receive() -> Message:
        events.append("receive")
        return {"type": "http.request", "body": b"x" * 60_000, "more_body": True}

    async def take(message: Message) -> None:
        events.append(f"{message['type']} {message.get('more_body')}")

    scope = {
        "type": "http",
        "method": "POST",
        "path": "/",
        "query_string": b"",
        "headers": [(b"transfer-encoding", b"chunked")],
    }
    asyncio.run(app(scope, receive, take))
    assert events == [
        "http.response.start None",
        "http.response.body True",
        "receive",
        "receive",
        "http.response.body None",
    ]


@pytest.mark.parametrize(("header", "parts"), [(b"Transfer-Encoding: chunked", 60), (b"Content-Length: 3000000", 30)])
def test_a_client_that_sends_too_much_gets_its_answer_from_a_real_server(header: bytes, parts: int) -> None:
    """Though it reads nothing before it has sent all: without the guard its connection would be reset."""
    limits = RequestLimits(body_bytes=700_000)

    async def read(request: Request) -> Response:
        await read_request(request, limits, CLASSES)
        return json_response({})

    app = BodyGuard(Starlette(routes=[Route("/", read, methods=["POST"])], exception_handlers=HANDLERS), limits)
    server = uvicorn.Server(uvicorn.Config(app, lifespan="off", log_config=None))
    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=lambda: asyncio.run(server.serve([listening])))
        thread.start()
        with socket.create_connection(listening.getsockname()[:2], timeout=30) as client:
            client.sendall(b"POST / HTTP/1.1\r\nHost: here\r\n" + header + b"\r\n\r\n")
            for _ in range(parts):
                content = b"x" * 20_000
                client.sendall(b"%x\r\n%b\r\n" % (len(content), content) if b"chunked" in header else content)
            client.shutdown(socket.SHUT_WR)
            answer = b"".join(iter(lambda: client.recv(65536), b""))
        server.should_exit = True
        thread.join(30)
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 413 ")
    assert head.lower().count(b"connection: close") == 1
    assert json.loads(body)["error"]["code"] == "too_large"


def test_hostile_bodies_of_a_form_are_refused_without_reading_them_byte_by_byte() -> None:
    """Patterns over which a parser in Python takes seconds; the test would run into its limit of time."""
    limits = RequestLimits()
    for filling in (b"\r", b"\r\n--x", b"\r\n--x-yz", b" ", b"-"):
        body = b"--x-y" + filling * (limits.body_bytes // 4 // len(filling))
        assert ask(body, FORM, limits=limits).status == 400


def test_values_of_any_kind_are_shown_safely() -> None:
    asked = ask(b'{"\\ud800\\u001b[2J": 1}', "application/json")
    assert asked.error["message"].isprintable()
    value: Any = json.loads(asked.body)
    assert "\\\\x1b" in value["error"]["message"] or "\\x1b" in value["error"]["message"]
