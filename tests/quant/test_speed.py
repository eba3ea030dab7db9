"""FP32 and INT8 interleaved."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from gfldeploy.quant.speed import Speed, interleaved_medians

BATCH = np.zeros((1, 3, 32, 32), np.float32)


class Sleeper:
    """An engine that takes `seconds`; the first inference, as real ones, much longer."""

    def __init__(self, seconds: float, log: list[float]) -> None:
        self.seconds = seconds
        self.log = log
        self.fresh = True

    def infer(self, inputs: Mapping[str, NDArray[np.float32]]) -> dict[str, NDArray[np.float32]]:
        assert inputs["image"] is BATCH
        time.sleep(self.seconds * (20 if self.fresh else 1))
        self.fresh = False
        self.log.append(self.seconds)
        return {}


def test_engines_take_turns() -> None:
    log: list[float] = []
    engines: dict[str, Any] = {"fp32": Sleeper(0.004, log), "int8": Sleeper(0.002, log)}
    medians = interleaved_medians(engines, BATCH, min_rounds=3, min_seconds=0.05)
    warm, timed = log[:4], log[4:]
    assert warm == [0.004, 0.004, 0.002, 0.002]
    assert timed == [0.004, 0.002] * (len(timed) // 2)
    assert len(timed) >= 2 * 3
    assert 4 <= medians["fp32"] < 20, "warm-up does not count"
    assert 2 <= medians["int8"] < medians["fp32"]


def test_at_least_so_many_rounds() -> None:
    log: list[float] = []
    interleaved_medians({"one": Sleeper(0.001, log)}, BATCH, min_rounds=5, min_seconds=0.0)  # type: ignore[dict-item]
    assert len(log) == 2 + 5


def test_what_is_told_of_speed() -> None:
    fast = Speed("onnxruntime", 310.0, 100.0)
    assert fast.lines() == ["onnxruntime: INT8 runs 3.1 times as fast as FP32 on one calibration image"]
    assert fast.to_dict() == {"fp32_ms": 310.0, "int8_ms": 100.0, "ratio": pytest.approx(3.1)}
    slow = Speed("paddle", 100.0, 125.0, note="this CPU has neither VNNI nor AMX")
    assert slow.lines() == [
        "paddle: INT8 is SLOWER than FP32 on one calibration image: 125.0 ms against 100.0 ms",
        "note: this CPU has neither VNNI nor AMX",
    ]
    assert slow.to_dict()["note"] == slow.note
    assert "deploy FP32" in Speed("paddle", 100.0, 125.0).lines()[1]
    mended = Speed("paddle", 100.0, 50.0, 40.0)
    assert mended.lines()[1] == "paddle: the layers in float make it 50.0 ms an image, instead of 40.0 ms"
    assert mended.to_dict()["all_int8_ms"] == 40.0
