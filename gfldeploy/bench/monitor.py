"""The hardware while a benchmark runs, from a thread of its own, and whether the machine is idle before."""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil

from gfldeploy.bench.results import Idle, Monitored
from gfldeploy.engines.base import Device

BUSY_PERCENT = 20.0
"""Use of the CPUs, or of the GPU, by others from which on a machine counts as busy."""

_IDLE_WINDOW_S = 0.25
# Reading a CPU's frequency costs tens of microseconds, and all of a socket run alike.
_FREQUENCY_CPUS = 8
# A share of the CPU time that a hypervisor may take without changing a figure that anybody would quote.
_STEAL_PERCENT = 5.0
# What NVML calls clocks event reasons, by bit (nvml.h, nvmlClocksEventReasons): those that slow a GPU down.
_GPU_REASONS = {
    0x4: "GPU: power cap",
    0x8: "GPU: hardware slowdown",
    0x10: "GPU: sync boost",
    0x20: "GPU: software thermal slowdown",
    0x40: "GPU: hardware thermal slowdown",
    0x80: "GPU: power brake",
}


class Monitor:
    """Samples the hardware `hz` times a second while its block runs; a GPU only where `device` is "gpu".

    A sample that cannot be taken is left out: the monitor never breaks what it watches.
    """

    def __init__(self, hz: float, device: Device) -> None:
        if hz <= 0:
            raise ValueError(f"hz must be positive, not {hz}")
        self._interval_s = 1 / hz
        self._cpus = sorted(os.sched_getaffinity(0))
        self._gpu = _Gpu() if device == "gpu" else None
        self._process = psutil.Process()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="monitor", daemon=True)
        self._rows: list[dict[str, Any]] = []
        self._reasons: dict[str, None] = {}
        self._busy_s = self._wall_s = 0.0

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def record(self) -> Monitored:
        """What was seen, after the block: of what some samples lack, nothing."""
        known = set.intersection(*map(set, self._rows)) if self._rows else set()
        return Monitored(
            **{name: tuple(row[name] for row in self._rows) for name in known},
            throttled=tuple(self._reasons),
            overhead_percent=100 * self._busy_s / self._wall_s if self._wall_s else 0.0,
        )

    def _watch(self) -> None:
        start = time.perf_counter()
        before, throttles = _cpu_times(self._cpus), _throttles(self._cpus)
        first = before
        while not self._stop.wait(self._interval_s):
            with suppress(psutil.Error, OSError):
                now = _cpu_times(self._cpus)
                row = {
                    "t_s": time.perf_counter() - start,
                    "cpu_percent": tuple(_use(before[cpu], now[cpu]) for cpu in self._cpus),
                    "rss_mb": self._process.memory_info().rss / 1e6,
                    **(self._gpu.sample() if self._gpu else {}),
                }
                if (mhz := _frequency_mhz(self._cpus)) is not None:
                    row["cpu_mhz"] = mhz
                self._rows.append(row)
                before = now
            if self._gpu:
                self._reasons |= dict.fromkeys(self._gpu.throttles())
        with suppress(psutil.Error, OSError):
            counters = _throttles(self._cpus)
            self._reasons |= dict.fromkeys(what for what in counters if counters[what] > throttles.get(what, math.inf))
            stolen = _stolen_percent(first, _cpu_times(self._cpus))
            if stolen > _STEAL_PERCENT:
                self._reasons[f"the hypervisor took {stolen:.0f}% of the CPU time"] = None
        self._busy_s, self._wall_s = time.thread_time(), time.perf_counter() - start


class _Gpu:
    """The first GPU through NVML; nothing is known of it if the library, the driver or the query is missing."""

    def __init__(self) -> None:
        self._nvml: Any = None
        with suppress(Exception):  # no package, no driver, no GPU: nothing to watch
            import pynvml

            pynvml.nvmlInit()
            self._handle = pynvml.nvmlDeviceGetHandleByIndex(0)
            self._nvml = pynvml

    def sample(self) -> dict[str, float]:
        """The fields of `Monitored` that are of the GPU, or none."""
        nvml = self._nvml
        if nvml is None:
            return {}
        try:
            return {
                "gpu_percent": float(nvml.nvmlDeviceGetUtilizationRates(self._handle).gpu),
                "gpu_memory_mb": nvml.nvmlDeviceGetMemoryInfo(self._handle).used / 1e6,
                "gpu_power_w": nvml.nvmlDeviceGetPowerUsage(self._handle) / 1e3,
                "gpu_clock_mhz": float(nvml.nvmlDeviceGetClockInfo(self._handle, nvml.NVML_CLOCK_SM)),
            }
        except nvml.NVMLError:
            return {}

    def throttles(self) -> list[str]:
        if self._nvml is None:
            return []
        try:
            bits = self._nvml.nvmlDeviceGetCurrentClocksThrottleReasons(self._handle)
        except self._nvml.NVMLError:
            return []
        return [text for bit, text in _GPU_REASONS.items() if bits & bit]


