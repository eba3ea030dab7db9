"""Addresses where there is no Ray cluster, or none that can be used."""

from __future__ import annotations

import atexit
import http.server
import os
import platform
import socket
import tempfile
import threading
import time
from pathlib import Path

import pytest

from gfldeploy.cluster.ray_cluster import _by_short_name, _obstacle, _started, connected
from gfldeploy.errors import EngineError, UnsupportedError, UsageError

ray = pytest.importorskip("ray")


def test_the_paths_of_sockets_are_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, gone = tmp_path / ("a" * 100), tmp_path / "gone"
    folder.mkdir()
    gone.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    with _by_short_name(gone) as killed:
        gone.rmdir()
        with _by_short_name(folder) as short:
            assert not os.path.lexists(killed), "what a killed command left"
            (short / "socket").touch()
            assert (folder / "socket").exists()
            assert (
                len(os.fsencode(short)) + len("/0/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store")
                < 107
            )
    assert not os.path.lexists(short)


def test_a_raylet_that_does_not_answer_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    answers, ended = threading.Event(), threading.Event()
    unregistered: list[object] = []
    monkeypatch.setattr(atexit, "unregister", unregistered.append)
    monkeypatch.setattr(ray, "shutdown", ended.set)
    late = EngineError("Ray has not started", "Try again.")
    with pytest.raises(EngineError, match="has not started"), _started(answers.wait, 0.05, late):
        pass
    assert unregistered == [ended.set] and not ended.is_set()
    answers.set()
    assert ended.wait(30), "an answer that comes later leaves nothing running"


def test_a_ray_that_cannot_be_closed_to_other_machines_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("ray._private.ray_constants.ENABLE_RAY_CLUSTER")
    with pytest.raises(UnsupportedError, match=r"--ray local does not know Ray .*ray start --head"), connected("local"):
        pass


@pytest.mark.parametrize("address", ["ray://head:10001", "head", "head:port", "head:1:2", ""])
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(UsageError, match="is no address of a Ray cluster"), connected(address):
        pass


def test_a_port_where_nothing_listens_is_refused_at_once() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start = time.monotonic()
    with pytest.raises(UsageError, match=r"no Ray cluster answers at 127\.0\.0\.1:"), connected(f"127.0.0.1:{port}"):
        pass
    assert time.monotonic() - start < 20  # Ray alone takes longer, whatever else runs


@pytest.mark.slow
def test_a_port_of_something_else_is_refused() -> None:
    with http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            with (
                pytest.raises(UsageError, match=r"what answers at 127\.0\.0\.1:\d+ is no head of a Ray cluster"),
                connected(f"127.0.0.1:{server.server_port}"),
            ):
                pass
        finally:
            server.shutdown()


def test_a_cluster_of_other_versions_or_machines_is_refused() -> None:
    import ray

    mine = {"Ray": ray.__version__, "Python": platform.python_version()}
    assert _obstacle("head:6379", {"versions": mine, "here": True}) == (None, None)
    problem, _ = _obstacle("head:6379", {"versions": {**mine, "Python": "3.8.1"}, "here": True})
    assert problem is not None and "has other versions: Python 3.8.1 there" in problem
    problem, remedy = _obstacle("head:6379", {"versions": mine, "here": False})
    assert problem == "this machine is no part of the Ray cluster at head:6379"
    assert remedy is not None and "ray start --address head:6379" in remedy
