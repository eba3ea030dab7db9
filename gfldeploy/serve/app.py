"""The ASGI application: routes, and the order of a request."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from gfldeploy.serialization import plain
from gfldeploy.serve.loaded import Answer
from gfldeploy.serve.problems import Problem, problem_of, problem_response
from gfldeploy.serve.requests import DetectRequest, RequestLimits, read_request
from gfldeploy.serve.service import DetectionService

_CLIENT_GONE = 499  # nginx's number


@dataclass(frozen=True)
class ServeOptions:
    """What the application allows."""

    limits: RequestLimits = field(default_factory=RequestLimits)


def create_app(service: DetectionService, options: ServeOptions) -> Starlette:
    """The application over a service, which somebody else starts and closes."""

    async def detect(request: Request) -> Response:
        start = time.perf_counter()
        service.check_room()  # before the body: what will be refused costs next to nothing
        asked = await read_request(request, options.limits)
        try:
            found = await _unless_gone(request, asked, service)
        except ClientDisconnect:
            return Response(status_code=_CLIENT_GONE)  # which nobody reads
        if len(found) == 1 and isinstance(found[0], BaseException):
            raise found[0]
        images = [_image(one, asked) for one in found]
        return JSONResponse({"images": images, "times_ms": {"total": _ms(time.perf_counter() - start)}})

    async def live(request: Request) -> Response:
        return JSONResponse({"status": "live"})

    async def ready(request: Request) -> Response:
        if (why := service.ready()) is not None:
            raise Problem(503, "not_ready", why, "Try again later.", retry_after=1)
        return JSONResponse({"status": "ready"})

    async def model(request: Request) -> Response:
        return JSONResponse(plain(service.description))

    async def failed(request: Request, error: Exception) -> Response:
        if isinstance(error, HTTPException):
            error = Problem(error.status_code, "http", error.detail)
        return problem_response(problem_of(error))

    return Starlette(
        routes=[
            Route("/v1/detect", detect, methods=["POST"]),
            Route("/health/live", live),
            Route("/health/ready", ready),
            Route("/v1/model", model),
        ],
        exception_handlers={Problem: failed, HTTPException: failed, Exception: failed},
    )


async def _unless_gone(
    request: Request, asked: DetectRequest, service: DetectionService
) -> Sequence[Answer | BaseException]:
    """What was found in each image, or why nothing was. Raises `ClientDisconnect` if the client leaves before.

    The work is withdrawn then, as far as it has not begun.
    """
    task, gone = asyncio.current_task(), False
    assert task is not None

    async def watch() -> None:
        nonlocal gone
        while (await request.receive())["type"] != "http.disconnect":
            pass
        gone = True
        task.cancel()

    watching = asyncio.create_task(watch())
    try:
        if len(asked.images) == 1:  # needs no task of its own
            try:
                return [await service.detect(asked.images[0], asked.timeout_ms)]
            except Exception as error:  # noqa: BLE001 - the answer to this image
                return [error]
        jobs = (service.detect(content, asked.timeout_ms) for content in asked.images)
        return await asyncio.gather(*jobs, return_exceptions=True)
    except asyncio.CancelledError:
        if not gone:
            raise
        task.uncancel()
        raise ClientDisconnect from None
    finally:
        watching.cancel()


def _image(found: Answer | BaseException, asked: DetectRequest) -> dict[str, Any]:
    """The JSON of one image."""
    if isinstance(found, BaseException):
        return problem_of(found).body()
    kept = found.detections.at_least(asked.threshold)
    if asked.classes:
        try:
            kept = kept.of_classes(*asked.classes)
        except ValueError as error:
            raise Problem(400, "request", str(error), "See /v1/model for the classes.") from error
    rows = zip(kept.names, kept.classes.tolist(), kept.scores.tolist(), kept.boxes.tolist(), strict=True)
    return {
        "height": found.size[0],
        "width": found.size[1],
        "detections": [
            {"class": name, "class_id": category, "score": score, "box": box} for name, category, score, box in rows
        ],
        "times_ms": {name: round(value, 3) for name, value in asdict(found.times).items()},
    }


def _ms(seconds: float) -> float:
    return round(seconds * 1e3, 3)
