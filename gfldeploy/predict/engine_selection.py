"""Which engine runs a detector, and how: as `deploy.yml` says, or by what works here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from gfldeploy.batching.buckets import Order, Size, size_in_words
from gfldeploy.bundle import Bundle, Manifest
from gfldeploy.detection_options import AS_CONFIGURED, DetectionOptions
from gfldeploy.engines.base import Device, EngineOptions, Precision, Shape, oversubscribed, with_tf32
from gfldeploy.engines.hardware import usable_threads
from gfldeploy.engines.registry import ENGINES
from gfldeploy.engines.selection import select_engine, throughput_batch, throughput_options
from gfldeploy.engines.tensorrt import possible_shapes
from gfldeploy.errors import BundleError, DataError, UnsupportedError
from gfldeploy.machine import describe_machine

if TYPE_CHECKING:  # a bundle need not wait for it
    from gfldeploy.tune.deploy_file import Deploy

DEPLOY_SUFFIXES = (".yml", ".yaml")


@dataclass(frozen=True)
class Choice:
    """What runs, and how.

    `bundle`: at the `input_size`, None for its own. `options`: for an engine that is built for shapes, and on GPUs,
    they have those that `deploy.yml` says, or some that span all that the detector can be given. `order`: how batches
    are formed, see `pipeline.detect_groups`. `why`: why this engine, in words. `notes`: what the user should know, such
    as that a `deploy.yml` was made on another machine. `expected`: the shapes of inputs that a `deploy.yml` says, the
    most common first, whatever the engine; () without one. `detection`: what a user has turned of NMS, and of what is
    shown.
    """

    bundle: Bundle
    engine: str
    options: EngineOptions
    batch_size: int
    order: Order
    why: str
    notes: tuple[str, ...] = ()
    input_size: Size | None = None
    expected: tuple[Shape, ...] = ()
    detection: DetectionOptions = AS_CONFIGURED

    @cached_property
    def manifest(self) -> Manifest:
        """The bundle's, with the NMS that is used: that of `bundle.manifest` is the config's own."""
        return self.bundle.manifest.turned(self.detection)

    def __str__(self) -> str:
        options, count, streams = self.options, self.options.threads, self.options.streams
        listed = ", batches as listed" if self.order == "listed" and self.batch_size > 1 else ""
        return (
            f"{self.bundle.name} in {self.engine} {with_tf32(options.precision, options.tf32)}"
            f"{f' at {size_in_words(self.input_size)}' if self.input_size else ''} on "
            f"{options.device}, batch {self.batch_size}, "
            f"{f'{streams} streams of ' if streams > 1 else ''}{count} thread{'' if count == 1 else 's'}"
            f"{listed} ({self.why})"
        )


def choose(
    source: Path,
    engine: str | None = None,
    precision: Precision | None = None,
    device: Device | None = None,
    threads: int | None = None,
    batch_size: int | None = None,
    engine_cache: Path | None = None,
    order: Order | None = None,
    tf32: bool | None = None,
    streams: int | None = None,
    throughput: bool = False,
    input_size: Size | None = None,
    small_batches: bool = False,
    detection: DetectionOptions = AS_CONFIGURED,
) -> Choice:
    """Choose for a bundle, or for the `deploy.yml` that `gfldeploy tune` wrote; arguments that are given override both.

    A bundle runs in its own precision and input size on the CPU, one image at a time; batches are bucketed. A network
    of a fixed batch size has that one. All threads are used, by one inference, which is the fastest for a single image;
    with `throughput` by the streams of `throughput_options`, with `small_batches` in the batches of `throughput_batch`,
    unless `batch_size`, `threads` or `streams` are given. `engine_cache`: where engines keep what they compiled,
    None for nowhere. `detection`: what is None in it is as `deploy.yml` says, else as the bundle's config.

    Raises `BundleError`, also where `deploy.yml` is about another bundle, `DataError` for a file that is none, and
    `UnsupportedError` where nothing here can run it, or it is INT8 at an input size at which `quantize` has not found
    it to hold, and `deploy.yml` knows no mAP. `UsageError` as `DetectionOptions.nms`.
    """
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, not {batch_size}")
    notes: tuple[str, ...] = ()
    shapes: tuple[Shape, ...] = ()
    why = ""
    deploy: Deploy | None = None
    if source.suffix in DEPLOY_SUFFIXES and not source.is_dir():
        from gfldeploy.tune.deploy_file import Deploy

        deploy = Deploy.read(source)
        bundle = Bundle.open(deploy.bundle_path(source))
        notes = tuple(_differences(deploy, bundle))
        cell = deploy.choice.cell
        detection = detection.over(deploy.detection or AS_CONFIGURED)
        input_size = input_size or cell.input_size
        if (engine, precision, device) == (None, None, None):
            why = f"as {source.name} says"
        engine, precision = engine or cell.engine, precision or cell.precision
        device = device or cell.device
        if tf32 is None:  # what a deploy.yml says of FP32 on a GPU says nothing of others
            tf32 = cell.tf32 and (precision, device) == ("fp32", "gpu")
        batch_size = batch_size or cell.batch_size
        if (threads, streams) == (None, None) and (cell.streams == 1 or (engine, device) == (cell.engine, cell.device)):
            threads, streams = cell.threads, cell.streams
            if obstacle := oversubscribed(streams, threads):
                streams = max(usable_threads() // threads, 1)
                notes = (*notes, f"{obstacle.reason}: {source.name} runs with {streams} here")
        order = order or (cell.order if cell.batch_size > 1 else None)
        if bundle.at_size(input_size) == bundle.at_size(cell.input_size):
            shapes = deploy.shapes
    elif source.is_dir():
        bundle = Bundle.open(source)
    else:
        problem = f"{source} is neither a bundle nor a deploy file" if source.exists() else f"there is no {source}"
        raise BundleError(problem, "Give what `gfldeploy export` or `gfldeploy tune` wrote.")
    own, bundle = bundle, bundle.at_size(input_size)
    engine, options, reason = select_engine(bundle, engine, precision, device, threads, engine_cache, tf32, streams)
    measured = deploy is not None and _ap_known(deploy, own, bundle, engine, options)
    if bundle is not own and options.precision == "int8" and not measured:
        check_int8_size(own, bundle)
    fixed = bundle.manifest.inputs[0].shape[0]
    if fixed is not None and batch_size not in (None, fixed):
        raise UnsupportedError(f"{bundle.directory} takes batches of {fixed} only", "Leave the batch size out.")
    size, order = fixed or batch_size or 1, order or "bucketed"
    if throughput and (threads, streams) == (None, None):
        if small_batches and (fixed, batch_size, order) == (None, None, "bucketed"):
            size = throughput_batch(engine, options.device, bundle.manifest.preprocess.target_size)
        options = throughput_options(engine, options, size)
    if order == "listed" and size > 1:
        notes = (*notes, "batches are padded to a common size, which changes scores and boxes; bucketed ones are not")
    bundle.manifest.turned(detection)  # refused before anything is loaded
    notes = (*notes, *detection.notes(bundle.manifest.nms), *bundle.manifest.notes)
    if ENGINES[engine].needs_shapes or options.device == "gpu":
        # Batches need not fill; but an engine that runs any shape is to know the most common alone.
        expected = in_batches(shapes, *((size, fixed or 1) if ENGINES[engine].needs_shapes else (size,)))
        options = replace(options, shapes=expected or possible_shapes(bundle.manifest, size))
    given_size = None if bundle is own else input_size
    return Choice(bundle, engine, options, size, order, why or reason, notes, given_size, shapes, detection)


def _ap_known(deploy: Deploy, own: Bundle, resized: Bundle, engine: str, options: EngineOptions) -> bool:
    """Whether the mAP was measured of just this: the file's choice, neither engine nor input size overridden."""
    cell, asked = deploy.choice.cell, (engine, options.precision, options.device)
    same = asked == (cell.engine, cell.precision, cell.device) and resized == own.at_size(cell.input_size)
    return same and deploy.choice.evidence.ap_drop is not None


