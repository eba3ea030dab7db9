"""COCO accuracy: detections in COCO's format, average precision, and a whole model over a whole dataset."""

from __future__ import annotations

import contextlib
import copy
import io
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gfldeploy.batch_detection import DetectBatches, DetectionJob, detect_images, detect_on_ray
from gfldeploy.batching.buckets import Order, Size, group, size_in_words
from gfldeploy.batching.tiles import InTiles, Tiling
from gfldeploy.bundle import Bundle
from gfldeploy.cluster.ray_cluster import ClusterOptions
from gfldeploy.detection_options import AS_CONFIGURED, DetectionOptions
from gfldeploy.detections import Detections
from gfldeploy.engines.base import Device, Engine, Precision, Shape
from gfldeploy.engines.cache import DEFAULT_ENGINE_CACHE
from gfldeploy.engines.registry import open_by_itself, open_engine
from gfldeploy.engines.selection import select_engine, throughput_options
from gfldeploy.errors import DataError, UnsupportedError, UsageError
from gfldeploy.files import StrPath
from gfldeploy.images.coco import CocoDataset, CocoId
from gfldeploy.images.preprocess import Preprocess
from gfldeploy.nms import NmsParams
from gfldeploy.progress import SILENT, Progress
from gfldeploy.serialization import plain

_RESAMPLES = 100


@dataclass(frozen=True)
class Accuracy:
    """COCO's average precisions, from 0 to 1, over `images` images with `detections` detections.

    `ap` is over IoU 0.50 to 0.95, `ap50` and `ap75` at one IoU; `ap_small`, `ap_medium` and `ap_large` are for objects
    below 32², between, and from 96² square pixels. `ap` is always there; as in pycocotools, another that is -1 is
    undefined, as the data have no such objects.
    """

    ap: float
    ap50: float
    ap75: float
    ap_small: float
    ap_medium: float
    ap_large: float
    images: int
    detections: int

    def to_dict(self) -> dict[str, float | int]:
        """Every field, ready for JSON."""
        return asdict(self)


def coco_results(
    image_id: CocoId, detections: Detections, class_to_category: Sequence[CocoId | None]
) -> list[dict[str, Any]]:
    """The detections of one image in COCO's result format: bbox is x, y, width, height in original pixels.

    Width is x2 - x1, as PaddleDetection has it (`bias` 0). A detection without a category (None) is left out, such as
    those of the score channel that GFLv2's head has beyond its classes.
    """
    rows = zip(detections.boxes.tolist(), detections.scores.tolist(), detections.classes.tolist(), strict=True)
    return [
        {
            "image_id": image_id,
            "category_id": class_to_category[category],
            "bbox": [x1, y1, x2 - x1, y2 - y1],
            "score": score,
        }
        for (x1, y1, x2, y2), score, category in rows
        if 0 <= category < len(class_to_category) and class_to_category[category] is not None
    ]


def check_measurable(dataset: CocoDataset, category_ids: Sequence[CocoId | None] | None = None) -> None:
    """Raise `DataError` where average precision is undefined: there is no box that a detector must find.

    `category_ids`: as for `coco_accuracy`. Boxes marked as crowds are none.
    """
    if not dataset.annotations:
        raise DataError(
            f"the {len(dataset.images)} images have no annotations, so there is no accuracy to measure",
            "Use more images, or annotations with boxes.",
        )
    counted = {item.category_id for item in dataset.annotations if not item.crowd}
    if not (counted if category_ids is None else counted.intersection(category_ids)):
        raise DataError(
            f"the {len(dataset.images)} images have no boxes of the detector's classes but crowds, so mAP is undefined",
            "Use more images, or annotations with boxes of what the detector finds.",
        )


def coco_accuracy(
    dataset: CocoDataset, results: Sequence[dict[str, Any]], category_ids: Sequence[CocoId | None] | None = None
) -> Accuracy:
    """Average precision of `results` (COCO's result format) over the images of `dataset`, by pycocotools' COCOeval.

    `category_ids`: the categories that count, those of the detector's classes; default: all. No results at all give 0,
    not an error. Raises `DataError` when mAP is undefined, see `check_measurable`, or a result is of an image outside
    the dataset.
    """
    stats = _compared(dataset, results, category_ids).stats[:6]
    ap, ap50, ap75, small, medium, large = (float(value) for value in stats)
    return Accuracy(ap, ap50, ap75, small, medium, large, len(dataset.images), len(results))


