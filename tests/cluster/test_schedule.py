import random
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

import pytest

from gfldeploy.cluster.schedule import Again, Assignment, Cause, Job, Schedule
from gfldeploy.errors import EngineError


@dataclass
class Cluster:
    """Workers that do one input after the other, each a value, and die of the inputs that kill.

    `done`: what the driver has, by job. `bad`: what became errors. `deaths`: how many workers died of each cause.
    """

    schedule: Schedule
    kills: frozenset[tuple[int, int]] = frozenset()
    places: int = 1
    chance: random.Random | None = None  # by which workers die of other causes, too
    broken: int | None = None  # a place where all die
    done: dict[int, list[int]] = field(default_factory=lambda: defaultdict(list))
    ended: list[int] = field(default_factory=list)
    bad: dict[int, dict[int, str]] = field(default_factory=dict)
    steps: int = 0
    _tasks: dict[int, list[tuple[Assignment, int]]] = field(default_factory=dict)  # and how many inputs are done
    _places: dict[int, int] = field(default_factory=dict)
    _made: int = 0

    def run(self) -> None:
        while not self.schedule.complete:
            self.steps += 1
            assert self.steps < 100_000
            while self.schedule.workers < self.schedule.wanted:
                used = [place for worker, place in self._places.items() if worker in self._tasks]
                place = min(range(self.places), key=used.count)
                self._places[self._made] = place
                self.schedule.starting(self._made)
                self.schedule.started(self._made, f"place {place}")
                self._tasks[self._made] = []
                self._made += 1
            for worker in list(self._tasks):
                while (task := self.schedule.next(worker)) is not None:
                    self._tasks[worker].append((task, 0 if task.search else task.job.skip))
                self._step(worker)

    def _step(self, worker: int) -> None:
        if not self._tasks[worker]:
            return
        if self.chance and self.chance.random() < 0.02:
            self._die(worker, self.chance.choice(("machine", "itself", "machine")))
            return
        task, place = self._tasks[worker][0]
        job = task.job
        broken = self._places[worker] == self.broken
        if place < job.inputs and place not in task.left_out and ((job.number, place) in self.kills or broken):
            self._die(worker, "itself")
        elif place < job.inputs:
            self._tasks[worker][0] = task, place + 1
            if task.search is None:
                self.done[job.number].append(place)
            self.schedule.advanced(worker, 1)
        else:
            self._tasks[worker].pop(0)
            self.schedule.finished(worker)
            if task.search is None:
                self.ended.append(job.number)

    def _die(self, worker: int, cause: Cause) -> None:
        del self._tasks[worker]
        again = self.schedule.died(worker, cause, f"{cause} ended it")
        if again is not None:
            self.done[again.job] = []
            self.bad[again.job] = dict(again.bad)


def jobs(count: int, inputs: int = 8) -> Iterable[Job]:
    return (Job(number, inputs) for number in range(count))


def check_whole(cluster: Cluster, count: int, inputs: int = 8) -> None:
    """Every job has ended once, with each of its values once, in order."""
    assert sorted(cluster.ended) == list(range(count))
    assert all(cluster.done[number] == list(range(inputs)) for number in range(count))


def test_every_job_is_done_once() -> None:
    cluster = Cluster(Schedule(jobs(20), 3))
    cluster.run()
    check_whole(cluster, 20)
    assert not cluster.schedule.deaths
    assert cluster._made == 3


def test_what_is_done_already_is_left_out() -> None:
    cluster = Cluster(Schedule([Job(0, 8, skip=5)], 1))
    cluster.run()
    assert cluster.done[0] == [5, 6, 7]


def test_no_more_workers_than_jobs() -> None:
    assert Schedule(jobs(2), 100).wanted == 2
    assert Schedule(jobs(200), 100).wanted == 100


@pytest.mark.parametrize("seed", range(20))
def test_deaths_of_any_cause_lose_nothing_and_blame_nobody(seed: int) -> None:
    cluster = Cluster(Schedule(jobs(30), 4), places=2, chance=random.Random(seed))
    cluster.run()
    check_whole(cluster, 30)
    assert not cluster.bad
    assert cluster.schedule.deaths.total() > 0


@pytest.mark.parametrize("kills", [{(3, 5)}, {(0, 0)}, {(3, 0), (3, 7), (19, 2)}, {(place, 1) for place in range(20)}])
@pytest.mark.parametrize("places", [1, 3])
def test_inputs_that_kill_become_errors_and_the_rest_is_done(kills: set[tuple[int, int]], places: int) -> None:
    cluster = Cluster(Schedule(jobs(20), 2), frozenset(kills), places)
    cluster.run()
    check_whole(cluster, 20)
    assert {(job, place) for job, bad in cluster.bad.items() for place in bad} == kills
    assert cluster.schedule.found == len(kills)
    assert set(cluster.bad[next(iter(kills))[0]].values()) == {"every worker that detects in it dies (itself ended it)"}
    assert cluster.schedule.deaths["itself"] <= 7 * len(kills)  # two, a search of three halvings, one more


