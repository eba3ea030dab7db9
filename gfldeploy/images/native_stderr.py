"""What C libraries print while an image is decoded, kept from the terminal and attributed to that image.

libjpeg, libpng and others report what they find wrong on C's `stderr`, with no file name, and continue. While an image
is decoded that stream is a file in memory; Python's `sys.stderr`, C++'s `std::cerr` and file descriptor 2 are as ever.
On Windows OpenCV has a C library of its own, whose stream cannot be exchanged: nothing is heard there.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import TypeVar

from gfldeploy.system import c_function, c_stderr, file_in_memory

T = TypeVar("T")
_MOST_BYTES = 1 << 16
_UNBUFFERED = 2  # _IONBF


def heard(work: Callable[[], T]) -> tuple[T, bytes]:
    """What `work()` returns, and what C code printed meanwhile; any number of threads may call this at once.

    If something was printed, `work` is done again, with no other thread here, to know that it printed it.
    """
    if (stream := _stream()) is None:
        return work(), b""
    with stream.used():
        before = stream.size()
        result = work()
        if stream.size() == before:
            return result, b""
    with stream.used(alone=True):
        return work(), stream.text()


def hears() -> bool:
    """Whether anything can be heard here."""
    return _stream() is not None


class _Stream:
    """C's `stderr` in memory as long as a thread needs it."""

    def __init__(self, pointer: ctypes.c_void_p) -> None:
        """`pointer`: C's variable."""
        fdopen, setvbuf = c_function("fdopen"), c_function("setvbuf")
        fdopen.restype = ctypes.c_void_p
        fdopen.argtypes = [ctypes.c_int, ctypes.c_char_p]
        setvbuf.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int, ctypes.c_size_t]
        self._fd = file_in_memory("gfldeploy-stderr")
        self._memory = fdopen(self._fd, b"a")
        setvbuf(self._memory, None, _UNBUFFERED, 0)
        self._pointer = pointer
        self._terminal = pointer.value
        self._changed = threading.Condition()
        self._users = 0
        self._exclusive = False

    def size(self) -> int:
        return os.fstat(self._fd).st_size

    def text(self) -> bytes:
        os.lseek(self._fd, 0, os.SEEK_SET)  # what is written goes to the end all the same
        return os.read(self._fd, _MOST_BYTES)

    @contextmanager
    def used(self, *, alone: bool = False) -> Iterator[None]:
        """By this thread; with `alone`, by no other meanwhile."""
        with self._changed:
            self._changed.wait_for(lambda: not self._exclusive and not (alone and self._users))
            self._users += 1
            self._exclusive = alone
            self._pointer.value = self._memory
        try:
            yield
        finally:
            with self._changed:
                self._users -= 1
                self._exclusive = False
                if self._users == 0:
                    self._pointer.value = self._terminal
                    os.ftruncate(self._fd, 0)
                self._changed.notify_all()


_making = threading.Lock()


@cache
def _made() -> _Stream | None:
    pointer = c_stderr()
    return None if pointer is None else _Stream(pointer)


def _stream() -> _Stream | None:
    with _making:  # `cache` alone may make several
        return _made()
