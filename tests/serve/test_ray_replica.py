"""A replica of Ray Serve, without Ray: what it runs, what says that it is well, and what it tells."""

from __future__ import annotations

import asyncio
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from served import contents, serving, talk
from starlette.types import ASGIApp, Receive, Scope, Send

from gfldeploy.bundle import Bundle
from gfldeploy.cluster.worker import bundle_files
from gfldeploy.detection_options import DetectionOptions
from gfldeploy.errors import BundleError, DataError, EngineError, ParityError, UnsupportedError
from gfldeploy.serialization import build, plain
from gfldeploy.serve.app import create_app
from gfldeploy.serve.keys import Keys
from gfldeploy.serve.metrics import Metrics, merged
from gfldeploy.serve.ray_proxy import arrival
from gfldeploy.serve.ray_replica import Canary, ReplicaJob, answering, error_in, error_line
from gfldeploy.serve.requests import RequestLimits
from gfldeploy.serve.service import ServiceSettings

pytest.importorskip("onnxruntime")


def job_of(bundle: Path, **given: Any) -> ReplicaJob:
    fields = {"engine": "onnxruntime", "threads": 1, "streams": 1, **given}
    found = Bundle.open(bundle)
    return ReplicaJob(ServiceSettings(), RequestLimits(), bundle=str(bundle), digest=found.digest, **fields)


def test_a_job_is_plain_data_and_says_what_runs(tiny_bundle: Path) -> None:
    detection = DetectionOptions(class_thresholds={"box": 0.4}, classes=("box",), class_agnostic=True)
    given = {"keys": ("00ff",), "input_size": (64, 96), "batch_size": 3, "detection": detection}
    job = job_of(tiny_bundle, sizes=((64, 96), (96, 64)), **given)
    assert build(ReplicaJob, json.loads(json.dumps(plain(job)))) == job
    with job.choice() as choice:
        assert (choice.engine, choice.batch_size) == ("onnxruntime", 3)
        assert (choice.options.threads, choice.options.streams) == (1, 1)
        assert choice.expected == ((1, 64, 96), (1, 96, 64))
        assert choice.detection == detection


def test_a_replica_has_the_bundle_of_the_digest_or_none(tiny_bundle: Path, tmp_path: Path) -> None:
    job = job_of(tiny_bundle)
    with pytest.raises(BundleError, match="does not hold the bundle"), replace(job, digest="0" * 64).choice():
        pass
    files = bundle_files(Bundle.open(tiny_bundle))
    elsewhere = replace(job, bundle=str(tmp_path / "not there"))
    with elsewhere.choice(files) as choice:
        assert choice.bundle.digest == job.digest and choice.bundle.directory != tiny_bundle
    assert not choice.bundle.directory.exists()
    path = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    graph = next((path / "onnx").iterdir())
    content = bytearray(graph.read_bytes())
    content[-1] ^= 1
    graph.write_bytes(content)
    with pytest.raises(BundleError), replace(job, bundle=str(path)).choice():
        pass


def test_an_error_comes_through_the_words_of_ray() -> None:
    for error in (BundleError('no "bundle" {here}', "Give one."), EngineError("of an engine"), DataError("x")):
        text = f"Traceback (most recent call last):\n  File\nRuntimeError: {error_line(error)}\nmore of Ray's"
        found = error_in(text)
        assert type(found) is type(error) and str(found) == str(error)
    assert error_in("RuntimeError: something else") is None


def test_the_canary_sees_an_engine_that_finds_something_else(tiny_whole: Path, tiny_bundle: Path) -> None:
    async def check(bundle: Path) -> None:
        with serving(bundle) as service:
            canary = Canary(service)
            for _ in range(3):
                await canary.check(60)
            engine = service._detector._engine
            infer = engine.infer

            def wrong(inputs: Any) -> Any:
                outputs = infer(inputs)
                return {**outputs, "scores": outputs["scores"] * 0}

            engine.infer = wrong  # type: ignore[method-assign]
            with pytest.raises(ParityError, match="others than at the start"):
                await canary.check(60)
            service.drain()
            await canary.check(60)  # which says nothing
            service.gave_up = EngineError("it failed again and again")
            with pytest.raises(EngineError, match="again and again"):
                await canary.check(60)

    asyncio.run(check(tiny_whole))
    asyncio.run(check(tiny_bundle))


def test_deadlines_count_the_time_in_the_proxy(tiny_bundle: Path, tiny_coco: Path) -> None:
    image, *_ = contents(tiny_coco)

    def behind_a_proxy(app: ASGIApp, waited_s: float) -> ASGIApp:
        async def call(scope: Scope, receive: Receive, send: Send) -> None:
            told = arrival()
            await app(
                {**scope, "state": {"gfldeploy_arrived": {**told, "monotonic": told["monotonic"] - waited_s}}},
                receive,
                send,
            )

        return call

    with serving(tiny_bundle) as service:
        app = answering(create_app(service, RequestLimits()), "name")

        def ask(waited_s: float) -> httpx.Response:
            query = "/v1/detect?timeout_ms=30000"
            return talk(behind_a_proxy(app, waited_s), lambda client: client.post(query, content=image))

        assert ask(0).status_code == 200 and ask(0).headers["x-gfldeploy-replica"] == "name"
        late = ask(31)
        assert late.status_code == 503 and late.json()["error"]["code"] == "deadline"
        refused = talk(app, lambda client: client.post("/v1/reload"))
        assert refused.status_code == 409 and "SIGHUP" in refused.json()["error"]["remedy"]


def test_the_metrics_of_several_replicas_are_one_page(tiny_bundle: Path) -> None:
    with serving(tiny_bundle) as service:
        both = {}
        for name, count in (("one", 2), ("two", 3)):
            metrics = Metrics()
            metrics.ask(lambda: service)
            for _ in range(count):
                metrics.batch(1, 10, 10)
            both[name] = json.loads(json.dumps(metrics.families()))
    text, content_type = merged(both, "")
    lines = text.decode().splitlines()
    assert 'gfldeploy_batch_pixels_total{replica="one"} 20.0' in lines
    assert 'gfldeploy_batch_pixels_total{replica="two"} 30.0' in lines
    assert lines.count("# TYPE gfldeploy_batch_pixels_total counter") == 1 and content_type.startswith("text/plain")
    assert merged(both, "application/openmetrics-text")[0].endswith(b"# EOF\n")


def test_keys_are_sent_as_digests(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("a-key-of-sixteen-letters\n")
    path.chmod(0o600)
    keys = Keys(path)
    there = Keys.of_digests(keys.digests)
    assert there.accept([b"a-key-of-sixteen-letters"]) and not there.accept([b"a-key-of-another-kind"])
    assert "letters" not in str(keys.digests)


def test_what_a_machine_lacks_is_said(tiny_bundle: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"numpy .*, not 0\.1"):
        job_of(tiny_bundle, versions={"numpy": "0.1"}).choice().__enter__()
    with pytest.raises(UnsupportedError):
        job_of(tiny_bundle, engine="paddle").choice().__enter__()
