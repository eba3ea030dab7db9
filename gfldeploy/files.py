"""Writing so that an interrupted command leaves either the old result or the new one, and what may be replaced."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal, TypeAlias

from gfldeploy.at_once import at_once
from gfldeploy.errors import OutputError
from gfldeploy.signals import check_interrupted, hold_interrupts, terminate_as_interrupt
from gfldeploy.storage import Source, Url, files_at, look_at, read_url, remove_url, upload, write_url
from gfldeploy.system import (
    DirectoryLock,
    cache_folder,
    discard_lock,
    exchange,
    largest_file,
    open_no_link,
    rename,
    user_id,
    without_waiting,
)

StrPath = str | os.PathLike[str]  # a path as users give it

DirectoryKind: TypeAlias = Literal["bundle", "demo", "predict", "triton"]
FileKind: TypeAlias = Literal["json", "csv", "html", "yml"]

_PROBE_BYTES = 1 << 16
_MOST_JSON_BYTES = 256 << 20  # results of days of measuring have a few 10 MB
_MOST_NESTING = 64
_MOST_DIGITS = 19  # as many as 64 bits have
# A directory beside its target, in which the target is written, and our mark in it.
_PARTIAL = ".partial-"
_UNFINISHED = ".unfinished"
_MARK = ".made-by-gfldeploy"
_NEW = "new"
_OLD = "old"
# The file in a directory of ours that lists the others.
_NOTES: dict[DirectoryKind, str] = {
    "bundle": "manifest.json",
    "demo": "demo.json",
    "predict": "predict.json",
    "triton": "triton.json",
}
# How files of ours begin.
_BEGINNINGS: dict[FileKind, str] = {
    "json": r'\{\s*"schema": \d+,\s*"created": "',
    "csv": r"(bundle,)?engine,precision,",
    "html": r'<!doctype html>\s<html[^>]*>\s<head>[^\0]*?<(meta name="generator" content="gfldeploy|title>gfldeploy )',
    "yml": r"schema: \d+\ncreated: ",
}
_BEGINNING_BYTES = 1024
_UPLOADS = 16  # at once
_CHOOSE = "Choose another --output."
_CHOOSE_OR_FORCE = "Choose another --output, or add --force to replace it."
_CHOOSE_OR_MOVE = "Choose another --output, or move it away yourself."


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_text(path: Path, text: str) -> None:
    """Replace `path` with `text` (UTF-8) in one step. Raises `OutputError`."""
    path = _absolute(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with _partial_of(path) as place:
            with (place / _NEW).open("x", encoding="utf-8", newline="") as file:  # the same bytes on every system
                file.write(text)
            rename(place / _NEW, path)


def write_json(path: Path, value: Any) -> None:
    """Replace `path` with `value` as indented JSON in one step. Raises `OutputError`, and `ValueError` for NaN."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: Source) -> Any:
    """Parse a JSON file that may come from elsewhere, within limits of its size, its nesting and its numbers.

    Raises `OSError` and `ValueError`, also for NaN, infinity and anything but a regular file: the caller knows what
    the file was for. Of one at an address also what `storage` raises.
    """
    if isinstance(path, Url):
        return parse_json(read_url(path, _MOST_JSON_BYTES))
    with open(path, "rb", opener=without_waiting) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("it is no regular file")
        if status.st_size > _MOST_JSON_BYTES:
            raise ValueError(f"it has {status.st_size:,} bytes, more than {_MOST_JSON_BYTES:,}")
        data = file.read(_MOST_JSON_BYTES + 1)
    return parse_json(data)


def parse_json(data: bytes) -> Any:
    """The content of such a file. Raises `ValueError`."""
    try:
        value = json.loads(data.decode("utf-8"), parse_constant=_refused_number, parse_int=_whole, parse_float=_finite)
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
    level = [value]
    for _ in range(_MOST_NESTING + 1):
        containers = [one for one in level if isinstance(one, dict | list)]
        if not containers:
            return
        level = [item for one in containers for item in (one.values() if isinstance(one, dict) else one)]
    raise ValueError("it is nested too deeply")


