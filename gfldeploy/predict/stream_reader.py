"""One connection to a camera or a stream, in a process of its own: `live.LiveSource` starts it, asks, and kills it.

FFmpeg decodes what strangers send, may wait for longer than it was told to, reads options from the environment, and
writes addresses with their passwords to standard error, which is nowhere here. A thread reads frame after frame; asked
for one, the process gives the newest that it has not given yet.

The first line of standard input is the request. Each byte after it asks for a frame. An answer is a line of JSON, with
the pixels of a frame after it; one with an `error`, or the end of standard output, is the last.
"""

from __future__ import annotations

import json
import math
import os
import socket
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import IO, Any
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray

from gfldeploy.images.formats import MAX_PIXELS
from gfldeploy.signals import ignore_interrupts

# What a stream may make FFmpeg open, whatever a playlist or an answer names: no files of this machine.
_PROTOCOLS: Mapping[str, str] = {
    "rtsp": "tcp,tls,udp,rtp,http,https,httpproxy",
    "http": "http,https,tcp,tls,httpproxy,crypto",
}
_FORMATS: Mapping[str, str] = {
    "rtsp": "rtsp",
    "http": "mpjpeg,mjpeg,jpeg_pipe,hls,mpegts,mov,matroska,flv,live_flv,h264,hevc,m4v,ogg,mpeg,asf,avi,aac,mp3,webvtt",
}
_OPTIONS = "OPENCV_FFMPEG_CAPTURE_OPTIONS"
_PORTS = {"rtsp": 554, "rtsps": 322, "http": 80, "https": 443}
_CONNECT_S = 2.0
_GRACE_S = 2.0  # beyond the limit, in which OpenCV is to notice by itself
_LONGEST_STEP_S = 2.0  # between two frames; more is a break
_MOST_FRAMES = 1e12  # more are no count: of a live stream OpenCV calculates anything


def capture_options(address: str, given: str | None = None) -> str:
    """What FFmpeg is told about an address, in OpenCV's spelling; `given`: what the user has told it, which counts."""
    scheme = urlsplit(address).scheme.lower()
    options = {}
    if scheme in ("https", "rtsps"):
        import ssl

        options["tls_verify"] = "1"
        if certificates := ssl.get_default_verify_paths().cafile:
            options["ca_file"] = certificates
    if scheme in ("rtsp", "rtsps"):
        options["rtsp_flags"] = "prefer_tcp"  # what OpenCV has where it is told nothing
    for pair in (given or "").split("|"):
        key, separator, value = pair.partition(";")
        if separator:
            options[key] = value
    kind = scheme.removesuffix("s")
    options |= {"protocol_whitelist": _PROTOCOLS[kind], "format_whitelist": _FORMATS[kind]}
    return "|".join(f"{key};{value}" for key, value in options.items())


class _Pace:
    """Gives the frames of HLS one by one: they come in segments, of which all but the last frame would be dropped."""

    def __init__(self) -> None:
        self._start = self._last = -math.inf

    def wait(self, position_s: float) -> None:
        """Until the frame at this position of the stream is due."""
        if not self._last <= position_s <= self._last + _LONGEST_STEP_S:  # the first, or after a break
            self._start = time.monotonic() - position_s
        self._last = position_s
        time.sleep(max(self._start + position_s - time.monotonic(), 0.0))


