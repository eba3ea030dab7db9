"""`gfldeploy predict`: what it writes, what it says, and that it resumes after a kill to the same bytes."""

from __future__ import annotations

import json
import random
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import cv2
import demo_bundles
import numpy as np
import onnx
import pytest

from gfldeploy import Detector
from gfldeploy.accuracy import coco_accuracy, coco_results
from gfldeploy.bundle import Bundle
from gfldeploy.cli import main
from gfldeploy.engines import base
from gfldeploy.files import unfinished_beside
from gfldeploy.images.coco import CocoDataset

pytest.importorskip("onnxruntime")

SIZES = [(48, 80), (80, 48), (64, 64), (48, 72)]


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stopped:
        main(["predict", *map(str, arguments)])
    assert isinstance(stopped.value.code, int)
    return stopped.value.code


def write_images(folder: Path, count: int) -> Path:
    """Images of four sizes in turn, the tenth of which is damaged."""
    folder.mkdir(parents=True)
    source = np.random.default_rng(0)
    for number in range(count):
        picture = source.integers(0, 256, (*SIZES[number % 4], 3), np.uint8)
        assert cv2.imwrite(str(folder / f"{number:04d}.jpg"), picture)
    damaged = folder / "0009.jpg"
    damaged.write_bytes(damaged.read_bytes()[:-100])
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("predict") / "images", 40)


def lines(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "detections.jsonl").read_text().splitlines()]


def test_a_folder(tiny_bundle: Path, images: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "new" / "out"
    assert run(tiny_bundle, images, "-o", output, "--batch-size", 4) == 1
    shown, said = capfd.readouterr()
    assert shown == f"{output}\n"
    assert "fp32 on cpu, batch 4" in said and "runs fp32 on cpu here" in said
    assert "40 images in" in said and f"1 could not be read:\n  {images}" in said
    assert "0009.jpg is truncated" in said
    found = lines(output)
    assert [one["file"] for one in found] == [str(path) for path in sorted(images.iterdir())]
    assert "0009.jpg is truncated" in found[9]["error"] and "detections" not in found[9]
    preprocess = Bundle.open(tiny_bundle).manifest.preprocess
    for number, one in enumerate(found):
        if number == 9:
            continue
        assert (one["height"], one["width"]) == SIZES[number % 4]
        (box,) = one["detections"]
        side = pytest.approx(48 / preprocess.scales(*SIZES[number % 4])[0], abs=1e-3)
        assert box["class"] == "box" and box["class_id"] == 0 and box["score"] > 0.8
        assert box["bbox"] == [0, 0, side, side]
    named = json.loads((output / "images.json").read_text())
    assert [one["id"] for one in named["images"]] == [number for number in range(1, 41) if number != 10]
    assert named["categories"] == [{"id": 1, "name": "box"}, {"id": 2, "name": "ball"}]
    results = json.loads((output / "coco.json").read_text())
    assert [one["image_id"] for one in results if one["score"] >= 0.5] == [one["id"] for one in named["images"]]
    assert next(one for one in results if one["image_id"] == 11) == {"image_id": 11, "category_id": 1} | {
        key: found[10]["detections"][0][key] for key in ("bbox", "score")
    }
    note = json.loads((output / "predict.json").read_text())
    assert (note["images"], note["failed"], note["batch_size"], note["decoding"]) == (40, 1, 4, "exact")
    assert sorted(path.name for path in output.parent.iterdir()) == ["out"], "nothing else is left"


def test_what_a_bundle_may_lack_is_said(
    tiny_bundle: Path, images: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    # A bundle of 24 candidates, all of which find one and the same box: better ones may have been left out.
    bundle = tmp_path / "chosen"
    shutil.copytree(tiny_bundle, bundle)
    model = onnx.load(bundle / "onnx/model.onnx")
    for node in model.graph.node:  # a tensor of the output's name
        for names in (node.input, node.output):
            names[:] = ["raw" if name == "anchors" else name for name in names]
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.arange(24, dtype=np.int32)[np.newaxis], "cells"))
    model.graph.node.append(onnx.helper.make_node("Identity", ["cells"], ["anchors"]))
    model.graph.output.append(onnx.helper.make_tensor_value_info("anchors", onnx.TensorProto.INT32, [1, 24]))
    onnx.save(model, bundle / "onnx/model.onnx")
    anchors = {"name": "anchors", "dtype": "int32", "shape": [None, 24]}
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest |= {"outputs": [*manifest["outputs"], anchors], "candidates": 24, "notes": ["24 are few"]}
    manifest["files"]["onnx/model.onnx"]["bytes"] = (bundle / "onnx/model.onnx").stat().st_size
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    command = (bundle, images / "0000.jpg", images / "0001.jpg", "--engine", "onnxruntime")
    assert run(*command, "-o", tmp_path / "out") == 0
    said = capfd.readouterr().err
    assert "Note: 24 are few" in said
    assert "Note: 2 of them may lack detections, or have other ones, that score below 0.8" in said
    assert all(one["may_lack_below"] == pytest.approx(0.88, abs=0.01) for one in lines(tmp_path / "out"))
    assert run(*command, "--threshold", 0.9, "-o", tmp_path / "best") == 0  # nothing of what is asked for
    assert "may lack" not in capfd.readouterr().err
    assert not any("may_lack_below" in one for one in lines(tmp_path / "best"))