def check_target(target: Source, kind: DirectoryKind = "bundle", *, force: bool = False) -> None:
    """Raise `OutputError` if `target` is in the way of a directory of this kind. Worth a call before long work.

    `force` allows to replace an empty directory and one of the same kind, but never one that holds anything that
    gfldeploy did not write there. At an address, an upload that was interrupted is in nobody's way.
    """
    if isinstance(target, Url):
        _check_there(target, kind, force)
        return
    target = _absolute(target)
    with writing(target):
        if not os.path.lexists(target):
            return
        if target.is_symlink() or not target.is_dir():
            what = "a symbolic link" if target.is_symlink() else "a file"
            raise OutputError(f"{target} is {what}, which is never replaced", _CHOOSE)
        if not force:
            raise OutputError(f"{target} exists already", _CHOOSE_OR_FORCE)
        if stranger := _stranger(target, kind):
            raise _not_ours(target, stranger)


def _not_ours(target: Source, stranger: str) -> OutputError:
    problem = f"{target} holds {stranger}, which gfldeploy did not write, so --force does not replace it"
    return OutputError(problem, _CHOOSE_OR_MOVE)


def check_file(path: Path, kind: FileKind, *, force: bool = False) -> None:
    """Raise `OutputError` if a file of this kind cannot be written to `path`. Worth a call before long work.

    `force` allows to replace a file that begins as gfldeploy's files of this kind do, and nothing else.
    """
    with writing(path):
        if os.path.lexists(path):
            status = path.lstat()
            if not stat.S_ISREG(status.st_mode):
                what = {stat.S_IFLNK: "a symbolic link", stat.S_IFDIR: "a directory"}.get(stat.S_IFMT(status.st_mode))
                raise OutputError(f"{path} is {what or 'no regular file'}, which is never replaced", _CHOOSE)
            if not force:
                raise OutputError(f"{path} exists already", _CHOOSE_OR_FORCE)
            with path.open("rb") as file:
                beginning = file.read(_BEGINNING_BYTES).decode("utf-8", "replace")
            if status.st_size and not re.match(_BEGINNINGS[kind], beginning):
                problem = f"{path} is not a file that gfldeploy wrote, so --force does not replace it"
                raise OutputError(problem, _CHOOSE_OR_MOVE)
        parent = next(folder for folder in path.absolute().parents if folder.exists())
        if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
            raise OutputError(f"cannot write {path}: {parent} is not a writable folder", _CHOOSE)


def check_apart(output: Source, read: Iterable[Source], bundle: Path | None = None) -> None:
    """Raise `OutputError` if the directory `output` would replace something that is `read`, or lie in the `bundle`."""
    if isinstance(output, Url):
        if found := next((path for path in read if isinstance(path, Url) and path.is_below(output)), None):
            raise OutputError(f"the --output, {output}, would replace {found}, which is read", "Choose another.")
        return
    place = output.resolve()
    if bundle is not None and place.is_relative_to(bundle.resolve()):
        raise OutputError(f"the --output, {output}, is the bundle that is read, or inside it", "Choose another.")
    if not place.exists():
        return
    for path in read:
        if isinstance(path, Path) and path.resolve().is_relative_to(place):
            raise OutputError(f"the --output, {output}, would replace {path}, which is read", "Choose another.")


@contextmanager
def atomic_directory(
    target: Path, kind: DirectoryKind = "bundle", *, force: bool = False, need_bytes: int = 0
) -> Iterator[Path]:
    """Yield an empty directory beside `target` that becomes `target` when the block succeeds.

    `force` replaces an existing directory of this kind, in one system call. `need_bytes` must be free. On any
    exception, Ctrl-C and SIGTERM included, what was written is removed and `target` is as it was. Raises `OutputError`
    for everything that the file system refuses.
    """
    target = _absolute(target)
    check_target(target, kind, force=force)
    with terminate_as_interrupt(), _parents_of(target), _partial_of(target) as place:
        free = shutil.disk_usage(place).free
        if free < need_bytes:
            raise OutputError(
                f"{target.parent} has {free / 1e6:.0f} MB free, {need_bytes / 1e6:.0f} MB are needed",
                "Free some space or choose another --output.",
            )
        new = place / _NEW
        try:
            new.mkdir()
            yield new
        except OSError as error:
            if error.errno in _FILESYSTEM_ERRORS or Path(str(error.filename)).is_relative_to(place):
                raise _output_error(target, error) from error
            raise
        check_interrupted()
        check_target(target, kind, force=force)  # another process may have written it meanwhile
        with writing(target), hold_interrupts():
            publish(new, target)


