"""Errors as clients see them: one shape, whatever failed."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from gfldeploy.errors import BundleError, DataError, EngineError, RejectedError
from gfldeploy.serve.problems import HANDLERS, PADDLEX_PATH, Problem, json_response, problem_of


def answer_to(
    error: Exception | None = None, method: str = "POST", path: str = "/a", route: str = "/a"
) -> httpx.Response:
    """What an application answers in which a route raises this error."""

    async def failing(request: Request) -> Response:
        if error is not None:
            raise error
        return json_response({"name": "\ud800 \u4e2d"})

    app = Starlette(routes=[Route(route, failing, methods=["POST"])], exception_handlers=HANDLERS)

    async def send() -> httpx.Response:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
            return await client.request(method, path)

    return asyncio.run(send())


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (RejectedError("full", "Wait.", "queue full"), 429, "queue_full"),
        (RejectedError("late", "Wait.", "deadline"), 503, "deadline"),
        (RejectedError("closed", "Wait.", "closed"), 503, "not_ready"),
        (DataError("no image", "Send one."), 422, "image"),
        (EngineError("NaN", "Check it."), 500, "engine"),
        (BundleError("damaged", "Export again."), 500, "failed"),
        (Problem(418, "teapot", "it is one", "Use another."), 418, "teapot"),
        (ZeroDivisionError("secret"), 500, "internal"),
    ],
)
def test_every_error_has_a_status_a_code_and_a_remedy(error: Exception, status: int, code: str) -> None:
    answer = answer_to(error)
    assert answer.status_code == status
    assert answer.headers["content-type"] == "application/json"
    told = answer.json()["error"]
    assert told["code"] == code
    assert told["message"]
    assert told["remedy"]
    assert "secret" not in answer.text
    assert ("retry-after" in answer.headers) == (status in (429, 503))
    assert problem_of(error).body() == answer.json()


def test_errors_of_routing_have_the_same_shape() -> None:
    missing = answer_to(path="/nowhere")
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "not_found")
    wrong = answer_to(method="GET")
    assert (wrong.status_code, wrong.json()["error"]["code"]) == (405, "method_not_allowed")
    assert wrong.headers["allow"] == "POST"


@pytest.mark.parametrize("error", [DataError("no image", "Send one."), ZeroDivisionError(), Problem(413, "x", "large")])
def test_clients_of_paddlex_see_errors_in_its_shape(error: Exception) -> None:
    answer = answer_to(error, "POST", PADDLEX_PATH, PADDLEX_PATH)
    told: dict[str, Any] = answer.json()
    assert set(told) == {"logId", "errorCode", "errorMsg"}
    assert told["errorCode"] == answer.status_code
    assert told["errorMsg"]
    assert set(answer_to(None, "GET", PADDLEX_PATH, PADDLEX_PATH).json()) == set(told)


def test_names_that_are_no_text_do_not_break_the_answer() -> None:
    assert answer_to().json() == {"name": "\ud800 \u4e2d"}


def test_a_long_message_is_cut() -> None:
    assert len(answer_to(DataError("x" * 10_000)).json()["error"]["message"]) <= 500


def test_seconds_are_rounded_up() -> None:
    assert answer_to(Problem(503, "x", "y", retry_after=1.2)).headers["retry-after"] == "2"
