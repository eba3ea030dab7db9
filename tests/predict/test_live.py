"""Cameras and streams: the newest frame wins, lost connections are made again, and nothing secret is told."""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import cv2
import demo_bundles
import numpy as np
import pytest
from demo_bundles import RunHere
from schema_checks import check_schema

from gfldeploy import DataError, Detector, LiveFrame, LiveSource
from gfldeploy.predict import live
from gfldeploy.predict.live import is_live, shown_address
from gfldeploy.predict.stream_reader import capture_options

pytest.importorskip("onnxruntime")

HEIGHT, WIDTH = 48, 80
STEP, FRAMES = 7, 30  # grey levels between two frames, which repeat after so many


@dataclass
class Camera:
    """MJPEG over HTTP. Frame after frame is a bit lighter, whoever is connected.

    `per_connection`: frames after which it breaks; None for no end. `closed`: it lets nobody in. `told`: is called
    with the number of each frame that is sent. `paths`: what was asked for.
    """

    per_connection: int | None = None
    wait_s: float = 0.005
    told: Callable[[int], object] = lambda number: None
    closed: threading.Event = field(default_factory=threading.Event)
    sent: int = 0
    paths: list[str] = field(default_factory=list)
    port: int = 0

    @property
    def address(self) -> str:
        return f"http://somebody:secret@127.0.0.1:{self.port}/street?key=token"

    @property
    def name(self) -> str:
        return f"http://127.0.0.1:{self.port}/street"

    def answer(self, path: str, send: Callable[[bytes], object]) -> None:
        self.paths.append(path)
        if self.closed.is_set():
            return
        send(b"HTTP/1.0 200 OK\r\nContent-Type: multipart/x-mixed-replace; boundary=frame\r\n\r\n")
        for _ in itertools.count() if self.per_connection is None else range(self.per_connection):
            if self.closed.is_set():
                return
            picture = np.full((HEIGHT, WIDTH, 3), level(self.sent), np.uint8)
            picture[..., 0] = 255 - picture[..., 0]  # blue
            data = cv2.imencode(".jpg", picture)[1].tobytes()
            head = f"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: {len(data)}\r\n\r\n"
            send(head.encode() + data + b"\r\n")
            self.told(self.sent)
            self.sent += 1
            time.sleep(self.wait_s)


def level(number: int) -> int:
    return 20 + number % FRAMES * STEP


