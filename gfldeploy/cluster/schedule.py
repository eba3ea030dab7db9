"""Which job to which worker, and what follows when one dies: decisions alone, without Ray, a clock or a process.

A job is handed to one worker at a time, the next one while the worker still does another. That of a dead worker is
handed out again. A job that ends its workers is put behind all others, and then searched for the input at fault, half
by half: each half is run by itself, and what comes of it is dropped. The input that ends a worker by itself becomes an
error, and the job is run from its start without it. No job is blamed for the end of a machine, for the memory that
other processes take, or for workers that never did anything.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from gfldeploy.errors import EngineError

# itself: the process ended. memory: it was ended because its machine ran out of memory. machine: the machine has gone.
Cause = Literal["itself", "memory", "machine"]

_DEATHS_BEFORE_SEARCH = 2
_DEATHS_OF_ONE_INPUT = 3  # of a job that has no more
_MOST_SEARCHES = 4  # that found nothing
_MOST_FOUND = 100
_MOST_OUT_OF_MEMORY = 4
_MOST_FAILED_STARTS = 3  # in a row
# Of workers where none ever did anything. A search of 256 inputs for the first of them takes a dozen.
_MOST_USELESS = 20


@dataclass(frozen=True)
class Job:
    """Work that one worker does: some inputs, of which come values (batches) in an order of their own.

    `inputs`: how many it has. `skip`: so many values are there already. `bad`: inputs (places in the job) that end
    their worker, and why: they are errors and are not opened.
    """

    number: int
    inputs: int
    skip: int = 0
    bad: Mapping[int, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Assignment:
    """What a worker is to do. `search`: only these inputs, to see whether they end it; what comes of it is dropped."""

    job: Job
    search: range | None = None

    @property
    def left_out(self) -> Mapping[int, str]:
        """The inputs that are not opened."""
        inputs = range(self.job.inputs)
        others = (place for place in inputs if self.search is not None and place not in self.search)
        return {**dict.fromkeys(others, "not searched"), **self.job.bad}


@dataclass(frozen=True)
class Part:
    """Values of a job, in its order; `end`: there are no more. `processor`: where they were computed."""

    job: int
    values: tuple[list[Any], ...]
    end: bool
    processor: str


@dataclass(frozen=True)
class Again:
    """Inputs of a job are errors now: it is run once more from its start, and what came of it before is void."""

    job: int
    bad: Mapping[int, str]


@dataclass
class _Trouble:
    """Of a job whose workers died. `ranges`: to be searched next, the first first."""

    deaths: int = 0
    out_of_memory: int = 0
    searches: int = 0
    ranges: deque[range] = field(default_factory=deque)


class Schedule:
    """Hands out jobs, each finished once. Workers have any numbers, places (machines) any names.

    `wanted`: how many workers there should be now. `deaths`: how many died, by cause.
    """

    def __init__(self, jobs: Iterable[Job], workers: int) -> None:
        """`jobs` are taken as they are needed. `workers`: how many at most."""
        self.deaths: Counter[Cause] = Counter()
        self.found = 0  # inputs at fault
        self._jobs: Iterator[Job] = iter(jobs)
        self._ahead: deque[Job] = deque()  # as many as there may be workers
        self._first: deque[Job] = deque()  # of workers that died
        self._last: deque[Job] = deque()  # in trouble
        self._most = workers
        self._starting: set[int] = set()
        self._places: dict[int, str] = {}  # of the workers that are ready
        self._tasks: dict[int, deque[Assignment]] = {}  # of the workers that are ready; all work on the first
        self._troubles: dict[int, _Trouble] = {}
        self._useful: set[str] = set()  # places where something was done
        self._useless: Counter[str] = Counter()  # deaths at others
        self._failed_starts = 0
        self._look_ahead()

    @property
    def complete(self) -> bool:
        """Whether every job is finished."""
        return not (any(self._tasks.values()) or self._first or self._ahead or self._last)

    @property
    def wanted(self) -> int:
        waiting = len(self._first) + len(self._ahead) + len(self._last)
        return min(self._most, sum(map(len, self._tasks.values())) + waiting)

    @property
    def workers(self) -> int:
        """How many are starting or ready."""
        return len(self._starting) + len(self._places)

    def starting(self, worker: int) -> None:
        """A worker was asked for."""
        self._starting.add(worker)

    def started(self, worker: int, place: str) -> None:
        """It is ready, at this place."""
        self._starting.remove(worker)
        self._places[worker] = place
        self._tasks[worker] = deque()
        self._failed_starts = 0

    def failed_start(self, worker: int, why: str) -> None:
        """It did not become ready. Raises `EngineError` if none does."""
        self._starting.remove(worker)
        self._failed_starts += 1
        if self._failed_starts < _MOST_FAILED_STARTS:
            return
        if not self._places and not self._starting:
            raise EngineError(f"no worker starts: {why}", "Run `gfldeploy doctor` there, and see Ray's logs.")
        self._most = max(self.workers, 1)

    def next(self, worker: int) -> Assignment | None:
        """One more task for this worker, to be done now or after the one that it has; None if there is none for it."""
        tasks = self._tasks[worker]
        if not tasks and self._first:
            job = self._first.popleft()
        elif self._ahead and (not tasks or self._may_queue(tasks)):
            job = self._ahead.popleft()
            self._look_ahead()
        elif not tasks and self._last and self._may_search(worker):
            job = self._last.popleft()
        else:
            return None
        trouble = self._troubles.get(job.number)
        task = Assignment(job, trouble.ranges[0] if trouble and trouble.ranges else None)
        tasks.append(task)
        return task

    def advanced(self, worker: int, values: int) -> None:
        """So many values of its task have come from it."""
        self._useful.add(self._places[worker])
        task = self._tasks[worker][0]
        if task.search is None:
            self._tasks[worker][0] = replace(task, job=replace(task.job, skip=task.job.skip + values))

    def finished(self, worker: int) -> None:
        """It has done its task. Raises `EngineError` where a job ends its workers and no input of it does alone."""
        self._useful.add(self._places[worker])
        task = self._tasks[worker].popleft()
        if task.search is None:
            self._troubles.pop(task.job.number, None)
            return
        trouble = self._troubles[task.job.number]
        trouble.ranges.popleft()
        if not trouble.ranges:
            trouble.searches += 1
            trouble.deaths = 0
            if trouble.searches >= _MOST_SEARCHES:
                raise EngineError(
                    f"shard {task.job.number} ends its worker, and none of its {task.job.inputs} inputs does alone",
                    "Use a smaller batch size, or fewer workers or threads on a machine.",
                )
        self._last.append(task.job)

    def died(self, worker: int, cause: Cause, why: str) -> Again | None:
        """A worker that was ready has gone, `why` in words; its jobs are handed out again.

        Returns the job that is void so far, if now an input is known to be at fault. Raises `EngineError` where it
        makes no sense to go on.
        """
        place, tasks = self._places.pop(worker), self._tasks.pop(worker)
        self.deaths[cause] += 1
        if not tasks:
            return None
        task = tasks.popleft()
        self._first.extendleft(queued.job for queued in tasks)
        trouble = self._troubles.setdefault(task.job.number, _Trouble())
        if cause == "itself":
            self._check_useful(place, why)
            return self._blamed(task, trouble, why)
        self._first.appendleft(task.job)
        if cause == "memory":
            self._most = max(self.workers, 1)  # the machine has no room for as many
            trouble.out_of_memory += 1
            if trouble.out_of_memory >= _MOST_OUT_OF_MEMORY:
                raise EngineError(
                    f"shard {task.job.number} ran out of memory on its machine {trouble.out_of_memory} times: {why}",
                    "Use fewer --workers, a smaller batch size, or machines with more memory.",
                )
        return None

    def _blamed(self, task: Assignment, trouble: _Trouble, why: str) -> Again | None:
        """Its worker ended by itself."""
        job, tried = task.job, task.search
        trouble.deaths += 1
        if tried is None:
            if trouble.deaths < _DEATHS_BEFORE_SEARCH:
                self._first.appendleft(job)
                return None
            self._last.append(job)
            if job.inputs > 1:
                trouble.ranges.extend(_halves(range(job.inputs)))
                return None
            if trouble.deaths < _DEATHS_OF_ONE_INPUT:
                return None
            self._last.pop()
            tried = range(1)
        elif len(tried) > 1:
            trouble.ranges = deque(_halves(tried))
            self._last.append(job)
            return None
        return self._found(job, tried.start, why)

    def _found(self, job: Job, place: int, why: str) -> Again:
        self.found += 1
        if self.found > _MOST_FOUND:
            raise EngineError(
                f"more than {_MOST_FOUND} inputs ended the worker that read them, the last one so: {why}",
                "Run the command on one machine without --ray to see why.",
            )
        bad = {**job.bad, place: f"every worker that detects in it dies ({why})"}
        self._last.append(replace(job, skip=0, bad=bad))
        # If there is another one it is searched after one more death.
        self._troubles[job.number] = _Trouble(deaths=_DEATHS_BEFORE_SEARCH - 1)
        return Again(job.number, bad)

    def _check_useful(self, place: str, why: str) -> None:
        """Raise `EngineError` for a place whose workers die whatever they are given."""
        if place in self._useful:
            return
        self._useless[place] += 1
        if self._useless[place] >= _MOST_USELESS:
            elsewhere = ", and others do not" if self._useful else ""
            raise EngineError(
                f"workers on {place} end whatever they are given{elsewhere}: {why}",
                "Run the command there without --ray to see why, or take the machine out of the cluster.",
            )

    def _may_queue(self, tasks: deque[Assignment]) -> bool:
        """Whether a worker with these tasks takes another one: only where no other worker would have nothing to do."""
        alone = len(tasks) == 1 and tasks[0].job.number not in self._troubles
        return alone and len(self._ahead) >= self.workers

    def _may_search(self, worker: int) -> bool:
        """Whether what happens to this worker says something about an input: not where every worker dies."""
        useful = self._useful.intersection(self._places.values())
        return not useful or self._places[worker] in useful

    def _look_ahead(self) -> None:
        while len(self._ahead) < self._most and (job := next(self._jobs, None)) is not None:
            self._ahead.append(job)


def _halves(inputs: range) -> tuple[range, ...]:
    middle = len(inputs) // 2
    return inputs[:middle], inputs[middle:]
