"""Is an INT8 model good enough to publish, by what was measured of it, and which of several is the best?

Decisions only: `measurement.py` runs the engines.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gfldeploy.accuracy import Accuracy
from gfldeploy.errors import DataError, EngineError, GfldeployError, ParityError
from gfldeploy.quant.agreement import Agreement

DEFAULT_MAX_DROP = 0.005
# Every sound calibration of the demo detector found all that FP32 finds (quant/README.md); a tenth is left for others.
DEFAULT_MIN_AGREEMENT = 0.9
# Below this share of the convolutions that were to run in INT8, the speed that it is for is not there.
MIN_INT8_SHARE = 0.9
# No engine: how the TensorRT file is measured, and what that is called everywhere.
SIMULATED_TENSORRT = "tensorrt, simulated"
# What engines make of the file without gfldeploy, which changes the graph before they load it.
PLAIN_ONNX_RUNTIME, PLAIN_OPENVINO = "onnxruntime, plain", "openvino, plain"

_REMEDY = "Try another --algo (auto tries several), more --samples, or calibration images like those you deploy on."


@dataclass(frozen=True)
class GateLimits:
    """What INT8 may lose and still be published.

    `max_drop`: with labels, the mAP that any engine may lose, absolute.
    `min_agreement`: without labels, the smallest share of the FP32 detections that every engine must find again. With 0
    nothing is required, not even that FP32 detects something to compare with.
    """

    max_drop: float = DEFAULT_MAX_DROP
    min_agreement: float = DEFAULT_MIN_AGREEMENT

    def __post_init__(self) -> None:
        for name, value in (("max_drop", self.max_drop), ("min_agreement", self.min_agreement)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name} must be from 0 to 1, not {value}")


@dataclass(frozen=True)
class Int8Measurement:
    """One INT8 engine against FP32: on calibration images, and, where there are labels, on evaluation images.

    The TensorRT file's, `SIMULATED_TENSORRT`, is what ONNX Runtime makes of it on the CPU.
    """

    agreement: Agreement
    accuracy: Accuracy | None = None


@dataclass(frozen=True)
class Candidate:
    """The result of one algorithm: what was measured, by engine, or why it failed."""

    algorithm: str
    engines: Mapping[str, Int8Measurement]
    error: GfldeployError | None = None

    def to_dict(self) -> dict[str, Any]:
        """As JSON-ready data."""
        return {
            "algorithm": self.algorithm,
            "error": self.error.problem if self.error else None,
            "engines": {
                name: {
                    "detections_found": one.agreement.detections_found,
                    "score_difference": one.agreement.score_difference,
                    "convolutions": dict(one.agreement.convolutions),
                    "ap": one.accuracy.ap if one.accuracy else None,
                }
                for name, one in self.engines.items()
            },
        }


def failure(
    engines: Mapping[str, Int8Measurement], fp32: Accuracy | None, limits: GateLimits, kept: int = 0
) -> GfldeployError | None:
    """The first reason not to publish, of the engine where it is worst, or None.

    `EngineError`: too little ran in INT8; `ParityError`: too much was lost.
    `fp32`: the accuracy of the FP32 model on the same images, if there are labels. Then mAP decides, and the agreement
    on calibration images does not. `kept`: how many convolutions are in float on purpose.
    """
    return _not_int8(engines, kept) or (
        _lost_agreement(engines, limits) if fp32 is None else _drop(engines, fp32, limits)
    )


def unjudgeable(detections: int, fp32: Accuracy | None, limits: GateLimits) -> GfldeployError | None:
    """Why the images cannot tell a good INT8 model from a bad one, as FP32 shows before any calibration, or None.

    `detections`: how many FP32 has on the calibration images that will be compared. `fp32`: as in `failure`.
    """
    if fp32 is not None:
        if fp32.ap > 0:
            return None
        return DataError(
            f"FP32 itself reaches mAP {max(fp32.ap, 0):.4f} on the evaluation images, so they cannot judge INT8",
            "Give annotations of what the detector was trained on, with its classes.",
        )
    if detections or limits.min_agreement == 0:
        return None
    return DataError(
        "FP32 detects nothing on the calibration images, so they cannot judge INT8",
        "Calibrate on images like those you deploy on, or give labels with --eval-data; --min-agreement 0 publishes "
        "unjudged.",
    )


def best(candidates: Sequence[Candidate], fp32: Accuracy | None, limits: GateLimits, kept: int = 0) -> Candidate:
    """The candidate whose worst engine is best; one that may be published is preferred to one that may not.

    By mAP if there are labels, else by the share of detections found again, then by the mean score difference. Of
    equals the first. `kept`: as in `failure`. Raises the first error if every candidate has one.
    """
    alive = [one for one in candidates if one.error is None]
    if not alive:
        raise next(one.error for one in candidates if one.error is not None)

    def rank(candidate: Candidate) -> tuple[bool, float, float]:
        measured = candidate.engines.values()
        quality = [
            (one.accuracy.ap if one.accuracy else one.agreement.detections_found, -one.agreement.score_difference)
            for one in measured
        ]
        return failure(candidate.engines, fp32, limits, kept) is None, *min(quality)

    return max(alive, key=rank)


def _not_int8(engines: Mapping[str, Int8Measurement], kept: int) -> EngineError | None:
    for name, one in engines.items():
        ran = one.agreement.convolutions  # empty where the engine cannot tell
        wanted = sum(ran.values()) - kept
        if ran and ran.get("int8", 0) < MIN_INT8_SHARE * wanted:
            others = ", ".join(f"{count} in {precision}" for precision, count in ran.items() if precision != "int8")
            purpose = f", {kept} of them on purpose" if kept else ""
            return EngineError(
                f"{name} runs only {ran.get('int8', 0)} of {sum(ran.values())} convolutions in int8 "
                f"({others}{purpose}): {MIN_INT8_SHARE:.0%}{' of the rest' if kept else ''} are needed",
                "Export the bundle again, and install the engine versions that gfldeploy's extras ask for.",
            )
    return None


def _drop(engines: Mapping[str, Int8Measurement], fp32: Accuracy, limits: GateLimits) -> ParityError | None:
    accuracies = {name: one.accuracy for name, one in engines.items() if one.accuracy is not None}
    if len(accuracies) < len(engines):
        raise ValueError("the accuracy was measured in FP32 but not in every INT8 engine")
    name, int8 = min(accuracies.items(), key=lambda item: item[1].ap)
    drop = fp32.ap - int8.ap
    if drop <= limits.max_drop:
        return None
    return ParityError(
        f"INT8 in {_place(name)} loses {drop:.4f} mAP (FP32 {fp32.ap:.4f}, INT8 {int8.ap:.4f}), "
        f"more than the {limits.max_drop:g} of --max-drop",
        _REMEDY,
    )


def _lost_agreement(engines: Mapping[str, Int8Measurement], limits: GateLimits) -> ParityError | None:
    name, worst = min(engines.items(), key=lambda item: item[1].agreement.detections_found)
    if worst.agreement.detections_found >= limits.min_agreement:
        return None
    return ParityError(
        f"INT8 in {_place(name)} finds only {worst.agreement.detections_found:.1%} of what FP32 finds on the "
        f"calibration images, less than the {limits.min_agreement:g} of --min-agreement",
        _REMEDY,
    )


def _place(name: str) -> str:
    return f"{name} by ONNX Runtime on the CPU," if name == SIMULATED_TENSORRT else name
