"""Jobs on a Ray cluster: connecting to it, or starting one on this machine, its workers, and what becomes of them.

A worker is an actor without restarts: `schedule` decides what follows from its death. The driver hands out tasks and
yields what comes back, in chunks and only as fast as they are taken; so little is in its memory at any time.
"""

from __future__ import annotations

import atexit
import importlib
import inspect
import json
import logging
import os
import platform
import re
import secrets
import socket
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, Self

from gfldeploy.bundle import Bundle
from gfldeploy.child_process import Limits, run_child
from gfldeploy.cluster.schedule import Again, Assignment, Cause, Job, Part, Schedule
from gfldeploy.cluster.worker import Opening, RemoteWorker, Todo, bundle_files, raised, versions
from gfldeploy.engines.base import EngineOptions
from gfldeploy.engines.hardware import usable_threads
from gfldeploy.errors import (
    EngineError,
    GfldeployError,
    MissingDependencyError,
    UnsupportedError,
    UsageError,
    summary,
)
from gfldeploy.files import scratch_directory, writing
from gfldeploy.progress import SILENT, Progress
from gfldeploy.serialization import plain

LOCAL = "local"
_LOOPBACK = "127.0.0.1"
_LOCAL_STORE_BYTES = 200 * 10**6  # answers are small
_PROBE_S = 5.0
_ASK_S = 20.0  # with the time that Ray takes to load
_CLUSTERS = "ENABLE_RAY_CLUSTER"
_AGENT_PORTS = ("metrics_agent_port", "runtime_env_agent_port", "dashboard_agent_listen_port")
_LONGEST_PLACE = 10  # bytes of a folder for temporary files, with ours of a user's number of up to 10 digits
_LOCAL_STARTS = 3  # on a busy machine Ray gives up after 30 s
_LOCAL_S = 180.0  # all of them
_JOIN_S = 60.0
_END_S = 60.0
_POLL_S = 1.0
_REPORT_S = 30.0
_WAITING_S = 30.0  # for room in the cluster, before it is told
_BUSY = "Try again when it is less busy: the command resumes."
_START = "Start one with `ray start --head` and give the HOST:PORT that it prints, or use --ray local."
_OTHER_PORT = "Give the port that `ray start --head` prints (6379 by default), not that of the dashboard."
_HTTP2 = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])  # and no settings
_SETTINGS = b"\x04"  # what every server answers with


@dataclass(frozen=True)
class ClusterOptions:
    """Where workers run. `address`: of Ray's head, "auto" or "local". `workers`: None for as many as have room.

    `cpus`, `gpus`: what each takes of its machine. `on_gpu`: whether the engine runs on a GPU.
    """

    address: str
    workers: int | None = None
    cpus: int = 1
    gpus: float = 0.0
    on_gpu: bool = False

    @classmethod
    def of(
        cls, ray: str | None, workers: int | None, gpus_per_worker: float | None, options: EngineOptions
    ) -> Self | None:
        """Those of the options of a command; None without `ray`. Raises `UsageError` for options that go with it."""
        if ray is None:
            if workers is not None or gpus_per_worker is not None:
                raise UsageError("--workers and --gpus-per-worker are of --ray", "Add --ray, or leave them out.")
            return None
        on_gpu = options.device == "gpu"
        gpus = float(on_gpu) if gpus_per_worker is None else gpus_per_worker
        return cls(ray, workers, options.threads * options.streams, gpus, on_gpu)

    def connected(self) -> AbstractContextManager[None]:
        """As `connected`; calls of `run_on_ray` in the block share the connection, and a cluster of this machine."""
        return connected(self.address, cpus=max(usable_threads(), (self.workers or 1) * self.cpus))


