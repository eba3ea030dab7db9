"""Gives every worker of pytest-xdist CPUs of its own, as if it were alone on a smaller machine.

Commands that a test runs inherit them: no two take each other's threads, and none waits for the other to be idle.
"""

from __future__ import annotations

import os

WORKER = os.environ.get("PYTEST_XDIST_WORKER")  # gw0, gw1, ...; None in the process that starts them, or with `-n 0`

if WORKER is not None:
    _all, _count = sorted(os.sched_getaffinity(0)), int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    # A worker that takes the place of a crashed one is counted on.
    os.sched_setaffinity(0, _all[int(WORKER.removeprefix("gw")) % _count :: _count] or _all)

CPUS = len(os.sched_getaffinity(0))
