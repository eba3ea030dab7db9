"""Streams: several inferences at once from one engine that is loaded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from numpy.typing import NDArray

from gfldeploy.bundle import Bundle
from gfldeploy.engines import base
from gfldeploy.engines.base import Engine, EngineOptions, EngineSpec, OneForEachThread
from gfldeploy.engines.hardware import usable_threads
from gfldeploy.engines.registry import ENGINES, check_possible, open_engine
from gfldeploy.errors import EngineError, UnsupportedError

STREAMS = 3
SIZES = [(64, 96), (96, 64), (64, 64), (128, 96), (96, 128), (160, 96)]


@pytest.fixture(autouse=True)
def cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if there were enough of them: what is tested here is not speed."""
    monkeypatch.setattr(base, "usable_threads", lambda: 2 * STREAMS)


def images(count: int, sizes: Sequence[tuple[int, int]] = SIZES) -> list[NDArray[np.float32]]:
    random = np.random.default_rng(0)
    shapes = [(1, 3, *sizes[number % len(sizes)]) for number in range(count)]
    return [random.standard_normal(shape, np.float32) for shape in shapes]


def at_once(call: Callable[[Any], Any], jobs: Sequence[Any]) -> list[Any]:
    with ThreadPoolExecutor(STREAMS) as threads:
        return list(threads.map(call, jobs))


def check_as_one_after_the_other(engine: Engine, alone: Engine, inputs: Sequence[NDArray[np.float32]]) -> None:
    expected = [alone.infer({"image": image}) for image in inputs]
    for found, wanted in zip(at_once(lambda image: engine.infer({"image": image}), inputs), expected, strict=True):
        assert found.keys() == wanted.keys()
        for name, values in wanted.items():
            np.testing.assert_array_equal(found[name], values)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_as_one_after_the_other(name: str, threads: int, tiny_bundle: Path) -> None:
    """Of more shapes than OpenVINO has models for, whichever comes first."""
    pytest.importorskip(name)
    bundle = Bundle.open(tiny_bundle)
    with (
        open_engine(name, bundle, EngineOptions(threads=threads, streams=STREAMS)) as engine,
        open_engine(name, bundle, EngineOptions()) as alone,
    ):
        check_as_one_after_the_other(engine, alone, images(60))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["onnxruntime", "openvino", "paddle", "paddle-plain"])
def test_of_a_real_detector(name: str, exported: Path) -> None:
    pytest.importorskip(name.removesuffix("-plain"))
    bundle = Bundle.open(exported)
    with (
        open_engine(name, bundle, EngineOptions(streams=STREAMS)) as engine,
        open_engine(name, bundle, EngineOptions()) as alone,
    ):
        check_as_one_after_the_other(engine, alone, images(12, SIZES[:2]))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["onnxruntime", "openvino", "paddle"])
def test_an_error_is_of_its_own_inference(name: str, exported: Path) -> None:
    pytest.importorskip(name)
    good, bad = images(1)[0], np.zeros((1, 5, 64, 96), np.float32)
    with open_engine(name, Bundle.open(exported), EngineOptions(streams=STREAMS)) as engine:
        expected = engine.infer({"image": good})

        def infer(image: NDArray[np.float32]) -> dict[str, NDArray[Any]] | None:
            try:
                return engine.infer({"image": image})
            except EngineError:
                return None

        for image, found in zip(jobs := [good, bad] * 6, at_once(infer, jobs), strict=True):
            assert (found is None) == (image is bad)
            if found is not None:
                np.testing.assert_array_equal(found["boxes"], expected["boxes"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["onnxruntime", "openvino", "paddle"])
def test_closed_while_it_runs(name: str, exported: Path) -> None:
    """What runs ends well, and what comes later fails in one line."""
    pytest.importorskip(name)
    engine = open_engine(name, Bundle.open(exported), EngineOptions(streams=STREAMS))
    expected = engine.infer({"image": images(1)[0]})

    def infer(image: NDArray[np.float32]) -> bool:
        try:
            np.testing.assert_array_equal(engine.infer({"image": image})["boxes"], expected["boxes"])
        except EngineError:
            return False
        return True

    with ThreadPoolExecutor(STREAMS) as threads:
        ended = [threads.submit(infer, images(1)[0]) for _ in range(30)]
        assert ended[0].result()
        engine.close()
        assert not ended[-1].result() or all(one.result() for one in ended)
    assert not infer(images(1)[0])


def test_openvino_has_as_many_streams_in_one_model(tiny_bundle: Path) -> None:
    pytest.importorskip("openvino")
    from gfldeploy.engines.openvino_engine import OpenVinoEngine

    options = EngineOptions(threads=2, streams=STREAMS)
    with OpenVinoEngine(Bundle.open(tiny_bundle), options, "onnx") as engine:
        at_once(lambda image: engine.infer({"image": image}), images(30, [(64, 96)]))
        assert list(engine.models) == [(1, 3, 64, 96)]
        loaded = engine._loaded_for((1, 3, 64, 96))
        # No more than there are CPUs, really.
        assert loaded.model.get_property("NUM_STREAMS") == min(STREAMS, usable_threads())


def test_no_more_threads_than_cpus() -> None:
    assert EngineOptions(threads=2, streams=STREAMS).streams == STREAMS
    with pytest.raises(EngineError, match=r"^3 streams of 3 threads each are more than the 6 usable CPUs"):
        EngineOptions(threads=3, streams=STREAMS)
    assert EngineOptions(threads=100).threads == 100  # of one inference, as ever
    with pytest.raises(ValueError, match="at least 1"):
        EngineOptions(streams=0)


def test_engines_that_run_one_inference_at_once(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other packages' engines, unless they say otherwise; and all on GPUs."""
    spec = ENGINES["onnxruntime"]
    assert spec.obstacle_to_streams("cpu") is None
    assert (gpu := spec.obstacle_to_streams("gpu")) is not None and "on a GPU" in gpu.reason
    monkeypatch.setitem(cast(dict[str, EngineSpec], ENGINES), "onnxruntime", replace(spec, streams=False))
    check_possible("onnxruntime", Bundle.open(tiny_bundle), EngineOptions())
    with pytest.raises(UnsupportedError, match="ONNX Runtime runs one inference at once"):
        check_possible("onnxruntime", Bundle.open(tiny_bundle), EngineOptions(streams=2))


def test_what_threads_share_is_made_as_it_is_needed() -> None:
    made: list[int] = []

    def make() -> int:
        if len(made) == 1 and not failing:
            failing.append(True)
            raise EngineError("not now")
        made.append(len(made))
        return made[-1]

    failing: list[bool] = []
    some = OneForEachThread(make, 2)
    for _ in range(3):
        with some.one() as one:
            assert one == 0
    with some.one() as first:
        with pytest.raises(EngineError, match="not now"), some.one():
            pass
        with some.one() as second:
            assert {first, second} == {0, 1}
    assert made == [0, 1]
