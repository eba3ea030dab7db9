"""Measuring what becomes of an image's time as the batch grows: the same images in batches of different sizes.

Every batch size is run twice, as the images are listed and grouped by input size, interleaved with batch 1 and with
each other. What differs between the two of one size is padding alone; what differs between grouped batches of two sizes
is the batch size alone, since each image costs the same arithmetic in both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gfldeploy.batching.buckets import Group, Order, Size, group, padding
from gfldeploy.bench.monitor import OthersUse
from gfldeploy.bench.stages import BatchTimes, time_batch
from gfldeploy.bundle import Bundle
from gfldeploy.engines.base import Engine, TimesConvolutions
from gfldeploy.errors import DataError
from gfldeploy.images.decode import read_image
from gfldeploy.machine import usable_threads

__all__ = ["Arrangement", "Pass", "Progress", "arrangements", "input_sizes", "measure_passes", "run_pass"]

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Arrangement:
    """One way to split the images into batches: at most `batch_size` each, in this order."""

    batch_size: int
    order: Order


@dataclass(frozen=True)
class Pass:
    """All images once in one arrangement; times in milliseconds of one image, means over the images.

    `inference_ms`: the network; `end_to_end_ms`: from file to detections, timed around all of it. `taken`: the share,
    0 to 1, of the CPUs that the engine was to have, which others used or which are not there. `padding`: pixels of the
    batches by those of their images, each padded to the network's stride alone. `convolution_share`: of the inference,
    0 to 1, in batches of one size; None in others and where the engine cannot tell.
    """

    arrangement: Arrangement
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
    def host_ms(self) -> float:
        """Decoding, preprocessing, copies and NMS."""
        return self.decode_ms + self.preprocess_ms + self.copy_ms + self.postprocess_ms


def arrangements(batch_sizes: Sequence[int]) -> list[Arrangement]:
    """Batch 1, then each larger size as listed and grouped by size."""
    orders: tuple[Order, ...] = ("listed", "bucketed")
    larger = [size for size in sorted(set(batch_sizes)) if size > 1]
    return [Arrangement(1, "listed"), *(Arrangement(size, order) for size in larger for order in orders)]


def input_sizes(paths: Sequence[Path], bundle: Bundle) -> list[Size]:
    """Of the network's input for each image by itself. Raises `DataError` for none, and for one that cannot be read."""
    if not paths:
        raise DataError("there are no images to measure on", "Give at least one.")
    return [bundle.manifest.preprocess.input_size(*read_image(path).shape[:2]) for path in paths]


def measure_passes(
    engine: Engine,
    paths: Sequence[Path],
    bundle: Bundle,
    chosen: Sequence[Arrangement],
    rounds: int,
    progress: Progress = lambda done, total: None,
) -> list[list[Pass]]:
    """Every arrangement once in each round, in turn, after an inference of every shape; a list for each round.

    A batch that the images do not fill is filled up with its own, so that every inference has the batch size asked for,
    and counts by the images that were in it before. Raises `DataError` and `EngineError`.
    """
    if rounds < 1 or not chosen:
        raise ValueError("there must be at least one round and one arrangement")
    import cv2

    cv2.setNumThreads(engine.options.threads)
    sizes = input_sizes(paths, bundle)
    planned = {one: group(sizes, one.batch_size, one.order) for one in chosen}
    total, done = len(chosen) * (rounds + 1), 0
    shares: dict[Arrangement, float | None] = {}
    for one, groups in planned.items():
        progress(done, total)
        shares[one] = _warm_up(engine, paths, bundle, one, groups)
        done += 1
    measured: list[list[Pass]] = []
    for number in range(rounds):
        turn = number % len(chosen)
        found: dict[Arrangement, Pass] = {}
        for one in (*chosen[turn:], *chosen[:turn]):
            progress(done, total)
            found[one] = run_pass(engine, paths, bundle, one, planned[one], sizes, shares[one])
            done += 1
        measured.append([found[one] for one in chosen])
    progress(total, total)
    return measured


def _warm_up(
    engine: Engine, paths: Sequence[Path], bundle: Bundle, arrangement: Arrangement, groups: Sequence[Group]
) -> float | None:
    """Run one batch of every shape; the share of the convolutions in the shape that most images are in."""
    most_common = max(groups, key=lambda one: sum(len(other.indices) for other in groups if other.size == one.size))
    for one in {one.size: one for one in groups}.values():
        time_batch(engine, _filled(paths, one, arrangement.batch_size), bundle)
    grouped = arrangement.order == "bucketed" or arrangement.batch_size == 1
    if not grouped or not isinstance(engine, TimesConvolutions):
        return None
    preprocess = bundle.manifest.preprocess
    images = [preprocess(read_image(path)) for path in _filled(paths, most_common, arrangement.batch_size)]
    return engine.convolution_share({"image": preprocess.batch(images)})


def run_pass(
    engine: Engine,
    paths: Sequence[Path],
    bundle: Bundle,
    arrangement: Arrangement,
    groups: Sequence[Group],
    sizes: Sequence[Size],
    share: float | None = None,
) -> Pass:
    """All images once in these `groups`; `sizes` are the images', `share` that of the convolutions. Warm up before."""
    times: list[BatchTimes] = []
    others = OthersUse()
    for one in groups:
        times.append(time_batch(engine, _filled(paths, one, arrangement.batch_size), bundle))
    taken = max(others.share(), 1 - usable_threads() / engine.options.threads)
    weights = np.array([len(one.indices) for one in groups]) / arrangement.batch_size / len(paths)
    mean = BatchTimes(*(float(value) for value in weights @ np.array(times)))
    return Pass(
        arrangement,
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
