"""An object store of this process, as S3, and a proxy before it whose connections break."""

from __future__ import annotations

import logging
import socket
import socketserver
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from gfldeploy import storage

BUCKET = "images"


class Proxy(socketserver.ThreadingTCPServer):
    """Hands requests to the store, a connection for each, and notes their first lines.

    `breaks` says of a first line whether its connection is reset; with `after_bytes`, after so much of the answer.
    """

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, store: tuple[str, int]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.store = store
        self.lines: list[str] = []
        self.answered_bytes = 0
        self.breaks: Callable[[str], bool] = lambda line: False
        self.after_bytes = 0

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Nobody is told of connections that break."""


class _Handler(socketserver.BaseRequestHandler):
    server: Proxy
    _forwarding: threading.Thread | None = None

    def handle(self) -> None:
        head = b""
        while b"\r\n\r\n" not in head:
            if not (block := self.request.recv(1 << 16)):
                return
            head += block
        line = head.partition(b"\r\n")[0].decode()
        self.server.lines.append(line)
        left = self.server.after_bytes if self.server.breaks(line) else None
        if left == 0:
            self._reset()
            return
        with socket.create_connection(self.server.store) as upstream:
            upstream.sendall(head.replace(b"\r\n", b"\r\nConnection: close\r\n", 1))
            self._forwarding = threading.Thread(target=self._forward, args=(upstream,), daemon=True)
            self._forwarding.start()
            while block := upstream.recv(1 << 16):
                self.server.answered_bytes += len(block)
                self.request.sendall(block[:left])
                if left is not None and (left := left - len(block)) <= 0:
                    self._reset()
                    return

    def _forward(self, upstream: socket.socket) -> None:
        with suppress(OSError):
            while block := self.request.recv(1 << 16):
                upstream.sendall(block)

    def _reset(self) -> None:
        if self._forwarding is not None:  # which would keep the connection open
            self.request.shutdown(socket.SHUT_RD)
            self._forwarding.join()
        self.request.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.request.close()


class Store:
    """The store, `proxy` before it, and what tests do to it behind the back of gfldeploy."""

    def __init__(self, proxy: Proxy) -> None:
        import boto3  # type: ignore[import-untyped]

        self.proxy = proxy
        host, port = proxy.store
        self._client = boto3.client("s3", endpoint_url=f"http://{host}:{port}")
        self._client.create_bucket(Bucket=BUCKET)

    def put(self, key: str, content: bytes) -> None:
        self._client.put_object(Bucket=BUCKET, Key=key, Body=content)

    def put_folder(self, folder: Path, key: str) -> None:
        for path in folder.rglob("*"):
            if path.is_file():
                self.put(f"{key}/{path.relative_to(folder).as_posix()}", path.read_bytes())

    def keys(self, prefix: str) -> list[str]:
        found = self._client.list_objects_v2(Bucket=BUCKET, Prefix=prefix).get("Contents", [])
        return sorted(one["Key"].removeprefix(prefix) for one in found)

    def get(self, key: str) -> bytes:
        content: bytes = self._client.get_object(Bucket=BUCKET, Key=key)["Body"].read()
        return content


@contextmanager
def running_store() -> Iterator[Store]:
    """A store for a module's tests: gfldeploy finds it, and what it needs to get in, in the environment."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    try:
        with Proxy(server.get_host_and_port()) as proxy, pytest.MonkeyPatch.context() as patch:
            threading.Thread(target=proxy.serve_forever, args=(0.05,), daemon=True).start()
            patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.server_address[1]}")
            patch.setenv("AWS_ACCESS_KEY_ID", "testing")
            patch.setenv("AWS_SECRET_ACCESS_KEY", "not-a-secret")
            patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
            patch.setenv("AWS_CONFIG_FILE", "/dev/null")
            patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
            patch.setattr(storage, "_WAITS_S", (0.01, 0.02, 0.04))
            patch.setattr(storage, "_FIRST_WAITS_S", (0.01,))
            patch.setattr(storage, "_stores", {})
            yield Store(proxy)
            proxy.shutdown()
    finally:
        server.stop()
