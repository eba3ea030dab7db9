"""What serves detections, without HTTP: admission, readiness, draining, and a new engine for one that failed."""

from __future__ import annotations

import asyncio
import io
import logging
import math
import os
import threading
import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from gfldeploy.bench.cell import BundleIdentity
from gfldeploy.bundle import Bundle
from gfldeploy.detection_options import DetectionOptions
from gfldeploy.engines.base import Device, Precision
from gfldeploy.errors import BundleError, DataError, EngineError, GfldeployError, RejectedError, Rejection
from gfldeploy.images.decode import size_of
from gfldeploy.images.formats import JPEG_START, read_header
from gfldeploy.nms import NmsParams
from gfldeploy.predict.engine_selection import Choice
from gfldeploy.progress import SILENT, Progress
from gfldeploy.serve.loaded import Answer, AnswerTimes, LoadedDetector

_log = logging.getLogger(__name__)
# Of a JPEG so much is looked at in the event loop, for its size: a hostile one holds it up for a few milliseconds.
_HEADER_BYTES = 1 << 14
_READERS = 2
_LOOK_S = 1.0
_LATE_MS = 1e-3  # what is left to an image whose size took too long to find: it is refused
_NICER = 10  # steps of Linux' nice values: a tenth of the time, where both want all of it
DRAINING = "the server is stopping"


@dataclass(frozen=True)
class ServiceSettings:
    """How a service serves.

    `most_waiting`: images that wait for their batch, beyond which others are refused. `warm_up`: a folder of images
    such as those to come. `reduced`: JPEGs may be decoded at a fraction of their size. `most_pixels`: of an image: a
    thread that decodes for seconds runs no batches.

    An engine that fails, or that does not answer for `hang_s` seconds, is replaced by a new one; when that has been
    necessary more than `restarts` times within `restarts_s` seconds, the service gives up. Neither the time that
    decoding takes counts, of which clients have a say, nor that in which the whole process was stopped.
    """

    most_waiting: int = 64
    warm_up: Path | None = None
    reduced: bool = False
    most_pixels: float = 50e6
    hang_s: float = 60.0
    restarts: int = 3
    restarts_s: float = 600.0


@dataclass(frozen=True)
class Description:
    """What serves, in the words of a benchmark's cell. `batch_size`: images of a batch at most. `load_s`: seconds until
    the engine was open. `sizes`: (height, width) of the network's inputs that were run before the start. `detection`:
    what was turned of NMS and of what is shown, null where it is as the bundle's config says."""

    bundle: BundleIdentity
    engine: str
    engine_version: str
    precision: Precision
    device: Device
    tf32: bool
    threads: int
    streams: int
    input_size: tuple[int, int] | None
    batch_size: int
    load_s: float
    classes: tuple[str, ...]
    sizes: tuple[tuple[int, int], ...]
    choice: str
    detection: DetectionOptions


class Watch:
    """Is told what happens in services; a base for whatever counts it. No method may raise or wait."""

    def batch(self, images: int, pixels: int, own_pixels: int) -> None:
        """A batch ran: so many images and pixels, and pixels without padding to a common size. In any thread."""

    def answered(self, times: AnswerTimes) -> None:
        """An image was answered."""

    def rejected(self, reason: Rejection) -> None:
        """An image was refused."""

    def failed(self, kind: Literal["image", "engine"]) -> None:
        """An image was of no use, or the engine failed."""

    def restarted(self) -> None:
        """A new engine replaced one that had failed. In any thread."""


