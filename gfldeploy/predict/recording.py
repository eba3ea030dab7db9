"""`predict` on a live source: a line for each frame that is detected in, until it is stopped or the source is gone.

Lines are appended to the `detections.jsonl` that is published in the end, and are on their way to the disk before the
next frame is looked at. What a run that was killed has left is kept: the same command appends to it.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
import threading
from collections.abc import Mapping
from contextlib import ExitStack, closing, nullcontext
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import IO, Any

import numpy as np

from gfldeploy.batching.tiles import InTiles
from gfldeploy.engines.base import ClosesOnExit, EngineOptions
from gfldeploy.engines.registry import ENGINES
from gfldeploy.errors import DataError, OutputError
from gfldeploy.files import (
    Unfinished,
    check_target,
    files_below,
    open_own,
    publish,
    read_json,
    unfinished_beside,
    writing,
)
from gfldeploy.predict.draw import LiveVideo
from gfldeploy.predict.engine_selection import Choice
from gfldeploy.predict.live import LiveFrame, LiveSource, live_frames
from gfldeploy.predict.outputs import (
    DETECTIONS,
    MADE,
    NOTE,
    PICTURES,
    RESULTS,
    WHAT,
    WORKING,
    LiveSummary,
    PredictResults,
    Summary,
    live_line,
    write_note,
)
from gfldeploy.predict.pipeline import Found
from gfldeploy.predict.resume import begin_question
from gfldeploy.predict.shards import ShardJob, ShardWorker
from gfldeploy.progress import Progress
from gfldeploy.signals import asked_to_stop, check_interrupted, hold_interrupts
from gfldeploy.storage import Source

_MOST_LINE = 64 << 20  # bytes of a line
_UNSAFE = re.compile(r"[^A-Za-z0-9.-]+")  # in the name of a file, on any system


@dataclass(frozen=True)
class LiveRequest:
    """What to record, and how.

    `question`: all that the results depend on, without secrets. `draw`: the lowest score in pictures; None for none.
    """

    choice: Choice
    address: str
    output: Source
    question: Mapping[str, Any]
    draw: float | None
    force: bool
    cut: InTiles | None
    duration: float | None
    reconnects: int


@dataclass
class _Recorded:
    """What runs before this one have recorded: frames, their detections and what was dropped between them.

    `number`: of the next frame; `began`: when the first was read.
    """

    frames: int = 0
    detections: int = 0
    dropped: int = 0
    number: int = 0
    began: datetime | None = None


class _Latencies:
    """Latencies of any number of frames, in the same memory: counted in steps of 1%."""

    _LEAST_S, _STEP = 1e-5, math.log(1.01)

    def __init__(self) -> None:
        self._counts = np.zeros(2048, np.int64)
        self.longest = 0.0

    def add(self, seconds: float) -> None:
        place = int(math.log(max(seconds, self._LEAST_S) / self._LEAST_S) / self._STEP)
        self._counts[min(place, len(self._counts) - 1)] += 1
        self.longest = max(self.longest, seconds)

    def median(self) -> float:
        if not self.longest:
            return 0.0
        place = int(np.searchsorted(self._counts.cumsum(), self._counts.sum() / 2))
        return min(self._LEAST_S * math.exp((place + 0.5) * self._STEP), self.longest)


class _Lines(ClosesOnExit):
    """The `detections.jsonl` of a recording, to which lines are appended; `kept`: what was there."""

    def __init__(self, path: Path, target: Source) -> None:
        """Open it, and cut off a last line that was not finished.

        Raises `OutputError` about `target`, and where another line is not as it was written: what follows it may be.
        """
        self._target = target
        self.kept = _Recorded()
        with writing(target), ExitStack() as undo:
            self._file: IO[bytes] = undo.enter_context(open_own(path))
            position = 0
            while (line := self._file.readline(_MOST_LINE)).endswith(b"\n"):
                if not self._take(line):
                    raise OutputError(f"{path} was changed after byte {position:,}", f"Move {path.parent.parent} away.")
                position += len(line)
            self._file.seek(position)
            self._file.truncate()
            undo.pop_all()

    def write(self, line: str) -> None:
        with writing(self._target):
            self._file.write(line.encode())
            self._file.flush()

    def close(self) -> None:
        with writing(self._target):
            self._file.close()

    def _take(self, line: bytes) -> bool:
        """Count a line in; False for one that was not written here."""
        kept = self.kept
        try:
            record = json.loads(line)
            found, dropped, number = len(record["detections"]), int(record["dropped"]), int(record["frame"])
            read_at = datetime.fromisoformat(record["time"])
        except (ValueError, KeyError, TypeError, RecursionError):
            return False
        kept.began = kept.began or read_at
        kept.frames, kept.detections = kept.frames + 1, kept.detections + found
        kept.dropped, kept.number = kept.dropped + dropped, number + 1
        return True


def record_live(request: LiveRequest, progress: Progress) -> PredictResults:
    """Detect in a live source until it is stopped, or gone, or the time is over, and publish what was found.

    Raises as `predict_images` does, and KeyboardInterrupt if it is stopped before it has a frame.
    """
    check_target(request.output, "predict", force=request.force)
    with unfinished_beside(request.output, "predict", MADE) as unfinished:
        results = unfinished.directory / RESULTS
        question = {**request.question, "address": _digest(request.address)}
        began, resumed = begin_question(unfinished.directory / WORKING, question, anew=request.force)
        with writing(request.output):
            if not resumed or not _is_of(results, began):
                shutil.rmtree(results, ignore_errors=True)  # of another run, or what this one has replaced
            results.mkdir(exist_ok=True)
            (results / NOTE).unlink(missing_ok=True)  # of a run that was killed before its last step
        with _Lines(results / DETECTIONS, request.output) as lines:
            unfinished.worth_keeping = lines.kept.frames > 0
            if lines.kept.frames:
                progress.note(f"{lines.kept.frames:,} frames of an earlier run are kept, others follow them")
            summary = _record(request, lines, results, unfinished, progress)
        assert summary.live is not None
        live = summary.live
        about = {
            "began": began,
            "dropped": live.dropped,
            "reconnects": live.reconnects,
            "latency_s": live.latency_s,
            "ended": live.error,
            "files": files_below(results),
        }
        check_interrupted()
        with writing(request.output), hold_interrupts() if isinstance(request.output, Path) else nullcontext():
            write_note(results, WHAT, request.question, summary, about)
            check_target(request.output, "predict", force=request.force)  # another process may have written it
            publish(results, request.output, "predict")
            unfinished.worth_keeping = False
            shutil.rmtree(results, ignore_errors=True)  # those that were replaced
    return summary


def _digest(address: str) -> str:
    """Tells an address from others with the same name, such as `?channel=2`; too slow to guess passwords by.

    It is in no result.
    """
    return hashlib.pbkdf2_hmac("sha256", address.encode(), b"gfldeploy", 200_000).hex()


def _is_of(results: Path, began: str) -> bool:
    """Whether the folder is this recording's: what is published has a note, which says when its recording began."""
    try:
        note = read_json(results / NOTE)
    except FileNotFoundError:
        return True
    except (OSError, ValueError):
        return False
    return isinstance(note, Mapping) and note.get("began") == began


