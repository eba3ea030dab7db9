"""`gfldeploy serve` as a process: over a socket, with signals."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from demo_bundles import RunHere
from served import contents

from gfldeploy.detector import Detector


class Server:
    """A server in a process of its own, and what it has said so far."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        assert process.stderr is not None
        self.process = process
        self.said: list[str] = []
        self.port = 0
        for line in process.stderr:
            self.said.append(line)
            if found := re.search(r"ready on http://127\.0\.0\.1:(\d+)", line):
                self.port = int(found[1])
                break
        assert self.port, "".join(self.said)
        threading.Thread(target=lambda: self.said.extend(process.stderr or ()), daemon=True).start()

    def post(self, content: bytes, query: str = "") -> dict[str, object]:
        url = f"http://127.0.0.1:{self.port}/v1/detect{query}"
        with urllib.request.urlopen(urllib.request.Request(url, content), timeout=60) as response:
            answer: dict[str, object] = json.load(response)
        return answer


@contextmanager
def server(bundle: Path, *options: str) -> Iterator[Server]:
    command = [sys.executable, "-m", "gfldeploy", "serve", str(bundle), "--port", "0", "--engine", "onnxruntime"]
    with subprocess.Popen([*command, "--threads", "1", *options], stderr=subprocess.PIPE, text=True) as process:
        try:
            yield Server(process)
        finally:
            process.kill()


def test_serves_and_drains(tiny_bundle: Path, tiny_coco: Path) -> None:
    images = contents(tiny_coco)
    with Detector(tiny_bundle, engine="onnxruntime", threads=1) as detector:
        alone = [found.boxes.tolist() for found in detector.detect(images)]
    with server(tiny_bundle) as one:
        found = [one.post(image)["images"] for image in images]
        for boxes, answer in zip(alone, found, strict=True):
            assert isinstance(answer, list)
            assert [detection["box"] for detection in answer[0]["detections"]] == boxes
        # The end of a body may not take memory without end.
        with socket.create_connection(("127.0.0.1", one.port)) as endless, pytest.raises(OSError, match=r"reset|pipe"):
            endless.sendall(b"POST /v1/detect HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n")
            for _ in range(1000):
                endless.sendall(b"x: " + b"x" * 30_000 + b"\r\n")
        # Connections that are idle, or stuck in a header or a body, do not hold it up.
        with (
            socket.create_connection(("127.0.0.1", one.port)) as idle,
            socket.create_connection(("127.0.0.1", one.port)),
        ):
            idle.sendall(b"POST /v1/detect HTTP/1.1\r\n")
            one.process.send_signal(signal.SIGTERM)
            assert one.process.wait(60) == 0
    assert any("stopping" in line for line in one.said)
    assert not any("Error" in line or "Traceback" in line for line in one.said)


def test_a_port_in_use_is_one_line(tiny_bundle: Path, run_here: RunHere) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ran = run_here("serve", tiny_bundle, "--port", port)
    assert ran.returncode == 2
    assert f"cannot listen on 127.0.0.1:{port}: Address already in use" in ran.stderr
