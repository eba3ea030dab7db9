"""Writing so that an interrupted command leaves either the old result or the new one, never half of one."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import hashlib
import json
import math
import os
import resource
import shutil
import signal
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from gfldeploy.errors import OutputError

__all__ = [
    "atomic_directory",
    "check_target",
    "native_writes",
    "publish",
    "read_json",
    "sha256",
    "terminate_as_interrupt",
    "unfinished_beside",
    "write_json",
    "write_text",
]

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_PARTIAL = ".partial-"
_PROBE_BYTES = 1 << 16
_MOST_JSON_BYTES = 256 << 20  # results of days of measuring have a few 10 MB
_MOST_NESTING = 64
_MOST_DIGITS = 19  # as many as 64 bits have


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
    """Parse a JSON file that may come from elsewhere, within limits: of its size, of nesting, and of numbers.

    Raises `OSError` and `ValueError`, also for NaN, infinity and what is no regular file: the caller knows what the
    file was for.
    """
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:  # a FIFO would wait for a writer
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("it is no regular file")
        if status.st_size > _MOST_JSON_BYTES:
            raise ValueError(f"it has {status.st_size:,} bytes, more than {_MOST_JSON_BYTES:,}")
        text = file.read(_MOST_JSON_BYTES + 1).decode("utf-8")
    try:
        value = json.loads(text, parse_constant=_refused_number, parse_int=_whole, parse_float=_finite)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    _check_nesting(value)
    return value


def _refused_number(text: str) -> Any:
    raise ValueError(f"{text:.40} is no number in JSON")


def _whole(text: str) -> int:
    if len(text) > _MOST_DIGITS:
        raise ValueError(f"it has a number of {len(text):,} digits")
    return int(text)


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text:.40} is too large a number")
    return value


def _check_nesting(value: Any) -> None:
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(_MOST_NESTING):
        held = (item for one in level for item in (one.values() if isinstance(one, dict) else one))
        level = [item for item in held if isinstance(item, dict | list)]
        if not level:
            return
    raise ValueError("it is nested too deeply")


def check_target(target: Path, *, force: bool = False) -> None:
    """Raise `OutputError` if `atomic_directory` would refuse `target`: worth asking before long work."""
    target = _absolute(target)
    try:
        if not os.path.lexists(target):
            return
        if target.is_symlink() or not target.is_dir():
            kind = "a symbolic link" if target.is_symlink() else "a file"
            raise OutputError(f"{target} is {kind}, which is never replaced", "Choose another --output.")
        if not force:
            raise OutputError(f"{target} exists already", "Choose another --output, or add --force to replace it.")
        if any(target.iterdir()) and not _is_ours(target):
            raise OutputError(
                f"{target} holds files that gfldeploy did not write, so --force does not replace it",
                "Choose another --output, or empty it yourself.",
            )
    except OSError as error:
        raise _output_error(target, error) from error


@contextmanager
def atomic_directory(target: Path, *, force: bool = False, need_bytes: int = 0) -> Iterator[Path]:
    """Yield an empty directory beside `target` that becomes `target` when the block succeeds.

    `force` replaces an existing directory that gfldeploy wrote, exchanging the two in one system call. `need_bytes` is
    checked against the free space first. On any exception, Ctrl-C and SIGTERM included, what was written is removed and
    `target` is as it was. Raises `OutputError` for everything the file system refuses.
    """
    target = _absolute(target)
    check_target(target, force=force)
    with terminate_as_interrupt(), _parents_of(target), _partial_of(target) as partial:
        free = shutil.disk_usage(partial).free
        if free < need_bytes:
            raise OutputError(
                f"{target.parent} has {free / 1e6:.0f} MB free, {need_bytes / 1e6:.0f} MB are needed",
                "Free some space or choose another --output.",
            )
        try:
            yield partial
        except OSError as error:
            if error.errno in _FILESYSTEM_ERRORS or _is_below(error.filename, partial):
                raise _output_error(target, error) from error
            raise
        check_target(target, force=force)  # somebody else may have been faster
        try:
            partial.chmod(0o777 & ~_umask())
            publish(partial, target)
        except OSError as error:
            raise _output_error(target, error) from error


@contextmanager
def unfinished_beside(output: Path) -> Iterator[Path]:
    """A directory beside `output` for what is done already, removed when the block ends without an error.

    An error, an interruption or a kill leaves it for the next run. Raises `OutputError` if another process is using it,
    or it cannot be written.
    """
    output = _absolute(output)
    directory = output.with_name(f"{output.name}.unfinished")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise OutputError(
            f"cannot write {directory}: {error.strerror or error}", "Choose another --output, or remove it."
        ) from error
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise OutputError(
                f"another gfldeploy is working on {output}", "Wait for it, or choose another --output."
            ) from error
        except OSError:  # a file system without locks
            pass
        yield directory
        shutil.rmtree(directory, ignore_errors=True)
    finally:
        os.close(lock)


@contextmanager
def native_writes(directory: Path) -> Iterator[None]:
    """Around writing to `directory` by code that does not check, or does not say, whether a write failed.

    Paddle and ONNX Runtime leave a file cut short on a full disk, with an error of their own or none. Raises
    `OutputError` if, afterwards, `directory` takes no more data or holds a file as large as the process may write.
    """
    try:
        yield
    except Exception:
        _probe(directory)
        raise
    _probe(directory)


def _probe(directory: Path) -> None:
    try:
        with tempfile.TemporaryFile(dir=directory) as file:
            file.write(bytes(_PROBE_BYTES))
        limit, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
        sizes = (path.stat().st_size for path in directory.rglob("*") if path.is_file())
        if limit != resource.RLIM_INFINITY and max(sizes, default=0) >= limit:
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
    except OSError as error:
        raise _output_error(directory, error) from error


@contextmanager
def terminate_as_interrupt() -> Iterator[None]:
    """Let SIGTERM unwind the stack as Ctrl-C does.

    Does nothing outside the main thread, or where the program handles SIGTERM in its own way.
    """
    previous = signal.getsignal(signal.SIGTERM)
    if previous not in (signal.SIG_DFL, _interrupt):
        yield
        return
    try:
        signal.signal(signal.SIGTERM, _interrupt)
    except ValueError:  # not the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Ignore Ctrl-C and SIGTERM: for a removal that takes milliseconds. Does nothing outside the main thread."""
    previous: dict[signal.Signals, Any] = {}
    with suppress(ValueError):
        for number in (signal.SIGINT, signal.SIGTERM):
            previous[number] = signal.signal(number, signal.SIG_IGN)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


