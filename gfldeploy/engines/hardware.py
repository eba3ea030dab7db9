"""The processor and the GPUs, read from what Linux says in files: nothing heavy is imported."""

from __future__ import annotations

import os
import platform
from functools import cache
from pathlib import Path

__all__ = ["CPU_FLAGS", "cpu_flags", "cpu_model", "gpu_models", "nvidia_driver", "usable_threads"]

# The flags that decide how fast low precision is.
CPU_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8", "amx_bf16", "avx512_fp16")


def cpu_model() -> str:
    """Its name, or the architecture where Linux does not tell."""
    return _cpuinfo("model name") or platform.machine()


def usable_threads() -> int:
    """The CPUs that this process may use."""
    return len(os.sched_getaffinity(0))


@cache
def cpu_flags() -> frozenset[str]:
    """The processor's feature flags, as Linux names them; empty where /proc/cpuinfo cannot be read."""
    return frozenset((_cpuinfo("flags") or "").split())


def gpu_models() -> tuple[str, ...]:
    """Those that the NVIDIA driver lists."""
    models = []
    for path in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except OSError:
            continue
        models += [line.split(":", 1)[1].strip() for line in lines if line.startswith("Model:")]
    return tuple(models)


def nvidia_driver() -> str | None:
    """The version of the loaded NVIDIA driver, None without one."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8")
    except OSError:
        return None
    # "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build ..."
    numbers = [word for word in text.split() if word[0].isdigit() and "." in word]
    return numbers[0] if numbers else "unknown version"


def _cpuinfo(key: str) -> str | None:
    """The value of the first line of /proc/cpuinfo for `key`, or None."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((line.split(":", 1)[1].strip() for line in lines if line.split(":")[0].strip() == key), None)
