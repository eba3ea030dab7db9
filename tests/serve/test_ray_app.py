"""`gfldeploy serve --ray`: what is decided without Ray; and the whole of it, once, with Ray."""

from __future__ import annotations

import json
import shutil
import signal
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from demo_bundles import RunHere
from served import contents
from test_serve_command import server
from test_serve_operations import rename_class

from gfldeploy.bundle import MANIFEST, Bundle
from gfldeploy.cli.options import replicas
from gfldeploy.detection_options import DetectionOptions
from gfldeploy.detector import Detector
from gfldeploy.errors import BundleError, UsageError
from gfldeploy.files import sha256
from gfldeploy.serve.process import Listen
from gfldeploy.serve.ray_app import RayServing, deployment_options, on_cpus, read_source, serve_on_ray
from gfldeploy.serve.ray_replica import ReplicaJob
from gfldeploy.serve.requests import RequestLimits
from gfldeploy.serve.service import ServiceSettings

JOB = ReplicaJob(ServiceSettings(most_waiting=64), RequestLimits())
FIXED, AUTOMATIC = RayServing("local", 2, 2, Listen()), RayServing("local", 1, 4, Listen(drain_s=7))


@pytest.mark.parametrize(
    ("machines", "count", "streams"),
    [
        ([2], 2, 1),
        ([2], 1, 2),
        ([8, 8], 2, 8),
        ([8, 8], 3, 4),
        ([4, 16], 2, 8),
        ([1], 3, 1),
        ([], 2, 1),
        ([6, 6], 5, 2),
    ],
)
def test_replicas_share_the_cpus(machines: list[int], count: int, streams: int) -> None:
    shared = on_cpus(JOB, machines, count)
    assert (shared.threads, shared.streams) == (1, streams)


def test_what_is_given_of_threads_and_streams_stays() -> None:
    for given, wanted in [((4, None), (4, 1)), ((None, 3), (1, 3)), ((2, 2), (2, 2))]:
        shared = on_cpus(ReplicaJob(JOB.settings, JOB.limits, threads=given[0], streams=given[1]), [16], 2)
        assert (shared.threads, shared.streams) == wanted
    gpu = on_cpus(ReplicaJob(JOB.settings, JOB.limits, device="gpu"), [16], 2)
    assert gpu.streams == 1


def test_the_deployment_in_the_words_of_ray() -> None:
    job = on_cpus(ReplicaJob(JOB.settings, JOB.limits, batch_size=2), [8], 2)
    options = deployment_options(job, FIXED, surge=False)
    assert options["num_replicas"] == 2 and "autoscaling_config" not in options
    assert options["ray_actor_options"] == {"num_cpus": 4, "num_gpus": 0} and options["max_surge_percent"] == 0
    # A replica refuses by itself, in its own words, before Ray holds a request back.
    assert options["max_ongoing_requests"] > job.settings.most_waiting
    options = deployment_options(job, AUTOMATIC, surge=True)
    scaling = options["autoscaling_config"]
    assert (scaling["min_replicas"], scaling["max_replicas"]) == (1, 4) and "num_replicas" not in options
    assert scaling["target_ongoing_requests"] == 16 < options["max_ongoing_requests"]
    assert options["graceful_shutdown_timeout_s"] == 7 and options["max_surge_percent"] > 0


def test_what_is_served_is_read_before_ray_is_asked(tiny_bundle: Path, tiny_coco: Path, tmp_path: Path) -> None:
    job = read_source(tiny_bundle, JOB, tiny_coco.parent / "images")
    assert (job.bundle, job.digest) == (str(tiny_bundle), Bundle.open(tiny_bundle).digest)
    assert {(64, 96), (96, 64)} < set(job.sizes)
    with pytest.raises(BundleError, match="there is no"):
        serve_on_ray(tmp_path / "none", JOB, FIXED)
    with pytest.raises(UsageError, match=r"no class 'bal'. Did you mean 'ball'"):
        read_source(tiny_bundle, replace(JOB, detection=DetectionOptions(classes=("bal",))))
    with pytest.raises(UsageError, match="--port 0"):
        serve_on_ray(tiny_bundle, JOB, RayServing("127.0.0.1:1", 1, 1, Listen(port=0)))


