"""Gives every worker of pytest-xdist CPUs of its own, as if it were alone on a smaller machine.

Commands that a test runs inherit them: no two take each other's threads, and none waits for the other to be idle.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

WORKER = os.environ.get("PYTEST_XDIST_WORKER")  # gw0, gw1, ...; None in the process that starts them, or with `-n 0`

_all = sorted(os.sched_getaffinity(0))
if WORKER is not None:
    _count = int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    # A worker that takes the place of a crashed one is counted on.
    os.sched_setaffinity(0, _all[int(WORKER.removeprefix("gw")) % _count :: _count] or _all)

CPUS = len(os.sched_getaffinity(0))


@contextmanager
def two_cpus() -> Iterator[None]:
    """At least two CPUs, if the machine has them, for commands that are started meanwhile."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, before if len(before) > 1 else _all)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
