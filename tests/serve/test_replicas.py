"""`gfldeploy serve --replicas`: several processes behind one port."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import time
import urllib.request
from collections.abc import Callable
from contextlib import ExitStack
from http.client import HTTPConnection
from pathlib import Path

import psutil
import pytest
import share_cpus
from served import contents
from test_serve_command import Server, server
from test_serve_operations import rename_class

from gfldeploy.detector import Detector
from gfldeploy.errors import UsageError
from gfldeploy.serve.replicas import _free_mb, _memory_mb
from gfldeploy.serve.session import serve_detector

BOTH = {"1", "2"}


def until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def metric(one: Server, name: str) -> dict[str, float]:
    """The sum of a metric by replica."""
    with urllib.request.urlopen(f"http://127.0.0.1:{one.port}/metrics", timeout=60) as response:
        text = response.read().decode()
    found: dict[str, float] = {}
    for labels, value in re.findall(rf"^{name}{{(.*)}} (\S+)$", text, re.MULTILINE):
        replica = re.findall(r'replica="(\d)"', labels)[0]
        found[replica] = found.get(replica, 0) + float(value)
    return found


def detected(one: Server, image: bytes) -> str:
    """The class of the first detection."""
    images = one.post(image)["images"]
    assert isinstance(images, list)
    return str(images[0]["detections"][0]["class"])


def processes(one: Server) -> list[psutil.Process]:
    return psutil.Process(one.process.pid).children()


@pytest.mark.slow
@pytest.mark.skipif(os.cpu_count() == 1, reason="a replica needs a CPU of its own")
def test_replicas_share_a_port(tiny_bundle: Path, tiny_coco: Path, tmp_path: Path) -> None:
    image, log = contents(tiny_coco)[0], tmp_path / "log"
    path = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    with Detector(tiny_bundle, engine="onnxruntime", threads=1) as detector:
        boxes = detector.detect(image)[0].boxes.tolist()
    options = ("--replicas", "2", "--access-log", str(log), "--classes", "0", "--score-threshold", "0.001")
    with share_cpus.two_cpus(), server(path, *options) as one, ExitStack() as stack:
        assert any("2 replicas take about" in line for line in one.said)
        shares = [process.cpu_affinity() for process in processes(one)]
        assert len(shares) == 2 and not {*shares[0]} & {*shares[1]}
        # Each connection goes to the replica that has the fewest.
        kept = [HTTPConnection("127.0.0.1", one.port, timeout=60) for _ in range(8)]
        for connection in kept:
            stack.callback(connection.close)
        for query in ("", "", "?threshold=0"):
            for connection in kept:
                connection.request("POST", f"/v1/detect{query}", image)
                found = json.load(connection.getresponse())["images"][0]["detections"]
                assert [one["box"] for one in found if one["score"] >= 0.5] == boxes
                assert {one["class_id"] for one in found} == {0}  # the other one scores above 0.001, too
        answered = metric(one, "gfldeploy_images_total")
        assert answered == {"1": 12, "2": 12}
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        assert {line["replica"] for line in lines if line["route"] == "/v1/detect"} == {1, 2}
        # One dies: the other answers meanwhile, and it is started again.
        killed = processes(one)[0]
        killed.kill()
        until(lambda: not killed.is_running() or killed.status() == psutil.STATUS_ZOMBIE)
        for _ in range(3):
            one.post(image)
        with urllib.request.urlopen(f"http://127.0.0.1:{one.port}/health/ready", timeout=60) as response:
            assert response.status == 200
        until(lambda: metric(one, "gfldeploy_ready") == {"1": 1, "2": 1})
        assert sorted(metric(one, "gfldeploy_replica_restarts_total").values()) == [0, 1]
        # Clients that keep their connections come to use the new one, too.
        before = metric(one, "gfldeploy_images_total")
        for _ in range(3):
            for connection in kept:
                try:
                    connection.request("POST", "/v1/detect", image)
                    connection.getresponse().read()
                except OSError:  # it was of the one that was killed
                    connection.close()
        now = metric(one, "gfldeploy_images_total")
        assert all(now[number] > before[number] for number in BOTH)
        # One that dies when the path holds another bundle: the other serves the old one on, and a reload mends both.
        rename_class(path, "box", "crate")
        processes(one)[0].kill()
        until(lambda: any("started again after a reload" in line for line in one.said))
        assert detected(one, image) == "box"
        one.process.send_signal(signal.SIGHUP)
        until(lambda: metric(one, "gfldeploy_ready") == {"1": 1, "2": 1})
        assert {detected(one, image) for _ in range(8)} == {"crate"}
        # A reload takes one after the other.
        before = metric(one, "gfldeploy_reloads_total")
        one.process.send_signal(signal.SIGHUP)
        until(lambda: metric(one, "gfldeploy_reloads_total") == {number: before[number] + 1 for number in BOTH})
        children = processes(one)
        one.process.send_signal(signal.SIGTERM)
        assert one.process.wait(60) == 0
        assert not any(child.is_running() for child in children)
    assert not any("Error" in line or "Traceback" in line for line in one.said)


def test_more_replicas_than_processors(tiny_bundle: Path) -> None:
    cpus = len(os.sched_getaffinity(0))
    with pytest.raises(UsageError, match=f"{cpus + 1} replicas need as many CPUs, and {cpus} can be used"):
        serve_detector(tiny_bundle, port=0, replicas=cpus + 1)


def test_a_range_is_for_ray(tiny_bundle: Path) -> None:
    with pytest.raises(UsageError, match="range of replicas needs --ray"):
        serve_detector(tiny_bundle, port=0, replicas=(1, 2))


def test_memory() -> None:
    own = _memory_mb(os.getpid())
    assert 0 < own <= psutil.Process().memory_info().rss / 1e6 * 1.05
    assert 0 < _free_mb() <= psutil.virtual_memory().total / 1e6
