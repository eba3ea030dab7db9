"""NVIDIA's libraries: what a package needs, what is missing and what installs it, how what is there is loaded."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from fake_gpu import CUDA_PROVIDER, HERMETIC_PYTHON, NO_REAL_CUDA, TENSORRT_PROVIDER, FakeSite, shared_library

from gfldeploy.engines import hardware
from gfldeploy.engines import nvidia_libraries as nvidia
from gfldeploy.engines.base import EngineSpec, remedy_sentence
from gfldeploy.engines.registry import ENGINES, TENSORRT_RTX
from gfldeploy.errors import GfldeployError

pytestmark = NO_REAL_CUDA


def alone(name: str) -> EngineSpec:
    """An engine of the table without its CPU package, which may be installed here."""
    library = ENGINES[name].library
    return replace(ENGINES[name], library=replace(library, builds={"gpu": library.builds["gpu"]}), runs={})


CUDA, TENSORRT, PADDLE = alone("onnxruntime"), alone("onnxruntime-tensorrt"), alone("paddle-tensorrt")


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeSite]:
    """A machine with a driver and no package, as this process sees it."""
    found = FakeSite(tmp_path)
    found.driver()
    monkeypatch.setattr(hardware, "DRIVER", found.system / "proc")
    monkeypatch.setattr(nvidia, "_TRY", (*HERMETIC_PYTHON, *nvidia._TRY[1:]))
    monkeypatch.setattr(nvidia, "_LINKER_FOLDERS", ())
    monkeypatch.setattr(nvidia, "_cached", dict)
    monkeypatch.setattr(nvidia, "compute_capabilities", tuple)
    monkeypatch.setenv("LD_LIBRARY_PATH", str(found.system))
    monkeypatch.setattr(sys, "path", [str(found.folder)])
    monkeypatch.setattr(nvidia, "_time_left", [30.0])
    forget()
    yield found
    forget()


def forget() -> None:
    """What was read: the machine has changed."""
    for kept in (nvidia._pip_folders, nvidia._listed, nvidia._read, nvidia._recorded, nvidia._trial):
        kept.cache_clear()


@pytest.mark.parametrize(
    ("soname", "cuda", "expected"),
    [
        ("libnvinfer.so.10", 13, "tensorrt-cu13<11"),
        ("libnvonnxparser.so.10", 12, "tensorrt-cu12<11"),
        ("libnvinfer_plugin.so.8", None, "tensorrt<9"),
        ("libcudart.so.12", 12, "nvidia-cuda-runtime-cu12==12.*"),
        ("libcudart.so.13", 13, "nvidia-cuda-runtime==13.*"),
        ("libcudart.so.12", 13, "nvidia-cuda-runtime-cu12==12.*"),
        ("libcublasLt.so.13", 13, "nvidia-cublas==13.*"),
        ("libcudnn_adv.so.9", 12, "nvidia-cudnn-cu12==9.*"),
        ("libcudnn.so.9", 13, "nvidia-cudnn-cu13==9.*"),
        ("libcufft.so.11", 12, "nvidia-cufft-cu12==11.*"),
        ("libz.so.1", 13, None),
    ],
)
def test_what_pip_installs_a_library_with(soname: str, cuda: int | None, expected: str | None) -> None:
    assert nvidia._requirement(soname, cuda) == expected


@pytest.mark.parametrize(
    ("version", "typing"), [("11.4.0.106", "strong"), ("10.16.1.11", "weak"), ("8.6.1", "weak"), (None, "weak")]
)
def test_how_networks_are_typed(version: str | None, typing: str) -> None:
    assert nvidia.typing_of(version) == typing


def test_what_a_package_was_built_for(site: FakeSite) -> None:
    assert nvidia.built_for(CUDA) is None and nvidia.tensorrt_library() is None
    site.onnxruntime_gpu()
    forget()
    assert str(nvidia.built_for(CUDA)) == "CUDA 13, cuDNN 9", "which only the other provider names"
    assert str(nvidia.built_for(TENSORRT)) == "CUDA 13, cuDNN 9, TensorRT 10"
    assert nvidia.doubt(CUDA) is None
    (site.system / "proc/version").write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  575.57.08  Tue\n")
    assert nvidia.doubt(CUDA) == (
        "the NVIDIA driver is 575.57.08, onnxruntime-gpu 1.31.1 was built for CUDA 13, which needs 580",
        'update the driver, or for CUDA 12: pip install "onnxruntime-gpu<1.27"',
    )


def test_tensorrt_for_another_cuda(site: FakeSite) -> None:
    site.onnxruntime_gpu()
    site.tensorrt("10.16.1.11", cuda=12)
    assert nvidia.doubt(CUDA) is None
    assert nvidia.doubt(TENSORRT) == (
        "tensorrt-cu12 is installed, onnxruntime-gpu 1.31.1 was built for CUDA 13",
        "pip uninstall -y tensorrt-cu12 tensorrt-cu12-libs tensorrt-cu12-bindings && "
        'pip install --force-reinstall "tensorrt-cu13<11"',
    )
    site.tensorrt("10.16.1.11")
    forget()
    assert nvidia.doubt(TENSORRT) is None
    site.tensorrt("10.16.1.11", ["libcudart.so.12", "libc.so.6"], cuda=12)
    forget()
    assert nvidia.doubt(TENSORRT) is not None, "whichever was installed last is there"


def test_a_gpu_that_is_too_old_for_cuda(site: FakeSite, monkeypatch: pytest.MonkeyPatch) -> None:
    site.onnxruntime_gpu()
    monkeypatch.setattr(nvidia, "compute_capabilities", lambda: ((7, 0), (7, 5)))
    assert nvidia.doubt(CUDA) is None, "the second will do"
    monkeypatch.setattr(nvidia, "compute_capabilities", lambda: ((7, 0),))
    assert nvidia.doubt(CUDA) == (
        "the GPU has compute capability 7.0, onnxruntime-gpu 1.31.1 was built for CUDA 13, which needs 7.5",
        'pip install "onnxruntime-gpu<1.27"',
    )


def test_cudnn_for_another_cuda_as_pytorch_brings_it(site: FakeSite) -> None:
    site.onnxruntime_gpu()
    site.cuda()
    assert nvidia.doubt(CUDA) is None
    site.cudnn("9.10.2.21", cuda=12)
    forget()
    assert nvidia.doubt(CUDA) == (
        "the cuDNN here is that of nvidia-cudnn-cu12, onnxruntime-gpu 1.31.1 was built for CUDA 13",
        "install onnxruntime-gpu in an environment of its own, without nvidia-cudnn-cu12",
    )
    site.cudnn("9.27.0.42")
    forget()
    assert nvidia.doubt(CUDA) is None


def test_the_version_of_tensorrt_that_would_be_loaded(site: FakeSite) -> None:
    site.onnxruntime_gpu()
    site.tensorrt("11.4.0.106")
    assert (nvidia.tensorrt_library(), nvidia.tensorrt_library(TENSORRT)) == ("11.4.0.106", None)
    library = site.system / "libnvinfer.so.10.13.3"  # as NVIDIA's packages for systems name it
    library.write_bytes(shared_library("libnvinfer.so.10"))
    (site.system / "libnvinfer.so.10").symlink_to(library)
    forget()
    assert nvidia.tensorrt_library(TENSORRT) == "10.13.3"


def elsewhere(work: Callable[[], object]) -> str:
    """The error that `work` ends with in a copy of this process, if any: what is loaded stays in that."""
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        try:
            work()
            os.write(writer, b"nothing")
        except (GfldeployError, OSError) as error:
            os.write(writer, str(error).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as file:
        said = file.read()
    os.waitpid(child, 0)
    return said


def failures(spec: EngineSpec) -> tuple[str, str]:
    found = nvidia.obstacle_to_loading(spec)
    assert found is not None and nvidia.why_not_loaded(spec) == found
    said = elsewhere(lambda: nvidia.load_libraries(spec))
    assert said == f"{spec.title} cannot be loaded: {found.reason}. {remedy_sentence(found.remedy)}"
    assert "\n" not in said
    return found


def test_a_library_that_lacks_one(site: FakeSite) -> None:
    site.onnxruntime_gpu()
    site.cuda()
    site.tensorrt("10.16.1.11", needed=["libnvrtc.so.13"])
    assert nvidia.obstacle_to_loading(CUDA) is None
    assert failures(TENSORRT) == (
        "libnvinfer.so.10 needs libnvrtc.so.13, which is not found",
        'pip install "nvidia-cuda-nvrtc==13.*"',
    )


def test_a_part_of_tensorrt(site: FakeSite) -> None:
    site.onnxruntime_gpu()
    site.cuda()
    (site.system / "libnvinfer.so.10.13.3").write_bytes(shared_library("libnvinfer.so.10"))
    (site.system / "libnvinfer.so.10").symlink_to("libnvinfer.so.10.13.3")
    assert failures(TENSORRT) == (
        "libonnxruntime_providers_tensorrt.so needs libnvonnxparser.so.10, which is not found",
        'pip install "tensorrt-cu13<11"',
    )


def test_a_damaged_library(site: FakeSite) -> None:
    site.onnxruntime_gpu()
    site.cuda()
    site.write("nvidia/cu13/lib/libcurand.so.10", b"not a library")
    reason, remedy = failures(CUDA)
    assert reason.startswith("libcurand.so.10 is installed but cannot be loaded: ") and "file too short" in reason
    assert remedy == 'pip install "nvidia-curand==10.*" --force-reinstall'


def test_a_library_that_crashes(site: FakeSite) -> None:
    site.onnxruntime_gpu()
    site.cuda()
    site.write("nvidia/cudnn/lib/libcudnn.so.9", shared_library("libcudnn.so.9", crashes=True))
    found = nvidia.obstacle_to_loading(CUDA)
    assert found is not None
    assert found.reason == "libcudnn.so.9 is installed but cannot be loaded: it crashes the process that loads it"


def test_a_disk_that_is_too_slow(site: FakeSite, monkeypatch: pytest.MonkeyPatch) -> None:
    """What there is no time to load counts as good, what is not there as missing."""
    monkeypatch.setattr(nvidia, "_TRY", (sys.executable, "-c", "import time; time.sleep(9)"))
    monkeypatch.setattr(nvidia, "_time_left", [0.1])
    site.onnxruntime_gpu()
    site.cuda()
    assert nvidia.obstacle_to_loading(CUDA) is None and nvidia._time_left == [0]
    assert nvidia.obstacle_to_loading(TENSORRT) == (
        "TensorRT 10 is not installed, onnxruntime-gpu 1.31.1 needs it",
        'pip install "tensorrt-cu13<11"',
    )


def test_a_driver_without_its_libraries(site: FakeSite) -> None:
    site.onnxruntime_gpu()
    site.cuda()
    (site.system / "libcuda.so.1").unlink()
    reason, remedy = failures(CUDA)
    assert reason == "libonnxruntime_providers_cuda.so needs libcuda.so.1 of the NVIDIA driver, which is not found"
    assert "container" in remedy


def test_a_cpu_package_that_comes_first(site: FakeSite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In another folder, as a user's own packages beside those of an environment."""
    monkeypatch.delitem(sys.modules, "onnxruntime", raising=False)  # whose place would be taken for that of the package
    other = FakeSite(tmp_path / "other")
    other.onnxruntime()
    site.onnxruntime_gpu()
    site.cuda()
    spec = ENGINES["onnxruntime"]
    monkeypatch.setattr(sys, "path", [str(site.folder), str(other.folder)])
    assert nvidia.obstacle_to_loading(spec) is None
    monkeypatch.setattr(sys, "path", [str(other.folder), str(site.folder)])
    forget()
    found = nvidia.obstacle_to_loading(spec)
    assert found is not None
    assert found.reason == "the CPU package onnxruntime overwrites the onnxruntime module of onnxruntime-gpu"


