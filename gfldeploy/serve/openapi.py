"""The OpenAPI 3.1 description of the server: its limits and classes included, and every status that it answers with."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from gfldeploy import __version__
from gfldeploy.detection_options import DEFAULT_THRESHOLD
from gfldeploy.serve.problems import PADDLEX_PATH
from gfldeploy.serve.requests import BYTES_TYPE, FORM_TYPE, JSON_TYPE, LONGEST_TIMEOUT_MS, RequestLimits

_PROBLEMS: Mapping[int, str] = {
    400: "Malformed: a parameter, a class name, the body.",
    401: "There is no valid key in the request.",
    408: "The body did not come in time.",
    403: "The server was started without keys.",
    409: "It is under way already.",
    413: "The body is too large, or has too many images.",
    415: "A type of body that is not read.",
    422: "The body is read, and something in it cannot be used, such as the image.",
    429: "Too many images wait. Nothing was decoded.",
    500: "The server failed.",
    503: "It would not be in time, or the server is not ready. Nothing was decoded.",
}
_TRY_AGAIN = (429, 503)
_SCORE: Mapping[str, Any] = {"type": "number", "minimum": 0, "maximum": 1}
_BOX = {
    "type": "array",
    "items": {"type": "number"},
    "minItems": 4,
    "maxItems": 4,
    "description": "x1, y1, x2, y2 in pixels of the image, EXIF orientation applied.",
}
_BINARY = {"type": "string", "format": "binary"}
_RELOADED = {
    "type": "object",
    "properties": {
        "bundle": {"type": "string"},
        "digest": {"type": "string"},
        "golden": {"type": "string", "description": "How the bundle's golden picture came out."},
        "seconds": {"type": "number"},
    },
    "required": ["bundle", "digest", "golden", "seconds"],
}
_RELOAD_PROBLEMS = (403, 409, 500, 503)
_BASE64 = {"type": "string", "contentEncoding": "base64", "minLength": 1}


def openapi(
    limits: RequestLimits,
    class_names: Sequence[str],
    served: Collection[str],
    keys: bool = False,
    threshold: float = DEFAULT_THRESHOLD,
) -> dict[str, Any]:
    """The description of the paths that are `served`. `keys`: whether requests need one. `threshold`: of those that
    name none."""
    known: dict[str, dict[str, Any]] = {
        "/v1/detect": {"post": _detect(limits, class_names, threshold)},
        PADDLEX_PATH: {"post": _paddlex(class_names)},
        "/v1/model": {"get": _get("model", "What is served, and how it runs.", _ref("Model"), (503,))},
        "/v1/reload": {"post": _get("reload", "Load the bundle anew, compare, switch.", _RELOADED, _RELOAD_PROBLEMS)},
        "/health/live": {"get": _get("live", "The process is there.", _ref("Status"), ())},
        "/health/ready": {"get": _get("ready", "It is warm and answers.", _ref("Status"), (503,))},
        "/metrics": {"get": _text("metrics", "Counters for Prometheus.", "text/plain")},
        "/openapi.json": {"get": _get("openapi", "This description.", {"type": "object"}, ())},
        "/": {"get": _text("page", "A page to try it.", "text/html")},
    }
    paths = {path: methods for path, methods in known.items() if path in served}
    if keys:
        for path, methods in paths.items():
            if path.startswith("/v1/") or path in (PADDLEX_PATH, "/metrics"):
                for operation in methods.values():
                    operation["security"] = [{"bearer": []}, {"header": []}]
                    operation["responses"] |= _problems([401], path)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "gfldeploy serve",
            "version": __version__,
            "description": "Object detection in images. Errors have a code for programs and a remedy for people.",
        },
        "paths": paths,
        "components": {
            "schemas": _schemas(limits, class_names),
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "header": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
            }
            if keys
            else {},
        },
    }


def _ref(name: str) -> dict[str, Any]:
    return {"$ref": f"#/components/schemas/{name}"}


def _json(description: str, schema: Mapping[str, Any]) -> dict[str, Any]:
    return {"description": description, "content": {JSON_TYPE: {"schema": schema}}}


def _problems(statuses: Iterable[int], path: str = "") -> dict[str, Any]:
    found = {}
    for status in statuses:
        schema = _ref("PaddlexProblem" if path == PADDLEX_PATH else "Problem")
        found[str(status)] = _json(_PROBLEMS[status], schema)
        if status in _TRY_AGAIN:
            seconds = {"description": "Seconds until it may be tried again.", "schema": {"type": "integer"}}
            found[str(status)]["headers"] = {"Retry-After": seconds}
    return found


def _get(name: str, summary: str, schema: Mapping[str, Any], problems: Iterable[int]) -> dict[str, Any]:
    return {
        "operationId": name,
        "summary": summary,
        "responses": {"200": _json("Done.", schema), **_problems(problems)},
    }


def _text(name: str, summary: str, media_type: str) -> dict[str, Any]:
    content = {media_type: {"schema": {"type": "string"}}}
    return {
        "operationId": name,
        "summary": summary,
        "responses": {"200": {"description": "Done.", "content": content}},
    }


def _detect(limits: RequestLimits, class_names: Sequence[str], threshold: float) -> dict[str, Any]:
    number = {"type": "string", "pattern": "^[0-9]+$"}
    names: list[dict[str, Any]] = [{"enum": sorted(set(class_names))}] if class_names else []
    parameters = [
        ("threshold", {**_SCORE, "default": threshold}, "The lowest score of a detection."),
        (
            "timeout_ms",
            {"type": "number", "exclusiveMinimum": 0, "maximum": LONGEST_TIMEOUT_MS, "default": limits.timeout_ms},
            "The answer is wanted within so many milliseconds from the end of the body; what would be late is refused.",
        ),
        (
            "classes",
            {"type": "array", "minItems": 1, "items": {"anyOf": [*names, number]}},
            "Names or ids of the classes that are wanted, separated by commas; by default all.",
        ),
    ]
    files = {"type": "array", "items": _BINARY, "minItems": 1, "maxItems": limits.images}
    texts = {
        "type": "array",
        "items": {"type": "string", "contentEncoding": "base64"},
        "minItems": 1,
        "maxItems": limits.images,
    }
    return {
        "operationId": "detect",
        "summary": "Detect objects in one image or in several.",
        "description": "One image: its answer, or its error. Several: 200, and `images` has the answer or the error of "
        "each, in their order.",
        "parameters": [
            {
                "name": name,
                "in": "query",
                "description": text,
                "schema": schema,
                **({"style": "form", "explode": False} if name == "classes" else {}),
            }
            for name, schema, text in parameters
        ],
        "requestBody": {
            "required": True,
            "description": f"At most {limits.body_bytes:,} bytes, within {limits.body_s:g} s; images of any format "
            "that `gfldeploy predict` reads. Of a form every file is an image, whatever its name.",
            "content": {
                "image/*": {"schema": _BINARY},
                BYTES_TYPE: {"schema": _BINARY},
                FORM_TYPE: {"schema": {"type": "object", "required": ["images"], "properties": {"images": files}}},
                JSON_TYPE: {
                    "schema": {
                        "type": "object",
                        "required": ["images"],
                        "properties": {"images": texts},
                        "additionalProperties": False,
                    }
                },
            },
        },
        "responses": {
            "200": _json("What was found.", _ref("Detected")),
            **_problems((400, 408, 413, 415, 422, 429, 500, 503)),
        },
    }


def _paddlex(class_names: Sequence[str]) -> dict[str, Any]:
    most = len(class_names) - 1
    return {
        "operationId": "paddlexObjectDetection",
        "summary": "Detect objects in one image, with the field names of PaddleX's server.",
        "requestBody": {
            "required": True,
            "content": {JSON_TYPE: {"schema": _ref("PaddlexRequest")}},
        },
        "responses": {
            "200": _json("What was found.", _ref("PaddlexDetected")),
            **_problems((400, 408, 413, 415, 422, 429, 500, 503), PADDLEX_PATH),
        },
        "description": f"Class ids are 0 to {most}." if most >= 0 else "",
    }


def _object(
    required: Mapping[str, Any], optional: Mapping[str, Any] | None = None, closed: bool = False
) -> dict[str, Any]:
    schema = {"type": "object", "required": list(required), "properties": {**required, **(optional or {})}}
    return {**schema, "additionalProperties": False} if closed else schema


def _schemas(limits: RequestLimits, class_names: Sequence[str]) -> dict[str, Any]:
    text, number, whole = {"type": "string"}, {"type": "number"}, {"type": "integer", "minimum": 0}
    name = {"type": "string", "enum": sorted(set(class_names))} if class_names else text
    class_id = {**whole, "maximum": max(len(class_names) - 1, 0)}
    ms = {"type": "number", "minimum": 0}
    logged = {"logId": text, "errorCode": {"const": 0}, "errorMsg": {"const": "Success"}}
    lowest = {
        "description": "The lowest score: one for all classes, or one for each class id.",
        "anyOf": [
            _SCORE,
            {"type": "object", "propertyNames": {"enum": [str(one) for one in range(len(class_names))]}}
            | {"additionalProperties": _SCORE},
            {"type": "null"},
        ],
    }
    image = {
        **_BASE64,
        "description": "The content of an image file in base64. PaddleX takes addresses too; here they are refused.",
    }
    return {
        "Problem": _object(
            {"error": _object({"code": text, "message": text, "remedy": text}, closed=True)}, closed=True
        ),
        "Detection": _object({"class": name, "class_id": class_id, "score": _SCORE, "box": _BOX}, closed=True),
        "Image": _object(
            {
                "height": whole,
                "width": whole,
                "detections": {
                    "type": "array",
                    "items": _ref("Detection"),
                    "description": "Best first.",
                },
                "times_ms": {
                    **_object({"decode": ms, "preprocess": ms, "queue": ms, "infer": ms}),
                    "description": "Milliseconds of this image; infer: the network and NMS of its whole batch.",
                },
            },
            {
                "may_lack_below": {
                    **number,
                    "description": "Detections that score less may be missing: the graph decodes only so many anchors.",
                }
            },
            closed=True,
        ),
        "Detected": _object(
            {
                "images": {
                    "type": "array",
                    "items": {"anyOf": [_ref("Image"), _ref("Problem")]},
                    "minItems": 1,
                    "maxItems": limits.images,
                },
                "times_ms": {**_object({"total": ms}), "description": "Milliseconds of the request."},
            },
            closed=True,
        ),
        "Status": _object({"status": text}),
        "Model": {
            **_object({"classes": {"type": "array", "items": text}, "engine": text, "precision": text, "device": text}),
            "description": "The bundle with its digest, the classes by id, and how the engine runs it.",
        },
        "PaddlexRequest": _object(
            {"image": image},
            {
                "threshold": lowest,
                "visualize": {
                    "type": ["boolean", "null"],
                    "description": "Whether the answer has a picture with boxes, which takes time. By default it has.",
                },
            },
        ),
        "PaddlexDetected": _object(
            {
                **logged,
                "result": _object(
                    {
                        "detectedObjects": {
                            "type": "array",
                            "items": _object(
                                {"bbox": _BOX, "categoryId": class_id, "categoryName": name, "score": _SCORE}
                            ),
                        }
                    },
                    {"image": {**_BASE64, "description": "A JPEG with the boxes."}},
                ),
            }
        ),
        "PaddlexProblem": _object({"logId": text, "errorCode": {"type": "integer"}, "errorMsg": text}),
    }
