"""Whole batches from file to detections, stage by stage."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from gfldeploy.bench.results import Stages
from gfldeploy.bench.timing import Settings
from gfldeploy.bundle import Bundle
from gfldeploy.detections import postprocess
from gfldeploy.engines.base import Engine
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


def time_stages(engine: Engine, batches: Sequence[Sequence[Path]], bundle: Bundle, settings: Settings) -> Stages:
    """Time the stages of these batches of image files, in whole passes, so that every cell is timed on the same images.

    Passes go on until `min_seconds` of the settings have passed, and on until `tail_count` batches are timed or
    `max_seconds` have passed. Nothing overlaps: the stages of a batch follow each other, and the batches too. The
    engine must be warm for their shapes. Raises `DataError` and `EngineError`.
    """
    rows: list[BatchTimes] = []
    began = time.perf_counter()
    while True:
        rows += [time_batch(engine, paths, bundle) for paths in batches]
        seconds = time.perf_counter() - began
        if seconds >= settings.min_seconds and (len(rows) >= settings.tail_count or seconds >= settings.max_seconds):
            return Stages(*zip(*rows, strict=True))


def time_batch(engine: Engine, paths: Sequence[Path], bundle: Bundle) -> BatchTimes:
    """Run one batch of these image files, one stage after the other. Raises `DataError` and `EngineError`."""
    preprocess, nms = bundle.manifest.preprocess, bundle.manifest.nms
    start = time.perf_counter()
    images = [read_image(path) for path in paths]
    decoded = time.perf_counter()
    tensor, scales = preprocess.batch_of(images)
    preprocessed = time.perf_counter()
    outputs, copies = engine.infer_timed({"image": tensor})
    inferred = time.perf_counter()
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
