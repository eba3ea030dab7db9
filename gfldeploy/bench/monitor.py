"""The hardware while a benchmark runs, from a thread of its own, and whether the machine is idle before."""

from __future__ import annotations

import math
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil

from gfldeploy.bench.results import Idle, Monitored
from gfldeploy.engines.base import Device
from gfldeploy.system import usable_cpus

BUSY_PERCENT = 20.0
"""Use of the CPUs, or of the GPU, by others from which on a machine counts as busy."""

_IDLE_WINDOW_S = 0.25
# Reading a CPU's frequency costs tens of microseconds, and all of a socket run alike.
_FREQUENCY_CPUS = 8
# A share of the CPU time that a hypervisor may take without changing a figure that anybody would quote.
_STEAL_PERCENT = 5.0
# What NVML calls clocks event reasons, by bit (nvml.h, nvmlClocksEventReasons): those that slow a GPU down. It being
# idle, and clocks that somebody set, are none.
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
        self._cpus = usable_cpus()
        self._gpu = Gpu() if device == "gpu" else None
        self._gpu_limits: dict[str, Any] = dict(self._gpu.limits()) if self._gpu else {}
        self._process = psutil.Process()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="monitor", daemon=True)
        self._rows: list[dict[str, Any]] = []
        self._reasons: dict[str, None] = {}
        self._gpu_reasons: Counter[str] = Counter()
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
        samples: dict[str, Any] = {name: tuple(row[name] for row in self._rows) for name in known}
        of_gpu = (f"{what} in {times} of {len(self._rows)} samples" for what, times in self._gpu_reasons.items())
        return Monitored(
            **samples,
            **self._gpu_limits,
            throttled=(*self._reasons, *of_gpu),
            overhead_percent=100 * self._busy_s / self._wall_s if self._wall_s else 0.0,
        )

    def gpu_energy_j(self) -> float | None:
        """Joules that the GPU's board took since its driver was loaded; None where it does not count them."""
        return self._gpu.energy_j() if self._gpu else None

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
                self._gpu_reasons.update(self._gpu.throttles() if self._gpu else ())
        with suppress(psutil.Error, OSError):
            counters = _throttles(self._cpus)
            self._reasons |= dict.fromkeys(what for what in counters if counters[what] > throttles.get(what, math.inf))
            stolen = _stolen_percent(first, _cpu_times(self._cpus))
            if stolen > _STEAL_PERCENT:
                self._reasons[f"the hypervisor took {stolen:.0f}% of the CPU time"] = None
        self._busy_s, self._wall_s = time.thread_time(), time.perf_counter() - start


class Gpu:
    """The GPU that engines use, through NVML; nothing is known of it if the library, the driver or a query is missing.

    NVML answers with averages over a window before the query: the utilisation over 1/6 s to 1 s, the power over 1 s
    from the Ampere generation on (nvml.h). Clocks and memory are of the moment.
    """

    def __init__(self) -> None:
        self._nvml: Any = None
        with suppress(Exception):  # no package, no driver, no GPU: nothing to watch
            import pynvml

            pynvml.nvmlInit()
            self._handle = _first_visible(pynvml)
            self._nvml = pynvml

    def sample(self) -> dict[str, float]:
        """The fields of `Monitored` that are of the GPU; those are left out that it cannot tell, as a MIG slice its
        utilisation."""
        return self._read(
            gpu_percent=lambda nvml, gpu: nvml.nvmlDeviceGetUtilizationRates(gpu).gpu,
            gpu_memory_mb=lambda nvml, gpu: nvml.nvmlDeviceGetMemoryInfo(gpu).used / 1e6,
            gpu_power_w=lambda nvml, gpu: nvml.nvmlDeviceGetPowerUsage(gpu) / 1e3,
            gpu_clock_mhz=lambda nvml, gpu: nvml.nvmlDeviceGetClockInfo(gpu, nvml.NVML_CLOCK_SM),
        )

    def limits(self) -> dict[str, float]:
        """The fields of `Monitored` that stay the same."""
        return self._read(
            gpu_most_clock_mhz=lambda nvml, gpu: nvml.nvmlDeviceGetMaxClockInfo(gpu, nvml.NVML_CLOCK_SM),
            gpu_most_power_w=lambda nvml, gpu: nvml.nvmlDeviceGetEnforcedPowerLimit(gpu) / 1e3,
        )

    def energy_j(self) -> float | None:
        """Since the driver was loaded; GPUs count it since the Volta generation."""
        return self._read(j=lambda nvml, gpu: nvml.nvmlDeviceGetTotalEnergyConsumption(gpu) / 1e3).get("j")

    def bandwidth_gb_per_s(self) -> float | None:
        """10^9 bytes a second of its memory: two transfers in each cycle, as wide as the bus (in bits)."""
        found = self._read(
            mhz=lambda nvml, gpu: nvml.nvmlDeviceGetMaxClockInfo(gpu, nvml.NVML_CLOCK_MEM),
            bits=lambda nvml, gpu: nvml.nvmlDeviceGetMemoryBusWidth(gpu),
        )
        return 2 * found["mhz"] * found["bits"] / 8 / 1e3 if len(found) == 2 else None

    def throttles(self) -> list[str]:
        """Why it runs slower than it could at this moment."""
        found = self._read(new=lambda nvml, gpu: nvml.nvmlDeviceGetCurrentClocksEventReasons(gpu)) or self._read(
            old=lambda nvml, gpu: nvml.nvmlDeviceGetCurrentClocksThrottleReasons(gpu)  # drivers before 535
        )
        return [text for bits in found.values() for bit, text in _GPU_REASONS.items() if int(bits) & bit]

    def _read(self, **queries: Callable[[Any, Any], float]) -> dict[str, float]:
        """The answers to those queries that NVML answers."""
        found: dict[str, float] = {}
        for name, query in queries.items():
            with suppress(Exception):  # NVMLError of many kinds, AttributeError of an old nvidia-ml-py
                if self._nvml is not None:
                    found[name] = float(query(self._nvml, self._handle))
        return found


