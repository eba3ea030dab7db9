"""What ONNX Runtime's real CUDA provider makes of bundles, on a machine without a GPU.

    pip install --target gpu onnxruntime-gpu
    PYTHONPATH=gpu python benchmarks/cuda_without_gpu.py --bundles demo/fp32 --machine epyc-2core --name demo

ONNX Runtime and the engine's options and binding are the real ones; in the place of CUDA's libraries are stubs, made
with gcc and readelf, in which kernels do nothing. Of each file a row says how many nodes run in CUDA and on the CPU,
how many copies ONNX Runtime puts in between, and whether it takes the file for CUDA graphs. A network of element-wise
operators, which needs no cuDNN, is inferred as the engine does it, and what CUDA is asked for is counted. The rows go
to results/MACHINE/checks/NAME_cuda.json beside this script.
"""

from __future__ import annotations

import argparse
import ctypes
import re
import subprocess
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gfldeploy.bundle import Bundle, GraphName
from gfldeploy.engines.base import EngineOptions
from gfldeploy.engines.ort_binding import BoundSessions
from gfldeploy.engines.ort_engine import PROVIDERS, OnnxRuntimeEngine, cuda_options, session_options
from gfldeploy.files import scratch_directory, write_json
from gfldeploy.machine import describe_machine

HERE = Path(__file__).resolve().parent
RUNTIME = "libcudart.so"
FILES: tuple[GraphName, ...] = ("onnx", "onnx_fp16")
COUNTERS = ("kernels", "captures", "graph_launches", "copies", "device_waits")
CUDNN = ("cudnnCreate", "cudnnDestroy", "cudnnSetStream", "cudnnGetVersion", "cudnnGetCudartVersion")
_HEADER = "| file | nodes in CUDA | nodes on the CPU | copies between | taken for CUDA graphs |\n|---|---|---|---|---|"


@dataclass(frozen=True)
class Placed:
    """Where the nodes of a file run. `refused`: why it cannot be a CUDA graph, None if it can."""

    bundle: str
    graph: str
    cuda: int
    cpu: dict[str, int]
    copies: int
    refused: str | None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundles", type=Path, nargs="+", required=True)
    parser.add_argument("--machine", required=True)
    parser.add_argument("--name", required=True)
    given = parser.parse_args()
    import onnxruntime as ort

    with scratch_directory() as folder:
        runtime = load_stubs(Path(ort.__file__).parent / "capi", folder)
        rows = [
            place(ort, path, graph, Bundle.open(path), folder)
            for path in given.bundles
            for graph in FILES
            if Bundle.open(path).has_graph(graph)
        ]
        calls = infer(ort, runtime, folder)
    print(_HEADER)
    for one in rows:
        listed = ", ".join(f"{name} x{count}" for name, count in one.cpu.items())
        print(f"| {one.bundle} {one.graph} | {one.cuda} | {listed} | {one.copies} | {one.refused or 'yes'} |")
    for said, counted in calls.items():
        print(f"{said}: {', '.join(f'{count} {name}' for name, count in counted.items() if count)}")
    record = {
        "onnxruntime": ort.__version__,
        "machine": asdict(describe_machine()),
        "files": [asdict(one) for one in rows],
        "calls": calls,
    }
    target = HERE / "results" / given.machine / "checks" / f"{given.name}_cuda.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    write_json(target, record)


def load_stubs(package: Path, folder: Path) -> ctypes.CDLL:
    """Stubs of all that ONNX Runtime's libraries in `package` take from NVIDIA's; returns that of the runtime."""
    wanted: dict[str, set[str]] = defaultdict(set)
    for library in [*package.glob("libonnxruntime_providers_cuda.so"), *package.glob("onnxruntime_pybind11_state*.so")]:
        command = ["readelf", "--dyn-syms", "--dynamic", "--wide", str(library)]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        for soname in re.findall(r"\(NEEDED\).*\[(libcu\S+)\]", said):
            wanted[soname] |= set()
        for symbol, soname in re.findall(r"UND (\w+)@(libcu\S+)", said):
            wanted[soname].add(symbol)
        wanted["libcuda.so.1"] |= set(re.findall(r"UND (cu[A-Z]\w+)$", said, re.MULTILINE))
    wanted["libcudnn.so.9"] |= set(CUDNN)  # opened when it is needed, by name
    if not any(soname.startswith(RUNTIME) for soname in wanted):
        raise SystemExit("this onnxruntime has no CUDA provider: put onnxruntime-gpu first on PYTHONPATH")
    loaded = {soname: stub(soname, symbols, folder) for soname, symbols in wanted.items()}
    return next(library for soname, library in loaded.items() if soname.startswith(RUNTIME))


