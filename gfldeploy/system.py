"""What differs from one operating system to the other, all of it: the rest of the package asks here.

What is asked for is whether something is there, not which system it is. gfldeploy runs on Linux; macOS and Windows get
the forms below that need nothing of Linux. These are tested on Linux with what the others lack taken away
(`tests/portable/`), and have not run there. docs/contracts.md says where less is promised.
"""

from __future__ import annotations

import ctypes
import errno
import importlib
import os
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

_T = TypeVar("_T")


def _optional(module: str) -> Any:
    """A module that not every system has; None where it is missing."""
    try:
        return importlib.import_module(module)
    except ImportError:
        return None


_fcntl = _optional("fcntl")
_resource = _optional("resource")
_O_NOFOLLOW: int = getattr(os, "O_NOFOLLOW", 0)
_O_NONBLOCK: int = getattr(os, "O_NONBLOCK", 0)
_O_DIRECTORY: int = getattr(os, "O_DIRECTORY", 0)
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2  # of renameat2, and RENAME_SWAP of renamex_np
_PR_SET_PDEATHSIG = 1
_SIGKILL: int = getattr(signal, "SIGKILL", 0)
_ORPHAN_S = 0.25
_LOCK = ".lock"
_LOCK_S = 0.1
# How long Windows is asked again for a file that somebody has open: virus scanners do for an instant.
_PATIENCE_S = 1.0
_PATIENCE_STEP_S = 0.02
_PATIENT = os.name == "nt"
_NOT_IN_NAMES = str.maketrans(dict.fromkeys('<>:"/\\|?*', "_"))
# What Windows says of a process that crashed (ntstatus.h).
_CRASHES = {
    0xC0000005: "an access violation",
    0xC0000017: "too little memory",
    0xC000001D: "an illegal instruction",
    0xC0000094: "a division by zero",
    0xC00000FD: "a stack overflow",
    0xC0000135: "a DLL that was not found",
    0xC0000374: "a damaged heap",
    0xC0000409: "a damaged stack",
}
_STOPPED = 0xC000013A  # by Ctrl-C

STOP_SIGNALS: tuple[int, ...] = tuple(
    int(getattr(signal, name)) for name in ("SIGINT", "SIGTERM", "SIGBREAK") if hasattr(signal, name)
)
"""Those by which a command is asked to stop; Windows sends SIGBREAK for Ctrl-Break and for a closed window."""


# The machine and the user.


def usable_cpus() -> list[int]:
    """The numbers of the CPUs that this thread may use; macOS does not tell and has all."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    import psutil

    process = psutil.Process()
    return sorted(process.cpu_affinity()) if hasattr(process, "cpu_affinity") else list(range(os.cpu_count() or 1))


def cpu_name() -> str:
    """The name of the processor where no file says it; empty if it is not known."""
    with suppress(OSError, AttributeError):
        if (registry := _optional("winreg")) is not None:
            place = r"HARDWARE\DESCRIPTION\System\CentralProcessor\0"
            with registry.OpenKey(registry.HKEY_LOCAL_MACHINE, place) as key:
                return str(registry.QueryValueEx(key, "ProcessorNameString")[0]).strip()
        if sys.platform == "darwin":
            ask = ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]
            return subprocess.run(ask, capture_output=True, text=True, check=False).stdout.strip()
    return ""


def peak_memory_mb() -> float:
    """The most resident memory that this process has had, in 10^6 bytes; what it has now if nobody tells."""
    import psutil

    # Not getrusage: on Linux its ru_maxrss starts with the memory of the process that started this one.
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024 / 1e6
    memory: Any = psutil.Process().memory_info()
    if hasattr(memory, "peak_wset"):  # Windows
        return float(memory.peak_wset) / 1e6
    if _resource is not None:  # macOS counts bytes, and anew in every process
        return float(_resource.getrusage(_resource.RUSAGE_SELF).ru_maxrss) / 1e6
    return float(memory.rss) / 1e6


def user_id() -> int:
    """As files have it: on Windows, where each user has temporary files of their own, everybody's is 0."""
    return os.geteuid() if hasattr(os, "geteuid") else 0


