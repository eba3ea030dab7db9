"""The ASGI application: routes, and the order of a request."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import anyio
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from gfldeploy.serialization import plain
from gfldeploy.serve.answers import image_record
from gfldeploy.serve.loaded import Answer
from gfldeploy.serve.openapi import openapi
from gfldeploy.serve.paddlex import paddlex_answer, read_paddlex_request
from gfldeploy.serve.problems import HANDLERS, PADDLEX_PATH, Problem, json_response, problem_of
from gfldeploy.serve.requests import BodyGuard, DetectRequest, RequestLimits, read_request
from gfldeploy.serve.service import DetectionService
from gfldeploy.serve.web_page import page_routes


@dataclass(frozen=True)
class ServeOptions:
    """What the application allows."""

    limits: RequestLimits = field(default_factory=RequestLimits)


def create_app(service: DetectionService, options: ServeOptions) -> Starlette:
    """The application over a service, which somebody else starts and closes."""
    limits = options.limits
    drawing = anyio.CapacityLimiter(1)  # a picture of 128 million pixels takes a gigabyte

    async def detect(request: Request) -> Response:
        start = time.perf_counter()
        service.check_room()  # before the body: what will be refused costs next to nothing
        asked = await read_request(request, limits, service.description.classes)
        found = await _unless_gone(request, asked, service)
        if len(found) == 1 and isinstance(found[0], BaseException):
            raise found[0]
        images = [
            problem_of(one).body() if isinstance(one, BaseException) else image_record(one, asked) for one in found
        ]
        return json_response({"images": images, "times_ms": {"total": _ms(time.perf_counter() - start)}})

    async def object_detection(request: Request) -> Response:
        service.check_room()
        asked = await read_paddlex_request(request, limits)
        (found,) = await _unless_gone(request, DetectRequest((asked.image,), 0.0, limits.timeout_ms), service)
        if isinstance(found, BaseException):
            raise found
        return json_response(await paddlex_answer(found.detections, asked, drawing))

    async def live(request: Request) -> Response:
        return json_response({"status": "live"})

    async def ready(request: Request) -> Response:
        if (why := service.ready()) is not None:
            raise Problem(503, "not_ready", why, "Try again later.", retry_after=1)
        return json_response({"status": "ready"})

    async def model(request: Request) -> Response:
        return json_response(plain(service.description))

    async def described(request: Request) -> Response:
        return json_response(openapi(limits, service.description.classes, {route.path for route in routes}))

    routes = [
        Route("/v1/detect", detect, methods=["POST"]),
        Route(PADDLEX_PATH, object_detection, methods=["POST"]),
        Route("/health/live", live),
        Route("/health/ready", ready),
        Route("/v1/model", model),
        Route("/openapi.json", described),
        *page_routes(),
    ]
    return Starlette(
        routes=routes,
        middleware=[Middleware(BodyGuard, limits=limits)],
        exception_handlers=HANDLERS,
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


def _ms(seconds: float) -> float:
    return round(seconds * 1e3, 3)
