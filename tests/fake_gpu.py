"""A machine with an NVIDIA driver and packages for GPUs, made of folders: real metadata, and tiny shared libraries that
the linker loads."""

from __future__ import annotations

import struct
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from gfldeploy.engines import nvidia_libraries

PAGE = 4096

# What onnxruntime-gpu 1.31.1 needs, by `readelf -d` of its providers; its CUDA provider opens cuDNN later.
CUDA_PROVIDER = "onnxruntime/capi/libonnxruntime_providers_cuda.so"
TENSORRT_PROVIDER = "onnxruntime/capi/libonnxruntime_providers_tensorrt.so"
CUDA_13 = ("libcublasLt.so.13", "libcublas.so.13", "libcurand.so.10", "libcudart.so.13")
ORT_NEEDS = {
    CUDA_PROVIDER: (*CUDA_13, "libcuda.so.1", "libc.so.6"),
    TENSORRT_PROVIDER: (
        *("libcublas.so.13", "libnvinfer.so.10", "libnvonnxparser.so.10", "libcudart.so.13", "libcudnn.so.9"),
        "libc.so.6",
    ),
}


# The linker of this process would find the real ones.
NO_REAL_CUDA = pytest.mark.skipif(
    any(nvidia_libraries._find_by_linker(name) for name in ("libcublas.so.13", "libcuda.so.1", "libnvinfer.so.10")),
    reason="this machine has NVIDIA's own libraries",
)
# Runs Python without the linker's cache; its own libraries may be found from where it is, not from a link to it.
HERMETIC_PYTHON = ("/lib64/ld-linux-x86-64.so.2", "--inhibit-cache", str(Path(sys.executable).resolve()))


def shared_library(
    soname: str | None = None, needed: Sequence[str] = (), paths: str = "", *, crashes: bool = False
) -> bytes:
    """An x86-64 library without code; one that `crashes` names some of its data as the code to start with."""
    strings = bytearray(b"\0")

    def name(text: str) -> int:
        strings.extend(text.encode() + b"\0")
        return len(strings) - len(text.encode()) - 1

    entries = [(1, name(one)) for one in needed]
    entries += [(14, name(soname))] if soname else []
    entries += [(29, name(paths))] if paths else []
    entries += [(12, 64)] if crashes else []
    symbols, hashes = 64 + 3 * 56, 64 + 3 * 56 + 24  # one symbol, which is none; one bucket and one chain
    dynamic = hashes + 16
    table = dynamic + 16 * (len(entries) + 6)
    entries += [(4, hashes), (5, table), (6, symbols), (10, len(strings)), (11, 24), (0, 0)]
    size = table + len(strings)
    header = b"\x7fELF\x02\x01\x01" + bytes(9)
    header += struct.pack("<HHIQQQIHHHHHH", 3, 62, 1, 0, 64, 0, 0, 64, 56, 3, 0, 0, 0)
    read_write = 6
    for kind, start, length, align in ((1, 0, size, PAGE), (2, dynamic, 16 * len(entries), 8), (0x6474E551, 0, 0, 16)):
        header += struct.pack("<IIQQQQQQ", kind, read_write, start, start, start, length, length, align)
    body = bytes(24) + struct.pack("<IIII", 1, 1, 0, 0) + b"".join(struct.pack("<QQ", *one) for one in entries)
    return header + body + bytes(strings)


class FakeSite:
    """A `site-packages` folder, and the linker's folder, `system`, beside it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.system = folder / "site-packages", folder / "system"
        self.folder.mkdir(parents=True)
        self.system.mkdir()

    def install(self, name: str, version: str, files: Mapping[str, bytes] | None = None) -> None:
        """A distribution with these files, as pip would unpack and record it."""
        info = f"{name.replace('-', '_')}-{version}.dist-info"
        written = {f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n".encode()}
        written |= files or {}
        for path, data in written.items():
            self.write(path, data)
        lines = [f"{path},sha256=none,{len(data)}" for path, data in written.items()]
        (self.folder / info / "RECORD").write_text("\n".join((*lines, f"{info}/RECORD,,", "")))

    def write(self, path: str, data: bytes) -> None:
        target = self.folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)

    def driver(self, version: str = "580.95.05") -> None:
        """A driver and its libraries, in the folder `system`, and a GPU."""
        proc = self.system / "proc"
        (proc / "gpus/0000:01:00.0").mkdir(parents=True)
        (proc / "gpus/0000:01:00.0/information").write_text("Model: \t\t NVIDIA H100\n")
        (proc / "version").write_text(f"NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  {version}  Release\n")
        (self.system / "libcuda.so.1").write_bytes(shared_library("libcuda.so.1", ["libc.so.6"]))

    def onnxruntime_gpu(self, version: str = "1.31.1") -> None:
        providers = {path: shared_library(None, needed) for path, needed in ORT_NEEDS.items()}
        core = {"onnxruntime/__init__.py": b"# GPU build\n", "onnxruntime/capi/state.so": b"GPU build"}
        self.install("onnxruntime-gpu", version, core | providers)

    def onnxruntime(self, version: str = "1.32.0") -> None:
        """The CPU package, over whatever is there."""
        core = {"onnxruntime/__init__.py": b"# CPU\n", "onnxruntime/capi/state.so": b"CPU"}
        self.install("onnxruntime", version, core)

    def cuda(self) -> None:
        """CUDA 13 and cuDNN 9, from pip."""
        for name, *needed in (("libcublasLt.so.13",), ("libcublas.so.13", "libcublasLt.so.13"), ("libcurand.so.10",),
                              ("libcudart.so.13",)):  # fmt: skip
            self.write(f"nvidia/cu13/lib/{name}", shared_library(name, needed))
        self.cudnn("9.27.0.42")
        self.install("nvidia-cuda-runtime", "13.0.96")

    def cudnn(self, version: str, cuda: int = 13) -> None:
        """The packages for all CUDAs have the same files."""
        library = shared_library("libcudnn.so.9", [f"libcudart.so.{cuda}"]) + bytes(cuda)
        self.install(f"nvidia-cudnn-cu{cuda}", version, {"nvidia/cudnn/lib/libcudnn.so.9": library})

    def tensorrt(self, version: str, needed: Sequence[str] = ("libcudart.so.13",), cuda: int = 13) -> None:
        """As pip installs it: the libraries have no longer names than the linker asks for."""
        major = version.partition(".")[0]
        infer, parser = f"libnvinfer.so.{major}", f"libnvonnxparser.so.{major}"
        resource = f"libnvinfer_builder_resource.so.{version}"  # which TensorRT opens when it builds
        self.install(f"tensorrt-cu{cuda}", version)
        self.install(
            f"tensorrt-cu{cuda}-libs",
            version,
            {
                f"tensorrt_libs/{infer}": shared_library(infer, needed),
                f"tensorrt_libs/{parser}": shared_library(parser, [infer]),
                f"tensorrt_libs/{resource}": shared_library(resource),
            },
        )
