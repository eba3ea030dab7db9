"""`gfldeploy serve` as its operator sees it: keys, access log, metrics, and SIGHUP while clients send."""

from __future__ import annotations

import json
import shutil
import signal
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from demo_bundles import RunHere
from served import contents
from test_serve_command import Server, server

from gfldeploy.bundle import MANIFEST, Bundle, Manifest

KEY = "a-key-of-the-test-of-operations"


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    path = tmp_path / "keys"
    path.write_text(f"{KEY}\n")
    path.chmod(0o600)
    return path


def ask(one: Server, path: str, content: bytes | None = None, key: str = KEY) -> tuple[int, bytes]:
    request = urllib.request.Request(f"http://127.0.0.1:{one.port}{path}", content, {"Authorization": f"Bearer {key}"})
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, response.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read()


def rename_class(path: Path, old: str, new: str) -> None:
    """Put a bundle with another class name in place of the bundle at `path`, as `--force` does: by renaming."""
    other = path.with_name("other")
    shutil.copytree(path, other)
    manifest = Manifest.read(other / MANIFEST)
    (other / MANIFEST).write_text((other / MANIFEST).read_text().replace(f'"{old}"', f'"{new}"'))
    assert old in manifest.classes and new in Bundle.open(other).manifest.classes
    path.rename(path.with_name("old"))
    other.rename(path)


def test_a_reload_while_clients_send(tiny_bundle: Path, tiny_coco: Path, keys: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    image, *_ = contents(tiny_coco)
    log = tmp_path / "access.log"
    ended = threading.Event()
    seen: list[tuple[int, str]] = []

    def send_all_the_time(one: Server) -> None:
        while not ended.is_set():
            status, body = ask(one, "/v1/detect?timeout_ms=10000", image)
            seen.append((status, json.loads(body)["images"][0]["detections"][0]["class"]))

    with server(path, "--api-key-file", str(keys), "--access-log", str(log)) as one:
        clients = [threading.Thread(target=send_all_the_time, args=[one]) for _ in range(4)]
        for client in clients:
            client.start()
        rename_class(path, "box", "crate")
        one.process.send_signal(signal.SIGHUP)
        until = time.monotonic() + 60
        while seen[-1:] != [(200, "crate")] and time.monotonic() < until:
            time.sleep(0.01)
        ended.set()
        for client in clients:
            client.join()
        assert {status for status, _ in seen} == {200} and {name for _, name in seen} == {"box", "crate"}
        assert ask(one, "/v1/model", key="a-key-that-is-another-one")[0] == 401
        assert ask(one, "/health/ready", key="")[0] == 200
        status, metrics = ask(one, "/metrics")
        assert status == 200 and b'gfldeploy_reloads_total{outcome="switched"} 1.0' in metrics
        answered = f'gfldeploy_http_requests_total{{method="POST",route="/v1/detect",status="200"}} {len(seen)}.0'
        assert answered in metrics.decode() and f'digest="{Bundle.open(path).digest}"' in metrics.decode()
        one.process.send_signal(signal.SIGTERM)
        assert one.process.wait(60) == 0
    lines: list[dict[str, Any]] = [json.loads(line) for line in log.read_text().splitlines()]
    asked = [line["status"] for line in lines if line["route"] == "/v1/detect"]
    assert asked == [200] * len(seen) and KEY not in log.read_text()
    refused, *_ = (line for line in lines if line["status"] == 401)
    assert refused["code"] == "unauthorized"
    assert any("reload: tiny" in line and "no golden picture" in line for line in one.said)


def test_what_is_wrong_is_said_before_anything_is_loaded(tiny_bundle: Path, keys: Path, run_here: RunHere) -> None:
    keys.chmod(0o604)
    ran = run_here("serve", tiny_bundle, "--port", 0, "--api-key-file", keys)
    assert ran.returncode == 2 and "others may read or change it" in ran.stderr and "chmod 600" in ran.stderr
    ran = run_here("serve", tiny_bundle, "--port", 0, "--access-log", keys / "access.log")
    assert ran.returncode == 2 and "the access log cannot be written to" in ran.stderr
    ran = run_here("serve", tiny_bundle, "--port", 0, "--host", "")  # of an unset variable, say
    assert ran.returncode == 2 and "the host is empty. Give --host 127.0.0.1" in ran.stderr
