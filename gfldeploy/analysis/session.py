"""One analysis from request to result: what `gfldeploy analyze` runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from gfldeploy.accuracy import batch_shapes
from gfldeploy.analysis.causes import analyze_passes
from gfldeploy.analysis.invariance import Invariance, measure_invariance
from gfldeploy.analysis.record import Analysis
from gfldeploy.analysis.sweep import batch_orders, measure_passes
from gfldeploy.batching.buckets import Order, Size
from gfldeploy.bench.cell import BundleIdentity, Cell
from gfldeploy.bench.cost import count_cost
from gfldeploy.bench.cpu_parity import CpuCheck
from gfldeploy.bench.runner import run_peak
from gfldeploy.bundle import Bundle
from gfldeploy.engines.base import Device, Precision, Shape
from gfldeploy.engines.cache import DEFAULT_ENGINE_CACHE
from gfldeploy.engines.registry import ENGINES, is_compared, open_engine
from gfldeploy.engines.selection import select_engine
from gfldeploy.errors import GfldeployError, OutputError, UnsupportedError, UsageError
from gfldeploy.files import StrPath, check_file
from gfldeploy.images.coco import CocoDataset
from gfldeploy.images.decode import read_image
from gfldeploy.images.preprocess import Preprocess
from gfldeploy.machine import describe_machine
from gfldeploy.progress import SILENT, Progress
from gfldeploy.signals import hold_interrupts


def analyze(
    bundle: StrPath,
    *,
    data: StrPath,
    images: StrPath | None = None,
    engine: str | None = None,
    precision: Precision | None = None,
    device: Device | None = None,
    tf32: bool | None = None,
    threads: int | None = None,
    input_size: Size | None = None,
    batch_sizes: Sequence[int] = (2, 4, 8),
    limit: int | None = 32,
    engine_cache: StrPath = DEFAULT_ENGINE_CACHE,
    rounds: int = 5,
    peak: bool = True,
    invariance: bool = True,
    output: StrPath | None = None,
    force: bool = False,
    progress: Progress = SILENT,
) -> Analysis:
    """Measure why an image takes longer in a larger batch, or no less.

    The same images run in batches of every size, listed and bucketed, interleaved. The change in the
    time of an image is split into padding, convolutions, the network's other work, and host work.

    Args:
        bundle: The directory of the bundle.
        data: COCO annotations (.json).
        images: The folder in which their file names start; by default `images/` beside them, else their folder.
        engine: By default the preferred engine of those that can run the bundle.
        precision: By default that of the bundle.
        device: By default the CPU.
        tf32: Let FP32 on a GPU multiply in TF32; by default not.
        threads: CPU threads of one inference; by default all.
        input_size: The size, (height, width) in pixels, to which images are resized, as `target_size` in
            PaddleDetection; by default that of the bundle.
        batch_sizes: Batch sizes to compare with batch 1.
        limit: Use only this number of images, the first of the annotations; None for all.
        engine_cache: The folder in which engines that compile keep the result.
        rounds: How often each batch size is run in each order.
        peak: Measure what the engine reaches at best too.
        invariance: Compare the detections of batches with those of batch 1.
        output: The file to write (.json), with a page (.html) beside it; None for none.
        force: Replace these files if they exist and gfldeploy made them.
        progress: Told of stages and of what is done.

    Returns:
        The measurements, the causes that follow from them, and the answer in sentences.

    Raises:
        UsageError: No batch size is larger than 1.
        BundleError: The bundle is damaged, or does not take the input size.
        DataError: Annotations or an image cannot be read.
        UnsupportedError: The bundle has a fixed batch size, or does not run in this engine and precision.
        EngineError: The engine failed, or differs from the CPU (compared for GPUs and engines of other packages).
        OutputError: The output exists already, or cannot be written.
    """
    orders = batch_orders(batch_sizes)
    if len(orders) == 1:
        raise UsageError("there is no batch size to compare with batch 1", "Give larger ones, such as 2,4,8.")
    path = None if output is None else Path(output)
    _check_output(path, force)
    own = Bundle.open(bundle)
    opened = own.at_size(input_size)
    if (fixed := opened.manifest.inputs[0].shape[0]) is not None:
        problem = f"{opened.directory} takes batches of {fixed} only"
        raise UnsupportedError(problem, "Export it without a fixed batch size.")
    dataset = CocoDataset.load(data, images, limit)
    name, options, _ = select_engine(opened, engine, precision, device, threads, Path(engine_cache), tf32)
    for note in dataset.notes:
        progress.note(note)
    if ENGINES[name].needs_shapes:
        progress.note(
            f"{name} is built once for all batch sizes, and is fastest at the most common input, of one image"
        )
    best = None
    if peak:
        progress.stage("measuring what the engine reaches at best")
        cell = Cell(
            bundle=BundleIdentity.of(opened),
            engine=name,
            precision=options.precision,
            device=options.device,
            threads=options.threads,
            batch_size=1,
            scenario="single-stream",
            tf32=options.tf32,
        )
        best = run_peak(cell)
    compared: list[Invariance] = []
    preprocess = opened.manifest.preprocess
    shapes = _shapes(dataset, preprocess, orders)
    with open_engine(name, opened, replace(options, progress=progress), shapes) as running:
        progress.stage("running the same images in batches of every size, interleaved")
        paths = [image.path for image in dataset.images]
        if is_compared(name, options.device):
            first = preprocess.batch([preprocess(read_image(paths[0]))])
            CpuCheck(name, running, opened, progress.note)(first, running.infer({"image": first}), 1)
        measured = measure_passes(running, paths, opened, orders, rounds, progress)
        if invariance:
            progress.stage("comparing detections with those of batch 1")
            compared = measure_invariance(running, dataset, opened, batch_sizes, progress)
    found = Analysis(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        machine=describe_machine(),
        bundle=BundleIdentity.of(opened),
        engine=name,
        precision=options.precision,
        threads=options.threads,
        tf32=options.tf32,
        input_size=None if opened is own else input_size,
        images=len(paths),
        peak=best,
        rounds=tuple(tuple(passes) for passes in measured),
        batches=tuple(
            analyze_passes(measured, _macs(opened, dataset), best.gmac_per_s if best else None, options.device)
        ),
        invariance=tuple(compared),
    )
    if path is not None:
        _check_output(path, force)  # another process may have written it meanwhile
        with hold_interrupts():
            found.write(path)
    return found


def _check_output(path: Path | None, force: bool) -> None:
    if path is None:
        return
    if path.suffix == ".html":
        raise OutputError(f"{path} is where the page would be", "Give the name of a .json file.")
    check_file(path, "json", force=force)
    check_file(path.with_suffix(".html"), "html", force=force)


def _shapes(dataset: CocoDataset, preprocess: Preprocess, orders: Sequence[tuple[int, Order]]) -> Iterator[Shape]:
    """Of all batches, as they are for the comparison of detections, and filled up for the times."""
    for batch_size, order in orders:
        for count, height, width in batch_shapes(dataset, preprocess, batch_size, order):
            yield count, height, width
            yield batch_size, height, width


def _macs(bundle: Bundle, dataset: CocoDataset) -> float | None:
    """The mean of an image by itself; None if the graph cannot be counted."""
    sizes = [bundle.manifest.preprocess.input_size(*image.size()) for image in dataset.images]
    try:
        return count_cost(bundle, bundle.manifest.precision, sizes, {(1, *size): 1 for size in sizes}).macs
    except GfldeployError:
        return None
