"""What a request for detections is answered with."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Sequence

import numpy as np

from gfldeploy.detection_options import AS_CONFIGURED, DetectionOptions, Shown
from gfldeploy.detections import Detections
from gfldeploy.errors import EngineError
from gfldeploy.serve.loaded import Answer
from gfldeploy.serve.requests import DetectRequest, class_ids


def shown_of(request: DetectRequest, detection: DetectionOptions, class_names: Sequence[str]) -> Shown:
    """What is shown to whoever asks. Raises `Problem` for a class that this detector does not have or keep."""
    ids = class_ids(request.classes, class_names, detection)
    shown = detection.shown(class_names, request.threshold)
    if ids is None:
        return shown
    return Shown(tuple(one if number in ids else math.inf for number, one in enumerate(shown.lowest)))


def image_json(
    answer: Answer, request: DetectRequest, detection: DetectionOptions = AS_CONFIGURED, most: int = -1
) -> str:
    """One image of the response of `/v1/detect`, as JSON in ASCII. Nothing is rounded but times.

    `detection`: of the server. `most`: as for `wanted`. `may_lack_below` as for `Detections`, left out if nothing that
    is shown may be missing. Put together by hand: objects for each box, encoded by `json`, take three times as long.
    Raises `Problem` as `shown_of`, and `EngineError`.
    """
    shown = shown_of(request, detection, answer.detections.class_names)
    found, times = wanted(answer.detections, shown, most), answer.times
    finite = np.isfinite(found.boxes).all() and np.isfinite(found.scores).all()
    if not finite or found.may_lack_below == math.inf:  # which JSON cannot say
        raise EngineError("a box or a score is infinite", "The model or its precision is unusable: check its parity.")
    heads = _heads(found.class_names)
    rows = zip(found.classes.tolist(), found.scores.tolist(), found.boxes.tolist(), strict=True)
    entries = ",".join(
        [f'{heads[number]}{score},"box":[{x1},{y1},{x2},{y2}]}}' for number, score, (x1, y1, x2, y2) in rows]
    )
    lacks = f',"may_lack_below":{found.may_lack_below}' if shown.lacks(found) else ""
    return (
        f'{{"height":{answer.size[0]},"width":{answer.size[1]},"detections":[{entries}],"times_ms":{{'
        f'"decode":{round(times.decode, 3)},"preprocess":{round(times.preprocess, 3)},"queue":{round(times.queue, 3)},'
        f'"infer":{round(times.infer, 3)}}}{lacks}}}'
    )


def wanted(detections: Detections, shown: Shown, most: int) -> Detections:
    """Those that are shown, the `most` best (-1: all): with thresholds of single classes NMS leaves more."""
    places = shown.places(detections)
    if most != -1:
        places = places[:most]
    return detections if len(places) == len(detections) else detections.select(places)


@functools.lru_cache(maxsize=4)
def _heads(class_names: tuple[str, ...]) -> tuple[str, ...]:
    """What comes before the score of a detection, by class id."""
    return tuple(
        f'{{"class":{json.dumps(name)},"class_id":{number},"score":' for number, name in enumerate(class_names)
    )
