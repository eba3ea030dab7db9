"""`/object-detection`: requests and answers with the field names of PaddleX's basic server, for its clients."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from typing import Any

import anyio.to_thread
import numpy as np
from numpy.typing import NDArray
from starlette.requests import Request

from gfldeploy.detection_options import Shown
from gfldeploy.detections import Detections
from gfldeploy.images.decode import decode_image, load_cv2
from gfldeploy.predict.draw import draw_boxes
from gfldeploy.predict.engine_selection import Choice
from gfldeploy.serve.answers import wanted
from gfldeploy.serve.problems import Problem, paddlex_record
from gfldeploy.serve.requests import JSON_TYPE, RequestLimits, content_type, from_base64, read_json

_QUALITY = 92
# PaddleX's own, for its detectors of page layouts. Others it ignores, and so does this.
_REFUSED = ("layoutNms", "layoutUnclipRatio", "layoutMergeBboxesMode")


@dataclass(frozen=True)
class PaddlexRequest:
    """What a client of PaddleX asks for.

    `thresholds`: the lowest score by class id; of other classes `threshold`, None for the server's. `visualize`: a
    picture with the boxes.
    """

    image: bytes
    threshold: float | None
    thresholds: dict[int, float]
    visualize: bool


async def read_paddlex_request(request: Request, limits: RequestLimits) -> PaddlexRequest:
    """Read a request for `/object-detection`. Raises `Problem`: 400, 408, 413, 415 or 422, 503 from `BodyGuard`."""
    if (kind := content_type(request)) not in ("", JSON_TYPE):
        raise Problem(415, "unsupported_type", f"a body of type {kind[:80]} is not read here", f"Send {JSON_TYPE}.")
    content = await read_json(request, limits)
    for name in _REFUSED:
        if content.get(name) not in (None, False):
            raise _invalid(f"{name} is not supported", "It is for detectors of page layouts: leave it out.")
    image = content.get("image")
    if not isinstance(image, str) or not image:
        raise _invalid('"image" is missing, or no text', "Give the content of an image file in base64.")
    asked = content.get("threshold")
    threshold = None if asked is None or isinstance(asked, dict) else _score(asked)
    by_class = {_class_id(word): _score(value) for word, value in asked.items()} if isinstance(asked, dict) else {}
    visualize = content.get("visualize")
    if not isinstance(visualize, bool | None):
        raise _invalid('"visualize" is not true or false', "Give one of them, or leave it out.")
    # PaddleX's server draws unless told otherwise, and its published clients read the picture.
    return PaddlexRequest(await from_base64(image), threshold, by_class, visualize is not False)


def _invalid(problem: str, remedy: str) -> Problem:
    return Problem(422, "invalid", problem, remedy)


def _score(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise _invalid(f"the threshold is {str(value)[:40]!r}", "Give a number from 0 to 1, or one for each class id.")
    return float(value)


def _class_id(word: str) -> int:
    if not (word.isascii() and word.isdigit() and len(word) <= 9):
        raise _invalid(f"the threshold of {word[:40]!r} is of no class id", "Give ids, as texts: JSON has no others.")
    return int(word)


async def paddlex_answer(
    detections: Detections, request: PaddlexRequest, choice: Choice, limiter: anyio.CapacityLimiter
) -> Any:
    """The body of the answer. `choice`: what has found them. `limiter`: of how many pictures are drawn at once."""
    names = detections.class_names
    lowest = list(choice.detection.shown(names, request.threshold).lowest)
    for number, threshold in request.thresholds.items():
        if number >= len(names):
            raise _invalid(f"there is no class {number}", f"Ids are 0 to {len(names) - 1}.")
        lowest[number] = choice.detection.shown(names, threshold).lowest[number]
    found = wanted(detections, Shown(tuple(lowest)), choice.manifest.nms.keep_top_k)
    rows = zip(found.names, found.classes.tolist(), found.scores.tolist(), found.boxes.tolist(), strict=True)
    result: dict[str, Any] = {
        "detectedObjects": [
            {"bbox": box, "categoryId": number, "categoryName": name, "score": score}
            for name, number, score, box in rows
        ]
    }
    if request.visualize:
        jpeg = await anyio.to_thread.run_sync(_drawn, request.image, found, limiter=limiter)
        result["image"] = base64.b64encode(jpeg).decode()
    return {**paddlex_record(0, "Success"), "result": result}


def _drawn(content: bytes, detections: Detections) -> bytes:
    """The image as JPEG, with boxes."""
    drawn: NDArray[np.uint8] = draw_boxes(decode_image(content), detections.records())
    cv2 = load_cv2()
    try:
        encoded, data = cv2.imencode(".jpg", drawn[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, _QUALITY])
    except cv2.error:
        encoded = False
    if not encoded:  # sides of more than 65,535 pixels
        raise Problem(422, "image", "the picture with boxes cannot be a JPEG", 'Give "visualize": false.')
    return bytes(data)
