"""Images and results at addresses of filesystems: an object store of this process, over a connection that breaks."""

from __future__ import annotations

import json
import shutil
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
from object_store import BUCKET, Store, running_store

from gfldeploy import Detector, merge_parts, predict_images, storage
from gfldeploy.errors import DataError, GfldeployError, MissingDependencyError, OutputError, ServerError
from gfldeploy.images.decode import image_size, read_image
from gfldeploy.predict.sources import list_inputs, picture_of, picture_sizes, pictures, read_list
from gfldeploy.storage import Url, source_of

pytest.importorskip("s3fs")
pytest.importorskip("moto")
pytest.importorskip("onnxruntime")
RESULTS = ("detections.jsonl", "coco.json", "images.json")


@pytest.fixture(scope="module")
def running() -> Iterator[Store]:
    with running_store() as store:
        yield store


@pytest.fixture
def store(running: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """With nothing that breaks; what predictions keep is in `tmp_path`."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    running.proxy.breaks = lambda line: False
    running.proxy.after_bytes = running.proxy.answered_bytes = 0
    running.proxy.lines.clear()
    return running


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_coco: Path) -> Path:
    """Images, folders, a video, and what cannot be read. Read it, do not change it."""
    folder = tmp_path_factory.mktemp("address") / "a b%20c"
    shutil.copytree(tiny_coco.parent / "images", folder / "z")
    for name in ("1.jpg", "é.jpg", "b/2.jpg", ".hidden/3.jpg", "#?.JPEG"):
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copy(folder / "z" / "1.jpg", folder / name)
    noise = np.random.default_rng(0).integers(0, 256, (300, 400, 3), np.uint8)
    cv2.imwrite(str(folder / "noise.png"), noise)
    cv2.imwrite(str(folder / "noise.tif"), noise)
    (folder / "cut.png").write_bytes((folder / "noise.png").read_bytes()[:-20])
    (folder / "cut.jpg").write_bytes((folder / "1.jpg").read_bytes()[:-20])
    (folder / "empty.jpg").touch()
    (folder / "text.png").write_text("no picture")
    (folder / "notes.txt").write_text("no picture")
    writer = cv2.VideoWriter(str(folder / "b" / "film.avi"), cv2.VideoWriter.fourcc(*"MJPG"), 10.0, (80, 48))
    for number in range(5):
        writer.write(np.full((48, 80, 3), 20 * number, np.uint8))
    writer.release()
    return folder


def test_results_are_those_of_local_files_but_for_the_names(
    store: Store, folder: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    store.put_folder(folder, folder.name)
    there = f"s3://{BUCKET}/{folder.name}"
    settings = {"batch_size": 2, "threads": 1, "draw": True}
    local = predict_images(tiny_bundle, folder, output=tmp_path / "local", **settings)  # type: ignore[arg-type]
    found = predict_images(tiny_bundle, there, output=tmp_path / "found", **settings)  # type: ignore[arg-type]
    assert (found.images, found.failed, found.detections) == (local.images, local.failed, local.detections)
    assert (local.images, local.failed) == (21, 4)
    for name in RESULTS:
        text = (tmp_path / "local" / name).read_text()
        assert (tmp_path / "found" / name).read_text() == text.replace(str(folder), there)
    names = sorted(path.name for path in (tmp_path / "local" / "pictures").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "found" / "pictures").iterdir())
    for name in names:
        if name.endswith(".jpg"):
            picture = (tmp_path / "local" / "pictures" / name).read_bytes()
            assert (tmp_path / "found" / "pictures" / name).read_bytes() == picture


def test_a_folder_is_listed_as_a_local_one(store: Store, folder: Path) -> None:
    store.put_folder(folder, "listed")
    store.put("listed/marker/", b"")
    store.put("listed-not/5.jpg", b"")
    notes: tuple[list[str], list[str]] = ([], [])
    there = Url(f"s3://{BUCKET}/listed")
    local = [path.relative_to(folder).as_posix() for path in list_inputs([folder], (), notes[0].append)]  # type: ignore[union-attr]
    assert [str(one).removeprefix(f"{there}/") for one in list_inputs([there], (), notes[1].append)] == local
    assert notes[1] == notes[0] != []
    assert len(list_inputs([Url(f"{there}/")], [there / "b"])) == len(local) - 2
    with pytest.raises(DataError, match="there is no s3://images/nowhere"):
        list_inputs([Url(f"s3://{BUCKET}/nowhere")])
    with pytest.raises(DataError, match=r"there are no images in .*marker"):
        list_inputs([there / "marker"])
    with pytest.raises(DataError, match="there is no s3://no-such-bucket"):
        list_inputs([Url("s3://no-such-bucket/a")])


def test_the_size_of_a_large_image_takes_few_bytes(store: Store, tmp_path: Path) -> None:
    path = tmp_path / "large.jpg"
    cv2.imwrite(str(path), np.random.default_rng(0).integers(0, 256, (1500, 2000, 3), np.uint8))
    store.put("large.jpg", path.read_bytes())
    url = Url(f"s3://{BUCKET}/large.jpg")
    assert image_size(url) == (1500, 2000)
    assert store.proxy.answered_bytes < 40_000 < path.stat().st_size
    assert len(store.proxy.lines) == 1, "one request, and no listing"
    np.testing.assert_array_equal(read_image(url), read_image(path))
    assert len(store.proxy.lines) == 2


def test_files_larger_than_a_request_and_than_the_limit(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "_WHOLE_BYTES", 1000)
    content = np.random.default_rng(0).bytes(2500)
    store.put("some", content)
    url = Url(f"s3://{BUCKET}/some")
    assert storage.read_url(url, 2500) == content
    assert storage.read_range(url, 2400, 9000) == content[2400:]
    assert storage.read_range(url, 2500, 9000) == storage.read_range(url, 9000, 9001) == b""
    with pytest.raises(DataError, match=r"the image file s3://images/some has 0.0 GB"):
        storage.read_url(url, 2499)
    store.put("none", b"")
    assert storage.read_url(Url(f"s3://{BUCKET}/none"), 10) == b""
    with storage.open_url(url, 2500) as file:
        assert (file.read(10), file.seek(-5, 2), file.read()) == (content[:10], 2495, content[-5:])
        file.seek(1000)
        assert file.read(700) == content[1000:1700]
        file.seek(5)
        assert file.read() == content[5:]


def test_a_connection_that_breaks_is_tried_again_and_then_an_error_of_its_image(
    store: Store, folder: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    store.put_folder(folder / "z", "broken")
    there, seen = f"s3://{BUCKET}/broken", set[str]()

    def once(line: str) -> bool:
        return line not in seen and not seen.add(line)  # type: ignore[func-returns-value]

    predict_images(tiny_bundle, folder / "z", output=tmp_path / "local", threads=1)
    for after_bytes in (0, 400):
        store.proxy.breaks, store.proxy.after_bytes = once, after_bytes
        seen.clear()
        predict_images(tiny_bundle, there, output=tmp_path / f"found{after_bytes}", threads=1)
        for name in RESULTS:
            text = (tmp_path / "local" / name).read_text()
            assert (tmp_path / f"found{after_bytes}" / name).read_text() == text.replace(str(folder / "z"), there)
    store.proxy.breaks = lambda line: "/3.jpg" in line
    found = predict_images(tiny_bundle, there, output=tmp_path / "found", threads=1)
    assert (found.images, found.failed) == (6, 1)
    lines = [json.loads(line) for line in (tmp_path / "found" / "detections.jsonl").read_text().splitlines()]
    assert [line["file"] for line in lines if "error" in line] == [f"{there}/3.jpg"]
    assert "the connection broke again and again" in lines[2]["error"]


def test_a_store_that_does_not_answer_is_one_line(
    store: Store, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"s3://{BUCKET}/{number}.jpg" for number in range(3000)]
    (tmp_path / "list.txt").write_text("\n".join(names))
    with socket.create_server(("127.0.0.1", 0)) as free:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free.getsockname()[1]}")
    monkeypatch.setattr(storage, "_stores", {})
    for given in ({"inputs": names[0]}, {"input_list": tmp_path / "list.txt"}):
        with pytest.raises(ServerError, match=r"does not answer: .*Check the address, the network and"):
            predict_images(tiny_bundle, output=tmp_path / "found", **given)
    assert not list(tmp_path.glob("cache/gfldeploy/outputs/*")) and not (tmp_path / "found").exists()
    with pytest.raises(ServerError), Detector(tiny_bundle) as detector:
        detector.detect(names[0])


def test_a_store_that_stops_answering_ends_the_run_which_resumes(
    store: Store, folder: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    store.put_folder(folder / "z", "stops")
    there = f"s3://{BUCKET}/stops"

    def stops(line: str) -> bool:
        return "/5.jpg" in line or any("/5.jpg" in one for one in store.proxy.lines)

    list_inputs([Url(there)])
    store.proxy.breaks = stops
    with pytest.raises(ServerError, match="does not answer"):
        predict_images(tiny_bundle, there, output=tmp_path / "found", threads=1)
    store.proxy.breaks = lambda line: False
    assert predict_images(tiny_bundle, there, output=tmp_path / "found", threads=1).failed == 0


def test_nobody_is_let_in_without_credentials(store: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setattr(storage, "_stores", {})
    with pytest.raises(ServerError, match=r"lets nobody in: .*Check the credentials: AWS_PROFILE"):
        picture_of(f"s3://{BUCKET}/1.jpg")


def test_a_changed_object_is_another_question(store: Store, folder: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    store.put_folder(folder / "z", "changes")
    there = f"s3://{BUCKET}/changes"
    (tmp_path / "list.txt").write_text(f"{there}/1.jpg\n{there}/2.jpg\n")
    for given in ({"inputs": there}, {"input_list": tmp_path / "list.txt"}):
        output = f"s3://{BUCKET}/found-{len(given)}-{next(iter(given))}"
        store.proxy.breaks = lambda line: line.startswith("PUT")
        with pytest.raises((ServerError, DataError, OutputError)):
            predict_images(tiny_bundle, output=output, **given)
        store.put("changes/1.jpg", (folder / "1.jpg").read_bytes() + b"another")
        store.proxy.breaks = lambda line: False
        with pytest.raises(OutputError, match="of an unfinished run with other inputs"):
            predict_images(tiny_bundle, output=output, **given)
        predict_images(tiny_bundle, output=output, force=True, **given)
        store.put("changes/1.jpg", (folder / "1.jpg").read_bytes())


def test_results_at_an_address(store: Store, folder: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    local, output = tmp_path / "local", f"s3://{BUCKET}/found"
    given = {"inputs": folder / "z", "threads": 1, "draw": True}
    predict_images(tiny_bundle, output=local, **given)  # type: ignore[arg-type]
    predict_images(tiny_bundle, output=output, **given)  # type: ignore[arg-type]
    names = sorted(path.relative_to(local).as_posix() for path in local.rglob("*") if path.is_file())
    assert store.keys("found/") == names
    for name in names:
        assert store.get(f"found/{name}") == (local / name).read_bytes()
    puts = [line for line in store.proxy.lines if line.startswith("PUT")]
    assert "predict.json" in puts[-1], "what has no list of its files is no result"
    assert not list((tmp_path / "cache" / "gfldeploy" / "outputs").iterdir())
    with pytest.raises(OutputError, match=r"s3://images/found exists already.*--force"):
        predict_images(tiny_bundle, output=output, **given)  # type: ignore[arg-type]
    predict_images(tiny_bundle, folder / "1.jpg", output=output, force=True)
    assert store.keys("found/") == ["coco.json", "detections.jsonl", "images.json", "predict.json"]
    store.put("found/mine.txt", b"of somebody")
    with pytest.raises(OutputError, match=r"found holds mine.txt, which gfldeploy did not write"):
        predict_images(tiny_bundle, folder / "1.jpg", output=output, force=True)
    with pytest.raises(OutputError, match=r"found/mine.txt is a file, which is never replaced"):
        predict_images(tiny_bundle, folder / "1.jpg", output=f"{output}/mine.txt", force=True)
    with pytest.raises(OutputError, match="would replace"):
        predict_images(tiny_bundle, f"{output}/1.jpg", output=output, force=True)


@pytest.mark.parametrize("force", [False, True])
def test_an_upload_that_breaks_is_no_result_and_is_begun_again(
    force: bool, store: Store, folder: Path, tiny_bundle: Path
) -> None:
    output = f"s3://{BUCKET}/upload{force}"
    if force:
        predict_images(tiny_bundle, folder / "1.jpg", output=output, draw=True)
    store.proxy.breaks = lambda line: line.startswith("PUT") and "coco.json" in line
    with pytest.raises(GfldeployError) as raised:
        predict_images(tiny_bundle, folder / "z", output=output, force=force)
    assert "the same command resumes" in str(raised.value.__notes__)
    assert "predict.json" not in store.keys(f"upload{force}/") != []
    store.proxy.breaks = lambda line: False
    found = predict_images(tiny_bundle, folder / "z", output=output, force=force)
    assert found.kept == found.images
    assert store.keys(f"upload{force}/") == ["coco.json", "detections.jsonl", "images.json", "predict.json"]


def test_a_list_of_files(store: Store, folder: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    store.put_folder(folder / "z", "some")
    path, there = tmp_path / "list.txt", f"s3://{BUCKET}/some"
    names = [f"{there}/2.jpg", str(folder / "1.jpg"), f"{there}/2.jpg", f"file://{folder}/z/3.jpg", f"{there}/no.jpg"]
    path.write_bytes("\ufeff".encode() + "\r\n\n".join(names).encode())
    found = predict_images(tiny_bundle, input_list=path, output=tmp_path / "found")
    lines = [json.loads(line) for line in (tmp_path / "found" / "detections.jsonl").read_text().splitlines()]
    given = Path(str(folder).replace("%20", " "))  # as in the address of a file
    assert [line["file"] for line in lines] == [names[0], names[1], f"{given}/z/3.jpg", names[4]]
    assert (found.images, found.failed) == (4, 2)
    for content, problem in (
        (b"a\0b", "line 1 of .* names no file"),
        (b"\n \n", "names no files"),
        (b"http://x/y.jpg", "http://"),
    ):
        path.write_bytes(content)
        with pytest.raises(DataError, match=problem):
            read_list(path)
    with pytest.raises(DataError, match="cannot read"):
        read_list(tmp_path)


def test_headers_are_read_in_order_and_bad_ones_not_at_all(store: Store, folder: Path) -> None:
    store.put_folder(folder / "z", "some")
    urls = [Url(f"s3://{BUCKET}/some/{number}.jpg") for number in range(1, 7)]
    sizes = list(picture_sizes(urls))
    assert sizes == list(picture_sizes([folder / "z" / url.name for url in urls]))
    store.proxy.lines.clear()
    found = list(pictures(urls, {}, {1: "it ends the process"}))
    assert [one.size for one in found] == [sizes[0], None, *sizes[2:]]
    assert "it ends the process" in str(found[1].error)
    assert len(store.proxy.lines) == 5 and not any("/2.jpg" in line for line in store.proxy.lines)


def test_a_detector_takes_addresses(store: Store, folder: Path, tiny_bundle: Path) -> None:
    store.put_folder(folder / "z", "some")
    with Detector(tiny_bundle) as detector:
        (local,) = detector.detect(folder / "z" / "1.jpg")
        (found,) = detector.detect(f"s3://{BUCKET}/some/1.jpg")
        assert found.boxes.tolist() == local.boxes.tolist()
        with pytest.raises(DataError, match=r"http:// is no address that is read here"):
            detector.detect("http://127.0.0.1/1.jpg")


@pytest.mark.parametrize(
    "text",
    [
        *("http://x/a.jpg", "https://x/a.jpg", "ftp://x/a", "memory://a", "local://etc/a", "github://a:b@c/d"),
        *("simplecache::s3://images/a", "filecache::file:///a", "S3A://x/a", "zip://*.jpg::s3://images/a.zip"),
        *("s3://", "s3:///a.jpg", "gs://a\nb/c", "file://host/a", "file://", "s3://key:secret@images/a"),
        *(
            "hdfs://me:secret@host/a",
            "gs://secret@images/a",
            "hdfs://[x/a.jpg",
            "hdfs://host:no/a",
            "hdfs://host:99999/a",
        ),
    ],
)
def test_other_addresses_are_refused(text: str) -> None:
    with pytest.raises(DataError) as refused:
        source_of(text)
    assert "secret" not in str(refused.value)


def test_an_address_is_text_and_back() -> None:
    for text in (
        "s3://images/a b/%20#?.jpg",
        "gs://b/k",
        "hdfs://me@host:8020/a/b.png",
        "hdfs:///a",
        "s3://b/x::http://h/y",
    ):
        url = source_of(text)
        assert isinstance(url, Url) and str(url) == text and source_of(str(url)) == url == source_of(url)
    assert source_of("S3://Images/A") == Url("s3://Images/A")
    assert source_of("file:///a%20b/c.jpg") == source_of("file://localhost/a%20b/c.jpg") == Path("/a b/c.jpg")
    assert source_of("a:b//c") == Path("a:b//c")
    url = Url("hdfs://me@host:8020/a/b.tar.GZ")
    assert (url.store, url.path, url.name, url.stem, url.suffix) == (
        *("hdfs://me@host:8020", "/a/b.tar.GZ"),
        *("b.tar.GZ", "b.tar", ".GZ"),
    )


def test_what_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "_stores", {})
    for scheme, module, line in (
        ("gs", "gcsfs", "pip install gcsfs"),
        ("hdfs", "pyarrow", "pip install fsspec pyarrow"),
    ):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(MissingDependencyError, match=line):
            image_size(Url(f"{scheme}://a/b.jpg"))


def test_parts_at_addresses_are_merged(store: Store, folder: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    there = f"s3://{BUCKET}/merged"
    settings = {"inputs": folder, "threads": 1}
    predict_images(tiny_bundle, output=tmp_path / "one", **settings)  # type: ignore[arg-type]
    parts = [f"{there}/{number}" for number in (1, 2)]
    for number, part in enumerate(parts, start=1):
        predict_images(tiny_bundle, output=part, shard=(number, 2), **settings)  # type: ignore[arg-type]
    kept = predict_images(tiny_bundle, output=parts[1], shard=(2, 2), **settings)  # type: ignore[arg-type]
    assert kept.kept == kept.images > 0, "a scheduler may start a job again that had ended"
    with pytest.raises(OutputError, match="exists already"):
        predict_images(tiny_bundle, output=parts[1], shard=(1, 2), **settings)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="merged/3 is no part: it is not there"):
        merge_parts([*parts, f"{there}/3"], output=tmp_path / "here")
    merge_parts(parts[::-1], output=tmp_path / "here")
    merge_parts(parts, output=f"{there}/found")
    for name in (*RESULTS, "predict.json"):
        whole = (tmp_path / "one" / name).read_bytes()
        assert (tmp_path / "here" / name).read_bytes() == whole
        assert storage.read_url(Url(f"{there}/found/{name}"), 1 << 20) == whole
    with pytest.raises(OutputError, match="exists already"):
        merge_parts(parts, output=f"{there}/found")
