"""Measuring what becomes of an image's time as the batch grows: the same images in batches of different sizes.

Every batch size is run twice, with the images listed and bucketed, interleaved with batch 1 and with each other. The
two of one size differ by padding alone. Bucketed batches of two sizes differ by the batch size alone, since each image
costs the same arithmetic in both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gfldeploy.batching.buckets import STREAM_ORDERS, Group, Order, Size, group, padding
from gfldeploy.bench.monitor import OthersUse
from gfldeploy.bench.timing import BatchTimes, time_batch
from gfldeploy.bundle import Bundle
from gfldeploy.engines.base import Engine
from gfldeploy.engines.hardware import usable_threads
from gfldeploy.errors import DataError
from gfldeploy.images.decode import read_image
from gfldeploy.progress import SILENT, Progress


@dataclass(frozen=True)
class Pass:
    """All images once, in batches of at most `batch_size` in one order; milliseconds of one image, as means.

    `inference_ms`: the network; `end_to_end_ms`: from file to detections, timed around all of it. `taken`: the share,
    0 to 1, of the CPUs for the engine that others used or that are not there. `padding`: pixels of the batches by those
    of their images, each padded to the network's stride alone. `convolution_share`: of the inference, 0 to 1, in
    batches of one input size; None in others, and if the engine cannot tell.
    """

    batch_size: int
    order: Order
    decode_ms: float
    preprocess_ms: float
    copy_ms: float
    inference_ms: float
    postprocess_ms: float
    end_to_end_ms: float
    taken: float
    padding: float
    convolution_share: float | None

    @property
    def convolutions_ms(self) -> float:
        """Of the inference; 0 if unknown."""
        return self.inference_ms * (self.convolution_share or 0.0)

    @property
    def host_ms(self) -> float:
        """Decoding, preprocessing, copies and NMS."""
        return self.decode_ms + self.preprocess_ms + self.copy_ms + self.postprocess_ms


def batch_orders(batch_sizes: Sequence[int]) -> list[tuple[int, Order]]:
    """Batch 1, then each larger batch size with the images listed and bucketed. Raises `ValueError` for one below 1."""
    if min(batch_sizes, default=1) < 1:
        raise ValueError(f"batch sizes must be at least 1, not {min(batch_sizes)}")
    larger = sorted({size for size in batch_sizes if size > 1})
    return [(1, "listed"), *((size, order) for size in larger for order in STREAM_ORDERS)]


def input_sizes(paths: Sequence[Path], bundle: Bundle) -> list[Size]:
    """Of the network's input for each image by itself. Raises `DataError` for none, and for one that cannot be read."""
    if not paths:
        raise DataError("there are no images to measure on", "Give at least one.")
    return [bundle.manifest.preprocess.input_size(*read_image(path).shape[:2]) for path in paths]


def measure_passes(
    engine: Engine,
    paths: Sequence[Path],
    bundle: Bundle,
    chosen: Sequence[tuple[int, Order]],
    rounds: int,
    progress: Progress = SILENT,
) -> list[list[Pass]]:
    """A pass of every chosen batch size and order in each round, after an inference of every shape; by round.

    Each round begins with the next one. A batch that is not full is filled up with its own images, so that every
    inference has the given batch size, and counts as the images that it had. Raises `DataError` and
    `EngineError`.
    """
    if rounds < 1 or not chosen:
        raise ValueError("there must be at least one round and one batch size")
    import cv2

    cv2.setNumThreads(engine.options.threads)
    sizes = input_sizes(paths, bundle)
    total = len(chosen) * (rounds + 1)
    shares: dict[tuple[int, Order], float | None] = {}
    for done, (batch_size, order) in enumerate(chosen):
        progress.step("passes", done, total)
        shares[batch_size, order] = _warm_up(engine, paths, bundle, sizes, batch_size, order)
    measured: list[list[Pass]] = []
    for number in range(1, rounds + 1):
        turn = (number - 1) % len(chosen)
        found: dict[tuple[int, Order], Pass] = {}
        for one in (*chosen[turn:], *chosen[:turn]):
            progress.step("passes", number * len(chosen) + len(found), total)
            found[one] = run_pass(engine, paths, bundle, sizes, *one, shares[one])
        measured.append([found[one] for one in chosen])
    progress.step("passes", total, total)
    return measured


def _warm_up(
    engine: Engine, paths: Sequence[Path], bundle: Bundle, sizes: Sequence[Size], batch_size: int, order: Order
) -> float | None:
    """Run one batch of every shape; the share of the convolutions in the shape that most images are in."""
    groups = group(sizes, batch_size, order)
    for one in {one.size: one for one in groups}.values():
        time_batch(engine, _filled(paths, one, batch_size), bundle)
    if order == "listed" and batch_size > 1:
        return None
    most_common = max(groups, key=lambda one: sum(len(other.indices) for other in groups if other.size == one.size))
    images = [read_image(path) for path in _filled(paths, most_common, batch_size)]
    return engine.convolution_share({"image": bundle.manifest.preprocess.batch_of(images)[0]})


def run_pass(
    engine: Engine,
    paths: Sequence[Path],
    bundle: Bundle,
    sizes: Sequence[Size],
    batch_size: int,
    order: Order,
    share: float | None = None,
) -> Pass:
    """All images once in batches; `sizes` are the images', `share` that of the convolutions. Warm up before."""
    groups = group(sizes, batch_size, order)
    others = OthersUse()
    times = [time_batch(engine, _filled(paths, one, batch_size), bundle) for one in groups]
    taken = max(others.share(), 1 - usable_threads() / engine.options.threads)
    weights = np.array([len(one.indices) for one in groups]) / batch_size / len(paths)
    mean = BatchTimes(*(float(value) for value in weights @ np.array(times)))
    return Pass(
        batch_size,
        order,
        decode_ms=mean.decode_ms,
        preprocess_ms=mean.preprocess_ms,
        copy_ms=mean.input_copy_ms + mean.output_copy_ms,
        inference_ms=mean.inference_ms,
        postprocess_ms=mean.postprocess_ms,
        end_to_end_ms=mean.end_to_end_ms,
        taken=taken,
        padding=padding(groups, sizes),
        convolution_share=share,
    )


def _filled(paths: Sequence[Path], one: Group, batch_size: int) -> list[Path]:
    return [paths[one.indices[number % len(one.indices)]] for number in range(batch_size)]
