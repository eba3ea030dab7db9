"""Another bundle between two requests: nothing lost, nothing mixed up, and the old one answers on where it fails."""

from __future__ import annotations

import asyncio
import gc
import json
import shutil
import threading
import weakref
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from recorded_progress import RecordedProgress
from served import until

from gfldeploy.bundle import GOLDEN, Bundle, write_bundle
from gfldeploy.engines.base import EngineOptions
from gfldeploy.engines.registry import open_engine
from gfldeploy.export.golden import golden_picture, write_golden
from gfldeploy.export.parity import TOLERANCE
from gfldeploy.predict.engine_selection import choose
from gfldeploy.serve.app import create_app
from gfldeploy.serve.keys import Keys
from gfldeploy.serve.metrics import Metrics
from gfldeploy.serve.reload import Current, Reloader
from gfldeploy.serve.requests import RequestLimits
from gfldeploy.serve.service import DetectionService, ServiceSettings

pytest.importorskip("onnxruntime")

KEY = "a-key-of-the-test-of-reloads"
HEADERS = {"X-API-Key": KEY}


def bundle_like(tiny_bundle: Path, target: Path, *classes: str, golden: bool = True) -> Path:
    """The tiny bundle with other class names, in place of what is there."""
    shutil.rmtree(target, ignore_errors=True)
    with write_bundle(target) as (directory, manifests):
        shutil.copytree(tiny_bundle / "onnx", directory / "onnx")
        made = Bundle(directory, replace(Bundle.open(tiny_bundle).manifest, classes=classes, files={}))
        if golden:
            with open_engine("onnxruntime", made, EngineOptions()) as engine:
                write_golden(made, golden_picture(None), engine, TOLERANCE)
        manifests.append(made.manifest)
    return target


