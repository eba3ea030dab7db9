"""The server on a real engine, with each policy."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from sample_results import OK

from gfldeploy.batching.latency import Point
from gfldeploy.bench.cell import Cell, ServerPolicy
from gfldeploy.bench.inputs import padding_ratio, prepare_images
from gfldeploy.bench.scenarios import fastest, measure_points, serve
from gfldeploy.bench.timing import Settings
from gfldeploy.bundle import Bundle
from gfldeploy.engines import base
from gfldeploy.engines.base import Engine, EngineOptions, Tensors
from gfldeploy.engines.registry import open_engine
from gfldeploy.errors import EngineError
from gfldeploy.images.preprocess import Prepared, Preprocess

SIZES = {(64, 96), (96, 64), (64, 64)}


@pytest.fixture
def engine(tiny_bundle: Path) -> Iterator[Engine]:
    pytest.importorskip("onnxruntime")
    with open_engine("onnxruntime", Bundle.open(tiny_bundle), EngineOptions("fp32", "cpu", 1)) as engine:
        yield engine


@pytest.fixture
def preprocess(tiny_bundle: Path) -> Preprocess:
    return Bundle.open(tiny_bundle).manifest.preprocess


@pytest.fixture
def images(preprocess: Preprocess, tiny_coco: Path) -> list[Prepared]:
    return prepare_images(sorted((tiny_coco.parent / "images").iterdir()), preprocess)


def server(policy: ServerPolicy, most: int, rate: float = 400.0) -> Cell:
    return replace(OK.cell, scenario="server", rate=rate, policy=policy, batch_size=most)


@pytest.mark.parametrize(("policy", "most"), [("no-batching", 1), ("fixed-timeout", 3), ("adaptive", 3)])
def test_every_image_is_answered_or_rejected(
    policy: ServerPolicy, most: int, engine: Engine, images: list[Prepared], preprocess: Preprocess
) -> None:
    settings = Settings(0, 60, 0, latency_bound_ms=500.0)
    samples, serving, batches = serve(engine, images, preprocess, server(policy, most), settings)
    sizes = {one.shape[2:] for one in batches}
    assert serving.requests == 60 == samples.images + serving.rejected
    assert len(samples.latency_ms) == samples.images == sum(one.shape[0] for one in batches)
    assert max(one.shape[0] for one in batches) <= most
    assert serving.most_kept is not None and serving.most_kept <= 60
    if policy == "fixed-timeout":  # Triton's rule knows no sizes: 50 ms after the first, three more wait
        assert (3, 3, 96, 96) in {one.shape for one in batches} and padding_ratio(batches) > 1.2
        assert any(one.mixed for one in batches)
    else:
        assert sizes <= SIZES and not any(one.mixed for one in batches)


@pytest.mark.parametrize(("policy", "most"), [("no-batching", 1), ("adaptive", 2)])
def test_streams_run_batches_at_once(
    policy: ServerPolicy,
    most: int,
    tiny_bundle: Path,
    images: list[Prepared],
    preprocess: Preprocess,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(base, "usable_threads", lambda: 2)
    pytest.importorskip("onnxruntime")
    with open_engine("onnxruntime", Bundle.open(tiny_bundle), EngineOptions(streams=2)) as engine:
        together: list[int] = []
        at_once, most_at_once, lock = 0, 0, threading.Lock()
        infer = engine.infer

        def watched(inputs: Tensors) -> dict[str, np.ndarray]:
            nonlocal at_once, most_at_once
            together.append(threading.get_ident())
            with lock:
                at_once += 1
                most_at_once = max(most_at_once, at_once)
            try:
                time.sleep(2e-3)  # the network is so small that nobody else would come meanwhile
                return infer(inputs)
            finally:
                with lock:
                    at_once -= 1

        monkeypatch.setattr(engine, "infer", watched)
        cell = replace(server(policy, most, 2000.0), streams=2)
        samples, serving, batches = serve(engine, images, preprocess, cell, Settings(0, 60, 0, latency_bound_ms=5e3))
    assert serving.requests == 60 == samples.images + serving.rejected
    assert len(samples.latency_ms) == samples.images == sum(one.shape[0] for one in batches)
    assert len(set(together)) == 2 == most_at_once, "two threads, neither of them that which decides"


def test_an_engine_that_fails_in_a_stream_ends_the_server(
    tiny_bundle: Path, images: list[Prepared], preprocess: Preprocess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base, "usable_threads", lambda: 2)
    pytest.importorskip("onnxruntime")
    with open_engine("onnxruntime", Bundle.open(tiny_bundle), EngineOptions(streams=2)) as engine:
        cell = replace(server("no-batching", 1), streams=2)
        left, infer = 120, engine.infer

        def fails(inputs: Tensors) -> dict[str, np.ndarray]:
            nonlocal left
            left -= 1
            if left < 0:
                raise EngineError("it has had enough", None)
            return infer(inputs)

        monkeypatch.setattr(engine, "infer", fails)
        with pytest.raises(EngineError, match="had enough"):
            serve(engine, images, preprocess, cell, Settings(0, 200, 0, latency_bound_ms=5e3))


def test_batches_of_every_number_of_images_are_timed_at_two_sizes(
    engine: Engine, images: list[Prepared], preprocess: Preprocess
) -> None:
    points, warmup_ms = measure_points(engine, images, preprocess, 3, warmup=2)
    # The most common, and the one whose area differs most from it.
    assert {(one.images, one.size) for one in points} == {(n, size) for n in (1, 2, 3) for size in ((64, 96), (64, 64))}
    assert len(warmup_ms) == 2 * 6


def test_a_server_that_rejects_everything(engine: Engine, images: list[Prepared], preprocess: Preprocess) -> None:
    with pytest.raises(EngineError, match=r"none of the 5 images that arrived could be answered within 0\.001 ms"):
        serve(engine, images, preprocess, server("adaptive", 2, 200.0), Settings(0, 5, 0, latency_bound_ms=1e-3))


def test_no_point_is_faster_than_what_bounds_the_server() -> None:
    points = [Point(n, (64, 64), ms) for n, ms in ((1, 10.0), (1, 14.0), (2, 16.0), (4, 40.0), (4, 33.0))]
    model = fastest(points)
    shares = [one.ms / model.predict(one.images, one.size) for one in points]
    assert min(shares) == pytest.approx(1.0)
