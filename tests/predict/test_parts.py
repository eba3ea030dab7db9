"""Parts of a prediction: merged in any order they are the bytes of one run, and whatever is wrong is named."""

from __future__ import annotations

import itertools
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import demo_bundles
import numpy as np
import pytest
from recorded_progress import RecordedProgress

from gfldeploy.errors import DataError, OutputError, UsageError
from gfldeploy.files import sha256
from gfldeploy.machine import describe_machine
from gfldeploy.predict import session
from gfldeploy.predict.parts import merge_parts
from gfldeploy.predict.session import predict_images

pytest.importorskip("onnxruntime")

COUNT = 100  # of images, which are 4 shards
SIZES = [(48, 80), (80, 48), (64, 64)]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of which one is damaged."""
    folder = tmp_path_factory.mktemp("parts") / "images"
    folder.mkdir()
    source = np.random.default_rng(0)
    for number in range(COUNT):
        picture = source.integers(0, 256, (*SIZES[number % 3], 3), np.uint8)
        assert cv2.imwrite(str(folder / f"{number:03d}.jpg"), picture)
    (folder / "040.jpg").write_bytes(b"no picture")
    return folder


Predict = Callable[..., Path]
Snapshot = dict[str, bytes | None]


@pytest.fixture(scope="module")
def predict(tiny_bundle: Path, images: Path) -> Predict:
    def made(output: Path, shard: tuple[int, int] | None = None, **given: Any) -> Path:
        settings = {"engine": "onnxruntime", "threads": 1, "inputs": images, **given}
        predict_images(tiny_bundle, output=output, shard=shard, **settings)
        return output

    return made


@pytest.fixture(scope="module")
def whole(predict: Predict, tmp_path_factory: pytest.TempPathFactory) -> Snapshot:
    return demo_bundles.snapshot(predict(tmp_path_factory.mktemp("whole") / "found"))


@pytest.fixture(scope="module")
def made(predict: Predict, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three parts. Read them, do not change them."""
    folder = tmp_path_factory.mktemp("made")
    return [predict(folder / str(number), (number, 3)) for number in (1, 2, 3)]


@pytest.fixture
def parts(made: list[Path], tmp_path: Path) -> list[Path]:
    """Copies of them."""
    return [Path(shutil.copytree(one, tmp_path / f"part{one.name}")) for one in made]


def test_merged_in_any_order_they_are_the_bytes_of_one_run(made: list[Path], whole: Snapshot, tmp_path: Path) -> None:
    for number, order in enumerate(itertools.permutations(made)):
        found = merge_parts(order, output=tmp_path / str(number))
        assert demo_bundles.snapshot(tmp_path / str(number)) == whole
        assert (found.images, found.failed, found.detections) == (COUNT, 1, COUNT - 1)
        assert "040.jpg" in found.reasons[0]


def test_more_parts_than_shards(predict: Predict, whole: Snapshot, tmp_path: Path) -> None:
    parts = [predict(tmp_path / str(number), (number, 7)) for number in range(1, 8)]
    counts = [json.loads((one / "predict.json").read_text())["images"] for one in parts]
    assert sum(counts) == COUNT and counts.count(0) == 3
    merge_parts(parts[::-1], output=tmp_path / "found")
    assert demo_bundles.snapshot(tmp_path / "found") == whole


def test_annotations_and_videos(predict: Predict, tiny_coco: Path, images: Path, tmp_path: Path) -> None:
    video = tmp_path / "clip.avi"
    writer = cv2.VideoWriter(str(video), cv2.VideoWriter.fourcc(*"MJPG"), 10, (80, 48))
    for number in range(45):
        writer.write(np.full((48, 80, 3), 5 * number, np.uint8))
    writer.release()
    inputs = [images / "000.jpg", video, *sorted(images.iterdir())[1:40]]
    for name, given in (
        ("ids", {"inputs": (), "data": tiny_coco}),
        ("video", {"inputs": inputs, "batch_size": 4, "order": "listed"}),
    ):
        one = predict(tmp_path / name, **given)
        made = [predict(tmp_path / f"{name}{number}", (number, 2), **given) for number in (1, 2)]
        merge_parts(made, output=tmp_path / f"{name} merged")
        assert demo_bundles.snapshot(tmp_path / f"{name} merged") == demo_bundles.snapshot(one)