def check_int8_size(own: Bundle, resized: Bundle) -> None:
    """Raise `UnsupportedError` unless `quantize` found the INT8 bundle to hold at this input size."""
    preprocess = resized.manifest.preprocess
    size = size_in_words(preprocess.target_size)
    judged = (own.record("parity.json") or {}).get("sizes", ())
    found = [one["problem"] for one in judged if preprocess.same_size(tuple(one["size"]))]
    if not found:
        raise UnsupportedError(
            f"{own.directory} is INT8, which was not judged at {size}",
            f"Quantise its FP32 bundle with `--input-sizes {size}`, which judges INT8 there, or use the FP32 one.",
        )
    if found[0] is not None:
        raise UnsupportedError(
            f"{own.directory} is INT8, which does not hold at {size}: {found[0]}",
            "Use another --input-size, or the FP32 bundle.",
        )


def in_batches(shapes: Sequence[Shape], *counts: int) -> tuple[Shape, ...]:
    """The sizes of these shapes in batches of these numbers of images, each once."""
    sizes = ((count, height, width) for count in counts for _, height, width in shapes)
    return tuple(dict.fromkeys(sizes))


def _differences(deploy: Deploy, bundle: Bundle) -> Iterator[str]:
    """Where the file is not about this machine. Raises `BundleError` where it is not about this bundle."""
    try:
        changes = deploy.check(bundle, describe_machine())
    except DataError as error:
        yield f"{error.problem}; `gfldeploy tune` finds what is fastest here"
        return
    if changes:
        yield f"since the choice was made, other software is installed: {'; '.join(changes)}"
