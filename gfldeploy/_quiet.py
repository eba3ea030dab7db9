"""Keep what paddle and ppdet print while they are imported, or while they build a model, away from the user."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
import warnings
from collections.abc import Iterator

from gfldeploy.system import flush_c_streams


class _Stderr:
    """A stream that writes to whatever `sys.stderr` is at that moment."""

    def write(self, text: str) -> int:
        return sys.stderr.write(text)

    def flush(self) -> None:
        sys.stderr.flush()


def _settle_ppdet_loggers(sink: io.StringIO) -> None:
    """Let ppdet's loggers report errors only, on stderr; they keep the stream that was stdout at their import."""
    for name, logger in logging.root.manager.loggerDict.items():
        if name.partition(".")[0] != "ppdet" or not isinstance(logger, logging.Logger):
            continue
        for handler in logger.handlers:
            if isinstance(handler, logging.StreamHandler) and handler.stream is sink:
                handler.setStream(_Stderr())
                logger.setLevel(logging.ERROR)


@contextlib.contextmanager
def _no_native_output(*descriptors: int) -> Iterator[None]:
    flush_c_streams()
    saved = [(descriptor, os.dup(descriptor)) for descriptor in descriptors]
    with open(os.devnull, "wb") as nowhere:  # noqa: PTH123 - a file descriptor is what is wanted
        for descriptor in descriptors:
            os.dup2(nowhere.fileno(), descriptor)
    try:
        yield
    finally:
        flush_c_streams()
        for descriptor, copy in saved:
            os.dup2(copy, descriptor)
            os.close(copy)


@contextlib.contextmanager
def quiet(*, native_stderr: bool = False) -> Iterator[None]:
    """Swallow prints, warnings and log lines of third-party code inside the block; exceptions pass.

    Only for imports and calls into other packages, never around our own code: it replaces `sys.stdout`, `sys.stderr`
    and the stdout of C++ code for the whole process. C++ code keeps its stderr, so that the last message of a crash is
    not lost, unless `native_stderr` silences it too.
    """
    sink = io.StringIO()
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(sink),
        contextlib.redirect_stderr(sink),
        _no_native_output(1, *([2] if native_stderr else [])),
    ):
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            _settle_ppdet_loggers(sink)
