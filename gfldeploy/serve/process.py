"""The process of `gfldeploy serve`: uvicorn around the application, and signals that drain it."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import math
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import uvicorn
from starlette.applications import Starlette

from gfldeploy.engines.hardware import usable_threads
from gfldeploy.engines.heap import limit_arenas
from gfldeploy.errors import OutputError
from gfldeploy.progress import SILENT, Progress
from gfldeploy.serve.access_log import AccessLog
from gfldeploy.serve.app import create_app
from gfldeploy.serve.connections import KEEP_ALIVE_S, MOST_HEADER_BYTES, Connection, give_up_on_the_slow, share_files
from gfldeploy.serve.keys import Keys
from gfldeploy.serve.metrics import Metrics
from gfldeploy.serve.reload import Current, Reloader
from gfldeploy.serve.replica import Replica
from gfldeploy.serve.requests import RequestLimits
from gfldeploy.serve.service import DetectionService, Watch

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_LOOK_S = 0.05
# How long the event loop may wait for a thread that computes in Python; by default 5 ms.
_SWITCH_S = 0.0005


@dataclass(frozen=True)
class Listen:
    """Where to listen, and how many seconds a server that was told to stop may take to answer what it has."""

    host: str = "127.0.0.1"
    port: int = 8000
    drain_s: float = 30.0


class _Uvicorn(uvicorn.Server):
    """Without signal handlers of its own."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def run_server(
    load: Callable[[Watch], DetectionService],
    limits: RequestLimits,
    listen: Listen,
    *,
    keys: Keys | None = None,
    access_log: Path | None = None,
    replica: Replica | None = None,
    progress: Progress = SILENT,
) -> None:
    """Load a service, serve until a signal comes, then drain. SIGHUP: load another beside it, and replace it.

    `load` makes a service that tells the `Watch`. `keys`: without one of them a request is refused. `access_log`:
    the file to append it to, "-" for standard output. `replica`: where connections come from, instead of `listen`.

    Raises what `load` raises, `OutputError` if it cannot listen, and `EngineError` if the engine fails again and again.
    A second signal refuses what was admitted and not answered yet, and raises KeyboardInterrupt; a third does not wait
    until clients have been told.
    """
    limit_arenas(usable_threads())
    metrics = Metrics()
    numbers = (*_SIGNALS, signal.SIGHUP)
    handlers = {number: signal.getsignal(number) for number in numbers}
    hung_up: list[int] = []  # of SIGHUP before there is anything to reload
    switch_s, number = sys.getswitchinterval(), None if replica is None else replica.number
    with ExitStack() as stack:
        source = stack.enter_context(bound(listen)) if replica is None else replica
        log = AccessLog(access_log, metrics.dropped_lines, number) if access_log is not None else None
        if log is not None:
            stack.callback(log.close)
        try:
            signal.signal(signal.SIGHUP, lambda number, frame: hung_up.append(number))
            service = load(metrics)
            Connection.most = share_files()
            stack.callback(sys.setswitchinterval, switch_s)
            sys.setswitchinterval(_SWITCH_S)
            stack.callback(gc.unfreeze)
            gc.freeze()  # what was loaded stays: it need not be looked at again and again
            app = create_app(
                service,
                limits,
                metrics=metrics,
                load=partial(load, metrics),
                keys=keys,
                access_log=log,
                replica=replica,
                progress=progress,
            )
            # uvloop where it is installed: it takes less of the CPUs than asyncio's own.
            with asyncio.Runner(loop_factory=uvicorn.Config(app).get_loop_factory()) as runner:
                cut_short = runner.run(_serve(app, listen, source, hung_up, progress))
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
    if cut_short:
        raise KeyboardInterrupt


