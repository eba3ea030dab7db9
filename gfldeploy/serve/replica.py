"""One of several processes behind one port: serves the connections that its parent hands to it (see `replicas`)."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable
from typing import Any

from gfldeploy.cluster.worker import as_plain
from gfldeploy.errors import BundleError, GfldeployError
from gfldeploy.progress import Silent
from gfldeploy.serialization import build, plain
from gfldeploy.serve.channel import Channel, Handler
from gfldeploy.serve.connections import Connection
from gfldeploy.serve.metrics import Metrics, merged
from gfldeploy.serve.reload import Current, Reloaded, Reloader, under_way

_TELL_S = 0.1  # how often the parent learns of connections and readiness
_ALIVE_S = 1.0  # and that this process is alive


class Replica(Silent):
    """What a replica knows of its parent: where connections come from, and what all replicas say together.

    As a `Progress` it passes on to the parent what is said.
    """

    def __init__(self, number: int, digest: str | None, channel: socket.socket, connections: socket.socket) -> None:
        """`number`: its name, from 1. `digest`: of the bundle that the others serve, None for the first."""
        self.number = number
        self._digest = digest
        self._connections = connections
        handlers: dict[str, Handler] = {"group": self._on_group, "shed": self._on_shed, "metrics": self._on_metrics}
        self._channel = Channel(channel, {**handlers, "reload": self._on_reload})
        self._others_ready = False
        self._taken = 0

    def stage(self, text: str) -> None:
        self._channel.tell("stage", text)

    def note(self, text: str) -> None:
        self._channel.tell("note", text)

    def failed(self, error: GfldeployError) -> None:
        """Tell why this process ends."""
        self._channel.tell("failed", as_plain(error))

    def check(self, digest: str) -> None:
        """Raise `BundleError` if the first bundle that it loads is not the one that the other replicas serve."""
        expected, self._digest = self._digest, None  # a reload may bring another one
        if expected not in (None, digest):
            raise BundleError(
                "the path holds another bundle than the one that the other replicas serve", "Start the server again."
            )

    @property
    def others_ready(self) -> bool:
        """Whether some replica of the server takes requests."""
        return self._others_ready

    async def metrics(self, accept: str) -> tuple[bytes, str]:
        """Those of all replicas, as `Metrics.text`."""
        told = await self._channel.ask("metrics")
        return await asyncio.to_thread(merged, told, accept)

    async def reload(self) -> Reloaded:
        """Have all replicas reloaded, one after the other. Raises as `Reloader.start` and its task."""
        done = await self._channel.ask("reload")
        if done is None:
            raise under_way()
        return build(Reloaded, done)

    async def serve(self, current: Current, reloader: Reloader, metrics: Metrics, connect: Connect) -> None:
        """Take connections and questions, until cancelled. `connect`: makes the protocol of a connection, and tells how
        many there are."""
        self._current, self._reloader, self._metrics = current, reloader, metrics
        loop = asyncio.get_running_loop()
        protocol, count = connect
        tasks: set[asyncio.Task[Any]] = set()

        def take() -> None:
            while True:
                try:
                    said, files, _, _ = socket.recv_fds(self._connections, 1, 1)
                except OSError:  # nothing more for now
                    return
                if not said:  # the parent has gone, and this process goes with it
                    loop.remove_reader(self._connections)
                    return
                self._taken += 1
                for file in files:
                    sock = socket.socket(fileno=file)
                    sock.setblocking(False)
                    task = loop.create_task(_connected(loop, protocol, sock))
                    tasks.add(task)
                    task.add_done_callback(tasks.discard)

        hearing = asyncio.create_task(self._channel.run())
        self._connections.setblocking(False)
        loop.add_reader(self._connections, take)
        told, at = None, -_ALIVE_S
        try:
            while True:
                service = current.service
                state = {
                    "why": service.ready(),
                    "open": count(),
                    "taken": self._taken,
                    "digest": service.choice.bundle.digest,
                }
                if state != told or time.monotonic() - at >= _ALIVE_S:
                    self._channel.tell("state", state)
                    told, at = state, time.monotonic()
                await asyncio.sleep(_TELL_S)
        finally:
            if current.service.gave_up is not None:
                self.failed(current.service.gave_up)
            take()
            loop.remove_reader(self._connections)
            hearing.cancel()

    async def _on_group(self, others_ready: bool) -> None:
        self._others_ready = others_ready

    async def _on_shed(self, count: int) -> None:
        Connection.to_shed = count

    async def _on_metrics(self, _: None) -> Any:
        return await asyncio.to_thread(self._metrics.families)

    async def _on_reload(self, _: None) -> Any:
        if self._reloader.busy:
            return None
        return plain(await asyncio.shield(self._reloader.start()))


# Makes the protocol of a connection, and tells how many connections there are.
Connect = tuple[Callable[[], asyncio.Protocol], Callable[[], int]]


async def _connected(
    loop: asyncio.AbstractEventLoop, protocol: Callable[[], asyncio.Protocol], sock: socket.socket
) -> None:
    try:
        await loop.connect_accepted_socket(protocol, sock)
    except OSError:  # the client has gone
        sock.close()
