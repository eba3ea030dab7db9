"""Takes from Python on Linux what it lacks on Windows, as far as that can be done: `PYTHONPATH=tests/portable pytest`.

Python imports this when it starts, and so do the processes that a test starts. Modules that only POSIX systems have
cannot be imported by anyone. gfldeploy alone sees `os`, `signal` and `ctypes` without what Windows lacks there, and
neither /proc nor /sys. No directory can be opened, and what is open can neither be renamed nor removed.
"""

from __future__ import annotations

import builtins
import contextlib
import ctypes
import errno
import functools
import os
import pathlib
import shutil
import signal
import stat
import sys
import types
from collections.abc import Callable
from typing import Any

MODULES = ("_posixshmem", "fcntl", "grp", "nis", "pty", "pwd", "resource", "spwd", "syslog", "termios", "tty")
OS = """
EX_OK F_LOCK F_TEST F_TLOCK F_ULOCK O_ACCMODE O_ASYNC O_CLOEXEC O_DIRECT O_DIRECTORY O_DSYNC O_LARGEFILE O_NDELAY
O_NOATIME O_NOCTTY O_NOFOLLOW O_NONBLOCK O_PATH O_RSYNC O_SYNC O_TMPFILE P_ALL P_PGID P_PID WCONTINUED WEXITSTATUS
WIFEXITED WIFSIGNALED WIFSTOPPED WNOHANG WSTOPSIG WTERMSIG WUNTRACED chown chroot confstr copy_file_range ctermid
eventfd fchdir fchmod fchown fdatasync fork forkpty fpathconf fstatvfs getegid getenvb geteuid getgid getgrouplist
getgroups getloadavg getpgid getpgrp getpriority getrandom getresgid getresuid getsid getuid getxattr initgroups
killpg lchown listxattr lockf login_tty major makedev memfd_create minor mkfifo mknod nice openpty pathconf
pidfd_open pipe2 posix_fadvise posix_fallocate posix_spawn posix_spawnp pread preadv pwrite pwritev readv
register_at_fork removexattr sched_get_priority_max sched_get_priority_min sched_getaffinity sched_getparam
sched_getscheduler sched_setaffinity sched_yield sendfile setegid seteuid setgid setgroups setns setpgid setpriority
setregid setresgid setresuid setreuid setsid setuid setxattr splice statvfs sync sysconf tcgetpgrp tcsetpgrp ttyname
uname unshare wait wait3 wait4 waitid writev
"""
SIGNALS = {*(name for name in dir(signal) if name.startswith("SIG") and name[3] != "_")} - {
    *("SIGABRT", "SIGFPE", "SIGILL", "SIGINT", "SIGSEGV", "SIGTERM")
}
SIGNAL = """
alarm getitimer pause pidfd_send_signal pthread_kill pthread_sigmask setitimer siginterrupt sigpending sigtimedwait
sigwait sigwaitinfo
"""
HIDDEN = ("/proc/", "/sys/")


class Poorer(types.ModuleType):
    """A module without some names, for whoever imports it in gfldeploy."""

    def __init__(self, module: types.ModuleType, without: set[str], **other: object) -> None:
        super().__init__(module.__name__)
        self.__dict__.update(_module=module, _without=frozenset(without), **other)

    def __getattr__(self, name: str) -> Any:
        if name in self._without:
            raise AttributeError(f"{self.__name__} has no {name} on Windows", name=name, obj=self)
        return getattr(self._module, name)


class Library(ctypes.CDLL):
    """Without one for the process itself."""

    def __init__(self, name: str | None, *arguments: Any, **keywords: Any) -> None:
        if name is None:
            raise TypeError("LoadLibrary() argument 1 must be str, not None")
        super().__init__(name, *arguments, **keywords)


def open_no_directory(path: Any, flags: int, mode: int = 0o777, **others: Any) -> int:
    if pathlib.Path(path).is_dir():
        raise PermissionError(errno.EACCES, "Permission denied (a directory, as on Windows)", os.fspath(path))
    return os.open(path, flags, mode, **others)