def test_a_package_with_a_file_too_few(site: FakeSite) -> None:
    site.onnxruntime_gpu()
    (site.folder / TENSORRT_PROVIDER).unlink()
    assert failures(TENSORRT) == (
        "libonnxruntime_providers_tensorrt.so of onnxruntime-gpu 1.31.1 is missing",
        "pip install onnxruntime-gpu==1.31.1 --force-reinstall",
    )
    site.write(TENSORRT_PROVIDER, b"damaged")
    forget()
    assert failures(TENSORRT)[0] == "libonnxruntime_providers_tensorrt.so of onnxruntime-gpu 1.31.1 is damaged"


def test_a_library_that_prints_and_a_python_that_cannot_be_run(site: FakeSite, monkeypatch: pytest.MonkeyPatch) -> None:
    site.onnxruntime_gpu()
    site.cuda()
    prints = "print('[a library] says [this]', flush=True)\n" + nvidia._TRIAL
    monkeypatch.setattr(nvidia, "_TRY", (*nvidia._TRY[:-1], prints))
    assert nvidia.obstacle_to_loading(CUDA) is None
    forget()
    monkeypatch.setattr(nvidia, "_TRY", ("", *nvidia._TRY[1:]))
    assert nvidia.obstacle_to_loading(CUDA) is None


