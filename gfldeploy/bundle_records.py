"""What the JSON files beside a bundle's manifest hold, as `serialization.check` reads it.

Keys that are not listed are allowed, as newer versions write more; nothing reads them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_COMPARISONS = [
    {
        "graph": str,
        "engine": str,
        "batch": int,
        "height": int,
        "width": int,
        "max_score_difference": float,
        "max_box_difference_px": float,
    }
]
_TOLERANCE = {"score?": float, "box_px?": float}
_AP = {"ap": float, "images?": int}
_AGREEMENTS = {
    str: {
        "score_difference": float,
        "score_difference_max": float,
        "detections": int,
        "detections_found": float,
        "convolutions?": {str: int},
        "not_int8?": [str],
    }
}
_ACCURACIES = {"fp32": {"ap": float, "images": int}, "engines": {str: _AP}}
_PARITY = {
    "reference?": str,
    "tolerance?": _TOLERANCE,
    "comparisons?": _COMPARISONS,
    "fp16?": {"tolerance?": _TOLERANCE, "comparisons?": _COMPARISONS, "left_out?": str},
    "end_to_end?": [
        {
            "graph": str,
            "engine": str,
            "reference": str,
            "batch": int,
            "height": int,
            "width": int,
            "detections": int,
            "missing": int,
            "max_score_difference": float,
            "max_box_difference_px": float,
        }
    ],
    "images?": [str],
    "engines?": _AGREEMENTS,
    "accuracy?": _ACCURACIES,
    "sizes?": [
        {"size": tuple[int, int], "problem": str | None, "engines?": _AGREEMENTS, "accuracy?": _ACCURACIES},
    ],
    "kept_float?": [{"name": str, "convolutions?": int, "why": str}],
    "speed?": {str: {"fp32_ms": float, "int8_ms": float, "ratio": float}},
    "evaluation?": {"images": int},
    "algorithms?": {
        "chosen": str,
        "tried": [
            {
                "algorithm": str,
                "error": str | None,
                "engines": {
                    str: {"ap": float | None, "detections_found": float, "score_difference": float},
                },
            }
        ],
    },
}
_SENSITIVITY = {
    "measure?": str,
    "images?": [str],
    "groups?": [
        {
            "name": str,
            "convolutions": int,
            "macs_share": float,
            "score_difference": float,
            "box_difference": float,
            "total": float,
        }
    ],
}
_RANGES = {"inputs": [float], "outputs": [{"low": float, "high": float}], "weights": [float]}
_CALIBRATION = {"algorithm": str, "images": {str: str}, "convolutions": {str: _RANGES}, "kept_float": [tuple[str, int]]}
_ARRAY = {"shape": [int], "dtype": str, "sha256": str}
_GOLDEN = {
    "picture": _ARRAY,
    "resized": _ARRAY,
    "im_shape": tuple[int, int],
    "scale_factor": tuple[float, float],
    "input": {**_ARRAY, "row": int, "values": [[float]]},
    "detections": [{"class_id": int, "class": str, "score": float, "box": tuple[float, float, float, float]}],
    "engine": str,
    "tolerance": {"score": float, "box_px": float, "missing?": float},
}
RECORDS: Mapping[str, Any] = {
    "golden/golden.json": _GOLDEN,
    "parity.json": _PARITY,
    "sensitivity.json": _SENSITIVITY,
    "layers.json": {str: str},
    "calibration.json": _CALIBRATION,
}
