"""From images and videos to the folder of results: what `gfldeploy predict` runs."""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from gfldeploy.batching.buckets import Order, Size, stream_batches
from gfldeploy.bench.cpu_parity import CpuCheck
from gfldeploy.engines.base import Device, EngineOptions, Precision, Shape
from gfldeploy.engines.cache import DEFAULT_ENGINE_CACHE
from gfldeploy.engines.registry import ENGINES, open_engine
from gfldeploy.engines.tensorrt import Profile, possible_shapes
from gfldeploy.errors import DataError, UsageError
from gfldeploy.files import (
    StrPath,
    Unfinished,
    check_apart,
    check_target,
    files_below,
    publish,
    unfinished_beside,
    write_json,
    writing,
)
from gfldeploy.images.coco import CocoDataset
from gfldeploy.machine import describe_machine
from gfldeploy.predict.draw import draw_all, drawing_notes
from gfldeploy.predict.engine_selection import Choice, choose, in_batches
from gfldeploy.predict.outputs import DEFAULT_THRESHOLD, DETECTIONS, PredictResults, write_outputs
from gfldeploy.predict.pipeline import Found, detect_groups, in_order
from gfldeploy.predict.resume import WorkingFile
from gfldeploy.predict.sources import is_video, list_inputs, picture_sizes, pictures
from gfldeploy.progress import SILENT, Progress
from gfldeploy.signals import check_interrupted, hold_interrupts

NOTE = "predict.json"
PICTURES = "pictures"
_WORKING = "working.jsonl"
_RESULTS = "results"  # what becomes the output
# What is in the folder of unfinished work.
_MADE = (
    r"(?s)working\.jsonl|results/((detections\.jsonl|coco\.json|images\.json|predict\.json)?|pictures/(\.?\d{6,}-.*)?)"
)
# Images that wait for a batch of their size are not decoded yet, so that many may wait.
_BATCHES_AHEAD = 32
# Batches, below which no engine is built for their own shapes alone: they take less time than the build.
_WORTH_A_BUILD = 1000


@dataclass(frozen=True)
class _Request:
    """What to detect in, and what to leave.

    `inputs`: image files and videos. `dataset`: its images are the inputs, and ids are its own. `threshold`: the
    lowest score in `detections.jsonl`. `draw`: the lowest score that is drawn; None for no pictures.
    """

    choice: Choice
    inputs: Sequence[Path]
    output: Path
    dataset: CocoDataset | None
    threshold: float
    draw: float | None
    reduced: bool
    force: bool


def predict_images(
    source: StrPath,
    inputs: StrPath | Sequence[StrPath] = (),
    *,
    output: StrPath,
    data: StrPath | None = None,
    draw: bool = False,
    threshold: float = DEFAULT_THRESHOLD,
    draw_threshold: float | None = None,
    decode: Literal["exact", "fast"] = "exact",
    engine: str | None = None,
    precision: Precision | None = None,
    device: Device | None = None,
    tf32: bool | None = None,
    threads: int | None = None,
    streams: int | None = None,
    input_size: Size | None = None,
    batch_size: int | None = None,
    order: Order | None = None,
    engine_cache: StrPath = DEFAULT_ENGINE_CACHE,
    force: bool = False,
    progress: Progress = SILENT,
) -> PredictResults:
    """Detect in images, folders of them, and videos, and write a folder of results in one step.

    After an interruption the same call resumes where it stopped and writes the same files: finished batches are kept in
    a folder beside the output. An argument that is None is as in `deploy.yml`, or as `Detector` chooses for a bundle,
    but `streams`.

    Args:
        source: The directory of a bundle, or the `deploy.yml` that `tune_bundles` wrote.
        inputs: Images, videos and folders of them. With `data`, the one folder in which its file names start, or none.
        output: The folder to write: `detections.jsonl`, `coco.json`, `images.json`, and `pictures/` with `draw`.
        data: COCO annotations (.json) whose images are detected in, and whose ids are used.
        draw: Draw the boxes, too: pictures of images, and videos of videos.
        threshold: The lowest score in `detections.jsonl` and in pictures.
        draw_threshold: The lowest score in pictures, if another.
        decode: "fast" decodes JPEGs at 1/2, 1/4 or 1/8 where they are that much larger than the network's input.
        engine: The engine that runs the bundle.
        precision: The precision in which it runs.
        device: The device that it runs on.
        tf32: Let FP32 on a GPU multiply in TF32.
        threads: CPU threads of one inference.
        streams: Inferences at once from one engine. Of a bundle by default as many as there are usable CPUs, of one
            thread each, and no more than 16 images at once: with more CPUs they have several threads. One stream if
            `threads` is given.
        input_size: The size, (height, width) in pixels, to which images are resized, as `target_size` in
            PaddleDetection.
        batch_size: Images of one inference.
        order: How images are put into batches: "bucketed" ones have images of one input size, which pads none.
        engine_cache: The folder in which engines that compile keep the result.
        force: Replace the output if gfldeploy made it, and what is left of another run.
        progress: Told of the engine that was chosen, of notes, and of the images that are done.

    Returns:
        How many images there were, how many could not be read, and why.

    Raises:
        UsageError: There is nothing to detect in.
        BundleError: The bundle is damaged, or not the one that `deploy.yml` is about.
        DataError: An input is not there, or no image at all can be read.
        OutputError: The output cannot be written, or something is in the way, such as what another call left.
        UnsupportedError: Nothing here can run the bundle so.
        EngineError: The engine failed, or differs from the CPU (compared for GPUs and engines of other packages).
    """
    if decode not in ("exact", "fast"):
        raise ValueError(f"decode must be exact or fast, not {decode!r}")
    # Before OpenCV is loaded: what its video library has to say comes as an error of ours.
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
    given = [Path(one) for one in ([inputs] if isinstance(inputs, str | os.PathLike) else inputs)]
    folder = Path(output)
    choice = choose(
        Path(source),
        engine,
        precision,
        device,
        threads,
        batch_size,
        Path(engine_cache),
        order,
        tf32,
        streams,
        throughput=True,
        input_size=input_size,
    )
    annotations = None if data is None else Path(data)
    read = [Path(source), *given] if annotations is None else [Path(source), annotations, *given]
    check_apart(folder, read, choice.bundle.directory)
    dataset, files, notes = _inputs(given, annotations, folder)
    classes = choice.bundle.manifest.classes
    if dataset is not None:
        notes += [*dataset.notes, *dataset.match(classes).notes]
    if draw:
        notes += drawing_notes(classes, any(map(is_video, files)))
    for note in (*choice.notes, *notes):
        progress.note(note)
    progress.stage(str(choice))
    drawn = threshold if draw_threshold is None else draw_threshold
    request = _Request(choice, files, folder, dataset, threshold, drawn if draw else None, decode == "fast", force)
    return _predict(request, progress)


