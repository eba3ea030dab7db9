"""Which engine runs a bundle, and how, where not everything is said."""

from __future__ import annotations

from pathlib import Path

from gfldeploy.bundle import Bundle
from gfldeploy.engines.base import Device, EngineOptions, Precision
from gfldeploy.engines.hardware import usable_threads
from gfldeploy.engines.registry import check_possible, preferred_engine

__all__ = ["select_engine"]


def select_engine(
    bundle: Bundle,
    engine: str | None = None,
    precision: Precision | None = None,
    device: Device | None = None,
    threads: int | None = None,
    cache_dir: Path | None = None,
) -> tuple[str, EngineOptions, str]:
    """The engine, its options, and in words why this engine.

    What is None: the engine is the preferred one of those that can run the bundle, the precision is that of the
    bundle, the device is the CPU, and all threads are used. Raises `UnsupportedError` where nothing here can run it.
    """
    options = EngineOptions(
        precision or bundle.manifest.precision, device or "cpu", threads or usable_threads(), cache_dir=cache_dir
    )
    if engine is None:
        engine, why = preferred_engine(bundle, options.precision, options.device)
        return engine, options, why
    check_possible(engine, bundle, options)
    return engine, options, "as asked for"