@dataclass
class _Worker:
    """An actor. `pending`: the call that it has not answered. `images`, `since`: done, and when it was ready."""

    number: int
    actor: Any
    pending: Any = None
    place: str = ""
    node: str = ""
    processor: str = ""
    images: int = 0
    since: float = 0.0
    new: list[list[Any]] = field(default_factory=list)  # tasks for its next call
    tasks: list[Assignment] = field(default_factory=list)
    first: bool = False


def run_on_ray(
    options: ClusterOptions,
    work: str,
    setting: Mapping[str, Any],
    jobs: Iterable[Job],
    task: Callable[[int], Mapping[str, Any]],
    *,
    bundle: Bundle,
    engine: str,
    images: int = 0,
    progress: Progress = SILENT,
) -> Generator[Part | Again]:
    """The values of all jobs, from workers on a Ray cluster, in any order.

    `work`: "module:function", which on a worker is called with the `setting` and the directory of the bundle, and makes
    a `worker.Work`. `task`: of a job, by its number, as JSON-ready data. `engine`: whose packages have to be the same
    everywhere. `images`: how many there are to do, for the time left; each entry of a value is one. `progress` is told
    rates, and of workers that die. Closing the iterator ends the workers.

    Raises `UsageError` for an address that cannot be used, `UnsupportedError` for a machine with other versions,
    `EngineError` where workers do not start or die all the time, and whatever a worker raises on purpose.
    """
    with options.connected():
        room, directory = _room(options), str(bundle.directory.absolute())
        opening = Opening(work, setting, directory, bundle.digest, versions(engine), chunk_s(room), options.on_gpu)
        driver = _Driver(options, Schedule(jobs, room), opening, bundle, task, images, progress)
        try:
            yield from driver.parts()
        finally:
            driver.close()


def chunk_s(workers: int) -> float:
    """How long each of so many workers collects before it answers.

    An answer takes almost a millisecond of the driver, whatever is in it: all together take a sixth of its time.
    """
    return max(0.5, 0.005 * workers)


