"""Addresses where there is no Ray cluster, or none that can be used."""

from __future__ import annotations

import http.server
import platform
import socket
import threading
import time

import pytest

from gfldeploy.cluster.ray_cluster import _obstacle, connected
from gfldeploy.errors import UsageError

pytest.importorskip("ray")


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
