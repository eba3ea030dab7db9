"""The heap of glibc, where engines allocate: as many arenas as threads run at once, and free pages given back.

By default there are eight arenas for each CPU, and new threads are spread over them. Each keeps what it had at most: a
server that loads one detector after the other then takes twice its memory after twenty of them, though nothing is lost.
Where there is another C library, nothing happens.
"""

from __future__ import annotations

import os

from gfldeploy.system import c_function

_M_ARENA_MAX = -8  # malloc.h
_kept: list[object] | None = None


def limit_arenas(most: int) -> None:
    """Have at most so many arenas, unless the environment says how many. Before threads are started."""
    tuned = "MALLOC_ARENA_MAX" in os.environ or "arena_max" in os.environ.get("GLIBC_TUNABLES", "")
    mallopt = c_function("mallopt")
    if mallopt is not None and not tuned:
        mallopt(_M_ARENA_MAX, most)


def leave_to_exit() -> None:
    """Let `freed_at_exit` keep things from now on: this process ends when its one engine has done its work."""
    global _kept
    _kept = []


def freed_at_exit(what: object) -> None:
    """Keep this to the end of the process, if it ends soon: taking it apart takes time, its memory is freed at once.

    Elsewhere nothing happens, and it is freed when nothing refers to it.
    """
    if _kept is not None:
        _kept.append(what)


def give_memory_back() -> None:
    """Give the pages that nothing uses back to the system."""
    malloc_trim = c_function("malloc_trim")
    if malloc_trim is not None:
        malloc_trim(0)
