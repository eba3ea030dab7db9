"""From an HTTP request to the images in it, and what is asked of them."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from dataclasses import dataclass

from starlette.requests import Request

from gfldeploy.predict.outputs import DEFAULT_THRESHOLD
from gfldeploy.serve.problems import Problem


@dataclass(frozen=True)
class RequestLimits:
    """What a request may be: bytes of its body, seconds until all of it is there, images in it.

    `timeout_ms`: the deadline of a request that names none, milliseconds.
    """

    body_bytes: int = 32 << 20
    body_s: float = 10.0
    images: int = 16
    timeout_ms: float = 1000.0


@dataclass(frozen=True)
class DetectRequest:
    """The content of each image, and of its detections the lowest score and the classes that are wanted, () for all."""

    images: tuple[bytes, ...]
    threshold: float
    timeout_ms: float
    classes: tuple[str, ...] = ()


async def read_request(request: Request, limits: RequestLimits) -> DetectRequest:
    """Read the body, within the limits. Raises `Problem`."""
    threshold = _number(request, "threshold", DEFAULT_THRESHOLD, lambda value: 0 <= value <= 1, "from 0 to 1")
    timeout_ms = _number(request, "timeout_ms", limits.timeout_ms, lambda value: value > 0, "above 0")
    classes = request.query_params.get("classes")
    chunks: list[bytes] = []
    try:
        async with asyncio.timeout(limits.body_s):
            async for chunk in request.stream():
                chunks.append(chunk)
                if sum(map(len, chunks)) > limits.body_bytes:
                    raise Problem(413, "too_large", f"the body has more than {limits.body_bytes} bytes")
    except TimeoutError:
        raise Problem(408, "slow_body", f"the body was not there within {limits.body_s:g} s") from None
    return DetectRequest((b"".join(chunks),), threshold, timeout_ms, tuple(classes.split(",")) if classes else ())


def _number(request: Request, name: str, default: float, fits: Callable[[float], bool], range_: str) -> float:
    text = request.query_params.get(name)
    if text is None:
        return default
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and fits(value)):
        raise Problem(400, "request", f"{name} is {text[:80]!r}", f"Give a number {range_}.")
    return value