def wait_until_idle(device: Device, busy_percent: float = BUSY_PERCENT, patience_s: float = 5.0) -> Idle:
    """Measure how busy the CPUs (and the GPU) are; while they are over `busy_percent`, wait up to `patience_s`.

    Returns the last measurement and the time waited, 0 if the machine was idle at once.
    """
    cpus = sorted(os.sched_getaffinity(0))
    gpu = _Gpu() if device == "gpu" else None
    start = time.perf_counter()
    waited_s = 0.0
    while True:
        before = _cpu_times(cpus)
        time.sleep(_IDLE_WINDOW_S)
        now = _cpu_times(cpus)
        cpu_percent = sum(_use(before[cpu], now[cpu]) for cpu in cpus) / len(cpus)
        gpu_percent = gpu.sample().get("gpu_percent") if gpu else None
        idle = max(cpu_percent, gpu_percent or 0.0) <= busy_percent
        if idle or waited_s >= patience_s:
            return Idle(cpu_percent, gpu_percent, waited_s)
        waited_s = time.perf_counter() - start


class OthersUse:
    """What other processes, and the host of a virtual machine, take of the CPUs that this process may use."""

    def __init__(self) -> None:
        """Starts to count."""
        self._cpus = sorted(os.sched_getaffinity(0))
        self._process = psutil.Process()
        self._before = self._now()

    def share(self) -> float:
        """Of the time of these CPUs since the start, 0 to 1; the clock ticks every 10 ms, so give it a second."""
        since, busy_s, own_s = (now - before for now, before in zip(self._now(), self._before, strict=True))
        return min(max((busy_s - own_s) / (since * len(self._cpus)), 0.0), 1.0) if since > 0 else 0.0

    def _now(self) -> tuple[float, float, float]:
        """Seconds: the clock's, those that the CPUs were busy for anyone, and those that this process ran."""
        times = _cpu_times(self._cpus).values()
        own = self._process.cpu_times()
        # Linux counts guests in user time already.
        busy = sum(sum(one) - one.idle - one.iowait - one.guest - one.guest_nice for one in times)
        return time.perf_counter(), busy, own.user + own.system


def _cpu_times(cpus: list[int]) -> dict[int, Any]:
    times = psutil.cpu_times(percpu=True)
    # Containers may list fewer CPUs than there are numbers.
    return {cpu: times[cpu] if cpu < len(times) else times[-1] for cpu in cpus}


def _use(before: Any, now: Any) -> float:
    """Per cent of the time between two readings of a CPU in which it was not idle."""
    # Guest time is part of user time already.
    spent = {name: getattr(now, name) - getattr(before, name) for name in now._fields if not name.startswith("guest")}
    total = sum(spent.values())
    idle = spent.get("idle", 0.0) + spent.get("iowait", 0.0)
    return min(max(100 * (1 - idle / total), 0.0), 100.0) if total > 0 else 0.0


def _stolen_percent(before: Mapping[int, Any], now: Mapping[int, Any]) -> float:
    totals = [sum(now[cpu]) - sum(before[cpu]) for cpu in now]
    stolen = [getattr(now[cpu], "steal", 0.0) - getattr(before[cpu], "steal", 0.0) for cpu in now]
    return 100 * sum(stolen) / sum(totals) if sum(totals) > 0 else 0.0


def _frequency_mhz(cpus: list[int]) -> float | None:
    """Mean over some of the CPUs; None where the kernel does not tell."""
    found = []
    for cpu in cpus[:_FREQUENCY_CPUS]:
        with suppress(OSError, ValueError):
            path = Path(f"/sys/devices/system/cpu/cpu{cpu}/cpufreq/scaling_cur_freq")
            found.append(int(path.read_text(encoding="ascii")) / 1e3)
    return sum(found) / len(found) if found else None


def _throttles(cpus: list[int]) -> dict[str, int]:
    """Counters that only grow when something holds the CPUs back, by what it is."""
    counters: dict[str, int] = {}
    for path in (Path("/sys/fs/cgroup/cpu.stat"), Path("/sys/fs/cgroup/cpu/cpu.stat")):
        with suppress(OSError):
            if (count := throttled_periods(path.read_text(encoding="ascii"))) is not None:
                counters["the container's CPU quota"] = count
                break
    for cpu in cpus:
        with suppress(OSError, ValueError):
            path = Path(f"/sys/devices/system/cpu/cpu{cpu}/thermal_throttle/core_throttle_count")
            counters[f"heat of CPU {cpu}"] = int(path.read_text(encoding="ascii"))
    return counters


def throttled_periods(cpu_stat: str) -> int | None:
    """`nr_throttled` in the text of a cgroup's cpu.stat, version 1 or 2; None where it is not."""
    values = dict(line.split() for line in cpu_stat.splitlines() if len(line.split()) == 2)
    number = values.get("nr_throttled", "")
    return int(number) if number.isdigit() else None