class _Driver:
    def __init__(
        self,
        options: ClusterOptions,
        schedule: Schedule,
        opening: Opening,
        bundle: Bundle,
        task: Callable[[int], Mapping[str, Any]],
        images: int,
        progress: Progress,
    ) -> None:
        import ray

        self._ray = ray
        self._schedule = schedule
        self._request = json.dumps(plain(opening))
        self._bundle = bundle
        self._files: Any = None  # of the bundle, in Ray's object store
        self._task = task
        self._progress = progress
        self._actors = ray.remote(RemoteWorker).options(
            num_cpus=options.cpus, num_gpus=options.gpus, max_restarts=0, max_task_retries=0
        )
        self._workers: dict[int, _Worker] = {}
        self._made = 0
        self._ready_once = False
        self._processors: Counter[str] = Counter()
        self._report = _Report(images, progress)
        self._begun = time.monotonic()
        self._told_waiting = False

    def parts(self) -> Iterator[Part | Again]:
        """Do all jobs."""
        while not self._schedule.complete:
            self._start_workers()
            self._hand_out()
            for worker in self._answered():
                yield from self._taken(worker)
            self._report.regularly(list(self._workers.values()), self._schedule)
            self._tell_waiting()
        self._report.end(self._schedule)

    def close(self) -> None:
        """End all workers."""
        for worker in self._workers.values():
            self._end(worker)
        self._workers.clear()

    def _start_workers(self) -> None:
        while self._schedule.workers < self._schedule.wanted:
            worker = _Worker(self._made, self._actors.remote())
            worker.first = not self._ready_once
            worker.pending = worker.actor.open.remote(self._request)
            self._workers[worker.number] = worker
            self._schedule.starting(worker.number)
            self._made += 1

    def _hand_out(self) -> None:
        for worker in self._workers.values():
            if not worker.place:
                continue
            while (task := self._schedule.next(worker.number)) is not None:
                worker.tasks.append(task)
                job = task.job
                skip = 0 if task.search is not None else job.skip
                worker.new.append(Todo(job.number, self._task(job.number), skip, task.left_out).as_list())
            if worker.pending is None and worker.tasks:
                worker.pending = worker.actor.collect.remote(json.dumps(worker.new))
                worker.new = []

    def _answered(self) -> list[_Worker]:
        """Those that have answered, or died, after a while at most."""
        by_call = {worker.pending: worker for worker in self._workers.values() if worker.pending is not None}
        if not by_call:
            raise AssertionError("there are jobs, and no worker does any")
        calls = list(by_call)
        ready, _ = self._ray.wait(calls, num_returns=1, timeout=_POLL_S)
        if ready and len(calls) > 1:
            ready, _ = self._ray.wait(calls, num_returns=len(calls), timeout=0)
        return [by_call[call] for call in ready]

    def _taken(self, worker: _Worker) -> Iterator[Part | Again]:
        call, worker.pending = worker.pending, None
        try:
            answer = json.loads(self._ray.get(call))
        except self._ray.exceptions.RayTaskError as error:
            self._failed(worker, error)
            return
        except self._ray.exceptions.RayError as error:
            yield from self._gone(worker, error)
            return
        if "values" in answer:
            yield from self._received(worker, answer["values"])
        if "error" in answer:
            problem = raised(answer["error"])
            if worker.place or worker.first:
                raise problem
            self._not_started(worker, str(problem))
        elif "needs" in answer:
            self._files = self._files or self._ray.put(bundle_files(self._bundle))
            worker.pending = worker.actor.open.remote(self._request, self._files)
        elif "processor" in answer:
            self._opened(worker, answer)

    def _opened(self, worker: _Worker, answer: Mapping[str, Any]) -> None:
        worker.place, worker.node, worker.processor = answer["place"], answer["node"], answer["processor"]
        worker.since = time.monotonic()
        self._ready_once = True
        self._schedule.started(worker.number, worker.place)
        self._processors[worker.processor] += 1
        if self._processors[worker.processor] == 1 and len(self._processors) == 2:
            kinds = " and ".join(self._processors)
            self._progress.note(f"workers run on different processors ({kinds}): they may round differently")

    def _received(self, worker: _Worker, values: list[tuple[int, list[Any]]]) -> Iterator[Part]:
        for number, group in groupby(values, lambda one: one[0]):
            batches = [batch for _, batch in group]
            task, end = worker.tasks[0], not batches[-1]
            if number != task.job.number:
                raise EngineError(f"a worker on {worker.place} answered for shard {number} out of turn", None)
            done = tuple(batches[:-1] if end else batches)
            if done:
                self._schedule.advanced(worker.number, len(done))
            if end:
                worker.tasks.pop(0)
                self._schedule.finished(worker.number)
            if task.search is None:
                count = sum(map(len, done))
                worker.images += count
                self._report.images += count
                yield Part(number, done, end, worker.processor)

    def _failed(self, worker: _Worker, error: Any) -> None:
        """A worker raised what it should not: a bug, or gfldeploy is not there."""
        text = str(error)
        if "ModuleNotFoundError" in text and "gfldeploy" in text and not worker.place:
            raise MissingDependencyError(
                f"a machine of the cluster has no gfldeploy, or another version: {summary(error)}",
                "Install the same gfldeploy, with the engine, in the Python environment of every machine's Ray.",
            ) from error
        raise error

    def _gone(self, worker: _Worker, error: Any) -> Iterator[Again]:
        """A worker has died."""
        self._end(worker)
        del self._workers[worker.number]
        exceptions = self._ray.exceptions
        if isinstance(error, exceptions.ActorDiedError) and error.actor_init_failed:
            self._failed(worker, error)
        cause, why = self._cause(worker, error)
        if not worker.place:
            if cause == "machine":
                self._schedule.failed_start(worker.number, why)
            else:
                self._not_started(worker, why)
            return
        shard = f"; shard {worker.tasks[0].job.number} is done again" if worker.tasks else ""
        self._progress.note(f"a worker on {worker.place} died: {why}{shard}")
        again = self._schedule.died(worker.number, cause, why)
        if again is not None:
            yield again

    def _not_started(self, worker: _Worker, why: str) -> None:
        self._end(worker)
        self._workers.pop(worker.number, None)
        self._progress.note(f"a worker did not start: {why}")
        self._schedule.failed_start(worker.number, why)

    def _cause(self, worker: _Worker, error: Any) -> tuple[Cause, str]:
        """Why it died, for the schedule and in words."""
        text = " ".join(str(error).split())
        exceptions = self._ray.exceptions
        if isinstance(error, exceptions.OutOfMemoryError) or "OutOfMemory" in text:
            return "memory", "its machine ran out of memory"
        if isinstance(error, exceptions.ActorUnavailableError):
            return "machine", "it does not answer any more"
        alive = {node["NodeID"] for node in self._ray.nodes() if node["Alive"]}
        gone = bool(worker.node) and worker.node not in alive
        if (
            gone
            or isinstance(error, exceptions.NodeDiedError)
            or re.search(r"node (has )?died|node was|its node", text)
        ):
            return "machine", "its machine has gone"
        return "itself", "its process ended"

    def _end(self, worker: _Worker) -> None:
        with suppress(Exception):
            self._ray.kill(worker.actor, no_restart=True)

    def _tell_waiting(self) -> None:
        if self._told_waiting or self._ready_once or time.monotonic() - self._begun < _WAITING_S:
            return
        self._told_waiting = True
        self._progress.note("no worker has started yet: the CPUs or GPUs of the cluster may be taken, or are starting")