def test_annotations_give_the_ids(tiny_bundle: Path, tiny_coco: Path, tmp_path: Path) -> None:
    data = json.loads(tiny_coco.read_text())
    for table, key in (("images", "id"), ("annotations", "image_id")):
        for one in data[table]:
            one[key] += 500
    for table, key in (("categories", "id"), ("annotations", "category_id")):
        for one in data[table]:
            one[key] += 70
    path = tmp_path / "annotations.json"
    path.write_text(json.dumps(data))
    output = tmp_path / "out"
    assert run(tiny_bundle, tiny_coco.parent / "images", "--data", path, "-o", output, "--batch-size", 2) == 0
    results = json.loads((output / "coco.json").read_text())
    assert {one["image_id"] for one in results} == set(range(501, 507))
    assert {one["category_id"] for one in results} == {71}
    assert not (output / "images.json").exists()
    dataset = CocoDataset.load(path, tiny_coco.parent / "images")
    with Detector(tiny_bundle) as detector:
        labels = dataset.class_to_category(detector.classes)
        found = zip(dataset.images, detector.detect([image.path for image in dataset.images]), strict=True)
        assert results == [row for image, one in found for row in coco_results(image.id, one, labels)]
    assert coco_accuracy(dataset, results).ap == pytest.approx(1)


def test_the_threshold_is_of_what_people_look_at(tiny_bundle: Path, images: Path, tmp_path: Path) -> None:
    image = images / "0000.jpg"
    counts = {}
    for threshold in (None, 0.01, 0.95):
        output = tmp_path / f"out{threshold}"
        assert run(tiny_bundle, image, "-o", output, *([] if threshold is None else ["--threshold", threshold])) == 0
        counts[threshold] = (
            len(lines(output)[0]["detections"]),
            len(json.loads((output / "coco.json").read_text())),
        )
    assert counts[0.01][0] == counts[0.01][1] >= 1, "all that NMS left"
    assert counts == {None: (1, counts[0.01][1]), 0.01: counts[0.01], 0.95: (0, counts[0.01][1])}
    with Detector(tiny_bundle) as detector:
        found = [len(detector.detect(image, threshold=one)[0].scores) for one in (0.5, 0, 0.95)]
        assert found == [1, counts[0.01][1], 0] and len(detector.detect(image)[0].scores) == 1