def cache_folder() -> Path:
    """Where this user's programs keep what they can make again; a folder that cannot be written if there is none."""
    given = os.environ.get("XDG_CACHE_HOME") or (os.environ.get("LOCALAPPDATA") if os.name == "nt" else None)
    try:
        return Path(given) if given else Path.home() / ".cache"
    except RuntimeError:  # a user without a home, as containers have
        return Path("/nonexistent/.cache")


def font_folders() -> list[Path]:
    """Where the system and this user have fonts; on Linux where fontconfig looks by default."""
    if os.name == "nt":
        return [Path(os.environ.get("WINDIR", "C:\\Windows")) / "Fonts", cache_folder() / "Microsoft/Windows/Fonts"]
    if sys.platform == "darwin":
        return [Path("/System/Library/Fonts"), Path("/Library/Fonts"), Path.home() / "Library/Fonts"]
    home = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local/share"
    shared = (os.environ.get("XDG_DATA_DIRS") or "/usr/local/share:/usr/share").split(":")
    return [*(Path(one) / "fonts" for one in (home, *shared) if one), Path.home() / ".fonts"]


def allow_open_files(wanted: int) -> int:
    """Let this process have so many files and connections open if it may; how many it may have, no more than that.

    Windows sets no limit.
    """
    if _resource is None:
        return wanted
    soft, hard = _resource.getrlimit(_resource.RLIMIT_NOFILE)
    most = wanted if hard == _resource.RLIM_INFINITY else min(wanted, hard)
    if soft != _resource.RLIM_INFINITY and soft < most:
        with suppress(OSError, ValueError):  # macOS has a limit below the one that it tells
            _resource.setrlimit(_resource.RLIMIT_NOFILE, (most, hard))
            soft = most
    return wanted if soft == _resource.RLIM_INFINITY else min(wanted, soft)


def largest_file() -> int | None:
    """The bytes of the largest file that this process may write; None without a limit."""
    if _resource is None:
        return None
    limit, _ = _resource.getrlimit(_resource.RLIMIT_FSIZE)
    return None if limit == _resource.RLIM_INFINITY else int(limit)


# Files.


def without_waiting(path: str, flags: int) -> int:
    """An opener for `open`, which does not wait for whoever is at the other end of a named pipe."""
    return os.open(path, flags | _O_NONBLOCK)


def open_no_link(path: Path, flags: int) -> int:
    """`os.open` that follows no link and waits for nobody. Raises `OSError`."""
    if not _O_NOFOLLOW and path.is_symlink():
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
    return os.open(path, flags | _O_NOFOLLOW | _O_NONBLOCK, 0o666)


def descriptor_path(descriptor: int) -> str | None:
    """A path by which C code can open what is open here; None where there is none."""
    return f"/proc/self/fd/{descriptor}" if Path("/proc/self/fd").exists() else None


def named_path(path: str | os.PathLike[str]) -> str | None:
    """An absolute path for C code that takes UTF-8; None for one that is not, on which OpenCV crashes."""
    name = os.path.abspath(path)  # noqa: PTH100 - `resolve` would follow links
    try:
        name.encode()
    except UnicodeEncodeError:
        return None
    return name


