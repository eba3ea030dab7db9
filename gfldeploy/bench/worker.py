"""Measures one cell in this process: `python -m gfldeploy.bench.worker`.

Reads a request as JSON from stdin, writes the answer as JSON to the path that the request names:
`{"run": ...}` or `{"accuracy": ...}`, or `{"reason": ..., "remedy": ...}` for a deliberate error. Anything else ends
the process with a traceback on stderr, for the runner to report.
"""

from __future__ import annotations

import ctypes
import json
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gfldeploy.accuracy import Accuracy, evaluate
from gfldeploy.bench.matrix import Cell
from gfldeploy.bench.records import build, plain
from gfldeploy.bench.results import Run, Settings
from gfldeploy.bench.timing import measure
from gfldeploy.bundle import Bundle
from gfldeploy.detections import postprocess
from gfldeploy.engines.base import (
    Engine,
    EngineOptions,
    ExecutedConvolution,
    Precision,
    ReportsPrecision,
    count_precisions,
    reasons,
)
from gfldeploy.engines.registry import open_engine
from gfldeploy.errors import DataError, EngineError, GfldeployError
from gfldeploy.files import write_json, write_text
from gfldeploy.images.coco import CocoDataset
from gfldeploy.images.decode import read_image
from gfldeploy.images.preprocess import Prepared, Preprocess

__all__ = ["AccuracyRequest", "TimingRequest", "main"]

_POSTPROCESSED = 8  # images whose postprocessing is timed
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class TimingRequest:
    """Time a cell on these images; the answer goes to `result`."""

    cell: Cell
    images: tuple[Path, ...]
    settings: Settings
    result: Path


@dataclass(frozen=True)
class AccuracyRequest:
    """Measure COCO accuracy at batch 1 (whatever the cell's batch size) on the first `limit` images, None for all.

    The numbers of images done and in all are written to `progress` as they change.
    """

    cell: Cell
    annotations: Path
    image_dir: Path | None
    limit: int | None
    result: Path
    progress: Path


def main() -> None:
    """Serve the one request on stdin."""
    _die_with_parent()
    message = json.load(sys.stdin)
    kind, content = message["kind"], message["request"]
    answer: dict[str, Any]
    if kind == "timing":
        request: TimingRequest | AccuracyRequest = build(TimingRequest, content, "request")
    elif kind == "accuracy":
        request = build(AccuracyRequest, content, "request")
    else:
        raise ValueError(f"unknown kind of request: {kind!r}")
    try:
        if isinstance(request, TimingRequest):
            answer = {"run": plain(_time(request))}
        else:
            answer = {"accuracy": plain(_accuracy(request))}
    except GfldeployError as error:
        answer = {"reason": error.problem, "remedy": error.remedy}
    write_json(request.result, answer)


def _time(request: TimingRequest) -> Run:
    import cv2

    cell = request.cell
    cv2.setNumThreads(cell.threads)
    bundle = Bundle.open(cell.bundle)
    batches = _prepare(request.images, bundle.manifest.preprocess, cell.batch_size)
    tensors = [batch.tensor for batch in batches]
    start = time.perf_counter()
    with open_engine(cell.engine, bundle, EngineOptions(cell.precision, cell.device, cell.threads)) as engine:
        load_s = time.perf_counter() - start
        start = time.perf_counter()
        engine.infer({"image": tensors[0]})
        first_ms = (time.perf_counter() - start) * 1e3
        settings = request.settings
        samples = measure(engine, tensors, settings.min_seconds, settings.min_count, settings.warmup)
        # Before anything else runs: to say what it executes, an engine may load the model a second time.
        peak_rss_mb = _peak_rss_mb()
        postprocess_ms = _time_postprocess(engine, batches, bundle)
        convolutions = _convolutions(engine, tensors[0])
        version = engine.version
    return Run(
        samples=samples,
        engine_version=version,
        load_s=load_s,
        first_inference_ms=first_ms,
        peak_rss_mb=peak_rss_mb,
        inputs_mb=sum(tensor.nbytes for tensor in tensors) / 1e6,
        decode_ms=tuple(value for batch in batches for value in batch.decode_ms),
        preprocess_ms=tuple(value for batch in batches for value in batch.preprocess_ms),
        postprocess_ms=postprocess_ms,
        convolutions=count_precisions(convolutions) if convolutions else None,
        not_low_precision=_not_low_precision(cell.precision, convolutions),
        padding_ratio=sum(batch.padded_pixels for batch in batches) / sum(batch.real_pixels for batch in batches),
    )