@pytest.mark.parametrize("needed", [("libcublas.so.13",), ("liblib.so",) * 900])
def test_libraries_that_need_each_other(site: FakeSite, needed: Sequence[str]) -> None:
    site.onnxruntime_gpu()
    site.cuda()
    site.write("nvidia/cu13/lib/libcublasLt.so.13", shared_library("libcublasLt.so.13", needed))
    sonames = [need.soname for need in nvidia._needs(CUDA)]
    assert len(sonames) == len(set(sonames)) == 6


def test_what_is_there_is_loaded(site: FakeSite) -> None:
    site.onnxruntime_gpu()
    site.cuda()
    site.tensorrt("10.16.1.11")
    assert nvidia.obstacle_to_loading(TENSORRT) is None
    assert nvidia.why_not_loaded(TENSORRT).reason == "its libraries are all there"

    def open_providers() -> None:
        for provider in (CUDA_PROVIDER, TENSORRT_PROVIDER):
            ctypes.CDLL(str(site.folder / provider))

    def load_and_open() -> None:
        nvidia.load_libraries(TENSORRT)
        open_providers()
        ctypes.CDLL("libnvinfer_builder_resource.so.10.16.1.11")

    (site.system / "libcuda.so.1").rename(site.folder / "tensorrt_libs/libcuda.so.1")  # where the linker does not look
    forget()
    assert "libcublasLt.so.13: cannot open shared object file" in elsewhere(open_providers)
    assert elsewhere(load_and_open) == "nothing"


