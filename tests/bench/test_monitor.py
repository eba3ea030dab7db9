"""The monitor's own thread, seen from what really happens on this machine."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields

import numpy as np
import pytest

from gfldeploy.bench.monitor import Monitor, throttled_periods, wait_until_idle


@contextmanager
def busy() -> Iterator[None]:
    """All CPUs that this process may use at work, in children."""
    cpus = os.sched_getaffinity(0)
    children = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in cpus]
    for child, cpu in zip(children, cpus, strict=True):
        os.sched_setaffinity(child.pid, {cpu})
    try:
        time.sleep(0.3)
        yield
    finally:
        for child in children:
            child.kill()
            child.wait()


def test_what_is_seen_while_it_runs() -> None:
    with busy(), Monitor(20, "cpu") as monitor:
        time.sleep(0.5)
        hoard = np.ones(100_000_000, np.uint8)
        time.sleep(0.5)
    record = monitor.record()
    assert 5 <= len(record.t_s) <= 60
    assert list(record.t_s) == sorted(record.t_s)
    assert {len(percents) for percents in record.cpu_percent} == {len(os.sched_getaffinity(0))}
    assert np.mean(record.cpu_percent) > 80
    assert record.rss_mb[-1] - record.rss_mb[0] > 0.9 * hoard.nbytes / 1e6
    assert 0 < record.overhead_percent < 100
    for field in fields(record):
        if field.name.startswith("gpu_"):
            assert getattr(record, field.name) == (), "the GPU is not watched when the CPU is measured"
    assert len(record.cpu_mhz) in (0, len(record.t_s))


def test_the_thread_ends_with_its_block() -> None:
    with pytest.raises(KeyError), Monitor(20, "cpu"):
        assert any(thread.name == "monitor" for thread in threading.enumerate())
        raise KeyError
    assert not any(thread.name == "monitor" for thread in threading.enumerate())


def test_a_gpu_that_is_not_there_leaves_its_columns_empty() -> None:
    if os.path.exists("/proc/driver/nvidia/version"):  # noqa: PTH110
        pytest.skip("there is a GPU")
    with Monitor(20, "gpu") as monitor:
        time.sleep(0.2)
    record = monitor.record()
    assert record.t_s and record.gpu_percent == record.gpu_memory_mb == record.gpu_power_w == ()


def test_a_rate_must_be_positive() -> None:
    with pytest.raises(ValueError, match="positive"):
        Monitor(0, "cpu")


def test_others_at_work_are_waited_for_and_told_of() -> None:
    with busy():
        idle = wait_until_idle("cpu", busy_percent=20, patience_s=0.6)
    assert idle.cpu_percent > 80 and idle.gpu_percent is None
    assert 0.5 <= idle.waited_s < 10


def test_an_idle_machine_is_not_waited_for() -> None:
    assert wait_until_idle("cpu", busy_percent=100).waited_s == 0


@pytest.mark.parametrize(
    ("text", "count"),
    [
        # The kernel's cgroup-v2.rst and sched-bwc.rst.
        ("usage_usec 9\nuser_usec 5\nnr_periods 40\nnr_throttled 7\nthrottled_usec 120\n", 7),
        ("nr_periods 40\nnr_throttled 3\nthrottled_time 9000\n", 3),
        ("usage_usec 9\nuser_usec 5\nsystem_usec 4\n", None),  # no quota is set
        ("", None),
    ],
)
def test_a_containers_quota(text: str, count: int | None) -> None:
    assert throttled_periods(text) == count
