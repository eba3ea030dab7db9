"""Requests for detections, from whoever sends them: raw image bytes, multipart/form-data or JSON, within limits."""

from __future__ import annotations

import asyncio
import binascii
import email
import functools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from email.message import Message as MimeHeaders
from typing import Any, NoReturn

from starlette.datastructures import QueryParams
from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gfldeploy import detection_options
from gfldeploy.detection_options import AS_CONFIGURED, DetectionOptions
from gfldeploy.errors import UsageError
from gfldeploy.serve.problems import Problem
from gfldeploy.text import meant

LONGEST_TIMEOUT_MS = 600_000.0
# Lists, objects and commas, in texts too: they bound how deep JSON is, and how much larger it becomes in memory. Base64
# has none of them.
_MOST_JSON = 10_000
_MOST_PART_HEADERS = 8192  # bytes
# Semicolons in the header of a form or of one of its parts: what Python's parser takes grows with their square, minutes
# for as many as fit into a header.
_MOST_PARAMETERS = 100
_LONGEST_BOUNDARY = 70  # RFC 2046, 5.1.1
_SLICE = 1 << 20  # characters of base64 decoded before others have their turn
_DISCARDED_S = 1.0
_SHORT_QUERY = 256  # bytes of one that is remembered
_LONGEST_WORD = 80  # characters of a name from a request that are compared or shown
_NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d{1,4})?", re.ASCII)
_DATA_URL = re.compile(r"data:[\w.+-]{0,40}/?[\w.+-]{0,40};base64,", re.ASCII)
_ADDRESS = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]{1,20}:")

JSON_TYPE = "application/json"
FORM_TYPE = "multipart/form-data"
BYTES_TYPE = "application/octet-stream"
_CURL_TYPE = "application/x-www-form-urlencoded"  # what `curl --data-binary @street.jpg` says of it
_SEND = (
    f"Send an image as it is with Content-Type image/* or {BYTES_TYPE}, several as {FORM_TYPE}, or in base64 as "
    f'{JSON_TYPE}: {{"images": ["..."]}}.'
)


@dataclass(frozen=True, kw_only=True)
class RequestLimits:
    """What a request may be.

    `body_bytes`: of its body, as it is sent. `total_bytes`: of the bodies of all requests that are being answered.
    `body_s`: seconds until all of a body is there. `images`: in one request. `timeout_ms`: the deadline of a request
    that names none, milliseconds.
    """

    body_bytes: int = 32 << 20
    total_bytes: int = 256 << 20
    body_s: float = 10.0
    images: int = 16
    timeout_ms: float = 1000.0


@dataclass(frozen=True)
class DetectRequest:
    """What a request asks for: the content of image files, and which detections of them.

    `threshold`: the lowest score; None for the server's. `classes`: as the request has them, see `class_ids`; None for
    all.
    """

    images: tuple[bytes, ...]
    threshold: float | None
    timeout_ms: float
    classes: tuple[str, ...] | None = None


async def read_request(
    request: Request, limits: RequestLimits, class_names: Sequence[str], detection: DetectionOptions = AS_CONFIGURED
) -> DetectRequest:
    """Read a request for `/v1/detect`: first what its header says, then its body.

    `detection`: of the server. Raises `Problem`: 400, 408, 413 or 415, and 503 from `BodyGuard`.
    """
    query: bytes = request.scope["query_string"]
    # Most clients send the same one again and again.
    threshold, timeout_ms, classes = (_known_query if len(query) <= _SHORT_QUERY else _read_query)(query)
    if timeout_ms is None:
        timeout_ms = limits.timeout_ms
    class_ids(classes, class_names, detection)
    kind = content_type(request)
    if kind == JSON_TYPE:
        images = await _from_json(await read_json(request, limits), limits)
    elif kind == FORM_TYPE:
        images = _from_form(_boundary(request.headers["content-type"]), await read_body(request, limits), limits)
    elif kind in ("", BYTES_TYPE, _CURL_TYPE) or kind.startswith("image/"):
        images = [await read_body(request, limits)]
        if kind == _CURL_TYPE and images[0] and not any(byte in images[0] for byte in b"\0\r\n"):
            # Some of these are in every image.
            problem = "the body is not the content of an image: curl's -d drops line breaks and zeros"
            remedy = f"Give curl --data-binary @FILE, or -H 'Content-Type: {JSON_TYPE}' with JSON."
            raise Problem(400, "bad_body", problem, remedy)
    else:
        raise Problem(415, "unsupported_type", f"a body of type {kind[:_LONGEST_WORD]} is not read here", _SEND)
    return DetectRequest(tuple(images), threshold, timeout_ms, classes)


