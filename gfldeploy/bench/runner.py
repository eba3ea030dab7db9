"""Measures cells: one process for each thing to measure, so that a crash, a hang or a leak of one touches no other."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Self, get_args

from gfldeploy.accuracy import Accuracy, check_measurable
from gfldeploy.bench.cell import STREAMS, BundleIdentity, Cell
from gfldeploy.bench.cost import count_cost
from gfldeploy.bench.cpu_parity import reference_engine
from gfldeploy.bench.journal import Journal
from gfldeploy.bench.monitor import wait_until_idle
from gfldeploy.bench.results import BenchResults, CellResult, Cost, DataDescription, Peak
from gfldeploy.bench.timing import Settings
from gfldeploy.bench.worker import CpuOutputs, Task, Timed
from gfldeploy.bundle import Bundle
from gfldeploy.child_process import DEFAULT_LIMITS, Limits, run_child
from gfldeploy.engines.cache import DEFAULT_ENGINE_CACHE
from gfldeploy.engines.hardware import usable_threads
from gfldeploy.engines.registry import is_compared
from gfldeploy.errors import DataError, EngineError, GfldeployError
from gfldeploy.files import sha256
from gfldeploy.images.coco import CocoDataset
from gfldeploy.progress import SILENT, Progress
from gfldeploy.serialization import build, plain
from gfldeploy.text import printable

_WORKER = "gfldeploy.bench.worker"
_NO_BUNDLE = BundleIdentity("", "", "")
_UNTIMED = Settings(0, 1, 0)

_Kind = Literal["reference", "timing", "accuracy", "peak"]
_KINDS: tuple[_Kind, ...] = get_args(_Kind)
_Answer = CpuOutputs | Timed | Accuracy | Peak
_TYPES: Mapping[_Kind, type[_Answer]] = {
    "reference": CpuOutputs, "timing": Timed, "accuracy": Accuracy, "peak": Peak,
}  # fmt: skip


@dataclass(frozen=True)
class Data:
    """What is measured on: `images` for timing; for mAP the first `accuracy_limit` (None: all) of a COCO file.

    `description`: what the results say of it. `notes`: sentences about it for the user.
    """

    images: tuple[Path, ...]
    description: DataDescription
    annotations: Path
    image_dir: Path | None = None
    accuracy_limit: int | None = None
    notes: tuple[str, ...] = ()

    @classmethod
    def load(
        cls,
        annotations: Path,
        image_dir: Path | None,
        limit: int | None,
        *,
        accuracy: bool,
        accuracy_limit: int | None,
        bundles: Sequence[Bundle],
    ) -> Self:
        """Find and hash the files; `limit`: how many of the first images are timed.

        With `accuracy`, raises `DataError` now for what would fail in every cell of the `bundles` later.
        """
        images = tuple(image.path for image in CocoDataset.load(annotations, image_dir, limit).images)
        evaluated, notes = _check_accuracy(annotations, image_dir, accuracy_limit, bundles) if accuracy else (None, ())
        timed_sha256 = hashlib.sha256("".join(map(sha256, images)).encode()).hexdigest()
        description = DataDescription(sha256(annotations), timed_sha256, len(images), evaluated)
        return cls(images, description, annotations, image_dir, accuracy_limit, notes)


@dataclass(frozen=True)
class _Step:
    """What one process does: a `round` of a cell; or what several cells share: the mAP, the engine's peak, or what the
    CPU gives for a few images, to compare them with."""

    kind: _Kind
    cell: Cell
    round: int = 0

    def __str__(self) -> str:
        if self.kind == "peak":
            return f"peak of {self.cell.setup()}"
        if self.kind == "reference":
            return f"{self.cell}, on the CPU to compare with"
        if self.kind == "accuracy":
            return f"{self.cell.bundle.directory}: {self.cell.setup()}, accuracy"
        return str(self.cell)


@dataclass(frozen=True)
class Runner:
    """Measures cells of the `bundles`, by the directories of these.

    Every answer of a process goes to the `journal`, and what is there is not measured again: failures by this run, for
    another may have followed their remedy. `limits`: of a process. `engine_cache`: where engines keep what they
    compiled. `about`: what else answers depend on, the machine and its software. `worker`: the worker's module or
    command line.
    """

    bundles: Mapping[BundleIdentity, Path]
    data: Data
    journal: Journal
    limits: Limits = DEFAULT_LIMITS
    engine_cache: Path = DEFAULT_ENGINE_CACHE
    about: Mapping[str, Any] = field(default_factory=dict)
    worker: str | Sequence[str] = _WORKER

    def measure(
        self,
        cells: Sequence[Cell],
        settings: Settings,
        *,
        accuracy: bool = False,
        peak: bool = False,
        progress: Progress = SILENT,
    ) -> tuple[CellResult, ...]:
        """Measure every cell; the results are in the cells' order.

        Each of `settings.rounds` rounds runs every cell once, in order; a cell that failed is not tried again, but by
        another run that resumes. One that differs from the CPU, where that is compared, has failed before anything is
        timed. Then the mAP is measured, once for each bundle, engine and precision of which a cell did not fail, and
        with `peak` what each engine and precision reaches at best.

        A process that crashes, exits with an error, answers nonsense, or goes beyond the limits becomes a result with
        its reason, and the others are run. Whatever ends this function, KeyboardInterrupt included, kills the process
        at work and all it started. Raises `BundleError` for a bundle that cannot be read.
        """
        needs = {cell: _needs(cell, settings.rounds, accuracy, peak) for cell in cells}
        steps = sorted(
            dict.fromkeys(step for some in needs.values() for step in some),
            key=lambda step: (_KINDS.index(step.kind), step.round),
        )
        answers: dict[_Step, _Answer | EngineError] = {}

        def is_useful(step: _Step) -> bool:
            """Whether a cell that did not fail needs it."""
            return any(step in some and _failure(some, answers) is None for some in needs.values())

        for step in steps:
            with suppress(DataError):  # an answer that cannot be read is none
                if (kept := self._known(self._question(step, settings))) is not None:
                    answers[step] = _read(step.kind, kept)
        pending = [step for step in steps if step not in answers and is_useful(step)]
        start = time.monotonic()
        for number, step in enumerate(pending):
            if is_useful(step):
                each = (time.monotonic() - start) / max(number, 1)
                left = f" (about {duration(each * (len(pending) - number))} left)" if number else ""
                progress.stage(f"{number + 1}/{len(pending)} {step}{left}")
                answer = self._run(step, settings, progress)
                self.journal.keep(self._question(step, settings), answer)
                answers[step] = _read(step.kind, answer)
        return tuple(self._result(cell, some, answers) for cell, some in needs.items())

    def _known(self, question: Mapping[str, Any]) -> dict[str, Any] | None:
        """What the journal answers, but for the failures of an earlier run."""
        answer = self.journal.find(question)
        return answer if answer is None or "reason" not in answer or self.journal.kept_now(question) else None

    def _question(self, step: _Step, settings: Settings) -> dict[str, Any]:
        description = self.data.description
        return {
            "schema": BenchResults.FORMAT.schema, "kind": step.kind, "round": step.round, "settings": plain(settings),
            "cell": {**plain(step.cell), "bundle": step.cell.bundle.digest}, "about": self.about,
            "data": [description.timed_sha256, description.annotations_sha256, self.data.accuracy_limit],
        }  # fmt: skip

    def _run(self, step: _Step, settings: Settings, progress: Progress) -> dict[str, Any]:
        """What the step's process answers: its result, or the `reason` of a failure and its `remedy`."""
        task = self._task(step, settings)
        if step.kind == "timing" and is_compared(step.cell.engine, step.cell.device):
            try:
                file, by = self._reference(step.cell, progress)
                task = replace(task, reference=file, reference_by=by)
            except EngineError as error:
                task = replace(task, not_compared=error.problem)
        return self._ask(replace(task, idle=wait_until_idle(step.cell.device)))

    def _task(self, step: _Step, settings: Settings) -> Task:
        data = self.data
        return Task(
            step.kind,
            step.cell,
            self.bundles.get(step.cell.bundle, Path()),
            tuple(path.absolute() for path in data.images),
            settings,
            annotations=data.annotations,
            image_dir=data.image_dir,
            accuracy_limit=data.accuracy_limit,
            engine_cache=self.engine_cache,
        )

    def _ask(self, task: Task) -> dict[str, Any]:
        answer, bundle = _ask(task, self.limits, self.worker), task.bundle
        if "reason" in answer and bundle.name:  # results are published, and where a bundle is on this machine is not
            answer["reason"] = answer["reason"].replace(str(bundle), task.cell.bundle.directory)
        return answer

    def _reference(self, cell: Cell, progress: Progress) -> tuple[Path, str]:
        """The file with what the CPU gives for images of the cell, and what wrote it. Raises `EngineError`."""
        bundle = Bundle.open(self.bundles[cell.bundle])
        alike = replace(  # of all that gives the same batches
            cell,
            engine=reference_engine(bundle),
            precision=bundle.manifest.precision,
            device="cpu",
            threads=usable_threads(),
            tf32=False,
            streams=1,
        )
        if cell.scenario == "server":  # which is compared in one of the batches of the other scenarios
            alike = replace(alike, scenario=STREAMS[cell.batch_size > 1], rate=None, policy=None)
        step = _Step("reference", alike)
        question = self._question(step, _UNTIMED)
        file, answer = self.journal.file(question), self._known(question)
        if answer is None or ("reason" not in answer and not file.exists()):
            progress.stage(str(step))
            answer = self._ask(replace(self._task(step, _UNTIMED), reference=file))
            self.journal.keep(question, answer)
        found = _read("reference", answer)
        if isinstance(found, CpuOutputs):
            return file, found.by
        assert isinstance(found, EngineError)
        raise found

    def _result(self, cell: Cell, steps: Sequence[_Step], answers: Mapping[_Step, _Answer | EngineError]) -> CellResult:
        found = [(step.kind, answers[step]) for step in steps if step in answers]
        timed = [answer for _, answer in found if isinstance(answer, Timed)]
        failure = _failure(steps, answers)
        accuracy, peak = (next((answer for kind, answer in found if kind == one), None) for one in _KINDS[2:])
        return CellResult(
            cell,
            status="failed" if failure else "ok",
            reason=failure.problem if failure else None,
            remedy=failure.remedy if failure else None,
            runs=tuple(answer.run for answer in timed),
            accuracy=accuracy if isinstance(accuracy, Accuracy) else None,
            accuracy_reason=accuracy.problem if isinstance(accuracy, EngineError) else None,
            cost=_cost(self.bundles[cell.bundle], cell, timed[0], self.data.description.timed_images)
            if timed
            else None,
            peak=_peak(peak) if peak else None,
        )


