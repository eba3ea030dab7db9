"""Engines that are built for shapes: which profile runs what, what is built when, what commands make of it."""

from __future__ import annotations

import json
import shutil
import threading
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import shaped_engine
from plug_in import install, run
from recorded_progress import RecordedProgress
from sample_deploy import CELL, CHOICE, DEPLOY
from shaped_engine import NAME, ShapedEngine

from gfldeploy import Detector, analyze, evaluate, predict_images
from gfldeploy.bench.cell import BundleIdentity
from gfldeploy.bundle import Bundle
from gfldeploy.engines.base import Engine, EngineOptions, Shape
from gfldeploy.engines.registry import ENGINES, open_engine
from gfldeploy.engines.tensorrt import AnyShapeEngine, Profile, example, possible_shapes
from gfldeploy.errors import EngineError, OutputError
from gfldeploy.predict import session, shards
from gfldeploy.predict.engine_selection import choose
from gfldeploy.predict.pipeline import detect_batches
from gfldeploy.tune.deploy_file import Deploy

pytest.importorskip("onnxruntime")

LANDSCAPE, PORTRAIT, WIDE = (1, 64, 96), (1, 96, 64), (1, 32, 96)  # what the tiny detector makes of photographs


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(ENGINES, NAME, shaped_engine.SPEC)
    before = ShapedEngine.open
    yield
    assert ShapedEngine.open == before, "each was closed"


def builds(cache: Path) -> list[str]:
    """The profiles that were built for, in order."""
    path = cache / "builds.txt"
    return path.read_text().splitlines() if path.exists() else []


def opened(bundle: Path, cache: Path, *shapes: Shape, progress: RecordedProgress | None = None) -> AnyShapeEngine:
    options = EngineOptions(cache_dir=cache, shapes=shapes, progress=progress or RecordedProgress())
    engine: Engine = open_engine(NAME, Bundle.open(bundle), options)
    assert isinstance(engine, AnyShapeEngine)
    return engine


def test_a_profile_spans_its_shapes_in_every_dimension() -> None:
    profile = Profile.spanning([(2, 1216, 800), (2, 800, 1216), (1, 1088, 1088)])
    assert profile == Profile((1, 800, 800), (2, 1216, 800), (2, 1216, 1216))
    assert profile.covers((1, 800, 1216), (2, 1216, 1216))
    assert not profile.covers((2, 800, 1216), (3, 800, 1216)) and not profile.covers((1, 768, 800))
    assert Profile.spanning(profile.shapes) == profile
    assert str(profile) == "1x800x800 to 2x1216x1216, fastest at 2x1216x800"
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
        assert built == "1x64x64 to 1x96x96, fastest at 1x64x96"
        for shape in (WIDE, (1, 32, 32), LANDSCAPE):
            engine.infer(example(shape))
    assert builds(tmp_path) == [built, "1x32x32 to 1x96x96, fastest at 1x64x96"]
    assert [built in stage and "minutes" in stage for stage in progress.stages] == [True, False]
    again = RecordedProgress()
    with opened(tiny_bundle, tmp_path, LANDSCAPE, PORTRAIT, progress=again) as engine:
        first = engine.directory
        engine.infer(example(WIDE))
        assert first is not None and engine.directory not in (None, first), "that of the engine that ran last"
        note = json.loads((first / "built.json").read_text())
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


