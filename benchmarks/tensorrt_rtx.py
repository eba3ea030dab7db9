"""Compile bundles with ONNX Runtime's real TensorRT-RTX plug-in on a machine without a GPU, and say what it takes.

    pip install --target rtx onnxruntime-ep-nv-tensorrt-rtx-cu13
    PYTHONPATH=rtx python benchmarks/tensorrt_rtx.py --bundles demo/fp32 demo/int8 --machine epyc-2core --name demo

ONNX Runtime, the plug-in, TensorRT-RTX with its parser and its builder, and the functions of the engine
`onnxruntime-tensorrt-rtx` are the real ones. A GPU and its driver are not needed to build, but the plug-in loads only
with them: in their place are stubs, compiled with gcc from tensorrt_rtx_stubs.c. For each file and each architecture of
RTX cards a row says how many parts of the graph TensorRT-RTX takes, which nodes it leaves, and how many of gfldeploy's
rules for TensorRT the graph breaks that the plug-in hands to the parser. The INT8 file for ONNX Runtime's own kernels
is compiled as well, to show that a file that TensorRT refuses is noticed. The rows go to
results/MACHINE/checks/NAME_tensorrt_rtx.json beside this script.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import chdir
from dataclasses import asdict, dataclass
from importlib import util
from pathlib import Path

import numpy as np

from gfldeploy.bundle import Bundle, GraphName
from gfldeploy.engines.hardware import set_tf32
from gfldeploy.engines.nvidia_libraries import load_libraries
from gfldeploy.engines.ort_rtx import compile_model, compiled_parts, load_plugin, rtx_options
from gfldeploy.engines.ort_tensorrt import tensorrt_session_options
from gfldeploy.engines.registry import ENGINES, TENSORRT_RTX, check_bundle
from gfldeploy.engines.tensorrt import Profile, possible_shapes
from gfldeploy.files import scratch_directory, write_json
from gfldeploy.machine import describe_machine
from gfldeploy.quant.tensorrt import check_tensorrt

HERE = Path(__file__).resolve().parent
STUBS = HERE / "tensorrt_rtx_stubs.c"
ENGINE = "onnxruntime-tensorrt-rtx"
TARGETS = ("sm86", "sm89", "sm120")  # RTX 30, 40, 50
HEADER = "| file | for | parts in TensorRT-RTX | nodes outside | rules broken | MB | s |\n|---|---|---|---|---|---|---|"
_NO_TF32 = "Disabling TF32"  # what the builder says where the environment forbids it
_MOST_S = 1800


@dataclass(frozen=True)
class Compiled:
    """What became of one file: parts in TensorRT-RTX, operators outside, rules broken, 10^6 bytes, seconds.

    `tf32`: whether the builder was free to compute FP32 in TF32. `error`: why nothing was compiled.
    """

    bundle: str
    graph: str
    target: str
    parts: int = 0
    outside: dict[str, int] | None = None
    broken: tuple[str, ...] = ()
    mb: float = 0
    seconds: float = 0
    tf32: bool = True
    error: str | None = None

    def row(self) -> str:
        """As a row under `HEADER`."""
        told = [self.error, "", "", "", ""]
        if self.error is None:
            outside = sum((self.outside or {}).values())
            told = [str(self.parts), str(outside), str(len(self.broken)), f"{self.mb:.1f}", f"{self.seconds:.0f}"]
        return f"| {self.bundle} {self.graph} | {self.target} | {' | '.join(map(str, told))} |"


def graphs_of(bundle: Bundle) -> Iterator[GraphName]:
    """The files of a bundle that the engine runs; of INT8 bundles, that of ONNX Runtime's own kernels too."""
    for precision in ("fp32", "fp16", "int8"):
        graph = ENGINES[ENGINE].graph(precision, "gpu")
        if isinstance(graph, str) and check_bundle(bundle, precision) is None and bundle.has_graph(graph):
            yield graph
    if bundle.manifest.precision == "int8":
        yield "onnx"


def build_stubs(folder: Path, plugin: Path, capability: tuple[int, int]) -> Path:
    """Make the stubs in `folder`, load those of the driver and of CUDA, and return the plug-in around the plug-in."""
    libraries = sorted(plugin.parent.glob("*.so*"))
    listed = subprocess.run(
        ["nm", "-D", "--undefined-only", *map(str, libraries)], capture_output=True, text=True, check=True
    )
    wanted = set(re.findall(r"^ +U (\w+)", listed.stdout, re.MULTILINE))
    runtime = next(one for one in libraries if one.name.startswith("libcudart.so."))
    soname = re.match(r"libcudart\.so\.\d+", runtime.name)[0]  # type: ignore[index]
    (folder / "versions").write_text(f"{soname} {{ global: *; }};\n")
    here = set(re.findall(r"^[a-z][\w *]*?(\w+)\(", STUBS.read_text(encoding="utf-8"), re.MULTILINE))
    major, minor = capability
    of_runtime = ["-include", str(STUBS), "-DCUDA_RUNTIME", f"-DMAJOR={major}", f"-DMINOR={minor}"]
    for name, start, answer, options in (
        ("libcuda.so.1", "cu[A-Z]", 100, []),  # CUDA_ERROR_NO_DEVICE
        ("libnvidia-ml.so.1", "nvml", 9, []),  # NVML_ERROR_DRIVER_NOT_LOADED
        (soname, "(__)?cuda", 0, [*of_runtime, f"-Wl,--version-script={folder / 'versions'}"]),
    ):
        names = sorted(one for one in wanted if re.match(start, one) and not (options and one in here))
        source = folder / f"{name}.c"
        source.write_text("".join(f"long {one}(void) {{ return {answer}; }}\n" for one in names))
        compile_c(source, folder / name, [*options, f"-Wl,-soname,{name}"])
        ctypes.CDLL(str(folder / name), ctypes.RTLD_GLOBAL)
    compile_c(STUBS, folder / "around.so", [f'-DPLUGIN="{plugin}"'])
    return folder / "around.so"


