"""What a request for detections is answered with."""

from __future__ import annotations

import functools
import json
import math

import numpy as np

from gfldeploy.detections import Detections
from gfldeploy.errors import EngineError
from gfldeploy.serve.loaded import Answer
from gfldeploy.serve.requests import DetectRequest, class_ids


def wanted(detections: Detections, request: DetectRequest) -> Detections:
    """Those that the request asks for. Raises `Problem` if it names a class that this detector does not have."""
    ids = class_ids(request.classes, detections.class_names)
    which = detections.scores >= request.threshold
    if ids is not None:
        which &= np.isin(detections.classes, ids)
    return detections if which.all() else detections.select(which)


def image_json(answer: Answer, request: DetectRequest) -> str:
    """One image of the response of `/v1/detect`, as JSON in ASCII. Nothing is rounded but times.

    `may_lack_below` as for `Detections`, left out if nothing that is shown may be missing. Put together by hand:
    objects for each box, encoded by `json`, take three times as long. Raises `Problem` as `wanted`, and `EngineError`.
    """
    found, times = wanted(answer.detections, request), answer.times
    finite = np.isfinite(found.boxes).all() and np.isfinite(found.scores).all()
    if not finite or found.may_lack_below == math.inf:  # which JSON cannot say
        raise EngineError("a box or a score is infinite", "The model or its precision is unusable: check its parity.")
    heads = _heads(found.class_names)
    rows = zip(found.classes.tolist(), found.scores.tolist(), found.boxes.tolist(), strict=True)
    shown = ",".join(
        [f'{heads[number]}{score},"box":[{x1},{y1},{x2},{y2}]}}' for number, score, (x1, y1, x2, y2) in rows]
    )
    lacks = f',"may_lack_below":{found.may_lack_below}' if found.may_lack_below > max(request.threshold, 0) else ""
    return (
        f'{{"height":{answer.size[0]},"width":{answer.size[1]},"detections":[{shown}],"times_ms":{{'
        f'"decode":{round(times.decode, 3)},"preprocess":{round(times.preprocess, 3)},"queue":{round(times.queue, 3)},'
        f'"infer":{round(times.infer, 3)}}}{lacks}}}'
    )


@functools.lru_cache(maxsize=4)
def _heads(class_names: tuple[str, ...]) -> tuple[str, ...]:
    """What comes before the score of a detection, by class id."""
    return tuple(
        f'{{"class":{json.dumps(name)},"class_id":{number},"score":' for number, name in enumerate(class_names)
    )
