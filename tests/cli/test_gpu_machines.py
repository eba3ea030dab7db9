"""What `doctor` and `bench --trt` answer on machines with a GPU: a folder of packages and tiny libraries for each."""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_gpu import HERMETIC_PYTHON, NO_REAL_CUDA, FakeSite, shared_library

import gfldeploy
from gfldeploy.engines.registry import TENSORRT_RTX

ROOT = Path(gfldeploy.__file__).parents[1]
HIDDEN = re.compile(r"(onnxruntime|paddle|openvino|nvidia|tensorrt|torch|ppdet|__editable__).*", re.IGNORECASE)
SCRIPT = """
import json, sys
from pathlib import Path
from gfldeploy.engines import hardware, nvidia_libraries
hardware.DRIVER = Path(sys.argv.pop(1))
nvidia_libraries._LINKER_FOLDERS, nvidia_libraries._cached = (), dict
nvidia_libraries._TRY = (*json.loads(sys.argv.pop(1)), *nvidia_libraries._TRY[1:])
from gfldeploy.cli import main
for command in json.loads(sys.argv.pop(1)):
    try:
        main(command)
    except SystemExit as stopped:
        print("exit code", stopped.code, flush=True)
"""

pytestmark = NO_REAL_CUDA


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What gfldeploy needs, without any engine."""
    folder = tmp_path_factory.mktemp("packages")
    for entry in map(Path, sys.path):
        if entry.name == "site-packages":
            for one in entry.iterdir():
                if not (HIDDEN.fullmatch(one.name) or (folder / one.name).exists()):
                    (folder / one.name).symlink_to(one)
    return folder


class Machine(FakeSite):
    packages: Path

    def run(self, *commands: list[str]) -> tuple[list[str], str]:
        """What commands print on this machine, one after the other in a process, and the last line of the errors."""
        path = os.pathsep.join(map(str, (self.folder, self.packages, ROOT)))
        environment = {**os.environ, "PYTHONPATH": path, "LD_LIBRARY_PATH": str(self.system)}
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        arguments = (str(self.system / "proc"), json.dumps(HERMETIC_PYTHON), json.dumps(commands))
        done = subprocess.run(
            [sys.executable, "-S", "-P", "-c", SCRIPT, *arguments],
            cwd=self.system, env=environment, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        # Of the processor: other tests run at the same time.
        assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2, "all commands together"
        assert done.returncode == 0, done.stderr
        printed = done.stdout.split("exit code ")
        assert [one.split()[0] for one in printed[1:]] == ["0", "0", "2"]
        return [printed[0], printed[1].partition("\n")[2]], done.stderr.strip()

    def answers(self) -> tuple[dict[str, Any], str]:
        """What doctor says of ONNX Runtime with TensorRT in FP16, and the last line of `bench --trt`."""
        (self.system / "val.json").write_text("none")
        bench = ["bench", "bundle", "--data", "val.json", "--trt", "-o", "results.json"]
        (in_json, summary), error = self.run(["doctor", "--json"], ["doctor"], bench)
        report = json.loads(in_json)
        (answer,) = (
            one
            for one in report["capabilities"]
            if (one["engine"], one["precision"], one["device"]) == ("onnxruntime-tensorrt", "fp16", "gpu")
        )
        assert report["machine"]["gpus"] == ["NVIDIA H100"]
        assert answer["works"] or sum(answer["reason"] in one for one in report["warnings"]) == 1
        assert len(summary.splitlines()) <= 15 and all(len(line) <= 80 for line in summary.splitlines())
        assert answer["works"] or answer["remedy"] in " ".join(summary.split())
        return answer, error


@pytest.fixture
def machine(tmp_path: Path, packages: Path) -> Machine:
    found = Machine(tmp_path)
    found.packages = packages
    found.driver()
    return found


def complete(machine: Machine) -> None:
    machine.onnxruntime_gpu()
    machine.cuda()
    machine.tensorrt("10.16.1.11")


def newer(machine: Machine) -> None:
    machine.onnxruntime_gpu()
    machine.cuda()
    machine.tensorrt("11.4.0.106")


def none(machine: Machine) -> None:
    machine.onnxruntime_gpu()
    machine.cuda()


def no_cuda(machine: Machine) -> None:
    machine.onnxruntime_gpu()
    machine.tensorrt("10.16.1.11")


def shadowed(machine: Machine) -> None:
    complete(machine)
    machine.onnxruntime()


def test_tensorrt_10(machine: Machine) -> None:
    complete(machine)
    answer, bench = machine.answers()
    assert answer["works"] and "--trt cannot work" not in bench


@pytest.mark.parametrize(
    ("install", "reason", "remedy"),
    [
        (
            newer,
            "TensorRT 11.4.0.106 is installed, onnxruntime-gpu 1.31.1 needs TensorRT 10",
            'pip install "tensorrt-cu13<11"',
        ),
        (none, "TensorRT 10 is not installed, onnxruntime-gpu 1.31.1 needs it", 'pip install "tensorrt-cu13<11"'),
        (
            no_cuda,
            "libonnxruntime_providers_cuda.so needs libcublasLt.so.13, which is not found, nor libcublas.so.13, "
            "libcurand.so.10, libcudart.so.13 and 1 more",
            'pip install "nvidia-cublas==13.*" "nvidia-curand==10.*" "nvidia-cuda-runtime==13.*" '
            '"nvidia-cudnn-cu13==9.*"',
        ),
        (
            shadowed,
            "the CPU package onnxruntime overwrites the onnxruntime module of onnxruntime-gpu",
            "pip uninstall -y onnxruntime onnxruntime-gpu && pip install onnxruntime-gpu==1.31.1",
        ),
    ],
)
def test_what_is_wrong(machine: Machine, install: Callable[[Machine], None], reason: str, remedy: str) -> None:
    install(machine)
    answer, bench = machine.answers()
    assert (answer["reason"], answer["remedy"]) == (reason, remedy)
    assert bench == f"Error: --trt cannot work here: {reason}. Run: {remedy}"


def test_an_rtx_card_with_the_cpu_build_of_onnx_runtime_and_the_plug_in(machine: Machine) -> None:
    folder = TENSORRT_RTX.module
    needed = ["libcudart.so.13", "libcuda.so.1", "libnvidia-ml.so.1", "libtensorrt_rtx.so.1"]
    files = {
        f"{folder}/__init__.py": b"",
        f"{folder}/libonnxruntime_providers_nv_tensorrt_rtx.so": shared_library(None, needed),
        f"{folder}/libcudart.so.13.4.36": shared_library("libcudart.so.13"),
        f"{folder}/libtensorrt_rtx.so.1.7.1": shared_library("libtensorrt_rtx.so.1"),
    }
    machine.install(TENSORRT_RTX.builds["gpu"].distribution, "0.5.0", files)
    machine.onnxruntime("1.32.0")
    (machine.system / "libnvidia-ml.so.1").write_bytes(shared_library("libnvidia-ml.so.1"))
    (machine.system / "val.json").write_text("none")
    bench = ["bench", "bundle", "--data", "val.json", "--trt", "-o", "results.json"]
    (in_json, summary), error = machine.run(["doctor", "--json"], ["doctor"], bench)
    on_gpu = [one for one in json.loads(in_json)["capabilities"] if one["device"] == "gpu" and one["works"]]
    found = [(one["engine"], one["precision"]) for one in on_gpu]
    assert found == [("onnxruntime-tensorrt-rtx", one) for one in ("fp32", "fp16", "int8")]
    assert "onnxruntime-tensorrt-rtx: fp32, fp16, int8 on gpu" in summary
    assert "--trt cannot work" not in error
