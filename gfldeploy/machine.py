"""What machine this is, for benchmark results and `gfldeploy doctor`: read from files, nothing heavy imported."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass

import psutil

from gfldeploy.engines.base import installed_version
from gfldeploy.engines.dependencies import TOOL_CHAINS
from gfldeploy.engines.hardware import CPU_FLAGS, cpu_flags, cpu_model, gpu_models, nvidia_driver, usable_threads
from gfldeploy.engines.nvidia_libraries import nvidia_packages
from gfldeploy.engines.registry import ENGINES

# The distributions that timings and exported graphs depend on, each once.
PACKAGES: tuple[str, ...] = tuple(
    dict.fromkeys(
        (
            "gfldeploy",
            *(name for spec in ENGINES.values() for name in spec.library.distributions),
            *(name for tools in TOOL_CHAINS.values() for name in tools.distributions.values()),
            *("onnx", "numpy", "opencv-python-headless", "opencv-python"),
        )
    )
)


@dataclass(frozen=True)
class Machine:
    """Hardware and software that timings depend on; never the host name.

    `threads` is the number of CPUs this process may use, `cores` the physical cores (None where unknown); `flags` are
    those of `CPU_FLAGS` that the processor has; `memory_gb` is in 10^9 bytes; `gpus` are the models that the NVIDIA
    driver, version `driver`, lists; `packages` are the installed ones of `PACKAGES`, and those of NVIDIA's libraries,
    with their versions.
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
        cpu=cpu_model(),
        cores=psutil.cpu_count(logical=False),
        threads=usable_threads(),
        flags=tuple(flag for flag in CPU_FLAGS if flag in cpu_flags()),
        memory_gb=round(psutil.virtual_memory().total / 1e9, 1),
        gpus=gpu_models(),
        driver=nvidia_driver(),
        os=_os_name(),
        python=platform.python_version(),
        packages={name: version for name, version in installed_packages().items() if version},
    )


def installed_packages() -> dict[str, str | None]:
    """The version of each of `PACKAGES`, None for those that are not installed, and of NVIDIA's that are installed.

    Read from metadata, not imported.
    """
    return {name: installed_version(name) for name in PACKAGES} | nvidia_packages()


def _os_name() -> str:
    kernel = f"{platform.system()} {platform.release()}"
    try:
        return f"{platform.freedesktop_os_release()['PRETTY_NAME']}, {kernel}"
    except (OSError, KeyError):
        return kernel