@dataclass
class Unfinished:
    """A folder beside an output for what is done already; `worth_keeping`: for the next run, should this one fail."""

    directory: Path
    worth_keeping: bool


@contextmanager
def unfinished_beside(output: Source, command: str, made: str) -> Iterator[Unfinished]:
    """A folder beside `output` for what `command` has done already, removed when the block ends without an error.

    For an output at an address it is among this user's caches. An error or an interruption leaves it for the next run
    if it is worth keeping, a kill always. `made`: a regular expression for the relative paths of files that the command
    makes in it, and of folders, with a slash at the end.

    Raises `OutputError` if another process is using the folder, if it cannot be written, and if something is in it
    that the command did not make: that is never touched, and no link is followed.
    """
    output = _absolute(_here_for(output) if isinstance(output, Url) else output)
    place = output.with_name(f"{output.name}{_UNFINISHED}")
    with terminate_as_interrupt(), _parents_of(output), ExitStack() as lock:
        with hold_interrupts():
            unfinished = Unfinished(place, _take(lock, place, output, command, made))
        try:
            yield unfinished
        except BaseException as error:
            if unfinished.worth_keeping:
                error.add_note(f"what was done so far is kept in {place.name}, the same command resumes from there")
            else:
                _remove_made(place, made)
            raise
        _remove_made(place, made)


def is_unfinished(output: Path, command: str) -> bool:
    """Whether a run of `command` was killed, or stopped, on its way to `output`, or this is what it left."""
    place = _absolute(output)
    return any(
        _has_mark(one, command, alone=False)
        for one in (place.with_name(f"{place.name}{_UNFINISHED}"), place)
        if one.name.endswith(_UNFINISHED)
    )


def open_own(path: Path) -> IO[bytes]:
    """Open a file in a folder of ours to read and append to, or make it.

    Raises `OSError`, also for a link, a file with another name elsewhere, and anything but a regular file.
    """
    handle = open_no_link(path, os.O_RDWR | os.O_CREAT)
    status = os.fstat(handle)
    if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1:
        os.close(handle)
        raise OSError(errno.EPERM, "it is a link, or no regular file")
    return os.fdopen(handle, "r+b")


@contextmanager
def scratch_directory() -> Iterator[Path]:
    """An empty temporary directory, removed afterwards, or by the next run after a kill. Raises `OutputError`."""
    try:
        target = Path(tempfile.gettempdir()) / f"gfldeploy-{user_id()}"
    except OSError as error:
        raise OutputError(f"there is no place for temporary files: {error.strerror}", "Set TMPDIR.") from error
    with _partial_of(target) as place:
        (place / _NEW).mkdir()
        yield place / _NEW


@contextmanager
def native_writes(directory: Path) -> Iterator[None]:
    """Around code that writes to `directory` and does not check, or does not say, whether a write failed.

    On a full disk Paddle and ONNX Runtime leave a truncated file, with an error of their own or none. Raises
    `OutputError` if, afterwards, `directory` takes no more data or holds a file as large as the process may write.
    """
    try:
        yield
    except Exception:
        _probe(directory, directory.rglob("*"))
        raise
    _probe(directory, directory.rglob("*"))


def check_native_write(file: Path) -> None:
    """As after `native_writes`, of one file: the others of its directory may be many. Raises `OutputError`."""
    _probe(file.parent, [file])


def _probe(directory: Path, written: Iterable[Path]) -> None:
    with writing(directory):
        with tempfile.TemporaryFile(dir=directory) as file:
            file.write(bytes(_PROBE_BYTES))
        sizes = (path.stat().st_size for path in written if path.is_file())
        if (limit := largest_file()) is not None and max(sizes, default=0) >= limit:
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))


@contextmanager
def writing(target: Source) -> Iterator[None]:
    """Whatever the file system refuses in the block becomes an `OutputError` about `target`."""
    try:
        yield
    except OSError as error:
        raise _output_error(target, error) from error


_FILESYSTEM_ERRORS = {
    *(errno.EACCES, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ENAMETOOLONG, errno.ENOSPC, errno.EPERM, errno.EROFS)
}


