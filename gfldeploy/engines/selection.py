"""Which engine runs a bundle, and how, where not everything is said."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

from gfldeploy.bundle import Bundle
from gfldeploy.engines.base import Device, EngineOptions, Obstacle, Precision, remedy_sentence
from gfldeploy.engines.hardware import usable_threads
from gfldeploy.engines.registry import ENGINES, PREFERRED_ENGINES, check_bundle, check_possible, obstacle_to
from gfldeploy.errors import UnsupportedError

# Images that are in the network at once by default. Each takes memory for its activations: GFL-R50 INT8 at 800x1088
# 0.2 GB (benchmarks/README.md, "Streams").
MOST_AT_ONCE = 16
# Pixels of one inference by default, where several small images in it are faster: half of what GFL-R50 has in one.
_BATCH_PIXELS = 700_000
_MOST_IN_BATCH = 4  # more gain next to nothing


def throughput_options(engine: str, options: EngineOptions, batch_size: int) -> EngineOptions:
    """These options with the streams and threads that suit throughput on the usable CPUs.

    Streams of one thread each lose least to waiting: on two CPUs a small network gains a quarter or more over one
    stream of all threads, a large one little (benchmarks/README.md, "Streams"). No more than 16 images are in the
    network at once, for their memory; with more CPUs a stream has several threads. One stream where the engine has no
    more.
    """
    if ENGINES[engine].obstacle_to_streams(options.device):
        return options
    usable = usable_threads()
    threads = math.ceil(usable / max(MOST_AT_ONCE // batch_size, 1))
    return replace(options, threads=threads, streams=usable // threads)


def throughput_batch(engine: str, device: Device, target_size: tuple[int, int]) -> int:
    """How many images of one inference suit throughput, of a network whose images are resized to (h, w) pixels.

    Several small ones where the engine gains by it, but no more than leave each usable CPU a stream; else one.
    """
    if device == "gpu" or not ENGINES[engine].small_batches:
        return 1
    fit = min(_BATCH_PIXELS // math.prod(target_size), MOST_AT_ONCE // usable_threads(), _MOST_IN_BATCH)
    return max(fit, 1)


def select_engine(
    bundle: Bundle,
    engine: str | None = None,
    precision: Precision | None = None,
    device: Device | None = None,
    threads: int | None = None,
    cache_dir: Path | None = None,
    tf32: bool | None = None,
    streams: int | None = None,
) -> tuple[str, EngineOptions, str]:
    """The engine, its options, and in words why this engine.

    What is None: the engine is the fastest of those that can run the bundle here, the precision is that of the bundle,
    the device is the CPU, one inference runs at once, several share all threads, and TF32 is not used. Raises
    `UnsupportedError` where nothing here can run it, and `EngineError` for more streams than fit.
    """
    precision, device = precision or bundle.manifest.precision, device or "cpu"
    streams = 1 if streams is None else streams
    threads = max(usable_threads() // max(streams, 1), 1) if threads is None else threads
    options = EngineOptions(precision, device, threads, cache_dir, tf32=bool(tf32), streams=streams)
    if engine is not None:
        check_possible(engine, bundle, options)
        return engine, options, "as asked for"
    if problem := check_bundle(bundle, precision):
        raise UnsupportedError(f"{precision} is not possible: {problem.reason}", remedy_sentence(problem.remedy))
    refused: dict[str, Obstacle] = {}
    for name in PREFERRED_ENGINES:
        obstacle = obstacle_to(name, bundle, precision, device)
        if obstacle is None and streams > 1:
            obstacle = ENGINES[name].obstacle_to_streams(device)
        if obstacle:
            refused[name] = obstacle
            continue
        others = "".join(f"; {other}: {why.reason}" for other, why in refused.items())
        reason = f"first of {', '.join(PREFERRED_ENGINES)} that runs {precision} on {device} here{others}"
        return name, options, reason
    reasons = "; ".join(f"{name}: {why.reason}" for name, why in refused.items())
    able = (name for name in refused if not isinstance(ENGINES[name].graph(precision, device), Obstacle))
    remedy = refused[next(able, PREFERRED_ENGINES[0])].remedy
    raise UnsupportedError(f"no engine runs {precision} on {device}: {reasons}", remedy_sentence(remedy))
