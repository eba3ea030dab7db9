"""The monitor's own thread, seen from what really happens on this machine."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import numpy as np
import pytest

from gfldeploy.bench.monitor import Monitor, gpu_bandwidth_gb_per_s, throttled_periods, wait_until_idle


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
            assert getattr(record, field.name) in ((), None), "the GPU is not watched when the CPU is measured"
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


class FakeNvml:
    """In the place of libnvidia-ml.so: what nvidia-ml-py calls, with the arguments that nvml.h declares.

    `answers`: of a function, the value that it writes to its last argument, for a structure its fields. A function
    without an answer is not supported here (3), one that is `absent` is not in the library.
    """

    def __init__(self, answers: Mapping[str, object], absent: Collection[str] = ()) -> None:
        self.answers, self.absent = answers, absent
        self.opened: list[object] = []

    def __getattr__(self, name: str) -> Callable[..., int]:
        if name in self.absent:
            raise AttributeError(name)
        return lambda *arguments: self.call(name, *arguments)

    def call(self, name: str, *arguments: Any) -> int:
        if name in ("nvmlInitWithFlags", "nvmlShutdown"):
            return 0
        if name == "nvmlDeviceGetHandleByIndex_v2":
            self.opened.append(arguments[0].value)
            return 0
        if name == "nvmlDeviceGetHandleByUUID":
            self.opened.append(arguments[0].value.decode())
            return 0
        if name == "nvmlDeviceGetUUID":
            arguments[1].value = f"GPU-{self.opened[-1]}-abc".encode()
            return 0
        kind = f".{arguments[1].value}" if name in ("nvmlDeviceGetClockInfo", "nvmlDeviceGetMaxClockInfo") else ""
        if (answer := self.answers.get(name + kind)) is None:
            return 3  # NVML_ERROR_NOT_SUPPORTED
        written = arguments[-1]._obj
        for key, value in (answer if isinstance(answer, dict) else {"value": answer}).items():
            setattr(written, key, value)
        return 0


NVML = {
    "nvmlDeviceGetCount_v2": 3,
    "nvmlDeviceGetUtilizationRates": {"gpu": 97, "memory": 40},
    "nvmlDeviceGetMemoryInfo": {"used": 5 * 10**9, "total": 80 * 10**9},
    "nvmlDeviceGetPowerUsage": 612_000,
    "nvmlDeviceGetEnforcedPowerLimit": 700_000,
    "nvmlDeviceGetTotalEnergyConsumption": 1_234_500,
    # NVML_CLOCK_SM is 1, NVML_CLOCK_MEM 2.
    "nvmlDeviceGetClockInfo.1": 1410,
    "nvmlDeviceGetMaxClockInfo.1": 1980,
    "nvmlDeviceGetMaxClockInfo.2": 2619,
    "nvmlDeviceGetMemoryBusWidth": 5120,
    "nvmlDeviceGetCurrentClocksEventReasons": 0x4 | 0x1,
}


def watched(
    monkeypatch: pytest.MonkeyPatch, answers: Mapping[str, object] = NVML, absent: Collection[str] = ()
) -> tuple[Monitor, FakeNvml]:
    """A monitor that ran a moment beside this GPU, through the real nvidia-ml-py."""
    library = FakeNvml(answers, absent)
    monkeypatch.setattr("pynvml.nvmlLib", library)
    monkeypatch.setattr("pynvml._nvmlGetFunctionPointer_cache", {})
    with Monitor(50, "gpu") as monitor:
        time.sleep(0.1)
    return monitor, library


def test_a_gpu_is_read_by_the_signatures_of_its_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monitor, library = watched(monkeypatch)
    record, count = monitor.record(), len(monitor.record().t_s)
    assert count >= 2 and set(library.opened) == {0}
    assert record.gpu_percent == (97.0,) * count
    assert record.gpu_memory_mb == (5000.0,) * count
    assert record.gpu_power_w == (612.0,) * count
    assert record.gpu_clock_mhz == (1410.0,) * count
    assert (record.gpu_most_clock_mhz, record.gpu_most_power_w) == (1980.0, 700.0)
    # That it is idle now and then is no reason of the hardware's.
    told = [one for one in record.throttled if one.startswith("GPU: ")]  # a busy host may have taken CPU time as well
    assert told == [f"GPU: power cap in {count} of {count} samples"]
    assert monitor.gpu_energy_j() == 1234.5
    # NVIDIA's data sheet of the H100 SXM says 3.35 TB/s.
    assert gpu_bandwidth_gb_per_s() == pytest.approx(3350, rel=0.01)
    assert wait_until_idle("gpu", patience_s=0).gpu_memory_mb == 5000.0


def test_what_a_gpu_does_not_tell_is_left_out_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A MIG slice has no utilisation; an older driver has no energy counter and calls the reasons otherwise."""
    unknown = ("nvmlDeviceGetUtilizationRates", "nvmlDeviceGetTotalEnergyConsumption", "nvmlDeviceGetMemoryBusWidth")
    answers = {name: value for name, value in NVML.items() if name not in unknown}
    answers["nvmlDeviceGetCurrentClocksThrottleReasons"] = 0x40
    monitor, _ = watched(monkeypatch, answers, {"nvmlDeviceGetCurrentClocksEventReasons"})
    record = monitor.record()
    assert record.gpu_percent == () and record.gpu_power_w and record.gpu_memory_mb and record.gpu_clock_mhz
    assert any(one.startswith("GPU: hardware thermal slowdown in ") for one in record.throttled)
    assert monitor.gpu_energy_j() is None and gpu_bandwidth_gb_per_s() is None


@pytest.mark.parametrize(
    ("visible", "opened"),
    [("", 0), ("2,0", 2), ("GPU-1-a", 1), ("MIG-c7f3", "MIG-c7f3"), ("-1", 0)],
)
def test_the_gpu_that_is_watched_is_the_one_that_runs(
    visible: str, opened: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert watched(monkeypatch)[1].opened[-1] == opened