class _Report:
    """Tells now and then how far it is."""

    def __init__(self, total: int, progress: Progress) -> None:
        self.images = 0
        self._total = total
        self._progress = progress
        self._begun = self._told = time.monotonic()

    def regularly(self, workers: list[_Worker], schedule: Schedule) -> None:
        now = time.monotonic()
        if now - self._told < _REPORT_S or not self.images:
            return
        self._told = now
        self._progress.stage(self._line(workers, schedule, now))

    def end(self, schedule: Schedule) -> None:
        if schedule.deaths:
            self._progress.stage(f"all done; {_dead(schedule)}")

    def _line(self, workers: list[_Worker], schedule: Schedule, now: float) -> str:
        ready = [worker for worker in workers if worker.place]
        rates = [worker.images / (now - worker.since) for worker in ready if now > worker.since]
        rate = self.images / (now - self._begun)
        left = max(self._total - self.images, 0) / rate
        places = len({worker.place for worker in ready})
        parts = [
            f"{len(ready)} worker{'s' * (len(ready) != 1)} on {places} machine{'s' * (places != 1)}",
            f"{rate:.3g} images/s",
            f"{min(rates, default=0):.3g} to {max(rates, default=0):.3g} each",
            *([f"{_duration(left)} left"] if self._total else []),
            *([_dead(schedule)] if schedule.deaths else []),
        ]
        return ", ".join(parts)


def _dead(schedule: Schedule) -> str:
    words: Mapping[Cause, str] = {"itself": "by themselves", "memory": "of memory", "machine": "with their machine"}
    causes = ", ".join(f"{count} {words[cause]}" for cause, count in schedule.deaths.items())
    return f"{schedule.deaths.total()} died ({causes})"


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{seconds:.0f} s" if seconds < 120 else f"{minutes} min" if minutes < 120 else f"{minutes / 60:.1f} h"


