"""The OpenAPI description is true: requests made from it, right ones and wrong ones, get answers that it describes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis
from conftest import CLASSES
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import CHECKS
from schemathesis.generation import GenerationMode
from served import contents, serving, talk
from starlette.applications import Starlette
from starlette.routing import Route

from gfldeploy.serve.app import create_app
from gfldeploy.serve.openapi import openapi
from gfldeploy.serve.requests import RequestLimits

LIMITS = RequestLimits(timeout_ms=60_000)
EXAMPLES = 10  # of each operation and mode
# An answer has the schema and type that are described for its status; wrong requests are refused, none is a crash.
USED = (
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
    "response_headers_conformance",
    "negative_data_rejection",
    "unsupported_method",
)


@pytest.fixture(scope="module")
def app(tiny_bundle: Path) -> Iterator[Starlette]:
    with serving(tiny_bundle) as service:
        yield create_app(service, LIMITS)


def test_every_route_is_described(app: Starlette) -> None:
    served = {
        (route.path, method)
        for route in app.routes
        if isinstance(route, Route)
        for method in (route.methods or set()) - {"HEAD"}
    }
    paths = openapi(LIMITS, CLASSES, {path for path, _ in served})["paths"]
    described = {(path, method.upper()) for path, methods in paths.items() for method in methods}
    assert served - described == {("/page.css", "GET"), ("/page.js", "GET")}  # parts of the page
    assert described <= served


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
def test_requests_made_from_the_description(app: Starlette, mode: GenerationMode) -> None:
    schema = schemathesis.openapi.from_asgi("/openapi.json", app)
    checks = [CHECKS.get_one(name) for name in USED]
    statuses: set[int] = set()
    for result in schema.get_all_operations():
        operation: Any = result.ok()  # type: ignore[union-attr]  # none is malformed
        if mode is GenerationMode.NEGATIVE and operation.method == "get":
            continue  # nothing in them can be wrong

        @given(case=operation.as_strategy(mode))
        @settings(
            max_examples=EXAMPLES,
            deadline=None,
            database=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        )
        def ask(case: Any) -> None:
            response = case.call()
            statuses.add(response.status_code)
            late = response.status_code == 503 and b'"deadline"' in response.content  # of the milliseconds it was given
            assert response.status_code < 500 or late
            case.validate_response(response, checks=checks)

        ask()
    assert statuses & {400, 422}


def test_what_is_found_is_as_described(app: Starlette, tiny_coco: Path) -> None:
    schema = schemathesis.openapi.from_asgi("/openapi.json", app)
    image, *_ = contents(tiny_coco)

    async def ask(client: httpx.AsyncClient) -> list[httpx.Response]:
        return [await client.post("/v1/detect", content=image), await client.get("/v1/model")]

    found, model = talk(app, ask)
    assert found.json()["images"][0]["detections"]
    schema["/v1/detect"]["POST"].validate_response(found)
    schema["/v1/model"]["GET"].validate_response(model)


def test_the_limits_and_the_classes_are_in_it() -> None:
    text = json.dumps(openapi(RequestLimits(images=7), CLASSES, {"/v1/detect"}))
    assert '"maxItems": 7' in text
    assert '"ball"' in text
    keyed = openapi(LIMITS, CLASSES, {"/", "/v1/detect"}, keys=True)
    assert keyed["paths"]["/v1/detect"]["post"]["security"]
    assert "security" not in keyed["paths"]["/"]["get"]
