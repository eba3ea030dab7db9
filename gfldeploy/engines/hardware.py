"""The processor and the GPUs, from what Linux says in files and from NVIDIA's driver: nothing heavy is imported."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from gfldeploy.system import cpu_name, usable_cpus

# The flags that decide how fast low precision is.
CPU_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8", "amx_bf16", "avx512_fp16")
FIRST_WITH_TF32 = (8, 0)  # compute capability: Ampere
DRIVER = Path("/proc/driver/nvidia")  # where the NVIDIA driver says what it is
# One is there where DRIVER may not be though a GPU is: Windows lends its GPUs to a Linux of its own (WSL 2), whose
# kernel has no NVIDIA driver; some containers hide /proc/driver.
DEVICES = (Path("/dev/dxg"), Path("/dev/nvidiactl"))
_T = TypeVar("_T")


def cpu_model() -> str:
    """Its name, or the architecture where nobody tells; of an ARM on Linux the numbers of its design."""
    if named := next(iter(_values("/proc/cpuinfo", "model name")), "") or cpu_name():
        return named
    makers, parts = (_values("/proc/cpuinfo", f"CPU {what}") for what in ("implementer", "part"))
    designs = dict.fromkeys(map("/".join, zip(makers, parts, strict=False)))
    return " ".join((platform.machine(), *designs))


def processor(on_gpu: bool) -> str:
    """What this machine computes with, as results record it."""
    return ", ".join((cpu_model(), *(gpu_models() if on_gpu else ())))


def usable_threads() -> int:
    """The CPUs that this process may use."""
    return len(usable_cpus())


@cache
def cpu_flags() -> frozenset[str]:
    """The processor's feature flags, as Linux names them; empty where /proc/cpuinfo cannot be read."""
    return frozenset(next(iter(_values("/proc/cpuinfo", "flags")), "").split())


def gpu_models() -> tuple[str, ...]:
    """Those that the NVIDIA driver lists."""
    files = sorted(DRIVER.glob("gpus/*/information"))
    return tuple(model for file in files for model in _values(file, "Model")) or _told_by_nvml()[1]


@cache
def compute_capabilities() -> tuple[tuple[int, int], ...]:
    """The compute capability of each NVIDIA GPU, (8, 9) for 8.9; nothing where the driver's library does not tell."""
    return _ask_nvml(lambda nvml, gpus: tuple(map(nvml.nvmlDeviceGetCudaComputeCapability, gpus))) or ()


def set_tf32(allowed: bool) -> None:
    """Say in the environment whether NVIDIA's libraries may compute FP32 in TF32, before they are loaded.

    They read it when they are loaded, and TensorRT when it builds and when it runs. It goes for the whole process.
    """
    if allowed:
        os.environ.pop("NVIDIA_TF32_OVERRIDE", None)
    else:
        os.environ["NVIDIA_TF32_OVERRIDE"] = "0"


def nvidia_driver() -> str | None:
    """The version of the loaded NVIDIA driver, None without one."""
    # "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build ..."
    for text in _values(DRIVER / "version", "NVRM version"):
        return next((word for word in text.split() if word[0].isdigit() and "." in word), "unknown version")
    return _told_by_nvml()[0]


@cache
def _told_by_nvml() -> tuple[str | None, tuple[str, ...]]:
    """The NVIDIA driver and its GPUs where no files say what they are; this has not run there."""
    if not any(device.exists() for device in DEVICES):
        return None, ()
    return _ask_nvml(
        lambda nvml, gpus: (str(nvml.nvmlSystemGetDriverVersion()), tuple(map(nvml.nvmlDeviceGetName, gpus)))
    ) or (None, ())


def _ask_nvml(ask: Callable[[Any, list[Any]], _T]) -> _T | None:
    """What `ask` gets of NVML, which it is given with the handles of all GPUs; None where there is no driver."""
    import pynvml

    try:
        pynvml.nvmlInit()
        try:
            return ask(pynvml, [pynvml.nvmlDeviceGetHandleByIndex(one) for one in range(pynvml.nvmlDeviceGetCount())])
        finally:
            pynvml.nvmlShutdown()
    except pynvml.NVMLError:
        return None


def _values(file: str | Path, key: str) -> list[str]:
    """What the lines "KEY: VALUE" of a file say; nothing where it cannot be read."""
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    return [line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == key]
