"""Paddle Inference, on the CPU through oneDNN or on an NVIDIA GPU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gfldeploy._quiet import quiet
from gfldeploy.bundle import Bundle, GraphName
from gfldeploy.engines.base import (
    NOT_ASKED,
    CopyTimes,
    Engine,
    EngineOptions,
    ExecutedConvolution,
    OneForEachThread,
    Precision,
    Tensors,
)
from gfldeploy.engines.dependencies import require
from gfldeploy.engines.hardware import set_tf32
from gfldeploy.engines.onednn import LoggedPrimitive, read_convolutions, read_primitives, verbose_log
from gfldeploy.engines.paddle_program import decode_outputs, explain, float_operators, program_convolutions
from gfldeploy.engines.paddle_rewrite import rewrite_for_onednn
from gfldeploy.engines.tensorrt import MIN_SUBGRAPH, WORKSPACE_BYTES, TensorRtOptions, example, tensorrt_library
from gfldeploy.errors import EngineError, summary
from gfldeploy.files import native_writes, scratch_directory

# Only convolutions leave FP32. Left to itself Paddle also lowers the DFL integral and the box arithmetic: in INT8 the
# detections are garbage, in BF16 a coordinate of 1000 px is off by up to 4 px (8 bits of mantissa).
_LOW_PRECISION_OPS = {"conv2d", "depthwise_conv2d", "fused_conv2d"}
_GPU_POOL_MB = 256
_TENSORRT_MODES = {"fp32": "Float32", "fp16": "Half", "int8": "Int8"}
_SHAPES = "shapes.pbtxt"  # those of the tensors inside the graph
# Merges a reshape into what comes before it, even where something else reads that too: then the graph does not load.
_BROKEN_PASS = "operator_reshape_onednn_fuse_pass"
# Has convolutions in INT8 take in additions whose result would be wrong, or that keep the convolution from INT8:
# `paddle_rewrite` does that.
_HEEDLESS_PASS = "conv_elementwise_add_onednn_fuse_pass"
# Fuses ReLUs with the additions before them, once Paddle has seen from the ReLUs what has no sign.
_LAST_PASS = "elementwise_act_onednn_fuse_pass"


class PaddleEngine(Engine):
    """`Engine` over `paddle.inference`.

    FP32 and BF16 run the bundle's PIR graph, INT8 its older program: Paddle 3.2 quantises only the latter on CPUs.
    """

    name = "paddle"
    title = "Paddle Inference"
    onednn = True
    _detail = staticmethod(summary)

    def __init__(self, bundle: Bundle, options: EngineOptions, graph: GraphName) -> None:
        """Load the graph. Raises `MissingDependencyError`, `BundleError` or `EngineError`."""
        super().__init__(bundle, options, graph)  # before the import, which takes seconds
        if options.device == "gpu":
            set_tf32(options.tf32)  # NVIDIA's libraries obey; Paddle's Config has no such option
        self._paddle = require("paddle", "the Paddle Inference engine")
        from paddle import inference

        self.version: str = self._paddle.__version__
        with scratch_directory() as scratch:
            config = self._configure(inference, bundle, pir=graph == "paddle")
            with self._explained(f"cannot load {self._model}"):
                if options.device == "cpu" and self.onednn and graph == "paddle_program":
                    height, width = bundle.manifest.preprocess.target_size
                    config.set_model(str(self._for_onednn(scratch, height * width)), str(self._params))
                # Paddle's INT8 passes report to stderr whatever the log level; what goes wrong comes as an exception.
                with quiet(native_stderr=True):
                    predictor = inference.create_predictor(config)
                    given = len(predictor.get_output_names())
                    if given != len(self._outputs):
                        raise ValueError(f"it has {given} outputs and not {len(self._outputs)}")
                    # Each is for one thread at a time; they share the weights.
                    predictors = [*(predictor.clone() for _ in range(options.streams - 1)), predictor]
        self._predictors = OneForEachThread[Any](predictors.pop, options.streams)

    def _for_onednn(self, directory: Path, pixels: int) -> Path:
        """The program in the form that oneDNN runs fastest on images of so many pixels, as a file in `directory`."""
        from paddle.base.proto import framework_pb2

        description = framework_pb2.ProgramDesc.FromString(self._model.read_bytes())
        rewrite_for_onednn(description, pixels)
        with native_writes(directory):
            (directory / self._model.name).write_bytes(description.SerializeToString())
        return directory / self._model.name

    def _configure(self, inference: Any, bundle: Bundle, pir: bool) -> Any:
        """The predictor's settings; `pir`: whether the graph is in the newer format."""
        options = self.options
        config = inference.Config(str(self._model), str(self._params))
        config.disable_glog_info()
        config.switch_ir_optim(True)
        config.enable_new_ir(pir)
        config.enable_new_executor(pir)
        config.enable_memory_optim()
        if options.device == "gpu":
            if options.precision == "fp16" and pir:
                config.enable_use_gpu(_GPU_POOL_MB, 0, inference.PrecisionType.Half)
                config.exp_disable_mixed_precision_ops(set(float_operators(self._model)))
            else:  # what TensorRT does not run is FP32 in any case
                config.enable_use_gpu(_GPU_POOL_MB, 0, inference.PrecisionType.Float32)
        else:
            config.disable_gpu()
            config.set_cpu_math_library_num_threads(options.threads)
            if self.onednn:
                config.enable_mkldnn()
                config.delete_pass(_BROKEN_PASS)
            else:
                config.disable_mkldnn()
            if options.precision == "bf16":
                config.enable_mkldnn_bfloat16()
                config.set_bfloat16_op(_LOW_PRECISION_OPS)
            elif options.precision == "int8":
                config.enable_mkldnn_int8(_LOW_PRECISION_OPS)
                config.delete_pass(_HEEDLESS_PASS)
                config.pass_builder().append_pass(_LAST_PASS)
        return config

    def close(self) -> None:
        self._predictors = OneForEachThread[Any](_none_left, 1)

    def infer_timed(self, inputs: Tensors) -> tuple[dict[str, NDArray[Any]], CopyTimes]:
        with self._explained(), self._predictors.one() as predictor:
            start = time.perf_counter()
            for name in predictor.get_input_names():
                array = np.ascontiguousarray(inputs[name], dtype=np.float32)
                handle = predictor.get_input_handle(name)
                handle.reshape(array.shape)
                handle.copy_from_cpu(array)
            copied = time.perf_counter()
            predictor.run()
            if self.options.device == "gpu":  # whose work `run` only starts: copying the outputs would wait for it
                self._paddle.device.synchronize()
            ran = time.perf_counter()
            arrays = [predictor.get_output_handle(name).copy_to_cpu() for name in predictor.get_output_names()]
            times = CopyTimes.between(start, copied, ran, time.perf_counter())
        return dict(zip(self._outputs, arrays, strict=True)), times

    def executed_convolutions(self, inputs: Tensors) -> tuple[ExecutedConvolution, ...]:
        """From oneDNN's own log of one inference; none without oneDNN."""
        if self.options.device == "gpu" or not self.onednn:
            return ()
        self.infer(inputs)
        ran = read_convolutions(self._logged(lambda: self.infer(inputs)))
        asked = self.options.precision
        if asked == "int8":
            return explain(ran, program_convolutions(self._model))
        why = NOT_ASKED if asked == "fp32" else f"Paddle left it in f32 when asked for {asked}"
        return tuple(
            ExecutedConvolution(
                one.precision, f"{one.shape} {one.implementation}", why if one.precision == "fp32" else None
            )
            for one in ran
        )

    def convolution_share(self, inputs: Tensors) -> float | None:
        """From the times in oneDNN's own log; None without oneDNN."""
        if self.options.device == "gpu" or not self.onednn:
            return None
        self.infer(inputs)
        shares = []
        for _ in range(self._share_runs):
            primitives, took = self.profile(inputs)
            shares.append(sum(one.ms for one in primitives if one.kind == "convolution") / took)
        return statistics.median(shares)

    def profile(self, inputs: Tensors) -> tuple[tuple[LoggedPrimitive, ...], float]:
        """What oneDNN executed in one inference, with the times of its own log, and how long the inference took, ms."""
        times: list[float] = []
        log = self._logged(lambda: times.append(self.infer_timed(inputs)[1].inference_ms))
        return read_primitives(log), times[-1]

    def _logged(self, run: Callable[[], object]) -> str:
        libraries = list((Path(self._paddle.__file__ or "").parent / "libs").glob("libdnnl*"))
        with scratch_directory() as directory:
            return verbose_log(libraries, run, directory / "onednn.log")