def run_peak(cell: Cell, *, limits: Limits = DEFAULT_LIMITS, worker: str | Sequence[str] = _WORKER) -> Peak:
    """What the cell's engine reaches here at best, measured in a process of its own; a failure is its `reason`."""
    return _peak(_read("peak", _ask(Task("peak", cell), limits, worker)))


def _peak(answer: _Answer | EngineError) -> Peak:
    return answer if isinstance(answer, Peak) else Peak(None, None, getattr(answer, "problem", None))


def duration(seconds: float) -> str:
    """In the unit that it is read in, a whole number of it."""
    if seconds < 59.5:
        return f"{max(round(seconds), 1)} s"
    return f"{round(seconds / 60)} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _needs(cell: Cell, rounds: int, accuracy: bool, peak: bool) -> list[_Step]:
    """The steps of a cell. Neither mAP nor a peak depends on the load, nor a peak on the bundle and the input size:
    they are of all the threads that it has, in one inference."""
    threads = cell.threads * cell.streams
    alone = replace(
        cell,
        batch_size=1,
        order="listed",
        scenario="single-stream",
        rate=None,
        policy=None,
        threads=threads,
        streams=1,
    )
    steps = [_Step("timing", cell, number) for number in range(rounds)]
    steps += [_Step("accuracy", alone)] if accuracy else []
    anywhere = replace(alone, bundle=_NO_BUNDLE, input_size=None, end_to_end=False, tiling=None)
    return steps + ([_Step("peak", anywhere)] if peak else [])