def ap_difference(
    dataset: CocoDataset,
    first: Sequence[dict[str, Any]],
    second: Sequence[dict[str, Any]],
    resamples: int = _RESAMPLES,
    seed: int = 0,
) -> tuple[float, float, float]:
    """How much higher the AP of the results `first` is than that of `second`, and its 95% interval.

    The interval is that of a percentile bootstrap over images (Efron and Tibshirani, An Introduction to the Bootstrap,
    1993, chapter 13), both sides on the same resample. Raises `DataError` as `coco_accuracy` does.
    """
    sides = [_compared(dataset, results) for results in (first, second)]
    value = float(sides[0].stats[0] - sides[1].stats[0])
    generator, count = np.random.default_rng(seed), len(dataset.images)
    drawn = (generator.integers(count, size=count) for _ in range(resamples))
    low, high = np.percentile([_ap_of(sides[0], one) - _ap_of(sides[1], one) for one in drawn], [2.5, 97.5])
    return value, float(low), float(high)


def _compared(
    dataset: CocoDataset, results: Sequence[dict[str, Any]], category_ids: Sequence[CocoId | None] | None = None
) -> Any:
    """A pycocotools COCOeval that is done. Raises `DataError`, see `coco_accuracy`."""
    from pycocotools.cocoeval import COCOeval

    check_measurable(dataset, category_ids)
    # pycocotools sorts ids as numbers of 64 bits: it gets numbers of ours.
    images = {image.id: number for number, image in enumerate(dataset.images, start=1)}
    kept = None if category_ids is None else set(category_ids)
    categories = {
        category.id: number
        for number, category in enumerate(dataset.categories, start=1)
        if kept is None or category.id in kept
    }
    if strangers := {result["image_id"] for result in results} - images.keys():
        raise DataError(
            f"there are results for {len(strangers)} images outside the data, such as {next(iter(strangers))}",
            "Measure them against the annotations of the same images.",
        )
    truth = [
        {
            "image_id": images[item.image_id],
            "category_id": categories[item.category_id],
            "bbox": list(item.bbox),
            "area": item.area,
            "iscrowd": int(item.crowd),
        }
        for item in dataset.annotations
        if item.category_id in categories
    ]
    found = [
        {
            "image_id": images[result["image_id"]],
            "category_id": categories[result["category_id"]],
            "score": result["score"],
            "area": result["bbox"][2] * result["bbox"][3],
            "iscrowd": 0,
            "bbox": list(result["bbox"]),
        }
        for result in results
        if result["category_id"] in categories
    ]
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints as it goes
        sides = [_coco(images.values(), categories.values(), rows) for rows in (truth, found)]
        evaluation = COCOeval(*sides, "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    if not evaluation.stats[0] >= 0:
        raise DataError("mAP is undefined: no box of the annotations counts", "Check the areas of the boxes.")
    return evaluation


def _ap_of(evaluation: Any, images: NDArray[np.int64]) -> float:
    """AP over these of the compared images, by their places; an image may be there more than once."""
    again = copy.copy(evaluation)
    again.params = copy.deepcopy(evaluation.params)
    # Only of objects of all sizes, the first of four ranges, and of the largest number of detections: a quarter of the
    # work.
    ranges, categories, count = len(again.params.areaRng), len(again.params.catIds), len(again.params.imgIds)
    again.params.areaRng, again.params.maxDets = again.params.areaRng[:1], again.params.maxDets[-1:]
    again._paramsEval = again.params
    places = [category * ranges * count + image for category in range(categories) for image in images]
    again.evalImgs = [evaluation.evalImgs[place] for place in places]
    with contextlib.redirect_stdout(io.StringIO()):
        again.accumulate()
    precision = again.eval["precision"]
    return float(precision[precision > -1].mean()) if (precision > -1).any() else -1.0


_DEFINED: Mapping[str, Any] = {
    "ap": float,
    **dict.fromkeys(("ap50", "ap75", "ap_small", "ap_medium", "ap_large"), float | None),
    "images": int,
    "detections": int,
}
# What `EvalResults.to_dict` gives.
EVALUATED: Mapping[str, Any] = {
    **_DEFINED,
    "notes": [str],
    "detection?": DetectionOptions,
    "tile?": Size,
    "overlap?": float,
    "input_sizes?": {str: _DEFINED},
}


@dataclass(frozen=True)
class EvalResults:
    """What `evaluate` measured, and in which engine and precision.

    `matched`: how many of the detector's `classes` are categories of the annotations. `notes`: what the user should
    know of the detector and the data. `at_sizes`: by input size, (height, width) in pixels, in the order in which they
    were asked for, empty if none was; `accuracy` is then that of the first. `tiling`: how images were cut; None for
    whole ones. `detection`: what was turned of NMS.
    """

    accuracy: Accuracy
    engine: str
    precision: Precision
    classes: int
    matched: int
    notes: tuple[str, ...]
    tf32: bool = False
    at_sizes: Mapping[Size, Accuracy] = field(default_factory=dict)
    tiling: Tiling | None = None
    detection: DetectionOptions = AS_CONFIGURED

    def to_dict(self) -> dict[str, Any]:
        """The accuracy, ready for JSON, with None for what is undefined; the notes; what was turned of NMS, the tiles,
        and `input_sizes`, by their names, if any were asked for.
        """
        values = {**_defined(self.accuracy), "notes": list(self.notes)}
        if self.detection.given:
            values["detection"] = plain(self.detection.given)
        if self.tiling:
            values |= plain(self.tiling)
        if self.at_sizes:
            values["input_sizes"] = {size_in_words(size): _defined(one) for size, one in self.at_sizes.items()}
        return values


def _defined(found: Accuracy) -> dict[str, Any]:
    return {name: None if value == -1 else value for name, value in found.to_dict().items()}


def evaluate(
    bundle: StrPath,
    *,
    data: StrPath,
    images: StrPath | None = None,
    classes: Sequence[str | int] | None = None,
    score_threshold: float | None = None,
    nms_threshold: float | None = None,
    keep_top_k: int | None = None,
    class_agnostic: bool | None = None,
    engine: str | None = None,
    precision: Precision | None = None,
    device: Device | None = None,
    tf32: bool | None = None,
    threads: int | None = None,
    input_sizes: Sequence[Size] = (),
    tile: Size | None = None,
    overlap: float | None = None,
    batch_size: int = 1,
    order: Order = "listed",
    limit: int | None = None,
    end_to_end: bool = False,
    ray: str | None = None,
    workers: int | None = None,
    gpus_per_worker: float | None = None,
    engine_cache: StrPath = DEFAULT_ENGINE_CACHE,
    progress: Progress = SILENT,
) -> EvalResults:
    """Measure the COCO mAP of a bundle in an engine: preprocessing and NMS are the same in all engines.

    On the machines of a Ray cluster batches, and so the accuracy, are those of one machine with the same threads.

    Args:
        bundle: The directory of the bundle.
        data: COCO annotations (.json).
        images: The folder in which their file names start; by default `images/` beside them, else their folder.
        classes: The classes to detect, names or ids, by default all: mAP is of these alone, and NMS does not see the
            others.
        score_threshold: Detections must score more to leave NMS; by default, as the next two, as in the detector's
            config. What is left out lowers mAP.
        nms_threshold: NMS drops a box whose IoU with a better one of its class is above this.
        keep_top_k: The most detections of an image, the best ones.
        class_agnostic: NMS drops a box for a better one of any class; by default of its own.
        engine: By default the preferred engine of those that can run the bundle.
        precision: By default that of the bundle.
        device: By default the CPU.
        tf32: Let FP32 on a GPU multiply in TF32; by default not.
        threads: CPU threads of one inference; by default all.
        input_sizes: The sizes, (height, width) in pixels, to which images are resized, as `target_size` in
            PaddleDetection, one after the other; by default that of the bundle.
        tile: The size, (height, width) in pixels of the image, of tiles that larger images are cut into; such an image
            is detected in as a whole, too. By default none is cut.
        overlap: Of two neighbouring tiles, by the side of a tile; by default 0.2.
        batch_size: Images, or tiles of an image, of one inference.
        order: How images are put into batches. In "bucketed" ones all have one input size, and none is padded. Tiles
            always are put so, those of an image by themselves.
        limit: Use only this number of images, the first of the annotations.
        end_to_end: Run the file that deploys by itself, with its own normalisation, padding and NMS.
        ray: The address of a Ray cluster whose machines detect, or "local" for one on this machine. They find the
            images at the same paths.
        workers: How many processes detect there; by default as many as there is room for.
        gpus_per_worker: Of a GPU, what one of them has.
        engine_cache: The folder in which engines that compile keep the result.
        progress: Told of the images that are done, and of an engine that is built.

    Returns:
        The average precisions, and what they were measured with.

    Raises:
        UsageError: The tiles cannot be, there is no such class, or the NMS of the file that deploys by itself was to be
            turned.
        BundleError: The bundle is damaged, or does not take an input size.
        DataError: Annotations or an image cannot be read, or leave mAP undefined.
        UnsupportedError: The bundle does not run in this engine, precision or batch size.
        EngineError: The engine failed.
        OutputError: The engine cannot keep what it compiled.
    """
    tiling = Tiling.of(tile, overlap)
    opened = Bundle.open(bundle)
    detection = DetectionOptions.of(
        classes=classes,
        score_threshold=score_threshold,
        nms_threshold=nms_threshold,
        keep_top_k=keep_top_k,
        class_agnostic=class_agnostic,
    )
    manifest = opened.manifest.turned(detection)
    if end_to_end and detection != AS_CONFIGURED:
        raise UsageError(
            f"the file that deploys by itself has its own NMS, so {', '.join(detection.given)} cannot be turned",
            "Leave it out, or --end-to-end.",
        )
    at_sizes = {size: opened.at_size(size) for size in input_sizes or (None,)}
    dataset = CocoDataset.load(data, images, limit)
    count, fixed = len(dataset.images), manifest.inputs[0].shape[0]
    if tiling is not None and fixed not in (None, 1):
        raise UnsupportedError(
            f"{opened.directory} takes batches of {fixed} only, and images are other numbers of tiles",
            "Export it again without a fixed batch size.",
        )
    if fixed is not None and (fixed != batch_size or count % fixed):
        remedy = f"Use --batch-size {fixed} --limit {count - count % fixed}." if count >= fixed else "Add images."
        raise UnsupportedError(
            f"{opened.directory} takes batches of {fixed} only, not {count} images in batches of {batch_size}", remedy
        )
    name, options, _ = select_engine(opened, engine, precision, device, threads, Path(engine_cache), tf32)
    if threads is None:
        options = throughput_options(name, options, batch_size)
    if ray is not None:
        options = replace(options, streams=1)  # each worker is one, of as many threads as a stream has here
    cluster = ClusterOptions.of(ray, workers, gpus_per_worker, options)
    match = dataset.match(manifest.classes)
    size_note = dataset.size_note()
    notes = (*manifest.notes, *dataset.notes, *match.notes, *([size_note] if size_note else []))
    for note in notes:
        progress.note(note)
    cut = None if tiling is None else InTiles(tiling, batch_size)
    found: dict[Size | None, Accuracy] = {}
    with cluster.connected() if cluster else contextlib.nullcontext():
        for size, sized in at_sizes.items():
            preprocess = sized.manifest.preprocess
            # Known beforehand, they settle what runs an input, which streams would leave to chance.
            expected = replace(options, progress=progress).expecting(
                batch_shapes(dataset, preprocess, batch_size, order, cut)
            )
            label = "evaluating" if size is None else f"evaluating at {size_in_words(size)}"
            how = batch_size, order, progress, label, cut, detection.kept(manifest.classes)
            if cluster is not None:
                by_itself, size_of = end_to_end, preprocess.target_size
                job = DetectionJob(name, expected.to_plain(), size_of, by_itself, cut=cut, detection=detection)
                detect = partial(
                    detect_on_ray, cluster, job, opened, [image.path for image in dataset.images], progress
                )
                found[size] = accuracy_of(detect, dataset, preprocess, manifest.classes, *how)
                continue
            opened_as = open_by_itself if end_to_end else open_engine
            with opened_as(name, sized, expected) as running:
                found[size] = measure_accuracy(running, dataset, preprocess, manifest.nms, manifest.classes, *how)
    matched = sum(match.category_ids[number] is not None for number in detection.kept(manifest.classes))
    return EvalResults(
        next(iter(found.values())),
        name,
        options.precision,
        len(manifest.classes),
        matched,
        notes,
        options.tf32,
        {size: one for size, one in found.items() if size is not None},
        tiling,
        detection,
    )


def measure_accuracy(
    engine: Engine,
    dataset: CocoDataset,
    preprocess: Preprocess,
    nms: NmsParams,
    classes: Sequence[str],
    batch_size: int = 1,
    order: Order = "listed",
    progress: Progress = SILENT,
    label: str = "evaluating",
    cut: InTiles | None = None,
    kept: Container[int] | None = None,
    fill: bool = False,
) -> Accuracy:
    """Run an engine over a dataset and measure the accuracy.

    `order`: how the images are put into batches, see `batching.buckets`. `classes`: the model's class names, in the
    order of its score channels. `label`: what `progress` calls the images that are done. `cut`: how images are, each
    by itself then; None for whole ones. `kept`: the ids of the classes that count; None for all. `fill`: batches of
    fewer images, the last ones, are filled up with their own, for a network that takes no other number.

    Raises `DataError` before anything runs where mAP is undefined, and at the first image that cannot be read, because
    the accuracy over a part of the data would pass for one over all of it; `EngineError` when the engine fails or
    returns something unusable.
    """
    paths = [image.path for image in dataset.images]
    detect = partial(detect_images, engine, paths, preprocess, nms, cut=cut, classes=classes)
    return accuracy_of(detect, dataset, preprocess, classes, batch_size, order, progress, label, cut, kept, fill)


def accuracy_of(
    detect: DetectBatches,
    dataset: CocoDataset,
    preprocess: Preprocess,
    classes: Sequence[str],
    batch_size: int = 1,
    order: Order = "listed",
    progress: Progress = SILENT,
    label: str = "evaluating",
    cut: InTiles | None = None,
    kept: Container[int] | None = None,
    fill: bool = False,
) -> Accuracy:
    """As `measure_accuracy`, of what `detect` finds, wherever it does that: here or on other machines.

    The accuracy depends on what is found in each image alone, not on the order in which images are done.
    """
    categories = dataset.class_to_category(classes)
    category_ids = [one if kept is None or number in kept else None for number, one in enumerate(categories)]
    check_measurable(dataset, category_ids)
    if cut is not None:
        batch_size, order = 1, "listed"
    by_size = order in ("sorted", "bucketed")  # the others do not depend on sizes
    sizes = [preprocess.input_size(*image.size()) if by_size else (0, 0) for image in dataset.images]
    batches = [one.indices for one in group(sizes, batch_size, order)]
    filled = [tuple(islice(cycle(batch), batch_size)) if fill else batch for batch in batches]
    found: dict[int, list[dict[str, Any]]] = {}
    with contextlib.closing(detect(filled)) as detected:
        for index, one in detected:
            found[index] = coco_results(dataset.images[index].id, one, category_ids)
            if len(found) % batch_size == 0 or len(found) == len(sizes):
                progress.step(label, len(found), len(sizes))
    results = [row for batch in batches for index in batch for row in found[index]]
    return coco_accuracy(dataset, results, category_ids)


def batch_shapes(
    dataset: CocoDataset, preprocess: Preprocess, batch_size: int, order: Order, cut: InTiles | None = None
) -> Iterator[Shape]:
    """Of the batches that `measure_accuracy` makes, from the headers of the files. Raises `DataError`."""
    if cut is not None:
        yield from cut.shapes((image.size() for image in dataset.images), preprocess)
        return
    sizes = [preprocess.input_size(*image.size()) for image in dataset.images]
    for one in group(sizes, batch_size, order):
        yield len(one.indices), *one.size


def _coco(images: Iterable[int], categories: Iterable[int], annotations: list[dict[str, Any]]) -> Any:
    """A pycocotools COCO over these annotations, numbered from 1, since COCOeval takes id 0 for "matched nothing"."""
    from pycocotools.coco import COCO

    coco = COCO()
    coco.dataset = {
        "images": [{"id": number} for number in images],
        "categories": [{"id": number} for number in categories],
        "annotations": [{**item, "id": number} for number, item in enumerate(annotations, start=1)],
    }
    coco.createIndex()
    return coco
