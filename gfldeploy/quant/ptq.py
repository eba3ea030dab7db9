"""Static post-training quantisation, PaddleSlim's `quant_post_static` for convolutions, in a process of its own.

It needs Paddle's old program format, switched on by a process-wide flag, prints to both streams, and keeps every
activation it samples: all of that ends with the process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from gfldeploy.bundle import Bundle
from gfldeploy.child_process import NO_LIMITS, report_progress, run_child, serve
from gfldeploy.errors import UnsupportedError
from gfldeploy.files import native_writes
from gfldeploy.quant.program import old_program_environment

__all__ = ["ALGORITHMS", "AUTO", "UNUSABLE", "PtqResult", "algorithms_of", "run_ptq"]

# PaddleSlim's names for its algorithms that run here, the quick ones first.
ALGORITHMS = ("hist", "avg", "abs_max", "ptf", "mse", "emd", "KL")
# What `auto` tries.
AUTO = ("hist", "avg", "abs_max", "mse")
# Those that do not run here: why, and what to use instead.
UNUSABLE = {
    "min_max": (
        "PaddleSlim only records minima and maxima with it and leaves the program in FP32",
        "Use abs_max, which takes the same extremes for thresholds.",
    ),
}
# These run over the images twice: for the range of each histogram, then to fill it.
_TWO_PASSES = ("hist", "KL")

# Only convolutions: the DFL integral and the box decode must stay in float.
_QUANTIZED_OPS = ["conv2d", "depthwise_conv2d"]
# The share of an activation's values that `hist` keeps below its threshold.
_HIST_PERCENT = 0.9999
# Activations are megabytes, made and dropped by the thousand: keep their pages instead of asking the kernel anew.
_KEEP_PAGES = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}

# Input thresholds by weight name, one for each use, and the largest absolute weight of each output channel.
PtqResult = dict[str, tuple[tuple[float, ...], tuple[float, ...]]]


def algorithms_of(name: str) -> tuple[str, ...]:
    """The algorithms that `name` stands for: itself, or all of `AUTO`. Raises `UnsupportedError`."""
    if name == "auto":
        return AUTO
    if unusable := UNUSABLE.get(name):
        reason, remedy = unusable
        raise UnsupportedError(f"{name} does not quantise on this stack: {reason}", remedy)
    if name not in ALGORITHMS:
        raise UnsupportedError(
            f"PaddleSlim has no algorithm {name!r} to quantise with", f"Choose from: auto, {', '.join(ALGORITHMS)}."
        )
    return (name,)


def run_ptq(
    bundle: Bundle,
    images: list[Path],
    algorithm: str,
    output: Path,
    threads: int = 1,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> PtqResult:
    """Quantise the bundle's program into `output` (`model.pdmodel`, `model.pdiparams`); returns what it measured.

    Raises `EngineError` with the last line of PaddleSlim's traceback if it fails, and what it raised if that was ours.
    """
    request = {
        "bundle": str(bundle.directory),
        "images": [str(path) for path in images],
        "algorithm": algorithm,
        "output": str(output),
    }
    with native_writes(output):
        answer = run_child(
            "gfldeploy.quant.ptq",
            request,
            limits=NO_LIMITS,
            # oneDNN runs the network faster, and moves no threshold by more than FP32 rounding.
            environment={**old_program_environment(threads), **_KEEP_PAGES, "FLAGS_use_mkldnn": "1"},
            subject="PaddleSlim",
            remedy="Try another --algo or fewer --samples.",
            progress=progress,
        )
    return {name: (tuple(inputs), tuple(weights)) for name, (inputs, weights) in answer.items()}


def _quantize(request: dict[str, Any]) -> dict[str, tuple[list[float], list[float]]]:
    """The child: write the quantised program and return the ranges."""
    import paddle

    from gfldeploy.export.static_graph import strip_call_stacks
    from gfldeploy.images.decode import read_image

    preprocess = Bundle.open(Path(request["bundle"])).manifest.preprocess
    images = [Path(name) for name in request["images"]]
    passes = 2 if request["algorithm"] in _TWO_PASSES else 1
    seen = 0

    def batches() -> Iterator[dict[str, Any]]:
        nonlocal seen
        for path in images:
            seen += 1
            report_progress(min(seen, passes * len(images)), passes * len(images))
            yield {"image": preprocess.batch([preprocess(read_image(path))])}

    paddle.enable_static()
    executor = paddle.static.Executor(paddle.CPUPlace())
    names = {"model_filename": "model.pdmodel", "params_filename": "model.pdiparams"}
    quantization = _convolutions_only()(
        executor=executor,
        model_dir=str(Path(request["bundle"]) / "paddle"),
        **names,
        data_loader=batches,
        batch_nums=len(images),
        algo=request["algorithm"],
        quantizable_op_type=_QUANTIZED_OPS,
        is_full_quantize=False,
        onnx_format=True,
        # As in PaddleSlim's `quant_post_static`; Paddle's own default cuts off less.
        hist_percent=_HIST_PERCENT,
        weight_quantize_type="channel_wise_abs_max",
        activation_quantize_type="range_abs_max",
    )
    quantization.quantize()
    quantization.save_quantized_model(request["output"], model_filename=names["model_filename"])
    program, _, _ = paddle.static.load_inference_model(request["output"], executor, **names)
    ranges = _read_ranges(program, paddle.static.global_scope())
    strip_call_stacks(Path(request["output"]) / names["model_filename"])
    return ranges


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


def _read_ranges(program: Any, scope: Any) -> dict[str, tuple[list[float], list[float]]]:
    """Input thresholds and weight maxima of every convolution, from the program's quantize_linear operators."""

    def value(name: str) -> np.ndarray[Any, Any]:
        return np.array(scope.find_var(name).get_tensor()).reshape(-1)

    operators = program.global_block().ops
    scales = {op.output("Y")[0]: op.input("Scale")[0] for op in operators if op.type == "dequantize_linear"}
    ranges: dict[str, tuple[list[float], list[float]]] = {}
    for op in operators:
        if op.type not in _QUANTIZED_OPS:
            continue
        source, weight = op.input("Input")[0], op.input("Filter")[0]
        if source not in scales or weight not in scales:
            continue
        name = weight.removesuffix(".quantized.dequantized")
        inputs, _ = ranges.setdefault(name, ([], value(scales[weight]).astype(float).tolist()))
        inputs.append(float(value(scales[source])[0]))
    return ranges


if __name__ == "__main__":
    serve(_quantize)
