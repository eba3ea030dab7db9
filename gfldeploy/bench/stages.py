"""Whole batches from file to detections, stage by stage."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from gfldeploy.bench.results import Stages
from gfldeploy.bundle import Bundle
from gfldeploy.detections import postprocess
from gfldeploy.engines.base import CopyTimes, Engine, TimesCopies
from gfldeploy.images.decode import read_image

__all__ = ["BatchTimes", "time_batch", "time_stages"]


class BatchTimes(NamedTuple):
    """Milliseconds of one batch from file to detections; what they are of is said at `results.Stages`."""

    decode_ms: float
    preprocess_ms: float
    input_copy_ms: float
    inference_ms: float
    output_copy_ms: float
    postprocess_ms: float
    end_to_end_ms: float


def time_stages(engine: Engine, paths: Sequence[Path], bundle: Bundle, batch_size: int, min_seconds: float) -> Stages:
    """Time the stages of batches of the images in their order, over and over, until `min_seconds` have passed.

    At least two batches, and nothing overlaps: the stages of one batch follow each other. The engine is warm already.
    Raises `DataError` and `EngineError`.
    """
    rows: list[BatchTimes] = []
    began = time.perf_counter()
    while len(rows) < 2 or time.perf_counter() - began < min_seconds:
        first = len(rows) * batch_size
        chosen = [paths[number % len(paths)] for number in range(first, first + batch_size)]
        rows.append(time_batch(engine, chosen, bundle))
    return Stages(*zip(*rows, strict=True))


def time_batch(engine: Engine, paths: Sequence[Path], bundle: Bundle) -> BatchTimes:
    """Run one batch of these image files, one stage after the other. Raises `DataError` and `EngineError`."""
    preprocess, nms = bundle.manifest.preprocess, bundle.manifest.nms
    start = time.perf_counter()
    images = [read_image(path) for path in paths]
    decoded = time.perf_counter()
    tensor, scales = preprocess.batch_of(images)
    preprocessed = time.perf_counter()
    if isinstance(engine, TimesCopies):
        outputs, copies = engine.infer_timed({"image": tensor})
        inferred = time.perf_counter()
    else:
        outputs = engine.infer({"image": tensor})
        inferred = time.perf_counter()
        copies = CopyTimes(0.0, (inferred - preprocessed) * 1e3, 0.0)
    postprocess(outputs["scores"], outputs["boxes"], scales, nms)
    end = time.perf_counter()
    return BatchTimes(
        decode_ms=(decoded - start) * 1e3,
        preprocess_ms=(preprocessed - decoded) * 1e3,
        input_copy_ms=copies.input_copy_ms,
        inference_ms=copies.inference_ms,
        output_copy_ms=copies.output_copy_ms,
        postprocess_ms=(end - inferred) * 1e3,
        end_to_end_ms=(end - start) * 1e3,
    )