async def _serve(
    app: Starlette, listen: Listen, source: socket.socket | Replica, hung_up: Sequence[int], progress: Progress
) -> bool:
    """Whether something that was admitted was not answered. Raises `EngineError` where the service gave up."""
    current: Current = app.state.current
    reloader: Reloader = app.state.reloader
    config = uvicorn.Config(
        app,
        http=Connection,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=KEEP_ALIVE_S,
        h11_max_incomplete_event_size=MOST_HEADER_BYTES,
    )
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)  # or every malformed request is a line
    server = _Uvicorn(config)
    signals: list[int] = []

    def stop(number: int) -> None:
        signals.append(number)
        reloader.stop()
        for service in current.in_use:
            service.drain()
        server.force_exit = len(signals) > 2

    loop = asyncio.get_running_loop()
    for number in _SIGNALS:
        loop.add_signal_handler(number, stop, number)
    loop.add_signal_handler(signal.SIGHUP, reloader.hung_up)
    serving = asyncio.create_task(server.serve([source] if isinstance(source, socket.socket) else []))
    while not server.started and not serving.done():
        await asyncio.sleep(0)
    taking: asyncio.Task[None] | None = None
    if isinstance(source, socket.socket):
        host, port = source.getsockname()[:2]
        tell_systemd("READY=1")
        progress.stage(f"ready on http://{f'[{host}]' if ':' in host else host}:{port}")
    else:
        connections = server.server_state.connections

        def connection() -> asyncio.Protocol:
            return Connection(config=config, server_state=server.server_state, app_state={})

        taking = asyncio.create_task(
            source.serve(current, reloader, app.state.metrics, (connection, lambda: len(connections)))
        )
        progress.stage("ready")
    if hung_up:
        reloader.hung_up()
    while not signals and current.service.gave_up is None and not serving.done():
        await asyncio.sleep(_LOOK_S)
    if taking is None:
        tell_systemd("STOPPING=1")
    reloader.stop()

    def in_flight() -> int:
        return sum(service.in_flight for service in current.in_use)

    progress.stage(f"stopping: {in_flight()} images are to be answered")
    deadline = loop.time() + listen.drain_s
    while in_flight() and loop.time() < deadline and len(signals) < 2:
        await asyncio.sleep(_LOOK_S)
    cut_short = in_flight() > 0
    if cut_short:
        for service in current.in_use:
            service.abandon()
    else:
        # Not in the loop's executor, for which its end would wait: a batch whose clients have left may hang.
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(reloader.close(), max(deadline - loop.time(), _LOOK_S))
        closing = threading.Thread(target=current.service.close, args=(False,), daemon=True)
        closing.start()
        while closing.is_alive() and loop.time() < deadline and len(signals) < 2:
            await asyncio.sleep(_LOOK_S)
    # What is left are answers that are being sent, and requests whose bodies are arriving, to be refused.
    config.timeout_graceful_shutdown = 1 if cut_short else max(math.ceil(deadline - loop.time()), 1)
    if taking is not None:
        taking.cancel()
        await asyncio.wait([taking])
    server.should_exit = True
    await serving
    if current.service.gave_up is not None:
        raise current.service.gave_up
    return cut_short


def bound(listen: Listen) -> socket.socket:
    """A socket that has the port, so that two servers cannot load for minutes to find out; nobody can connect yet."""
    try:
        family = socket.AF_INET6 if ":" in listen.host else socket.AF_INET
        # asyncio sends at once (TCP_NODELAY) on connections whose protocol was named, and on no others.
        sock = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind((listen.host, listen.port))
            give_up_on_the_slow(sock)
        except BaseException:
            sock.close()
            raise
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OutputError(
            f"cannot listen on {listen.host}:{listen.port}: {reason}", "Choose another --port or --host."
        ) from error
    return sock


def tell_systemd(state: str) -> None:
    """As sd_notify(3): for a service of the type "notify". Nothing happens where nobody listens."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if address[:1] in ("/", "@"):
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock, contextlib.suppress(OSError):
            sock.sendto(state.encode(), address.replace("@", "\0", 1) if address[0] == "@" else address)
