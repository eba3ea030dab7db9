"""Which engine runs a bundle, and how, where not everything is said."""

from __future__ import annotations

from pathlib import Path

from gfldeploy.bundle import Bundle
from gfldeploy.engines.base import Device, EngineOptions, Obstacle, Precision, remedy_sentence
from gfldeploy.engines.hardware import usable_threads
from gfldeploy.engines.registry import ENGINES, PREFERRED_ENGINES, check_bundle, check_possible, obstacle_to
from gfldeploy.errors import UnsupportedError


def select_engine(
    bundle: Bundle,
    engine: str | None = None,
    precision: Precision | None = None,
    device: Device | None = None,
    threads: int | None = None,
    cache_dir: Path | None = None,
    tf32: bool | None = None,
) -> tuple[str, EngineOptions, str]:
    """The engine, its options, and in words why this engine.

    What is None: the engine is the fastest of those that can run the bundle here, the precision is that of the bundle,
    the device is the CPU, all threads are used, and TF32 is not. Raises `UnsupportedError` where nothing here can run
    it.
    """
    precision, device = precision or bundle.manifest.precision, device or "cpu"
    options = EngineOptions(
        precision, device, usable_threads() if threads is None else threads, cache_dir, tf32=bool(tf32)
    )
    if engine is not None:
        check_possible(engine, bundle, options)
        return engine, options, "as asked for"
    if problem := check_bundle(bundle, precision):
        raise UnsupportedError(f"{precision} is not possible: {problem.reason}", remedy_sentence(problem.remedy))
    refused: dict[str, Obstacle] = {}
    for name in PREFERRED_ENGINES:
        if obstacle := obstacle_to(name, bundle, precision, device):
            refused[name] = obstacle
            continue
        others = "".join(f"; {other}: {why.reason}" for other, why in refused.items())
        reason = f"first of {', '.join(PREFERRED_ENGINES)} that runs {precision} on {device} here{others}"
        return name, options, reason
    reasons = "; ".join(f"{name}: {why.reason}" for name, why in refused.items())
    able = (name for name in refused if not isinstance(ENGINES[name].graph(precision, device), Obstacle))
    remedy = refused[next(able, PREFERRED_ENGINES[0])].remedy
    raise UnsupportedError(f"no engine runs {precision} on {device}: {reasons}", remedy_sentence(remedy))
