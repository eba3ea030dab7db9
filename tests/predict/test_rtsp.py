"""A stream that Debian's GStreamer serves over RTSP, faster than the detector, by a server that is killed once."""

from __future__ import annotations

import itertools
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from test_live import check_bounded

from gfldeploy import Detector, LiveFrame, LiveSource
from gfldeploy.predict import live

pytest.importorskip("onnxruntime")

RATE = 100
# For the system's Python, which has the packages of Debian: gir1.2-gst-rtsp-server-1.0 and python3-gi.
SERVER = """
import sys
import gi
gi.require_version("Gst", "1.0")
gi.require_version("GstRtspServer", "1.0")
from gi.repository import GLib, Gst, GstRtspServer
Gst.init(None)
server = GstRtspServer.RTSPServer(address="127.0.0.1", service=sys.argv[1])
factory = GstRtspServer.RTSPMediaFactory(shared=True)
frames = f"video/x-raw,format=I420,width=320,height=240,framerate={sys.argv[2]}/1"
factory.set_launch(f"( videotestsrc is-live=true pattern=ball ! {frames} ! jpegenc ! rtpjpegpay name=pay0 )")
server.get_mount_points().add_factory("/street", factory)
server.attach(None)
print("ready", flush=True)
GLib.MainLoop().run()
"""


class Server:
    """The program, on one port, whichever process it is at the moment."""

    def __init__(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port: int = free.getsockname()[1]
        self.start()

    def start(self) -> None:
        command = ["/usr/bin/python3", "-I", "-c", SERVER, str(self.port), str(RATE)]
        try:
            self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        except FileNotFoundError:
            pytest.skip("there is no /usr/bin/python3")
        assert self._process.stdout is not None
        if self._process.stdout.readline() != b"ready\n":
            _, said = self._process.communicate()
            assert b"ModuleNotFoundError" in said or b"Namespace" in said, said
            pytest.skip("there is no RTSP server: apt-get install gir1.2-gst-rtsp-server-1.0 python3-gi")

    def kill(self) -> None:
        self._process.kill()
        self._process.communicate()


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.kill()


def test_a_stream_that_is_faster_than_the_detector(
    server: Server, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "_FIRST_WAIT_S", 0.05)
    frames: list[LiveFrame] = []
    # Of so large an input a frame takes longer than the next needs to come.
    with Detector(tiny_bundle, engine="onnxruntime", threads=1, input_size=(1440, 1920)) as detector:
        with LiveSource(f"rtsp://127.0.0.1:{server.port}/street", timeout_s=100) as source:
            for frame in detector.live(source):
                frames.append(frame)
                if frame.number >= 150 and source.reconnects == 0:
                    server.kill()
                    server.start()
                if frame.number >= 300:
                    break
            assert source.reconnects == 1 and source.rate == RATE and source.size == (240, 320)
        (found,) = detector.detect(frames[-1].pixels)
        np.testing.assert_array_equal(found.boxes, frames[-1].detections.boxes)
    check_bounded(frames)
    assert len(frames) + sum(frame.dropped for frame in frames) == frames[-1].number + 1
    assert len(frames) < 200, "at least one of three was dropped"
    moved = [not np.array_equal(a.pixels, b.pixels) for a, b in itertools.pairwise(frames)]
    assert sum(moved) > 0.9 * len(moved), "each is another picture"