def test_options_that_do_not_go_together(tiny_bundle: Path, run_here: RunHere) -> None:
    ran = run_here("serve", tiny_bundle, "--ray", "local", "--access-log", "-")
    assert ran.returncode == 2 and "--access-log is not for --ray" in ran.stderr
    assert (replicas("3"), replicas("1-4"), replicas("2-2")) == (3, (1, 4), 2)
    for word in ("0", "0-3", "4-2", "a", "-1", "1-"):
        with pytest.raises(ValueError, match="is not a number of replicas"):
            replicas(word)


@pytest.mark.slow  # starts Ray
def test_serves_on_ray(tiny_bundle: Path, tiny_coco: Path, tmp_path: Path) -> None:
    """Two replicas: answers, the end of one, another bundle, one that replicas refuse, and an end without a rest."""
    pytest.importorskip("ray.serve")
    path = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    images = contents(tiny_coco)
    with Detector(tiny_bundle, engine="onnxruntime", threads=1) as detector:
        alone = [found.boxes.tolist() for found in detector.detect(images)]
    turned = ("--classes", "0", "--score-threshold", "0.001")
    with server(path, "--ray", "local", "--replicas", "2", "--streams", "1", *turned) as one:
        names = set()

        def ask(image: bytes, threshold: float = 0.5) -> dict[str, Any]:
            url = f"http://127.0.0.1:{one.port}/v1/detect?timeout_ms=60000&threshold={threshold}"
            with urllib.request.urlopen(urllib.request.Request(url, image), timeout=60) as response:
                names.add(response.headers["X-GFLDeploy-Replica"])
                answer: dict[str, Any] = json.load(response)["images"][0]
            return answer

        for _ in range(8):
            for boxes, image in zip(alone, images, strict=True):
                assert [detection["box"] for detection in ask(image)["detections"]] == boxes
        assert len(names) == 2
        assert {found["class_id"] for found in ask(images[0], threshold=0)["detections"]} == {0}
        with urllib.request.urlopen(f"http://127.0.0.1:{one.port}/metrics", timeout=60) as response:
            metrics = response.read().decode()
        assert all(f'gfldeploy_ready{{replica="{name}"}} 1.0' in metrics for name in names)
        with pytest.raises(urllib.error.HTTPError, match="409"):
            urllib.request.urlopen(f"http://127.0.0.1:{one.port}/v1/reload", b"", timeout=60)

        processes = psutil.Process(one.process.pid).children(recursive=True)
        replicas = [process for process in processes if "ServeReplica:gfldeploy" in " ".join(process.cmdline())]
        assert len(replicas) == 2
        replicas[0].kill()
        until(lambda: all(said in "".join(one.said) for said in ("1 replica run", "2 replicas run, before it were 1")))
        ask(images[0])

        rename_class(path, "box", "crate")
        one.process.send_signal(signal.SIGHUP)
        until(lambda: ask(images[0])["detections"][0]["class"] == "crate" and "answers" in one.said[-1])
        names.clear()
        until(lambda: bool(ask(images[0])) and len(names) == 2)
        spoil(path)
        one.process.send_signal(signal.SIGHUP)
        until(lambda: bool(ask(images[0])) and "what served before goes on" in "".join(one.said))
        for _ in range(20):
            assert ask(images[0])["detections"][0]["class"] == "crate"
            time.sleep(0.1)
        assert len(names) == 2, "replicas that answer are not replaced by their like"

        processes = psutil.Process(one.process.pid).children(recursive=True)
        one.process.send_signal(signal.SIGTERM)
        assert one.process.wait(60) == 0
        until(lambda: not any(process.is_running() and process.status() != "zombie" for process in processes))


def spoil(path: Path) -> None:
    """Have a bundle hold an ONNX file that is what its manifest says, and that no replica can load."""
    manifest = json.loads((path / MANIFEST).read_text())
    name = manifest["graphs"]["onnx"]["model"]
    (path / name).write_bytes(b"no graph")
    manifest["files"][name] = {"sha256": sha256(path / name), "bytes": (path / name).stat().st_size}
    (path / MANIFEST).write_text(json.dumps(manifest))


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.2)
