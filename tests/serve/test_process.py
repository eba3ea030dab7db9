"""The server over sockets, in this process: what it answers while it stops, and connections that cost it nothing."""

from __future__ import annotations

import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import ExitStack
from pathlib import Path

import pytest
from served import Gate, contents, serving

from gfldeploy.progress import Silent
from gfldeploy.serve import connections
from gfldeploy.serve.connections import Connection
from gfldeploy.serve.process import Listen, run_server
from gfldeploy.serve.requests import RequestLimits
from gfldeploy.serve.service import DetectionService

IN_FLIGHT = 32
WAIT_S = 20.0
Talk = Callable[["Clients", DetectionService], None]


class Clients(Silent):
    """What talks to the server, in a thread of its own, once it is ready. At the end it is told to stop."""

    def __init__(self, talk: Callable[[Clients], None]) -> None:
        self._talk = talk
        self.port = 0
        self.result: Future[None] = Future()
        self._sockets = ExitStack()
        self._stopping = False

    def stage(self, text: str) -> None:
        self._stopping = text.startswith("stopping")
        if found := re.search(r"ready on http://127\.0\.0\.1:(\d+)", text):
            self.port = int(found[1])
            threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        try:
            self.result.set_result(self._talk(self))
        except BaseException as error:  # noqa: BLE001 - raised in the test
            self.result.set_exception(error)
        finally:
            if not self._stopping:  # one that came once the server has ended would end this process
                os.kill(os.getpid(), signal.SIGTERM)
            self._sockets.close()

    def connect(self) -> socket.socket:
        return self._sockets.enter_context(socket.create_connection(("127.0.0.1", self.port), timeout=WAIT_S))

    def ask(self, content: bytes, length: int | None = None) -> socket.socket:
        """A connection on which an image was sent, of which it was said that it has this length."""
        sock = self.connect()
        header = (
            f"POST /v1/detect?timeout_ms=60000 HTTP/1.1\r\nHost: x\r\nContent-Length: {length or len(content)}\r\n\r\n"
        )
        sock.sendall(header.encode() + content)
        return sock


def response(sock: socket.socket) -> tuple[int, bytes]:
    """The status and all of a response, after which the server may close the connection."""
    received = b""
    while (found := re.search(rb"content-length: (\d+)", received)) is None or (
        len(received) < received.index(b"\r\n\r\n") + 4 + int(found[1])
    ):
        more = sock.recv(1 << 16)
        assert more, f"closed after {received!r}"
        received += more
    return int(received.split(None, 2)[1]), received


def closed(sock: socket.socket) -> bool:
    """Whether the server closes it, whatever it says before."""
    try:
        while sock.recv(1 << 16):
            pass
    except ConnectionError:
        pass
    return True


def run(bundle: Path, talk: Talk, drain_s: float = 5.0) -> None:
    with serving(bundle) as service:
        clients = Clients(lambda clients: talk(clients, service))
        try:
            run_server(lambda watch: service, RequestLimits(), Listen(port=0, drain_s=drain_s), progress=clients)
        finally:
            clients.result.result(2 * WAIT_S)


def wait_for(service: DetectionService, condition: Callable[[], bool]) -> None:
    until = time.monotonic() + WAIT_S
    while not condition():
        if time.monotonic() > until:
            raise TimeoutError(f"{service.in_flight} in flight, {service.waiting} wait, {service.ready()}")
        time.sleep(0.01)


def test_what_was_admitted_is_answered_though_it_stops(tiny_bundle: Path, tiny_coco: Path) -> None:
    image, *_ = contents(tiny_coco)

    def talk(clients: Clients, service: DetectionService) -> None:
        gate = Gate(service)
        admitted = [clients.ask(image) for _ in range(IN_FLIGHT)]
        idle, half_header, half_body = clients.connect(), clients.connect(), clients.ask(image[:100], len(image))
        half_header.sendall(b"POST /v1/det")
        wait_for(service, lambda: service.in_flight == IN_FLIGHT and gate.entered.is_set())
        os.kill(os.getpid(), signal.SIGTERM)
        wait_for(service, lambda: service.ready() is not None)
        status, text = response(clients.ask(image))  # new connections are still answered
        assert status == 503 and b"retry-after: 1" in text and b"stopping" in text
        half_body.sendall(image[100:])
        assert response(half_body)[0] == 503
        gate.open.set()
        assert [response(one)[0] for one in admitted] == [200] * IN_FLIGHT
        assert closed(idle) and closed(half_header)

    run(tiny_bundle, talk)