def test_pictures_are_drawn_where_parts_are_merged(
    predict: Predict, images: Path, made: list[Path], tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=r"a part has no pictures. Give --draw to `gfldeploy merge`"):
        predict(tmp_path / "drawn", (1, 3), draw=True)
    assert list(tmp_path.iterdir()) == []
    given = {"draw": True, "draw_threshold": 0.7, "inputs": iter(sorted(images.iterdir()))}
    merge_parts(made, output=tmp_path / "merged", draw=True, draw_threshold=0.7)
    assert demo_bundles.snapshot(tmp_path / "merged") == demo_bundles.snapshot(predict(tmp_path / "one", **given))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((), "there are no parts to merge. Give the folders"),
        ((0, 2), "of 3 parts 2 is missing. Give its folder too, or run --shard 2/3"),
        ((1,), "of 3 parts 1, 3 are missing. Give their folders too, or run --shard 1/3"),
        ((0, 1, 1, 2), r"part2 and .*part2 are both part 2 of 3. Give each part once"),
    ],
)
def test_what_is_missing_or_twice(
    given: tuple[int, ...], message: str, parts: list[Path], tmp_path: Path, made: list[Path]
) -> None:
    with pytest.raises(DataError, match=message):
        merge_parts([parts[place] for place in given], output=tmp_path / "found")
    assert not (tmp_path / "found").exists()


@pytest.mark.parametrize(
    ("number", "of", "given", "other"),
    [
        (2, 3, {"batch_size": 2}, "batch size"),
        (2, 3, {"threshold": 0.2}, "threshold"),
        (2, 3, {"decode": "fast"}, "decoding"),
        (2, 3, {"input_size": (32, 48)}, "input size"),
        (2, 4, {}, "number of parts"),
    ],
)
def test_a_part_of_another_run(
    number: int,
    of: int,
    given: dict[str, Any],
    other: str,
    predict: Predict,
    parts: list[Path],
    images: Path,
    tmp_path: Path,
) -> None:
    foreign = predict(tmp_path / "foreign", (number, of), **given)
    for place in range(3):  # wherever it is named
        several = [parts[0], parts[2]]
        several.insert(place, foreign)
        with pytest.raises(DataError, match=f"foreign is not of the run of .*part.: other {other}. Leave it out, or"):
            merge_parts(several, output=tmp_path / "found")


def test_a_part_of_other_inputs_or_another_bundle(
    predict: Predict, tiny_bundle: Path, parts: list[Path], images: Path, tmp_path: Path
) -> None:
    touched = Path(shutil.copytree(images, tmp_path / "images")) / "000.jpg"
    bundle = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    manifest = json.loads((bundle / "manifest.json").read_text())
    (bundle / "manifest.json").write_text(json.dumps({**manifest, "notes": ["another"]}))
    predict(tmp_path / "inputs", (2, 3), inputs=touched.parent)
    predict_images(bundle, images, output=tmp_path / "bundle2", shard=(2, 3), engine="onnxruntime", threads=1)
    for name, other in (("inputs", "inputs"), ("bundle2", "bundle")):
        with pytest.raises(DataError, match=f"{name} is not of the run of .*: other {other}. "):
            merge_parts([parts[0], tmp_path / name, parts[2]], output=tmp_path / "found")


def test_other_processors_are_recorded(parts: list[Path], whole: Snapshot, tmp_path: Path) -> None:
    changed_note(parts[1], lambda note: {**note, "processor": "another"})
    lines = (parts[1] / "records.jsonl").read_text().splitlines()
    lines[0] = json.dumps({**json.loads(lines[0]), "processor": "another"})
    rewrite(parts[1], "\n".join(lines) + "\n")
    progress = RecordedProgress()
    merge_parts(parts, output=tmp_path / "found", progress=progress)
    found = demo_bundles.snapshot(tmp_path / "found")
    note = json.loads((tmp_path / "found" / "predict.json").read_text())
    assert "another" in note["processor"] and len(note["processor"]) == 2
    assert "the parts ran on several processors" in progress.notes[0]
    assert {name for name in whole if found[name] != whole[name]} == {"predict.json"}