def _output_error(target: Source, error: OSError) -> OutputError:
    reason = error.strerror or str(error)
    remedy = {
        errno.EDQUOT: "Free some of your quota or choose another --output.",
        errno.EFBIG: "Raise the limit on file sizes (`ulimit -f`), or choose another --output.",
        errno.ENOSPC: "Free some space or choose another --output.",
    }.get(error.errno or 0, "Choose an --output that you may write to.")
    # The partial directory is gone by then: name the target.
    for part in (target, *target.parents) if isinstance(target, Path) else ():
        if _PARTIAL in part.name:
            target = part.with_name(part.name[1:].rpartition(_PARTIAL)[0])
            break
    return OutputError(f"cannot write {target}: {reason}", remedy)


def _absolute(target: Path) -> Path:
    return Path(os.path.abspath(target))  # noqa: PTH100 - resolve() would follow a symbolic link at the target


def _stranger(directory: Path, kind: DirectoryKind) -> str | None:
    """The first thing in `directory` that gfldeploy did not write, by the list that it wrote of its files there."""
    listed: set[Path] = set()
    note = directory / _NOTES[kind]
    with suppress(OSError, ValueError):
        if (files := _files_of(read_json(note), kind)) is not None:
            listed = {note, *(directory / name for name in files)}
    # Whoever imports a Python file of ours leaves it compiled beside it.
    sources = [path for path in listed if path.suffix == ".py"]
    listed.update(found for path in sources for found in path.parent.glob(f"__pycache__/{path.stem}.*.pyc"))
    ours = {folder for path in listed for folder in path.parents}
    for name, folders, files in os.walk(directory):
        folders.sort()
        for path in (Path(name) / one for one in (*sorted(files), *folders)):
            if path.is_symlink() or path not in (ours if path.is_dir() else listed):
                return path.relative_to(directory).as_posix()
    return None


def _files_of(note: Any, kind: DirectoryKind) -> list[str] | None:
    """The files that a note of ours lists; None for anything else."""
    files = note.get("files") if isinstance(note, dict) else None
    if not isinstance(files, dict | list):
        return None
    made = "schema" in note if kind == "bundle" else f"gfldeploy {kind}" in str(note.get("what"))
    return [str(name) for name in files] if made else None


def files_below(directory: Path) -> list[str]:
    """The relative paths of all files, for the note by which `check_target` knows what gfldeploy wrote."""
    return sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*") if not path.is_dir())


@contextmanager
def _parents_of(target: Path) -> Iterator[None]:
    """Make the directories above `target`, and remove those that were made if the block fails."""
    missing = [parent for parent in target.parents if not parent.exists()]
    try:
        with writing(target):
            target.parent.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for directory in missing:
            with suppress(OSError):
                directory.rmdir()
        raise


@contextmanager
def _partial_of(target: Path) -> Iterator[Path]:
    """A directory beside `target` that holds a mark, locked while the block runs and removed afterwards.

    The lock ends with the process in any case, so that the next run knows what a killed one left. Process ids would not
    do: they are used again, in containers always the same few, and mean nothing to another machine.
    """
    place = None
    with ExitStack() as lock:
        try:
            with writing(target), hold_interrupts():
                _remove_stale(target)
                place = Path(tempfile.mkdtemp(prefix=f".{target.name}{_PARTIAL}", dir=target.parent))
                locked = lock.enter_context(closing(DirectoryLock(place)))
                with suppress(OSError):  # a file system without locks
                    locked.acquire(wait=True)
                if not place.exists():
                    # Another run took it for a stale one, in the instant before it was locked.
                    raise OutputError(f"another gfldeploy is starting to write {target}", "Try again.")
                _write_mark(place, "", target)
            yield place
        except BaseException as error:
            if place is not None and not _removed(place):
                error.add_note(f"{place} could not be removed, the next run tries again")
            raise
        _removed(place)


def _removed(place: Path) -> bool:
    """Remove a directory of `_partial_of`, its mark last; whether it is gone."""
    with hold_interrupts():
        for name in (_NEW, _OLD):
            if (place / name).is_dir() and not (place / name).is_symlink():
                shutil.rmtree(place / name, ignore_errors=True)
            else:
                (place / name).unlink(missing_ok=True)
        with suppress(OSError):
            if _names(place) <= {_MARK}:
                (place / _MARK).unlink(missing_ok=True)
            place.rmdir()
    return not place.exists()