def _inputs(
    inputs: Sequence[Path], data: Path | None, output: Path
) -> tuple[CocoDataset | None, list[Path], list[str]]:
    """The annotations, the files, and notes on what is not among them."""
    if data is None:
        if not inputs:
            raise UsageError("there is nothing to detect in", "Give images, videos or folders as INPUT, or --data.")
        notes: list[str] = []
        output = Path(os.path.abspath(output))  # noqa: PTH100 - "." has no name, and links are not to be followed
        exclude = (output, output.with_name(f"{output.name}.unfinished"))
        return None, list_inputs(inputs, exclude, notes.append), notes
    if len(inputs) > 1:
        raise UsageError("with --data, INPUT is the folder in which its file names start", "Give one at most.")
    dataset = CocoDataset.load(data, inputs[0] if inputs else None)
    files = [image.path for image in dataset.images]
    if len(set(files)) < len(files):
        raise DataError(f"{data} lists a file twice", "Give every image one id.")
    return dataset, files, []


def _predict(request: _Request, progress: Progress) -> PredictResults:
    check_target(request.output, "predict", force=request.force)
    choice = request.choice
    manifest = choice.bundle.manifest
    dataset = request.dataset
    categories = dataset.class_to_category(manifest.classes) if dataset else None
    with unfinished_beside(request.output, "predict", _MADE) as unfinished:
        question = _question(request)
        results = unfinished.directory / _RESULTS
        most = len(dataset.images) if dataset else sys.maxsize  # the number of frames of a video is not known yet
        classes = len(manifest.classes)
        ids = [image.id for image in dataset.images] if dataset else None
        with WorkingFile(unfinished.directory / _WORKING, question, most, classes, anew=request.force) as working:
            kept = working.images
            unfinished.worth_keeping = bool(kept)
            with writing(request.output):
                if not working.complete:
                    shutil.rmtree(results, ignore_errors=True)  # of a run that this one replaces
                results.mkdir(exist_ok=True)
                for path in results.iterdir():
                    if path.name != PICTURES:
                        path.unlink()
            # Written while the others are detected: formatting takes no time of its own at the end.
            with closing(_detected(request, unfinished, working, progress)) as groups:
                found = in_order(((one.index, one) for one in group) for group in groups)
                summary = write_outputs(
                    results, found, manifest.classes, ids, categories, request.threshold, request.output
                )
        with writing(request.output):
            if summary.failed == summary.images:
                unfinished.worth_keeping = False
                raise DataError(f"none of {summary.images} images can be used: {summary.reasons[0]}", None)
            if request.draw is not None:
                (results / PICTURES).mkdir(exist_ok=True)
                for done in draw_all(results / DETECTIONS, results / PICTURES, request.draw):
                    progress.step("drawing", done, summary.images)
            counts = {"images": summary.images, "failed": summary.failed, "detections": summary.detections}
            note = {"what": "results of gfldeploy predict", **question, **counts, "files": files_below(results)}
            write_json(results / NOTE, note)
            check_interrupted()
            with hold_interrupts():
                check_target(request.output, "predict", force=request.force)  # another process may have written it
                publish(results, Path(request.output).absolute())
                unfinished.worth_keeping = False
                shutil.rmtree(results, ignore_errors=True)  # those that were replaced
    return replace(summary, kept=kept)


