"""How long a frame of a stream waits for its detections where the detector is slower than the stream.

    python benchmarks/live.py --source demo/int8 --rate 100 --machine epyc-2core

Starts the RTSP server of GStreamer on this machine (Debian: gir1.2-gst-rtsp-server-1.0, python3-gi), which sends
`--size` frames at `--rate`, and detects in the newest with `Detector.live` until `--frames` were read; the server is
killed in the middle and started again. Milliseconds from reading a frame to its detections, and the longest of them by
the time that the detector took for two frames then: above 1 the bound would not be kept. Then, for as long as so many
frames last, a plain loop of `capture.read()` and `Detector.detect`: by how much its detections are older than the first
ones. Writes all to results/MACHINE/checks/NAME_live.json beside this script.
"""

from __future__ import annotations

import argparse
import itertools
import os
import socket
import statistics
import subprocess
import time
from pathlib import Path
from typing import Any

import cv2
import psutil

from gfldeploy import Detector, LiveSource
from gfldeploy.files import write_json
from gfldeploy.machine import describe_machine
from gfldeploy.serialization import plain

HERE = Path(__file__).resolve().parent
SERVER = """
import sys
import gi
gi.require_version("Gst", "1.0")
gi.require_version("GstRtspServer", "1.0")
from gi.repository import GLib, Gst, GstRtspServer
port, rate, size = sys.argv[1:]
width, height = size.split("x")
Gst.init(None)
server = GstRtspServer.RTSPServer(address="127.0.0.1", service=port)
factory = GstRtspServer.RTSPMediaFactory(shared=True)
frames = f"video/x-raw,format=I420,width={width},height={height},framerate={rate}/1"
factory.set_launch(f"( videotestsrc is-live=true pattern=ball ! {frames} ! jpegenc ! rtpjpegpay name=pay0 )")
server.get_mount_points().add_factory("/live", factory)
server.attach(None)
print("ready", flush=True)
GLib.MainLoop().run()
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, required=True, help="a bundle or a deploy.yml")
    parser.add_argument("--name", default="demo", help="of the results file")
    parser.add_argument("--machine", required=True, help="folder of results/ for this machine, such as epyc-2core")
    parser.add_argument("--rate", type=int, default=100, help="frames a second (default: 100)")
    parser.add_argument("--size", default="640x480", metavar="WIDTHxHEIGHT")
    parser.add_argument("--frames", type=int, default=300, help="read in all (default: 300)")
    args = parser.parse_args()
    with Detector(args.source) as detector:
        server = Server(args.rate, args.size)
        try:
            result: dict[str, Any] = {"live": live(detector, server, args.frames)}
            result["every_frame"] = every_frame(detector, server, args.frames)
        finally:
            server.kill()
        choice = str(detector.choice)
    output = HERE / "results" / args.machine / "checks" / f"{args.name}_live.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    settings = {"choice": choice, "rate": args.rate, "size": args.size, "frames": args.frames}
    write_json(output, {"machine": plain(describe_machine()), **settings, **result})
    for way, figures in result.items():
        print(way, {key: round(one, 3) for key, one in figures.items()})


class Server:
    """The RTSP server, on one port, whichever process it is at the moment."""

    def __init__(self, rate: int, size: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self._port = free.getsockname()[1]
        self._arguments = [str(self._port), str(rate), size]
        self.address = f"rtsp://127.0.0.1:{self._port}/live"
        self.start()

    def start(self) -> None:
        command = ["/usr/bin/python3", "-I", "-c", SERVER, *self._arguments]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert self._process.stdout is not None and self._process.stdout.readline() == b"ready\n"

    def kill(self) -> None:
        self._process.kill()
        self._process.communicate()


def live(detector: Detector, server: Server, count: int) -> dict[str, float]:
    """Detect in the newest frames until so many were read; the server is killed after half of them."""
    done: list[float] = []
    frames = []
    lost = 0.0
    back = 0.0
    with LiveSource(server.address) as source:
        for frame in detector.live(source):
            done.append(time.perf_counter())
            frames.append(frame)
            if source.reconnects and not back:
                back = done[-1]
            if frame.number >= count // 2 and not lost:
                server.kill()
                lost = time.perf_counter()
                server.start()
                started = time.perf_counter()
            if frame.number >= count:
                break
    had = [frame.time_s + frame.latency_s for frame in frames]
    shares = [frame.latency_s / (now - before) for frame, now, before in zip(frames[2:], had[2:], had, strict=False)]
    steps = [b - a for a, b in itertools.pairwise(done)]
    latencies = [1e3 * frame.latency_s for frame in frames]
    return {
        "read": frames[-1].number + 1,
        "detected_in": len(frames),
        "dropped": sum(frame.dropped for frame in frames),
        "reconnects": source.reconnects,
        "without_frames_s": back - lost,
        "of_that_server_start_s": started - lost,
        "frame_of_the_detector_ms": 1e3 * statistics.median(steps),
        "latency_median_ms": statistics.median(latencies),
        "latency_longest_ms": max(latencies),
        "longest_by_two_frames": max(shares),
        "rss_mb": psutil.Process(os.getpid()).memory_info().rss / 1e6,
    }


def every_frame(detector: Detector, server: Server, count: int) -> dict[str, float]:
    """The loop that is usually written, for as many frames as come in the time that the others took."""
    capture = cv2.VideoCapture(server.address, cv2.CAP_FFMPEG)
    ages = []
    seconds = count / float(server._arguments[1])
    start = time.perf_counter()
    while time.perf_counter() - start < seconds:
        read, pixels = capture.read()
        assert read
        made = capture.get(cv2.CAP_PROP_POS_MSEC) / 1e3
        detector.detect(pixels, color="bgr")
        ages.append(time.perf_counter() - made)
    capture.release()
    behind = [1e3 * (age - min(ages)) for age in ages]
    return {"detected_in": len(ages), "behind_median_ms": statistics.median(behind), "behind_at_the_end_ms": behind[-1]}


if __name__ == "__main__":
    main()
