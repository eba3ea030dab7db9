"""Cameras and streams: the newest frame wins where the detector is slower, and a connection that is lost is made again.

`LiveSource` gives frames, `live_frames` what was found in them: no more frames are taken than inferences run at once,
so that from reading a frame to its detections it takes no longer than two frames of the detector take.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray

from gfldeploy.detections import Detections
from gfldeploy.engines.base import ClosesOnExit
from gfldeploy.errors import DataError
from gfldeploy.predict.pipeline import Found
from gfldeploy.predict.sources import Picture
from gfldeploy.progress import SILENT, Progress

RECONNECTS, TIMEOUT_S = 10, 10.0  # by default
_STREAM = re.compile(r"(?i)(rtsps?|https?)://")
_CAMERA = re.compile(r"[0-9]{1,3}")
# Before a connection is made again: twice as long after each that did not last.
_FIRST_WAIT_S, _LONGEST_WAIT_S, _LASTED_S = 0.5, 30.0, 10.0
_MOST_LINE = 1 << 12  # of an answer


@dataclass(frozen=True)
class LiveFrame:
    """A frame of a camera or a stream, and what was found in it.

    Attributes:
        number: Its place among all frames that were read since the first that was detected in, from 0.
        dropped: How many frames were read after the one before and dropped for newer ones.
        time: When it was read, UTC.
        time_s: The same, in seconds since the first.
        latency_s: Seconds from reading it to having its detections.
        pixels: RGB, uint8 [height, width, 3].
        detections: What was found in it, best first, boxes in its pixels.
    """

    number: int
    dropped: int
    time: datetime
    time_s: float
    latency_s: float
    pixels: NDArray[np.uint8]
    detections: Detections


@dataclass(frozen=True)
class _Read:
    """A frame as it was read, at `monotonic` seconds; the rest as of `LiveFrame`."""

    pixels: NDArray[np.uint8]
    number: int
    dropped: int
    time: datetime
    monotonic: float
    time_s: float


def is_live(text: str) -> bool:
    """Whether an input is a camera, by its number, or a stream, and no file."""
    return _STREAM.match(text) is not None or (_CAMERA.fullmatch(text) is not None and not Path(text).exists())


def shown_address(address: str | int) -> str:
    """Without what may be a password or a key. Raises `DataError` for what is no address of a stream."""
    if isinstance(address, int) or _CAMERA.fullmatch(address):
        return f"camera {int(address)}"
    problem = "the address of a stream"
    remedy = "Write rtsp://host:port/path or http://host:port/path."
    try:
        url = urlsplit(address)
        port = url.port
    except ValueError:  # its text has the address
        raise DataError(f"{problem} has no host, or a port that cannot be", remedy) from None
    if not _STREAM.match(address) or not url.hostname or port == 0:
        raise DataError(f"{problem} has no host, or a port that cannot be", remedy)
    if not address.isprintable() or " " in address:
        raise DataError(f"{problem} has characters that none can have", remedy)
    if "@" in url.path:  # behind a password with a slash, most likely
        raise DataError(f"{problem} has an @ in its path", "Write it as %40, and / ? # of a password as %2F %3F %23.")
    host = f"[{url.hostname}]" if ":" in url.hostname else url.hostname
    return f"{url.scheme.lower()}://{host}{'' if port is None else f':{port}'}{url.path}"


class LiveSource(ClosesOnExit):
    """A camera or a stream; a context manager, which closes it::

        with LiveSource("rtsp://camera/stream") as source:
            for frame in detector.live(source):
                print(frame.time, frame.detections.names)

    A process of its own holds the connection and always has the newest frame. A connection that is lost is made again,
    after half a second at first and up to 30 s later.

    Attributes:
        name: The address without user name, password and query, or "camera 0".
        rate: Frames a second, as the source says; 0 if it does not.
        size: (height, width) of its frames in pixels, as the source says.
        frames: How many were given.
        dropped: How many were read and dropped for newer ones.
        reconnects: How often the connection was lost and made again.
        error: Why it ended by itself; None otherwise.
    """

    def __init__(
        self,
        source: str | int,
        *,
        reconnects: int = RECONNECTS,
        timeout_s: float = TIMEOUT_S,
        progress: Progress = SILENT,
    ) -> None:
        """Connect.

        Args:
            source: The number of a camera, from 0, or the address of a stream: rtsp://, rtsps://, http:// or https://
                (MJPEG, HLS, MPEG-TS and what else OpenCV's FFmpeg reads). User name and password may be in it; they
                are in no message and no result.
            reconnects: How often to try to make a lost connection again before it gives a frame.
            timeout_s: After so many seconds without an answer or a frame the connection is lost.
            progress: Told when the connection is lost and made again, by another thread.

        Raises:
            DataError: The camera or the stream cannot be opened, or is a file.
            ValueError: `reconnects` or `timeout_s` cannot be.
        """
        if reconnects < 0 or not 0 < timeout_s < 1e6:
            raise ValueError("reconnects is at least 0, and timeout_s is above 0")
        if isinstance(source, str) and _CAMERA.fullmatch(source):
            source = int(source)
        self.name = shown_address(source)
        self.rate = 0.0
        self.size = (0, 0)
        self.frames = self.dropped = self.reconnects = 0
        self.error: DataError | None = None
        self._source, self._tries, self._timeout_s, self._progress = source, reconnects, timeout_s, progress
        self._lock = threading.RLock()  # a signal may stop it while the same thread starts a process
        self._stopped = threading.Event()
        self._child: subprocess.Popen[bytes] | None = None
        self._connected_at = 0.0
        self._wait_s, self._failed = _FIRST_WAIT_S, 0
        self._first: float | None = None  # when the first frame was read
        self._base = self._next = 0  # numbers: of the first frame of this connection, and of the next that is expected
        try:
            if problem := self._connect():
                raise problem
        except BaseException:
            self.close()
            raise

    def read(self) -> _Read | None:
        """The newest frame that was not given yet, as soon as there is one; None at the end. For one thread."""
        while not self._stopped.is_set():
            answer = self._ask()
            if "error" in answer:
                if not self._reconnected(answer["error"]):
                    break
                continue
            return self._frame(answer)
        return None

    def begin(self) -> None:
        """Count from the next frame on, which is number 0."""
        self._first = None
        self.frames = self.dropped = 0

    def stop(self) -> None:
        """End it: `read` returns None. From any thread, or a handler of a signal."""
        self._stopped.set()
        with self._lock:
            if self._child is not None:
                self._child.kill()

    def close(self) -> None:
        """Close the connection."""
        self.stop()
        with self._lock:
            if self._child is not None:
                self._child.communicate()

    def _connect(self) -> DataError | None:
        """Start a process that connects. What is wrong, in words; nothing after `stop`."""
        with self._lock:
            if self._child is not None:
                self._child.kill()
                self._child.communicate()
            if self._stopped.is_set():
                return None
            # -P: no folder of the current directory shadows a package.
            command = [sys.executable, "-P", "-m", "gfldeploy.predict.stream_reader"]
            pipe, nowhere = subprocess.PIPE, subprocess.DEVNULL
            self._child = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=nowhere)
        request = {"address": self._source, "timeout_s": self._timeout_s}
        answer = self._ask(json.dumps(request).encode() + b"\n")
        if "error" in answer:
            if self._stopped.is_set():
                return None
            if answer.get("file"):
                remedy = "Download it and give the file."
            elif isinstance(self._source, int):
                remedy = "Give the number of a camera that is there, from 0."
            else:
                secure = self.name.startswith(("https", "rtsps"))
                more = ", and whether its certificate is one that this machine trusts (SSL_CERT_FILE)" if secure else ""
                remedy = f"Check the address, the user name and the password{more}."
            return DataError(f"cannot open {self.name}: {answer['error']}", remedy)
        self.rate = float(answer["rate"])
        height, width = answer["size"]
        self.size = height, width
        self._connected_at = time.monotonic()
        self._base = self._next
        return None

    def _ask(self, request: bytes = b".") -> dict[str, Any]:
        """The answer; an error if there is none."""
        with suppress(OSError, ValueError):
            assert self._child and self._child.stdin and self._child.stdout
            self._child.stdin.write(request)
            self._child.stdin.flush()
            answer = json.loads(self._child.stdout.readline(_MOST_LINE))
            if isinstance(answer, dict):
                return answer
        return {"error": "the process that reads it ended"}

    def _frame(self, answer: dict[str, Any]) -> _Read | None:
        assert self._child and self._child.stdout
        height, width = answer["size"]
        pixels = np.empty((height, width, 3), np.uint8)
        if self._child.stdout.readinto(pixels.data.cast("B")) != pixels.nbytes:  # type: ignore[attr-defined]
            return self.read()  # it was killed in the middle
        number = self._base + answer["number"]
        dropped = number - self._next
        if self._first is None:
            self._first, self._base, number, dropped = answer["monotonic"], self._base - number, 0, 0
        self._next = number + 1
        self.frames += 1
        self.dropped += dropped
        self._failed = 0
        when = datetime.fromtimestamp(answer["time"], UTC)
        return _Read(pixels, number, dropped, when, answer["monotonic"], answer["monotonic"] - self._first)

    def _reconnected(self, reason: str) -> bool:
        """Whether the connection was made again; otherwise it has ended."""
        if self._stopped.is_set():
            return False
        lost = time.monotonic()
        self._progress.note(f"{self.name} was lost after {self.frames:,} frames: {reason}")
        if lost - self._connected_at > _LASTED_S:  # one that gives a frame and breaks is not asked at once each time
            self._wait_s = _FIRST_WAIT_S
        problem: DataError | None = None
        while self._failed < self._tries:
            self._failed += 1
            if self._stopped.wait(self._wait_s):
                return False
            self._wait_s = min(2 * self._wait_s, _LONGEST_WAIT_S)
            if (problem := self._connect()) is None:
                if self._stopped.is_set():
                    return False
                self.reconnects += 1
                self._progress.note(f"{self.name} is there again, after {time.monotonic() - lost:.1f} s")
                return True
        tried = f", and not to be had again in {self._tries} tries" if self._tries else ""
        last = f": {problem.problem}" if problem else ""
        self.error = DataError(f"{self.name} was lost after {self.frames:,} frames{tried}{last}")
        return False


def live_frames(
    source: LiveSource, detect: Callable[[Iterable[Picture]], Generator[list[Found]]], at_once: int
) -> Generator[LiveFrame]:
    """What is found in the newest frames, in order; the source ends with the iteration.

    `detect`: gives what was found in pictures that are taken by one thread, in batches of one and in order; `at_once`:
    how many inferences run at once. The next frame is detected in while this one is looked at.
    """
    permits = threading.Semaphore(at_once)
    taken: deque[_Read] = deque()

    def picture(read: _Read) -> Picture:
        height, width, _ = read.pixels.shape
        return Picture(source.name, read.pixels, (height, width), None, read.number, read.time_s)

    def pictures() -> Iterator[Picture]:
        while permits.acquire() and (read := source.read()) is not None:
            taken.append(read)
            yield picture(read)

    try:
        # What the engine does once, such as taking memory, is done before the first frame counts.
        if (first := source.read()) is not None:
            with closing(detect([picture(first)])) as found:
                for _ in found:
                    pass
        source.begin()
        with closing(detect(pictures())) as groups:
            try:
                for group in groups:
                    for one in group:
                        read = taken.popleft()
                        latency_s = time.monotonic() - read.monotonic
                        permits.release()
                        if one.detections is None:
                            raise one.error or AssertionError(one)
                        yield LiveFrame(
                            read.number, read.dropped, read.time, read.time_s, latency_s, read.pixels, one.detections
                        )
            finally:
                source.stop()
                permits.release()
    finally:
        source.stop()
