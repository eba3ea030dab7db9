"""The share of FP32 detections that a quantised model finds again, without labels."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from gfldeploy.candidates import anchors_of, matched
from gfldeploy.detections import Detections
from gfldeploy.errors import ParityError
from gfldeploy.nms import NmsParams, pairwise_iou, postprocess

# PaddleDetection's deploy tools draw detections from 0.5 up; a little lower also counts those that may just miss it.
CONFIDENT = 0.4
_SAME_BOX = 0.5


@dataclass(frozen=True)
class Agreement:
    """Means over the images compared.

    `score_difference` and `score_difference_max`: absolute, over the candidates that both have, 1 if there are none.
    `detections`: how many the reference has with a score of 0.4 or more. `detections_found`: the share of these that
    have a detection of the same class, an IoU of 0.5 or more and a score of at least half of theirs; 1 where the
    reference has none.
    `convolutions`: how many ran in which precision, and `not_int8`: why some did not in INT8, both as the engine
    reports it; empty where it cannot.
    """

    score_difference: float
    score_difference_max: float
    detections: int
    detections_found: float
    convolutions: Mapping[str, int] = field(default_factory=dict)
    not_int8: Sequence[str] = ()


@dataclass(frozen=True)
class Reference:
    """Scores [1, A, C], boxes [1, A, 4], anchors [A] (-1: none) and detections of the FP32 model on one image."""

    scores: NDArray[np.float32]
    boxes: NDArray[np.float32]
    anchors: NDArray[np.int64]
    detections: Detections

    @property
    def confident(self) -> int:
        """How many detections are to be found again: those with a score of 0.4 or more."""
        return int((self.detections.scores >= CONFIDENT).sum())

    @classmethod
    def of(cls, outputs: Mapping[str, NDArray[Any]], nms: NmsParams) -> Self:
        (found,) = postprocess(outputs["scores"], outputs["boxes"], [(1.0, 1.0)], nms)
        return cls(outputs["scores"], outputs["boxes"], anchors_of(outputs, 0), found)


def agreement(
    references: Sequence[Reference], outputs: Iterable[Mapping[str, NDArray[Any]]], nms: NmsParams
) -> Agreement:
    """Compare the outputs of a model, image by image, with the reference's.

    Raises `ParityError` for NaN or no image.
    """
    if not references:
        raise ParityError("there is no image to compare INT8 with FP32 on", "Give calibration images.")
    means, largest, confident, found = [], 0.0, 0, 0
    for reference, output in zip(references, outputs, strict=True):
        check_finite(output)
        here, there = matched(reference.anchors, anchors_of(output, 0))
        difference = np.abs(reference.scores[0, here] - output["scores"][0, there]) if len(here) else np.ones(1)
        means.append(float(difference.mean()))
        largest = max(largest, float(difference.max()))
        (actual,) = postprocess(output["scores"], output["boxes"], [(1.0, 1.0)], nms)
        wanted = reference.detections.scores >= CONFIDENT
        confident += reference.confident
        for box, score, category in zip(
            reference.detections.boxes[wanted],
            reference.detections.scores[wanted],
            reference.detections.classes[wanted],
            strict=True,
        ):
            same = (actual.classes == category) & (actual.scores >= score / 2)
            found += bool((pairwise_iou(box[np.newaxis], actual.boxes[same]) >= _SAME_BOX).any())
    return Agreement(float(np.mean(means)), largest, confident, found / confident if confident else 1.0)


def check_finite(outputs: Mapping[str, NDArray[Any]]) -> None:
    """Raise `ParityError` if a quantised graph gives NaN or infinity."""
    if not all(np.isfinite(array).all() for array in outputs.values()):
        raise ParityError("the quantised graph gives NaN or infinity", "Calibrate with another --algo.")