def test_a_process_waits_for_another_that_builds_the_same(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started, go_on = threading.Event(), threading.Event()
    first, second = RecordedProgress(), RecordedProgress()

    def stage(text: str) -> None:  # told with the folder locked, before anything is built
        started.set()
        assert go_on.wait(60)

    def waiting(text: str) -> None:
        second.stages.append(text)
        go_on.set()

    monkeypatch.setattr(first, "stage", stage)
    monkeypatch.setattr(second, "stage", waiting)
    with ThreadPoolExecutor() as pool:
        one = pool.submit(opened, tiny_bundle, tmp_path, LANDSCAPE, progress=first)
        assert started.wait(60)
        other = pool.submit(opened, tiny_bundle, tmp_path, LANDSCAPE, progress=second)
        for engine in (one, other):
            engine.result(60).close()
    assert second.stages == ["waiting for another process that builds the same engine"]
    assert len(builds(tmp_path)) == 1


def test_inputs_are_uploaded_to_engines_that_are_open(tiny_bundle: Path, tmp_path: Path) -> None:
    """Another thread infers meanwhile: it opens and closes them."""
    with opened(tiny_bundle, tmp_path, LANDSCAPE) as engine:
        known, other = example(LANDSCAPE), example(WIDE)
        assert engine.upload(known)["image"] is not known["image"]
        assert engine.upload(other) is other and len(builds(tmp_path)) == 1
        engine.infer(other)
        assert engine.upload(other)["image"] is not other["image"]
        assert engine.host_array(5).shape == (5,)


def test_few_are_open_and_few_are_built(tiny_bundle: Path, tmp_path: Path) -> None:
    before = ShapedEngine.open
    source = np.random.default_rng(0)
    with opened(tiny_bundle, tmp_path) as engine:
        for _ in range(60):
            batch, height, width = source.integers(1, (9, 4, 4))
            engine.infer(example((int(batch), 32 * int(height), 32 * int(width))))
            assert ShapedEngine.open - before <= 2
    assert len(builds(tmp_path)) == 4, "of one image, and of up to 2, 4 and 8"


def test_several_threads_may_infer(tiny_bundle: Path, tmp_path: Path) -> None:
    shapes = [LANDSCAPE, WIDE, (3, 64, 64), (5, 64, 64)] * 5  # more profiles than are open
    with opened(tiny_bundle, tmp_path, LANDSCAPE) as engine, ThreadPoolExecutor(4) as pool:
        for shape, found in zip(shapes, pool.map(lambda shape: engine.infer(example(shape)), shapes), strict=True):
            assert len(found["scores"]) == shape[0]


def test_where_there_is_memory_for_one_only(tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ShapedEngine, "memory", ShapedEngine.open + 1)
    with opened(tiny_bundle, tmp_path, LANDSCAPE) as engine:
        for shape in (WIDE, LANDSCAPE, WIDE):
            engine.infer(example(shape))
        monkeypatch.setattr(ShapedEngine, "memory", 0)
        with pytest.raises(EngineError, match="out of memory"):
            engine.infer(example((2, 64, 64)))
    assert len(builds(tmp_path)) == 2


def test_a_failed_build_is_built_again(tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(ShapedEngine, "infer_timed", lambda self, inputs: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            opened(tiny_bundle, tmp_path)
    (half,) = tmp_path.rglob("model.onnx")
    half.write_bytes(b"half of it")
    (half.parent / "more").mkdir()
    progress = RecordedProgress()
    opened(tiny_bundle, tmp_path, progress=progress).close()
    assert len(progress.stages) == 1
    assert len(builds(tmp_path)) == 2, "what was there is not used"
    assert sorted(path.name for path in half.parent.iterdir()) == ["built.json", "model.onnx"]


def test_nothing_is_deleted_through_a_link(tiny_bundle: Path, tmp_path: Path) -> None:
    cache, mine = tmp_path / "cache", tmp_path / "mine"
    opened(tiny_bundle, cache).close()
    (note,) = cache.rglob("built.json")
    note.parent.rename(mine)
    (mine / "built.json").rename(mine / "precious")
    note.parent.symlink_to(mine)
    with pytest.raises(OutputError, match="cannot use"):
        opened(tiny_bundle, cache)
    assert (mine / "precious").exists()


ANYTHING = "1x32x32 to 1x96x96, fastest at 1x64x96"


def write_deploy(folder: Path, bundle: Path, *shapes: Shape, batch_size: int = 1) -> Path:
    """A deploy.yml that chose this engine, beside a copy of the bundle."""
    shutil.copytree(bundle, folder / "tiny")
    cell = replace(
        CELL,
        bundle=BundleIdentity.of(Bundle.open(bundle)),
        engine=NAME,
        precision="fp32",
        batch_size=batch_size,
    )
    choice = replace(CHOICE, path="tiny", cell=cell)
    replace(DEPLOY, choice=choice, runner_up=None, shapes=shapes).write(folder / "deploy.yml")
    return folder / "deploy.yml"


def predicted(source: Path, inputs: Path, output: Path, cache: Path, **given: object) -> bytes:
    """What is found with the engine for shapes."""
    progress = RecordedProgress()
    settings = {"engine": NAME, "engine_cache": cache, "progress": progress, "threads": 1, **given}
    predict_images(source, inputs, output=output, **settings)  # type: ignore[arg-type]
    return (output / "detections.jsonl").read_bytes()


def test_predict_builds_for_all_that_the_detector_takes(tiny_bundle: Path, tiny_coco: Path, tmp_path: Path) -> None:
    images = tiny_coco.parent / "images"
    found = predicted(tiny_bundle, images, tmp_path / "found", tmp_path)
    assert builds(tmp_path) == [ANYTHING]
    assert predicted(tiny_bundle, images, tmp_path / "again", tmp_path) == found
    predicted(tiny_bundle, images / "4.jpg", tmp_path / "one", tmp_path)
    assert builds(tmp_path) == [ANYTHING], "neither the same inputs nor others are built for again"
    with Detector(tiny_bundle, engine=NAME, engine_cache=tmp_path) as detector, warnings.catch_warnings():
        warnings.simplefilter("error")
        detector.detect(list(images.iterdir()))
    assert builds(tmp_path) == [ANYTHING]


def test_many_inputs_are_built_for(
    tiny_bundle: Path, tiny_coco: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "_WORTH_A_BUILD", 3)
    images = tiny_coco.parent / "images"
    for number in range(2):
        predicted(tiny_bundle, images, tmp_path / f"alone{number}", tmp_path / "alone")
        predicted(tiny_bundle, images, tmp_path / f"batched{number}", tmp_path / "batched", batch_size=2)
    assert builds(tmp_path / "alone") == ["1x64x64 to 1x96x96, fastest at 1x64x96"]
    assert builds(tmp_path / "batched") == ["1x64x64 to 2x96x96, fastest at 2x64x96"]


def test_an_interrupted_predict_resumes_to_the_same_bytes(
    tiny_bundle: Path, tiny_coco: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where images have other sizes than their headers say, so that several profiles run: among all, and left."""
    images = tiny_coco.parent / "images"
    other = predicted(tiny_bundle, images, tmp_path / "other", tmp_path / "cache")
    monkeypatch.setattr(session, "_WORTH_A_BUILD", 1)
    monkeypatch.setattr(session, "picture_sizes", lambda inputs, _: [(48, 80)] * len(inputs))
    whole = predicted(tiny_bundle, images, tmp_path / "whole", tmp_path / "cache")
    assert builds(tmp_path / "cache") == [ANYTHING, "1x64x96"]
    assert other != whole, "it shows in the results which profile ran"
    for stop in range(1, 6):
        output = tmp_path / f"part{stop}"

        def interrupted(*given: object, stop: int = stop, **more: object) -> object:
            for number, group in enumerate(detect_batches(*given, **more)):  # type: ignore[arg-type]
                if number == stop:
                    raise KeyboardInterrupt
                yield group

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(shards, "detect_batches", interrupted)
            predicted(tiny_bundle, images, output, tmp_path / "cache")
        assert predicted(tiny_bundle, images, output, tmp_path / "cache") == whole
    assert len(builds(tmp_path / "cache")) == 2


def test_another_deploy_file_is_another_question(tiny_bundle: Path, tiny_coco: Path, tmp_path: Path) -> None:
    images = tiny_coco.parent / "images"
    path = write_deploy(tmp_path, tiny_bundle, LANDSCAPE, PORTRAIT)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(RecordedProgress, "step", interrupt_later)
        predicted(path, images, tmp_path / "found", tmp_path)
    replace(Deploy.read(path), shapes=(PORTRAIT, LANDSCAPE)).write(path)
    with pytest.raises(OutputError, match="an unfinished run with other shapes"):
        predicted(path, images, tmp_path / "found", tmp_path)


def interrupt_later(self: RecordedProgress, label: str, done: int, total: int) -> None:
    if done == 2:
        raise KeyboardInterrupt


def test_a_deploy_file_says_what_to_build_for(tiny_bundle: Path, tiny_coco: Path, tmp_path: Path) -> None:
    path = write_deploy(tmp_path, tiny_bundle, (2, 96, 64), (2, 64, 96), batch_size=2)
    choice = choose(path, engine_cache=tmp_path)
    assert choice.options.shapes == ((2, 96, 64), (2, 64, 96), (1, 96, 64), (1, 64, 96))
    images = sorted((tiny_coco.parent / "images").iterdir())
    known = "1x64x64 to 2x96x96, fastest at 2x96x64"
    with (
        pytest.warns(UserWarning, match=f"is built for inputs of {known}"),
        Detector(path, engine_cache=tmp_path) as one,
    ):
        one.detect(images)
        assert builds(tmp_path) == [known]
        with pytest.warns(UserWarning, match="is built for inputs of 1x32x32 to 2x96x96"):
            one.detect(np.zeros((10, 80, 3), np.uint8))
        one.detect(images)
    assert len(builds(tmp_path)) == 2
    predicted(path, tiny_coco.parent / "images", tmp_path / "found", tmp_path, batch_size=2)
    assert len(builds(tmp_path)) == 2 == len(list(tmp_path.rglob("parity.json"))), "each was compared with the CPU"


def test_eval_and_analyze_build_for_the_headers(tiny_bundle: Path, tiny_coco: Path, tmp_path: Path) -> None:
    given: dict[str, Any] = {"data": tiny_coco, "engine": NAME, "engine_cache": tmp_path, "threads": 1}
    progress = RecordedProgress()
    found = evaluate(tiny_bundle, **given, batch_size=4, progress=progress)
    assert found.accuracy.ap == pytest.approx(1)
    assert builds(tmp_path) == ["2x96x96 to 4x96x96, fastest at 4x96x96"] and len(progress.stages) == 1
    analyze(tiny_bundle, **given, batch_sizes=(4,), rounds=1, peak=False, progress=progress)
    assert builds(tmp_path)[1:] == ["1x64x64 to 4x96x96, fastest at 1x64x96"]
    analyze(tiny_bundle, **given, batch_sizes=(4,), rounds=1, peak=False)
    assert len(builds(tmp_path)) == 2


def test_eval_builds_for_each_input_size(tiny_bundle: Path, tiny_coco: Path, tmp_path: Path) -> None:
    sizes = ((32, 48), (64, 96))
    given: dict[str, Any] = {"data": tiny_coco, "engine": NAME, "engine_cache": tmp_path, "threads": 1}
    found = evaluate(tiny_bundle, **given, batch_size=4, input_sizes=sizes)
    assert tuple(found.at_sizes) == sizes and found.accuracy == found.at_sizes[32, 48]
    # The detector's boxes of 48 px are those of the images at the bundle's own size alone.
    assert found.at_sizes[64, 96].ap == pytest.approx(1) and found.accuracy.ap < 0.1
    assert [build.split(",")[0] for build in builds(tmp_path)] == ["2x64x64 to 4x64x64", "2x96x96 to 4x96x96"]


@pytest.mark.slow
def test_from_tuning_to_deployment(tiny_bundle: Path, tiny_coco: Path, tmp_path: Path) -> None:
    """As a plug-in, in the processes that measure too: what was tuned runs, and is built once."""
    source = Path(shaped_engine.__file__).read_text()
    entry = "shaped = shaped_engine:SPEC"
    path = install(tmp_path / "site-packages", "shaped_engine", source, "gfldeploy.engines", entry)
    bundle, data, images = str(tiny_bundle), str(tiny_coco), str(tiny_coco.parent / "images")
    kept = ["--engine-cache", "cache"]
    brief = ["--min-seconds", "0.1", "--look-seconds", "0.1", "--rounds", "1", "--limit", "2", "--threads", "1"]
    run(path, tmp_path, ["tune", bundle, "--data", data, "--engines", NAME, *brief, "--batch-sizes", "1", *kept])
    deploy = Deploy.read(tmp_path / "deploy.yml")
    assert deploy.choice.cell.engine == NAME
    assert deploy.shapes == ((1, 64, 96), (1, 96, 64), (1, 64, 64)), "of all six images, not of the two that were timed"
    tuned = builds(tmp_path / "cache")
    every = "1x64x64 to 1x96x96, fastest at 1x64x96"
    assert every in tuned, "which mAP was measured with"
    shown = run(
        path,
        tmp_path,
        ["predict", "deploy.yml", images, "--output", "found", *kept],
        ["eval", bundle, "--data", data, "--engine", NAME, *kept],
    )
    assert builds(tmp_path / "cache") == tuned and "is built for" not in shown
    assert "1.0000" in shown
