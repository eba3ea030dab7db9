"""Calibration by PaddleSlim: input thresholds of convolutions, from its post-training quantisation.

It needs Paddle's old program format, switched on by a process-wide flag, prints to both streams, and keeps every
activation it samples: all of that ends with the process of its own that it runs in.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gfldeploy.bundle import Bundle
from gfldeploy.child_process import NO_LIMITS, PARENT, run_child, serve
from gfldeploy.errors import EngineError
from gfldeploy.quant.method import MethodOptions, Thresholds
from gfldeploy.quant.program import old_program_environment

# PaddleSlim's names for its algorithms that run here: the default, then the quick ones first.
ALGORITHMS = ("hist", "avg", "abs_max", "ptf", "mse", "emd", "KL")
# What `auto` tries.
AUTO = ("hist", "avg", "abs_max", "mse")
# Those that do not run here: why, and what to use instead.
UNUSABLE = {
    "min_max": (
        "PaddleSlim only records minima and maxima with it and leaves the program in FP32",
        "Use abs_max, which takes the same extremes for thresholds.",
    )
}
# These run over the images twice: for the range of each histogram, then to fill it.
_TWO_PASSES = ("hist", "KL")

# Only convolutions: the DFL integral and the box decode must stay in float.
_QUANTIZED_OPS = ["conv2d", "depthwise_conv2d"]
# The share of an activation's values that `hist` keeps below its threshold.
_HIST_PERCENT = 0.9999
# Activations are megabytes, made and dropped by the thousand: keep their pages instead of asking the kernel anew.
_KEEP_PAGES = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}
# How Paddle says that an operator failed: oneDNN does not run every program, a vision transformer's for one.
_NO_KERNEL = re.compile(r"\[operator < \w+ > error\]")


def calibrate(source: Bundle, images: Sequence[Path], algorithm: str, options: MethodOptions) -> Thresholds:
    """The thresholds that one of PaddleSlim's `ALGORITHMS` finds; see `method.Calibrate`.

    Raises `EngineError` with the last line of PaddleSlim's traceback if it fails.
    """
    request = {"bundle": str(source.directory), "images": [str(path) for path in images], "algorithm": algorithm}

    def run(onednn: bool) -> Thresholds:
        environment = {**old_program_environment(options.threads), **_KEEP_PAGES, "FLAGS_use_mkldnn": str(int(onednn))}
        thresholds: Thresholds = run_child(
            "gfldeploy.quant.ptq",
            request,
            limits=NO_LIMITS,
            environment=environment,
            subject="PaddleSlim",
            remedy="Try another --algo or fewer --samples.",
            progress=options.progress,
        )["thresholds"]
        return thresholds

    # oneDNN runs the network faster, and moves no threshold by more than FP32 rounding.
    try:
        return run(onednn=True)
    except EngineError as error:
        if not _NO_KERNEL.search(error.problem):
            raise
        return run(onednn=False)


def _calibrate(request: dict[str, Any]) -> dict[str, Any]:
    """The child: the thresholds by weight name."""
    import paddle

    from gfldeploy.images.decode import read_image

    preprocess = Bundle.open(request["bundle"]).manifest.preprocess
    images = [Path(name) for name in request["images"]]
    passes = 2 if request["algorithm"] in _TWO_PASSES else 1
    seen = 0

    def batches() -> Iterator[dict[str, Any]]:
        nonlocal seen
        for path in images:
            seen += 1
            total = passes * len(images)
            PARENT.step(f"PaddleSlim {request['algorithm']}", min(seen, total), total)
            yield {"image": preprocess.batch([preprocess(read_image(path))])}

    program = _quantization(Path(request["bundle"]), batches, len(images), request["algorithm"]).quantize()
    return {"thresholds": _read_thresholds(program, paddle.static.global_scope())}


def _quantization(bundle: Path, batches: Callable[[], Iterator[Any]], count: int, algorithm: str) -> Any:
    """PaddleSlim's quantisation of the bundle's program, not run yet."""
    import paddle

    paddle.enable_static()
    return _convolutions_only()(
        executor=paddle.static.Executor(paddle.CPUPlace()),
        model_dir=str(bundle / "paddle"),
        model_filename="model.pdmodel",
        params_filename="model.pdiparams",
        data_loader=batches,
        batch_nums=count,
        algo=algorithm,
        quantizable_op_type=_QUANTIZED_OPS,
        is_full_quantize=False,
        onnx_format=True,
        # As in PaddleSlim's `quant_post_static`; Paddle's own default cuts off less.
        hist_percent=_HIST_PERCENT,
        weight_quantize_type="channel_wise_abs_max",
        activation_quantize_type="range_abs_max",
    )


def _convolutions_only() -> Any:
    """`PostTrainingQuantization` that samples what convolutions read and nothing else.

    Paddle's own samples the output of nearly every operator as well, for an attribute and pairs of quantise and
    dequantise that no engine here uses: five times the tensors, in memory and in every pass over the images.
    """
    from paddle.static.quantization import PostTrainingQuantization

    class ConvolutionsOnly(PostTrainingQuantization):  # type: ignore[misc]
        def _collect_target_varnames(self) -> None:
            super()._collect_target_varnames()
            self._quantized_act_var_name = {
                op.input("Input")[0] for op in self._program.global_block().ops if op.type in _QUANTIZED_OPS
            }

        def _save_output_threshold(self) -> None:
            """Nothing to save: outputs have not been sampled."""

    return ConvolutionsOnly


def _read_thresholds(program: Any, scope: Any) -> dict[str, list[float]]:
    """The thresholds of every convolution that the program has quantised."""
    operators = program.global_block().ops
    scales = {op.output("Y")[0]: op.input("Scale")[0] for op in operators if op.type == "dequantize_linear"}
    found: dict[str, list[float]] = {}
    for op in operators:
        if op.type not in _QUANTIZED_OPS:
            continue
        source, weight = op.input("Input")[0], op.input("Filter")[0]
        if source in scales and weight in scales:
            name = weight.removesuffix(".quantized.dequantized")
            found.setdefault(name, []).append(float(np.array(scope.find_var(scales[source]).get_tensor()).flat[0]))
    return found


if __name__ == "__main__":
    serve(_calibrate)