def _first_visible(nvml: Any) -> Any:
    """NVML's handle of CUDA's device 0: the first of CUDA_VISIBLE_DEVICES, which names it by number or UUID.

    Numbers are NVML's where all GPUs are alike, or CUDA_DEVICE_ORDER is PCI_BUS_ID.
    """
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0].strip()
    if first.startswith("MIG-"):
        return nvml.nvmlDeviceGetHandleByUUID(first)
    if first.startswith("GPU-"):  # CUDA takes the beginning of one, too
        for index in range(nvml.nvmlDeviceGetCount()):
            handle = nvml.nvmlDeviceGetHandleByIndex(index)
            if nvml.nvmlDeviceGetUUID(handle).startswith(first):
                return handle
    return nvml.nvmlDeviceGetHandleByIndex(int(first) if first.isdigit() else 0)


def gpu_bandwidth_gb_per_s() -> float | None:
    """10^9 bytes a second that the memory of the GPU can move by its clock and the width of its bus; None if unknown.

    No measurement: a copy reaches about nine tenths of it.
    """
    return Gpu().bandwidth_gb_per_s()


def wait_until_idle(device: Device, busy_percent: float = BUSY_PERCENT, patience_s: float = 5.0) -> Idle:
    """Measure how busy the CPUs (and the GPU) are; while they are over `busy_percent`, wait up to `patience_s`.

    Returns the last measurement and the time waited, 0 if the machine was idle at once.
    """
    cpus = usable_cpus()
    gpu = Gpu() if device == "gpu" else None
    start = time.perf_counter()
    waited_s = 0.0
    while True:
        before = _cpu_times(cpus)
        time.sleep(_IDLE_WINDOW_S)
        now = _cpu_times(cpus)
        cpu_percent = sum(_use(before[cpu], now[cpu]) for cpu in cpus) / len(cpus)
        sample = gpu.sample() if gpu else {}
        gpu_percent = sample.get("gpu_percent")
        idle = max(cpu_percent, gpu_percent or 0.0) <= busy_percent
        if idle or waited_s >= patience_s:
            return Idle(cpu_percent, gpu_percent, waited_s, sample.get("gpu_memory_mb"))
        waited_s = time.perf_counter() - start


class OthersUse:
    """What other processes, and the host of a virtual machine, take of the CPUs that this process may use."""

    def __init__(self) -> None:
        """Starts to count."""
        self._cpus = usable_cpus()
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
        # Linux counts guests in user time already; other systems know neither them nor waiting.
        idle = ("idle", "iowait", "guest", "guest_nice")
        busy = sum(sum(one) - sum(getattr(one, name, 0.0) for name in idle) for one in times)
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
