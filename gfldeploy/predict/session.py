"""One prediction from request to the folder of results: what `gfldeploy predict` runs."""

from __future__ import annotations

import hashlib
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gfldeploy.batching.buckets import stream_batches
from gfldeploy.engines.registry import open_engine
from gfldeploy.errors import DataError, OutputError
from gfldeploy.files import Unfinished, check_target, files_below, publish, unfinished_beside, write_json
from gfldeploy.images.coco import CocoDataset
from gfldeploy.machine import describe_machine
from gfldeploy.predict.draw import draw_all
from gfldeploy.predict.engine_selection import Choice
from gfldeploy.predict.outputs import DEFAULT_THRESHOLD, DETECTIONS, Summary, record_of, write_outputs
from gfldeploy.predict.pipeline import detect_groups, in_order
from gfldeploy.predict.resume import WorkingFile
from gfldeploy.predict.sources import picture_sizes, pictures
from gfldeploy.signals import check_interrupted, hold_interrupts

__all__ = ["NOTE", "PICTURES", "PredictRequest", "predict"]

NOTE = "predict.json"
PICTURES = "pictures"
_WORKING = "working.jsonl"
_RESULTS = "results"  # what becomes the output
# What is in the folder of unfinished work.
_MADE = (
    r"(?s)working\.jsonl|results/((detections\.jsonl|coco\.json|images\.json|predict\.json)?|pictures/(\.?\d{6,}-.*)?)"
)
# Files wait for a batch of their size by name alone, so that many may.
_BATCHES_AHEAD = 32

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class PredictRequest:
    """What to detect in, and what to leave.

    `inputs`: image files and videos. `output`: the folder. `dataset`: its images are the inputs, and ids are its own.
    `threshold`: the least score in `detections.jsonl`. `draw`: of those, the least that is drawn; None for no pictures.
    `reduced`: as for `pipeline.detect_groups`. `force`: replace the folder if it is there, and what is left of another
    run.
    """

    choice: Choice
    inputs: Sequence[Path]
    output: Path
    dataset: CocoDataset | None = None
    threshold: float = DEFAULT_THRESHOLD
    draw: float | None = None
    reduced: bool = False
    force: bool = False


def predict(request: PredictRequest, progress: Progress = lambda label, done, total: None) -> Summary:
    """Detect in all inputs and write `request.output`, in one step.

    Interrupted or killed, the same request resumes where it stopped, to the same files: what is done is kept in a
    folder beside the output. `progress(label, done, total)`, in images, is called as they are done.

    Raises `OutputError`, also for what is left of another request, `EngineError`, and `DataError` where no image at all
    could be read.
    """
    check_target(request.output, "predict", force=request.force)
    choice = request.choice
    manifest = choice.bundle.manifest
    dataset = request.dataset
    categories = dataset.class_to_category(manifest.classes) if dataset else None
    with unfinished_beside(request.output, "predict", _MADE) as unfinished:
        question = _question(request)
        results = unfinished.directory / _RESULTS
        most = len(dataset.images) if dataset else sys.maxsize  # nobody knows before how many frames a video has
        classes = len(manifest.classes)
        with WorkingFile(unfinished.directory / _WORKING, question, most, classes, anew=request.force) as working:
            kept = working.images
            unfinished.worth_keeping = bool(kept)
            if not working.complete:
                shutil.rmtree(results, ignore_errors=True)  # of a run that this one replaces
                _detect(request, unfinished, working, progress)
        try:
            results.mkdir(exist_ok=True)
            for path in results.iterdir():
                if path.name != PICTURES:
                    path.unlink()
            ids = [image.id for image in dataset.images] if dataset else None
            records = in_order(working.groups())
            summary = write_outputs(results, records, manifest.classes, ids, categories, request.threshold)
            if summary.failed == summary.images:
                unfinished.worth_keeping = False
                raise DataError(f"none of {summary.images} images can be used: {summary.reasons[0]}", None)
            if request.draw is not None:
                (results / PICTURES).mkdir(exist_ok=True)
                for done in draw_all(results / DETECTIONS, results / PICTURES, request.draw):
                    progress("drawing", done, summary.images)
            found = {"images": summary.images, "failed": summary.failed, "detections": summary.detections}
            note = {"what": "results of gfldeploy predict", **question, **found, "files": files_below(results)}
            write_json(results / NOTE, note)
            check_interrupted()
            with hold_interrupts():
                check_target(request.output, "predict", force=request.force)  # somebody else may have been faster
                publish(results, Path(request.output).absolute())
                unfinished.worth_keeping = False
                shutil.rmtree(results, ignore_errors=True)  # those that were replaced
        except OSError as error:
            raise OutputError(
                f"cannot write {request.output}: {error.strerror or error}", "Free some space, and run it again."
            ) from error
    return replace(summary, kept=kept)


def _detect(request: PredictRequest, unfinished: Unfinished, working: WorkingFile, progress: Progress) -> None:
    """What is not in the working file yet."""
    choice = request.choice
    manifest = choice.bundle.manifest
    sizes = list(picture_sizes(request.inputs))
    total = len(sizes)
    options = replace(choice.options, shapes=_input_shapes(choice, sizes))
    with open_engine(choice.engine, choice.bundle, options) as engine:
        progress("detecting", working.images, total)
        groups = detect_groups(
            engine,
            manifest,
            pictures(request.inputs),
            batch_size=choice.batch_size,
            order=choice.order,
            look_ahead=_BATCHES_AHEAD * choice.batch_size,
            skip=working.batches,
            reduced=request.reduced,
        )
        with closing(groups):
            for group in groups:
                working.add([(one.index, record_of(one)) for one in group])
                unfinished.worth_keeping = True
                progress("detecting", working.images, max(total, working.images))
    working.end()


def _input_shapes(choice: Choice, sizes: Sequence[tuple[int, int] | None]) -> tuple[tuple[int, int, int], ...]:
    """(batch, height, width) of the network's inputs, the most common first, from sizes of images (h, w) in order."""
    input_size = choice.bundle.manifest.preprocess.input_size
    known = ((None, input_size(*size)) for size in sizes if size is not None)
    batches = stream_batches(known, choice.batch_size, choice.order, _BATCHES_AHEAD * choice.batch_size)
    return tuple(shape for shape, _ in Counter((len(batch), *size) for batch, size in batches).most_common())


def _question(request: PredictRequest) -> dict[str, Any]:
    """All that the results depend on, by a name that a message can give."""
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
    return {
        "bundle": choice.bundle.digest,
        "engine": choice.engine,
        "precision": choice.options.precision,
        "device": choice.options.device,
        "threads": choice.options.threads,
        "batch_size": choice.batch_size,
        "order": choice.order,
        "threshold": request.threshold,
        "draw_threshold": request.draw,
        "decoding": "reduced" if request.reduced else "exact",
        "annotations": hashlib.sha256(repr(ids).encode()).hexdigest() if ids is not None else None,
        "inputs": listed.hexdigest(),
        "processor": machine.cpu,
        "software": dict(machine.packages),
    }