def test_a_job_of_one_input_that_kills() -> None:
    cluster = Cluster(Schedule(jobs(5, inputs=1), 1), frozenset({(2, 0)}))
    cluster.run()
    check_whole(cluster, 5, inputs=1)
    assert cluster.bad == {2: {0: "every worker that detects in it dies (itself ended it)"}}
    assert cluster.ended[-1] == 2  # the others need not wait for it


def test_known_bad_inputs_are_not_tried_again() -> None:
    cluster = Cluster(Schedule([Job(0, 8, bad={4: "killed"})], 1), frozenset({(0, 4)}))
    cluster.run()
    check_whole(cluster, 1)
    assert not cluster.schedule.deaths


def test_a_place_where_all_die_is_named_and_no_input_is_blamed() -> None:
    cluster = Cluster(Schedule(jobs(1000), 3), places=3, broken=1)
    with pytest.raises(EngineError, match="workers on place 1 end whatever they are given, and others do not"):
        cluster.run()
    assert not cluster.bad


def test_workers_that_all_die_end_the_run_before_many_inputs_are_blamed() -> None:
    cluster = Cluster(Schedule(jobs(1000), 2), places=1, broken=0)
    with pytest.raises(EngineError, match="end whatever they are given"):
        cluster.run()
    assert len(cluster.bad) <= 1


def test_a_job_whose_inputs_do_not_kill_alone_is_named() -> None:
    schedule = Schedule([Job(7, 4)], 1)
    with pytest.raises(EngineError, match="shard 7 ends its worker, and none of its 4 inputs does alone"):
        for worker in range(20):
            schedule.starting(worker)
            schedule.started(worker, "here")
            while (task := schedule.next(worker)) is not None and task.search:
                schedule.finished(worker)
            schedule.died(worker, "itself", "it ended")


def test_running_out_of_memory_takes_a_worker_away_and_blames_no_input() -> None:
    schedule = Schedule(jobs(10), 2)
    for worker in (0, 1):
        schedule.starting(worker)
        schedule.started(worker, "here")
        assert schedule.next(worker)
    assert schedule.died(0, "memory", "its machine ran out of memory") is None
    assert schedule.wanted == 1
    with pytest.raises(EngineError, match="shard 1 ran out of memory on its machine 4 times"):
        for worker in range(1, 10):
            assert schedule.died(worker, "memory", "its machine ran out of memory") is None
            assert schedule.wanted == 1
            schedule.starting(worker + 1)
            schedule.started(worker + 1, "here")
            assert schedule.next(worker + 1)


def test_starts_that_fail_are_bounded() -> None:
    schedule = Schedule(jobs(10), 2)
    with pytest.raises(EngineError, match="no worker starts: it does not"):
        for worker in range(10):
            schedule.starting(worker)
            schedule.failed_start(worker, "it does not")
    assert worker == 2


def test_where_some_workers_run_others_that_do_not_start_are_given_up() -> None:
    schedule = Schedule(jobs(10), 2)
    schedule.starting(0)
    schedule.started(0, "here")
    for worker in range(1, 4):
        schedule.starting(worker)
        schedule.failed_start(worker, "it does not")
    assert schedule.wanted == 1


def test_a_worker_has_its_next_task_before_it_needs_it_unless_others_have_nothing_to_do() -> None:
    schedule = Schedule(jobs(3), 1)
    schedule.starting(0)
    schedule.started(0, "here")
    assert [one and one.job.number for one in (schedule.next(0), schedule.next(0), schedule.next(0))] == [0, 1, None]
    few = Schedule(jobs(3), 2)
    for worker in (0, 1):
        few.starting(worker)
        few.started(worker, "here")
    assert [one and one.job.number for one in (few.next(0), few.next(0), few.next(0))] == [0, 1, None]
    assert few.next(1) is not None


def test_again_has_all_bad_inputs_of_the_job() -> None:
    schedule = Schedule([Job(0, 1, bad={5: "before"})], 1)
    again: Again | None = None
    for worker in range(3):
        schedule.starting(worker)
        schedule.started(worker, "here")
        assert schedule.next(worker)
        again = schedule.died(worker, "itself", "it ended")
    assert again == Again(0, {5: "before", 0: "every worker that detects in it dies (it ended)"})