@pytest.mark.parametrize("named", [["another"], ["another", "and one more"]])
def test_a_part_done_on_a_cluster_names_the_processors_there(
    named: list[str], parts: list[Path], tmp_path: Path
) -> None:
    changed_note(parts[1], lambda note: {**note, "processor": named if len(named) > 1 else named[0]})
    merge_parts(parts, output=tmp_path / "found")
    found = json.loads((tmp_path / "found" / "predict.json").read_text())["processor"]
    assert {*named} < {*found} and len(found) == 1 + len(named)


def changed_note(part: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = part / "predict.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


def rewrite(part: Path, records: str) -> None:
    (part / "records.jsonl").write_text(records)
    changed_note(part, lambda note: {**note, "records": sha256(part / "records.jsonl")})


def without_a_shard(part: Path) -> None:
    rewrite(part, "".join((part / "records.jsonl").read_text().splitlines(keepends=True)[:-1]))


def flipped(part: Path) -> None:
    data = bytearray((part / "records.jsonl").read_bytes())
    data[len(data) // 2] ^= 1
    (part / "records.jsonl").write_bytes(data)


def of_other_images(part: Path) -> None:
    """Three of them are there twice instead of others; the sums of their places and of the squares are right."""
    text = (part / "records.jsonl").read_text()
    for before, after in ((0, 1), (4, 2), (5, 6)):
        text = text.replace(f'{{"index": {before}, ', f'{{"index": {after}, ')
    rewrite(part, text)


def a_file(part: Path) -> None:
    shutil.rmtree(part)
    part.touch()


def a_pipe(part: Path) -> None:
    (part / "records.jsonl").unlink()
    os.mkfifo(part / "records.jsonl")


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "gone": (shutil.rmtree, "part2 is no part: it is not there"),
    "a file": (a_file, "part2/predict.json cannot be read|part2 is no part"),
    "no note": (lambda part: (part / "predict.json").unlink(), "part2 is no part: it has no predict.json"),
    "no records": (lambda part: (part / "records.jsonl").unlink(), "part2 is damaged: it has no records.jsonl"),
    "a pipe": (a_pipe, "part2 is damaged: it has no records.jsonl"),
    "junk": (
        lambda part: (part / "records.jsonl").write_bytes(b"\0\n"),
        r"part2 is damaged: .*--shard 2/3 and --force",
    ),
    "flipped": (flipped, r"part2 is damaged: .* not as it was written. Run its command again, with --shard 2/3 and"),
    "not whole": (without_a_shard, "part2 is damaged: not all of its shards are there"),
    "other images": (of_other_images, "records.jsonl cannot be read: of 32 numbers 32 are missing or came twice"),
    "fewer images": (lambda part: changed_note(part, lambda note: {**note, "images": 31}), "it has 32 images, and its"),
    "a processor": (lambda part: changed_note(part, lambda note: {**note, "processor": [1]}), "must be of type"),
    "results": (
        lambda part: changed_note(part, lambda note: {**note, "what": "results of gfldeploy predict"}),
        "predict.json is not of a part",
    ),
    "a list": (lambda part: changed_note(part, lambda note: [note]), "predict.json is not of a part"),
    "no number": (lambda part: changed_note(part, lambda note: {**note, "part": "4/3"}), "numbers that cannot be"),
    "no inputs": (lambda part: changed_note(part, lambda note: {**note, "listed": 0}), "numbers that cannot be"),
    "no text": (
        lambda part: changed_note(part, lambda note: {**note, "classes": [1]}),
        r"classes\[0\] must be of type",
    ),
    "ids": (lambda part: changed_note(part, lambda note: {**note, "ids": [1]}), "has other ids than it needs"),
    "more": (lambda part: changed_note(part, lambda note: {**note, "listed": 10**17}), "other listed"),
    "another": (lambda part: changed_note(part, lambda note: {**note, "part": "1/3"}), "are not of one another"),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.posix if name == "a pipe" else ()) for name in DAMAGE]
)
def test_a_damaged_part_is_named(name: str, parts: list[Path], tmp_path: Path) -> None:
    damage, message = DAMAGE[name]
    damage(parts[1])
    with pytest.raises(DataError, match=message):
        merge_parts(parts, output=tmp_path / "found")
    assert sorted(one.name for one in tmp_path.iterdir() if not one.name.startswith("part")) == []