class DetectionService:
    """One detector that answers. `detect` and `drain` are for the event loop, the rest for any thread.

    Attributes:
        choice: What runs and how.
        in_flight: Images that were taken and are not answered.
        gave_up: Why the service will never be ready again; None while it may.
    """

    def __init__(
        self, choice: Choice, settings: ServiceSettings, watch: Watch | None = None, progress: Progress = SILENT
    ) -> None:
        """Load the detector, run the shapes to come, and measure what batches take. Raises as `LoadedDetector`."""
        self.choice = choice
        self.in_flight = 0
        self.gave_up: EngineError | None = None
        self._settings, self._watch = settings, watch or Watch()
        self._why: str | None = None
        self._detector = self._load(progress)
        self._readers = ThreadPoolExecutor(_READERS, "gfldeploy-header")
        self._failures: deque[float] = deque()
        self._closed = False
        self._look = threading.Event()
        self._suspected, self._learnt = False, 0.0
        threading.Thread(target=self._look_after, name="gfldeploy-watch", daemon=True).start()

    def ready(self) -> str | None:
        """None if requests are served; else why not, in one line."""
        return self._why

    @property
    def waiting(self) -> int:
        """Images that wait for their batch to begin."""
        return self._detector.batcher.waiting

    @property
    def sample(self) -> bytes:
        """The content of an image file of the warm-up."""
        return self._detector.sample

    @property
    def description(self) -> Description:
        """What serves."""
        choice, detector = self.choice, self._detector
        options = choice.options
        return Description(
            BundleIdentity.of(choice.bundle),
            choice.engine,
            detector.engine_version,
            options.precision,
            options.device,
            options.tf32,
            options.threads,
            options.streams,
            choice.input_size,
            detector.most,
            detector.load_s,
            choice.bundle.manifest.classes,
            detector.sizes,
            str(choice),
            choice.detection,
        )

    async def detect(self, content: bytes, timeout_ms: float, nms: NmsParams | None = None) -> Answer:
        """What is in the image file with this content, within so many milliseconds from now.

        `nms`: in place of the detector's. Cancelling withdraws it unless its batch has begun. Raises `DataError` for
        the image, `RejectedError`, and `EngineError`.
        """
        self.in_flight += 1
        try:
            answer = await self._detect(content, timeout_ms, nms)
        except RejectedError as error:
            self._watch.rejected(error.reason)
            raise
        except DataError:
            self._watch.failed("image")
            raise
        except EngineError:
            self._watch.failed("engine")
            raise
        finally:
            self.in_flight -= 1
        self._watch.answered(answer.times)
        return answer

    def check_room(self, timeout_ms: float) -> None:
        """Raise the `RejectedError` that any image would get now: it is cheaper before its bytes are read."""
        try:
            self._check_ready()
            if (error := self._detector.refusal(timeout_ms)) is not None:
                raise error
        except RejectedError as error:
            self._watch.rejected(error.reason)
            raise

    def drain(self) -> None:
        """Refuse new requests from now on; those that were admitted are answered."""
        self._why = DRAINING

    def close(self, drain: bool = True) -> None:
        """Free the detector. `drain`: answer what waits first, else reject it."""
        self.drain()
        self._closed = True
        self._look.set()
        self._detector.close(drain)
        self._readers.shutdown(wait=False)

    def abandon(self) -> None:
        """Answer all that is in flight with an error, and free nothing: for the end of a process that cannot wait."""
        self.drain()
        self._closed = True
        self._detector.abandon(RejectedError("the server has stopped", "Try again later.", "closed"))

    async def _detect(self, content: bytes, timeout_ms: float, nms: NmsParams | None) -> Answer:
        self._check_ready()
        size, most_pixels = _quick_size(content), self._settings.most_pixels
        if size is None:
            began, loop = time.monotonic(), asyncio.get_running_loop()
            size = await loop.run_in_executor(self._readers, _slow_size, content, most_pixels)
            self._check_ready()
            timeout_ms = max(timeout_ms - (time.monotonic() - began) * 1e3, _LATE_MS)
        if size[0] * size[1] > most_pixels:
            raise DataError(
                f"the image has {size[1]} x {size[0]} px, more than {most_pixels / 1e6:g} million",
                "Scale it down, or raise --max-megapixels of the server.",
            )
        try:
            return await _answer_of(self._detector.submit(content, size, timeout_ms, nms))
        except DataError:
            raise
        except RejectedError as error:
            # A model that was settled on a busy machine would refuse all for ever, and then learn nothing.
            learns_nothing = error.reason == "deadline" and self.in_flight == 1 and self._is_time_to_learn()
            if error.reason == "closed" or learns_nothing:
                self._suspect()
            raise
        except Exception:  # of the engine, or of what nobody foresaw: MemoryError, say
            self._suspect()
            raise

    def _suspect(self) -> None:
        """Have the engine run an image that it is known to run."""
        self._suspected = True
        self._look.set()

    def _is_time_to_learn(self) -> bool:
        now = time.monotonic()
        if now - self._learnt < _LOOK_S:
            return False
        self._learnt = now
        return True

    def _check_ready(self) -> None:
        if self._why is not None:
            raise RejectedError(self._why, "Try again later.", "closed")

    def _load(self, progress: Progress) -> LoadedDetector:
        """Load it in threads that leave the CPUs to the event loop, however busy they are: refusals must not wait."""
        settings, loaded = self._settings, Future[LoadedDetector]()

        def load() -> None:
            with suppress(OSError):
                own = threading.get_native_id()
                os.setpriority(os.PRIO_PROCESS, own, os.getpriority(os.PRIO_PROCESS, own) + _NICER)
            try:
                loaded.set_result(
                    LoadedDetector(
                        self.choice,
                        settings.most_waiting,
                        settings.warm_up,
                        settings.reduced,
                        self._watch.batch,
                        progress,
                    )
                )
            except BaseException as error:  # noqa: BLE001 - raised by whoever waits
                loaded.set_exception(error)

        # Threads inherit the priority of the one that starts them: those of engines, too.
        threading.Thread(target=load, name="gfldeploy-load", daemon=True).start()
        return loaded.result()

    def _look_after(self) -> None:
        """Replace an engine that fails or hangs, until the service is closed or gives up."""
        hang_s, resumed = self._settings.hang_s, -math.inf
        while not self._closed and self.gave_up is None:
            began = time.monotonic()
            self._look.wait(_LOOK_S)
            self._look.clear()
            if (now := time.monotonic()) - began > 2 * _LOOK_S:
                resumed = now  # after SIGSTOP, a frozen container, or a moved virtual machine
            suspected, self._suspected = self._suspected, False
            problem = self._detector.stuck(hang_s) if now - resumed > hang_s else None
            if problem is None and suspected and not self._closed:
                problem = self._detector.probe(hang_s)
            if problem is not None and not self._closed:
                self._replace(problem)

    def _replace(self, problem: str) -> None:
        """Open a new engine in place of one with this problem."""
        settings = self._settings
        while True:
            error = EngineError(f"the engine failed: {problem}", "It is being restarted: try again later.")
            _log.error("%s", error.problem)
            self._detector.abandon(error)
            now = time.monotonic()
            self._failures.append(now)
            while now - self._failures[0] > settings.restarts_s:
                self._failures.popleft()
            if len(self._failures) > settings.restarts:
                times = f"{len(self._failures)} times within {settings.restarts_s:g} s"
                self.gave_up = EngineError(
                    f"the engine failed {times}, the last time: {problem}", "Restart the server."
                )
                self._stop_serving(self.gave_up.problem)
                return
            self._stop_serving(f"the engine is being restarted: {problem}")
            try:
                self._check_unchanged()
                detector = self._load(SILENT)
            except Exception as failed:  # noqa: BLE001 - this thread is the only one that can say that it is of no use
                problem = failed.problem if isinstance(failed, GfldeployError) else f"{type(failed).__name__}: {failed}"
                time.sleep(_LOOK_S)
                continue
            break
        self._detector = detector
        if self._closed:
            detector.close(False)
        elif self._why != DRAINING:
            self._why = None
        self._watch.restarted()

    def _check_unchanged(self) -> None:
        """Raise unless the bundle on the disk is still the one that was loaded."""
        bundle = self.choice.bundle
        if Bundle.open(bundle.directory).digest != bundle.digest:
            raise BundleError(f"{bundle.directory} holds another bundle now", "Restart the server, or reload it.")

    def _stop_serving(self, why: str) -> None:
        if self._why != DRAINING:
            self._why = why