def _read_query(text: bytes) -> tuple[float | None, float | None, tuple[str, ...] | None]:
    """Threshold, milliseconds and classes, as far as they are given. Raises `Problem`."""
    query = _parameters(text, {"threshold", "timeout_ms", "classes"})
    threshold = _number(query, "threshold", 1)
    timeout_ms = _number(query, "timeout_ms", LONGEST_TIMEOUT_MS)
    if timeout_ms == 0:
        raise Problem(400, "bad_parameter", "timeout_ms is 0", f"Give a number above 0, up to {LONGEST_TIMEOUT_MS:g}.")
    classes = tuple(query["classes"]) if "classes" in query else None
    return threshold, timeout_ms, classes


_known_query = functools.lru_cache(maxsize=256)(_read_query)


def _parameters(text: bytes, known: set[str]) -> dict[str, list[str]]:
    """The query by name. An unknown name is refused: with `treshold=0.3` the detections would silently be others."""
    query: dict[str, list[str]] = {}
    for name, value in QueryParams(text).multi_items():
        if name not in known:
            raise Problem(
                400,
                "bad_parameter",
                f"there is no query parameter {name[:_LONGEST_WORD]!r}",
                meant(name, sorted(known)) or f"There are {', '.join(sorted(known))}.",
            )
        query.setdefault(name, []).append(value)
    return query


def _number(query: Mapping[str, Sequence[str]], name: str, most: float) -> float | None:
    values = query.get(name)
    if values is None:
        return None
    if len(values) > 1 or not _NUMBER.fullmatch(values[0]) or not 0 <= float(values[0]) <= most:
        given = ", ".join(values)[:_LONGEST_WORD]
        raise Problem(400, "bad_parameter", f"{name} is {given!r}", f"Give one number from 0 to {most:g}.")
    return float(values[0])


def class_ids(
    words: Iterable[str] | None, class_names: Sequence[str], detection: DetectionOptions = AS_CONFIGURED
) -> tuple[int, ...] | None:
    """The ids of classes by name or id, each text one of them or several separated by commas; None for all of them.

    Raises `Problem` for an unknown one, and for one that the server does not keep.
    """
    if words is None:
        return None
    known = set(class_names)
    separate = [word for text in words for word in ([text] if text in known else map(str.strip, text.split(",")))]
    try:
        ids = detection_options.class_ids(separate, class_names)
    except UsageError as error:
        raise Problem(400, "unknown_class", error.problem, error.remedy) from None
    if detection.classes is not None and (others := set(ids).difference(detection.kept(class_names))):
        problem = f"this server was started without the class {class_names[min(others)]:.80}"
        raise Problem(400, "unknown_class", problem, "Leave it out, or start the server with it in --classes.")
    return ids


def content_type(request: Request) -> str:
    """In lower case and without parameters; empty if there is none. Raises `Problem` (415) for compressed bodies."""
    coding = request.headers.get("content-encoding", "identity")
    if coding.strip().casefold() not in ("", "identity"):
        raise Problem(415, "unsupported_type", f"a body in {coding[:_LONGEST_WORD]!r} is not read", "Send it as it is.")
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


async def read_body(request: Request, limits: RequestLimits) -> bytes:
    """The body of a request, refused as soon as it is larger or takes longer than allowed. Raises `Problem`."""
    # As soon as the header tells; without a length, or with a wrong one, once so much has come.
    if not _fits(request.headers.get("content-length", "0"), limits):
        _too_large(limits)
    body = bytearray()
    try:
        async with asyncio.timeout(limits.body_s):
            while True:
                message = await request.receive()
                if message["type"] == "http.disconnect":
                    raise ClientDisconnect
                chunk: bytes = message.get("body", b"")
                more = message.get("more_body", False)
                if len(body) + len(chunk) > limits.body_bytes:
                    _too_large(limits)
                if not more:
                    return bytes(body) + chunk if body else chunk
                body += chunk
    except TimeoutError:
        raise Problem(
            408,
            "slow_body",
            f"the body did not come within {limits.body_s:g} s",
            "Send it faster or in smaller parts, or raise --body-timeout-s of the server.",
        ) from None


