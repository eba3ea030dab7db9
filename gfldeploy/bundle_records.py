"""What the JSON files beside a bundle's manifest hold: checked before anything is made of them.

Keys that are not listed may be there, as newer versions write more; nothing reads them. What is listed and optional
ends in `?`. `read_json` has seen to it that numbers are finite, text is Unicode and nothing is nested without end.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gfldeploy.errors import BundleError

__all__ = ["RECORDS", "check_record"]

_OR_NULL = "or null"
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
_PARITY = {
    "reference?": str,
    "tolerance?": _TOLERANCE,
    "comparisons?": _COMPARISONS,
    "fp16?": {"tolerance?": _TOLERANCE, "comparisons?": _COMPARISONS, "left_out?": str},
    "images?": [str],
    "engines?": {
        str: {
            "score_difference": float,
            "score_difference_max": float,
            "detections": int,
            "detections_found": float,
            "convolutions?": {str: int},
            "not_int8?": [str],
        }
    },
    "accuracy?": {"fp32": {"ap": float, "images": int}, "engines": {str: _AP}},
    "kept_float?": [{"name": str, "convolutions?": int, "why": str}],
    "speed?": {str: {"fp32_ms": float, "int8_ms": float, "ratio": float}},
    "evaluation?": {"images": int},
    "algorithms?": {
        "chosen": str,
        "tried": [
            {
                "algorithm": str,
                "error": (str, _OR_NULL),
                "engines": {
                    str: {"ap": (float, _OR_NULL), "detections_found": float, "score_difference": float},
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
_CALIBRATION = {"algorithm": str, "images": {str: str}, "convolutions": {str: _RANGES}, "kept_float": [[(str, int)]]}
RECORDS: Mapping[str, Any] = {
    "parity.json": _PARITY,
    "sensitivity.json": _SENSITIVITY,
    "layers.json": {str: str},
    "calibration.json": _CALIBRATION,
}


def check_record(name: str, data: Any, where: Path) -> dict[str, Any]:
    """`data`, which the file `where`, a `name`, holds. Raises `BundleError` where gfldeploy writes no such thing."""
    _check(data, RECORDS[name], f"{where}: it")
    assert isinstance(data, dict)
    return data


def _check(value: Any, kind: Any, where: str) -> None:
    if isinstance(kind, tuple):
        if value is None and _OR_NULL in kind:
            return
        plain = [one for one in kind if one is not _OR_NULL]
        kind = next((one for one in plain if type(value) is one), plain[0])
    if isinstance(kind, dict):
        _need(isinstance(value, dict), where, "an object", value)
        for key, inner in kind.items():
            if key is str:
                for name, item in value.items():
                    _check(item, inner, f"{where}.{name:.60}")
                continue
            name = key.removesuffix("?")
            if name in value:
                _check(value[name], inner, f"{where}.{name}")
            else:
                _need(name != key, where, f"an object with {name}", value)
    elif isinstance(kind, list):
        _need(isinstance(value, list), where, "a list", value)
        for number, item in enumerate(value):
            _check(item, kind[0], f"{where}[{number}]")
    elif kind is float:
        _need(type(value) in (int, float), where, "a number", value)
    else:
        _need(type(value) is kind, where, "text" if kind is str else "a whole number", value)


def _need(right: bool, where: str, expected: str, value: object) -> None:
    if not right:
        place = where.replace(": it.", ": ", 1)
        raise BundleError(f"{place} is {value!r:.40} and not {expected}", "Export the bundle again.")
