"""What an engine reaches on this machine at best: convolutions that suit it, and next to nothing between them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from numpy.typing import NDArray

from gfldeploy._quiet import quiet
from gfldeploy.bench.monitor import gpu_bandwidth_gb_per_s
from gfldeploy.bench.results import Peak
from gfldeploy.bundle import Bundle, Graph, GraphName, Manifest, TensorSpec, write_bundle
from gfldeploy.engines.base import Device, Engine, EngineOptions, Precision, Tensors, reasons
from gfldeploy.engines.dependencies import require
from gfldeploy.engines.registry import graph_for, open_engine
from gfldeploy.errors import EngineError, GfldeployError
from gfldeploy.export.half import write_half_onnx
from gfldeploy.export.onnx_graph import OPSET
from gfldeploy.files import scratch_directory
from gfldeploy.images.preprocess import Preprocess
from gfldeploy.nms import NmsParams
from gfldeploy.quant.calibration import Calibration, ConvRanges, OutputRange
from gfldeploy.quant.qdq import write_qdq_onnx
from gfldeploy.quant.tensorrt import write_tensorrt_onnx

# The most common convolution of GFL: 3x3, 256 to 256 channels, which fill vectors of every width. At 56x56 its weights
# and maps stay in the caches.
_CHANNELS = 256
_SIDE = 56
_REACH = 4.0  # of INT8 activations, which have a mean square of about 1
_WARMUP = 2
_FEWEST_RUNS = 5
# Each of the two arrays of a copy has so many times the size of the last-level cache, if that much memory is free.
_CACHES = 4
_SMALLEST_COPY_BYTES = 256 * 10**6
_MOST_OF_FREE_MEMORY = 0.125


@dataclass(frozen=True)
class Stack:
    """A 1x1 convolution from the image's channels, `depth` 3x3 ones, a ReLU behind each, and the mean of each channel.

    It takes `batch` images of one size.
    """

    depth: int
    batch: int

    @property
    def macs(self) -> int:
        """Of one inference: every weight meets every pixel once, beyond the border too."""
        return self.batch * _SIDE * _SIDE * sum(weight.size for weight in self._weights)

    def image(self) -> NDArray[np.float32]:
        """An input, float32 [batch, 3, 56, 56], normally distributed."""
        return np.random.default_rng(1).normal(0, 1, (self.batch, 3, _SIDE, _SIDE)).astype(np.float32)

    def write(self, target: Path, name: GraphName, precision: Precision) -> Bundle:
        """Write it to `target` as a bundle of this graph alone: scores [batch, 256, 1, 1], no boxes.

        `paddle_program` is in INT8. Raises `MissingDependencyError`, `OutputError`.
        """
        with write_bundle(target, detector=False) as (directory, manifests):
            if name == "paddle":
                graph = Graph("model.json", "model.pdiparams")
                self._write_paddle(directory)
            elif name == "paddle_program":
                graph = Graph("model.pdmodel", "model.pdiparams")
                self._write_int8_program(directory)
            else:
                graph = Graph("model.onnx")
                self._write_onnx(directory / graph.model, name, precision)
            manifests.append(
                Manifest(
                    name="peak",
                    precision="int8" if precision == "int8" else "fp32",
                    graphs={name: graph},
                    inputs=(TensorSpec("image", "float32", (self.batch, 3, _SIDE, _SIDE)),),
                    outputs=(TensorSpec("scores", "float32", (self.batch, _CHANNELS, 1, 1)),),
                    preprocess=Preprocess(target_size=(_SIDE, _SIDE), fixed=True),
                    nms=NmsParams(score_threshold=0.05, nms_threshold=0.6, nms_top_k=100, keep_top_k=100),
                    classes=("none",),
                    score_channels=1,
                    strides=(1,),
                    reg_max=1,
                    parameters=sum(weight.size for weight in self._weights),
                    provenance={},
                )
            )
        return Bundle.open(target, detector=False)

    @cached_property
    def _weights(self) -> list[NDArray[np.float32]]:
        """Scaled so that the mean square of the maps stays about 1 (He et al. 2015, equation 10)."""
        random = np.random.default_rng(0)
        shapes = [(_CHANNELS, 3, 1, 1), *[(_CHANNELS, _CHANNELS, 3, 3)] * self.depth]
        return [random.normal(0, np.sqrt(2 / np.prod(shape[1:])), shape).astype(np.float32) for shape in shapes]

    def _write_onnx(self, path: Path, name: GraphName, precision: Precision) -> None:
        require("onnx", "writing a graph of convolutions")
        from onnx import TensorProto, helper, numpy_helper, save

        nodes, constants = [], [numpy_helper.from_array(np.zeros(_CHANNELS, np.float32), "bias")]
        tensor = "image"
        for number, weight in enumerate(self._weights):
            constants.append(numpy_helper.from_array(weight, f"weight{number}"))
            inputs, pads = [tensor, f"weight{number}", "bias"], [weight.shape[2] // 2] * 4
            tensor = f"map{number}"
            nodes += [
                helper.make_node("Conv", inputs, [f"sum{number}"], f"convolution{number}", pads=pads),
                helper.make_node("Relu", [f"sum{number}"], [tensor]),
            ]
        nodes.append(helper.make_node("GlobalAveragePool", [tensor], ["scores"]))
        graph = helper.make_graph(
            nodes,
            "peak",
            [helper.make_tensor_value_info("image", TensorProto.FLOAT, [self.batch, 3, _SIDE, _SIDE])],
            [helper.make_tensor_value_info("scores", TensorProto.FLOAT, [self.batch, _CHANNELS, 1, 1])],
            constants,
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=8)
        with scratch_directory() as folder:
            fp32 = folder / "model.onnx"
            save(model, str(fp32))
            if name == "onnx_fp16":
                write_half_onnx(fp32, path)
            elif name == "onnx_tensorrt":
                write_tensorrt_onnx(fp32, path, self._calibration())
            elif precision == "int8":
                write_qdq_onnx(fp32, path, self._calibration())
            else:
                save(model, str(path))

    def _calibration(self) -> Calibration:
        outputs = (OutputRange(0.0, _REACH),)
        ranges = {
            f"weight{number}": ConvRanges((_REACH,), outputs, tuple(_largest(weight).tolist()))
            for number, weight in enumerate(self._weights)
        }
        return Calibration("none", {}, ranges)

    def _write_paddle(self, directory: Path) -> None:
        paddle = require("paddle", "the Paddle Inference engine")
        nn = paddle.nn
        layers: list[Any] = []
        for weight in self._weights:
            outputs, inputs, kernel, _ = weight.shape
            convolution = nn.Conv2D(inputs, outputs, kernel, padding=kernel // 2)
            convolution.weight.set_value(weight)
            layers += [convolution, nn.ReLU()]
        network = nn.Sequential(*layers, nn.AdaptiveAvgPool2D(1))
        network.eval()
        spec = [paddle.static.InputSpec([self.batch, 3, _SIDE, _SIDE], "float32", name="image")]
        with quiet():
            paddle.jit.save(paddle.jit.to_static(network, input_spec=spec, full_graph=True), str(directory / "model"))

    def _write_int8_program(self, directory: Path) -> None:
        """The program that PaddleSlim would make of it."""
        paddle = require("paddle", "the Paddle Inference engine")
        from paddle.pir_utils import OldIrGuard

        static = paddle.static
        with OldIrGuard(), quiet(native_stderr=True):
            paddle.enable_static()
            try:
                program, scope = static.Program(), static.Scope()
                with static.scope_guard(scope), static.program_guard(program, static.Program()):
                    writer = _ProgramWriter(program.global_block(), scope, paddle.CPUPlace())
                    tensor = image = static.data("image", [self.batch, 3, _SIDE, _SIDE], "float32")
                    for number, weight in enumerate(self._weights):
                        tensor = writer.convolution(tensor, f"weight{number}", weight)
                        tensor = paddle.nn.functional.relu(tensor)
                    mean = paddle.nn.functional.adaptive_avg_pool2d(tensor, 1)
                    executor = static.Executor(paddle.CPUPlace())
                    static.save_inference_model(str(directory / "model"), [image], [mean], executor, program=program)
            finally:
                paddle.disable_static()


@dataclass(frozen=True)
class _ProgramWriter:
    """Appends to a block of the older program format what PaddleSlim writes there: see `quant/program.py`."""

    block: Any
    scope: Any
    place: Any

    def convolution(self, tensor: Any, name: str, weight: NDArray[np.float32]) -> Any:
        """A convolution of int8 weights, with a pair of operators before its input."""
        largest, reach = _largest(weight), np.full(1, _REACH, np.float32)
        integers = np.rint(weight / largest.reshape(-1, 1, 1, 1) * 127).astype(np.int8)
        kernel = self._convert("dequantize_linear", self._constant(name, integers), largest, 0)
        tensor = self._convert("quantize_linear", tensor, reach, -1)
        tensor = self._convert("dequantize_linear", tensor, reach, -1)
        attributes = {
            "strides": [1, 1],
            "paddings": [weight.shape[2] // 2] * 2,
            "dilations": [1, 1],
            "groups": 1,
            "quantization_type": "qat_with_weight",  # PaddleSlim's mark, without which it runs in float
        }
        shape = [tensor.shape[0], weight.shape[0], *tensor.shape[2:]]
        made = self.block.create_var(name=f"{name}.sum", shape=shape, dtype="float32")
        inputs = {"Input": tensor, "Filter": kernel}
        self.block.append_op(type="conv2d", inputs=inputs, outputs={"Output": made}, attrs=attributes)
        return made

    def _convert(self, kind: str, source: Any, reach: NDArray[np.float32], axis: int) -> Any:
        """An integer is round(value / reach * 127), along `axis` (-1: of the whole tensor)."""
        name = f"{source.name}.{kind}"
        made = self.block.create_var(name=name, shape=source.shape, dtype="float32")
        inputs = {
            "X": source,
            "Scale": self._constant(f"{name}.scale", reach),
            "ZeroPoint": self._constant(f"{name}.zero", np.zeros(reach.size, np.int32)),
        }
        attributes = {"bit_length": 8, "quant_axis": axis}
        self.block.append_op(type=kind, inputs=inputs, outputs={"Y": made}, attrs=attributes)
        return made

    def _constant(self, name: str, value: NDArray[Any]) -> Any:
        self.scope.var(name).get_tensor().set(value, self.place)
        return self.block.create_var(name=name, shape=value.shape, dtype=value.dtype.name, persistable=True)


def _largest(weight: NDArray[np.float32]) -> NDArray[np.float32]:
    """The largest absolute weight of each output channel."""
    found: NDArray[np.float32] = np.abs(weight).max((1, 2, 3))
    return found


# A GPU gets enough of them to hide the copy of the small image.
_STACKS: dict[Device, Stack] = {"cpu": Stack(depth=8, batch=1), "gpu": Stack(depth=32, batch=32)}


def measure_peak(engine: str, options: EngineOptions, seconds: float = 2.0) -> Peak:
    """Time a stack of convolutions in the engine, then a copy in memory, for about `seconds` each.

    No copy is timed in the memory of a GPU: see `gpu_bandwidth_gb_per_s`.

    The stack is a bundle that the engine opens like any other, so that it runs with the same options. Call this in a
    process of its own: the engine's library stays loaded, and Paddle is switched to static graphs for a moment.
    What fails is None in the result, for the reason given there. The MACs are those of direct convolution: an engine
    that needs fewer, by Winograd's algorithm, may exceed what its arithmetic units can do.
    """
    problems: list[str] = []

    def attempt(what: str, measure: Callable[[], float]) -> float | None:
        try:
            return measure()
        except GfldeployError as error:
            problems.append(f"{what}: {error.problem}")
        except Exception as error:  # noqa: BLE001 - whatever Paddle or onnx raise: a peak less is no reason to stop
            problems.append(" ".join(f"{what}: {type(error).__name__}: {error}".split()))
        return None

    gmac_per_s = attempt("convolutions", lambda: _gmac_per_s(engine, options, seconds))
    memory_gb_per_s = None
    if options.device == "cpu":
        memory_gb_per_s = attempt("memory", lambda: _copy_gb_per_s(_copy_bytes(), options.threads, seconds))
    elif (memory_gb_per_s := gpu_bandwidth_gb_per_s()) is None:
        problems.append("memory: the driver does not tell the bandwidth of the GPU's memory")
    return Peak(gmac_per_s, memory_gb_per_s, "; ".join(problems) or None)


def _gmac_per_s(engine: str, options: EngineOptions, seconds: float) -> float:
    """10^9 multiply-accumulates a second, by the median of the runs. Raises `GfldeployError`."""
    stack = _STACKS[options.device]
    inputs = {"image": stack.image()}
    with scratch_directory() as folder:
        bundle = stack.write(folder / "peak", graph_for(engine, options.precision, options.device), options.precision)
        with open_engine(engine, bundle, options, [(stack.batch, _SIDE, _SIDE)]) as opened:
            _check_precision(opened, inputs, stack.depth)
            for _ in range(_WARMUP):
                opened.infer(inputs)
            times = _times(lambda: opened.infer(inputs), seconds)
    return stack.macs / statistics.median(times) / 1e9


def _check_precision(engine: Engine, inputs: Tensors, depth: int) -> None:
    """Raise `EngineError` if the engine can tell what it ran, and fewer than `depth` convolutions ran as asked."""
    found = engine.executed_convolutions(inputs)
    ran = sum(one.precision == engine.options.precision for one in found)
    if found and ran < depth:
        raise EngineError(f"{ran} of {len(found)} ran in {engine.options.precision}: {'; '.join(reasons(found))}")


def _times(run: Callable[[], object], seconds: float) -> list[float]:
    """Of one call after the other, in seconds, until `seconds` have passed, and of at least five."""
    times: list[float] = []
    while len(times) < _FEWEST_RUNS or sum(times) < seconds:
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return times


def _copy_bytes() -> int:
    """The size of an array that is large beside the last-level cache and small beside the free memory."""
    caches = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    largest = max((_kibibytes(path) * 1024 for path in caches), default=0)
    most = int(psutil.virtual_memory().available * _MOST_OF_FREE_MEMORY)
    return min(max(_CACHES * largest, _SMALLEST_COPY_BYTES), most)


def _kibibytes(path: Path) -> int:
    """Of a cache: Linux writes "266240K"."""
    return int(path.read_text(encoding="utf-8").strip().removesuffix("K"))


def _copy_gb_per_s(size: int, threads: int, seconds: float) -> float:
    """10^9 bytes a second, read and written, of the fastest copy of `size` bytes; numpy copies without the GIL.

    Counted as STREAM does (McCalpin 1995): what a cache reads before it overwrites it is not counted.
    """
    count = size // threads // np.dtype(np.float64).itemsize
    # Not zeros: pages that were never written are one and the same, and stay in the cache.
    parts = [(np.ones(count), np.ones(count)) for _ in range(threads)]
    with ThreadPoolExecutor(threads) as pool:
        best = min(_times(lambda: list(pool.map(lambda part: np.copyto(part[1], part[0]), parts)), seconds))
    return sum(source.nbytes + target.nbytes for source, target in parts) / best / 1e9