async def _answer_of(future: Future[Answer]) -> Answer:
    """As `asyncio.wrap_future`, in half the time."""
    loop = asyncio.get_running_loop()
    answered: asyncio.Future[None] = loop.create_future()

    def wake() -> None:
        if not answered.done():
            answered.set_result(None)

    def done(_: object) -> None:
        with suppress(RuntimeError):  # the loop has ended, and whoever waited
            loop.call_soon_threadsafe(wake)

    future.add_done_callback(done)
    try:
        await answered
    except asyncio.CancelledError:
        future.cancel()
        raise
    return future.result()


def _quick_size(content: bytes) -> tuple[int, int] | None:
    """(h, w) of a JPEG, if the first bytes tell; else None."""
    if not content.startswith(JPEG_START):
        return None
    try:
        header = read_header(io.BytesIO(content[:_HEADER_BYTES]), "the image", whole=False)
    except DataError:
        return None  # whatever it is, it is said of all of it
    if header.turned is None or not header.complete:
        return None
    return (header.width, header.height) if header.turned else (header.height, header.width)


def _slow_size(content: bytes, most_pixels: float) -> tuple[int, int]:
    """(h, w), for which some formats have to be decoded: not if their header says more than `most_pixels`."""
    if content:
        header = read_header(io.BytesIO(content), "the image", whole=False)
        if header.turned is None and header.height * header.width > most_pixels:
            return header.height, header.width
    return size_of(io.BytesIO(content))