def _fits(declared: str, limits: RequestLimits) -> bool:
    """Whether a body of this Content-Length may be read."""
    return not (declared.isascii() and declared.isdigit()) or (
        len(declared) <= 18 and int(declared) <= limits.body_bytes  # int() refuses thousands of digits
    )


def _too_large(limits: RequestLimits) -> NoReturn:
    raise Problem(
        413,
        "too_large",
        f"the body has more than {limits.body_bytes / 1e6:g} MB",
        "Send fewer or smaller images, or raise --max-body-mb of the server.",
    )


def _bad_body(problem: str) -> Problem:
    return Problem(400, "bad_body", problem, _SEND)


def _check_count(count: int, limits: RequestLimits) -> None:
    if count == 0:
        raise _bad_body("the request has no image")
    if count > limits.images:
        raise Problem(
            413,
            "too_many_images",
            f"the request has more than {limits.images} images",
            "Send them in several requests, or raise --max-images of the server.",
        )


# --- JSON -------------------------------------------------------------------------------------------------------------


async def read_json(request: Request, limits: RequestLimits) -> dict[str, Any]:
    """The body of a request as a JSON object, never much larger in memory than it was sent. Raises `Problem`."""
    body = await read_body(request, limits)
    if sum(map(body.count, (b"[", b"{", b","))) > _MOST_JSON:
        raise _bad_body(f"the JSON has more than {_MOST_JSON:,} values")
    try:
        content = json.loads(body.decode(), parse_constant=_not_json)
    except RecursionError:
        raise _bad_body("the JSON is nested too deeply") from None
    except ValueError as error:  # UnicodeDecodeError too
        raise _bad_body(f"the body is not JSON: {str(error)[:200]}") from error
    if not isinstance(content, dict):
        raise _bad_body("the JSON is not an object")
    return content


def _not_json(word: str) -> NoReturn:
    raise ValueError(f"{word} is not a number in JSON")


async def _from_json(content: Mapping[str, Any], limits: RequestLimits) -> list[bytes]:
    if unknown := content.keys() - {"images"}:
        word = min(unknown)[:_LONGEST_WORD]
        raise Problem(
            400,
            "bad_body",
            f"there is no field {word!r} in the body",
            f"Give {word} in the query." if word in ("threshold", "timeout_ms", "classes") else _SEND,
        )
    texts = content.get("images")
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise _bad_body('"images" is not a list of texts')
    _check_count(len(texts), limits)
    return [await from_base64(text) for text in texts]


async def from_base64(text: str) -> bytes:
    """The content of an image in base64, which may have line breaks, and before it what makes it a data URL.

    Raises `Problem`, for the address of an image too: nothing is ever fetched.
    """
    if data_url := _DATA_URL.match(text):
        text = text[data_url.end() :]
    elif address := _ADDRESS.match(text):
        raise Problem(
            400,
            "no_urls",
            f"an image is an address ({address[0]}...), and this server fetches nothing",
            "Send the content of the image in base64.",
        )
    content = bytearray()
    try:
        letters = text.encode("ascii").translate(None, b" \t\r\n")  # `split` would make an object of each letter
        if b"=" in letters[:-2]:
            raise _bad_body("an image is not base64: there is a = in the middle")
        for start in range(0, len(letters), _SLICE):
            content += binascii.a2b_base64(letters[start : start + _SLICE], strict_mode=True)
            await asyncio.sleep(0)
    except ValueError as error:  # UnicodeEncodeError too
        raise _bad_body(f"an image is not base64: {error}") from error
    return bytes(content)


# --- multipart/form-data: RFC 7578, RFC 2046 --------------------------------------------------------------------------


def _boundary(content_type: str) -> bytes:
    headers = MimeHeaders()
    if content_type.count(";") > _MOST_PARAMETERS:
        raise _bad_body("the Content-Type has too many parameters")
    try:
        headers["Content-Type"] = content_type
        boundary = (headers.get_boundary() or "").encode("ascii")
    except Exception as error:  # a header from elsewhere
        raise _bad_body("the boundary in the Content-Type cannot be read") from error
    if not 1 <= len(boundary) <= _LONGEST_BOUNDARY:
        raise _bad_body(f"the Content-Type has no boundary of 1 to {_LONGEST_BOUNDARY} characters")
    return boundary