class Server:
    """An application over the bundle that is at `path` when it is (re)loaded."""

    def __init__(
        self, path: Path, keys: Path | None = None, load: Callable[[], DetectionService] | None = None
    ) -> None:
        self.path = path
        self.metrics = Metrics()
        read = None if keys is None else Keys(keys)
        self.progress = RecordedProgress()
        self.app = create_app(
            self.load(),
            RequestLimits(),
            metrics=self.metrics,
            load=load or self.load,
            keys=read,
            progress=self.progress,
        )
        self.current: Current = self.app.state.current
        self.reloader: Reloader = self.app.state.reloader

    def load(self) -> DetectionService:
        choice = choose(self.path, "onnxruntime", threads=1, batch_size=4)
        return DetectionService(choice, ServiceSettings(), self.metrics)

    def client(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(transport=httpx.ASGITransport(self.app), base_url="http://here", headers=HEADERS)

    def reloads(self, outcome: str) -> float:
        (line,) = (
            line
            for line in self.metrics.text("")[0].decode().splitlines()
            if line.startswith(f'gfldeploy_reloads_total{{outcome="{outcome}"}}')
        )
        return float(line.split()[-1])


def run(server: Server, work: Callable[[], Awaitable[None]]) -> None:
    """Run the test's coroutine, then close what it left."""

    async def all_of_it() -> None:
        try:
            await work()
        finally:
            await server.reloader.close()
            server.current.service.close(drain=False)

    asyncio.run(all_of_it())


@pytest.fixture
def path(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A bundle that a test may replace."""
    return bundle_like(tiny_bundle, tmp_path / "bundle", "box", "ball")


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    file = tmp_path / "keys"
    file.write_text(KEY)
    file.chmod(0o600)
    return file


@pytest.fixture
def picture(tiny_coco: Path) -> bytes:
    return (tiny_coco.parent / "images/1.jpg").read_bytes()


def test_clients_notice_nothing_but_the_new_bundle(path: Path, keys: Path, tiny_bundle: Path, picture: bytes) -> None:
    server = Server(path, keys)
    asked = ["?classes=box&timeout_ms=10000", "?timeout_ms=10000"]

    async def work() -> None:
        ended = False
        seen: list[str] = []

        async def send_all_the_time(client: httpx.AsyncClient, query: str) -> None:
            while not ended:
                answer = await client.post(f"/v1/detect{query}", content=picture)
                assert answer.status_code == 200, answer.text
                (image,) = answer.json()["images"]
                seen.extend(one["class"] for one in image["detections"])

        async with server.client() as client:
            before = (await client.get("/v1/model")).json()["bundle"]["digest"]
            clients = [asyncio.create_task(send_all_the_time(client, asked[one % 2])) for one in range(8)]
            for classes in (("box", "sphere"), ("box", "globe")):
                bundle_like(tiny_bundle, path, *classes)
                answered = len(seen)
                reloaded = await client.post("/v1/reload")
                assert reloaded.status_code == 200, reloaded.text
                assert len(seen) > answered, "it answers while it loads"
                assert "1 of 1 expected detections" in reloaded.json()["golden"]
                assert reloaded.json()["digest"] == Bundle.open(path).digest
                await until(lambda: not server.reloader.busy)
            ended = True
            await asyncio.gather(*clients)
            model = (await client.get("/v1/model")).json()
            assert model["classes"] == ["box", "globe"] and model["bundle"]["digest"] not in before
        assert set(seen) == {"box"} and server.reloads("switched") == 2

    run(server, work)


def test_class_names_follow_the_bundle(path: Path, tiny_bundle: Path, picture: bytes) -> None:
    server = Server(path)

    async def work() -> None:
        async with server.client() as client:
            bundle_like(tiny_bundle, path, "crate", "ball", golden=False)
            done = await server.reloader.start()
            assert done.golden == "not compared: the bundle has no golden picture"
            (image,) = (await client.post("/v1/detect?classes=crate", content=picture)).json()["images"]
            assert [one["class"] for one in image["detections"]] == ["crate"]
            refused = await client.post("/v1/detect?classes=box", content=picture)
            assert refused.status_code == 400 and "box" in refused.json()["error"]["message"]

    run(server, work)


def spoil_graph(path: Path) -> str:
    graph = path / "onnx/model.onnx"
    graph.write_bytes(graph.read_bytes()[:-1] + b"\xff")
    return "changed"


def spoil_golden(path: Path) -> str:
    """Expect another box, in a bundle that is otherwise whole."""
    record = json.loads((path / GOLDEN).read_text())
    record["detections"][0]["box"][2] += 5
    with write_bundle(path.parent / "other") as (directory, manifests):
        shutil.copytree(path, directory, dirs_exist_ok=True, ignore=shutil.ignore_patterns("manifest.json"))
        (directory / GOLDEN).write_text(json.dumps(record))
        manifests.append(Bundle.open(path).manifest)
    shutil.rmtree(path)
    (path.parent / "other").rename(path)
    return "does not give 1 of the 1 detections"


def remove(path: Path) -> str:
    shutil.rmtree(path)
    return "there is no"


@pytest.mark.parametrize("spoil", [spoil_graph, spoil_golden, remove])
def test_the_old_one_answers_on_where_the_new_one_fails(
    path: Path, keys: Path, picture: bytes, spoil: Callable[[Path], str]
) -> None:
    server = Server(path, keys)
    problem = spoil(path)

    async def work() -> None:
        old = server.current.service
        async with server.client() as client:
            failed = await client.post("/v1/reload")
            error = failed.json()["error"]
            assert failed.status_code == 500 and error["code"] == "reload_failed"
            assert problem in error["message"] and error["remedy"]
            assert server.current.service is old and not server.reloader.busy
            assert (await client.post("/v1/detect?timeout_ms=10000", content=picture)).status_code == 200
        assert (server.reloads("switched"), server.reloads("failed")) == (0, 1)
        assert [problem in note for note in server.progress.notes] == [True]

    run(server, work)
    assert [one.name for one in threading.enumerate() if one.name.startswith("gfldeploy")] == []


def test_one_at_a_time(path: Path, keys: Path) -> None:
    go_on = threading.Event()

    def slow() -> DetectionService:
        assert go_on.wait(20)
        return server.load()

    server = Server(path, keys, slow)

    async def work() -> None:
        async with server.client() as client:
            gone = asyncio.create_task(client.post("/v1/reload"))
            await until(lambda: server.reloader.busy)
            second = await client.post("/v1/reload")
            assert second.status_code == 409 and second.json()["error"]["code"] == "reload_in_progress"
            gone.cancel()  # the client leaves, and the reload goes on
            old = server.current.service
            with server.current.use() as leased:
                assert leased is old
                go_on.set()
                await until(lambda: server.current.service is not old)
                assert server.reloader.busy and leased.ready() is None, "somebody still uses it"
            await until(lambda: not server.reloader.busy)
            assert leased.ready() is not None
            assert (await client.post("/v1/reload")).status_code == 200

    run(server, work)


def test_a_stop_does_not_wait_for_what_loads(path: Path) -> None:
    go_on = threading.Event()
    made: list[DetectionService] = []

    def slow() -> DetectionService:
        assert go_on.wait(20)
        made.append(server.load())
        return made[0]

    server = Server(path, load=slow)

    async def work() -> None:
        server.reloader.start()
        await asyncio.sleep(0)

    run(server, work)
    go_on.set()
    for thread in threading.enumerate():
        if thread.name == "gfldeploy-reload":
            thread.join()
    assert made[0].ready() is not None, "it is closed, late"


def test_a_replaced_service_is_freed(path: Path) -> None:
    server = Server(path)

    async def work() -> None:
        old = weakref.ref(server.current.service)
        await server.reloader.start()
        await until(lambda: not server.reloader.busy)
        gc.collect()
        assert old() is None

    run(server, work)


def test_keys_are_read_again(path: Path, keys: Path) -> None:
    server = Server(path, keys)
    other = {"X-API-Key": "the-key-of-the-next-month"}

    async def work() -> None:
        async with server.client() as client:
            keys.write_text("short")
            failed = await client.post("/v1/reload")
            assert failed.status_code == 500 and "is no key" in failed.json()["error"]["message"]
            keys.write_text(other["X-API-Key"])
            assert (await client.post("/v1/reload")).status_code == 200
            assert (await client.get("/v1/model")).status_code == 401
            assert (await client.get("/v1/model", headers=other)).status_code == 200

    run(server, work)


def test_without_keys_there_is_no_reload_by_request(path: Path) -> None:
    server = Server(path)

    async def work() -> None:
        async with server.client() as client:
            refused = await client.post("/v1/reload")
            assert refused.status_code == 403 and "SIGHUP" in refused.json()["error"]["remedy"]
            assert (await client.get("/v1/reload")).status_code == 405

    run(server, work)
