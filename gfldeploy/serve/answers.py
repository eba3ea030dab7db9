"""What a request for detections is answered with."""

from __future__ import annotations

from typing import Any

from gfldeploy.detections import Detections
from gfldeploy.serve.loaded import Answer
from gfldeploy.serve.requests import DetectRequest, class_ids


def wanted(detections: Detections, request: DetectRequest) -> Detections:
    """Those that the request asks for. Raises `Problem` if it names a class that this detector does not have."""
    ids = class_ids(request.classes, detections.class_names)
    kept = detections.at_least(request.threshold)
    return kept if ids is None else kept.of_classes(*ids)


def image_record(answer: Answer, request: DetectRequest) -> dict[str, Any]:
    """One image of the response of `/v1/detect`. Nothing is rounded but times. Raises `Problem` as `wanted` does.

    `may_lack_below` as for `Detections`, left out if nothing that is shown may be missing.
    """
    found = wanted(answer.detections, request)
    rows = zip(found.names, found.classes.tolist(), found.scores.tolist(), found.boxes.tolist(), strict=True)
    record: dict[str, Any] = {
        "height": answer.size[0],
        "width": answer.size[1],
        "detections": [
            {"class": name, "class_id": number, "score": score, "box": box} for name, number, score, box in rows
        ],
        "times_ms": {stage: round(ms, 3) for stage, ms in vars(answer.times).items()},
    }
    if found.may_lack_below > max(request.threshold, 0):
        record["may_lack_below"] = found.may_lack_below
    return record
