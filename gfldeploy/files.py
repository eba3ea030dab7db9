"""Writing so that an interrupted command leaves either the old result or the new one, never half of one."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from gfldeploy.errors import OutputError

__all__ = ["atomic_directory", "read_json", "sha256", "write_json", "write_text"]

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_PARTIAL = ".partial-"


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_text(path: Path, text: str) -> None:
    """Replace `path` with `text` (UTF-8) in one step. Raises `OutputError`."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
            Path(temporary).chmod(0o666 & ~_umask())
            Path(temporary).replace(path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise _output_error(path, error) from error


def write_json(path: Path, value: Any) -> None:
    """Replace `path` with `value` as indented JSON in one step; NaN and infinity are refused (not JSON)."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Parse a JSON file. Raises `OSError` and `ValueError`: the caller knows what the file was for."""
    return json.loads(path.read_text(encoding="utf-8"))


@contextmanager
def atomic_directory(target: Path, *, force: bool = False, need_bytes: int = 0) -> Iterator[Path]:
    """Yield an empty directory beside `target` that becomes `target` when the block succeeds.

    `force` replaces an existing directory, exchanging the two in one system call. `need_bytes` is checked against the
    free space first. On any exception, Ctrl-C and SIGTERM included, what was written is removed and `target` is as it
    was. Raises `OutputError` for everything the file system refuses.
    """
    target = Path(os.path.abspath(target))  # noqa: PTH100 - resolve() would follow a symbolic link at the target
    if target.exists() and not force:
        raise OutputError(f"{target} exists already", "Choose another --output, or add --force to replace it.")
    if target.exists() and (not target.is_dir() or target.is_symlink()):
        raise OutputError(f"{target} is not a directory, so --force does not replace it", "Choose another --output.")
    if target.exists() and any(target.iterdir()) and not _is_ours(target):
        raise OutputError(
            f"{target} holds files that gfldeploy did not write, so --force does not replace it",
            "Choose another --output, or empty it yourself.",
        )
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(target)
        free = shutil.disk_usage(target.parent).free
        if free < need_bytes:
            raise OutputError(
                f"{target.parent} has {free / 1e6:.0f} MB free, {need_bytes / 1e6:.0f} MB are needed",
                "Free some space or choose another --output.",
            )
        partial = Path(tempfile.mkdtemp(prefix=f".{target.name}{_PARTIAL}{os.getpid()}-", dir=target.parent))
    except OSError as error:
        raise _output_error(target, error) from error
    try:
        with _terminate_as_interrupt():
            yield partial
        partial.chmod(0o777 & ~_umask())
        _publish(partial, target)
    except OSError as error:
        if error.errno in _FILESYSTEM_ERRORS:
            raise _output_error(target, error) from error
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


_FILESYSTEM_ERRORS = {errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EPERM, errno.EDQUOT, errno.EIO, errno.EEXIST}


def _output_error(target: Path, error: OSError) -> OutputError:
    reason = error.strerror or str(error)
    remedy = {
        errno.ENOSPC: "Free some space or choose another --output.",
        errno.EDQUOT: "Free some of your quota or choose another --output.",
    }.get(error.errno or 0, "Choose an --output that you may write to.")
    return OutputError(f"cannot write {target}: {reason}", remedy)


def _is_ours(directory: Path) -> bool:
    return any((directory / name).exists() for name in ("manifest.json", "demo.json"))


def _publish(partial: Path, target: Path) -> None:
    """Give `partial` the name `target`; a directory already there ends up under the name of `partial`."""
    if not target.exists():
        partial.rename(target)
        return
    libc = ctypes.CDLL(None, use_errno=True)
    renameat2 = getattr(libc, "renameat2", None)
    if renameat2 is not None:
        old, new = os.fsencode(partial), os.fsencode(target)
        if renameat2(_AT_FDCWD, old, _AT_FDCWD, new, _RENAME_EXCHANGE) == 0:
            return
        if ctypes.get_errno() not in (errno.EINVAL, errno.ENOSYS):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(target))
    # A file system without RENAME_EXCHANGE: two renames, undone if the second fails.
    aside = partial.with_name(partial.name + ".old")
    target.rename(aside)
    try:
        partial.rename(target)
    except OSError:
        aside.rename(target)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _remove_stale(target: Path) -> None:
    """Remove what a killed run of ours left beside `target`."""
    prefix = f".{target.name}{_PARTIAL}"
    for path in target.parent.glob(prefix.replace("[", "[[]") + "*"):
        pid = path.name[len(prefix) :].split("-")[0]
        if pid.isdigit() and not Path(f"/proc/{pid}").exists():
            shutil.rmtree(path, ignore_errors=True)


@contextmanager
def _terminate_as_interrupt() -> Iterator[None]:
    """Let SIGTERM unwind the stack as Ctrl-C does. Does nothing outside the main thread."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    try:
        previous = signal.signal(signal.SIGTERM, interrupt)
    except ValueError:
        yield
        return
    try:
        yield
    finally:
        with suppress(ValueError):
            signal.signal(signal.SIGTERM, previous)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