def test_paddle_opens_tensorrt_by_its_bare_name(site: FakeSite) -> None:
    remedy = "install TensorRT 10 with NVIDIA's packages for your system"
    assert nvidia.obstacle_to_loading(PADDLE) == (
        "TensorRT is not installed, Paddle Inference with TensorRT needs TensorRT 10",
        remedy,
    )
    site.tensorrt("11.4.0.106")
    forget()
    assert nvidia.obstacle_to_loading(PADDLE) == (
        "TensorRT 11.4.0.106 is installed, Paddle Inference with TensorRT needs TensorRT 10: 11 is strongly typed only",
        remedy,
    )
    for name in ("libnvinfer", "libnvinfer_plugin"):
        (site.system / f"{name}.so.10.13.3").write_bytes(shared_library(f"{name}.so.10"))
        (site.system / f"{name}.so").symlink_to(f"{name}.so.10.13.3")
    forget()
    assert nvidia.obstacle_to_loading(PADDLE) is None, "the linker's, whatever pip has"


def test_paddle_with_the_packages_of_pip(site: FakeSite) -> None:
    site.tensorrt("10.16.1.11")
    found = nvidia.obstacle_to_loading(PADDLE)
    assert found is not None
    assert found.reason.endswith(
        "opens libnvinfer.so and libnvinfer_plugin.so, which the tensorrt packages of pip do not hold"
    )


def test_the_libraries_that_a_plug_in_brings(site: FakeSite) -> None:
    folder = "onnxruntime_ep_nv_tensorrt_rtx"
    needed = ["libcudart.so.13", "libcuda.so.1", "libtensorrt_rtx.so.1"]
    site.install(
        TENSORRT_RTX.builds["gpu"].distribution,
        "0.5.0",
        {
            f"{folder}/__init__.py": b"",
            f"{folder}/libonnxruntime_providers_nv_tensorrt_rtx.so": shared_library(None, needed),
            f"{folder}/libcudart.so.13.4.36": shared_library("libcudart.so.13"),
            f"{folder}/libtensorrt_rtx.so.1.7.1": shared_library("libtensorrt_rtx.so.1"),
        },
    )
    spec = ENGINES["onnxruntime-tensorrt-rtx"]
    assert nvidia.obstacle_to_loading(spec) is None
    paths = [need.path.name for need in nvidia._needs(spec) if need.path]
    assert paths == ["libcudart.so.13.4.36", "libcuda.so.1", "libtensorrt_rtx.so.1.7.1"]