def _remove_stale(target: Path) -> None:
    """Remove what killed runs left beside `target`, and restore the name of a directory that one was to replace.

    Anything of such a name without our mark is not ours.
    """
    prefix = f".{target.name}{_PARTIAL}"
    for path in [path for path in target.parent.iterdir() if path.name.startswith(prefix)]:
        if discard_lock(path):
            continue
        with suppress(OSError), closing(DirectoryLock(path)) as lock:  # gone, or no directory
            if not lock.acquire() or not _is_partial(path):
                continue
            if (path / _OLD).exists() and not os.path.lexists(target):
                rename(path / _OLD, target)
            _removed(path)


def _names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def _is_partial(path: Path) -> bool:
    """Whether a directory with such a name is from `_partial_of` and by this user: it has our mark, or is empty."""
    names = _names(path)
    return (
        path.lstat().st_uid == user_id()
        and names <= {_MARK, _NEW, _OLD}
        and (not names or _has_mark(path, "", alone=names == {_MARK}))
    )


def _write_mark(place: Path, command: str, target: Path) -> None:
    with (place / _MARK).open("x", encoding="utf-8", errors="surrogateescape", newline="") as file:
        file.write(f"gfldeploy {command}, on its way to {target.name}; the next run resumes from it, or removes it\n")


def _has_mark(place: Path, command: str, *, alone: bool) -> bool:
    """`alone`: the mark is the only file, and a kill may have left it empty."""
    mark = place / _MARK
    with suppress(OSError):
        if stat.S_ISREG(mark.lstat().st_mode):
            content = mark.read_bytes()
            return content.startswith(f"gfldeploy {command},".encode()) or (alone and not content)
    return False


def _take(lock: ExitStack, place: Path, output: Path, command: str, made: str) -> bool:
    """Make and lock the folder of unfinished work, or take over that of an earlier run; whether anything is in it.

    Raises `OutputError` for anything else at that place.
    """
    with writing(place):
        try:
            with suppress(FileExistsError):
                place.mkdir()
            directory = lock.enter_context(closing(DirectoryLock(place)))
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.ENOTDIR):
                raise _in_the_way(place, "it", output) from error
            raise
        busy = OutputError(f"another gfldeploy is working on {output}", "Wait for it, or choose another --output.")
        locked = True
        with suppress(OSError):  # a file system without locks
            locked = directory.acquire()
        if not locked or not directory.is_of_path():  # somebody has it, or had it until now
            raise busy
        names = _names(place)
        if not names:
            _write_mark(place, command, output)
        elif not _has_mark(place, command, alone=names == {_MARK}):
            raise _in_the_way(place, "it", output)
        _undo_renaming(place, output, command)
        if stranger := next((path for path, own in _contents(place, made) if not own), None):
            raise _in_the_way(place, f"{stranger.relative_to(place).as_posix()!r} in it", output)
        return not names <= {_MARK}


def _undo_renaming(place: Path, output: Path, command: str) -> None:
    """After a kill in the middle of `publish`: what was to be replaced gets its name back, or goes if it was."""
    aside = place / _OLD
    kind = next((one for one in _NOTES if one == command), None)
    if kind is None or not aside.is_dir() or aside.is_symlink() or _stranger(aside, kind):
        return
    if os.path.lexists(output):
        shutil.rmtree(aside)
    else:
        rename(aside, output)


def _in_the_way(place: Path, what: str, output: Path) -> OutputError:
    problem = f"{place} is needed for unfinished work, and gfldeploy did not make {what}"
    return OutputError(problem, f"Move it away, or choose another --output than {output.name}.")


def _contents(place: Path, made: str, below: str = "") -> Iterator[tuple[Path, bool]]:
    """What is in a folder of unfinished work beside its mark, and whether the command made it; folders come last.

    It did not make a link, nor a file that has another name elsewhere: writing to it would write there.
    """
    with os.scandir(place / below) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            path, name = Path(entry.path), f"{below}{entry.name}"
            if not entry.is_dir(follow_symlinks=False):
                if name != _MARK:
                    status = path.lstat()  # not of the entry: on Windows that has no number of links
                    yield path, stat.S_ISREG(status.st_mode) and status.st_nlink == 1 and bool(re.fullmatch(made, name))
            elif _PARTIAL in entry.name and _is_partial(path):
                yield path, True
            else:
                own = bool(re.fullmatch(made, f"{name}/"))
                if own:
                    yield from _contents(place, made, f"{name}/")
                yield path, own