def test_clients_that_have_left_a_batch_that_hangs_do_not_keep_it(tiny_bundle: Path, tiny_coco: Path) -> None:
    image, *_ = contents(tiny_coco)

    def talk(clients: Clients, service: DetectionService) -> None:
        gate = Gate(service)
        with clients.ask(image):
            wait_for(service, gate.entered.is_set)
        wait_for(service, lambda: service.in_flight == 0)

    run(tiny_bundle, talk, drain_s=0.2)


def test_a_second_signal_refuses_what_was_admitted(tiny_bundle: Path, tiny_coco: Path) -> None:
    image, *_ = contents(tiny_coco)

    def talk(clients: Clients, service: DetectionService) -> None:
        gate = Gate(service)
        admitted = [clients.ask(image) for _ in range(4)]
        wait_for(service, lambda: service.in_flight == 4 and gate.entered.is_set())
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
            wait_for(service, lambda: service.ready() is not None)
        answers = [response(one) for one in admitted]
        assert [status for status, _ in answers] == [503] * 4
        assert all(b"stopped" in text for _, text in answers)
        gate.open.set()

    with pytest.raises(KeyboardInterrupt):
        run(tiny_bundle, talk)


def test_slow_headers_and_too_many_connections(
    tiny_bundle: Path, tiny_coco: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image, *_ = contents(tiny_coco)
    monkeypatch.setattr(connections, "HEADER_S", 0.3)
    monkeypatch.setattr(connections, "share_files", lambda: 5)
    monkeypatch.setattr("gfldeploy.serve.process.share_files", lambda: 5)

    def talk(clients: Clients, service: DetectionService) -> None:
        silent, slow, large = clients.connect(), clients.connect(), clients.connect()
        slow.sendall(b"GET / HTTP/1.1\r\n")
        large.sendall(b"GET / HTTP/1.1\r\nA: " + b"a" * (1 << 17))
        assert closed(large)
        used = clients.ask(image)
        assert response(used)[0] == 200
        others = [response(clients.ask(image))[0] for _ in range(8)]  # for which those that are idle make room
        assert others == [200] * 8
        assert closed(silent) and closed(slow)
        assert clients.port and response(clients.ask(image))[0] == 200

    most = Connection.most
    run(tiny_bundle, talk)
    Connection.most = most


def test_clients_that_ask_for_another_protocol_are_answered_in_this_one(tiny_bundle: Path, tiny_coco: Path) -> None:
    """As Java's do: what comes after such a header is a body all the same, and then the next request."""
    image, *_ = contents(tiny_coco)
    header = (
        "POST /v1/detect?timeout_ms=60000 HTTP/1.1\r\nConnection: Upgrade, HTTP2-Settings\r\n"
        f"Content-Length: {len(image)}\r\nHost: x\r\nHTTP2-Settings: AAEAAEAAAAIAAAABAAMAAABk\r\nUpgrade: h2c\r\n\r\n"
    )

    def talk(clients: Clients, service: DetectionService) -> None:
        sock = clients.connect()
        for _ in range(2):
            sock.sendall(header.encode() + image)
            assert response(sock)[0] == 200

    run(tiny_bundle, talk)


def test_a_connection_is_kept_after_a_body_that_was_refused_unread(
    tiny_bundle: Path, tiny_coco: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image, *_ = contents(tiny_coco)
    monkeypatch.setattr(connections, "HEADER_S", 0.1)

    def talk(clients: Clients, service: DetectionService) -> None:
        sock = clients.connect()
        request = b"POST /%b HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n"
        sock.sendall(request % (b"nothing", len(image)) + image[:100])
        assert response(sock)[0] == 404
        sock.sendall(image[100:])
        time.sleep(0.2)
        sock.sendall(request % (b"v1/detect?timeout_ms=60000", len(image)) + image)
        assert response(sock)[0] == 200

    run(tiny_bundle, talk)


def test_answers_leave_at_once(tiny_bundle: Path) -> None:
    from gfldeploy.serve.process import bound

    with bound(Listen(port=0)) as listening:
        listening.listen()
        with socket.create_connection(listening.getsockname()), listening.accept()[0] as accepted:
            assert accepted.proto == socket.IPPROTO_TCP  # of which asyncio makes sure that nothing is held back
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 30_000
