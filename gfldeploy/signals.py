"""Ctrl-C, SIGTERM and the death of the parent process: how commands are stopped, and when they must not be."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from gfldeploy.system import STOP_SIGNALS, die_with, interrupt_self

_STOPPING_S = 1.0  # so soon after a first one, another signal is the same impatience
_AGAIN_S = 0.05
_PARENT = "GFLDEPLOY_PARENT"

_asked: list[tuple[float, int]] = []  # the interruptions: when, by `time.monotonic`, and by which signal
_blocks: list[object] = []  # the `terminate_as_interrupt` that we are in, in the main thread


@contextmanager
def terminate_as_interrupt(before: object = None) -> Iterator[None]:
    """Let SIGTERM unwind the stack as Ctrl-C does; a second signal right after the first does not cut that short.

    Leaves alone what the program handles in its own way, or was started to ignore, but takes over from the handler
    `before`. Does nothing outside the main thread, or inside another such block.
    """
    if not _is_main_thread():
        yield
        return
    if not _blocks:
        _asked.clear()
    replaced = (signal.SIG_DFL, signal.default_int_handler, before)
    ours = [number for number in STOP_SIGNALS if signal.getsignal(number) in replaced]
    previous: dict[int, Any] = {number: signal.signal(number, _interrupt) for number in ours}
    _blocks.append(previous)
    try:
        yield
    finally:
        _blocks.pop()
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def asked_to_stop(stop: Callable[[], None]) -> Iterator[None]:
    """The first Ctrl-C or SIGTERM calls `stop`, for work that ends by being asked to; one later than that interrupts.

    Does nothing outside the main thread.
    """
    previous: dict[int, Any] = {}
    asked: list[float] = []

    def handle(number: int, frame: object) -> None:
        now = time.monotonic()
        if not asked:
            asked.append(now)
            stop()
        elif now - asked[0] >= _STOPPING_S:
            previous[number](number, frame)

    if _is_main_thread():
        for number in STOP_SIGNALS:
            if callable(handler := signal.getsignal(number)):
                previous[number] = handler
                signal.signal(number, handle)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def was_interrupted() -> bool:
    """Whether an interruption has come since the outermost `terminate_as_interrupt` began.

    An error after that is most likely its consequence: C++ code and packages that catch everything turn a
    KeyboardInterrupt into errors of their own.
    """
    return bool(_asked)


def check_interrupted() -> None:
    """Raise KeyboardInterrupt if an interruption has come and somebody swallowed it."""
    if _asked and _is_main_thread():
        raise KeyboardInterrupt


@contextmanager
def hold_interrupts() -> Iterator[None]:
    """Put Ctrl-C and SIGTERM off to the end of the block: for what takes milliseconds and must not be cut short."""
    if not _is_main_thread():
        yield
        return
    arrived: list[int] = []
    previous: dict[int, Any] = {}
    for number in STOP_SIGNALS:
        if signal.getsignal(number) not in (signal.SIG_IGN, None):
            previous[number] = signal.signal(number, lambda number, frame: arrived.append(number))
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        for number in arrived[:1]:
            signal.raise_signal(number)


def interrupt_again() -> None:
    """Interrupt once more, in a moment: for an interruption that was raised where nothing can be raised."""
    number = _asked[-1][1] if _asked else signal.SIGINT
    _asked.clear()
    timer = threading.Timer(_AGAIN_S, lambda: interrupt_self(number))
    timer.daemon = True
    timer.start()


def ignore_interrupts() -> None:
    """For the end of a process that has nothing more to write."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def child_environment(environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """This process's environment with `environment` on top, for a child that calls `die_with_parent`."""
    return {**os.environ, **(environment or {}), _PARENT: str(os.getpid())}


def die_with_parent() -> None:
    """End this process when the process that started it ends, in whatever way: `system.die_with`."""
    die_with(int(os.environ.get(_PARENT) or os.getppid()))


def _interrupt(number: int, frame: object) -> None:
    now = time.monotonic()
    if _asked and now - _asked[-1][0] < _STOPPING_S:
        return
    _asked.append((now, number))
    raise KeyboardInterrupt


def _is_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