def test_a_file_of_the_users_among_results_is_never_removed(
    tiny_bundle: Path, images: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    command = (tiny_bundle, images / "0000.jpg", "-o", output, "--draw", "--force")
    assert run(*command) == 0
    for name in ("mine.txt", "pictures/000009-mine.jpg"):
        (output / name).touch()
        before = demo_bundles.snapshot(tmp_path)
        assert run(*command) == 2
        assert f"holds {name}, which gfldeploy did not write" in capfd.readouterr().err
        assert demo_bundles.snapshot(tmp_path) == before
        (output / name).unlink()
    for bundle, read in ((output, images / "0000.jpg"), (tiny_bundle, output / "pictures")):
        assert run(bundle, read, "-o", output, "--force") == 2
    copied = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    for place in (copied, copied / "found"):
        assert run(copied, images / "0000.jpg", "-o", place, "--force") == 2
        assert "gfldeploy did not write" in (said := capfd.readouterr().err) or "is the bundle that is read" in said
    assert demo_bundles.snapshot(copied) == demo_bundles.snapshot(tiny_bundle)


def test_pictures(tiny_bundle: Path, images: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    assert run(tiny_bundle, images / "0003.jpg", images / "0009.jpg", images / "0001.jpg", "-o", output, "--draw") == 1
    assert [path.name for path in sorted((output / "pictures").iterdir())] == ["000001-0003.jpg", "000003-0001.jpg"]
    picture = cv2.imread(str(output / "pictures" / "000003-0001.jpg"))
    assert picture is not None and picture.shape == (80, 48, 3)


def test_a_video(tiny_bundle: Path, images: Path, tmp_path: Path) -> None:
    path, output = tmp_path / "clip.avi", tmp_path / "out"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 10, (80, 48))
    for number in range(11):
        writer.write(np.full((48, 80, 3), 20 * number, np.uint8))
    writer.release()
    assert run(tiny_bundle, images / "0000.jpg", path, "-o", output, "--batch-size", 4, "--draw") == 0
    image, *frames = lines(output)
    assert "frame" not in image
    assert [one["frame"] for one in frames] == list(range(11))
    assert [one["time_s"] for one in frames] == [number / 10 for number in range(11)]
    assert {(one["file"], one["height"], one["width"], len(one["detections"])) for one in frames} == {
        (str(path), 48, 80, 1)
    }
    named = json.loads((output / "images.json").read_text())["images"]
    assert [one["file_name"] for one in named] == [str(images / "0000.jpg"), *(f"{path}#{k}" for k in range(11))]
    assert [one.name for one in sorted((output / "pictures").iterdir())] == ["000001-0000.jpg", "000002-clip.mp4"]
    drawn = cv2.VideoCapture(str(output / "pictures" / "000002-clip.mp4"))
    assert (drawn.get(cv2.CAP_PROP_FRAME_COUNT), drawn.get(cv2.CAP_PROP_FPS)) == (11, 10)
    drawn.release()


def test_parts_are_merged(tiny_bundle: Path, images: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    command = (tiny_bundle, images, "--threads", 1, "-o")
    assert run(*command, tmp_path / "one") == 1
    for number in (1, 2):
        assert run(*command, tmp_path / f"part{number}", "--shard", f"{number}/2") == (number == 1)
    assert "8 images in" in capfd.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        main(["merge", *map(str, (tmp_path / "part2", tmp_path / "part1", "-o", tmp_path / "found"))])
    shown, said = capfd.readouterr()
    assert (stopped.value.code, shown) == (1, f"{tmp_path / 'found'}\n")
    assert "40 images in" in said and "39 detections with a score of at least 0.5; 1 could not be read:" in said
    assert demo_bundles.snapshot(tmp_path / "found") == demo_bundles.snapshot(tmp_path / "one")


def test_names_of_any_kind(tiny_bundle: Path, images: Path, tmp_path: Path) -> None:
    folder = tmp_path / "zwölf"
    folder.mkdir()
    names = ['say "no".jpg', "two\nlines.jpg", "\udcff.jpg", "日本.jpg"]
    for name in names:
        shutil.copy(images / "0000.jpg", folder / name)
    (folder / "bad\n.jpg").write_text("no picture")
    assert run(tiny_bundle, folder, "-o", tmp_path / "out", "--draw") == 1
    found = lines(tmp_path / "out")
    assert [one["file"] for one in found] == sorted(str(folder / name) for name in [*names, "bad\n.jpg"])
    assert len(list((tmp_path / "out" / "pictures").iterdir())) == 4


def test_results_are_replaced_only_on_request(
    tiny_bundle: Path, images: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    assert run(tiny_bundle, images, "-o", output) == 1
    before = demo_bundles.snapshot(output)
    assert run(tiny_bundle, images / "0000.jpg", "-o", output) == 2
    assert "exists already" in capfd.readouterr().err
    assert demo_bundles.snapshot(output) == before
    assert run(tiny_bundle, images / "0000.jpg", "-o", output, "--force") == 0
    assert len(lines(output)) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    (output / "mine.txt").touch()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").touch()
    assert run(tiny_bundle, images, "-o", tmp_path / "other", "--force") == 2
    assert "gfldeploy did not write" in capfd.readouterr().err
    (tmp_path / "loop").symlink_to("loop")
    assert run(tiny_bundle, images, "-o", tmp_path / "loop") == 2
    assert "loop' is no path: Too many levels of symbolic links" in capfd.readouterr().err


def test_the_output_is_not_among_the_inputs(tiny_bundle: Path, images: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(images, tmp_path / "images"))
    for _ in range(2):
        assert run(tiny_bundle, folder, "-o", folder / "out", "--draw", "--force") == 1
        assert len(lines(folder / "out")) == 40


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("BUNDLE",), "there is nothing to detect in"),
        (("BUNDLE", "IMAGES", "nowhere.jpg"), "there is no nowhere.jpg"),
        (("BUNDLE", ""), "'' is no path"),
        (("nowhere", "IMAGES"), "there is no nowhere"),
        (("BUNDLE", "IMAGES", "--precision", "int8"), "int8 is not possible"),
        (("BUNDLE", "IMAGES", "--engine", "paddle"), "paddle fp32 on cpu is not possible: the bundle tiny has no"),
        (("BUNDLE", "IMAGES", "--engine", "openvino", "--device", "gpu"), "openvino fp32 on gpu is not possible"),
        (("BUNDLE", "IMAGES", "IMAGES", "--data", "DATA"), "with --data, INPUT is the folder"),
        (("BUNDLE", "IMAGES", "--threshold", "1.5"), "1.5 is not in the range"),
        (("BUNDLE", "BAD"), "none of 1 images can be used: "),
        (("BUNDLE", "IMAGES", "--shard", "3/2"), "'3/2' is not a part such as 1/8"),
        (("BUNDLE", "IMAGES", "--shard", "1/2", "--draw"), "a part has no pictures. Give --draw to `gfldeploy merge`"),
        (("BUNDLE", "IMAGES", "--draw-threshold", "0.7"), "--draw-threshold is of pictures, and there are none. Add"),
        (
            ("BUNDLE", "IMAGES", "--draw", "--draw-threshold", "0.3"),
            "0.3, and what is shown scores from 0.5 to 1",
        ),
    ],
)
def test_mistakes_are_one_line(
    arguments: tuple[str, ...],
    message: str,
    tiny_bundle: Path,
    tiny_coco: Path,
    images: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    words = {"BUNDLE": tiny_bundle, "DATA": tiny_coco, "IMAGES": images, "BAD": images / "0009.jpg"}
    assert run(*(words.get(word, word) for word in arguments), "-o", tmp_path / "out") == 2
    error = capfd.readouterr().err.splitlines()[-1]
    assert error.startswith("Error:") and message in error
    assert list(tmp_path.iterdir()) == []


# --- interrupted and killed -------------------------------------------------------------------------------------------


def unfinished(output: Path, length: int, source: Path, *arguments: object) -> Path:
    """What a run that was killed leaves when so many bytes were written: the head of a whole run's working file."""
    working = output.with_name(f"{output.name}.unfinished")
    working.mkdir()
    mark(working)
    (working / "working.jsonl").write_bytes(source.read_bytes()[:length])
    return working


def mark(working: Path) -> None:
    (working / ".made-by-gfldeploy").write_text("gfldeploy predict, on its way to out\n")


def test_a_run_that_was_cut_anywhere_ends_with_the_same_bytes(
    tiny_bundle: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gfldeploy.predict import outputs, session

    kept = tmp_path / "working.jsonl"
    write = outputs.write_outputs

    def and_keep(directory: Path, *arguments: Any) -> Any:
        written = write(directory, *arguments)
        shutil.copyfile(directory.parent / "working.jsonl", kept)
        return written

    monkeypatch.setattr(session, "write_outputs", and_keep)
    command = (tiny_bundle, images, "--batch-size", 4, "--threads", 1)
    assert run(*command, "-o", tmp_path / "whole") == 1
    whole = demo_bundles.snapshot(tmp_path / "whole")
    source = Path(shutil.copyfile(kept, tmp_path / "source.jsonl"))
    chooser = random.Random(0)
    for number in range(12):
        output = tmp_path / f"out{number}"
        unfinished(output, chooser.randrange(source.stat().st_size + 1), source)
        assert run(*command, "-o", output) == 1
        assert demo_bundles.snapshot(output) == whole
        assert kept.read_bytes() == source.read_bytes()


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_streams_give_the_same_bytes(
    engine: str, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of images of several sizes; only what the note says of how they were made differs."""
    pytest.importorskip(engine)
    monkeypatch.setattr(base, "usable_threads", lambda: 2)  # on one CPU too: what is tested here is not speed
    folder = write_images(tmp_path / "many", 24)  # of which one cannot be read
    found = []
    for streams, threads in ((1, 2), (2, 1)):
        output = tmp_path / str(streams)
        options = ("--engine", engine, "--streams", streams, "--threads", threads)
        assert run(tiny_bundle, folder, *options, "-o", output) == 1
        assert json.loads((output / "predict.json").read_text())["streams"] == streams
        found.append({name: (output / name).read_bytes() for name in ("detections.jsonl", "coco.json", "images.json")})
    assert found[0] == found[1]


def test_an_unfinished_run_of_other_options(
    tiny_bundle: Path, images: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    working = output.with_name("out.unfinished")
    working.mkdir()
    (working / "working.jsonl").write_text('{"form": 2, "bundle": "ab"}\n')
    (working / "results" / "pictures").mkdir(parents=True)
    (working / "results" / "pictures" / "000001-old.jpg").touch()
    assert run(tiny_bundle, images, "-o", output, "--force") == 2
    assert "out.unfinished is needed for unfinished work, and gfldeploy did not make it" in capfd.readouterr().err
    mark(working)
    assert run(tiny_bundle, images, "-o", output) == 2
    error = capfd.readouterr().err
    assert "out.unfinished is of an unfinished run with other bundle, " in error and "--force" in error
    assert run(tiny_bundle, images, "-o", output, "--force") == 1
    assert len(lines(output)) == 40
    names = sorted(path.name for path in output.iterdir())
    assert names == ["coco.json", "detections.jsonl", "images.json", "predict.json"]


def test_an_unfinished_run_of_another_input_size(
    tiny_bundle: Path, images: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    command = (tiny_bundle, images, "--threads", 1, "-o")
    small, output = tmp_path / "small", tmp_path / "out"
    assert run(*command, small, "--input-size", "32x48") == 1
    note = json.loads((small / "predict.json").read_text())
    question = {
        key: value for key, value in note.items() if key not in ("what", "images", "failed", "detections", "files")
    }
    assert question["input_size"] == [32, 48]
    working = output.with_name("out.unfinished")
    working.mkdir()
    mark(working)
    (working / "working.jsonl").write_text(f"{json.dumps({'form': 2, **question})}\n")
    for other in ((), ("--input-size", "48x64")):
        capfd.readouterr()
        assert run(*command, output, *other) == 2
        assert "is of an unfinished run with other input size" in capfd.readouterr().err
    assert run(*command, output, "--input-size", "32x48") == 1, "resumed"
    assert (output / "coco.json").read_bytes() == (small / "coco.json").read_bytes()
    assert run(*command, tmp_path / "own", "--input-size", "64x96") == 1
    assert "input_size" not in json.loads((tmp_path / "own" / "predict.json").read_text()), "the bundle's own"


def test_two_at_once_are_refused(
    tiny_bundle: Path, images: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with unfinished_beside(tmp_path / "out", "predict", ""):
        assert run(tiny_bundle, images, "-o", tmp_path / "out") == 2
    assert "another gfldeploy is working on" in capfd.readouterr().err


def start(folder: Path, *arguments: object) -> subprocess.Popen[str]:
    script = demo_bundles.command(("predict", *arguments), "", folder)
    return subprocess.Popen(script, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def stop_at(process: subprocess.Popen[str], working: Path, size: int, number: signal.Signals) -> str:
    """Signal the process once its working file has so many bytes; what it said."""
    while process.poll() is None:
        if working.exists() and working.stat().st_size >= size:
            process.send_signal(number)
            break
        time.sleep(0.001)
    return process.communicate(timeout=60)[1]


@pytest.mark.slow
def test_killed_again_and_again_it_ends_with_the_same_bytes(tiny_bundle: Path, tmp_path: Path) -> None:
    folder = write_images(tmp_path / "images", 600)
    options = (tiny_bundle, folder, "--batch-size", 2, "--threads", 1)
    assert run(*options, "-o", tmp_path / "whole") == 1
    whole = demo_bundles.snapshot(tmp_path / "whole")
    output = tmp_path / "out"
    working = tmp_path / "out.unfinished" / "working.jsonl"
    chooser = random.Random(1)
    least, killed = 0, 0
    while killed < 5 and not output.exists():
        with start(tmp_path, *options, "-o", output) as process:
            stop_at(process, working, least + chooser.randrange(1, 12_000), signal.SIGKILL)
        killed += process.returncode == -signal.SIGKILL
        least = working.stat().st_size if working.exists() else least
    assert killed > 0
    if not output.exists():
        done = demo_bundles.run("predict", *options, "-o", output, folder=tmp_path)
        assert done.returncode == 1, done.stderr
    assert demo_bundles.snapshot(output) == whole
    assert not working.parent.exists()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_it_says_so_and_goes_on(
    number: signal.Signals, tiny_bundle: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = write_images(tmp_path / "images", 600)
    output = tmp_path / "out"
    with start(tmp_path, tiny_bundle, folder, "-o", output) as process:
        said = stop_at(process, tmp_path / "out.unfinished" / "working.jsonl", 3000, number)
    assert process.returncode == 130
    assert "the same command resumes from there" in said and "Traceback" not in said
    assert not output.exists()
    assert run(tiny_bundle, folder, "-o", output) == 1
    assert re.search(r"600 images \(\d+ of them by an earlier run\) in ", capfd.readouterr().err)
    assert len(lines(output)) == 600