def _remove_made(place: Path, made: str) -> None:
    """Remove what the command made in a folder of unfinished work, and the folder if it is empty then."""
    with hold_interrupts(), suppress(OSError):
        for path, own in list(_contents(place, made)):
            if own and path.is_dir():
                with suppress(OSError):
                    _removed(path) if _PARTIAL in path.name else path.rmdir()
            elif own:
                path.unlink(missing_ok=True)
        if _names(place) <= {_MARK}:
            (place / _MARK).unlink(missing_ok=True)
            place.rmdir()


def publish(new: Path, target: Source, kind: DirectoryKind = "bundle") -> None:
    """Give the directory `new` the name `target` in one step; one already there ends up under the name of `new`.

    An address has no such step: there the note that lists the files goes first and comes last, so that what is
    unfinished is no result. Meanwhile our mark stands there, with a list, so that the next run knows the files for
    ours. Raises `OSError`, of an address also `OutputError` and what `storage` raises.
    """
    if isinstance(target, Url):
        _upload(new, target, kind)
        return
    if not target.exists():
        rename(new, target)
        return
    if exchange(new, target):
        return
    # One after the other, undone if the second fails, or by the next run.
    aside = new.with_name(_OLD)
    rename(target, aside)
    try:
        rename(new, target)
    except OSError:
        rename(aside, target)
        raise
    with suppress(OSError):  # the next run removes it
        rename(aside, new)


def _here_for(target: Url) -> Path:
    """Where on this machine an output at an address is made."""
    digest = hashlib.sha256(str(target).encode()).hexdigest()[:16]
    return cache_folder() / "gfldeploy" / "outputs" / f"{digest}-{target.name[:100]}"


def _check_there(target: Url, kind: DirectoryKind, force: bool) -> None:
    """`check_target` at an address: what has our note is a result, what has our mark alone an unfinished upload."""
    there = _there(target)
    if _NOTES[kind] in there and not force:
        raise OutputError(f"{target} exists already", _CHOOSE_OR_FORCE)
    if stranger := min(there.keys() - _ours_there(target, kind, there), default=None):
        raise _not_ours(target, stranger)


def _there(target: Url) -> dict[str, Url]:
    """The files at an address, by their relative names. Raises `OutputError` for a file there."""
    start = len(str(target).rstrip("/")) + 1
    try:
        with suppress(FileNotFoundError):
            if look_at(target) is not None:
                raise OutputError(f"{target} is a file, which is never replaced", _CHOOSE)
            return {str(one)[start:]: one for one in files_at(target)}
    except (OSError, ValueError) as error:
        raise OutputError(f"cannot read {target}: {error}", _CHOOSE) from error
    return {}


def _ours_there(target: Url, kind: DirectoryKind, there: Iterable[str]) -> set[str]:
    """Names of files that gfldeploy wrote, by its note and its mark."""
    ours: set[str] = set()
    for name in {_NOTES[kind], _MARK} & set(there):
        with suppress(OSError, ValueError):
            if (files := _files_of(read_json(target / name), kind)) is not None:
                ours |= {name, *files}
    return ours


def _upload(new: Path, target: Url, kind: DirectoryKind) -> None:
    note, files, there = _NOTES[kind], files_below(new), _there(target)
    mark = {"what": f"unfinished results of gfldeploy {kind}", "files": sorted({*files, *there} - {_MARK})}
    try:
        write_url(target / _MARK, json.dumps(mark, indent=2).encode())
        if note in there:
            remove_url(there[note])
        sent = at_once(lambda name: upload(new / name, target / name), [one for one in files if one != note], _UPLOADS)
        with closing(sent):
            for _ in sent:
                check_interrupted()
        for name in there.keys() - {*files, _MARK}:
            remove_url(there[name])
        check_interrupted()
        upload(new / note, target / note)
        remove_url(target / _MARK)
    except (OSError, ValueError) as error:
        raise OutputError(f"cannot write {target}: {error}", "Choose an --output that you may write to.") from error