class PlainPaddleEngine(PaddleEngine):
    """Paddle Inference on the CPU with its own kernels: what it does unless oneDNN is asked for."""

    name = "paddle-plain"
    onednn = False


class PaddleTensorRtEngine(PaddleEngine):
    """Paddle Inference with TensorRT for the parts of the program that it takes, CUDA for the rest.

    It runs the older program format, whose passes know TensorRT and explicit quantisation. Paddle does not say which
    parts run in TensorRT.
    """

    name = "paddle-tensorrt"

    def __init__(self, bundle: Bundle, options: EngineOptions, graph: GraphName) -> None:
        """Load the program and build it.

        Raises `MissingDependencyError`, `BundleError`, `OutputError` or `EngineError`.
        """
        start = time.perf_counter()
        super().__init__(bundle, options, graph)
        self.infer(example(TensorRtOptions.of(options).most_common))
        self.build_s = time.perf_counter() - start
        self.version = f"{self.version}, TensorRT {tensorrt_library()}"
        if options.precision != "fp32":
            self.delegated = "in TensorRT what Paddle gives it of the network, in CUDA the decode"

    def _configure(self, inference: Any, bundle: Bundle, pir: bool) -> Any:
        tensorrt = TensorRtOptions.of(self.options)
        self.directory = directory = tensorrt.directory(self, bundle)
        if not (directory / _SHAPES).exists():
            self._collect_shapes(inference, super()._configure(inference, bundle, pir), directory)
        config = super()._configure(inference, bundle, pir)
        decode = () if self.options.precision == "fp32" else decode_outputs(self._model)
        use_tensorrt(config, inference.PrecisionType, self.options.precision, tensorrt, directory, decode)
        return config

    def _collect_shapes(self, inference: Any, config: Any, directory: Path) -> None:
        """Run the smallest, most common and largest input once without TensorRT, and keep what shapes tensors had."""
        collected = directory / "collecting"
        config.collect_shape_range_info(str(collected))
        try:
            with quiet(native_stderr=True):
                predictors = [inference.create_predictor(config)]
            self._predictors = OneForEachThread[Any](predictors.pop, 1)
            shapes = TensorRtOptions.of(self.options)
            for shape in (shapes.smallest, shapes.most_common, shapes.largest):
                self.infer(example(shape))
            del self._predictors  # Paddle writes the file when the predictor goes
            collected.rename(directory / _SHAPES)
        except OSError as error:
            raise EngineError(f"Paddle did not collect the shapes that TensorRT needs: {error}", None) from error


