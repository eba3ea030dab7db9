"""Shards: runs of consecutive inputs, which one process here, one of many, or a job of a scheduler detects in.

How inputs are cut depends on their number and the batch size alone, and a batch never spans shards: whoever computes a
shard makes the same batches of it, and the results have the same bytes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field, replace
from itertools import islice
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Self, overload

from gfldeploy.batching.buckets import Order, Size, stream_batches
from gfldeploy.batching.tiles import InTiles
from gfldeploy.bundle import Bundle, Manifest
from gfldeploy.detection_options import AS_CONFIGURED, DetectionOptions
from gfldeploy.engines.base import ClosesOnExit, EngineOptions, Shape
from gfldeploy.engines.registry import is_compared, open_engine
from gfldeploy.errors import BundleError
from gfldeploy.predict.engine_selection import Choice
from gfldeploy.predict.pipeline import Found, PictureBatch, batches_of, detect_batches
from gfldeploy.predict.sources import Picture, pictures
from gfldeploy.progress import SILENT, Progress
from gfldeploy.storage import Source

if TYPE_CHECKING:  # it is not needed for most engines
    from gfldeploy.bench.cpu_parity import CpuCheck

_SHARDS = 64  # of inputs that are neither few nor many: enough to share them out evenly among some machines
_LEAST_BATCHES = 32  # of a shard: those that are not full, at its end, are then few
_MOST_INPUTS = 256  # of a shard, unless that is fewer batches: what is lost with a worker, and done again
# Images that wait for a batch of their size are not decoded yet, so that many may wait.
_BATCHES_AHEAD = 32


@dataclass(frozen=True)
class Shard:
    """The inputs [start, stop) of a list, and the number of the shard, from 0."""

    number: int
    start: int
    stop: int


class Shards(Sequence[Shard]):
    """All shards of so many inputs, made when they are asked for. A video is one input.

    `size`: inputs of each but the last, a multiple of the batch size, so that listed batches fill.
    """

    def __init__(self, inputs: int, batch_size: int) -> None:
        least = _LEAST_BATCHES * batch_size
        size = min(max(-(-inputs // _SHARDS), least), max(_MOST_INPUTS, least))
        self.inputs = inputs
        self.size = -(-size // batch_size) * batch_size

    def __len__(self) -> int:
        return -(-self.inputs // self.size)

    @overload
    def __getitem__(self, number: int) -> Shard: ...
    @overload
    def __getitem__(self, number: slice) -> list[Shard]: ...
    def __getitem__(self, number: int | slice) -> Shard | list[Shard]:
        if isinstance(number, slice):
            return [self[one] for one in range(len(self))[number]]
        number = range(len(self))[number]
        return Shard(number, number * self.size, min((number + 1) * self.size, self.inputs))


@dataclass(frozen=True)
class ShardJob:
    """All that a worker needs but the inputs, JSON by `serialization.plain`, and back by `build`.

    `bundle`: the directory; `digest`: of the bundle that has to be there. `options`: the engine's, as
    `EngineOptions.to_plain` makes them. `reduced`: JPEGs are decoded at 1/2, 1/4 or 1/8 where they are that much larger
    than the network's input. `input_size`: None for the bundle's own. `detection`: what was turned of NMS. `cut`: None
    for whole images.
    """

    bundle: str
    digest: str
    engine: str
    options: Mapping[str, Any]
    batch_size: int
    order: Order
    reduced: bool = False
    input_size: Size | None = None
    detection: DetectionOptions = AS_CONFIGURED
    cut: InTiles | None = None

    @classmethod
    def of(cls, choice: Choice, options: EngineOptions, reduced: bool, cut: InTiles | None = None) -> Self:
        """What was chosen, with these options for the engine."""
        return cls(
            bundle=str(choice.bundle.directory),
            digest=choice.bundle.digest,
            engine=choice.engine,
            options=options.to_plain(),
            batch_size=choice.batch_size,
            order=choice.order,
            reduced=reduced,
            input_size=choice.input_size,
            detection=choice.detection,
            cut=cut,
        )


@dataclass(frozen=True)
class ShardTask:
    """Of a shard, by its number: its inputs, and how many of its batches are done already and left out.

    `bad`: inputs that are errors and are not opened, by their place in the shard, and why: they end whatever process
    reads them.
    """

    number: int
    inputs: Sequence[Source]
    skip: int = 0
    bad: Mapping[int, str] = field(default_factory=dict)


class ShardWorker(ClosesOnExit):
    """An engine that is opened once and detects in shards; a context manager. One thread uses it."""

    def __init__(self, job: ShardJob, progress: Progress = SILENT, bundle: Bundle | None = None) -> None:
        """Open the bundle of the job, unless `bundle` is that, and its engine.

        Raises `BundleError`, also for a bundle of another digest, and as `open_engine`.
        """
        if bundle is None:
            bundle = Bundle.open(job.bundle).at_size(job.input_size)
        if bundle.digest != job.digest:
            raise BundleError(
                f"{job.bundle} is another bundle here: {bundle.digest[:12]}, not {job.digest[:12]}",
                "Copy the same bundle to every machine.",
            )
        self.job = job
        self._manifest = bundle.manifest.turned(job.detection)
        self._options = replace(EngineOptions.from_plain(job.options), progress=progress)
        self._engine = open_engine(job.engine, bundle, self._options)
        self._check: CpuCheck | None = None
        if is_compared(job.engine, self._options.device):
            from gfldeploy.bench.cpu_parity import CpuCheck

            self._check = CpuCheck(job.engine, self._engine, bundle, progress.note)

    def close(self) -> None:
        self._engine.close()

    def detect(
        self, inputs: Sequence[Source], skip: int = 0, bad: Mapping[int, str] = MappingProxyType({})
    ) -> Generator[list[Found]]:
        """The batches of one shard; `Found.index` counts from 0 in the shard. Raises `EngineError`."""
        with closing(self.detect_shards([ShardTask(0, inputs, skip, bad)])) as found:
            for _, batch in found:
                if batch:
                    yield batch

    def detect_shards(
        self, tasks: Iterable[ShardTask], sizes: Mapping[Source, Size | None] = MappingProxyType({})
    ) -> Generator[tuple[int, list[Found]]]:
        """The batches of many shards, each with the number of its shard; an empty one after the last of a shard.

        The shards follow one another without a pause, in order; `tasks` is taken from by one thread, and may wait.
        `sizes`: (h, w) of image files whose headers were read. Closing the iterator ends the threads after their
        current batch. Raises `EngineError`.
        """
        job, numbers = self.job, deque[int]()

        def batches() -> Iterator[PictureBatch]:
            for task in tasks:
                ahead = _BATCHES_AHEAD * job.batch_size
                found = pictures(task.inputs, sizes, task.bad)
                formed = batches_of(found, self._manifest, job.batch_size, job.order, ahead, job.cut)
                for batch in islice(formed, task.skip, None):
                    numbers.append(task.number)
                    yield batch
                numbers.append(task.number)
                yield (), (0, 0)

        found = detect_batches(
            self._engine,
            self._manifest,
            batches(),
            reduced=job.reduced,
            check=self._check,
            streams=self._options.streams,
            cut=job.cut,
        )
        # Beside the batches: one whose shape is only then loaded holds up those after it, as they are given in order.
        loader = ThreadPoolExecutor(1, "gfldeploy-load")
        for shape in self._options.shapes:
            loader.submit(self._engine.prepare, shape)  # if it fails, so does the batch that needs it
        with closing(found):
            try:
                for batch in found:
                    yield numbers.popleft(), batch
            finally:
                loader.shutdown(cancel_futures=True)

    def detect_pictures(self, images: Iterable[Picture]) -> Generator[list[Found]]:
        """Pictures that come one by one, in order and each by itself; the rest as for `detect_shards`."""
        job = self.job
        return detect_batches(
            self._engine,
            self._manifest,
            batches_of(images, self._manifest, 1, "listed", 0, job.cut),
            check=self._check,
            streams=self._options.streams,
            cut=job.cut,
        )


def shard_shapes(
    shards: Iterable[Iterable[Size | None]],
    manifest: Manifest,
    batch_size: int,
    order: Order,
    cut: InTiles | None = None,
) -> Iterator[Shape]:
    """The shapes of the batches of shards, by (h, w) of the images of each, None for what cannot be read."""
    preprocess, fixed = manifest.preprocess, manifest.inputs[0].shape[0]
    ahead = _BATCHES_AHEAD * batch_size
    for sizes in shards:
        readable = (size for size in sizes if size is not None)
        if cut is not None:
            shapes = cut.shapes(readable, preprocess)
        else:
            known = ((None, preprocess.input_size(*size)) for size in readable)
            formed = stream_batches(known, batch_size, order, ahead)
            shapes = ((len(batch), *size) for batch, size in formed)
        for count, height, width in shapes:
            yield fixed or count, height, width
