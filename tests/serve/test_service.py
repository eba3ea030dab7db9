"""The service without HTTP: over a real, tiny detector."""

from __future__ import annotations

import asyncio
import io
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import served
from PIL import Image as PIL_Image
from served import AT_ONCE, LONG_MS, Gate, contents, same, serving, until

from gfldeploy.bundle import Bundle
from gfldeploy.detector import Detector
from gfldeploy.engines import ort_engine
from gfldeploy.engines.base import Tensors
from gfldeploy.engines.ort_engine import PROVIDERS, OnnxRuntimeEngine, Providers
from gfldeploy.engines.registry import ENGINES
from gfldeploy.errors import DataError, EngineError, RejectedError
from gfldeploy.images.decode import decode_image
from gfldeploy.predict.engine_selection import Choice, choose
from gfldeploy.progress import Progress
from gfldeploy.serve import loaded
from gfldeploy.serve.loaded import Answer, LoadedDetector
from gfldeploy.serve.service import DetectionService, Watch


@pytest.mark.parametrize("batch_size", [1, 3])
def test_answers_are_those_of_the_detector(tiny_bundle: Path, tiny_coco: Path, batch_size: int) -> None:
    images = contents(tiny_coco)
    with Detector(tiny_bundle, engine="onnxruntime", threads=1) as detector:
        alone = detector.detect(images, threshold=0)

    async def ask(service: DetectionService) -> list[Answer]:
        return await asyncio.gather(*(service.detect(image, LONG_MS) for image in images))

    with serving(tiny_bundle, batch_size=batch_size) as service:
        found = asyncio.run(ask(service))
        assert service.ready() is None and (service.in_flight, service.waiting) == (0, 0)
    for before, answer in zip(alone, found, strict=True):
        same(before, answer.detections)
        assert min(answer.times.decode, answer.times.preprocess, answer.times.infer) > 0
    assert [answer.size for answer in found[:2]] == [(48, 80), (80, 48)]


@pytest.mark.parametrize(("of_a_range", "expected"), [(False, {1, 2, 4}), (True, {1, 2, 3, 4})])
def test_on_a_gpu_batches_are_filled_up_to_a_power_of_two(
    tiny_bundle: Path, tiny_coco: Path, monkeypatch: pytest.MonkeyPatch, of_a_range: bool, expected: set[int]
) -> None:
    """With the provider and the memory of the CPU. Each number of images would be a shape to plan for.

    Not where the engine is built for a range of shapes.
    """
    rows: list[int] = []
    spec = replace(ENGINES["onnxruntime"], needs_shapes=of_a_range)
    monkeypatch.setattr(loaded, "ENGINES", {**ENGINES, "onnxruntime": spec})

    class SimulatedGpu(OnnxRuntimeEngine):
        memory = "cpu"

        def _choose_providers(self, bundle: Bundle) -> Providers:
            return [(PROVIDERS["cpu"], {})]

        def infer_timed(self, inputs: Tensors) -> Any:
            rows.append(len(inputs["image"]))
            return super().infer_timed(inputs)

    def choose_gpu(*arguments: Any, **named: Any) -> Choice:
        found = choose(*arguments, **named)
        return replace(found, options=replace(found.options, device="gpu"))

    monkeypatch.setattr(served, "choose", choose_gpu)
    monkeypatch.setattr(ort_engine, "load_libraries", lambda _: None)
    monkeypatch.setattr(loaded, "open_engine", lambda _, bundle, options: SimulatedGpu(bundle, options, "onnx"))
    good, *_ = contents(tiny_coco)
    with Detector(tiny_bundle, engine="onnxruntime", threads=1) as detector:
        (alone,) = detector.detect([good], threshold=0)

    async def ask(service: DetectionService) -> list[Answer]:
        gate = Gate(service)
        first = asyncio.ensure_future(service.detect(good, LONG_MS))
        await until(gate.entered.is_set)
        others = [asyncio.ensure_future(service.detect(good, LONG_MS)) for _ in range(3)]
        gate.open.set()
        return [await first, *await asyncio.gather(*others)]

    with serving(tiny_bundle, batch_size=4) as service:
        assert set(rows) == expected
        rows.clear()
        found = asyncio.run(ask(service))
    assert rows and set(rows) <= expected
    for answer in found:
        same(alone, answer.detections)


def test_warmed_up_by_a_folder(tiny_bundle: Path, tiny_coco: Path) -> None:
    with serving(tiny_bundle, warm_up=tiny_coco.parent / "images", batch_size=2) as service:
        described = service.description
    assert described.sizes[0] in ((64, 96), (96, 64)) and len(described.sizes) >= 3
    assert (described.batch_size, described.bundle.name, described.classes) == (2, "tiny", ("box", "ball"))