def compile_c(source: Path, target: Path, options: Sequence[str]) -> None:
    """Make a shared library with gcc."""
    subprocess.run(["gcc", "-w", "-O1", "-shared", "-fPIC", *options, "-o", str(target), str(source)], check=True)


def compile_one(directory: Path, graph: GraphName, target: str) -> Compiled:
    """Compile one file in this process, with stubs in the place of a GPU of compute capability 12.0."""
    import onnxruntime

    bundle = Bundle.open(directory)
    spec = util.find_spec(TENSORRT_RTX.module)
    assert spec is not None and spec.origin is not None
    plugin = Path(spec.origin).parent / "libonnxruntime_providers_nv_tensorrt_rtx.so"
    set_tf32(False)
    with scratch_directory() as folder, chdir(folder):  # into which the plug-in writes what the parser gets
        around = build_stubs(folder, plugin, (12, 0))
        register = onnxruntime.register_execution_provider_library
        onnxruntime.register_execution_provider_library = lambda name, _: register(name, str(around))
        load_libraries(ENGINES[ENGINE])
        device = load_plugin(onnxruntime).device
        value = onnxruntime.OrtValue.ortvalue_from_shape_and_type((2,), np.float32, "cuda", 0)
        value.update_inplace(np.float32([1, 2]))  # the CPU build of ONNX Runtime has the plug-in's memory and copies
        assert value.numpy().tolist() == [1, 2]
        options = rtx_options(Profile.spanning(possible_shapes(bundle.manifest)), folder / "kernels")
        options |= {"nv_target_sm": target, "nv_dump_subgraphs": "1"}
        start, compiled = time.perf_counter(), folder / "compiled.onnx"
        model = bundle.graph(graph)[0]
        session_options = tensorrt_session_options(onnxruntime, 1)
        session_options.log_severity_level = 2  # warnings: what is said of TF32 is one
        compile_model(onnxruntime, session_options, model, compiled, device, options)
        parts, outside = compiled_parts(compiled)
        seconds, mb = time.perf_counter() - start, compiled.stat().st_size / 1e6
        broken = tuple(problem for path in sorted(folder.glob("*_dump_*.onnx")) for problem in broken_rules(path))
        return Compiled(directory.name, graph, target, parts, dict(outside), broken, mb, seconds)


def broken_rules(dumped: Path) -> list[str]:
    """What TensorRT would refuse in a graph that the plug-in handed to the parser."""
    import onnx

    model = onnx.load(str(dumped), load_external_data=False)
    for tensor in model.graph.initializer:  # an empty one is written as if its data were elsewhere
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            assert 0 in tensor.dims, tensor.name
            tensor.data_location = onnx.TensorProto.DEFAULT
            del tensor.external_data[:]
    return check_tensorrt(model)


def compile_apart(directory: Path, graph: GraphName, target: str) -> Compiled:
    """Compile one file in a process of its own; what ends that process is the reason in the row."""
    command = [sys.executable, __file__, "--one", str(directory.resolve()), graph, target]
    done = subprocess.run(command, capture_output=True, text=True, timeout=_MOST_S, check=False)
    if done.returncode == 0:
        return Compiled(**{**json.loads(done.stdout.splitlines()[-1]), "tf32": _NO_TF32 not in done.stderr})
    *_, last = ["", *done.stderr.strip().splitlines()]
    reason = last.rpartition(" : FAIL : ")[2] or f"its process ended with {done.returncode}"
    return Compiled(directory.name, graph, target, error=reason)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundles", type=Path, nargs="+", default=[])
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), help="architectures, as sm120")
    parser.add_argument("--machine", default="", help="the folder under results/")
    parser.add_argument("--name", default="demo", help="how the file of results starts")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        directory, graph, target = arguments.one
        print(json.dumps(asdict(compile_one(Path(directory), graph, target))))
        return
    print(HEADER)
    rows = []
    for directory in arguments.bundles:
        for graph in graphs_of(Bundle.open(directory)):
            for target in arguments.targets:
                rows.append(compile_apart(directory, graph, target))
                print(rows[-1].row(), flush=True)
    if arguments.machine:
        output = HERE / "results" / arguments.machine / "checks" / f"{arguments.name}_tensorrt_rtx.json"
        write_json(output, {"machine": asdict(describe_machine()), "compiled": [asdict(row) for row in rows]})


if __name__ == "__main__":
    main()