def _from_form(boundary: bytes, body: bytes, limits: RequestLimits) -> list[bytes]:
    """The files of a form, whatever their names.

    Not by a parser that reads byte by byte: the body is in memory, within limits, and one made for it takes seconds.
    """
    delimiter = b"--" + boundary
    if not body.startswith(delimiter):
        _, found, body = body.partition(b"\r\n" + delimiter)
        if not found:
            raise _bad_body("the body does not have the boundary that its Content-Type names")
    else:
        body = body[len(delimiter) :]
    # One for what follows the last boundary, one to see that there are more than allowed.
    parts = body.split(b"\r\n" + delimiter, limits.images + 1)
    images = [_file(part) for part in parts[: limits.images + 1] if not part.startswith(b"--")]
    _check_count(len(images), limits)
    if not parts[-1].startswith(b"--"):
        raise _bad_body("the body ends before its last boundary")
    return images


def _file(part: bytes) -> bytes:
    """The content of one part, which begins behind its boundary."""
    start = part.find(b"\r\n", 0, _MOST_PART_HEADERS)
    end = part.find(b"\r\n\r\n", max(start, 0), _MOST_PART_HEADERS)
    if start < 0 or end < 0 or part[:start].strip(b" \t"):
        raise _bad_body("a part of the body has no header that ends")
    if part.count(b";", start, end) > _MOST_PARAMETERS:
        raise _bad_body("the header of a part has too many parameters")
    try:
        headers = email.message_from_bytes(part[start + 2 : end + 4])
        name = str(headers.get_param("name", "", "content-disposition"))[:_LONGEST_WORD]
        named = headers.get_filename() is not None
        coding = str(headers.get("content-transfer-encoding", "binary")).strip().lower()
    except Exception as error:  # a header from elsewhere
        raise _bad_body("the header of a part cannot be read") from error
    if coding not in ("binary", "8bit", "7bit"):
        raise _bad_body(f"a part of the body is in {coding[:_LONGEST_WORD]!r}")
    if not named and not headers.get_content_type().startswith("image/"):
        remedy = f"Give {name} in the query." if name in ("threshold", "timeout_ms", "classes") else _SEND
        raise Problem(400, "bad_body", f"the field {name!r} of the form is not a file", remedy)
    return part[end + 4 :]


# --- the bodies of all requests together ------------------------------------------------------------------------------


class BodyGuard:
    """Middleware, outside of all that answers requests, for what one request cannot see of bodies.

    The bodies of the requests that are being answered have `total_bytes` together; beyond, whoever reads on gets a
    `Problem` (503).

    An answer may come before its request's body was read. The server below discards the rest of a body and keeps the
    connection, which is right for bodies as they may be. A longer one, or one without a length, may never end: its
    connection is closed. Not at once, though: closing one with bytes that nobody has read resets it, and the client may
    lose the answer. What comes within a second is discarded, as much as a body may have.
    """

    def __init__(self, app: ASGIApp, limits: RequestLimits) -> None:
        self._app = app
        self._limits = limits
        self._held = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        declared = headers.get(b"content-length", b"0")
        unread = b"transfer-encoding" in headers or not _fits(declared.decode("latin-1"), self._limits)
        held = 0

        async def next_message() -> Message:
            nonlocal unread
            message = await receive()
            unread = message["type"] == "http.request" and message.get("more_body", False)
            return message

        async def guarded_receive() -> Message:
            nonlocal held
            message = await next_message()
            size = len(message.get("body", b""))
            if size and self._held + size > self._limits.total_bytes:
                raise Problem(
                    503,
                    "bodies_full",
                    f"the requests being answered have {self._limits.total_bytes / 1e6:g} MB together",
                    "Try again.",
                    retry_after=1,
                )
            held += size
            self._held += size
            return message

        async def guarded_send(message: Message) -> None:
            if unread and message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", ()), (b"connection", b"close")]}
            if not unread or message["type"] != "http.response.body" or message.get("more_body", False):
                await send(message)
                return
            await send({**message, "more_body": True})
            discarded = 0
            with suppress(TimeoutError, asyncio.CancelledError):  # by the end of the server
                async with asyncio.timeout(_DISCARDED_S):
                    while unread and discarded <= self._limits.body_bytes:
                        discarded += len((await next_message()).get("body", b""))
            await send({"type": "http.response.body"})

        try:
            await self._app(scope, guarded_receive, guarded_send)
        finally:
            self._held -= held