def test_a_bad_image_fails_alone(tiny_bundle: Path, tiny_coco: Path) -> None:
    good, *_ = contents(tiny_coco)
    images = [good, good[: len(good) // 2], b"", b"no image", good]

    async def ask(service: DetectionService) -> Sequence[Answer | BaseException]:
        gate = Gate(service)
        jobs = [asyncio.ensure_future(service.detect(image, LONG_MS)) for image in images]
        await until(gate.entered.is_set)
        gate.open.set()
        return await asyncio.gather(*jobs, return_exceptions=True)

    with serving(tiny_bundle, batch_size=4) as service:
        first, *bad, last = asyncio.run(ask(service))
        assert service.ready() is None
    assert all(isinstance(one, DataError) for one in bad)
    assert isinstance(first, Answer) and isinstance(last, Answer)
    same(first.detections, last.detections)


def test_an_image_of_too_many_pixels(tiny_bundle: Path, tiny_coco: Path) -> None:
    image, *_ = contents(tiny_coco)  # 48 x 80
    turned, exif = io.BytesIO(), PIL_Image.Exif()
    exif[0x0112] = 6
    PIL_Image.new("RGB", (80, 48)).save(turned, "PNG", exif=exif)
    with serving(tiny_bundle, most_pixels=3839) as service:
        # The second has to be decoded for its size, and cannot be: it is refused before.
        for content in (image, turned.getvalue()[:-20]):
            with pytest.raises(DataError, match="80 x 48 px, more than"):
                asyncio.run(service.detect(content, LONG_MS))


def test_what_it_takes_to_find_the_size_of_an_image_counts(tiny_bundle: Path, tiny_coco: Path) -> None:
    *_, png, _ = contents(tiny_coco)

    async def ask(service: DetectionService) -> None:
        busy = [service._readers.submit(time.sleep, 0.2) for _ in range(2)]
        with pytest.raises(RejectedError, match="after its deadline"):
            await service.detect(png, 150)
        assert all(one.done() for one in busy)

    with serving(tiny_bundle) as service:
        asyncio.run(ask(service))


def test_what_is_too_much_is_refused_at_once(tiny_bundle: Path, tiny_coco: Path) -> None:
    rejected: list[str] = []

    class Counted(Watch):
        def rejected(self, reason: str) -> None:
            rejected.append(reason)

    image, *_ = contents(tiny_coco)

    async def ask(service: DetectionService) -> None:
        gate = Gate(service)
        running: list[asyncio.Future[Answer]] = []
        for _ in range(AT_ONCE):
            running.append(asyncio.ensure_future(service.detect(image, LONG_MS)))
            await until(lambda: service.in_flight == len(running) and service.waiting == 0)
        waiting = [asyncio.ensure_future(service.detect(image, LONG_MS)) for _ in range(2)]
        await until(lambda: service.waiting == 2)
        with pytest.raises(RejectedError) as full:
            await service.detect(image, LONG_MS)
        with pytest.raises(RejectedError, match="2 requests wait"):
            service.check_room(LONG_MS)
        assert full.value.reason == "queue full"
        waiting[0].cancel()  # which makes room, for one that cannot be in time
        await until(waiting[0].done)
        with pytest.raises(RejectedError) as late:
            await service.detect(image, 1e-3)
        assert late.value.reason == "deadline"
        gate.open.set()
        await asyncio.gather(*running, waiting[1])

    with serving(tiny_bundle, Counted(), most_waiting=2) as service:
        asyncio.run(ask(service))
    assert rejected == ["queue full", "queue full", "deadline"]


def test_a_failing_engine_is_replaced(tiny_bundle: Path, tiny_coco: Path) -> None:
    image, *_ = contents(tiny_coco)

    async def ask(service: DetectionService) -> None:
        gate = Gate(service)
        gate.error = EngineError("the device is lost", None)
        gate.open.set()
        with pytest.raises(EngineError, match="device is lost"):
            await service.detect(image, LONG_MS)
        broken = service._detector
        await until(lambda: service._detector is not broken and service.ready() is None)
        assert len((await service.detect(image, LONG_MS)).detections)

    with serving(tiny_bundle) as service:
        asyncio.run(ask(service))


def test_one_that_fails_on_one_image_is_kept(tiny_bundle: Path, tiny_coco: Path) -> None:
    image, *_ = contents(tiny_coco)

    async def ask(service: DetectionService) -> None:
        gate, engine = Gate(service), service._detector
        gate.once.append(EngineError("not this one", None))
        gate.open.set()
        with pytest.raises(EngineError, match="not this one"):
            await service.detect(image, LONG_MS)
        await until(lambda: engine.batcher.counts.answered)  # what is known to work
        assert service.ready() is None
        await service.detect(image, LONG_MS)
        assert service._detector is engine

    with serving(tiny_bundle) as service:
        asyncio.run(ask(service))


def test_a_hanging_engine_is_replaced_and_its_requests_are_answered(tiny_bundle: Path, tiny_coco: Path) -> None:
    image, *_ = contents(tiny_coco)

    async def ask(service: DetectionService) -> None:
        gate = Gate(service)
        stuck = [asyncio.ensure_future(service.detect(image, LONG_MS)) for _ in range(4)]
        await until(lambda: all(job.done() for job in stuck))
        assert all("has not ended after" in str(job.exception()) for job in stuck)
        await until(lambda: service.ready() is None)
        assert len((await service.detect(image, LONG_MS)).detections)
        gate.open.set()

    with serving(tiny_bundle, hang_s=0.2) as service:
        asyncio.run(ask(service))


def test_an_engine_that_fails_in_an_unforeseen_way_is_replaced(
    tiny_bundle: Path, tiny_coco: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image, *_ = contents(tiny_coco)

    async def ask(service: DetectionService) -> None:
        gate, load, fails = Gate(service), service._load, [MemoryError("while it is opened")]

        def opened(progress: Progress) -> LoadedDetector:
            if fails:
                raise fails.pop()
            return load(progress)

        monkeypatch.setattr(service, "_load", opened)
        gate.error = MemoryError("while it runs")
        gate.open.set()
        with pytest.raises(MemoryError):
            await service.detect(image, LONG_MS)
        broken = service._detector
        await until(lambda: service._detector is not broken and service.ready() is None)
        assert not fails
        await service.detect(image, LONG_MS)

    with serving(tiny_bundle) as service:
        asyncio.run(ask(service))


def test_time_that_images_take_is_no_hanging_engine(
    tiny_bundle: Path, tiny_coco: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image, *_ = contents(tiny_coco)
    decode = decode_image

    def slow(*args: Any, **kwargs: Any) -> Any:
        time.sleep(0.2)  # a batch takes 1.6 s, `hang_s` is 1.2
        return decode(*args, **kwargs)

    async def ask(service: DetectionService) -> None:
        engine = service._detector
        monkeypatch.setattr("gfldeploy.serve.loaded.decode_image", slow)
        await asyncio.gather(*(service.detect(image, LONG_MS) for _ in range(20)))
        assert service._detector is engine

    with serving(tiny_bundle, batch_size=8, hang_s=1.2) as service:
        asyncio.run(ask(service))


def test_it_gives_up_on_an_engine_that_fails_again_and_again(tiny_bundle: Path, tiny_coco: Path) -> None:
    image, *_ = contents(tiny_coco)

    async def ask(service: DetectionService) -> None:
        gate = Gate(service)
        gate.error = EngineError("the device is lost", None)
        gate.open.set()
        with pytest.raises(EngineError):
            await service.detect(image, LONG_MS)
        await until(lambda: service.gave_up)
        with pytest.raises(RejectedError, match="failed 1 times"):
            await service.detect(image, LONG_MS)

    with serving(tiny_bundle, restarts=0) as service:
        asyncio.run(ask(service))
        assert "the device is lost" in str(service.ready())


def test_draining(tiny_bundle: Path, tiny_coco: Path) -> None:
    image, *_ = contents(tiny_coco)

    async def ask(service: DetectionService) -> None:
        gate = Gate(service)
        jobs = [asyncio.ensure_future(service.detect(image, LONG_MS)) for _ in range(5)]
        await until(gate.entered.is_set)
        service.drain()
        with pytest.raises(RejectedError, match="stopping") as refused:
            await service.detect(image, LONG_MS)
        assert refused.value.reason == "closed" and service.in_flight == 5
        threading.Timer(0.02, gate.open.set).start()
        await asyncio.to_thread(service.close)
        assert min(len(answer.detections) for answer in await asyncio.gather(*jobs)) > 0

    with serving(tiny_bundle) as service:
        asyncio.run(ask(service))


def test_a_model_that_is_too_slow_learns_though_it_refuses_all(tiny_bundle: Path, tiny_coco: Path) -> None:
    image, *_ = contents(tiny_coco)

    async def ask(service: DetectionService) -> None:
        policy = service._detector.batcher._policy
        for size in service._detector.sizes:
            for _ in range(45):
                policy.observe(1, size, 1e5)
        refused = 0
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            try:
                await service.detect(image, 200)
                break
            except RejectedError as error:
                refused += error.reason == "deadline"
                await asyncio.sleep(0.01)
        assert refused and time.monotonic() < deadline

    with serving(tiny_bundle) as service:
        asyncio.run(ask(service))