def _detected(
    request: _Request, unfinished: Unfinished, working: WorkingFile, progress: Progress
) -> Generator[list[Found]]:
    """The batches of the working file, then those that are not in it yet and are added to it."""
    yield from working.groups()
    if working.complete:
        return
    choice = request.choice
    manifest = choice.bundle.manifest
    known: dict[Path, tuple[int, int] | None] = {}
    sizes = list(picture_sizes(request.inputs, known))
    total = len(sizes)
    options = replace(_options(choice, sizes), progress=progress)
    with open_engine(choice.engine, choice.bundle, options) as engine:
        progress.step("detecting", working.images, total)
        groups = detect_groups(
            engine,
            manifest,
            pictures(request.inputs, known),
            batch_size=choice.batch_size,
            order=choice.order,
            look_ahead=_BATCHES_AHEAD * choice.batch_size,
            skip=working.batches,
            reduced=request.reduced,
            streams=options.streams,
            check=CpuCheck(choice.engine, engine, choice.bundle, progress.note),
        )
        with closing(groups):
            for group in groups:
                working.add(group)
                unfinished.worth_keeping = True
                progress.step("detecting", working.images, max(total, working.images))
                yield group
    working.end()


def _options(choice: Choice, sizes: Sequence[tuple[int, int] | None]) -> EngineOptions:
    """The engine's, with the shapes of the inputs to come, from sizes of images (h, w) in order.

    An engine that is built for shapes is built for those of the choice, so that other inputs need no other build: in
    minutes many images run. It is built for the inputs' own where `deploy.yml` has none and they are many, for speed,
    and where those of `deploy.yml` do not cover them.
    """
    manifest, options = choice.bundle.manifest, choice.options
    input_size, fixed = manifest.preprocess.input_size, manifest.inputs[0].shape[0]
    known = ((None, input_size(*size)) for size in sizes if size is not None)
    batches = stream_batches(known, choice.batch_size, choice.order, _BATCHES_AHEAD * choice.batch_size)
    shapes: list[Shape] = [(fixed or len(batch), *size) for batch, size in batches]
    expecting = options.expecting(shapes)
    if not ENGINES[choice.engine].needs_shapes:
        return expecting
    anything = options.shapes == possible_shapes(manifest, choice.batch_size)
    covered = Profile.spanning(options.shapes).covers(*expecting.shapes)
    if covered and (not anything or len(shapes) < _WORTH_A_BUILD):
        return options
    single = in_batches(expecting.shapes, fixed or 1)  # of a batch, few images may be readable
    return replace(options, shapes=tuple(dict.fromkeys((*expecting.shapes, *single))))


def _question(request: _Request) -> dict[str, Any]:
    """Everything that the results depend on, by names for messages."""
    choice = request.choice
    machine = describe_machine()
    listed = hashlib.sha256()
    for path in request.inputs:
        try:
            status = path.stat()
            about = (str(path), status.st_size, status.st_mtime_ns)
        except OSError:
            about = (str(path), 0, 0)
        listed.update(repr(about).encode())
    ids = [image.id for image in request.dataset.images] if request.dataset else None
    on_gpu = {"tf32": choice.options.tf32, "gpus": [*machine.gpus, machine.driver]}
    return {
        "bundle": choice.bundle.digest,
        "engine": choice.engine,
        "precision": choice.options.precision,
        "device": choice.options.device,
        "threads": choice.options.threads,
        "streams": choice.options.streams,
        "batch_size": choice.batch_size,
        "order": choice.order,
        **({"input_size": choice.input_size} if choice.input_size else {}),
        **({"shapes": choice.options.shapes} if choice.options.shapes else {}),
        "threshold": request.threshold,
        "draw_threshold": request.draw,
        "decoding": "reduced" if request.reduced else "exact",
        "annotations": hashlib.sha256(repr(ids).encode()).hexdigest() if ids is not None else None,
        "inputs": listed.hexdigest(),
        "processor": machine.cpu,
        **(on_gpu if choice.options.device == "gpu" else {}),
        "software": dict(machine.packages),
    }
