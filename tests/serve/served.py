"""What the tests of the server share."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import cv2
import httpx
import numpy as np
from starlette.types import ASGIApp

from gfldeploy.detection_options import AS_CONFIGURED
from gfldeploy.detections import Detections
from gfldeploy.images.coco import CocoDataset
from gfldeploy.predict.engine_selection import choose
from gfldeploy.predict.pipeline import PREPARED
from gfldeploy.serve.service import DetectionService, ServiceSettings, Watch

T = TypeVar("T")
LONG_MS = 60_000.0
AT_ONCE = 1 + PREPARED["cpu"]  # batches that have begun, of a service with one stream
_gates: list[Gate] = []


@contextmanager
def serving(bundle: Path, watch: Watch | None = None, **settings: Any) -> Iterator[DetectionService]:
    """A service over the bundle, in ONNX Runtime with one thread."""
    turned = settings.pop("detection", AS_CONFIGURED)
    batch_size = settings.pop("batch_size", 1)
    choice = choose(bundle, engine="onnxruntime", threads=1, batch_size=batch_size, detection=turned)
    service = DetectionService(choice, ServiceSettings(**settings), watch)
    try:
        yield service
    finally:
        while _gates:  # or closing waits for them, also after a failed assertion
            _gates.pop().open.set()
        service.close(drain=False)


def talk(app: ASGIApp, work: Callable[[httpx.AsyncClient], Awaitable[T]]) -> T:
    """What `work` returns, given a client of the application, all in one event loop."""

    async def run() -> T:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://here", timeout=60) as client:
            return await work(client)

    return asyncio.run(run())


def contents(coco: Path) -> list[bytes]:
    """Files of every kind of header: JPEGs, then a PNG, and a JPEG behind a long comment."""
    files = [image.path.read_bytes() for image in CocoDataset.load(coco).images]
    pixels = np.random.default_rng(3).integers(0, 256, (50, 70, 3), np.uint8)
    png = cv2.imencode(".png", pixels)[1].tobytes()
    comment = b"\xff\xfe\xff\xff" + bytes(0xFFFD)
    return [*files, png, files[0][:2] + comment + files[0][2:]]


def same(one: Detections, other: Detections) -> None:
    np.testing.assert_array_equal(one.boxes, other.boxes)
    np.testing.assert_array_equal(one.scores, other.scores)
    assert one.names == other.names


class Gate:
    """Holds an engine's inferences up until it opens, or has them fail."""

    def __init__(self, service: DetectionService) -> None:
        self.open, self.entered = threading.Event(), threading.Event()
        _gates.append(self)
        self.error: Exception | None = None
        self.once: list[Exception] = []
        engine = service._detector._engine
        infer = engine.infer

        def held(inputs: Any) -> Any:
            self.entered.set()
            assert self.open.wait(60)
            if self.error or self.once:
                raise self.error or self.once.pop()
            return infer(inputs)

        engine.infer = held  # type: ignore[method-assign]


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.005)
