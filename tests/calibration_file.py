"""Reads a calibration back, which only tests do."""

from __future__ import annotations

from typing import Any

from gfldeploy.bundle_records import RECORDS
from gfldeploy.quant.calibration import Calibration, ConvRanges, ConvUse
from gfldeploy.serialization import build, check

__all__ = ["calibration_from"]


def calibration_from(data: Any) -> Calibration:
    """The inverse of `Calibration.to_dict`. Raises `DataError` where the data is none."""
    check(RECORDS["calibration.json"], data, "calibration.json")
    ranges = {key: build(ConvRanges, entry, f"calibration.json: {key}") for key, entry in data["convolutions"].items()}
    kept = frozenset(ConvUse(*use) for use in data["kept_float"])
    return Calibration(data["algorithm"], data["images"], ranges, kept)
