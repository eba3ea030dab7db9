"""What an engine reaches on this machine at best: convolutions that suit it, and next to nothing between them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil

from gfldeploy.bench.results import Peak
from gfldeploy.bench.roofline_graph import Stack
from gfldeploy.engines.base import Device, Engine, EngineOptions, Tensors, reasons
from gfldeploy.engines.registry import graph_for, open_engine
from gfldeploy.errors import EngineError, GfldeployError
from gfldeploy.files import scratch_directory

__all__ = ["measure_peak"]

# A GPU gets enough of them to hide the copy of the small image.
_STACKS: dict[Device, Stack] = {"cpu": Stack(depth=8, batch=1), "gpu": Stack(depth=32, batch=32)}
_WARMUP = 2
_LEAST_RUNS = 5
# Each of the two arrays of a copy has so many times the size of the last-level cache, if that much memory is free.
_CACHES = 4
_LEAST_COPY_BYTES = 256 * 10**6
_MOST_OF_FREE_MEMORY = 0.125


def measure_peak(engine: str, options: EngineOptions, seconds: float = 2.0) -> Peak:
    """Time a stack of convolutions in the engine, then a copy in memory, for about `seconds` each.

    The stack is a bundle that the engine opens like any other, so that it runs with the same options. Call this in a
    process of its own: the engine's library stays loaded, and Paddle is switched to static graphs for a moment.
    What fails is None in the result, for the reason given there. The MACs are those of direct convolution: an engine
    that needs fewer, by Winograd's algorithm, may exceed what its arithmetic units can do.
    """
    problems: list[str] = []

    def attempt(what: str, measure: Callable[[], float]) -> float | None:
        try:
            return measure()
        except GfldeployError as error:
            problems.append(f"{what}: {error.problem}")
        except Exception as error:  # noqa: BLE001 - whatever Paddle or onnx raise: a peak less is no reason to stop
            problems.append(" ".join(f"{what}: {type(error).__name__}: {error}".split()))
        return None

    gmac_per_s = attempt("convolutions", lambda: _gmac_per_s(engine, options, seconds))
    memory_gb_per_s = None
    if options.device == "cpu":
        memory_gb_per_s = attempt("memory", lambda: _copy_gb_per_s(_copy_bytes(), options.threads, seconds))
    else:
        problems.append("memory: the bandwidth of GPU memory is not measured")
    return Peak(gmac_per_s, memory_gb_per_s, "; ".join(problems) or None)


def _gmac_per_s(engine: str, options: EngineOptions, seconds: float) -> float:
    """10^9 multiply-accumulates a second, by the median of the runs. Raises `GfldeployError`."""
    stack = _STACKS[options.device]
    inputs = {"image": stack.image()}
    with scratch_directory() as folder:
        bundle = stack.write(folder / "peak", graph_for(engine, options.precision, options.device), options.precision)
        with open_engine(engine, bundle, options) as opened:
            _check_precision(opened, inputs, stack.depth)
            for _ in range(_WARMUP):
                opened.infer(inputs)
            times = _times(lambda: opened.infer(inputs), seconds)
    return stack.macs / statistics.median(times) / 1e9


def _check_precision(engine: Engine, inputs: Tensors, depth: int) -> None:
    """Raise `EngineError` if the engine can tell what it ran, and fewer than `depth` convolutions ran as asked."""
    found = engine.executed_convolutions(inputs)
    ran = sum(one.precision == engine.options.precision for one in found)
    if found and ran < depth:
        raise EngineError(f"{ran} of {len(found)} ran in {engine.options.precision}: {'; '.join(reasons(found))}")


def _times(run: Callable[[], object], seconds: float) -> list[float]:
    """Of one call after the other, in seconds, until `seconds` have passed, and of at least five."""
    times: list[float] = []
    while len(times) < _LEAST_RUNS or sum(times) < seconds:
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return times


def _copy_bytes() -> int:
    """The size of an array that is large beside the last-level cache and small beside the free memory."""
    caches = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    largest = max((_kibibytes(path) * 1024 for path in caches), default=0)
    most = int(psutil.virtual_memory().available * _MOST_OF_FREE_MEMORY)
    return min(max(_CACHES * largest, _LEAST_COPY_BYTES), most)


def _kibibytes(path: Path) -> int:
    """Of a cache: Linux writes "266240K"."""
    return int(path.read_text(encoding="utf-8").strip().removesuffix("K"))


def _copy_gb_per_s(size: int, threads: int, seconds: float) -> float:
    """10^9 bytes a second, read and written, of the fastest copy of `size` bytes; numpy copies without the GIL.

    Counted as STREAM does (McCalpin 1995): what a cache reads before it overwrites it is not counted.
    """
    count = size // threads // np.dtype(np.float64).itemsize
    # Not zeros: pages that were never written are one and the same, and stay in the cache.
    parts = [(np.ones(count), np.ones(count)) for _ in range(threads)]
    with ThreadPoolExecutor(threads) as pool:
        best = min(_times(lambda: list(pool.map(lambda part: np.copyto(part[1], part[0]), parts)), seconds))
    return sum(source.nbytes + target.nbytes for source, target in parts) / best / 1e9