@contextmanager
def folder_path(folder: Path) -> Iterator[str | None]:
    """The same of a folder, by its descriptor where that is possible."""
    if not Path("/proc/self/fd").exists():
        yield named_path(folder)
        return
    handle = os.open(folder, os.O_RDONLY | _O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{handle}"
    finally:
        os.close(handle)


def name_for_file(text: str) -> str:
    """The text without what this system does not have in names of files."""
    return text.translate(_NOT_IN_NAMES) if os.name == "nt" else text


def rename(source: Path, target: Path) -> None:
    """Give `source` the name `target`, in place of a file that has it. Raises `OSError`.

    Windows refuses while somebody has one of them open, or a file in a folder that is renamed: it is asked again for a
    second, and then nothing has changed.
    """
    _patiently(lambda: source.replace(target))


def _patiently(work: Callable[[], _T]) -> _T:
    deadline = time.monotonic() + _PATIENCE_S
    while True:
        try:
            return work()
        except PermissionError:
            if not _PATIENT or time.monotonic() > deadline:
                raise
            time.sleep(_PATIENCE_STEP_S)


def exchange(one: Path, other: Path) -> bool:
    """Exchange the names of two directories in one step; False where the system or the file system cannot.

    Raises `OSError` for anything else that it refuses.
    """
    if (rename_both := _rename_both()) is None:
        return False
    if rename_both(os.fsencode(one), os.fsencode(other)) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(number, os.strerror(number), str(other))


def _rename_both() -> Any:
    """A function of two names, which exchanges them and sets errno; None where there is none."""
    try:
        library = ctypes.CDLL(None, use_errno=True)
    except (OSError, TypeError):  # Windows
        return None
    if (linux := getattr(library, "renameat2", None)) is not None:
        return lambda one, other: linux(_AT_FDCWD, one, _AT_FDCWD, other, _RENAME_EXCHANGE)
    if (apple := getattr(library, "renamex_np", None)) is not None:
        return lambda one, other: apple(one, other, _RENAME_EXCHANGE)
    return None


class DirectoryLock:
    """A lock of a directory, among all processes of this machine; it ends with the process, however that ends.

    On POSIX systems the directory itself is locked. Windows locks no directories, and moves and removes none with an
    open file in it: there a file beside it, `NAME.lock`, is made by whoever has the lock and kept open, so that nobody
    can remove it. After a kill it stays, and the next one removes it.
    """

    def __init__(self, directory: Path) -> None:
        """Raises `OSError` for a link, and for anything but a directory."""
        self._directory = directory
        self._file = directory.with_name(directory.name + _LOCK)
        self._handle: int | None = None
        if _fcntl is not None:
            self._handle = os.open(directory, os.O_RDONLY | _O_DIRECTORY | _O_NOFOLLOW)
            self._status = os.fstat(self._handle)
            return
        self._status = directory.lstat()
        if not stat.S_ISDIR(self._status.st_mode):
            number = errno.ELOOP if stat.S_ISLNK(self._status.st_mode) else errno.ENOTDIR
            raise OSError(number, os.strerror(number), str(directory))

    def acquire(self, *, wait: bool = False) -> bool:
        """False if somebody else has it, unless we `wait`. Raises `OSError` where nothing can be locked."""
        if _fcntl is not None:
            try:
                _fcntl.flock(self._handle, _fcntl.LOCK_EX | (0 if wait else _fcntl.LOCK_NB))
            except BlockingIOError:
                return False
            return True
        while not self._make():
            if not wait:
                return False
            time.sleep(_LOCK_S)
        return True

    def _make(self) -> bool:
        for _ in range(2):
            with suppress(FileExistsError):
                self._handle = _patiently(lambda: os.open(self._file, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
                return True
            if not discard_lock(self._file):
                break
        return False

    def is_of_path(self) -> bool:
        """Whether the directory still has its name."""
        try:
            return os.path.samestat(self._directory.lstat(), self._status)
        except OSError:
            return False

    def close(self) -> None:
        """Let it go, and end the use of this object."""
        if self._handle is not None:
            os.close(self._handle)
            if _fcntl is None:
                discard_lock(self._file)
            self._handle = None


def discard_lock(path: Path) -> bool:
    """Remove the file of a lock that a killed process left; False if it is none, or one that somebody has."""
    if _fcntl is not None or not path.name.endswith(_LOCK):
        return False
    try:
        status = path.lstat()
        if not stat.S_ISREG(status.st_mode) or status.st_size:
            return False
        path.unlink()
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return True


# The C library.


@cache
def c_library() -> ctypes.CDLL | None:
    """That of Python itself, which most packages share; None where it cannot be had."""
    for name in (None, "ucrtbase"):
        with suppress(OSError, TypeError):  # Windows names its library
            return ctypes.CDLL(name)
    return None


def c_function(name: str) -> Any:
    """A function of the C library; None where it has none of this name."""
    return getattr(c_library(), name, None)


def flush_c_streams() -> None:
    """Write what C code has printed and not written yet."""
    if (flush := c_function("fflush")) is not None:
        flush(None)


def c_stderr() -> ctypes.c_void_p | None:
    """C's variable `stderr`, which can be pointed elsewhere; None on Windows, where it is none."""
    for name in ("stderr", "__stderrp"):  # on Linux, on macOS
        with suppress(ValueError):
            if (library := c_library()) is not None:
                return ctypes.c_void_p.in_dll(library, name)
    return None


def file_in_memory(name: str) -> int:
    """The descriptor of a new file without a name, in memory where the system has such files."""
    if (create := getattr(os, "memfd_create", None)) is not None:
        return int(create(name))
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def is_windows_console(stream: Any) -> bool:
    """Whether a text stream is one, which takes Unicode from Python's own stream only, and never fails."""
    return os.name == "nt" and stream is not None and bool(stream.isatty())


# Processes.


def interrupt_self(number: int) -> None:
    """Send this process one of `STOP_SIGNALS`, from any thread."""
    if os.name == "nt":  # where `os.kill` ends a process at once
        signal.raise_signal(number)
    else:
        os.kill(os.getpid(), number)


def start_apart() -> dict[str, Any]:
    """Arguments of `Popen` for a process that Ctrl-C at the terminal does not reach, and `kill_tree` kills whole."""
    if hasattr(os, "killpg"):
        return {"start_new_session": True}
    return {"creationflags": getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0)}


def kill_tree(process: subprocess.Popen[bytes]) -> None:
    """Kill a process that was started with `start_apart`, and what it started.

    Where there are no process groups, these are found by their parents: one whose parent has ended is not.
    """
    if hasattr(os, "killpg"):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, _SIGKILL)
        return
    import psutil

    with suppress(psutil.Error):
        for one in psutil.Process(process.pid).children(recursive=True):
            with suppress(psutil.Error):
                one.kill()
    process.kill()


def end_of(code: int) -> str | None:
    """How a process ended that returned this code, as an end of "the process ..."; None if it ended by itself."""
    if code < 0:
        names = {int(one): one.name for one in signal.Signals}  # real-time signals have none
        name = names.get(-code, f"signal {-code}")
        return f"was killed by {name}, perhaps because memory ran out" if name == "SIGKILL" else f"crashed with {name}"
    if code == _STOPPED:
        return "was interrupted"
    return f"crashed with {_CRASHES.get(code, f'status {code:#x}')}" if code >= 0xC0000000 else None


def die_with(parent: int) -> None:
    """End this process when the process of this number, which started it, ends, in whatever way.

    Linux does it, at once. Elsewhere a thread looks four times a second, which C code that keeps the GIL delays.
    """
    if (prctl := c_function("prctl")) is not None:
        prctl(_PR_SET_PDEATHSIG, _SIGKILL)
        if os.getppid() != parent:  # it has gone before this
            os._exit(1)
        return
    # Not by `getppid` alone: on Windows it stays the same, and in a virtual environment a launcher stands between.
    threading.Thread(target=_end_after, args=(parent, os.getppid()), name="parent", daemon=True).start()


def _end_after(parent: int, starter: int) -> None:
    import psutil

    try:
        process = psutil.Process(parent)
        # Numbers are used again: one that began after this process is not its parent.
        if process.create_time() <= psutil.Process().create_time():
            while process.is_running() and os.getppid() == starter:
                time.sleep(_ORPHAN_S)
    except psutil.NoSuchProcess:
        pass
    except psutil.AccessDenied:  # another user's
        return
    os._exit(1)
