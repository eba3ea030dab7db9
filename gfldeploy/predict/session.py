"""One prediction from request to the folder of results: what `gfldeploy predict` runs."""

from __future__ import annotations

import hashlib
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gfldeploy.batching.buckets import group_stream
from gfldeploy.engines.registry import open_engine
from gfldeploy.errors import DataError, OutputError
from gfldeploy.files import check_target, publish, unfinished_beside, write_json
from gfldeploy.images.coco import CocoDataset
from gfldeploy.machine import describe_machine
from gfldeploy.predict.choice import Choice
from gfldeploy.predict.draw import draw_all
from gfldeploy.predict.outputs import DETECTIONS, Summary, record_of, write_outputs
from gfldeploy.predict.pipeline import detect_groups, in_order
from gfldeploy.predict.sources import picture_sizes, pictures
from gfldeploy.predict.working import WorkingFile

__all__ = ["NOTE", "PICTURES", "PredictRequest", "predict"]

NOTE = "predict.json"
PICTURES = "pictures"
_WORKING = "working.jsonl"
# Files wait for a batch of their size by name alone, so that many may.
_BATCHES_AHEAD = 32

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class PredictRequest:
    """What to detect in, and what to leave.

    `inputs`: image files and videos. `output`: the folder. `dataset`: its images are the inputs, and ids are its own.
    `threshold`: the least score that is written. `draw`: the least score that is drawn, None for no pictures.
    `reduced`: as for `pipeline.detect_groups`. `force`: replace the folder if it is there, and what is left of another
    run.
    """

    choice: Choice
    inputs: Sequence[Path]
    output: Path
    dataset: CocoDataset | None = None
    threshold: float = 0.0
    draw: float | None = None
    reduced: bool = False
    force: bool = False


def predict(request: PredictRequest, progress: Progress = lambda label, done, total: None) -> Summary:
    """Detect in all inputs and write `request.output`, in one step.

    Interrupted or killed, the same request goes on where it stopped, to the same files: what is done is kept in a
    folder beside the output. `progress(label, done, total)`, in images, is called as they are done.

    Raises `OutputError`, also for what is left of another request, `EngineError`, and `DataError` where no image at all
    could be read.
    """
    check_target(request.output, force=request.force)
    choice = request.choice
    manifest = choice.bundle.manifest
    dataset = request.dataset
    categories = dataset.class_to_category(manifest.classes) if dataset else None
    with unfinished_beside(request.output) as directory:
        question = _question(request)
        with WorkingFile(directory / _WORKING, question, request.force) as working:
            kept = working.images
            if not kept:
                _clear(directory)
            if not working.complete:
                _detect(request, working, progress)
        try:
            ids = [image.id for image in dataset.images] if dataset else None
            records = in_order(working.groups())
            summary = write_outputs(directory, records, manifest.classes, ids, categories)
            if summary.failed == summary.images:
                shutil.rmtree(directory)
                raise DataError(f"none of {summary.images} images can be used: {summary.reasons[0]}", None)
            if request.draw is not None:
                (directory / PICTURES).mkdir(exist_ok=True)
                for done in draw_all(directory / DETECTIONS, directory / PICTURES, request.draw):
                    progress("drawing", done, summary.images)
            found = {"images": summary.images, "failed": summary.failed, "detections": summary.detections}
            write_json(directory / NOTE, {"what": "results of gfldeploy predict", **question, **found})
            check_target(request.output, force=request.force)  # somebody else may have been faster
            (directory / _WORKING).unlink()
            publish(directory, Path(request.output).absolute())
        except OSError as error:
            raise OutputError(
                f"cannot write {request.output}: {error.strerror or error}", "Free some space, and run it again."
            ) from error
    return replace(summary, kept=kept)


def _clear(directory: Path) -> None:
    """Remove what another run left, results that it had replaced among them; the new working file stays."""
    for path in directory.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        elif path.name != _WORKING:
            path.unlink()


def _detect(request: PredictRequest, working: WorkingFile, progress: Progress) -> None:
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
            look_ahead=_BATCHES_AHEAD * choice.batch_size,
            skip=working.batches,
            reduced=request.reduced,
        )
        with closing(groups):
            for group in groups:
                working.add([(one.index, record_of(one, manifest.classes, request.threshold)) for one in group])
                progress("detecting", working.images, max(total, working.images))
    working.end()


def _input_shapes(choice: Choice, sizes: Sequence[tuple[int, int] | None]) -> tuple[tuple[int, int, int], ...]:
    """(batch, height, width) of the network's inputs, the commonest first, from the sizes of images (h, w) in order."""
    input_size = choice.bundle.manifest.preprocess.input_size
    known = ((None, input_size(*size)) for size in sizes if size is not None)
    batches = group_stream(known, choice.batch_size, _BATCHES_AHEAD * choice.batch_size)
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
        "threshold": request.threshold,
        "draw_threshold": request.draw,
        "decoding": "reduced" if request.reduced else "exact",
        "annotations": hashlib.sha256(repr(ids).encode()).hexdigest() if ids is not None else None,
        "inputs": listed.hexdigest(),
        "processor": machine.cpu,
        "software": dict(machine.packages),
    }