def _none_left() -> Any:
    raise EngineError("the engine is closed", None)


def use_tensorrt(
    config: Any,
    modes: Any,
    precision: Precision,
    options: TensorRtOptions,
    directory: Path,
    decode: Sequence[str] = (),
) -> None:
    """Have a `paddle.inference.Config` build with TensorRT; `modes`: `paddle.inference.PrecisionType`.

    `directory` keeps the serialised engine, and the shapes of the tensors inside the graph, which a run without
    TensorRT collects before the first build. INT8 is by the program's quantize_linear operators, without calibration.
    `decode`: the tensors that operators give which TensorRT must not have: in FP16, and in INT8 as well, Paddle lets it
    choose FP16 for whatever it has, and coordinates need FP32. They run in Paddle's own FP32 kernels.
    """
    config.set_optim_cache_dir(str(directory))
    config.enable_tensorrt_engine(
        workspace_size=WORKSPACE_BYTES,
        max_batch_size=options.largest[0],
        min_subgraph_size=MIN_SUBGRAPH,
        precision_mode=getattr(modes, _TENSORRT_MODES[precision]),
        use_static=True,
        use_calib_mode=False,
    )
    shapes = str(directory / _SHAPES)
    config.enable_tuned_tensorrt_dynamic_shape(shape_range_info_path=shapes, allow_build_at_runtime=True)
    if precision == "int8":
        config.enable_tensorrt_explicit_quantization()
    if decode:
        config.exp_disable_tensorrt_ops(list(decode))
