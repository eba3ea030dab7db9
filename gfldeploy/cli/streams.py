"""Standard output and error for the commands: always open, and errors of writing are reported at the end."""

from __future__ import annotations

import errno
import io
import os
import select
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from gfldeploy.system import is_windows_console


class _Kept(io.FileIO):
    """A file whose `write` never fails: the first error is kept in `error`, and the data is lost."""

    error: OSError | None = None

    def write(self, data: Any) -> int:
        while True:
            try:
                written = super().write(data)
            except OSError as error:
                self.error = self.error or error
                return len(memoryview(data).cast("B"))
            if written is not None:
                return written
            select.select([], [self], [])  # a pipe that does not block, and is full; Windows has none


@contextmanager
def standard_streams() -> Iterator[Callable[[], OSError | None]]:
    """Replace `sys.stdout` and `sys.stderr` by streams that never fail in the middle of work.

    A descriptor that the caller closed is opened on /dev/null, because otherwise the next file would get its number and
    be printed into. Yields a function that returns the error of writing to standard output, or None; a reader that went
    away (`gfldeploy ... | head`) is no error. Streams that other code put there, such as a test, are left alone.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
    names = [
        name
        for name in ("stdout", "stderr")
        if getattr(sys, name) in (None, getattr(sys, f"__{name}__")) and not is_windows_console(getattr(sys, name))
    ]
    before = {name: getattr(sys, name) for name in names}
    kept = {name: _Kept(1 if name == "stdout" else 2, "w", closefd=False) for name in names}
    for name, raw in kept.items():
        stream = before[name]
        if stream is not None:
            stream.flush()
        # What an encoding lacks, as those of Windows do, is shown by its code.
        errors = "backslashreplace" if stream is None or stream.errors == "strict" else stream.errors
        encoding = "utf-8" if stream is None else stream.encoding
        text = io.TextIOWrapper(io.BufferedWriter(raw), encoding, errors, line_buffering=True)
        setattr(sys, name, text)

    def failure() -> OSError | None:
        sys.stdout.flush()
        error = kept["stdout"].error if "stdout" in kept else None
        return None if error is None or error.errno in (errno.EPIPE, errno.ECONNRESET) else error

    try:
        yield failure
    finally:
        for name, stream in before.items():
            getattr(sys, name).flush()
            setattr(sys, name, stream)
