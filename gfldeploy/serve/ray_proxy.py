"""What stands in Ray Serve's proxies before the application: the bodies' limits, the clock of deadlines, and answers.

Ray's own proxy reads bodies of any length at any speed, does not say when a request came, and answers what no replica
answers in a form of its own. It takes middlewares from the function that an environment variable of its process names.
"""

from __future__ import annotations

import json
import os
import time
from functools import cache
from pathlib import Path
from typing import Any

from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gfldeploy.errors import GfldeployError
from gfldeploy.serialization import build, plain
from gfldeploy.serve.problems import PADDLEX_PATH, Problem, answer_to, problem_of
from gfldeploy.serve.requests import BodyGuard, RequestLimits, read_body
from gfldeploy.serve.web_page import PAGE_PATHS

REPLICA_HEADER = b"x-gfldeploy-replica"
"""In each answer of a replica, its name in Ray Serve: an answer without it is Ray's own."""
_LIMITS = "GFLDEPLOY_REQUEST_LIMITS"
_WITH_IMAGES = ("/v1/detect", PADDLEX_PATH)
_OTHERS = ("/health/live", "/health/ready", "/v1/model", "/v1/reload", "/openapi.json", "/metrics")
_OWN = frozenset((*_WITH_IMAGES, *_OTHERS, *PAGE_PATHS))
# By which a client could tell Ray's proxy and router what is not its business: to work on for one that has left, to
# forget a time limit, to look for a replica that has loaded some model.
_RAYS = frozenset(
    {
        b"x-request-disconnect-disabled",
        b"x-request-timeout-seconds",
        b"serve_multiplexed_model_id",
        b"serve-multiplexed-model-id",
    }
)
_ARRIVED = "gfldeploy_arrived"
_RETRY_S = 1.0


def proxy_environment(limits: RequestLimits) -> dict[str, str]:
    """The environment variables of a proxy that has the middlewares of this module."""
    return {
        "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": f"{__name__}:middlewares",
        _LIMITS: json.dumps(plain(limits)),
    }


def middlewares() -> list[Middleware]:
    """What Ray's proxy calls at its start: the last one is the outermost."""
    limits = build(RequestLimits, json.loads(os.environ[_LIMITS]))
    return [Middleware(Entrance, limits), Middleware(BodyGuard, limits=limits)]


class Entrance:
    """ASGI middleware around Ray's proxy, for the paths of the application; other applications' pass untouched.

    A request with images goes to a replica when all of its body is there: no slow client takes a replica's place, and
    its deadline counts from then. What Ray answers itself, or does not answer because the replica died, becomes a
    problem in the form of all others.
    """

    def __init__(self, app: ASGIApp, limits: RequestLimits) -> None:
        self._app, self._limits = app, limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] not in _OWN:
            await self._app(scope, receive, send)
            return
        scope["headers"] = [pair for pair in scope["headers"] if pair[0].lower() not in _RAYS]
        if scope["method"] == "POST" and scope["path"] in _WITH_IMAGES:
            try:
                body = await read_body(Request(scope, receive), self._limits)
            except ClientDisconnect:
                return
            except GfldeployError as error:
                await answer_to(scope, problem_of(error))(scope, receive, send)
                return
            receive = _again(body, receive)
        scope.setdefault("state", {})[_ARRIVED] = arrival()
        replaced: Problem | None = None
        answered = False

        async def guarded_send(message: Message) -> None:
            nonlocal answered, replaced
            if message["type"] == "http.response.start":
                names = {name.lower() for name, _ in message.get("headers", ())}
                if REPLICA_HEADER not in names and message["status"] >= 400:
                    replaced = _of_ray(message)
            if replaced is None:
                answered = True
                await send(message)

        await self._app(scope, receive, guarded_send)
        if not answered:
            problem = replaced or Problem(
                503,
                "replica_lost",
                "the replica that had the request ended before it answered",
                "Send the request again.",
                retry_after=_RETRY_S,
            )
            await answer_to(scope, problem)(scope, receive, send)


def _again(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives the body that was read, then what comes after it."""
    given = False

    async def once() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return once


def _of_ray(start: Message) -> Problem:
    """What an answer of Ray's own means here."""
    headers = {name.lower(): value for name, value in start.get("headers", ())}
    match start["status"]:
        case 429:
            retry_s = float(headers.get(b"retry-after", _RETRY_S))
            return Problem(429, "queue_full", "too many requests wait for a replica", "Try again later.", retry_s)
        case 404:
            return Problem(503, "not_ready", "there is no replica that answers", "Try again later.", _RETRY_S)
        case 408:
            return Problem(503, "deadline", "no replica answered in time", "Try again later.", _RETRY_S)
        case status:
            return Problem(503, "not_ready", f"Ray Serve answered {status}", "Try again later.", _RETRY_S)


def arrival() -> dict[str, Any]:
    """This moment, for whoever asks how long ago it was, maybe in another process or on another machine."""
    return {"boot": _boot(), "monotonic": time.monotonic(), "wall": time.time()}


def waited_s(scope: Scope) -> float:
    """Seconds since the proxy had the request of this scope; 0 if it has none of these middlewares.

    By the machine's own clock where proxy and replica share one, else by the time of day, as well as the two agree.
    """
    told = scope.get("state", {}).get(_ARRIVED)
    if not isinstance(told, dict):
        return 0.0
    if told["boot"] == _boot():
        return max(time.monotonic() - float(told["monotonic"]), 0.0)
    return max(time.time() - float(told["wall"]), 0.0)


@cache
def _boot() -> str:
    """What is the same as long and as far as `time.monotonic` can be compared: between processes of one kernel."""
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
