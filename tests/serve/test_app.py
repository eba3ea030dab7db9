"""The application: its routes and its answers."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import httpx
from served import AT_ONCE, LONG_MS, Gate, contents, serving, talk, until

from gfldeploy.serve.app import create_app
from gfldeploy.serve.requests import RequestLimits


def test_what_is_found_is_filtered(tiny_bundle: Path, tiny_coco: Path) -> None:
    image, *_ = contents(tiny_coco)

    async def ask(client: httpx.AsyncClient) -> list[list[str]]:
        queries = ["", "?threshold=0", "?threshold=0.95", "?threshold=0&classes=ball", "?classes=box,ball"]
        responses = [await client.post(f"/v1/detect{query}", content=image) for query in queries]
        return [[one["class"] for one in response.json()["images"][0]["detections"]] for response in responses]

    with serving(tiny_bundle) as service:
        found = talk(create_app(service, RequestLimits()), ask)
    usual, everything, nothing, balls, both = found
    assert set(usual) == {"box"} and usual == both and nothing == []
    assert set(everything) == {"box"} and balls == []  # the tiny detector sees no ball above its own threshold


def test_errors(tiny_bundle: Path, tiny_coco: Path) -> None:
    image, *_ = contents(tiny_coco)
    cases = [
        ("/v1/detect", b"", 422, "image"),
        ("/v1/detect", b"no image", 422, "image"),
        ("/v1/detect?timeout_ms=0.001", image, 503, "deadline"),
        ("/v1/detect/", b"", 404, "not_found"),  # and no redirection to what the Host header says
    ]

    async def ask(client: httpx.AsyncClient) -> list[httpx.Response]:
        return [await client.post(path, content=content) for path, content, *_ in cases]

    with serving(tiny_bundle) as service:
        answers = talk(create_app(service, RequestLimits()), ask)
    for response, (_, _, status, code) in zip(answers, cases, strict=True):
        assert (response.status_code, response.json()["error"]["code"]) == (status, code)
        assert response.json()["error"]["message"]
        assert ("retry-after" in response.headers) == (status == 503)


def test_health_and_model(tiny_bundle: Path) -> None:
    async def ask(client: httpx.AsyncClient) -> list[tuple[int, object]]:
        before = [await client.get(path) for path in ("/health/live", "/health/ready", "/v1/model")]
        service.drain()
        after = [await client.get("/health/ready"), await client.post("/v1/detect", content=b"never read")]
        assert "stopping" in after[0].json()["error"]["message"]
        assert all(response.headers["retry-after"] for response in after)
        return [(response.status_code, response.json()) for response in (*before, *after)]

    with serving(tiny_bundle) as service:
        live, ready, model, *refused = talk(create_app(service, RequestLimits()), ask)
        digest = service.choice.bundle.digest
    assert live[0] == ready[0] == model[0] == 200
    assert [status for status, _ in refused] == [503, 503]
    described = model[1]
    assert isinstance(described, dict)
    assert described["bundle"]["digest"] == digest
    assert (described["engine"], described["precision"], described["streams"]) == ("onnxruntime", "fp32", 1)


def test_a_client_that_leaves_takes_its_work_along(tiny_bundle: Path, tiny_coco: Path) -> None:
    image, *_ = contents(tiny_coco)

    async def run() -> None:
        app, gate = create_app(service, RequestLimits()), Gate(service)
        left = asyncio.Event()
        sent: list[int] = []

        async def request(leaves: bool) -> None:
            messages = [{"type": "http.request", "body": image, "more_body": False}]

            async def receive() -> dict[str, object]:
                if messages:
                    return messages.pop()
                await (left if leaves else asyncio.Event()).wait()
                return {"type": "http.disconnect"}

            async def send(message: dict[str, object]) -> None:
                if message["type"] == "http.response.start":
                    sent.append(int(str(message["status"])))

            scope = {
                "type": "http",
                "method": "POST",
                "path": "/v1/detect",
                "query_string": b"timeout_ms=60000",
                "headers": [],
            }
            await app(scope, receive, send)  # type: ignore[arg-type]

        running = [asyncio.create_task(request(False)) for _ in range(AT_ONCE)]
        await until(lambda: service.waiting == 0 and gate.entered.is_set() and service.in_flight == AT_ONCE)
        gone = [asyncio.create_task(request(True)) for _ in range(3)]
        await until(lambda: service.waiting == 3)
        left.set()
        await asyncio.gather(*gone)
        assert service.in_flight == AT_ONCE
        gate.open.set()
        await asyncio.gather(*running)
        assert sorted(sent) == [200] * AT_ONCE + [499] * 3

    with serving(tiny_bundle) as service:
        asyncio.run(run())
    counts = service._detector.batcher.counts
    assert (counts.answered, counts.cancelled) == (AT_ONCE, 3)


def test_a_body_that_arrives_while_the_server_ends_is_refused(tiny_bundle: Path) -> None:
    async def run() -> list[object]:
        sent: list[object] = []
        asked = asyncio.Event()

        async def receive() -> dict[str, object]:
            asked.set()
            await asyncio.Event().wait()
            raise AssertionError

        async def send(message: dict[str, object]) -> None:
            sent.append(message.get("status"))

        scope = {"type": "http", "method": "POST", "path": "/v1/detect", "query_string": b"", "headers": []}
        task = asyncio.ensure_future(create_app(service, RequestLimits())(scope, receive, send))  # type: ignore[arg-type]
        await asked.wait()
        task.cancel()  # as uvicorn does at the end of its time
        await task
        return sent

    with serving(tiny_bundle) as service:
        assert asyncio.run(run()) == [503, None]


def test_what_will_be_refused_is_before_its_body_is_read(tiny_bundle: Path, tiny_coco: Path) -> None:
    image, *_ = contents(tiny_coco)

    async def run() -> None:
        app, gate = create_app(service, RequestLimits()), Gate(service)
        jobs = [asyncio.ensure_future(service.detect(image, LONG_MS)) for _ in range(AT_ONCE + 60)]
        await until(lambda: service.waiting == 60 and gate.entered.is_set())

        async def refused(query: bytes, arrived: float) -> tuple[int, bytes]:
            sent: list[dict[str, object]] = []

            async def send(message: dict[str, object]) -> None:
                sent.append(message)

            async def receive() -> dict[str, object]:
                raise AssertionError("the body is read")

            scope = {
                "type": "http",
                "method": "POST",
                "path": "/v1/detect",
                "query_string": query,
                "headers": [(b"content-length", b"1000")],
                "state": {"arrived": arrived},
            }
            await app(scope, receive, send)  # type: ignore[arg-type]
            return int(str(sent[0]["status"])), bytes(str(sent[1]["body"]), "utf-8")

        now = time.perf_counter()
        for query, arrived in ((b"timeout_ms=0.001", now), (b"threshold=0&timeout_ms=60000", now - 60)):
            status, body = await refused(query, arrived)  # too short a deadline; one that passed on the way
            assert status == 503 and b"deadline" in body
        jobs += [asyncio.ensure_future(service.detect(image, LONG_MS)) for _ in range(4)]
        await until(lambda: service.waiting == 64)
        status, body = await refused(b"timeout_ms=60000", time.perf_counter())
        assert status == 429 and b"queue_full" in body
        gate.open.set()
        await asyncio.gather(*jobs)

    with serving(tiny_bundle, most_waiting=64) as service:
        asyncio.run(run())