def belongs(namespace: dict[str, Any], package: str) -> bool:
    name = namespace.get("__package__") or namespace.get("__name__") or ""
    return name == package or name.startswith(f"{package}.")


def hide_from_imports() -> None:
    import resource

    for name in MODULES:
        sys.modules[name] = None  # type: ignore[assignment]
    poorer = {
        "os": Poorer(os, {*OS.split()}, name="nt", open=open_no_directory),
        "signal": Poorer(signal, {*SIGNAL.split()} | SIGNALS),
        "ctypes": Poorer(ctypes, set(), CDLL=Library),
    }
    imported = builtins.__import__

    def import_poorer(
        name: str, namespace: Any = None, local: Any = None, fromlist: Any = (), level: int = 0
    ) -> types.ModuleType:
        if name == "resource" and belongs(namespace or {}, "psutil"):  # that of Linux cannot do without
            return resource
        module = imported(name, namespace, local, fromlist, level)
        return poorer[name] if level == 0 and name in poorer and belongs(namespace or {}, "gfldeploy") else module

    builtins.__import__ = import_poorer  # type: ignore[assignment]


def hide_from_paths() -> None:
    """What gfldeploy asks `pathlib` of files that only Linux has; psutil does not ask it."""

    def hiding(method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def hidden(self: pathlib.Path, *arguments: Any, **keywords: Any) -> Any:
            if str(self).startswith(HIDDEN):
                frame = sys._getframe(1)
                while frame.f_back is not None and str(frame.f_globals.get("__name__")).startswith("pathlib"):
                    frame = frame.f_back
                if belongs(frame.f_globals, "gfldeploy"):
                    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self))
            return method(self, *arguments, **keywords)

        return hidden

    for name in ("stat", "open"):
        setattr(pathlib.Path, name, hiding(getattr(pathlib.Path, name)))


def is_open(path: str, *, anywhere: bool) -> bool:
    """Whether a process (`anywhere`), or this one, has this file open, or something below this directory."""
    own = f"/proc/{os.getpid()}"
    for process in (f"/proc/{one}" for one in os.listdir("/proc") if one.isdigit()) if anywhere else (own,):
        with contextlib.suppress(OSError):
            for number in os.listdir(f"{process}/fd"):
                with contextlib.suppress(OSError):
                    target = os.readlink(f"{process}/fd/{number}")
                    if target == path or target.startswith(f"{path}/"):
                        return True
    return False


def protect_what_is_open() -> None:
    def refusing(function: Callable[..., Any], places: int) -> Callable[..., Any]:
        @functools.wraps(function)
        def refused(*arguments: Any, **keywords: Any) -> Any:
            for path in arguments[:places] if not keywords else ():
                folder, name = os.path.split(os.path.abspath(os.fsdecode(path)))
                whole = os.path.join(os.path.realpath(folder), name)
                with contextlib.suppress(OSError):
                    kind = os.lstat(whole).st_mode
                    if function is not os.rmdir and not stat.S_ISREG(kind) and not stat.S_ISDIR(kind):
                        continue
                if is_open(whole, anywhere=name.endswith(".lock")):
                    raise PermissionError(errno.EACCES, "Permission denied (it is open, as on Windows)", whole)
            return function(*arguments, **keywords)

        return refused

    for name, places in (("unlink", 1), ("remove", 1), ("rmdir", 1), ("rename", 2), ("replace", 2)):
        setattr(os, name, refusing(getattr(os, name), places))
    shutil._use_fd_functions = False  # type: ignore[attr-defined]


if os.name == "posix":
    hide_from_imports()
    hide_from_paths()
    protect_what_is_open()
    # Directories are locked in another way here: those of others, who do it in the usual way, must not be among them.
    if "TMPDIR" not in os.environ:
        folder = pathlib.Path("/tmp/gfldeploy-portable")
        folder.mkdir(exist_ok=True)
        os.environ["TMPDIR"] = str(folder)