def _failure(steps: Sequence[_Step], answers: Mapping[_Step, _Answer | EngineError]) -> EngineError | None:
    """The first of the rounds that failed."""
    timings = (answers.get(step) for step in steps if step.kind == "timing")
    return next((answer for answer in timings if isinstance(answer, EngineError)), None)


def _ask(task: Task, limits: Limits, worker: str | Sequence[str]) -> dict[str, Any]:
    """What one worker process answers to one task: a result, or the `reason` of a failure and its `remedy`."""
    try:
        answer = run_child(worker, plain(task), limits=limits)
        _read(task.kind, answer)
    except EngineError as error:
        return {"reason": error.problem, "remedy": error.remedy}
    except DataError as error:
        return {"reason": f"the process answered nonsense: {error.problem}", "remedy": None}
    return answer


def _read(kind: _Kind, answer: Mapping[str, Any]) -> _Answer | EngineError:
    """What a worker answered. Raises `DataError` for nonsense."""
    if "reason" in answer:
        remedy = answer.get("remedy")
        return EngineError(printable(str(answer["reason"])), None if remedy is None else printable(str(remedy)))
    return build(_TYPES[kind], answer.get(kind), kind)


def _cost(directory: Path, cell: Cell, timed: Timed, images: int) -> Cost | None:
    shapes = {tuple(map(int, text.split("x"))): count for text, count in timed.run.shapes.items()}
    batches = {(batch, height, width): count for (batch, _, height, width), count in shapes.items()}
    with suppress(GfldeployError):  # a graph that cannot be counted is no reason to lose its timing
        bundle = Bundle.open(directory).at_size(cell.input_size)
        of_tiles = None if cell.tiling is None else images
        return count_cost(bundle, cell.precision, timed.image_sizes, batches, of_tiles)
    return None


def _check_accuracy(
    annotations: Path, image_dir: Path | None, limit: int | None, bundles: Sequence[Bundle]
) -> tuple[int, tuple[str, ...]]:
    """The number of images for mAP, and notes about them. Raises `DataError`."""
    dataset = CocoDataset.load(annotations, image_dir, limit)
    if not dataset.annotations:
        raise DataError(
            f"{annotations} has no boxes to measure mAP against", "Add --no-accuracy to measure speed alone."
        )
    notes = list(dataset.notes)
    for bundle in bundles:
        try:
            match = dataset.match(bundle.manifest.classes)
            check_measurable(dataset, match.category_ids)
        except DataError as error:
            raise DataError(
                f"{bundle.directory}: {error.problem}", f"{error.remedy} Or add --no-accuracy to measure speed alone."
            ) from error
        notes += [f"{bundle.name}: {note}" for note in match.notes]
    return len(dataset.images), tuple(notes)
