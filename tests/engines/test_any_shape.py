"""Engines that are built for shapes: which profile runs what, what is built when, what commands make of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import shaped_engine
from recorded_progress import RecordedProgress
from shaped_engine import ShapedEngine

from gfldeploy.bundle import Bundle
from gfldeploy.engines.base import Engine, EngineOptions, Shape
from gfldeploy.engines.registry import ENGINES, open_engine
from gfldeploy.engines.tensorrt import AnyShapeEngine, Profile, example, possible_shapes

pytest.importorskip("onnxruntime")

LANDSCAPE, PORTRAIT, WIDE = (1, 64, 96), (1, 96, 64), (1, 32, 96)  # what the tiny detector makes of photographs


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(ENGINES, shaped_engine.NAME, shaped_engine.SPEC)
    before = ShapedEngine.open
    yield
    assert ShapedEngine.open == before, "each was closed"


def builds(cache: Path) -> list[str]:
    """The profiles that were built for, in order."""
    path = cache / "builds.txt"
    return path.read_text().splitlines() if path.exists() else []


def opened(bundle: Path, cache: Path, *shapes: Shape, progress: RecordedProgress | None = None) -> AnyShapeEngine:
    options = EngineOptions(cache_dir=cache, shapes=shapes, progress=progress or RecordedProgress())
    engine: Engine = open_engine(shaped_engine.NAME, Bundle.open(bundle), options)
    assert isinstance(engine, AnyShapeEngine)
    return engine


def test_a_profile_spans_its_shapes_in_every_dimension() -> None:
    profile = Profile.spanning([(2, 1216, 800), (2, 800, 1216), (1, 1088, 1088)])
    assert profile == Profile((1, 800, 800), (2, 1216, 800), (2, 1216, 1216))
    assert profile.covers((1, 800, 1216), (2, 1216, 1216))
    assert not profile.covers((2, 800, 1216), (3, 800, 1216)) and not profile.covers((1, 768, 800))
    assert Profile.spanning(profile.shapes) == profile
    assert str(profile) == "1x800x800 to 2x1216x1216, most of them 2x1216x800"
    assert str(Profile.spanning([LANDSCAPE])) == "1x64x96"


def test_what_a_detector_can_be_given_is_bounded_by_its_preprocessing(tiny_bundle: Path) -> None:
    manifest = Bundle.open(tiny_bundle).manifest
    profile = Profile.spanning(possible_shapes(manifest, 4))
    assert profile == Profile((1, 32, 32), (4, 64, 96), (4, 96, 96))
    source = np.random.default_rng(0)
    sizes = np.exp(source.uniform(np.log(1), np.log(9000), (500, 2))).astype(int).tolist()
    for height, width in sizes:
        assert profile.covers((int(source.integers(1, 5)), *manifest.preprocess.input_size(height, width)))


def test_it_is_built_once_for_each_profile(tiny_bundle: Path, tmp_path: Path) -> None:
    progress = RecordedProgress()
    with opened(tiny_bundle, tmp_path, LANDSCAPE, PORTRAIT, progress=progress) as engine:
        for shape in (LANDSCAPE, PORTRAIT, (1, 64, 64), (1, 96, 96)):
            engine.infer(example(shape))
        (built,) = builds(tmp_path)
        assert built == "1x64x64 to 1x96x96, most of them 1x64x96"
        for shape in (WIDE, (1, 32, 32), LANDSCAPE):
            engine.infer(example(shape))
    assert builds(tmp_path) == [built, "1x32x32 to 1x96x96, most of them 1x64x96"]
    assert [built in stage and "minutes" in stage for stage in progress.stages] == [True, False]
    again = RecordedProgress()
    with opened(tiny_bundle, tmp_path, LANDSCAPE, PORTRAIT, progress=again) as engine:
        engine.infer(example(WIDE))
        assert engine.directory is not None
        note = json.loads((engine.directory / "built.json").read_text())
    assert len(builds(tmp_path)) == 2 and again.stages == [], "the second start builds nothing, and says nothing"
    assert (note["engine"], note["bundle"]) == ("shaped", "tiny")
    assert note["shapes"] == [[1, 64, 96], [1, 64, 64], [1, 96, 96]]


def test_the_profile_does_not_depend_on_the_inputs_before(tiny_bundle: Path, tmp_path: Path) -> None:
    shapes = [LANDSCAPE, (2, 32, 64), WIDE, (5, 64, 64), PORTRAIT, (3, 96, 96)]
    scores: list[dict[Shape, object]] = []
    for order in (shapes, shapes[::-1]):
        with opened(tiny_bundle, tmp_path, LANDSCAPE, PORTRAIT) as engine:
            scores.append({shape: engine.infer(example(shape))["scores"].tobytes() for shape in order})
    assert scores[0] == scores[1]


def test_few_are_open_and_few_are_built(tiny_bundle: Path, tmp_path: Path) -> None:
    before = ShapedEngine.open
    source = np.random.default_rng(0)
    with opened(tiny_bundle, tmp_path) as engine:
        for _ in range(60):
            batch, height, width = source.integers(1, (9, 4, 4))
            engine.infer(example((int(batch), 32 * int(height), 32 * int(width))))
            assert ShapedEngine.open - before <= 2
    assert len(builds(tmp_path)) == 4, "of one image, and of up to 2, 4 and 8"


def test_a_failed_build_is_built_again(tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(ShapedEngine, "infer_timed", lambda self, inputs: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            opened(tiny_bundle, tmp_path)
    progress = RecordedProgress()
    opened(tiny_bundle, tmp_path, progress=progress).close()
    assert len(progress.stages) == 1
