"""Several processes behind one port: each has an engine and a share of the CPUs, and this one looks after them.

This process accepts connections and hands each to the replica that has the fewest, as Node.js' clusters do. Processes
that accept from one socket do it whenever they are awake, so that one may get all connections that clients keep; and
with a socket for each (SO_REUSEPORT) the kernel goes on giving connections to one that is dead or loads, which are lost
with it. No request passes through here.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from gfldeploy.cluster.worker import raised
from gfldeploy.errors import BundleError, EngineError, GfldeployError, ServerError, UsageError
from gfldeploy.progress import SILENT, Progress
from gfldeploy.serve.channel import Channel, Handler
from gfldeploy.serve.metrics import restarts
from gfldeploy.serve.process import Listen, bound, tell_systemd
from gfldeploy.signals import child_environment

_LOOK_S = 0.05
_BACKLOG = 2048
_AT_ONCE = 64  # connections that are accepted before anything else has its turn
_METRICS_S = 5.0
_SILENT_S = 60.0  # after which a replica that says nothing is ended
_ENDING_S = 10.0  # that it may take beyond the time for draining
# Deaths of one replica within so many seconds, after which the server gives up.
_RESTARTS, _RESTARTS_S = 3, 600.0
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def serve_replicas(options: Mapping[str, Any], count: int, listen: Listen, progress: Progress = SILENT) -> None:
    """Serve until a signal comes, in the main thread; as `run_server`, with `count` processes.

    `options`: of `serve_detector`, JSON-ready. Raises what the first replica raises at its start, `UsageError` where
    there are not so many CPUs, or not the memory; and `EngineError` if a replica ends again and again.
    """
    cpus = sorted(os.sched_getaffinity(0))
    if count > len(cpus):
        raise UsageError(
            f"{count} replicas need as many CPUs, and {len(cpus)} can be used here",
            f"Give --replicas {len(cpus)} or fewer, or more CPUs.",
        )
    shares = [cpus[len(cpus) * k // count : len(cpus) * (k + 1) // count] for k in range(count)]
    with (
        bound(listen) as sock,
        closing(_Group(options, shares, listen, sock, progress)) as group,
        asyncio.Runner() as runner,
    ):
        cut_short = runner.run(group.run())
    if cut_short:
        raise KeyboardInterrupt


class _Replica:
    """A process, and what it has said."""

    def __init__(
        self, number: int, cpus: Sequence[int], options: Mapping[str, Any], digest: str | None, reloads: int
    ) -> None:
        """`digest`: of the bundle that it has to find. `reloads`: that the others had done when it was started."""
        self.number, self.reloads = number, reloads
        self.why: str | None = "it is being started"  # it takes no requests
        self.error: GfldeployError | None = None  # that it has ended with
        self.digest = ""
        self.given = self._open = self._taken = 0
        self.heard = time.monotonic()
        self.ready = asyncio.Event()
        self._connections, taking = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours, theirs = socket.socketpair()
        self._connections.setblocking(False)
        job = json.dumps({"number": number, "digest": digest, "options": options})
        command = [sys.executable, "-P", "-m", "gfldeploy.serve.replica_main"]
        with taking, theirs, _on(cpus):
            self.process = subprocess.Popen(
                [*command, str(theirs.fileno()), str(taking.fileno()), job],
                stdin=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(), taking.fileno()),
                start_new_session=True,  # Ctrl-C is for the parent, which drains all
                env=child_environment({"NOTIFY_SOCKET": ""}),
            )
        self.channel: Channel
        self._ours = ours
        self._task: asyncio.Task[None] | None = None

    def listen(self, group: _Group) -> None:
        """Hear what it says."""

        async def state(content: dict[str, Any]) -> None:
            if not self.alive:  # it said so before it ended
                return
            self.why, self.digest, self.heard = content["why"], content["digest"], time.monotonic()
            self._open, self._taken = content["open"], content["taken"]
            if self.why is None:
                self.ready.set()

        async def failed(content: dict[str, Any]) -> None:
            self.error = raised(content)

        async def stage(text: str) -> None:
            self.heard = time.monotonic()
            group.progress.stage(f"replica {self.number}: {text}")

        async def note(text: str) -> None:
            group.progress.note(f"replica {self.number}: {text}")

        async def metrics(_: None) -> Any:
            return await group.metrics()

        async def reload(_: None) -> Any:
            return await group.reload()

        handlers: dict[str, Handler] = {"state": state, "failed": failed, "stage": stage, "note": note}
        self.channel = Channel(self._ours, {**handlers, "metrics": metrics, "reload": reload})
        self._task = asyncio.create_task(self.channel.run())

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    @property
    def serves(self) -> bool:
        """Whether it was ready once, and takes connections."""
        return self.alive and self.ready.is_set()

    @property
    def open(self) -> int:
        """Connections that it has, or was given."""
        return self._open + self.given - self._taken

    def give(self, connection: socket.socket) -> bool:
        """Whether it has the connection now."""
        try:
            socket.send_fds(self._connections, [b"c"], [connection.fileno()])
        except OSError:  # it has ended, or does not take them
            return False
        self.given += 1
        return True

    def send_signal(self, number: int) -> None:
        self.process.send_signal(number)  # which does nothing if it has ended

    async def ended(self) -> None:
        """Free what belongs to a process that has ended, once all is heard that it has said."""
        with suppress(TimeoutError):
            if self._task is not None:
                await asyncio.wait_for(self._task, 1.0)
        self.close()

    def close(self) -> None:
        """End it at once."""
        if self.alive:
            self.process.kill()
        self.process.wait()
        self._connections.close()
        self._ours.close()

    def ending(self) -> str:
        """Why it ended, in words."""
        if self.error is not None:
            return self.error.problem
        code = self.process.returncode
        if code == -signal.SIGKILL:
            return "it was killed by SIGKILL, perhaps because memory ran out"
        return f"it ended with {signal.Signals(-code).name if code < 0 else f'exit code {code}'}"


class _Group:
    """All replicas of a server."""

    def __init__(
        self,
        options: Mapping[str, Any],
        shares: Sequence[Sequence[int]],
        listen: Listen,
        sock: socket.socket,
        progress: Progress,
    ) -> None:
        self.progress = progress
        self._options, self._shares, self._listen, self._sock = options, shares, listen, sock
        self._replicas: dict[int, _Replica] = {}  # by number, from 1
        self._deaths: dict[int, deque[float]] = {number: deque() for number in range(1, len(shares) + 1)}
        self._restarted: Counter[int] = Counter()
        self._digest: str | None = None
        self._signals: list[int] = []
        self._accepting = self._reloading = self._others_told = False
        self._reloads = 0  # that at least one replica has done
        self._gave_up: EngineError | None = None

    def close(self) -> None:
        """End what is left."""
        for replica in self._replicas.values():
            replica.close()

    async def run(self) -> bool:
        """Whether something that was admitted was not answered."""
        self._loop, main = asyncio.get_running_loop(), asyncio.current_task()
        assert main is not None
        starting, hung_up = True, list[int]()

        def stop(number: int) -> None:
            self._signals.append(number)
            if starting:
                main.cancel()
                return
            for replica in self._replicas.values():
                replica.send_signal(signal.SIGTERM)

        for number in _SIGNALS:
            self._loop.add_signal_handler(number, stop, number)
        self._loop.add_signal_handler(signal.SIGHUP, lambda: self._hung_up() if not starting else hung_up.append(1))
        try:
            await self._start_all()
        except asyncio.CancelledError:
            if not self._signals:
                raise
            raise KeyboardInterrupt from None
        starting = False
        self._sock.setblocking(False)
        self._sock.listen(_BACKLOG)
        tell_systemd("READY=1")
        host, port = self._sock.getsockname()[:2]
        self.progress.stage(f"ready on http://{f'[{host}]' if ':' in host else host}:{port}")
        if hung_up:
            self._hung_up()
        restarts: set[asyncio.Task[None]] = set()
        last = time.monotonic()
        while not self._signals and self._gave_up is None:
            self._look(restarts, paused=time.monotonic() - last > _SILENT_S / 2)
            last = time.monotonic()
            await asyncio.sleep(_LOOK_S)
        tell_systemd("STOPPING=1")
        for task in restarts:
            task.cancel()
        if self._gave_up is not None:
            for replica in self._replicas.values():
                replica.send_signal(signal.SIGTERM)
        await self._drained()
        if self._gave_up is not None:
            raise self._gave_up
        return any(replica.process.returncode for replica in self._replicas.values() if replica.ready.is_set())

    async def metrics(self) -> dict[str, Any]:
        """Of each replica that answers, all its samples; and of all, how often they were started again."""
        numbers = [number for number, one in self._replicas.items() if one.serves]
        asked = (asyncio.wait_for(self._replicas[number].channel.ask("metrics"), _METRICS_S) for number in numbers)
        told = await asyncio.gather(*asked, return_exceptions=True)
        answered = {number: one for number, one in zip(numbers, told, strict=True) if isinstance(one, list)}
        return {
            str(number): [*answered.get(number, ()), restarts(self._restarted[number])] for number in self._replicas
        }

    async def reload(self) -> dict[str, Any] | None:
        """Reload the replicas one after the other, so that one at a time has two engines; None if that is under way.

        What the last one answered. One that is being started comes to have the same bundle. Raises what went wrong in
        the first one, and `ServerError` with what went wrong in a later one: those before it have the new bundle then.
        """
        if self._reloading:
            return None
        self._reloading, began, reloads = True, time.monotonic(), self._reloads
        asked: set[_Replica] = set()
        done: dict[str, Any] = {}

        def left() -> list[_Replica]:
            # What is started once the first has the new bundle has it, too.
            known = (one for one in self._replicas.values() if one.reloads <= reloads and one not in asked)
            return sorted((one for one in known if one.serves), key=lambda one: one.number)

        try:
            while replicas := left():
                asked.add(replicas[0])
                try:
                    answer = await replicas[0].channel.ask("reload")
                    if answer is None:
                        if not done:
                            return None
                        raise ServerError("one is under way there already", None)
                    done = answer
                except GfldeployError as error:
                    if not done:
                        raise
                    raise ServerError(
                        f"replica {replicas[0].number} was not reloaded, those before it were: {error.problem}",
                        f"{error.remedy or 'See its messages.'} Reload again: the replicas serve two bundles.",
                    ) from error
                self._digest = done["digest"]
                self._reloads += 1
            if not done:
                raise ServerError("no replica is ready", "Try again later.")
            return {**done, "seconds": time.monotonic() - began}
        finally:
            self._reloading = False

    def _hung_up(self) -> None:
        async def reload() -> None:
            try:
                if await self.reload() is None:
                    self.progress.note("SIGHUP: a reload is under way already")
            except GfldeployError as error:
                self.progress.note(f"SIGHUP: {error}")

        self._reload_task = asyncio.create_task(reload())

    def _start(self, number: int) -> _Replica:
        replica = _Replica(number, self._shares[number - 1], self._options, self._digest, self._reloads)
        self._replicas[number] = replica
        replica.listen(self)
        return replica

    async def _start_all(self) -> None:
        """The first one alone: what is wrong, and what memory one takes, is known before there are many."""
        first = self._start(1)
        await self._ready(first)
        self._digest = first.digest
        count, one_mb, free_mb = len(self._shares), _memory_mb(first.process.pid), _free_mb()
        if (more_mb := (count - 1) * one_mb) > free_mb:
            raise UsageError(
                f"a replica takes {one_mb:,.0f} MB, and {free_mb:,.0f} MB are free for {count - 1} more",
                f"Give --replicas {1 + int(free_mb // one_mb)}.",
            )
        self.progress.note(
            f"{count} replicas take about {one_mb + more_mb:,.0f} MB, {one_mb:,.0f} MB each, and as much again as one "
            f"of them while they are reloaded; {free_mb - more_mb:,.0f} MB remain"
        )
        others = [self._start(number) for number in range(2, count + 1)]
        await asyncio.gather(*map(self._ready, others))

    async def _ready(self, replica: _Replica) -> None:
        """Wait until it is. Raises what it fails with."""
        while not replica.ready.is_set():
            if not replica.alive:
                await replica.ended()
                raise replica.error or EngineError(f"replica {replica.number} did not start: {replica.ending()}", None)
            await asyncio.sleep(_LOOK_S)

    def _look(self, restarts: set[asyncio.Task[None]], paused: bool) -> None:
        """See to those that have died or hang, and to who takes connections. `paused`: this process was stopped."""
        for number, replica in self._replicas.items():
            if paused:
                replica.heard = time.monotonic()
            if replica.serves and time.monotonic() - replica.heard > _SILENT_S:  # a start may take longer
                replica.process.kill()
            if not replica.alive and replica.why != "it has ended":
                replica.why = "it has ended"
                task = asyncio.create_task(self._restart(number, replica))
                restarts.add(task)
                task.add_done_callback(restarts.discard)
        ready = [replica for replica in self._replicas.values() if replica.alive and replica.why is None]
        if (others := bool(ready)) != self._others_told:
            self._others_told = others
            for replica in self._replicas.values():
                replica.channel.tell("group", others)
        self._accept_if(any(replica.serves for replica in self._replicas.values()))

    async def _restart(self, number: int, dead: _Replica) -> None:
        await dead.ended()
        if isinstance(dead.error, BundleError) and self._others_told:
            # The others' bundle is not at the path any more. They serve it on, until a reload gives them what is there.
            self.progress.note(f"replica {number}: {dead.ending()}; it is started again after a reload")
            while self._reloads == dead.reloads and self._others_told:
                await asyncio.sleep(_LOOK_S)
        elif self._too_often(number, dead):
            return
        else:
            self.progress.note(f"replica {number}: {dead.ending()}; it is started again")
        if self._signals:  # it would not learn of them
            return
        self._restarted[number] += 1
        replica = self._start(number)
        replica.channel.tell("group", self._others_told)
        while replica.alive and not replica.ready.is_set():
            await asyncio.sleep(_LOOK_S)
        if replica.alive and replica.digest != self._digest:  # the others were reloaded meanwhile
            replica.process.kill()
        elif replica.alive:
            self.progress.note(f"replica {number}: ready again")
            mean = sum(one.open for one in self._replicas.values()) // len(self._replicas)
            for other in self._replicas.values():  # clients that keep connections are to find the new one, too
                if (more := other.open - mean - 1) > 0:
                    other.channel.tell("shed", more)

    def _too_often(self, number: int, dead: _Replica) -> bool:
        """Count that a replica has ended, and say whether that is so often that the server gives up."""
        now, deaths = time.monotonic(), self._deaths[number]
        deaths.append(now)
        while now - deaths[0] > _RESTARTS_S:
            deaths.popleft()
        if len(deaths) > _RESTARTS:
            times = f"{len(deaths)} times within {_RESTARTS_S:g} s"
            self._gave_up = EngineError(
                f"replica {number} ended {times}, the last time: {dead.ending()}", "Restart the server."
            )
        return self._gave_up is not None

    def _accept_if(self, wanted: bool) -> None:
        """Accept connections while somebody takes them: else they wait, rather than be lost."""
        if wanted and not self._accepting:
            self._loop.add_reader(self._sock, self._accept)
        elif self._accepting and not wanted:
            self._loop.remove_reader(self._sock)
        self._accepting = wanted

    def _accept(self) -> None:
        for _ in range(_AT_ONCE):
            try:
                connection, _ = self._sock.accept()
            except BlockingIOError:
                return
            except OSError:  # too many open files, say: the next look tries again
                self._accept_if(False)
                return
            with connection:
                taking = [one for one in self._replicas.values() if one.serves]
                # One whose engine is being replaced would refuse, while others answer.
                for replica in sorted(taking, key=lambda one: (one.why is not None, one.open, one.given)):
                    if replica.give(connection):
                        break

    async def _drained(self) -> None:
        """Wait until all have ended, and end those that do not; connections are handed on meanwhile, to be refused."""
        until = self._loop.time() + self._listen.drain_s + _ENDING_S
        while any(replica.alive for replica in self._replicas.values()) and self._loop.time() < until:
            self._accept_if(any(replica.serves for replica in self._replicas.values()))
            await asyncio.sleep(_LOOK_S)
        self._accept_if(False)
        for replica in self._replicas.values():
            if replica.alive:
                replica.process.kill()
            await replica.ended()


@contextmanager
def _on(cpus: Sequence[int]) -> Iterator[None]:
    """A process that is started in the block has these CPUs alone, and counts only them."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cpus)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _memory_mb(pid: int) -> float:
    """What a process holds, 10^6 bytes; of pages that it shares with others its part."""
    with suppress(OSError):
        told = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="utf-8")
        if found := re.search(r"^Pss:\s+(\d+) kB", told, re.MULTILINE):
            return int(found[1]) * 1024 / 1e6
    return float(psutil.Process(pid).memory_info().rss / 1e6)


def _free_mb() -> float:
    """What processes may still take, 10^6 bytes: of this machine, or of the control group that limits this one."""
    free = psutil.virtual_memory().available
    with suppress(OSError, ValueError):
        group = Path("/sys/fs/cgroup")
        used = int((group / "memory.current").read_text())
        if cached := re.search(r"^inactive_file (\d+)$", (group / "memory.stat").read_text(), re.MULTILINE):
            used -= int(cached[1])  # of files: given up when it is needed
        free = min(free, int((group / "memory.max").read_text()) - used)
    return max(free, 0) / 1e6
