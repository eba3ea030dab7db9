"""What machine this is, for benchmark results and `gfldeploy doctor`: read from files, nothing heavy imported."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path

import psutil

__all__ = [
    "CPU_FLAGS",
    "PACKAGES",
    "Machine",
    "cpu_flags",
    "describe_machine",
    "installed_packages",
    "nvidia_driver",
    "usable_threads",
]

# The flags that decide how fast low precision is.
CPU_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8", "amx_bf16", "avx512_fp16")

PACKAGES = (
    "gfldeploy",
    "paddlepaddle",
    "paddlepaddle-gpu",
    "paddledet",
    "paddleslim",
    "paddle2onnx",
    "onnx",
    "onnxruntime",
    "onnxruntime-gpu",
    "openvino",
    "numpy",
    "opencv-python-headless",
    "opencv-python",
)


@dataclass(frozen=True)
class Machine:
    """Hardware and software that timings depend on; never the host name.

    `threads` is the number of CPUs this process may use, `cores` the physical cores (None where unknown); `flags` are
    those of `CPU_FLAGS` that the processor has; `memory_gb` is in 10^9 bytes; `gpus` are the models that the NVIDIA
    driver, version `driver`, lists; `packages` are the installed ones of `PACKAGES` with their versions.
    """

    cpu: str
    cores: int | None
    threads: int
    flags: tuple[str, ...]
    memory_gb: float
    gpus: tuple[str, ...]
    driver: str | None
    os: str
    python: str
    packages: Mapping[str, str]


def describe_machine() -> Machine:
    """Describe the machine that this process runs on."""
    return Machine(
        cpu=_cpu_model(),
        cores=psutil.cpu_count(logical=False),
        threads=usable_threads(),
        flags=tuple(flag for flag in CPU_FLAGS if flag in cpu_flags()),
        memory_gb=round(psutil.virtual_memory().total / 1e9, 1),
        gpus=_gpu_models(),
        driver=nvidia_driver(),
        os=_os_name(),
        python=platform.python_version(),
        packages={name: version for name, version in installed_packages().items() if version},
    )


def usable_threads() -> int:
    """The CPUs that this process may use."""
    return len(os.sched_getaffinity(0))


@cache
def cpu_flags() -> frozenset[str]:
    """The processor's feature flags, as Linux names them; empty where /proc/cpuinfo cannot be read."""
    return frozenset((_cpuinfo("flags") or "").split())


def installed_packages() -> dict[str, str | None]:
    """The version of each of `PACKAGES`, None for those that are not installed. Read from metadata, not imported."""
    versions: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def nvidia_driver() -> str | None:
    """The version of the loaded NVIDIA driver, None without one."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8")
    except OSError:
        return None
    # "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build ..."
    numbers = [word for word in text.split() if word[0].isdigit() and "." in word]
    return numbers[0] if numbers else "unknown version"


def _gpu_models() -> tuple[str, ...]:
    models = []
    for path in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except OSError:
            continue
        models += [line.split(":", 1)[1].strip() for line in lines if line.startswith("Model:")]
    return tuple(models)


def _cpu_model() -> str:
    return _cpuinfo("model name") or platform.machine()


def _cpuinfo(key: str) -> str | None:
    """The value of the first line of /proc/cpuinfo for `key`, or None."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((line.split(":", 1)[1].strip() for line in lines if line.split(":")[0].strip() == key), None)


def _os_name() -> str:
    kernel = f"{platform.system()} {platform.release()}"
    try:
        return f"{platform.freedesktop_os_release()['PRETTY_NAME']}, {kernel}"
    except (OSError, KeyError):
        return kernel
