"""How much faster INT8 is on this machine: FP32 and INT8 of one engine interleaved in one process, on one image.

A hint beside the accuracy, not a benchmark: `gfldeploy bench` runs each cell in a process of its own.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gfldeploy.bundle import Bundle
from gfldeploy.engines.base import Engine, EngineOptions
from gfldeploy.engines.registry import capability, open_engine

_WARMUP = 2
_MIN_ROUNDS = 5
_MIN_SECONDS = 2.0


@dataclass(frozen=True)
class Speed:
    """Median milliseconds of one inference of one image in `engine`.

    `all_int8_ms`: with nothing kept in float; None where nothing is. `note`: why INT8 cannot be expected to be fast
    on this processor, if so.
    """

    engine: str
    fp32_ms: float
    int8_ms: float
    all_int8_ms: float | None = None
    note: str | None = None

    @property
    def ratio(self) -> float:
        """How many times as fast as FP32 INT8 is: below 1 it is slower."""
        return self.fp32_ms / self.int8_ms

    def to_dict(self) -> dict[str, Any]:
        """As JSON-ready data, without the engine."""
        data = {"fp32_ms": self.fp32_ms, "int8_ms": self.int8_ms, "ratio": self.ratio}
        optional = {"all_int8_ms": self.all_int8_ms, "note": self.note if self.ratio < 1 else None}
        return data | {name: value for name, value in optional.items() if value}

    def lines(self) -> list[str]:
        """One line, and another for everything that the user should know."""
        if self.ratio >= 1:
            told = [f"{self.engine}: INT8 runs {self.ratio:.1f} times as fast as FP32 on one calibration image"]
        else:
            told = [
                f"{self.engine}: INT8 is SLOWER than FP32 on one calibration image: {self.int8_ms:.1f} ms against "
                f"{self.fp32_ms:.1f} ms"
            ]
            told.append(f"note: {self.note or 'deploy FP32 in this engine on processors like this one'}")
        if self.all_int8_ms is not None:
            told.append(
                f"{self.engine}: the layers in float make it {self.int8_ms:.1f} ms an image, instead of "
                f"{self.all_int8_ms:.1f} ms"
            )
        return told


def measure_speed(
    name: str, fp32: Bundle, int8: Bundle, all_int8: Bundle | None, batch: NDArray[np.float32], threads: int
) -> Speed:
    """Time engine `name` on `batch` [1, 3, H, W]; takes seconds. Raises `EngineError`."""
    bundles = {"fp32": fp32, "int8": int8} | ({"all_int8": all_int8} if all_int8 else {})
    with ExitStack() as stack:
        engines = {
            key: stack.enter_context(
                open_engine(name, bundle, EngineOptions("fp32" if key == "fp32" else "int8", "cpu", threads))
            )
            for key, bundle in bundles.items()
        }
        medians = interleaved_medians(engines, batch)
    return Speed(name, medians["fp32"], medians["int8"], medians.get("all_int8"), capability(name, "int8", "cpu").note)


def interleaved_medians(
    engines: Mapping[str, Engine],
    batch: NDArray[np.float32],
    min_rounds: int = _MIN_ROUNDS,
    min_seconds: float = _MIN_SECONDS,
) -> dict[str, float]:
    """Median milliseconds of each engine, with one inference of each in every round: other load slows all alike.

    Stops after `min_rounds` rounds and `min_seconds` seconds; two inferences of each engine are warm-up.
    """
    for engine in engines.values():
        for _ in range(_WARMUP):
            engine.infer({"image": batch})
    times: dict[str, list[float]] = {key: [] for key in engines}
    start = time.perf_counter()
    rounds = 0
    while rounds < min_rounds or time.perf_counter() - start < min_seconds:
        for key, engine in engines.items():
            before = time.perf_counter_ns()
            engine.infer({"image": batch})
            times[key].append((time.perf_counter_ns() - before) / 1e6)
        rounds += 1
    return {key: statistics.median(values) for key, values in times.items()}