class _Reader:
    """The thread that reads, and the newest frame."""

    def __init__(self, address: str | int, timeout_s: float) -> None:
        self._address, self._timeout_s = address, timeout_s
        self._changed = threading.Condition()
        self._opened: dict[str, Any] | None = None
        self._frame: tuple[NDArray[np.uint8], dict[str, Any]] | None = None
        self._ended = False
        threading.Thread(target=self._run, daemon=True).start()

    def opened(self) -> dict[str, Any]:
        """What is known of the stream, or an error."""
        with self._changed:
            self._changed.wait_for(lambda: self._opened is not None, self._timeout_s + _GRACE_S)
            return self._opened or {"error": self._why_not()}

    def newest(self) -> tuple[NDArray[np.uint8], dict[str, Any]] | None:
        """A frame that was not given yet, BGR; None if no more come."""
        with self._changed:
            self._changed.wait_for(lambda: self._frame is not None or self._ended, self._timeout_s + _GRACE_S)
            frame, self._frame = self._frame, None
            return frame

    def _run(self) -> None:
        import cv2

        cv2.setNumThreads(1)
        address = self._address
        if isinstance(address, int):
            capture = cv2.VideoCapture(address)
        else:
            limit = int(self._timeout_s * 1000)
            # One thread, which gives each frame as soon as it has it: of several, all but one hold frames back.
            settings = [cv2.CAP_PROP_OPEN_TIMEOUT_MSEC, limit, cv2.CAP_PROP_READ_TIMEOUT_MSEC, limit]
            capture = cv2.VideoCapture(address, cv2.CAP_FFMPEG, [*settings, cv2.CAP_PROP_N_THREADS, 1])
        frames = capture.get(cv2.CAP_PROP_FRAME_COUNT)
        rate = capture.get(cv2.CAP_PROP_FPS)
        size = [int(capture.get(key)) for key in (cv2.CAP_PROP_FRAME_HEIGHT, cv2.CAP_PROP_FRAME_WIDTH)]
        opened: dict[str, Any] = {"rate": rate if math.isfinite(rate) else 0.0, "size": size}
        if not capture.isOpened():
            opened = {"error": self._why_not()}
        elif isinstance(address, str) and address.lower().startswith("http") and 0 < frames < _MOST_FRAMES:
            opened = {"error": f"it is a video of {int(frames):,} frames, not a live stream", "file": True}
        with self._changed:
            self._opened = opened
            self._changed.notify_all()
        number = 0
        pace = _Pace() if isinstance(address, str) and urlsplit(address).path.lower().endswith(".m3u8") else None
        while "error" not in opened:
            read, frame = capture.read()
            if not read or frame is None or frame.shape[0] * frame.shape[1] > MAX_PIXELS:
                break
            if pace is not None:
                pace.wait(capture.get(cv2.CAP_PROP_POS_MSEC) / 1e3)
            with self._changed:  # from now on it can be had
                about = {"number": number, "monotonic": time.monotonic(), "time": time.time(), "size": frame.shape[:2]}
                self._frame = frame, about
                self._changed.notify_all()
            number += 1
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def _why_not(self) -> str:
        """OpenCV does not say; whether something answers there is known."""
        if isinstance(self._address, int):
            return "there is no such camera, or another program uses it"
        url = urlsplit(self._address)
        port = url.port or _PORTS[url.scheme.lower()]
        try:
            socket.create_connection((url.hostname or "", port), _CONNECT_S).close()
        except (OSError, UnicodeError) as error:
            return f"nothing answers at port {port} of {url.hostname}: {getattr(error, 'strerror', None) or error}"
        return f"it gives no video that OpenCV can read within {self._timeout_s:g} s"


def main(requests: IO[bytes], answers: IO[bytes]) -> None:
    """Answer until the stream ends, or nobody asks any more."""
    import cv2

    request = json.loads(requests.readline())
    address = request["address"]
    if isinstance(address, str):
        os.environ[_OPTIONS] = capture_options(address, os.environ.get(_OPTIONS))
    reader = _Reader(address, request["timeout_s"])

    def answer(about: Mapping[str, Any], pixels: NDArray[np.uint8] | None = None) -> None:
        answers.write(json.dumps(about).encode() + b"\n")
        if pixels is not None:
            answers.write(pixels.data)
        answers.flush()

    answer(opened := reader.opened())
    while "error" not in opened and requests.read(1):
        if (newest := reader.newest()) is None:
            answer({"error": "it gave no more frames"})
            return
        frame, about = newest
        answer(about, np.ascontiguousarray(cv2.cvtColor(frame, cv2.COLOR_BGR2RGB), np.uint8))


if __name__ == "__main__":
    # The parent decides, and its end is that of standard input: the thread that started this process may end before.
    ignore_interrupts()
    # What libraries print on standard output is no answer.
    answers_to = os.dup(1)
    os.dup2(2, 1)
    with suppress(OSError), os.fdopen(answers_to, "wb") as pipe:
        main(sys.stdin.buffer, pipe)
    os._exit(0)  # without waiting for FFmpeg
