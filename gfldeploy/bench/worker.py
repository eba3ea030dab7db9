"""Measures one thing in this process: `python -m gfldeploy.bench.worker`.

Answers a `Task` of the runner (see `child_process.serve`) with an object that has its kind as the only key.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from gfldeploy.accuracy import Accuracy, batch_shapes, measure_accuracy
from gfldeploy.batching.buckets import Order, union
from gfldeploy.batching.tiles import InTiles
from gfldeploy.bench.cell import Cell
from gfldeploy.bench.cpu_parity import compare_with_cpu, open_reference, write_reference
from gfldeploy.bench.inputs import (
    Batch,
    by_itself,
    make_batches,
    padding_ratio,
    placed,
    prepare_images,
    shape_counts,
    tile_batches,
)
from gfldeploy.bench.monitor import Monitor
from gfldeploy.bench.results import Idle, Peak, Run
from gfldeploy.bench.roofline import measure_peak
from gfldeploy.bench.scenarios import serve as serve_arrivals
from gfldeploy.bench.timing import Settings, measure, time_stages
from gfldeploy.bundle import Bundle
from gfldeploy.child_process import PARENT, serve
from gfldeploy.engines.base import (
    Engine,
    EngineOptions,
    ExecutedConvolution,
    Shape,
    Tensors,
    count_precisions,
    reasons,
)
from gfldeploy.engines.registry import open_by_itself, open_engine
from gfldeploy.engines.selection import throughput_options
from gfldeploy.errors import EngineError
from gfldeploy.images.coco import CocoDataset
from gfldeploy.images.preprocess import Preprocess
from gfldeploy.serialization import build, plain
from gfldeploy.system import peak_memory_mb


@dataclass(frozen=True)
class Task:
    """What to measure of a cell, whose bundle is the directory `bundle`.

    timing: on these `images`; `idle`: how the machine was before. accuracy: COCO's of images none of which is padded to
    another, whatever the cell's batch size, on the first `accuracy_limit` images (None: all) of the `annotations`.
    peak: what the engine reaches at best. `engine_cache`: where engines keep what they compiled. reference: writes the
    outputs of a few of the `images` into the file `reference`, with which timing compares its own, and what wrote them
    is `reference_by`; `not_compared`: why it does not, though it should.
    """

    kind: Literal["reference", "timing", "accuracy", "peak"]
    cell: Cell
    bundle: Path = Path()
    images: tuple[Path, ...] = ()
    settings: Settings = field(default_factory=lambda: Settings(0, 1, 0))
    idle: Idle = field(default_factory=lambda: Idle(0.0, None, 0.0))
    annotations: Path = Path()
    image_dir: Path | None = None
    accuracy_limit: int | None = None
    engine_cache: Path | None = None
    reference: Path | None = None
    reference_by: str = ""
    not_compared: str | None = None


@dataclass(frozen=True)
class CpuOutputs:
    """What wrote the outputs to compare with, in words."""

    by: str


@dataclass(frozen=True)
class Timed:
    """A run, and the sizes of its images, or of their tiles, as resized, (height, width) in pixels, once for each."""

    run: Run
    image_sizes: tuple[tuple[int, int], ...]


def _answer(message: dict[str, Any]) -> dict[str, Any]:
    task = build(Task, message, "task")
    measure: Callable[[Task], object] = {
        "reference": _reference, "timing": _time, "accuracy": _accuracy, "peak": _peak,
    }[task.kind]  # fmt: skip
    return {task.kind: plain(measure(task))}


def _time(task: Task) -> Timed:
    import cv2

    cell, settings = task.cell, task.settings
    cv2.setNumThreads(cell.threads)
    bundle = Bundle.open(task.bundle).at_size(cell.input_size)
    preprocess = bundle.manifest.preprocess
    cut = _cut(cell)
    images = [] if cut else prepare_images(task.images, preprocess)
    # A server forms its batches as images arrive.
    timed = images[: cell.batch_size] if cell.scenario == "server" else images
    of_images: list[list[int]] | None = None
    if cut:
        batches, of_images = _in_tiles(task.images, preprocess, cut)
    else:
        batches = make_batches(timed, preprocess, cell.batch_size, cell.order)
    if cell.end_to_end:
        batches = [by_itself(batch, task.images, preprocess) for batch in batches]
    started = datetime.now(UTC).isoformat(timespec="seconds")
    start = time.perf_counter()
    shapes = [batch.shape for batch in batches]
    if cell.scenario == "server":  # any number of images up to the batch size, of any sizes
        sizes = [preprocess.padded_size(*image.tensor.shape[1:]) for image in images]
        shapes += [*((1, *size) for size in sizes), (cell.batch_size, *union(sizes))]
    with _open(cell, bundle, shapes, task.engine_cache) as engine:
        load_s = time.perf_counter() - start
        start = time.perf_counter()
        engine.infer(batches[0].inputs)
        first_ms = (time.perf_counter() - start) * 1e3
        batches = [placed(batch, engine) for batch in batches]
        parity = None
        if task.reference is not None:
            parity = compare_with_cpu(engine, batches, task.reference, task.reference_by, bundle)
        monitor = Monitor(settings.monitor_hz, cell.device) if settings.monitor_hz else None
        with monitor or nullcontext():
            serving = None
            if cell.scenario == "server":
                samples, serving, formed = serve_arrivals(engine, images, preprocess, cell, settings)
            else:
                counter = monitor.gpu_energy_j if monitor else lambda: None
                samples = measure(engine, [batch.inputs for batch in batches], settings, counter, of_images)
                formed = [batch.formed for batch in batches]
            # Before anything else runs: to say what it executes, an engine may load the model a second time.
            peak_rss_mb = peak_memory_mb()
            stages = None
            if cell.scenario != "server":  # whose batches are formed as images arrive
                files = [[task.images[place] for place in batch.places] for batch in batches]
                if cut:
                    files = [[path] for path in task.images]
                stages = time_stages(engine, files, bundle, settings, cut)
        convolutions = _convolutions(engine, batches[0].inputs)
        run = Run(
            started=started,
            samples=samples,
            stages=stages,
            engine_version=engine.version,
            load_s=load_s,
            build_s=engine.build_s,
            first_inference_ms=first_ms,
            peak_rss_mb=peak_rss_mb,
            inputs_mb=(
                sum(array.nbytes for batch in batches for array in batch.inputs.values())
                + sum(one.tensor.nbytes for one in images)
            )
            / 1e6,
            shapes=shape_counts(formed),
            padding_ratio=padding_ratio(formed),
            mixed_batches=sum(one.mixed for one in formed),
            convolutions=count_precisions(convolutions) if convolutions else None,
            not_low_precision=() if cell.precision == "fp32" else reasons(convolutions) if convolutions else None,
            delegated="; ".join(filter(None, (engine.delegated, engine.cuda_graph))) or None,
            idle=task.idle,
            monitored=monitor.record() if monitor else None,
            serving=serving,
            parity=parity,
            not_compared=task.not_compared,
        )
    # Tiles of a batch are padded by the stride alone.
    of_tiles = [batch.shape[1:] for batch in batches for _ in batch.places]
    return Timed(run, tuple(of_tiles if cut else (image.tensor.shape[1:] for image in images)))


def _cut(cell: Cell) -> InTiles | None:
    return None if cell.tiling is None else InTiles(cell.tiling, cell.batch_size)


def _in_tiles(paths: Sequence[Path], preprocess: Preprocess, cut: InTiles) -> tuple[list[Batch], list[list[int]]]:
    """The batches of all images, and the places among them of those of each image."""
    batches: list[Batch] = []
    of_images = []
    for some in tile_batches(paths, preprocess, cut):
        of_images.append(list(range(len(batches), len(batches) + len(some))))
        batches += some
    return batches, of_images


def _reference(task: Task) -> CpuOutputs:
    cell = task.cell
    bundle = Bundle.open(task.bundle).at_size(cell.input_size)
    preprocess = bundle.manifest.preprocess
    if cut := _cut(cell):
        batches, _ = _in_tiles(task.images, preprocess, cut)
    else:
        batches = make_batches(prepare_images(task.images, preprocess), preprocess, cell.batch_size, cell.order)
    fixed = bundle.manifest.inputs[0].shape[0] is not None
    engine, by = open_reference(cell.engine, bundle, cell.threads)
    with engine:
        assert task.reference is not None
        write_reference(task.reference, engine, batches, fixed)
    return CpuOutputs(by)


def _open(cell: Cell, bundle: Bundle, shapes: Iterable[Shape], cache: Path | None) -> Engine:
    """`shapes`: (batch, height, width) of the inputs to come."""
    options = EngineOptions(cell.precision, cell.device, cell.threads, cache, tf32=cell.tf32, streams=cell.streams)
    if cell.end_to_end:
        return open_by_itself(cell.engine, bundle, options)
    return open_engine(cell.engine, bundle, options, shapes)


def _peak(task: Task) -> Peak:
    cell = task.cell
    return measure_peak(cell.engine, EngineOptions(cell.precision, cell.device, cell.threads, tf32=cell.tf32))


def _accuracy(task: Task) -> Accuracy:
    cell = task.cell
    bundle = Bundle.open(task.bundle).at_size(cell.input_size)
    manifest = bundle.manifest
    dataset = CocoDataset.load(task.annotations, task.image_dir, task.accuracy_limit)
    cut = _cut(cell)
    # A network of a fixed batch size gives for images of one size what one for any gives for each alone.
    size = manifest.inputs[0].shape[0] or 1
    batches: tuple[int, Order] = (size, "listed" if size == 1 else "bucketed")
    shapes = batch_shapes(dataset, manifest.preprocess, *batches, cut)
    if size > 1:
        shapes = ((size, *one[1:]) for one in shapes)
    threads = cell.threads * cell.streams
    options = EngineOptions(cell.precision, cell.device, threads, task.engine_cache, tf32=cell.tf32)
    # Nothing is timed. Known beforehand, the shapes settle what runs an input, which streams would leave to chance.
    options = throughput_options(cell.engine, options, size).expecting(shapes)
    with (open_by_itself if cell.end_to_end else open_engine)(cell.engine, bundle, options) as engine:
        return measure_accuracy(
            engine,
            dataset,
            manifest.preprocess,
            manifest.nms,
            manifest.classes,
            *batches,
            progress=PARENT,
            cut=cut,
            fill=size > 1,
        )


def _convolutions(engine: Engine, inputs: Tensors) -> tuple[ExecutedConvolution, ...]:
    """Those of one inference; none where the engine cannot tell."""
    try:
        return engine.executed_convolutions(inputs)
    except EngineError:
        return ()


if __name__ == "__main__":
    serve(_answer)