def test_a_part_resumes(predict: Predict, made: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stops(RecordedProgress):
        def step(self, label: str, done: int, total: int) -> None:
            if done == stop:
                raise KeyboardInterrupt

    for stop in (1, 20, 32):
        output = tmp_path / str(stop)
        with pytest.raises(KeyboardInterrupt) as stopped:
            predict(output, (2, 3), progress=Stops())
        assert "the same command resumes from there" in stopped.value.__notes__[0]
        for given in (output, output.with_name(f"{stop}.unfinished")):
            with pytest.raises(DataError, match=r"is unfinished\. Run its command again: it resumes"):
                merge_parts([made[0], given, made[2]], output=tmp_path / "found")
        with pytest.raises(OutputError, match="an unfinished run with other part"):
            predict(output, (3, 3))
        predict(output, (2, 3))
        assert demo_bundles.snapshot(output) == demo_bundles.snapshot(made[1])


def test_a_part_that_was_killed_before_its_last_step(
    predict: Predict, made: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "part"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(session, "publish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        predict(output, (2, 3))
    assert (tmp_path / "part.unfinished" / "results" / "records.jsonl").exists()
    monkeypatch.setattr(session, "ShardWorker", None)  # nothing is done again
    predict(output, (2, 3))
    assert demo_bundles.snapshot(output) == demo_bundles.snapshot(made[1])


def test_a_part_is_replaced_on_request(predict: Predict, made: list[Path], tmp_path: Path) -> None:
    output = Path(shutil.copytree(made[0], tmp_path / "out"))
    with pytest.raises(OutputError, match="exists already"):
        predict(output, (2, 3))
    predict(output, (2, 3), force=True)
    assert demo_bundles.snapshot(output) == demo_bundles.snapshot(made[1])
    merge_parts(made, output=output, force=True)
    assert (output / "detections.jsonl").exists() and not (output / "records.jsonl").exists()
    with pytest.raises(OutputError, match="would replace"):
        merge_parts([output, *made], output=output, force=True)


def test_a_part_that_is_there_already_is_done(
    predict: Predict,
    parts: list[Path],
    tiny_bundle: Path,
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A scheduler starts a job again that had ended, maybe on another machine."""
    part, before = parts[1], demo_bundles.snapshot(parts[1])
    machine = describe_machine()
    progress = RecordedProgress()
    killed = part.with_name(f"{part.name}.unfinished")  # between its last step and its end
    killed.mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(session, "describe_machine", lambda: replace(machine, cpu="another"))
        patch.setattr(session, "ShardWorker", None)  # nothing is done again
        found = predict_images(
            tiny_bundle, images, output=part, engine="onnxruntime", threads=1, shard=(2, 3), progress=progress
        )
    assert (found.images, found.failed, found.kept) == (32, 1, 32) and "this part already" in str(progress.notes)
    assert not killed.exists()
    for other in ({"threshold": 0.4}, {"batch_size": 2}, {"inputs": images / "000.jpg"}):
        with pytest.raises(OutputError, match="exists already"):
            predict(part, (2, 3), **other)
    assert demo_bundles.snapshot(part) == before
    sized = predict(tmp_path / "sized", (2, 3), input_size=(32, 48))
    with pytest.raises(OutputError, match="exists already"):  # nor with fewer options
        predict(sized, (2, 3))
    with (part / "records.jsonl").open("ab") as file:
        file.write(b"\n")
    with pytest.raises(OutputError, match="exists already"):
        predict(part, (2, 3))


@pytest.mark.parametrize("shard", [(0, 3), (4, 3), (-1, -1)])
def test_no_part(shard: tuple[int, int], predict: Predict, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="shard must be"):
        predict(tmp_path / "out", shard)
