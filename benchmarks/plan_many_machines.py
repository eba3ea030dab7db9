"""How far one driver carries: 100 million images on 1,000 workers, before anybody pays for them.

    python benchmarks/plan_many_machines.py --machine epyc-2core

Measures what an image costs the driver here: its name, its record on the way from a worker, in the working file and in
the results; with Ray also what each answer of a worker costs. Then runs the scheduling of `predict --ray` itself
(gfldeploy/cluster/schedule.py), with these costs, on workers in virtual time that die alone, with their machine, and of
images that end them. Prints both, and writes results/MACHINE/checks/plan_many_machines.json beside this script.
"""

from __future__ import annotations

import argparse
import heapq
import json
import math
import os
import random
import resource
import tempfile
import time
import tracemalloc
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from gfldeploy.bundle import Bundle
from gfldeploy.cluster.ray_cluster import ClusterOptions, chunk_s, run_on_ray
from gfldeploy.cluster.schedule import Assignment, Cause, Job, Part, Schedule
from gfldeploy.cluster.worker import Todo
from gfldeploy.detection_options import AS_CONFIGURED
from gfldeploy.detections import Detections
from gfldeploy.files import write_json
from gfldeploy.machine import describe_machine
from gfldeploy.predict.outputs import Summary, write_outputs
from gfldeploy.predict.pipeline import Found, in_order
from gfldeploy.predict.resume import Records, WorkingFile, plain_batch, read_header
from gfldeploy.predict.shards import Shards
from gfldeploy.predict.sources import list_inputs, version_of
from gfldeploy.serialization import plain

HERE = Path(__file__).resolve().parent
DAY_S = 86400.0
FATAL = 10
BUSY = 0.8  # of its time, beyond which a driver is too slow for its workers


@dataclass(frozen=True)
class Costs:
    """Seconds of the driver for the record of one image, and for one answer of a worker."""

    record_s: float
    answer_s: float


@dataclass(frozen=True)
class Fleet:
    """Workers of a run, and how they die.

    `rate`: images/s of each. `start_s`: until one is ready. `machine_days`, `worker_days`: the mean life of a machine,
    and of a worker by itself. `memory`: the share of the latter that is for lack of memory. `fatal`: how many images
    end whoever reads them.
    """

    workers: int
    rate: float
    per_machine: int = 16
    start_s: float = 30.0
    machine_days: float = 30.0
    worker_days: float = 10.0
    memory: float = 0.1
    fatal: int = FATAL


@dataclass
class Worker:
    """`tasks`: as the schedule has them; the first `done` of them are read and wait for the driver.

    `began`: when it began the next one, None while there is none. `free`: when the driver has taken all its answers.
    """

    machine: int
    ready: bool = False
    alive: bool = True
    tasks: deque[Assignment] = field(default_factory=deque)
    done: int = 0
    began: float | None = None
    free: float = 0.0


