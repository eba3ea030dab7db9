"""The GPUs: what the driver says in files, and what NVIDIA's library says where there are none."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_gpu import FakeSite

from gfldeploy.engines import hardware
from gfldeploy.engines.base import EngineOptions
from gfldeploy.errors import UnsupportedError


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """NVML with two GPUs."""
    pynvml = pytest.importorskip("pynvml")
    answers = {
        "nvmlInit": lambda: None,
        "nvmlShutdown": lambda: None,
        "nvmlDeviceGetCount": lambda: 2,
        "nvmlDeviceGetHandleByIndex": lambda index: index,
        "nvmlDeviceGetCudaComputeCapability": lambda handle: ((8, 9), (12, 0))[handle],
        "nvmlDeviceGetName": lambda handle: f"NVIDIA GeForce RTX {4090 + 1000 * handle}",
        "nvmlSystemGetDriverVersion": lambda: "581.42",
    }
    for name, answer in answers.items():
        monkeypatch.setattr(pynvml, name, answer)
    forget()
    yield monkeypatch
    forget()


def forget() -> None:
    hardware.compute_capabilities.cache_clear()
    hardware._told_by_nvml.cache_clear()


def test_gpus_that_no_files_tell_of(nvml: pytest.MonkeyPatch, tmp_path: Path) -> None:
    nvml.setattr(hardware, "DRIVER", tmp_path / "nothing")
    nvml.setattr(hardware, "DEVICES", (tmp_path / "none", tmp_path / "dxg"))
    assert (hardware.nvidia_driver(), hardware.gpu_models()) == (None, ())
    forget()
    (tmp_path / "dxg").touch()
    assert hardware.nvidia_driver() == "581.42"
    assert hardware.gpu_models() == ("NVIDIA GeForce RTX 4090", "NVIDIA GeForce RTX 5090")
    assert hardware.compute_capabilities() == ((8, 9), (12, 0))


def test_tf32_needs_a_gpu_that_has_it(nvml: pytest.MonkeyPatch) -> None:
    assert EngineOptions(device="gpu", tf32=True).tf32
    forget()
    nvml.setattr("pynvml.nvmlDeviceGetCudaComputeCapability", lambda handle: (7, 5))  # a T4
    with pytest.raises(UnsupportedError, match="from compute capability 8"):
        EngineOptions(device="gpu", tf32=True)


def test_gpus_of_linux(nvml: pytest.MonkeyPatch, tmp_path: Path) -> None:
    machine = FakeSite(tmp_path)
    nvml.setattr(hardware, "DRIVER", machine.system / "proc")
    machine.driver("580.95.05")
    assert (hardware.nvidia_driver(), hardware.gpu_models()) == ("580.95.05", ("NVIDIA H100",))
