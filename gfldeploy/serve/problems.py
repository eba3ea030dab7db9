"""What a request is answered with when it cannot be served: a status, a code for programs, and the remedy."""

from __future__ import annotations

import math
from collections.abc import Mapping

from starlette.responses import JSONResponse, Response

from gfldeploy.errors import DataError, EngineError, GfldeployError, RejectedError, Rejection

_REJECTIONS: Mapping[Rejection, tuple[int, str]] = {
    "queue full": (429, "queue_full"),
    "deadline": (503, "deadline"),
    "closed": (503, "not_ready"),
}


class Problem(Exception):  # noqa: N818 - an answer, not a mistake of ours
    """An answer other than what was asked for. `retry_after`: seconds after which it may be tried again."""

    def __init__(
        self, status: int, code: str, message: str, remedy: str | None = None, retry_after: float | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.remedy, self.retry_after = status, code, message, remedy, retry_after

    def body(self) -> dict[str, object]:
        """The JSON of every error."""
        return {"error": {"code": self.code, "message": self.message, "remedy": self.remedy}}


def problem_of(error: BaseException) -> Problem:
    """The problem that this error is to whoever sent the request."""
    if isinstance(error, Problem):
        return error
    if isinstance(error, RejectedError):
        status, code = _REJECTIONS[error.reason]
        return Problem(status, code, error.problem, error.remedy, retry_after=1)
    if isinstance(error, DataError):
        return Problem(422, "image", error.problem, error.remedy)
    if isinstance(error, EngineError):
        return Problem(500, "engine", error.problem, error.remedy)
    if isinstance(error, GfldeployError):
        return Problem(400, "request", error.problem, error.remedy)
    return Problem(500, "internal", "something unforeseen went wrong", "See the log of the server.")


def problem_response(problem: Problem) -> Response:
    """The response that says so."""
    headers = {} if problem.retry_after is None else {"Retry-After": str(math.ceil(problem.retry_after))}
    return JSONResponse(problem.body(), problem.status, headers)
