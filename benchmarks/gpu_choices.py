"""What the choices in ONNX Runtime's CUDA provider gain or cost on a GPU: graphs, algorithms, NHWC, several at once.

    python benchmarks/gpu_choices.py --bundle gfl_r50/fp32 --size 800x1344 --name gfl_r50 --machine GPU

Each variant of the engine runs in a process of its own, on the same random images, and its outputs are held against
those of the first:

    as it is        a CUDA graph, and what `cuda_options` says: cuDNN's heuristic A (HEURISTIC) where tensor cores may
                    be used, in FP16 and TF32, else B (EXHAUSTIVE, ONNX Runtime's default, which searches no more)
    no graph        the same without the graph
    heuristic A     as it is, with HEURISTIC
    heuristic B     as it is, with EXHAUSTIVE
    fallback        as it is, with the heuristic FALLBACK (DEFAULT)
    override        as it is, with `use_tf32` and NVIDIA_TF32_OVERRIDE=0: tensor cores, where FP32 does not need TF32
    no tensor cores as it is, without `use_tf32`
    bias apart      as it is, with each convolution's bias as an addition behind it, which is another kernel
    NHWC            no graph, with `prefer_nhwc`; its sessions refuse graphs
    fused bias      as it is, with `fuse_conv_bias`
    two at once     as it is, two engines in two threads of one process, each with its own session and stream
    two processes   the same in two processes: the GPU takes turns between them
    shapes          images of this size and of its other orientation interleaved, in a session of its own for each
    any shape       the same in the session for any shape, in which cuDNN plans anew at each turn

Writes results/MACHINE/checks/NAME_choices.json beside this script, and prints the rows. `ms`: median of `infer`, copies
included; `network`: the part of it between the copies; `first`: until the first outputs are there, with the session.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gfldeploy import Bundle
from gfldeploy.engines.base import EngineOptions
from gfldeploy.engines.ort_engine import OnnxRuntimeEngine, Providers
from gfldeploy.engines.registry import graph_for
from gfldeploy.errors import GfldeployError
from gfldeploy.files import write_json
from gfldeploy.machine import describe_machine

HERE = Path(__file__).resolve().parent
GRAPH, NO_GRAPH = {"enable_cuda_graph": "True"}, {"enable_cuda_graph": "False"}


@dataclass(frozen=True)
class Variant:
    """Options of the provider, engines in a process, processes; `turns`: images of both orientations; `sessions`:
    whether shapes have their own; `bias_apart`: change the graph; `override`: set the environment."""

    options: Mapping[str, str]
    engines: int = 1
    processes: int = 1
    turns: bool = False
    sessions: bool = True
    bias_apart: bool = False
    override: bool = False


VARIANTS: Mapping[str, Variant] = {
    "as it is": Variant(GRAPH),
    "no graph": Variant(NO_GRAPH),
    "heuristic A": Variant({**GRAPH, "cudnn_conv_algo_search": "HEURISTIC"}),
    "heuristic B": Variant({**GRAPH, "cudnn_conv_algo_search": "EXHAUSTIVE"}),
    "fallback": Variant({**GRAPH, "cudnn_conv_algo_search": "DEFAULT"}),
    "override": Variant({**GRAPH, "use_tf32": "1"}, override=True),
    "no tensor cores": Variant({**GRAPH, "use_tf32": "0"}),
    "bias apart": Variant(GRAPH, bias_apart=True),
    "NHWC": Variant({**NO_GRAPH, "prefer_nhwc": "1"}),
    "fused bias": Variant({**GRAPH, "fuse_conv_bias": "1"}),
    "two at once": Variant(GRAPH, engines=2),
    "two processes": Variant(GRAPH, processes=2),
    "shapes": Variant(GRAPH, turns=True),
    "any shape": Variant(NO_GRAPH, turns=True, sessions=False),
}
WARMUP = 5
HEADER = (
    "| precision | batch | variant | images/s | ms | network | first, s | GPU memory, MB | scores off by | it says |\n"
    + "|---" * 10
    + "|"
)


@dataclass(frozen=True)
class Row:
    """A variant, or why it failed. Times in milliseconds of a batch; `score_max`: against the first variant."""

    precision: str
    batch_size: int
    variant: str
    images_per_s: float = 0.0
    latency_ms: float = 0.0
    inference_ms: float = 0.0
    input_copy_ms: float = 0.0
    output_copy_ms: float = 0.0
    first_s: float = 0.0
    gpu_memory_mb: float = 0.0
    score_max: float | None = None
    says: str = ""

    def line(self) -> str:
        """As a row under `HEADER`."""
        off = "" if self.score_max is None else f"{self.score_max:.1e}"
        times = f"{self.images_per_s:.1f} | {self.latency_ms:.2f} | {self.inference_ms:.2f} | {self.first_s:.1f}"
        return (
            f"| {self.precision} | {self.batch_size} | {self.variant} | {times} | {self.gpu_memory_mb:.0f} | {off} | "
            f"{self.says} |"
        )


def engine(bundle: Bundle, options: EngineOptions, variant: Variant) -> OnnxRuntimeEngine:
    """The engine with other options of its provider."""
    own = dict(variant.options)

    class Altered(OnnxRuntimeEngine):
        graph_options = own if own["enable_cuda_graph"] == "True" else {}
        own_sessions = OnnxRuntimeEngine.own_sessions if variant.sessions else 0
        later_sessions = OnnxRuntimeEngine.later_sessions if variant.sessions else 0

        def _session_options(self) -> Any:
            options = super()._session_options()
            if variant.bias_apart:
                fusion = "ConvAddFusion"  # which would put them together again
                options.add_session_config_entry("optimization.disable_specified_optimizers", fusion)
            return options

        def _source(self) -> str | bytes:
            return with_bias_apart(self._model) if variant.bias_apart else super()._source()

        def _choose_providers(self, bundle: Bundle) -> Providers:
            (first, given), *others = super()._choose_providers(bundle)
            asked = {name: value for name, value in own.items() if name != "enable_cuda_graph"}
            return [(first, {**given, **asked}), *others]

    return Altered(bundle, options, graph_for("onnxruntime", options.precision, "gpu"))


def with_bias_apart(model: Path) -> bytes:
    """The file with an Add [1, C, 1, 1] behind every convolution in the place of its bias."""
    import onnx
    from onnx import helper, numpy_helper

    graph = onnx.load(str(model))
    constants = {one.name: one for one in graph.graph.initializer}
    nodes = []
    for node in graph.graph.node:
        nodes.append(node)
        if node.op_type == "Conv" and len(node.input) == 3 and node.input[2] in constants:
            bias = numpy_helper.to_array(constants[node.input[2]]).reshape(1, -1, 1, 1)
            name, (output,) = f"{node.output[0]}.bias", node.output
            graph.graph.initializer.append(numpy_helper.from_array(bias, name))
            del node.input[2]
            node.output[0] = f"{output}.plain"
            nodes.append(helper.make_node("Add", [f"{output}.plain", name], [output], f"{output}.add"))
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.graph.node[:]
    graph.graph.node.extend(copies)
    return bytes(graph.SerializeToString())


def images(batch: int, size: Sequence[int]) -> NDArray[np.float32]:
    """Normalised noise that is smooth enough for a detector to see something."""
    rng = np.random.default_rng(0)
    coarse = rng.normal(0, 1, (batch, 3, size[0] // 8, size[1] // 8)).astype(np.float32)
    return np.ascontiguousarray(coarse.repeat(8, 2).repeat(8, 3))


def gpu_memory_mb() -> float:
    import pynvml

    pynvml.nvmlInit()
    return float(pynvml.nvmlDeviceGetMemoryInfo(pynvml.nvmlDeviceGetHandleByIndex(0)).used) / 1e6


def measure(task: Mapping[str, Any]) -> dict[str, Any]:
    """Run one variant in this process; its figures, and its outputs in a file."""
    bundle = Bundle.open(task["bundle"])
    batch, (height, width) = task["batch_size"], task["size"]
    variant = VARIANTS[task["variant"]]
    if variant.override:
        os.environ["NVIDIA_TF32_OVERRIDE"] = "0"
    sizes = [(height, width), (width, height)] if variant.turns else [(height, width)]
    precision, tf32 = ("fp32", True) if task["precision"] == "tf32" else (task["precision"], False)
    options = EngineOptions(precision, "gpu", 2, shapes=tuple((batch, *size) for size in sizes), tf32=tf32)
    before, start = gpu_memory_mb(), time.perf_counter()
    engines = [engine(bundle, options, variant) for _ in range(variant.engines)]
    tensors: list[list[NDArray[np.float32]]] = []
    for one in engines:
        tensors.append([one.host_array(batch * 3 * height * width).reshape(batch, 3, *size) for size in sizes])
        for tensor, size in zip(tensors[-1], sizes, strict=True):
            tensor[:] = images(batch, size)
        outputs = one.infer({"image": tensors[-1][0]})
    first_s = time.perf_counter() - start
    for _ in range(WARMUP):
        for one, some in zip(engines, tensors, strict=True):
            for tensor in reversed(some):
                outputs = one.infer({"image": tensor})
    np.savez(task["output"], **outputs)
    while not all(Path(one).exists() for one in task["together"]):  # all processes are timed at once
        time.sleep(0.001)

    def run(place: int) -> list[Any]:
        found = []
        end = time.perf_counter() + task["seconds"]
        while time.perf_counter() < end:
            begun = time.perf_counter()
            _, times = engines[place].infer_timed({"image": tensors[place][len(found) % len(sizes)]})
            found.append((1e3 * (time.perf_counter() - begun), times))
        return found

    begun = time.perf_counter()
    with ThreadPoolExecutor(len(engines)) as pool:
        found = [row for rows in pool.map(run, range(len(engines))) for row in rows]
    wall_s = time.perf_counter() - begun
    memory = gpu_memory_mb() - before
    says = engines[0].cuda_graph or ""
    return {
        "images_per_s": len(found) * batch / wall_s,
        "latency_ms": statistics.median(ms for ms, _ in found),
        "inference_ms": statistics.median(times.inference_ms for _, times in found),
        "input_copy_ms": statistics.median(times.input_copy_ms for _, times in found),
        "output_copy_ms": statistics.median(times.output_copy_ms for _, times in found),
        "first_s": first_s,
        "gpu_memory_mb": memory,
        "says": says,
    }


def ask(task: Mapping[str, Any], processes: int, timeout: float) -> list[dict[str, Any]]:
    """What each of the processes measured."""
    command = [sys.executable, __file__, "--task"]
    outputs = [f"{task['output']}_{number}.npz" for number in range(processes)]
    tasks = [{**task, "output": one, "together": outputs} for one in outputs]
    running = [
        subprocess.Popen([*command, json.dumps(one)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for one in tasks
    ]
    answers = []
    for one in running:
        try:
            out, err = one.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            for other in running:
                other.kill()
            answers.append({"says": f"took more than {timeout:g} s"})
            continue
        lines = [line for line in out.splitlines() if line.startswith("{")]
        answers.append(json.loads(lines[-1]) if lines else {"says": f"failed: {err.strip()[-400:]}"})
    return answers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", help=argparse.SUPPRESS)
    parser.add_argument("--bundle", type=Path)
    parser.add_argument("--size", default="320x512", metavar="HxW", help="of the images (default: 320x512)")
    parser.add_argument("--precisions", nargs="+", choices=("fp32", "tf32", "fp16"), default=["fp32", "tf32", "fp16"])
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--seconds", type=float, default=1.5)
    parser.add_argument("--timeout", type=float, default=60.0, metavar="S", help="of a variant (default: 60)")
    parser.add_argument("--machine", help="folder of results/")
    parser.add_argument("--name", help="of the results file")
    args = parser.parse_args()
    if args.task:
        try:
            print(json.dumps(measure(json.loads(args.task))), flush=True)
        except GfldeployError as error:
            raise SystemExit(str(error)) from error
        return
    if not (args.bundle and args.machine and args.name):
        parser.error("--bundle, --machine and --name are needed")
    size = [int(side) for side in args.size.split("x")]
    output = HERE / "results" / args.machine / "checks" / f"{args.name}_choices.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(f"{output}.unfinished")
    scratch.mkdir(exist_ok=True)
    rows: list[Row] = []
    print(HEADER, flush=True)
    for precision in args.precisions:
        for batch in args.batch_sizes:
            first: NDArray[Any] | None = None
            for variant in args.variants:
                task = {
                    "bundle": str(args.bundle),
                    "precision": precision,
                    "batch_size": batch,
                    "size": size,
                    "variant": variant,
                    "seconds": args.seconds,
                    "output": str(scratch / f"{precision}_{batch}_{len(rows)}"),
                }
                answers = ask(task, VARIANTS[variant].processes, args.timeout)
                answer = dict(answers[0])
                if all("images_per_s" in one for one in answers):
                    answer["images_per_s"] = sum(one["images_per_s"] for one in answers)
                    with np.load(f"{task['output']}_0.npz") as kept:
                        scores = np.sort(kept["scores"].max(axis=2), axis=1)
                    first = scores if first is None else first
                    answer["score_max"] = float(np.abs(scores - first).max())
                rows.append(Row(precision, batch, variant, **answer))
                print(rows[-1].line(), flush=True)
                write(output, args, rows)
    for path in scratch.iterdir():
        path.unlink()
    scratch.rmdir()


def write(output: Path, args: argparse.Namespace, rows: Sequence[Row]) -> None:
    import onnxruntime

    bundle = Bundle.open(args.bundle)
    write_json(
        output,
        {
            "machine": asdict(describe_machine()),
            "onnxruntime": onnxruntime.__version__,
            "bundle": {"name": bundle.name, "digest": bundle.digest},
            "size": args.size,
            "rows": list(map(asdict, rows)),
        },
    )


if __name__ == "__main__":
    main()