def stub(soname: str, symbols: set[str], folder: Path) -> ctypes.CDLL:
    """A library of this name; what cuda_stubs.c does not have returns 0, and gives a number where it creates."""
    source = (HERE / "cuda_stubs.c").read_text(encoding="utf-8") if soname.startswith(RUNTIME) else ""
    create = "static long next = 0x9000;\n" if not source else ""
    for symbol in sorted(symbols - set(re.findall(r"(\w+)\(", source))):
        makes = re.search(r"cublas(Lt)?Create(_v2)?$|cudnnCreate$", symbol)
        body = "{ *made = next += 16; return 0; }" if makes else "{ return 0; }"
        create += f"long {symbol}({'long *made' if makes else 'void'}) {body}\n"
    file, version, target = folder / f"{soname}.c", folder / f"{soname}.map", folder / soname
    file.write_text(source + create)
    version.write_text(f"{soname} {{ global: *; }};\n")
    options = [] if soname.startswith(("libcuda.", "libcudnn")) else [f"-Wl,--version-script={version}"]
    command = ["gcc", "-w", "-shared", "-fPIC", "-o", str(target), str(file), f"-Wl,-soname,{soname}", *options]
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(target), ctypes.RTLD_GLOBAL)


def opened(ort: Any, model: Path, cuda_graph: bool, options: Any = None) -> Any:
    """A session with the engine's options."""
    provider = {**cuda_options(EngineOptions(device="gpu")), **(OnnxRuntimeEngine.graph_options if cuda_graph else {})}
    options = options or session_options(ort, 1)
    return ort.InferenceSession(str(model), options, providers=[(PROVIDERS["gpu"], provider)], enable_fallback=0)


def place(ort: Any, path: Path, graph: GraphName, bundle: Bundle, folder: Path) -> Placed:
    """Where the nodes of a file run, from the graph that ONNX Runtime optimised and from its own account."""
    import onnx

    model, _ = bundle.graph(graph)
    options = session_options(ort, 1)
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    parts = opened(ort, model, False, options).get_provider_graph_assignment_info()
    nodes: dict[str, Counter[str]] = defaultdict(Counter)
    for part in parts:
        nodes[part.ep_name].update(node.op_type for node in part.get_nodes())
    optimized = onnx.load(options.optimized_model_filepath)
    refused = None
    try:
        opened(ort, model, True)
    except Exception as error:  # noqa: BLE001 - the reason is the result
        refused = str(error)
    copies = sum(node.op_type.startswith("Memcpy") for node in optimized.graph.node)
    in_cuda, on_cpu = nodes[PROVIDERS["gpu"]], nodes[PROVIDERS["cpu"]]
    return Placed(path.name, graph, in_cuda.total(), dict(on_cpu), copies, refused)


def infer(ort: Any, runtime: ctypes.CDLL, folder: Path) -> dict[str, dict[str, int]]:
    """What CUDA is asked for in each of some inferences of a network of element-wise operators."""
    model = write_elementwise(folder / "elementwise.onnx")
    sessions = BoundSessions(ort, lambda graph: [opened(ort, model, graph)], "cuda", ["scores"], cuda_graph=True)
    image = {"image": np.ones((1, 3, 8, 8), np.float32)}
    steps = {
        "the first inference, which captures": lambda: sessions.infer_timed(image),
        "an inference": lambda: sessions.infer_timed(image),
        "an inference of what was uploaded before": lambda: sessions.infer_timed(uploaded),
        "an inference of another shape": lambda: sessions.infer_timed({"image": image["image"][:, :, :4]}),
    }
    calls = {}
    for said, run in steps.items():
        uploaded = sessions.upload(image)
        before = counters(runtime)
        run()
        calls[said] = {name: count - before[name] for name, count in counters(runtime).items()}
    return calls


def counters(runtime: ctypes.CDLL) -> dict[str, int]:
    return {name: ctypes.c_long.in_dll(runtime, f"stub_{name}").value for name in COUNTERS}


def write_elementwise(path: Path) -> Path:
    from onnx import TensorProto, helper, save

    def value(name: str) -> Any:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", 3, "H", "W"])

    names: Sequence[str] = ["image", "a", "b", "scores"]
    kinds = ("Relu", "Sigmoid", "Tanh")
    nodes = [helper.make_node(kind, [names[k]], [names[k + 1]]) for k, kind in enumerate(kinds)]
    graph = helper.make_graph(nodes, "elementwise", [value("image")], [value("scores")])
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), str(path))
    return path


if __name__ == "__main__":
    main()