@contextmanager
def serving(answer: Callable[[str, Callable[[bytes], object]], object]) -> Iterator[int]:
    """A server on a port of this machine: `answer` is given the path, and what sends bytes."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            with suppress(OSError):
                answer(self.path, self.wfile.write)

        def log_message(self, *words: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def camera(**settings: Any) -> Iterator[Camera]:
    one = Camera(**settings)
    with serving(one.answer) as one.port:
        try:
            yield one
        finally:
            one.closed.set()


@pytest.fixture(scope="module")
def detector(tiny_bundle: Path) -> Iterator[Detector]:
    with Detector(tiny_bundle, engine="onnxruntime", threads=1) as detector:
        yield detector


@pytest.fixture
def impatient_source(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "_FIRST_WAIT_S", 0.01)
    monkeypatch.setattr(live, "_LONGEST_WAIT_S", 0.02)


def lines(output: Path) -> list[dict[str, Any]]:
    check_schema("detections", output / "detections.jsonl")
    check_schema("predict", output / "predict.json")
    return [json.loads(line) for line in (output / "detections.jsonl").read_text().splitlines()]


def check_bounded(frames: list[LiveFrame]) -> None:
    """That it took no longer from reading a frame to its detections than two frames of the detector took."""
    done = [frame.time_s + frame.latency_s for frame in frames]
    for frame, at, before_last in zip(frames[2:], done[2:], done, strict=False):
        assert frame.latency_s <= at - before_last + 1e-9


def test_the_newest_frame_is_detected_in_and_the_others_are_counted(detector: Detector) -> None:
    frames: list[LiveFrame] = []
    with camera() as one, LiveSource(one.address, timeout_s=100) as source:
        assert source.name == one.name and source.size == (HEIGHT, WIDTH)
        for frame in detector.live(source):
            frames.append(frame)
            if len(frames) == 10:
                break
            time.sleep(0.03)  # several frames come meanwhile
    assert one.paths == ["/street?key=token"], "the server is told the whole address"
    check_bounded(frames)
    assert frames[0].number == 0
    assert [b.number - a.number - 1 for a, b in itertools.pairwise(frames)] == [frame.dropped for frame in frames[1:]]
    assert sum(frame.dropped for frame in frames) > 10
    assert source.dropped >= sum(frame.dropped for frame in frames)
    for frame, following in itertools.pairwise(frames):
        red, _, blue = frame.pixels.mean(axis=(0, 1))
        assert red + blue == pytest.approx(255, abs=5), "RGB"
        shown, next_shown = (round((one.pixels[..., 0].mean() - level(0)) / STEP) for one in (frame, following))
        assert (next_shown - shown) % FRAMES == (following.dropped + 1) % FRAMES, "the frame that its number says"
        assert following.time_s - frame.time_s == pytest.approx((following.time - frame.time).total_seconds(), abs=0.1)
        (found,) = detector.detect(frame.pixels)
        np.testing.assert_array_equal(found.boxes, frame.detections.boxes)
        np.testing.assert_array_equal(found.scores, frame.detections.scores)
    assert [one.name for one in threading.enumerate() if one.name.startswith("gfldeploy")] == []


def test_predict_records_until_it_is_asked_to_stop(tiny_bundle: Path, tmp_path: Path, run_here: RunHere) -> None:
    def stop(number: int) -> None:
        if number == 150:
            os.kill(os.getpid(), signal.SIGTERM)

    output = tmp_path / "out"
    with camera(told=stop) as one:
        knobs = ("--classes", "box", "--threshold", 0.1, "--tile", "32x48")
        done = run_here("predict", tiny_bundle, one.address, "-o", output, "--engine", "onnxruntime", "--draw", *knobs)
    assert done.returncode == 0, done.stderr
    found = lines(output)
    assert f"{len(found):,} frames of {one.name} in" in done.stderr
    assert f"{sum(line['dropped'] for line in found):,} frames dropped, 0 reconnects; from reading" in done.stderr
    assert {line["file"] for line in found} == {one.name} and {line["height"] for line in found} == {HEIGHT}
    assert found[0]["frame"] == 0 and found[0]["time_s"] == 0
    assert [b["frame"] - a["frame"] - 1 for a, b in itertools.pairwise(found)] == [one["dropped"] for one in found[1:]]
    assert all(
        re.fullmatch(r"\d{4}-\d\d-\d\dT[\d:]{8}\.\d{3}Z", line["time"]) and line["latency_s"] > 0 for line in found
    )
    assert {box["class"] for line in found for box in line["detections"]} == {"box"}
    note = json.loads((output / "predict.json").read_text())
    assert (note["images"], note["live"], note["ended"]) == (len(found), one.name, None)
    (drawn,) = (output / "pictures").iterdir()
    assert note["files"] == ["detections.jsonl", f"pictures/{drawn.name}"] and drawn.name.startswith("000001-http_127")
    video = cv2.VideoCapture(str(drawn))
    shown = video.get(cv2.CAP_PROP_FRAME_COUNT) / video.get(cv2.CAP_PROP_FPS)
    assert shown == pytest.approx(found[-1]["time_s"], abs=2 / video.get(cv2.CAP_PROP_FPS)), "in real time"
    written = "".join(path.read_text() for path in output.iterdir() if path.is_file())
    for text in (done.stdout, done.stderr, written):
        assert not re.search("somebody|secret|token", text)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_a_killed_run_has_recorded_is_kept(tiny_bundle: Path, tmp_path: Path, run_here: RunHere) -> None:
    command = (tiny_bundle, "-o", tmp_path / "out", "--engine", "onnxruntime", "--threads", 1)
    unfinished = tmp_path / "out.unfinished" / "results" / "detections.jsonl"
    with camera() as one:
        running = subprocess.Popen(
            demo_bundles.command(("predict", *command, one.address), "", tmp_path),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        while not unfinished.exists() or unfinished.read_bytes().count(b"\n") < 5:
            assert running.poll() is None
            time.sleep(0.01)
        running.kill()
        running.wait()
        kept = unfinished.read_bytes()
        kept = kept[: kept.rindex(b"\n") + 1]
        unfinished.write_bytes(kept + b'{"file": "')
        done = run_here("predict", *command, f"{one.address}?channel=2")
        assert done.returncode == 2 and "unfinished run with other address" in done.stderr
        done = run_here("predict", *command, one.address, "--duration", 0.4)
        assert done.returncode == 0, done.stderr
        count = kept.count(b"\n")
        assert f"{count} frames of an earlier run are kept" in done.stderr
        assert f"({count} of them by an earlier run)" in done.stderr
        found = lines(tmp_path / "out")
        assert (tmp_path / "out" / "detections.jsonl").read_bytes().startswith(kept) and len(found) > count
        assert found[count]["frame"] == found[count - 1]["frame"] + 1 + found[count]["dropped"]
        assert all(b["time_s"] >= a["time_s"] and b["time"] >= a["time"] for a, b in itertools.pairwise(found))
        # Another one that replaces it begins again.
        done = run_here("predict", *command, one.address, "--duration", 0.3, "--force")
        assert done.returncode == 0 and lines(tmp_path / "out")[0]["frame"] == 0


@pytest.mark.usefixtures("impatient_source")
def test_a_lost_connection_is_made_again_and_a_source_that_is_gone_ends(
    tiny_bundle: Path, tmp_path: Path, run_here: RunHere
) -> None:
    def close(number: int) -> None:
        if number == 110:
            one.closed.set()

    with camera(per_connection=60, told=close) as one:
        command = ("predict", tiny_bundle, one.address, "--engine", "onnxruntime", "--reconnects", 2)
        done = run_here(*command, "-o", tmp_path / "out")
        assert done.returncode == 1, done.stderr
        assert len(one.paths) == 1 + 1 + 2, "one that was made again, two that were not"
        found = lines(tmp_path / "out")
        assert [b["frame"] - a["frame"] - 1 for a, b in itertools.pairwise(found)] == [b["dropped"] for b in found[1:]]
        assert done.stderr.count(f"Note: {one.name} is there again, after") == 1
        assert f"{one.name} was lost after {len(found)} frames, and not to be had again in 2 tries" in done.stderr
        note = json.loads((tmp_path / "out" / "predict.json").read_text())
        assert note["reconnects"] == 1 and "2 tries" in note["ended"]
        assert not re.search("somebody|secret|token", done.stderr + json.dumps(note))
        # One that is not there at the start is an error, which leaves nothing.
        done = run_here(*command, "-o", tmp_path / "none")
        assert done.returncode == 2 and f"cannot open {one.name}: it gives no video that OpenCV" in done.stderr
        assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_is_no_live_source(tiny_bundle: Path, tmp_path: Path, run_here: RunHere) -> None:
    video = tmp_path / "clip.mp4"
    writer = cv2.VideoWriter(str(video), cv2.VideoWriter.fourcc(*"mp4v"), 25, (WIDTH, HEIGHT))
    for number in range(40):
        writer.write(np.full((HEIGHT, WIDTH, 3), level(number), np.uint8))
    writer.release()
    playlist = "#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:1.6,\n{}\n"
    contents = {
        "/clip.mp4": video.read_bytes(),
        "/local.m3u8": playlist.format(f"file://{video}").encode(),
        "/concat": f"ffconcat version 1.0\nfile '{video}'\n".encode(),
    }

    def answer(path: str, send: Callable[[bytes], object]) -> None:
        data = contents[path]
        send(f"HTTP/1.0 200 OK\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data)

    with serving(answer) as port:
        host = f"http://127.0.0.1:{port}"
        with pytest.raises(DataError, match=r"it is a video of 40 frames, not a live stream. Download it"):
            LiveSource(f"{host}/clip.mp4")
        for path in ("/local.m3u8", "/concat"):  # which name a file of this machine
            with pytest.raises(DataError, match=f"cannot open {host}{path}: it gives no video"):
                LiveSource(f"{host}{path}", timeout_s=2)
    with pytest.raises(DataError, match=f"nothing answers at port {port} of 127.0.0.1: Connection refused"):
        LiveSource(f"rtsp://somebody:secret@127.0.0.1:{port}/")
    with pytest.raises(DataError, match=r"cannot open camera 99: there is no such camera, or another program"):
        LiveSource("99")
    done = run_here("predict", tiny_bundle, "99", "-o", tmp_path / "out")
    assert done.returncode == 2 and "cannot open camera 99: there is no such camera" in done.stderr
    for others in (("--shard", "1/2"), ("--ray", "local"), ("--batch-size", 2), ("--decode", "fast"), ("more.jpg",)):
        done = run_here("predict", tiny_bundle, "rtsp://a:secret@b/c", *others, "-o", tmp_path / "out")
        named = "other inputs" if others[0] == "more.jpg" else others[0]
        assert done.returncode == 2 and f"rtsp://b/c is a live source, which does not go with {named}" in done.stderr
    done = run_here("predict", tiny_bundle, tmp_path, "--duration", 1, "-o", tmp_path / "out")
    assert done.returncode == 2 and "Give a camera or a stream as INPUT" in done.stderr
    done = run_here("predict", tiny_bundle, tmp_path, "-o", "http://a:secret@b/c")
    assert done.returncode == 2 and "secret" not in done.stderr


def test_the_frames_of_hls_come_one_by_one(tmp_path: Path) -> None:
    segment = tmp_path / "segment.ts"
    writer = cv2.VideoWriter(str(segment), cv2.VideoWriter.fourcc(*"mp4v"), 25, (WIDTH, HEIGHT))
    for number in range(50):
        writer.write(np.full((HEIGHT, WIDTH, 3), level(number), np.uint8))
    writer.release()
    playlist = "#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXT-X-MEDIA-SEQUENCE:0\n#EXTINF:2.0,\n/segment.ts\n"

    def answer(path: str, send: Callable[[bytes], object]) -> None:
        data = segment.read_bytes() if path.endswith(".ts") else playlist.encode()
        send(f"HTTP/1.0 200 OK\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data)

    with serving(answer) as port, LiveSource(f"http://127.0.0.1:{port}/live.m3u8") as source:
        read = [source.read() for _ in range(8)]
    numbers = [one.number for one in read if one is not None]
    assert len(numbers) == 8 and numbers[-1] < 30, "not the last of the segment"


def test_addresses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert is_live("0") and is_live("rtsp://camera/a") and is_live("HTTPS://camera/a") and is_live("http://x")
    assert not is_live("1234") and not is_live("s3://bucket/a") and not is_live("a.jpg") and not is_live("-1")
    (tmp_path / "7").touch()
    assert not is_live("7"), "a file of that name"
    assert shown_address("rtsp://me:p%40ss@Camera:8554/a/b?user=me&password=p#x") == "rtsp://camera:8554/a/b"
    assert shown_address(0) == shown_address("00") == "camera 0"
    assert shown_address("https://me@[::1]/a") == "https://[::1]/a"
    for bad in (
        "rtsp://",
        "rtsp://me:secret@/a",
        "http://a:99999/secret",
        "http://a b/secret",
        "rtsp://a:0/secret",
        "rtsp://me:12/secret@a/",
    ):
        with pytest.raises(DataError) as raised:
            shown_address(bad)
        assert "secret" not in str(raised.value)
    given = "rtsp_transport;udp|protocol_whitelist;file|format_whitelist;concat|tls_verify;0"
    options = dict(pair.split(";") for pair in capture_options("rtsps://camera/a", given).split("|"))
    assert options["rtsp_transport"] == "udp" and options["tls_verify"] == "0", "what the user tells FFmpeg counts"
    assert options["format_whitelist"] == "rtsp" and "file" not in options["protocol_whitelist"].split(",")
    assert "tls_verify;1" in capture_options("https://camera/a") and "tls" not in capture_options("http://a").split("|")