def _room(options: ClusterOptions) -> int:
    """How many workers to have. Raises `UsageError` where not one has room, whatever else runs."""
    import ray

    rooms, most = 0, 0
    for node in ray.nodes():
        if node["Alive"]:
            cpus, gpus = node["Resources"].get("CPU", 0), node["Resources"].get("GPU", 0)
            rooms += int(min(cpus // options.cpus, gpus // options.gpus if options.gpus else cpus))
            most = max(most, int(cpus))
    if not rooms:
        gpus = f" and {options.gpus:g} GPUs" if options.gpus else ""
        raise UsageError(
            f"no machine of the cluster has {options.cpus} CPUs{gpus} for a worker; the largest has {most} CPUs",
            "Use fewer --threads and --streams, or other --gpus-per-worker.",
        )
    return options.workers or rooms


@contextmanager
def connected(address: str, *, cpus: int = 0, environment: Mapping[str, str] = {}) -> Iterator[None]:
    """Ray, connected to the cluster at this address, or to one of this machine alone that ends with the block.

    Inside another such block, or where the program is connected already, that connection is used and left alone.
    `cpus`, `environment`: of the cluster that is started for "local".

    Raises `UsageError` for an address where no cluster is, or that this machine, its packages or token do not fit.
    """
    ray = _imported()
    if ray.is_initialized():
        yield
        return
    with ExitStack() as stack:
        # What Ray says of every worker that dies would be on standard output.
        stack.enter_context(_replaced(ray._private.worker, "print_to_stdstream", lambda *given, **named: None))
        # Under `uv run` it would have workers install the packages again, in a copy of the folder.
        constants, name = ray._private.ray_constants, "RAY_ENABLE_UV_RUN_RUNTIME_ENV"
        stack.enter_context(_replaced(constants, name, os.environ.get(name) == "1"))
        stack.enter_context(_local(cpus, environment) if address == LOCAL else _joined(address))
        yield


def _imported() -> Any:
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # or it writes a warning about that
    try:
        import ray
    except ImportError as error:
        raise MissingDependencyError(f"Ray cannot be loaded: {summary(error)}", "Run: pip install ray") from error
    return ray


@contextmanager
def _started(start: Callable[[], object], limit_s: float, late: GfldeployError) -> Iterator[None]:
    """Ray, once `start` has connected it, until the block ends. Raises what `start` does, and `late` after `limit_s`.

    Ray waits for its raylet without a limit, and cannot be interrupted: so it does in a thread of its own, which lives
    as long as the block, since Linux ends the processes that Ray starts with the thread that has started them.
    """
    import ray

    answered, over = threading.Event(), threading.Event()
    failure: list[BaseException] = []

    def run() -> None:
        try:
            start()
        except BaseException as error:  # noqa: BLE001 - raised in the thread that waits
            failure.append(error)
        answered.set()
        over.wait()
        ray.shutdown()

    thread = threading.Thread(target=run, name="gfldeploy-ray", daemon=True)
    thread.start()
    try:
        if not answered.wait(limit_s):
            raise late
        if failure:
            raise failure[0]
        yield
    finally:
        over.set()
        if answered.is_set():
            thread.join(_END_S)
        else:  # late, or interrupted
            atexit.unregister(ray.shutdown)  # it would wait for the same answer


@contextmanager
def _local(cpus: int, environment: Mapping[str, str]) -> Iterator[None]:
    """A cluster of this machine, which nobody else can use: on the loopback interface, with a token of its own."""
    import ray

    parameter, constants = _internals()
    own = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        # No other machine is to join, or Ray takes 127.0.0.1 for an address of all interfaces: the option is about
        # systems where that would open a dialogue of the firewall.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_USAGE_STATS_ENABLED": "0",  # or Ray reports to its makers
        "RAY_worker_niceness": "0",  # Ray gives way to all others by default
        "RAY_enable_worker_prestart": "0",  # of processes that nobody asked for
        **environment,
    }
    with ExitStack() as stack:
        folder = stack.enter_context(_by_short_name(stack.enter_context(scratch_directory())))
        stack.callback(_reload_token)
        stack.enter_context(_environment(own))
        stack.enter_context(_replaced(constants, _CLUSTERS, False))  # read when Ray was loaded
        # Ray waits for ports that its agents choose, and on a busy machine gives up before they do. Nobody reads logs.
        given = partial(
            parameter.RayParams,
            **dict(zip(_AGENT_PORTS, _free_ports(len(_AGENT_PORTS)), strict=True)),
            include_log_monitor=False,
        )
        stack.enter_context(_replaced(parameter, "RayParams", given))
        _reload_token()

        def start() -> None:
            for attempt in range(_LOCAL_STARTS):
                try:
                    (folder / str(attempt)).mkdir()
                    ray.init(
                        address=LOCAL,
                        num_cpus=cpus or usable_threads(),
                        include_dashboard=False,
                        object_store_memory=_LOCAL_STORE_BYTES,
                        _node_ip_address=_LOOPBACK,
                        _temp_dir=str(folder / str(attempt)),
                        **_quiet(),
                    )
                    return
                except Exception as error:
                    ray.shutdown()
                    if attempt == _LOCAL_STARTS - 1:
                        raise EngineError(f"Ray does not start on this machine: {summary(error)}", _BUSY) from error

        late = EngineError(f"Ray has not started on this machine within {_LOCAL_S:.0f} s", _BUSY)
        stack.enter_context(_started(start, _LOCAL_S, late))
        yield


def _internals() -> tuple[Any, Any]:
    """Two modules of Ray. Raises `UnsupportedError` for a Ray that has not what `_local` changes there.

    `ray.init` has no argument for the ports of its agents, nor one that closes the cluster to other machines.
    """
    import ray

    with suppress(ImportError, AttributeError, TypeError, ValueError):
        parameter = importlib.import_module("ray._private.parameter")
        constants = importlib.import_module("ray._private.ray_constants")
        known = inspect.signature(parameter.RayParams).parameters
        if hasattr(constants, _CLUSTERS) and {*_AGENT_PORTS, "include_log_monitor"} <= known.keys():
            return parameter, constants
    raise UnsupportedError(
        f"--ray local does not know Ray {ray.__version__} well enough to keep other machines out",
        "Run: pip install ray==2.60.0, or start a cluster with `ray start --head` and give its HOST:PORT.",
    )


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind((_LOOPBACK, 0))
        return [int(one.getsockname()[1]) for one in sockets]


@contextmanager
def _by_short_name(folder: Path) -> Iterator[Path]:
    """A link to the folder, which is removed afterwards: Ray refuses to start where paths of its sockets are too long.

    Linux allows 107 bytes, Ray adds 67, and a scratch directory has 40 and more.
    """
    place = Path(tempfile.gettempdir())
    if len(os.fsencode(place)) > _LONGEST_PLACE:
        place = Path("/tmp")
    prefix = f"gfldeploy-{os.getuid()}-"
    for left in place.glob(f"{prefix}*"):
        with suppress(OSError):  # it is another's
            if left.is_symlink() and not left.exists():  # of a command that was killed
                left.unlink()
    link = place / f"{prefix}{secrets.token_hex(4)}"
    with writing(link):
        link.symlink_to(folder)
    try:
        yield link
    finally:
        link.unlink(missing_ok=True)


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def _replaced(module: Any, name: str, value: object) -> Iterator[None]:
    """Another value for what a module of Ray has under a name, if it has it."""
    before = getattr(module, name, None)
    if before is not None:
        setattr(module, name, value)
    try:
        yield
    finally:
        if before is not None:
            setattr(module, name, before)


@contextmanager
def _joined(address: str) -> Iterator[None]:
    """The cluster at an address, of which this machine is a part."""
    import ray

    head = _head(address)
    _check_port(head)
    try:
        found = run_child("gfldeploy.cluster.probe", {"address": head}, limits=Limits(timeout_s=_ASK_S))
    except EngineError as error:
        raise UsageError(f"what answers at {head} is no head of a Ray cluster: {error.problem}", _OTHER_PORT) from error
    problem, remedy = _obstacle(head, found)
    if problem:
        raise UsageError(problem, remedy)

    def start() -> None:
        try:
            ray.init(address=head, **_quiet())
        except Exception as error:
            raise UsageError(f"cannot connect to Ray at {head}: {summary(error)}", "See Ray's logs there.") from error

    late = UsageError(
        f"the Ray cluster at {head} answers, and its raylet on this machine has not within {_JOIN_S:.0f} s",
        "Run `ray stop` and `ray start` here again, or see raylet.out in Ray's logs.",
    )
    with _started(start, _JOIN_S, late):
        yield


def _head(address: str) -> str:
    """HOST:PORT. Raises `UsageError`."""
    if address == "auto":
        from ray._private.services import canonicalize_bootstrap_address_or_die

        try:
            return str(canonicalize_bootstrap_address_or_die("auto"))
        except (ConnectionError, ValueError) as error:
            raise UsageError(f"no Ray cluster runs on this machine: {summary(error)}", _START) from error
    if not re.fullmatch(r"(\[[0-9a-fA-F:.]+\]|[\w.-]+):\d{1,5}", address):
        client = " (Ray Client is not used)" if address.startswith("ray://") else ""
        raise UsageError(f"{address!r:.100} is no address of a Ray cluster{client}", "Give HOST:PORT, auto, or local.")
    return address


def _check_port(head: str) -> None:
    """Raise `UsageError` unless an HTTP/2 server answers there: Ray would try for a minute."""
    host, _, port = head.rpartition(":")
    answer = b""
    try:
        with socket.create_connection((host.strip("[]"), int(port)), _PROBE_S) as connection:
            connection.settimeout(_PROBE_S)
            connection.sendall(_HTTP2)
            answer = connection.recv(9)
    except TimeoutError:
        pass
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error) or "no answer"
        raise UsageError(f"no Ray cluster answers at {head}: {reason}", _START) from error
    if answer[3:4] != _SETTINGS and os.environ.get("RAY_USE_TLS", "0") in ("0", ""):
        raise UsageError(f"what answers at {head} is no head of a Ray cluster", _OTHER_PORT)


