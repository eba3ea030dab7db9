"""The ASGI application: routes, and the order of a request."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence

import anyio
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from gfldeploy.errors import GfldeployError, RejectedError
from gfldeploy.progress import SILENT, Progress
from gfldeploy.serialization import plain
from gfldeploy.serve.access_log import AccessLog, Exchanges
from gfldeploy.serve.answers import image_json
from gfldeploy.serve.keys import KeyGuard, Keys
from gfldeploy.serve.loaded import Answer
from gfldeploy.serve.metrics import Metrics, metrics_route
from gfldeploy.serve.openapi import openapi
from gfldeploy.serve.paddlex import paddlex_answer, read_paddlex_request
from gfldeploy.serve.problems import (
    HANDLERS,
    JSON,
    PADDLEX_PATH,
    JsonResponse,
    Problem,
    answer_to,
    json_response,
    problem_of,
)
from gfldeploy.serve.reload import Current, Reloader, reload_route
from gfldeploy.serve.replica import Replica
from gfldeploy.serve.requests import LONGEST_TIMEOUT_MS, BodyGuard, RequestLimits, read_request
from gfldeploy.serve.service import DRAINING, DetectionService
from gfldeploy.serve.web_page import PAGE_PATHS, page_routes

# What tells nothing that is anybody's secret, and what a browser needs before somebody can enter a key.
_OPEN = ("/health/live", "/health/ready", "/openapi.json", *PAGE_PATHS)
_LATE_MS = 1e-3  # what is left to a request that is late already: it is refused
# Of a deadline, for the way of an answer from its batch to its client through a busy event loop.
_SENDING_SHARE, _SENDING_MS = 0.01, 5.0
Endpoint = Callable[[Request], Awaitable[Response]]
_TIMEOUT = re.compile(rb"(?:^|&)timeout_ms=(\d{1,9}(?:\.\d{1,9})?)(?:&|$)")


def create_app(
    service: DetectionService,
    limits: RequestLimits,
    *,
    metrics: Metrics | None = None,
    load: Callable[[], DetectionService] | None = None,
    keys: Keys | None = None,
    access_log: AccessLog | None = None,
    replica: Replica | None = None,
    progress: Progress = SILENT,
) -> Starlette:
    """The application over a service, which somebody else closes: the one that `state.current` has at the end.

    `metrics`: those that the service tells, too. `load`: makes the service anew, for a reload. `keys`: without one of
    them a request is refused. `replica`: this process is one of several behind one port, and says what all say.
    `progress` is told of reloads.
    """
    metrics = metrics or Metrics()
    current = Current(service)
    metrics.ask(lambda: current.service)
    drawing = anyio.CapacityLimiter(1)  # a picture of 128 million pixels takes a gigabyte

    async def detect(request: Request) -> Response:
        start = time.perf_counter()
        served = current.service.choice
        asked = await read_request(request, limits, served.bundle.manifest.classes, served.detection)
        request.state.images = len(asked.images)
        with current.use() as service:
            left_ms = max(_left_ms(request.scope, asked.timeout_ms), _LATE_MS)
            found = await _unless_gone(request, asked.images, left_ms, service, asked.threshold)
        if len(found) == 1 and isinstance(found[0], BaseException):
            raise found[0]
        detection, most = service.choice.detection, service.choice.manifest.nms.keep_top_k
        texts = [
            JSON.encode(problem_of(one).body())
            if isinstance(one, BaseException)
            else image_json(one, asked, detection, most)
            for one in found
        ]
        total_ms = round((time.perf_counter() - start) * 1e3, 3)
        return JsonResponse(f'{{"images":[{",".join(texts)}],"times_ms":{{"total":{total_ms}}}}}')

    async def object_detection(request: Request) -> Response:
        asked = await read_paddlex_request(request, limits)
        request.state.images = 1
        with current.use() as service:
            left_ms = max(_left_ms(request.scope, limits.timeout_ms), _LATE_MS)
            (found,) = await _unless_gone(request, [asked.image], left_ms, service, asked.threshold)
        if isinstance(found, BaseException):
            raise found
        return json_response(await paddlex_answer(found.detections, asked, service.choice, drawing))

    async def live(request: Request) -> Response:
        return json_response({"status": "live"})

    async def ready(request: Request) -> Response:
        why = current.service.ready()
        if why is not None and not (replica is not None and replica.others_ready and why != DRAINING):
            raise Problem(503, "not_ready", why, "Try again later.", retry_after=1)
        return json_response({"status": "ready"})

    async def model(request: Request) -> Response:
        return json_response(plain(current.service.description))

    async def described(request: Request) -> Response:
        paths = {route.path for route in routes}
        choice = current.service.choice
        names, threshold = choice.bundle.manifest.classes, choice.detection.lowest
        return json_response(openapi(limits, names, paths, keys is not None, threshold))

    routes = [
        Route("/v1/detect", detect, methods=["POST"]),
        Route(PADDLEX_PATH, object_detection, methods=["POST"]),
        Route("/health/live", live),
        Route("/health/ready", ready),
        Route("/v1/model", model),
        Route("/openapi.json", described),
        Route("/metrics", metrics_route),
        *([Route("/v1/reload", reload_route, methods=["POST"])] if load else []),
        *page_routes(),
    ]
    told = [metrics.end] if access_log is None else [metrics.end, access_log.write]
    app = Starlette(
        routes=routes,
        middleware=[
            Middleware(Exchanges, metrics.begin, told),
            Middleware(BodyGuard, limits=limits),
            *([Middleware(KeyGuard, keys, _OPEN)] if keys else []),
            Middleware(_AtOnce, {"/v1/detect": detect, PADDLEX_PATH: object_detection}, current, limits.timeout_ms),
        ],
        exception_handlers=HANDLERS,
    )
    # Else a client that adds a slash is sent to http://, whatever its Host header says, with its key and its image.
    app.router.redirect_slashes = False
    app.state.current, app.state.metrics = current, metrics
    app.state.metrics_of_all = None if replica is None else replica.metrics
    app.state.reloader = None if load is None else Reloader(current, load, metrics, keys, progress)
    app.state.reload_all = None if replica is None else replica.reload
    return app


class _AtOnce:
    """Middleware that answers what is asked most, requests for detections, without the rest of the application.

    First whatever would be refused once its body was read: that costs next to nothing. What errors are answered with is
    as in `HANDLERS`; those that nobody foresaw go on to whoever answers them for the whole application.
    """

    def __init__(self, app: ASGIApp, endpoints: Mapping[str, Endpoint], current: Current, timeout_ms: float) -> None:
        self._app, self._current, self._timeout_ms = app, current, timeout_ms
        self._endpoints = {path: (endpoint, Route(path, endpoint)) for path, endpoint in endpoints.items()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        known = self._endpoints.get(scope["path"]) if scope["type"] == "http" and scope["method"] == "POST" else None
        if known is None:
            await self._app(scope, receive, send)
            return
        endpoint, scope["route"] = known  # for the access log
        given = _TIMEOUT.search(scope["query_string"])
        # One that is written in another way, such as 1e4, is read with the request.
        other = LONGEST_TIMEOUT_MS if b"timeout_ms" in scope["query_string"] else self._timeout_ms
        timeout_ms = (given and float(given[1])) or other
        try:
            self._current.service.check_room(_left_ms(scope, timeout_ms))
            response = await endpoint(Request(scope, receive, send))
        except (GfldeployError, HTTPException, ClientDisconnect) as error:
            response = answer_to(scope, problem_of(error))
        except asyncio.CancelledError:  # the server ends, and waits no longer for the body
            response = answer_to(
                scope, problem_of(RejectedError("the server has stopped", "Try again later.", "closed"))
            )
        await response(scope, receive, send)


def _left_ms(scope: Scope, timeout_ms: float) -> float:
    """Milliseconds that are left for an answer to a request whose last byte arrived a while ago.

    An event loop that is behind must not answer late, and of what it takes to send the answer something is kept back.
    """
    now = time.perf_counter()
    waited_s = now - float(scope.get("state", {}).get("arrived", now))
    return timeout_ms - waited_s * 1e3 - min(_SENDING_SHARE * timeout_ms, _SENDING_MS)


async def _unless_gone(
    request: Request, images: Sequence[bytes], timeout_ms: float, service: DetectionService, threshold: float | None
) -> Sequence[Answer | BaseException]:
    """What was found in each image, or why nothing was. Raises `ClientDisconnect` if the client leaves before.

    The work is withdrawn then, as far as it has not begun. `threshold`: that of the request.
    """
    detection, own = service.choice.detection, service.choice.bundle.manifest
    # Of those that are shown by thresholds of classes, `keep_top_k` leave NMS: which ones depends on the request, too.
    nms = detection.nms(own.nms, own.classes, threshold) if detection.class_thresholds else None
    task, gone = asyncio.current_task(), False
    assert task is not None

    def left() -> None:
        nonlocal gone
        gone = True
        task.cancel()

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        left()

    # A connection of this package tells by itself, which takes no task.
    tell: Callable[[Callable[[], None] | None], None] | None = request.scope.get("state", {}).get("tell_when_gone")
    watching = asyncio.create_task(watch()) if tell is None else None
    if tell is not None:
        tell(left)
    try:
        if len(images) == 1:  # needs no task of its own
            try:
                return [await service.detect(images[0], timeout_ms, nms)]
            except Exception as error:  # noqa: BLE001 - the answer to this image
                return [error]
        jobs = (service.detect(content, timeout_ms, nms) for content in images)
        return await asyncio.gather(*jobs, return_exceptions=True)
    except asyncio.CancelledError:
        if not gone:
            raise
        task.uncancel()
        raise ClientDisconnect from None
    finally:
        if watching is not None:
            watching.cancel()
        if tell is not None:
            tell(None)