_FILESYSTEM_ERRORS = {
    errno.EACCES,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EIO,
    errno.ENAMETOOLONG,
    errno.ENOSPC,
    errno.EPERM,
    errno.EROFS,
}


def _output_error(target: Path, error: OSError) -> OutputError:
    reason = error.strerror or str(error)
    remedy = {
        errno.EDQUOT: "Free some of your quota or choose another --output.",
        errno.EFBIG: "Raise the limit on file sizes (`ulimit -f`), or choose another --output.",
        errno.ENOSPC: "Free some space or choose another --output.",
    }.get(error.errno or 0, "Choose an --output that you may write to.")
    # The partial directory is gone by the time this is read: name the target.
    for part in (target, *target.parents):
        if _PARTIAL in part.name:
            target = part.with_name(part.name[1:].rpartition(_PARTIAL)[0])
            break
    return OutputError(f"cannot write {target}: {reason}", remedy)


def _absolute(target: Path) -> Path:
    return Path(os.path.abspath(target))  # noqa: PTH100 - resolve() would follow a symbolic link at the target


def _is_below(name: object, directory: Path) -> bool:
    return isinstance(name, str) and Path(name).is_relative_to(directory)


def _is_ours(directory: Path) -> bool:
    """Whether gfldeploy wrote `directory`: a bundle and nothing beside it, or what `demo` or `predict` made."""
    for command in ("demo", "predict"):
        with suppress(OSError, ValueError):
            note = read_json(directory / f"{command}.json")
            return isinstance(note, dict) and f"gfldeploy {command}" in str(note.get("what"))
    with suppress(OSError, ValueError):
        manifest = read_json(directory / "manifest.json")
        if isinstance(manifest, dict) and "schema" in manifest and isinstance(manifest.get("files"), dict):
            listed = {directory / name for name in (*manifest["files"], "manifest.json")}
            return all(path in listed for path in directory.rglob("*") if path.is_symlink() or not path.is_dir())
    return False


@contextmanager
def _parents_of(target: Path) -> Iterator[None]:
    """Make the directories above `target`; those that were made are removed if the block fails."""
    missing = [parent for parent in target.parents if not parent.exists()]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        _remove_empty(missing)
        raise _output_error(target, error) from error
    try:
        yield
    except BaseException:
        _remove_empty(missing)
        raise


def _remove_empty(directories: list[Path]) -> None:
    for directory in directories:
        with suppress(OSError):
            directory.rmdir()


@contextmanager
def _partial_of(target: Path) -> Iterator[Path]:
    """An empty directory beside `target`, locked while the block runs and removed, by that name, afterwards.

    The lock ends with the process, however it ends, so that the next run knows what a killed one left: process ids are
    used again, always the same few in containers, and mean nothing to another machine on a shared file system.
    """
    try:
        _remove_stale(target)
        partial = Path(tempfile.mkdtemp(prefix=f".{target.name}{_PARTIAL}", dir=target.parent))
        lock = os.open(partial, os.O_RDONLY)
    except OSError as error:
        raise _output_error(target, error) from error
    try:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(lock, fcntl.LOCK_EX)
        if not partial.exists():
            # Another run took it for a stale one, in the instant before it was locked.
            raise OutputError(f"another gfldeploy is starting to write {target}", "Try again.")
        yield partial
    finally:
        with _uninterrupted():
            shutil.rmtree(partial, ignore_errors=True)
            os.close(lock)


def _remove_stale(target: Path) -> None:
    """Remove what killed runs left beside `target`."""
    prefix = f".{target.name}{_PARTIAL}"
    for path in [path for path in target.parent.iterdir() if path.name.startswith(prefix)]:
        with suppress(OSError):  # locked by a running process, or gone
            lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(lock)


def publish(partial: Path, target: Path) -> None:
    """Give `partial` the name `target` in one step; a directory already there ends up under the name of `partial`."""
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
    # Its name is not that of a partial directory: if the process is killed in between, it is all that is left.
    aside = partial.with_name(f".{target.name}.replaced-{partial.name.rpartition('-')[2]}")
    with _uninterrupted():
        target.rename(aside)
        try:
            partial.rename(target)
        except OSError:
            aside.rename(target)
            raise
        shutil.rmtree(aside, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