def _accuracy(request: AccuracyRequest) -> Accuracy:
    cell = request.cell
    bundle = Bundle.open(cell.bundle)
    manifest = bundle.manifest
    dataset = CocoDataset.load(request.annotations, request.image_dir, request.limit)

    def progress(done: int, total: int) -> None:
        write_text(request.progress, f"{done} {total}")

    with open_engine(cell.engine, bundle, EngineOptions(cell.precision, cell.device, cell.threads)) as engine:
        return evaluate(
            engine, dataset, manifest.preprocess, manifest.nms, manifest.classes, batch_size=1, progress=progress
        )


@dataclass(frozen=True)
class _Batch:
    tensor: NDArray[np.float32]
    scales: tuple[tuple[float, float], ...]
    real_pixels: int
    decode_ms: tuple[float, ...]
    preprocess_ms: tuple[float, ...]

    @property
    def padded_pixels(self) -> int:
        return self.tensor.size // 3


def _prepare(images: Sequence[Path], preprocess: Preprocess, batch_size: int) -> list[_Batch]:
    """Batches of the images in their order; the last is filled up from the beginning, so that all are of one size."""
    if not images:
        raise DataError("there are no images to measure on", "Give at least one.")
    count = -(-len(images) // batch_size) * batch_size
    paths = [images[number % len(images)] for number in range(count)]
    return [_prepare_batch(paths[start : start + batch_size], preprocess) for start in range(0, count, batch_size)]


def _prepare_batch(paths: Sequence[Path], preprocess: Preprocess) -> _Batch:
    prepared: list[Prepared] = []
    decode_ms, preprocess_ms = [], []
    for path in paths:
        start = time.perf_counter()
        image = read_image(path)
        decoded = time.perf_counter()
        prepared.append(preprocess(image))
        preprocess_ms.append((time.perf_counter() - decoded) * 1e3)
        decode_ms.append((decoded - start) * 1e3)
    return _Batch(
        tensor=preprocess.batch(prepared),
        scales=tuple(item.scale for item in prepared),
        real_pixels=sum(item.tensor.shape[1] * item.tensor.shape[2] for item in prepared),
        decode_ms=tuple(decode_ms),
        preprocess_ms=tuple(preprocess_ms),
    )


def _time_postprocess(engine: Engine, batches: Sequence[_Batch], bundle: Bundle) -> tuple[float, ...]:
    """Milliseconds per image of the NMS, over the first few images."""
    times: list[float] = []
    for batch in batches:
        outputs = engine.infer({"image": batch.tensor})
        for scores, boxes, scale in zip(outputs["scores"], outputs["boxes"], batch.scales, strict=True):
            start = time.perf_counter()
            postprocess(scores[np.newaxis], boxes[np.newaxis], [scale], bundle.manifest.nms)
            times.append((time.perf_counter() - start) * 1e3)
            if len(times) == _POSTPROCESSED:
                return tuple(times)
    return tuple(times)


def _convolutions(engine: Engine, tensor: NDArray[np.float32]) -> tuple[ExecutedConvolution, ...]:
    """Those of one inference; none where the engine cannot tell."""
    if not isinstance(engine, ReportsPrecision):
        return ()
    try:
        return engine.executed_convolutions({"image": tensor})
    except EngineError:
        return ()


def _not_low_precision(asked: Precision, convolutions: Sequence[ExecutedConvolution]) -> tuple[str, ...] | None:
    if asked == "fp32":
        return ()  # all of them, for that reason
    return reasons(convolutions) if convolutions else None


def _peak_rss_mb() -> float:
    # Not getrusage: its ru_maxrss starts with the memory of the process that started this one.
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    line = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024 / 1e6


def _die_with_parent() -> None:
    """Have the kernel kill this process when the runner goes away, however it does. Linux only; best effort."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    main()
