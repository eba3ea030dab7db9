"""What stands in Ray Serve's proxies: bodies, the clock of deadlines, and what Ray answers itself. Without Ray."""

from __future__ import annotations

import asyncio
import json
import pickle
import time
from typing import Any

import httpx
import pytest
from served import talk
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gfldeploy.serve.problems import PADDLEX_PATH
from gfldeploy.serve.ray_proxy import REPLICA_HEADER, Entrance, arrival, middlewares, proxy_environment, waited_s
from gfldeploy.serve.requests import RequestLimits

LIMITS = RequestLimits(body_bytes=1000, total_bytes=1500, body_s=0.2)


class Rays:
    """What stands in for the rest of Ray's proxy: it answers as told, and remembers what it got."""

    def __init__(self, status: int | None = 200, replica: bool = True, headers: Any = ()) -> None:
        self.status, self.headers = status, [*headers, *([(REPLICA_HEADER, b"one")] if replica else [])]
        self.scopes: list[Scope] = []
        self.bodies: list[list[Message]] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.scopes.append(pickle.loads(pickle.dumps(scope, protocol=5)) if scope["path"] != "/other" else scope)
        self.bodies.append([await receive()])
        if self.status is not None:
            await send({"type": "http.response.start", "status": self.status, "headers": self.headers})
            await send({"type": "http.response.body", "body": b"words of Ray's"})


def post(app: ASGIApp, path: str = "/v1/detect", **given: Any) -> httpx.Response:
    return talk(app, lambda client: client.post(path, **given))


def test_a_replica_gets_a_request_when_its_body_is_there_and_knows_how_long_ago() -> None:
    rays = Rays()

    async def slowly() -> Any:
        yield b"ab"
        await asyncio.sleep(0.05)
        yield b"cd"

    answer = post(Entrance(rays, LIMITS), content=slowly())
    assert (answer.status_code, answer.text) == (200, "words of Ray's")
    assert rays.bodies == [[{"type": "http.request", "body": b"abcd", "more_body": False}]]
    assert 0 <= waited_s(rays.scopes[0]) < 0.05 + 60
    time.sleep(0.01)
    assert waited_s(rays.scopes[0]) >= 0.01


def test_the_wait_is_counted_between_machines_too_and_never_below_zero() -> None:
    here = arrival()
    elsewhere = {**here, "boot": "another", "wall": here["wall"] - 3, "monotonic": -1e9}
    assert 3 <= waited_s({"state": {"gfldeploy_arrived": elsewhere}}) < 63
    assert waited_s({"state": {"gfldeploy_arrived": {**elsewhere, "wall": here["wall"] + 1000}}}) == 0
    assert waited_s({}) == 0  # a proxy that somebody else started


def test_clients_do_not_tell_ray_what_to_do() -> None:
    rays = Rays()
    given = {
        "X-Request-Timeout-Seconds": "0",
        "X-Request-Disconnect-Disabled": "?1",
        "serve_multiplexed_model_id": "a",
        "Serve-Multiplexed-Model-Id": "a",
        "X-API-Key": "kept",
    }
    post(Entrance(rays, LIMITS), headers=given)
    post(Entrance(rays, LIMITS), "/other", headers=given)
    ours, other = ({name for name, _ in scope["headers"]} for scope in rays.scopes)
    assert {b"x-api-key"} == ours & {name.lower().encode() for name in given}
    assert other >= {name.lower().encode() for name in given}


@pytest.mark.parametrize(
    ("rays", "status", "code", "retry"),
    [
        (Rays(429, False, [(b"retry-after", b"7")]), 429, "queue_full", "7"),
        (Rays(404, False), 503, "not_ready", "1"),
        (Rays(408, False), 503, "deadline", "1"),
        (Rays(500, False), 503, "not_ready", "1"),
        (Rays(None), 503, "replica_lost", "1"),
    ],
)
def test_what_ray_answers_itself_is_a_problem_like_others(rays: Rays, status: int, code: str, retry: str) -> None:
    answer = post(Entrance(rays, LIMITS), content=b"image")
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
    assert answer.headers["Retry-After"] == retry
    assert post(Entrance(rays, LIMITS), PADDLEX_PATH, content=b"image").json()["errorCode"] == status
    elsewhere = talk(Entrance(rays, LIMITS), lambda client: client.get("/health/ready"))
    assert elsewhere.json()["error"]["code"] == code


def test_what_a_replica_answers_stays() -> None:
    answer = post(Entrance(Rays(503), LIMITS), content=b"image")
    assert (answer.status_code, answer.text) == (503, "words of Ray's")


def test_bodies_beyond_the_limits_come_to_no_replica(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in proxy_environment(LIMITS).items():
        monkeypatch.setenv(name, value)
    rays = Rays()
    app: ASGIApp = rays
    for one in middlewares():  # as Ray puts them together
        app = one.cls(app, *one.args, **one.kwargs)

    async def without_end() -> Any:
        while True:
            yield b"x" * 100
            await asyncio.sleep(0)

    async def never() -> Any:
        yield b"x"
        await asyncio.sleep(60)

    async def together(client: httpx.AsyncClient) -> list[int]:
        async def held() -> Any:
            yield b"x" * 900
            await asyncio.sleep(0.1)

        answers = await asyncio.gather(*(client.post("/v1/detect", content=held()) for _ in range(2)))
        return sorted(answer.status_code for answer in answers)

    assert post(app, content=b"x" * 1001).json()["error"]["code"] == "too_large"
    assert post(app, content=without_end()).json()["error"]["code"] == "too_large"
    assert post(app, content=never()).json()["error"]["code"] == "slow_body"
    assert rays.scopes == []
    assert talk(app, together) == [200, 503]  # of all bodies
    assert json.loads(proxy_environment(LIMITS)["GFLDEPLOY_REQUEST_LIMITS"])["body_bytes"] == 1000
