"""From images and videos to the folder of results: what `gfldeploy predict` runs."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, nullcontext, suppress
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from gfldeploy.batching.buckets import Order, Size
from gfldeploy.batching.tiles import InTiles, Tiling
from gfldeploy.detection_options import DetectionOptions
from gfldeploy.engines.base import Device, EngineOptions, Precision, Shape
from gfldeploy.engines.cache import DEFAULT_ENGINE_CACHE
from gfldeploy.engines.hardware import processor
from gfldeploy.engines.registry import ENGINES
from gfldeploy.engines.tensorrt import Profile, possible_shapes
from gfldeploy.errors import DataError, OutputError, UsageError
from gfldeploy.files import (
    StrPath,
    Unfinished,
    check_apart,
    check_target,
    files_below,
    publish,
    read_json,
    sha256,
    unfinished_beside,
    writing,
)
from gfldeploy.images.coco import CocoDataset, CocoId
from gfldeploy.machine import describe_machine
from gfldeploy.predict.draw import draw_all, drawing_notes, drawn_from
from gfldeploy.predict.engine_selection import Choice, choose, in_batches
from gfldeploy.predict.live import RECONNECTS, is_live, shown_address
from gfldeploy.predict.outputs import (
    DETECTIONS,
    MADE,
    NOTE,
    PICTURES,
    RESULTS,
    WHAT,
    WORKING,
    PredictResults,
    Summary,
    write_note,
    write_outputs,
)
from gfldeploy.predict.pipeline import Found, in_order
from gfldeploy.predict.resume import WorkingFile, differences, plain_batch
from gfldeploy.predict.shards import ShardJob, Shards, ShardTask, ShardWorker, shard_shapes
from gfldeploy.predict.sources import is_video, list_inputs, looked_at, picture_sizes, read_list, version_of
from gfldeploy.progress import SILENT, Progress
from gfldeploy.serialization import build, plain
from gfldeploy.signals import check_interrupted, hold_interrupts
from gfldeploy.storage import Inputs, Source, Url, source_of
from gfldeploy.system import rename

if TYPE_CHECKING:  # a third of the time until an interruption is answered
    from gfldeploy.cluster.ray_cluster import ClusterOptions

RECORDS = "records.jsonl"  # of a part: the working file, which `merge_parts` reads
_NOT_ASKED = ("what", "images", "failed", "detections", "records", "files")  # of a note, what no question says
HARDWARE = ("processor", "gpus")  # what the parts of one run need not have in common: it is recorded
PART = f"a part of {WHAT}"
# What the note says, for its schema: the question (`_question`), and what came of it.
_NOTED: Mapping[str, Any] = {
    "bundle": str,
    "engine": str,
    "precision": Precision,
    "device": Device,
    "threads": int,
    "streams": int,
    "batch_size": int,
    "order": Order,
    "input_size?": Size,
    "tile?": Size,
    "overlap?": float,
    "shapes?": [Shape],
    "threshold": float,
    "detection?": DetectionOptions,
    "draw_threshold": float | None,
    "decoding": Literal["exact", "reduced"],
    "annotations": str | None,
    "inputs": str,
    "processor": str | tuple[str, ...],
    "tf32?": bool,
    "gpus?": [Any],
    "software": {str: str},
    "images": int,
    "failed": int,
    "detections": int,
    "files": [str],
}
# Of a live source.
_LIVE_NOTED: Mapping[str, Any] = {
    "live?": str,
    "began?": str,
    "dropped?": int,
    "reconnects?": int,
    "latency_s?": tuple[float, float],
    "ended?": str | None,
}
RESULTS_NOTE: Mapping[str, Any] = {"what": Literal["results of gfldeploy predict"], **_NOTED, **_LIVE_NOTED}
PART_NOTE: Mapping[str, Any] = {
    "what": Literal["a part of results of gfldeploy predict"],
    "part": str,
    **_NOTED,
    "listed": int,
    "classes": [str],
    "categories": tuple[CocoId | None, ...] | None,
    "ids": tuple[CocoId, ...] | None,
    "records": str,
}
# Inputs, spread evenly over all, whose headers say which shapes of batches are to come.
_MOST_HEADERS = 4096
# Batches, below which no engine is built for their own shapes alone: they take less time than the build.
_WORTH_A_BUILD = 1000


@dataclass(frozen=True)
class _Request:
    """What to detect in, and what to leave.

    `inputs`: image files and videos. `dataset`: its images are the inputs, and ids are its own. `draw`: the lowest
    score that is drawn; None for no pictures. `part`: (k, n) for the k-th of n parts of the shards; None for all.
    `cluster`: where it is done; None for this process. `cut`: how images are; None for whole ones.
    """

    choice: Choice
    inputs: Sequence[Source]
    output: Source
    dataset: CocoDataset | None
    draw: float | None
    reduced: bool
    force: bool
    part: tuple[int, int] | None
    cluster: ClusterOptions | None = None
    cut: InTiles | None = None

    @property
    def shards(self) -> Shards:
        """All of the inputs."""
        return Shards(len(self.inputs), self.choice.batch_size)

    @property
    def mine(self) -> range:
        """The numbers of the shards that are detected in."""
        return part_of(len(self.shards), *(self.part or (1, 1)))

    @property
    def places(self) -> slice:
        """Of the inputs of these shards, which are consecutive."""
        return slice(self.mine.start * self.shards.size, self.mine.stop * self.shards.size)

    @property
    def image_ids(self) -> list[CocoId] | None:
        """Those of the annotations, one for each input."""
        return [image.id for image in self.dataset.images] if self.dataset else None


def part_of(shards: int, number: int, parts: int) -> range:
    """The numbers of the shards of a part, from 1, of so many parts: none where there are fewer shards than parts."""
    return range((number - 1) * shards // parts, number * shards // parts)


def predict_images(
    source: StrPath,
    inputs: StrPath | Iterable[StrPath] = (),
    *,
    output: StrPath,
    input_list: StrPath | None = None,
    data: StrPath | None = None,
    draw: bool = False,
    threshold: float | None = None,
    class_thresholds: Mapping[str, float] | None = None,
    classes: Sequence[str | int] | None = None,
    score_threshold: float | None = None,
    nms_threshold: float | None = None,
    keep_top_k: int | None = None,
    class_agnostic: bool | None = None,
    draw_threshold: float | None = None,
    decode: Literal["exact", "fast"] = "exact",
    engine: str | None = None,
    precision: Precision | None = None,
    device: Device | None = None,
    tf32: bool | None = None,
    threads: int | None = None,
    streams: int | None = None,
    input_size: Size | None = None,
    tile: Size | None = None,
    overlap: float | None = None,
    batch_size: int | None = None,
    order: Order | None = None,
    engine_cache: StrPath = DEFAULT_ENGINE_CACHE,
    shard: tuple[int, int] | None = None,
    ray: str | None = None,
    workers: int | None = None,
    gpus_per_worker: float | None = None,
    duration: float | None = None,
    reconnects: int | None = None,
    force: bool = False,
    progress: Progress = SILENT,
) -> PredictResults:
    """Detect in images, folders of them, and videos, or a live source, and write a folder of results in one step.

    After an interruption the same call resumes where it stopped and writes the same files: finished batches are kept in
    a folder beside the output. An argument that is None is as in `deploy.yml`, or as `Detector` chooses for a bundle,
    but `streams`.

    Args:
        source: The directory of a bundle, or the `deploy.yml` that `tune_bundles` wrote.
        inputs: Images, videos and folders of them, paths or addresses of filesystems (s3://, gs://, hdfs://, file://).
            With `data`, the one folder in which its file names start, or none. Or one live source: the number of a
            camera, as text, or the address of a stream (rtsp://, http://).
        output: The folder to write, a path or an address: `detections.jsonl`, `coco.json`, `images.json`, and
            `pictures/` with `draw`.
        input_list: A text file that names a file on each line, a path or an address, beside `inputs`.
        data: COCO annotations (.json) whose images are detected in, and whose ids are used.
        draw: Draw the boxes, too: pictures of images, and videos of videos.
        threshold: The lowest score in `detections.jsonl` and in pictures, by default 0.5. `coco.json` has all that NMS
            leaves.
        class_thresholds: For some classes, by name or id, another one: `{"person": 0.3}`. What it shows is in
            `coco.json`, too, even beyond `keep_top_k`.
        classes: The classes to detect, names or ids; by default all. NMS, and so all files, are without the others.
        score_threshold: Detections must score more to leave NMS; by default, as the next two, as in the detector's
            config.
        nms_threshold: NMS drops a box whose IoU with a better one of its class is above this.
        keep_top_k: The most detections of an image, the best ones.
        class_agnostic: NMS drops a box for a better one of any class; by default of its own.
        draw_threshold: The lowest score in pictures, if a higher one than in `detections.jsonl`.
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
        tile: The size, (height, width) in pixels of the image, of tiles that larger images are cut into, so that small
            objects keep their size; such an image is detected in as a whole, too. See `batching.tiles.Tiling`.
        overlap: Of two neighbouring tiles, by the side of a tile; by default 0.2.
        batch_size: Images, or tiles of an image, of one inference. Of a bundle by default 1; in ONNX Runtime on few
            CPUs up to 4 small ones, which has the same results in less time.
        order: How images are put into batches: "bucketed" ones have images of one input size, which pads none. Tiles
            always are put so, those of an image by themselves.
        engine_cache: The folder in which engines that compile keep the result.
        shard: (k, n) detects in the k-th of n parts of the inputs, k from 1, and writes a folder that `merge_parts`
            makes results of, with those of the other parts. Each is given the same arguments but this and `output`.
            A part that is there already, by the same arguments, is left as it is.
        ray: Detect with workers on a Ray cluster: HOST:PORT of its head, "auto" for that of this machine, or "local"
            for one of this machine alone, which ends with the call. The results have the same bytes.
        workers: How many workers; by default as many as the cluster has room for. Each takes `threads` times `streams`
            CPUs.
        gpus_per_worker: GPUs of one worker, by default 1 on GPUs and else 0.
        duration: Stop a live source after so many seconds; otherwise until it is gone, or Ctrl-C or SIGTERM
            stop it.
        reconnects: How often to try to make a lost connection of a live source again, by default 10.
        force: Replace the output if gfldeploy made it, and what is left of another run.
        progress: Told of the engine that was chosen, of notes, and of the images that are done.

    Returns:
        How many images there were, how many could not be read, and why.

    Raises:
        UsageError: There is nothing to detect in, pictures are asked of a part, or tiles of images decoded "fast";
            there is no such class, or thresholds contradict each other.
        BundleError: The bundle is damaged, or not the one that `deploy.yml` is about.
        DataError: An input is not there, or no image at all can be read.
        ServerError: A store of files at addresses does not answer, or lets nobody in.
        MissingDependencyError: The package for a filesystem is not installed.
        OutputError: The output cannot be written, or something is in the way, such as what another call left.
        UnsupportedError: Nothing here can run the bundle so.
        EngineError: The engine failed, or differs from the CPU (compared for GPUs and engines of other packages).
    """
    if decode not in ("exact", "fast"):
        raise ValueError(f"decode must be exact or fast, not {decode!r}")
    if shard is not None and not 1 <= shard[0] <= shard[1]:
        raise ValueError(f"shard must be (k, n) with k from 1 to n, not {shard!r}")
    if shard is not None and draw:
        raise UsageError("a part has no pictures", "Give --draw to `gfldeploy merge`, which needs the images again.")
    if duration is not None and not duration > 0:
        raise ValueError(f"duration is above 0, not {duration}")
    tiling = Tiling.of(tile, overlap)
    if tiling is not None and decode == "fast":
        raise UsageError("tiles are cut out of all the pixels of an image", "Leave --decode fast out, or --tile.")
    # Before OpenCV is loaded: what its video library has to say comes as an error of ours.
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
    named = [inputs] if isinstance(inputs, str | os.PathLike) else list(inputs)
    live = next((text for one in named if is_live(text := os.fspath(one))), None)
    if live is None and (duration, reconnects) != (None, None):
        raise UsageError("a duration and reconnects are of a live source", "Give a camera or a stream as INPUT.")
    given = [source_of(one) for one in named if live is None]
    if live is not None:
        others: dict[str, object] = {
            "--data": data,
            "--input-list": input_list,
            "--shard": shard,
            "--ray": ray,
            "--workers": workers,
            "--gpus-per-worker": gpus_per_worker,
            "--decode fast": None if decode == "exact" else decode,
        }
        if tiling is None and batch_size is not None and batch_size > 1:
            others["--batch-size"] = batch_size  # of tiles it is the number
        if found := [name for name, value in others.items() if value is not None] + ["other inputs"] * (len(named) > 1):
            problem = f"{shown_address(live)} is a live source, which does not go with {', '.join(found)}"
            raise UsageError(problem, "Give it as the only INPUT, without them.")
    listed = None if input_list is None else Path(input_list)
    folder = source_of(output)
    detection = DetectionOptions.of(
        threshold, class_thresholds, classes, score_threshold, nms_threshold, keep_top_k, class_agnostic
    )
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
        throughput=live is None,  # of one after the other, each has all of the CPUs
        small_batches=live is None,
        input_size=input_size,
        detection=detection,
    )
    names = choice.bundle.manifest.classes
    drawn = drawn_from(draw, draw_threshold, choice.detection.shown(names))
    annotations = None if data is None else Path(data)
    read: list[Source] = [Path(source), *given, *(path for path in (annotations, listed) if path is not None)]
    check_apart(folder, read, choice.bundle.directory)
    cluster = None
    if (ray, workers, gpus_per_worker) != (None, None, None):
        from gfldeploy.cluster.ray_cluster import ClusterOptions

        cluster = ClusterOptions.of(ray, workers, gpus_per_worker, choice.options)
    dataset, files, notes = (None, (), []) if live else _inputs(given, listed, annotations, folder)
    if dataset is not None:
        notes += [*dataset.notes, *dataset.match(names).notes]
    if draw:
        notes += drawing_notes(names, any(map(is_video, files)))
    if live is not None and tiling is None:
        choice = replace(choice, batch_size=1)  # a frame does not wait for others
    for note in (*choice.notes, *notes):
        progress.note(note)
    progress.stage(str(choice))
    cut = None if tiling is None else InTiles(tiling, choice.batch_size)
    request = _Request(choice, files, folder, dataset, drawn, decode == "fast", force, shard, cluster, cut)
    if live is None:
        return _predict(request, progress)
    from gfldeploy.predict.recording import LiveRequest, record_live

    question = {**_question(request), "live": shown_address(live)}
    tries = RECONNECTS if reconnects is None else reconnects
    return record_live(LiveRequest(choice, live, folder, question, request.draw, force, cut, duration, tries), progress)


def _inputs(
    inputs: Sequence[Source], listed: Path | None, data: Path | None, output: Source
) -> tuple[CocoDataset | None, Sequence[Source], list[str]]:
    """The annotations, the files, and notes on what is not among them."""
    if data is None:
        if not inputs and listed is None:
            problem = "there is nothing to detect in"
            raise UsageError(problem, "Give images, videos or folders as INPUT, or --input-list, or --data.")
        notes: list[str] = []
        exclude = [output]
        if isinstance(output, Path):
            output = Path(os.path.abspath(output))  # noqa: PTH100 - "." has no name, and links are not to be followed
            exclude = [output, output.with_name(f"{output.name}.unfinished")]
        found = list_inputs(inputs, exclude, notes.append)
        if listed is not None:
            found = Inputs(chain(found, looked_at(read_list(listed), notes.append)), once=True)
        return None, found, notes
    if listed is not None:
        raise UsageError("--data and --input-list both say what to detect in", "Give one of them.")
    if len(inputs) > 1:
        raise UsageError("with --data, INPUT is the folder in which its file names start", "Give one at most.")
    if any(isinstance(one, Url) for one in inputs):
        raise UsageError("with --data, the images are in a folder of this machine", "Leave --data out, or copy them.")
    dataset = CocoDataset.load(data, str(inputs[0]) if inputs else None)
    files: list[Source] = [image.path for image in dataset.images]
    if len(set(files)) < len(files):
        raise DataError(f"{data} lists a file twice", "Give every image one id.")
    return dataset, files, []


def _predict(request: _Request, progress: Progress) -> PredictResults:
    classes, detection = request.choice.bundle.manifest.classes, request.choice.detection
    categories = request.dataset.class_to_category(classes) if request.dataset else None
    about = {
        "listed": len(request.inputs),
        "classes": classes,
        "categories": categories,
        "ids": request.image_ids and request.image_ids[request.places],
    }
    try:
        check_target(request.output, "predict", force=request.force)
    except OutputError:
        again = request.part is not None and not request.force
        if not again or (done := _done_before(request, {**_question(request), **about})) is None:
            raise
        progress.note(f"{request.output} is this part already: nothing is done again")
        with suppress(OutputError), unfinished_beside(request.output, "predict", MADE):
            pass  # a run that was killed after it had written all has left its folder
        return done
    with unfinished_beside(request.output, "predict", MADE) as unfinished:
        question = _question(request)
        results = unfinished.directory / RESULTS
        path = unfinished.directory / WORKING
        with writing(request.output):
            if (results / RECORDS).exists() and not path.exists():  # killed between the last two steps of a part
                rename(results / RECORDS, path)
        with WorkingFile(path, question, request.mine, len(classes), anew=request.force) as working:
            kept = working.images
            unfinished.worth_keeping = bool(kept)
            with writing(request.output):
                if not working.complete:
                    shutil.rmtree(results, ignore_errors=True)  # of a run that this one replaces
                results.mkdir(exist_ok=True)
                for file in results.iterdir():
                    if file.name != PICTURES:
                        file.unlink()
            # Written while the others are detected: formatting takes no time of its own at the end.
            with closing(_detected(request, unfinished, working, progress)) as found:
                if request.part is None:
                    summary = write_outputs(
                        results, found, classes, request.image_ids, categories, detection, request.output
                    )
                else:
                    counted = Summary(detection.shown(classes))
                    for image in found:
                        counted.add(image)
                    summary = counted.results()
            question |= processors(question, working.processors)
        if request.part is None:
            with writing(request.output):
                if summary.failed == summary.images:
                    unfinished.worth_keeping = False
                finish_results(results, question, summary, request.draw, progress)
        else:
            with writing(request.output):
                write_note(results, PART, question, summary, {**about, "records": sha256(path), "files": [RECORDS]})
        check_interrupted()
        # An upload takes a while, and the next run begins it again.
        with writing(request.output), hold_interrupts() if isinstance(request.output, Path) else nullcontext():
            check_target(request.output, "predict", force=request.force)  # another process may have written it
            if request.part is not None:
                rename(path, results / RECORDS)
            publish(results, request.output, "predict")
            unfinished.worth_keeping = False
            shutil.rmtree(results, ignore_errors=True)  # those that were replaced
    return replace(summary, kept=kept)


def _done_before(request: _Request, question: Mapping[str, Any]) -> PredictResults | None:
    """What the output holds, if it is the part that this request asks for, whatever processor did it.

    A scheduler starts a job again whose machine goes before it is told that the job has ended.
    """
    output = request.output
    try:
        note = read_json(output / NOTE)
        counts = [note.get(name) for name in ("images", "failed", "detections")]
        asked = {name: value for name, value in note.items() if name not in _NOT_ASKED}
        same = note.get("what") == PART and not {*differences(asked, question)} - {*HARDWARE}
        if not same or any(type(one) is not int for one in counts):
            return None
        # At an address the note was written last, and reading all is no small matter.
        if isinstance(output, Path) and sha256(output / RECORDS) != note.get("records"):
            return None
    except (OSError, ValueError, AttributeError):  # no note, or none of ours
        return None
    images, failed, detections = counts
    return PredictResults(images, failed, (), detections, kept=images)


def processors(question: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """What the question says of processors once the work is done: all, where they were several."""
    several = sorted({*names})
    return {"processor": several} if len(several) > 1 else {"processor": several[0]} if several else {}


def finish_results(
    results: Path, question: Mapping[str, Any], summary: PredictResults, draw: float | None, progress: Progress
) -> None:
    """Draw into a folder what `write_outputs` wrote there, and write its note.

    Raises `DataError` if all images failed, and what `draw_all` raises.
    """
    if summary.failed == summary.images:
        raise DataError(f"none of {summary.images} images can be used: {summary.reasons[0]}", None)
    if draw is not None:
        (results / PICTURES).mkdir(exist_ok=True)
        for done in draw_all(results / DETECTIONS, results / PICTURES, draw):
            progress.step("drawing", done, summary.images)
    write_note(results, WHAT, question, summary, {"files": files_below(results)})


def _detected(request: _Request, unfinished: Unfinished, working: WorkingFile, progress: Progress) -> Generator[Found]:
    """Every image in order, from the working file or as it is detected; what is not there yet is added to it."""
    if request.cluster is not None:
        yield from _elsewhere(request, request.cluster, unfinished, working, progress)
        return
    with closing(_here(request, unfinished, working, progress)) as arriving:
        for number in request.mine:
            groups: Iterator[list[Found]] = working.groups(number)
            if not working.ended(number):
                groups = chain(groups, _rest(arriving))
            yield from in_order(((one.index, one) for one in group) for group in groups)


def _elsewhere(
    request: _Request, cluster: ClusterOptions, unfinished: Unfinished, working: WorkingFile, progress: Progress
) -> Generator[Found]:
    """As `_detected`, on a cluster: a shard is read from the working file when it has ended there."""
    from gfldeploy.predict.ray_shards import shards_on_ray

    with ExitStack() as stack:
        arriving: Iterator[None] = iter(())
        total = 0
        if not working.complete:
            known: dict[Source, Size | None] = {}
            options, total = _options(request, known)
            progress.step("detecting", working.images, total)
            arriving = stack.enter_context(
                closing(
                    shards_on_ray(
                        cluster,
                        ShardJob.of(request.choice, options, request.reduced, request.cut),
                        request.choice.bundle,
                        request.inputs,
                        known,
                        request.shards,
                        (number for number in request.mine if not working.ended(number)),
                        working,
                        images=total - working.images,
                        progress=progress,
                    )
                )
            )
        for number in request.mine:
            while not working.ended(number):
                next(arriving)
                unfinished.worth_keeping = True
                progress.step("detecting", working.images, max(total, working.images))
            yield from in_order(((one.index, one) for one in group) for group in working.groups(number))
        for _ in arriving:
            raise AssertionError("more came than was asked for")


def _rest(arriving: Iterator[list[Found]]) -> Iterator[list[Found]]:
    """The batches to the end of a shard, which is one without images."""
    while batch := next(arriving):
        yield batch


def _here(
    request: _Request, unfinished: Unfinished, working: WorkingFile, progress: Progress
) -> Generator[list[Found]]:
    """The batches that this process finds, once they are in the working file; after each shard one without images."""
    choice, inputs = request.choice, request.inputs
    here = processor(choice.options.device == "gpu")
    known: dict[Source, Size | None] = {}
    options, total = _options(request, known)
    tasks = (
        ShardTask(one.number, inputs[one.start : one.stop], working.batches(one.number), working.bad(one.number))
        for one in map(request.shards.__getitem__, request.mine)
        if not working.ended(one.number)
    )
    with ShardWorker(ShardJob.of(choice, options, request.reduced, request.cut), progress, choice.bundle) as worker:
        progress.step("detecting", working.images, total)
        with closing(worker.detect_shards(tasks, known)) as found:
            for number, batch in found:
                if batch:
                    working.add(number, [plain_batch(batch)])
                    unfinished.worth_keeping = True
                    progress.step("detecting", working.images, max(total, working.images))
                else:
                    working.end(number, here)
                yield batch


def _options(request: _Request, known: dict[Source, Size | None]) -> tuple[EngineOptions, int]:
    """The engine's, with the shapes of the inputs to come, and about how many images there are in these shards.

    By the headers of at most `_MOST_HEADERS` of all inputs, the same for every part of them; `known` receives the (h,
    w) in pixels of those image files. An engine that is built for shapes is built for those of the choice, so that
    other inputs need no other build: in minutes many images run. It is built for the inputs' own where `deploy.yml` has
    none and they are many, for speed, and where those of `deploy.yml` do not cover them.
    """
    choice, inputs = request.choice, request.inputs
    manifest, options = choice.bundle.manifest, choice.options
    count = min(len(inputs), _MOST_HEADERS)
    read = [inputs[place * len(inputs) // count] for place in range(count)]
    step = request.shards.size
    sizes = [list(picture_sizes(read[start : start + step], known)) for start in range(0, count, step)]
    shapes = list(shard_shapes(sizes, manifest, choice.batch_size, choice.order, request.cut))
    times = len(inputs) / max(count, 1)
    of_mine = len(request.mine) / max(len(request.shards), 1)
    total = round(sum(map(len, sizes)) * times * of_mine)
    expecting = options.expecting(shapes)
    expecting = replace(expecting, counts=tuple(round(count * times) for count in expecting.counts))
    if not ENGINES[choice.engine].needs_shapes:
        return expecting, total
    anything = options.shapes == possible_shapes(manifest, choice.batch_size)
    covered = Profile.spanning(options.shapes).covers(*expecting.shapes)
    if covered and (not anything or len(shapes) * times < _WORTH_A_BUILD):
        return options, total
    single = in_batches(expecting.shapes, manifest.inputs[0].shape[0] or 1)  # of a batch, few may be readable
    return replace(options, shapes=tuple(dict.fromkeys((*expecting.shapes, *single)))), total


def question_of(detection: DetectionOptions) -> dict[str, Any]:
    """What a question says of it; `detection_of` is the inverse."""
    given = plain({name: value for name, value in detection.given.items() if name != "threshold"})
    return {"threshold": detection.lowest, **({"detection": given} if given else {})}


def detection_of(question: Mapping[str, Any]) -> DetectionOptions:
    """What a question from a file says of it. Raises `DataError`."""
    given = question.get("detection", {})
    return build(DetectionOptions, {**given, "threshold": question["threshold"]} if isinstance(given, dict) else given)


def _question(request: _Request) -> dict[str, Any]:
    """Everything that the results depend on, by names for messages."""
    choice = request.choice
    machine = describe_machine()
    listed = hashlib.sha256()
    for path in request.inputs:
        listed.update(repr(version_of(path)).encode())
    ids = request.image_ids
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
        **(plain(request.cut.tiling) if request.cut else {}),
        **({"shapes": choice.options.shapes} if choice.options.shapes else {}),
        **question_of(choice.detection),
        "draw_threshold": request.draw,
        "decoding": "reduced" if request.reduced else "exact",
        "annotations": hashlib.sha256(repr(ids).encode()).hexdigest() if ids is not None else None,
        "inputs": listed.hexdigest(),
        **({"part": f"{request.part[0]}/{request.part[1]}"} if request.part else {}),
        "processor": machine.cpu,
        **(on_gpu if choice.options.device == "gpu" else {}),
        "software": dict(machine.packages),
    }
