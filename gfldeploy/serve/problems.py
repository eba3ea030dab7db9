"""What a client is told when a request fails: one JSON shape, with a code for programs and a remedy for people."""

from __future__ import annotations

import json
import math
import uuid
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ExceptionHandler, Scope

from gfldeploy.errors import DataError, EngineError, GfldeployError, RejectedError
from gfldeploy.text import printable

# Its clients expect PaddleX's shape of errors too.
PADDLEX_PATH = "/object-detection"
CLIENT_GONE = 499
"""In place of the status of an answer that nobody was there to receive: no such status is ever sent. nginx's number."""
# Where nothing better is known: as long as a few batches take.
_RETRY_S = 1.0
JSON = json.JSONEncoder(separators=(",", ":"), allow_nan=False)
_LONGEST = 500  # characters of a message, which may quote the request


class Problem(GfldeployError):  # noqa: N818
    """A request that cannot be answered as asked.

    Attributes:
        status: The HTTP status.
        code: For programs, such as "queue_full".
        retry_after: After so many seconds a client may try again; None: the same request fails again.
        headers: Others that belong to the answer.
    """

    def __init__(
        self,
        status: int,
        code: str,
        problem: str,
        remedy: str | None = None,
        retry_after: float | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(problem, remedy)
        self.status = status
        self.code = code
        self.retry_after = retry_after
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """The JSON object that says so, also in place of one image of several."""
        return {"error": {"code": self.code, "message": _shown(self.problem), "remedy": _shown(self.remedy or "")}}


class JsonResponse(Response):
    """JSON in ASCII that is there already; `Response` itself takes longer to make its headers than the JSON takes."""

    def __init__(self, text: str, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        self.status_code, self.body, self.background = status, text.encode("ascii"), None
        self.raw_headers = [
            *((name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in (headers or {}).items()),
            (b"content-length", b"%d" % len(self.body)),
            (b"content-type", b"application/json"),
        ]


def problem_response(problem: Problem, body: dict[str, Any] | None = None) -> Response:
    """The response that says so; `body` in place of the problem's own."""
    headers = dict(problem.headers)
    if problem.retry_after is not None:
        headers["Retry-After"] = str(max(1, math.ceil(problem.retry_after)))  # whole seconds: RFC 9110, 10.2.3
    return json_response(body or problem.body(), problem.status, headers)


def json_response(content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """JSON in ASCII, which holds whatever a class name is made of."""
    return JsonResponse(JSON.encode(content), status, headers)


def problem_of(error: BaseException) -> Problem:
    """What a client is told of an error. Of what nobody foresaw, no more than that the server failed."""
    match error:
        case Problem():
            return error
        case RejectedError(reason="queue full"):
            return Problem(429, "queue_full", error.problem, error.remedy, _RETRY_S)
        case RejectedError(reason="deadline"):
            return Problem(503, "deadline", error.problem, error.remedy, _RETRY_S)
        case RejectedError():
            return Problem(503, "not_ready", error.problem, error.remedy, _RETRY_S)
        case DataError():
            return Problem(422, "image", error.problem, error.remedy)
        case EngineError():
            return Problem(500, "engine", error.problem, error.remedy)
        case GfldeployError():
            return Problem(500, "failed", error.problem, error.remedy)
        case ClientDisconnect():
            return Problem(CLIENT_GONE, "client_gone", "the client closed the connection before its request was read")
        case HTTPException():
            return _of_starlette(error)
        case _:
            return Problem(
                500, "internal", "the server failed in a way that nobody foresaw", "Look into its log, and report it."
            )


def _of_starlette(error: HTTPException) -> Problem:
    name = HTTPStatus(error.status_code).name.lower()
    told = {
        404: ("there is nothing at this path", "GET /openapi.json lists what there is."),
        405: ("this path does not take this method", "GET /openapi.json lists what it takes."),
    }
    problem, remedy = told.get(error.status_code, (error.detail, None))
    return Problem(error.status_code, name, problem, remedy, headers=error.headers)


def answer_to(scope: Scope, problem: Problem) -> Response:
    """The response to a request that failed, in the shape that clients of its path expect."""
    scope.setdefault("state", {})["code"] = problem.code  # for the access log
    if scope["path"] == PADDLEX_PATH:
        return problem_response(problem, paddlex_record(problem.status, _shown(str(problem))))
    return problem_response(problem)


async def _answer(request: Request, error: Exception) -> Response:
    return answer_to(request.scope, problem_of(error))


def paddlex_record(code: int, message: str) -> dict[str, Any]:
    """The fields that every answer of PaddleX's server has. `code`: 0, or the HTTP status of an error."""
    return {"logId": str(uuid.uuid4()), "errorCode": code, "errorMsg": message}


# For `Starlette(exception_handlers=...)`. What nobody foresaw is raised again, into the server's log, once answered.
HANDLERS: dict[Any, ExceptionHandler] = {  # by class
    GfldeployError: _answer,
    HTTPException: _answer,
    ClientDisconnect: _answer,
    Exception: _answer,
}


def _shown(text: str) -> str:
    text = printable(text, keep="")
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."
