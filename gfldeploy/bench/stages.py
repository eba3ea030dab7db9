"""Whole batches from file to detections, stage by stage."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from gfldeploy.bench.results import Stages
from gfldeploy.bundle import Bundle
from gfldeploy.detections import postprocess
from gfldeploy.engines.base import CopyTimes, Engine, TimesCopies
from gfldeploy.images.decode import read_image

__all__ = ["time_stages"]


def time_stages(engine: Engine, paths: Sequence[Path], bundle: Bundle, batch_size: int, min_seconds: float) -> Stages:
    """Time the stages of batches of the images in their order, over and over, until `min_seconds` have passed.

    At least two batches, and nothing overlaps: the stages of one batch follow each other. The engine is warm already.
    Raises `DataError` and `EngineError`.
    """
    preprocess, nms = bundle.manifest.preprocess, bundle.manifest.nms
    rows: list[tuple[float, ...]] = []
    began = time.perf_counter()
    while len(rows) < 2 or time.perf_counter() - began < min_seconds:
        first = len(rows) * batch_size
        chosen = [paths[number % len(paths)] for number in range(first, first + batch_size)]
        start = time.perf_counter()
        images = [read_image(path) for path in chosen]
        decoded = time.perf_counter()
        prepared = [preprocess(image) for image in images]
        tensor = preprocess.batch(prepared)
        preprocessed = time.perf_counter()
        if isinstance(engine, TimesCopies):
            outputs, copies = engine.infer_timed({"image": tensor})
            inferred = time.perf_counter()
        else:
            outputs = engine.infer({"image": tensor})
            inferred = time.perf_counter()
            copies = CopyTimes(0.0, (inferred - preprocessed) * 1e3, 0.0)
        postprocess(outputs["scores"], outputs["boxes"], [item.scale for item in prepared], nms)
        end = time.perf_counter()
        rows.append(
            (
                (decoded - start) * 1e3,
                (preprocessed - decoded) * 1e3,
                copies.input_copy_ms,
                copies.inference_ms,
                copies.output_copy_ms,
                (end - inferred) * 1e3,
                (end - start) * 1e3,
            )
        )
    return Stages(*zip(*rows, strict=True))