class Simulation:
    """One run in virtual time. Whatever is decided, `Schedule` decides."""

    def __init__(self, images: int, batch_size: int, fleet: Fleet, costs: Costs, seed: int = 0) -> None:
        self.shards = Shards(images, batch_size)
        self.batch_size, self.fleet, self.costs = batch_size, fleet, costs
        self.random = random.Random(seed)
        self.chunk_s = chunk_s(fleet.workers)
        jobs = (Job(shard.number, shard.stop - shard.start) for shard in self.shards)
        self.schedule = Schedule(jobs, fleet.workers)
        self.fatal: dict[int, set[int]] = {}  # places in a shard
        for image in self.random.sample(range(images), fleet.fatal):
            self.fatal.setdefault(image // self.shards.size, set()).add(image % self.shards.size)
        self.now = self.driver_free = self.driver_busy = self.longest_wait = 0.0
        self.events: list[tuple[float, int, Callable[[], None]]] = []
        self.entered = self.made = self.read = 0
        self.workers: dict[int, Worker] = {}
        self.room = deque(number // fleet.per_machine for number in range(fleet.workers))  # a machine for each worker
        self.finished = bytearray(len(self.shards))

    def run(self) -> dict[str, Any]:
        """To the end; what it took."""
        for machine in set(self.room):
            self._machine_lives(machine)
        self._start_workers()
        while not self.schedule.complete:
            self.now, _, happens = heapq.heappop(self.events)
            happens()
        assert all(self.finished), "a shard was never finished"
        images, seconds = self.shards.inputs, self.now
        return {
            "hours": seconds / 3600,
            "images_per_s": images / seconds,
            "of_what_the_workers_can": images / seconds / (self.fleet.workers * self.fleet.rate),
            "driver_busy": self.driver_busy / seconds,
            "longest_wait_for_the_driver_s": self.longest_wait,
            "shards": len(self.shards),
            "deaths": dict(self.schedule.deaths),
            "workers_started": self.made,
            "fatal_images_found": self.schedule.found,
            "read_again": self.read / images - 1,
        }

    # What happens

    def _ready(self, number: int) -> None:
        worker = self.workers.get(number)
        if worker is None or not worker.alive:
            return
        worker.ready = True
        self.schedule.started(number, f"machine {worker.machine}")
        self._later(self.random.expovariate(1 / (self.fleet.worker_days * DAY_S)), partial(self._dies, number))
        self._hand_out(number)

    def _read(self, number: int) -> None:
        """The worker has read all images of its task, or the one that ends it."""
        worker = self.workers.get(number)
        if worker is None or not worker.alive:
            return
        images, fatal = self._images(worker.tasks[worker.done])
        if fatal:
            self._end(number, "itself")
            return
        self.read += images
        worker.began = None
        worker.done += 1
        answers = max(math.ceil(images / self.fleet.rate / self.chunk_s), 1)
        begins = max(self.driver_free, self.now)
        seconds = images * self.costs.record_s + answers * self.costs.answer_s
        self.longest_wait = max(self.longest_wait, begins - self.now)
        self.driver_busy += seconds
        self.driver_free = worker.free = begins + seconds
        self._later(worker.free - self.now, partial(self._taken, number))
        self._begin(number)

    def _taken(self, number: int) -> None:
        """The driver has written what came of a task."""
        worker = self.workers[number]
        task = worker.tasks.popleft()
        worker.done -= 1
        if task.search is None:
            assert not self.finished[task.job.number], "a shard was finished twice"
            self.finished[task.job.number] = 1
        self.schedule.finished(number)
        self._hand_out(number)
        self._start_workers()

    def _dies(self, number: int) -> None:
        if number in self.workers:
            self._end(number, "memory" if self.random.random() < self.fleet.memory else "itself")

    def _machine_dies(self, machine: int) -> None:
        for number in [number for number, worker in self.workers.items() if worker.machine == machine]:
            self._end(number, "machine")
        self._machine_lives(machine)  # another one in its place

    def _gone(self, number: int, cause: Cause, values: int) -> None:
        """The driver sees that a worker has died, after all that it answered: of its last task so many values."""
        worker = self.workers.pop(number)
        self.room.append(worker.machine)
        if not worker.ready:
            self.schedule.failed_start(number, "its machine has gone")
        else:
            if values:
                self.schedule.advanced(number, values)
            again = self.schedule.died(number, cause, "its process ended")
            if again is not None:
                assert set(again.bad) <= self.fatal.get(again.job, set()), "another image was found"
        self._start_workers()
        for other, idle in self.workers.items():
            if idle.ready and not idle.tasks:
                self._hand_out(other)

    # What follows

    def _later(self, seconds: float, happens: Callable[[], None]) -> None:
        self.entered += 1
        heapq.heappush(self.events, (self.now + seconds, self.entered, happens))

    def _machine_lives(self, machine: int) -> None:
        life = self.random.expovariate(1 / (self.fleet.machine_days * DAY_S))
        self._later(life, partial(self._machine_dies, machine))

    def _start_workers(self) -> None:
        while self.schedule.workers < min(self.schedule.wanted, len(self.workers) + len(self.room)):
            number, self.made = self.made, self.made + 1
            self.workers[number] = Worker(self.room.popleft())
            self.schedule.starting(number)
            self._later(self.fleet.start_s * self.random.uniform(0.5, 1.5), partial(self._ready, number))

    def _hand_out(self, number: int) -> None:
        worker = self.workers[number]
        while (task := self.schedule.next(number)) is not None:
            worker.tasks.append(task)
        self._begin(number)

    def _begin(self, number: int) -> None:
        """The next task of a worker, if it has one and is at none."""
        worker = self.workers[number]
        if worker.alive and worker.began is None and worker.done < len(worker.tasks):
            worker.began = self.now
            images, fatal = self._images(worker.tasks[worker.done])
            self._later((images + fatal / 2) / self.fleet.rate, partial(self._read, number))

    def _images(self, task: Assignment) -> tuple[int, bool]:
        """How many a worker detects in of a task, and whether the next one ends it."""
        job = task.job
        todo = task.search or range(job.skip * self.batch_size, job.inputs)
        fatal = sorted(self.fatal.get(job.number, set()) - job.bad.keys())
        for place in fatal:
            if place in todo:
                return place - todo.start, True
        return len(todo), False

    def _end(self, number: int, cause: Cause) -> None:
        worker = self.workers[number]
        if not worker.alive:
            return
        worker.alive = False
        values = 0
        if worker.began is not None:
            task = worker.tasks[worker.done]
            read = int(
                (self.now - worker.began) // self.chunk_s * self.chunk_s * self.fleet.rate
            )  # of those it has answered
            self.read += read
            values = 0 if task.search else read // self.batch_size
        self._later(max(worker.free - self.now, 0.0), partial(self._gone, number, cause, values))


# --- what this driver costs ----------------------------------------------------------


def measure_record(detections: int, shards: int, shard: int = 256, batch: int = 8) -> dict[str, float]:
    """Seconds of CPU time and bytes on disk of an image of so many detections.

    `record_s`: of the driver of a whole run, from the answer of a worker to the results. `part_s`: of the driver of a
    part, which writes no results. `merge_s`: of `merge`, for it.
    """
    random = np.random.default_rng(0)
    boxes = random.uniform(0, 1000, (detections, 4)).astype(np.float32)
    scores = np.sort(random.uniform(0.05, 1, detections).astype(np.float32))[::-1]
    found = Detections(boxes, scores, random.integers(0, 80, detections))
    classes = [f"class {number}" for number in range(80)]

    def answers(number: int) -> Iterator[bytes]:
        """Of a worker that does ten images between two of them."""
        names = [f"images/{number:06d}/{place:012d}.jpg" for place in range(shard)]
        batches = [
            plain_batch([Found(place, names[place], (480, 640), found) for place in range(start, start + batch)])
            for start in range(0, shard, batch)
        ]
        for start in range(0, len(batches), 2):
            yield json.dumps({"values": [(number, one) for one in batches[start : start + 2]]}).encode()

    def arriving(working: WorkingFile) -> Iterator[Found]:
        nonlocal preparing
        for number in range(shards):
            begin = time.process_time()
            arrived = list(answers(number))
            preparing += time.process_time() - begin
            for answer in arrived:
                working.add(number, [one for _, one in json.loads(answer)["values"]])
            working.end(number, "processor")
            yield from in_order(((one.index, one) for one in group) for group in working.groups(number))

    def merging(records: Records) -> Iterator[Found]:
        with records.path.open("rb") as file:
            records.read(read_header(file)[1])
        for number in range(shards):
            yield from in_order(((one.index, one) for one in group) for group in records.groups(number))

    images, preparing = shards * shard, 0.0

    def seconds(work: Callable[[], object]) -> float:
        nonlocal preparing
        preparing, begin = 0.0, time.process_time()
        work()
        return (time.process_time() - begin - preparing) / images

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for place in ("results", "merged"):
            (folder / place).mkdir()
        with WorkingFile(folder / "working", {}, range(shards), len(classes)) as working:
            record_s = seconds(lambda: write_outputs(folder / "results", arriving(working), classes))
        with WorkingFile(folder / "part", {}, range(shards), len(classes)) as working:
            part_s = seconds(lambda: deque(map(Summary(AS_CONFIGURED.shown(classes)).add, arriving(working)), maxlen=0))
        with Records(folder / "part", range(shards), len(classes)) as records:
            merge_s = seconds(lambda: write_outputs(folder / "merged", merging(records), classes))
        results = sum(path.stat().st_size for path in (folder / "results").iterdir())
        working_bytes = (folder / "working").stat().st_size / images
        return {
            "record_s": record_s,
            "part_s": part_s,
            "merge_s": merge_s,
            "working_bytes": working_bytes,
            "result_bytes": results / images,
        }


def measure_inputs(count: int, shards: int = 5000) -> dict[str, float]:
    """What the name of an image costs the driver, and the place of a shard in the working file.

    `listing_bytes`: at most, while they are listed. `stat_s`: to ask for its size and time of change.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for number in range(count):
            (folder / f"{number:012d}.jpg").touch()
        tracemalloc.start()
        names = list_inputs([folder])
        name_bytes, listing_bytes = (value / count for value in tracemalloc.get_traced_memory())
        tracemalloc.stop()
        begin = time.perf_counter()
        list_inputs([folder])
        listing_s = (time.perf_counter() - begin) / count
        begin = time.perf_counter()
        for one in names:
            version_of(one)
        stat_s = (time.perf_counter() - begin) / count
        with WorkingFile(folder / "working", {}, range(shards), 1) as working:
            tracemalloc.start()
            for number in range(shards):
                working.add(number, [[{"index": 0}]])
                working.end(number, "processor")
            shard_bytes = tracemalloc.get_traced_memory()[0] / shards
            tracemalloc.stop()
    return {
        "name_bytes": name_bytes,
        "listing_bytes": listing_bytes,
        "listing_s": listing_s,
        "stat_s": stat_s,
        "shard_bytes": shard_bytes,
    }


class NoWork:
    """For a worker (`cluster.worker.Work`): values that cost nothing, to see what an answer costs the driver."""

    def __init__(self, setting: Mapping[str, Any], bundle: Path) -> None:
        pass

    def run(self, tasks: Iterable[Todo]) -> Generator[tuple[int, list[Any]]]:
        """A value, and the end: both in one answer."""
        for todo in tasks:
            yield todo.number, [0]
            yield todo.number, []

    def close(self) -> None:
        pass


def measure_answer(bundle: Bundle, answers: int) -> dict[str, float]:
    """What an answer of a worker costs the driver in CPU time: of two on this machine, which answer without a pause."""
    os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
    cluster = ClusterOptions("local", workers=2)
    jobs = (Job(number, 1) for number in range(answers))
    parts = run_on_ray(
        cluster, f"{Path(__file__).stem}:NoWork", {}, jobs, lambda number: {}, bundle=bundle, engine="onnxruntime"
    )
    with closing(parts):
        first = next(parts)
        cpu, wall = time.process_time(), time.perf_counter()
        assert isinstance(first, Part)
        count = sum(1 for part in parts)
        return {
            "answer_s": (time.process_time() - cpu) / count,
            "answers_per_s": count / (time.perf_counter() - wall),
        }


def planned(images: int, workers: int, rate: float, batch_size: int, costs: Costs) -> Iterator[dict[str, Any]]:
    """One run of all images by all workers; then so many of equal parts of both that their drivers keep up."""
    drivers = 1
    while True:
        fleet = Fleet(workers // drivers, rate, fatal=max(FATAL // drivers, 1))
        simulation = Simulation(images // drivers, batch_size, fleet, costs)
        found = {"drivers": drivers, "fleet": asdict(fleet), **simulation.run()}
        yield found
        if found["driver_busy"] < BUSY or drivers * 2 > workers:
            return
        needed = workers * (rate * costs.record_s + costs.answer_s / chunk_s(workers)) / BUSY
        drivers = max(drivers * 2, 1 << math.ceil(math.log2(needed)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--machine", required=True, help="folder of results/ for this machine, such as epyc-2core")
    parser.add_argument("--bundle", type=Path, help="any bundle: measure Ray's answers too, with a local cluster")
    parser.add_argument("--images", type=int, default=100_000_000)
    parser.add_argument("--workers", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--detections", type=int, nargs="+", default=[10, 100], help="of an image")
    parser.add_argument("--rates", type=float, nargs="*", default=[1, 10, 100], help="images/s of a worker")
    parser.add_argument("--shards", type=int, default=40, help="of 256 images, to measure a record on")
    parser.add_argument("--measured", action="store_true", help="add runs to the results that are there")
    args = parser.parse_args()
    path = HERE / "results" / args.machine / "checks" / "plan_many_machines.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    if not args.measured:
        found |= {
            "machine": plain(describe_machine()),
            "of_an_input": measure_inputs(100_000),
            "of_a_record": {str(count): measure_record(count, args.shards) for count in args.detections},
        }
        if args.bundle:
            found["of_an_answer"] = measure_answer(Bundle.open(args.bundle), 5000)
    print(json.dumps({key: found[key] for key in ("of_an_input", "of_a_record", "of_an_answer")}, indent=1))
    path.parent.mkdir(parents=True, exist_ok=True)
    runs = found["runs"] = found.get("runs", []) if args.measured else []
    for detections in args.detections:
        costs = Costs(found["of_a_record"][str(detections)]["record_s"], found["of_an_answer"]["answer_s"])
        for rate in args.rates:
            for run in planned(args.images, args.workers, rate, args.batch_size, costs):
                memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
                runs.append({"images": args.images, "detections": detections, **run, "memory_mb": memory})
                print(json.dumps(runs[-1]), flush=True)
                write_json(path, found)
    write_json(path, found)
    print(path)


if __name__ == "__main__":
    main()