def _record(
    request: LiveRequest, lines: _Lines, results: Path, unfinished: Unfinished, progress: Progress
) -> PredictResults:
    kept, choice = lines.kept, request.choice
    classes = choice.bundle.manifest.classes
    summary, latencies = Summary(choice.detection.shown(classes)), _Latencies()
    stopped, time_over = threading.Event(), threading.Event()
    with ExitStack() as stack:
        source = stack.enter_context(LiveSource(request.address, reconnects=request.reconnects, progress=progress))

        def stop() -> None:
            stopped.set()
            source.stop()

        def end() -> None:
            time_over.set()
            stop()

        job = ShardJob.of(choice, _options(request, source), False, request.cut)
        worker = stack.enter_context(ShardWorker(job, progress, choice.bundle))
        video = None
        if request.draw is not None:
            with writing(request.output):
                for partial in (results / PICTURES).glob(".*"):
                    partial.unlink()
                (results / PICTURES).mkdir(exist_ok=True)
            stem = _UNSAFE.sub("_", source.name).strip("_")
            video = stack.enter_context(LiveVideo(results / PICTURES, stem))
        if request.duration is not None:
            timer = threading.Timer(min(request.duration, threading.TIMEOUT_MAX), end)
            timer.daemon = True
            stack.callback(timer.cancel)
            timer.start()
        stack.enter_context(asked_to_stop(stop))
        progress.stage(f"detecting in {source.name}, until Ctrl-C or SIGTERM")
        frames = stack.enter_context(closing(live_frames(source, worker.detect_pictures, choice.options.streams)))
        for frame in frames:
            kept.began = kept.began or frame.time
            latencies.add(frame.latency_s)
            time_s = frame.time_s if not kept.frames else (frame.time - kept.began).total_seconds()
            found = Found(
                summary.images, source.name, frame.pixels.shape[:2], frame.detections, None, frame.number, time_s
            )
            lines.write(live_line(_beginning(found, frame, kept.number), found, summary, classes))
            unfinished.worth_keeping = True
            if video is not None:
                shown = (
                    frame.detections.select(summary.shown.places(frame.detections))
                    .at_least(request.draw or 0)
                    .records()
                )
                with writing(request.output):
                    video.add(kept.frames + summary.images, time_s, frame.pixels, shown)
    if not kept.frames + summary.images:
        if time_over.is_set():
            problem = f"{source.name} gave no frame to detect in within {request.duration:g} s"
            raise DataError(problem, "Give a longer --duration.")
        raise source.error or KeyboardInterrupt
    found_in = summary.results(kept.frames)
    error = None if source.error is None or stopped.is_set() else str(source.error)
    live = LiveSummary(
        source.name,
        kept.dropped + source.dropped,
        source.reconnects,
        (latencies.median(), latencies.longest),
        error,
    )
    return replace(
        found_in, images=kept.frames + summary.images, detections=kept.detections + summary.detections, live=live
    )


def _beginning(found: Found, frame: LiveFrame, number: int) -> dict[str, Any]:
    """Of a line, up to its detections; `number`: of the first frame of this run."""
    assert found.frame is not None and found.time_s is not None
    return {
        "file": found.name,
        "frame": number + found.frame,
        "time_s": round(found.time_s, 3),
        "time": frame.time.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        "dropped": frame.dropped,
        "latency_s": round(frame.latency_s, 4),
    }


def _options(request: LiveRequest, source: LiveSource) -> EngineOptions:
    """The engine's: one that compiles for shapes does so for the frames to come before the first is taken."""
    choice = request.choice
    manifest, options = choice.bundle.manifest, choice.options
    if ENGINES[choice.engine].needs_shapes or request.cut is not None or min(source.size) < 1:
        return options
    size = manifest.preprocess.input_size(*source.size)
    return options.expecting([(manifest.inputs[0].shape[0] or 1, *size)])
