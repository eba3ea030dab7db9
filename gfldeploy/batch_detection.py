"""What is found in batches of image files: by an engine in this process, or by workers on other machines."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from socket import gethostname
from typing import Any, Self, TypeAlias

import numpy as np
from numpy.typing import NDArray

from gfldeploy.at_once import at_once
from gfldeploy.batching.buckets import Size
from gfldeploy.batching.tiles import InTiles, Region
from gfldeploy.bundle import Bundle, GraphName
from gfldeploy.cluster.ray_cluster import ClusterOptions, run_on_ray
from gfldeploy.cluster.schedule import Again, Job
from gfldeploy.cluster.worker import Todo
from gfldeploy.detection_options import AS_CONFIGURED, DetectionOptions
from gfldeploy.detections import Detections, from_text, to_text
from gfldeploy.engines.base import ClosesOnExit, Engine, EngineOptions, Tensors
from gfldeploy.engines.detect import found_in, inputs_of
from gfldeploy.engines.registry import ENGINES, open_by_itself, open_engine
from gfldeploy.errors import DataError, EngineError
from gfldeploy.images.decode import read_image
from gfldeploy.images.preprocess import Preprocess
from gfldeploy.nms import NmsParams
from gfldeploy.progress import Progress
from gfldeploy.serialization import build, plain
from gfldeploy.text import first_of

# A batch: the places of its images in a list of files.
Batch: TypeAlias = Sequence[int]
# What is found in each image of these batches, with its place, in any order.
DetectBatches: TypeAlias = Callable[[Sequence[Batch]], Generator[tuple[int, Detections]]]
# A worker is given a unit of consecutive batches: a 64th of all, so that many workers have some, but no more images
# than one that dies may lose.
_UNITS, _UNIT_IMAGES = 64, 32


def detect_images(
    engine: Engine,
    paths: Sequence[Path],
    preprocess: Preprocess,
    nms: NmsParams,
    batches: Iterable[Batch],
    *,
    cut: InTiles | None = None,
    classes: Sequence[str] = (),
) -> Generator[tuple[int, Detections]]:
    """What is found in each image of these batches of `paths`, with its place, in the order of the batches.

    Several at once where the engine has streams. `cut`: each image is cut into tiles, and detected in by itself; what
    is found in channels that are none of the `classes` is then left out before tiles are merged. Raises `DataError` for
    an image that cannot be read or resized, and `EngineError`.
    """
    with ExitStack() as stack:
        infer: Callable[[Tensors], dict[str, NDArray[Any]]] = engine.infer
        if (streams := engine.options.streams) > 1:
            runners = stack.enter_context(ThreadPoolExecutor(streams + engine.queued, "gfldeploy-infer"))
            infer = lambda inputs: runners.submit(engine.infer, inputs).result()  # noqa: E731

        def read(index: int) -> NDArray[np.uint8]:
            image = read_image(paths[index])
            preprocess.resized_size(image.shape[0], image.shape[1], paths[index])  # raises, with the file's name
            return image

        def detect_in(images: Sequence[NDArray[np.uint8]]) -> list[Detections]:
            inputs, scales = inputs_of(engine, images, preprocess)
            return found_in(engine, infer(inputs), scales, nms)

        def detect_in_tiles(cut: InTiles, image: NDArray[np.uint8]) -> Detections:
            found: list[tuple[Region, Detections]] = []
            size = image.shape[0], image.shape[1]
            for regions, _ in cut.batches(size, preprocess):
                each = detect_in([region.of(image) for region in regions])
                found += zip(regions, (one.named(classes) for one in each), strict=True)
            return cut.merged(found, size, nms)

        def detect(batch: Batch) -> list[tuple[int, Detections]]:
            if cut is not None:
                return [(index, detect_in_tiles(cut, read(index))) for index in batch]
            found = detect_in([read(index) for index in batch])
            return list(zip(batch, found, strict=True))

        every: Iterable[list[tuple[int, Detections]]] = map(detect, batches)
        if streams > 1:
            every = stack.enter_context(closing(at_once(detect, batches, streams + engine.queued + 1)))
        for one in every:
            yield from one


@dataclass(frozen=True)
class DetectionJob:
    """What detects on another machine, but for the bundle and the images: JSON by `serialization.plain`.

    `engine`: one of the table. `options`: as `EngineOptions.to_plain` gives them. `input_size`: as for
    `Bundle.at_size`. `by_itself`: the file that deploys by itself. `kind`: "module:class" of the engine that loads the
    `graph`, where it is not in the table itself but extends `engine`. `cut`: how images are; None for whole ones.
    `detection`: what was turned of NMS.
    """

    engine: str
    options: Mapping[str, Any]
    input_size: Size
    by_itself: bool = False
    kind: str | None = None
    graph: GraphName | None = None
    cut: InTiles | None = None
    detection: DetectionOptions = AS_CONFIGURED

    @classmethod
    def of(cls, engine: Engine, bundle: Bundle) -> Self:
        """What detects as this engine does, which has loaded the bundle."""
        names = {spec.entry: name for name, spec in ENGINES.items()}
        kinds = [f"{one.__module__}:{one.__qualname__}" for one in type(engine).__mro__]
        name = next(names[kind] for kind in kinds if kind in names)
        target_size = bundle.manifest.preprocess.target_size
        return cls(name, engine.options.to_plain(), target_size, kind=kinds[0], graph=engine.graph)

    def open(self, bundle: Bundle) -> Engine:
        """The engine, with a bundle of this size. Raises as `open_engine`."""
        options = EngineOptions.from_plain(self.options)
        if self.kind is None:
            return (open_by_itself if self.by_itself else open_engine)(self.engine, bundle, options)
        module, _, name = self.kind.partition(":")
        opened: Engine = getattr(import_module(module), name)(bundle, options, self.graph)
        return opened


class DetectionWork(ClosesOnExit):
    """An engine in a worker, which detects in the units of batches that it is given (`cluster.worker.Work`)."""

    def __init__(self, setting: Mapping[str, Any], bundle: Path) -> None:
        """`setting`: a job as plain data. `bundle`: its directory here. Raises `BundleError`, and as `open_engine`."""
        import cv2

        job = build(DetectionJob, dict(setting))
        opened = Bundle.open(bundle).at_size(job.input_size)
        cv2.setNumThreads(EngineOptions.from_plain(job.options).threads)
        self._manifest = opened.manifest.turned(job.detection)
        self._cut = job.cut
        self._engine = job.open(opened)

    def close(self) -> None:
        self._engine.close()

    def run(self, tasks: Iterable[Todo]) -> Generator[tuple[int, list[Any]]]:
        """What is found in the batches of each unit, in order; an empty list after the last.

        A task is as `task_of` makes it. Raises `DataError` for an image that is not there, or is another, and as
        `detect_images`.
        """
        for todo in tasks:
            for place, files in enumerate(todo.task["batches"]):
                if place in todo.bad and place >= todo.skip:
                    yield todo.number, [todo.bad[place]]
                elif place >= todo.skip:
                    yield todo.number, self._detect([_same_file(Path(path), size) for path, size in files])
            yield todo.number, []

    def _detect(self, paths: Sequence[Path]) -> list[Any]:
        """Of each image of one batch its detections as text, and below which score some may be missing."""
        manifest, every = self._manifest, [range(len(paths))]
        more: dict[str, Any] = {"cut": self._cut, "classes": manifest.classes}
        found = detect_images(self._engine, paths, manifest.preprocess, manifest.nms, every, **more)
        return [(to_text(one), one.may_lack_below) for _, one in found]


def detect_on_ray(
    cluster: ClusterOptions,
    job: DetectionJob,
    bundle: Bundle,
    paths: Sequence[Path],
    progress: Progress,
    batches: Sequence[Batch],
) -> Generator[tuple[int, Detections]]:
    """As `detect_images`, by workers on a Ray cluster, in any order.

    They are given units of consecutive batches. A batch is never divided, so that what is found is what one machine
    finds. Raises `EngineError` where a batch ends the workers that run it, and as `detect_images` and `run_on_ray`.
    """
    units = units_of(batches)
    parts = run_on_ray(
        cluster,
        f"{__name__}:{DetectionWork.__name__}",
        plain(job),
        (Job(number, len(unit)) for number, unit in enumerate(units)),
        lambda number: task_of(units[number], paths),
        bundle=bundle,
        engine=job.engine,
        images=sum(map(len, batches)),
        progress=progress,
    )
    done = [0] * len(units)
    with closing(parts):
        for part in parts:
            unit = units[part.job]
            if isinstance(part, Again):
                place, why = next(iter(part.bad.items()))
                images = first_of((paths[one] for one in unit[place]), 2)
                raise EngineError(
                    f"a batch ends every worker that runs it, that of {images}: {why}",
                    "Run the command on one machine without --ray to see why.",
                )
            for value in part.values:
                for index, (text, may_lack_below) in zip(unit[done[part.job]], value, strict=True):
                    if (found := from_text(text, may_lack_below)) is None:
                        raise EngineError(f"a worker's answer on {paths[index]} is damaged", "Try again.")
                    yield index, found
                done[part.job] += 1


def units_of(batches: Sequence[Batch]) -> list[Sequence[Batch]]:
    """The batches cut into units, each for one worker at a time."""
    images = min(-(-sum(map(len, batches)) // _UNITS), _UNIT_IMAGES)
    count = max(images // max(map(len, batches), default=1), 1)
    return [batches[start : start + count] for start in range(0, len(batches), count)]


def task_of(unit: Sequence[Batch], paths: Sequence[Path]) -> dict[str, Any]:
    """The files of a unit, batch by batch, each with its size in bytes: it tells when a worker has another one."""
    return {"batches": [[(str(paths[index].absolute()), _size(paths[index])) for index in batch] for batch in unit]}


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:  # it went since its name was read, as the worker will find
        return None


def _same_file(path: Path, size: int | None) -> Path:
    """Raises `DataError` unless there is a file of this name and size."""
    if (here := _size(path)) is None or here != size:
        state = "is not there" if here is None else "is another file there, of another size"
        raise DataError(
            f"{path} cannot be used by the worker on {gethostname()}: it {state}",
            "Give images that all machines find at the same path, such as on a shared file system.",
        )
    return path