def _obstacle(head: str, found: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """Why the cluster that was found cannot be used, and what to do."""
    import ray

    problem, remedy = None, None
    mine = {"Ray": ray.__version__, "Python": platform.python_version()}
    theirs = found.get("versions") or {}
    others = [f"{name} {version} there, {mine[name]} here" for name, version in theirs.items() if version != mine[name]]
    if found.get("unauthenticated"):
        problem = f"the Ray cluster at {head} needs {'another' if found.get('token') else 'a'} token"
        remedy = "Set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN (or the file ~/.ray/auth_token) to that of the cluster."
    elif "error" in found:
        problem = f"what answers at {head} is no head of a Ray cluster: {found['error']}"
        remedy = _OTHER_PORT
    elif others:
        problem = f"the Ray cluster at {head} has other versions: {'; '.join(others)}"
        remedy = "Install the same versions here, or run the command on a machine of the cluster."
    elif not found["here"]:
        problem = f"this machine is no part of the Ray cluster at {head}"
        remedy = f"Run the command on one of its machines, or `ray start --address {head}` here first."
    return problem, remedy


def _quiet() -> dict[str, Any]:
    """Arguments of `ray.init` that keep Ray's log out of ours, and the current directory out of the workers' path."""
    from ray.job_config import JobConfig

    return {
        "log_to_driver": False,
        "logging_level": logging.CRITICAL,
        # Else workers would import what lies in the current directory, of whatever name.
        "job_config": JobConfig(_client_job=True),
    }


def _reload_token() -> None:
    """Have Ray read the token again, which it has read once for all."""
    with suppress(ImportError, AttributeError):  # before Ray 2.52
        raylet: Any = importlib.import_module("ray._raylet")
        raylet.AuthenticationTokenLoader.instance().reset_cache()
        raylet.Config.initialize("")
