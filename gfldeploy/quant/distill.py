"""Quantisation-aware fine-tuning: the weights learn to give, rounded to INT8, what the FP32 model gives.

PaddleSlim inserts the rounding (`quant_aware`), with the thresholds that calibration found; the loop and the loss are
ours, since no PaddleSlim loss knows a GFL's outputs. No labels: the FP32 model is the teacher. The result is an FP32
bundle with other weights, which is then calibrated like any other.
"""

from __future__ import annotations

import math
import shutil
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gfldeploy.bundle import LAYERS, Bundle, Graph, GraphName, write_bundle
from gfldeploy.child_process import NO_LIMITS, PARENT, run_child, serve
from gfldeploy.errors import EngineError
from gfldeploy.quant.calibration import Calibration
from gfldeploy.quant.method import MethodOptions, Refined
from gfldeploy.quant.program import old_program_environment, write_parameters

# Weights of 8-bit rounding's size are to move by fractions of a step: at 2e-5 the demo detector gets no better.
_LEARNING_RATE = 5e-6
_BATCH = 2
_WARM_UP = 0.05  # of the steps
_REMEDY = "Use --method ptq, or fewer --distill-steps."
_GRAPHS: tuple[GraphName, ...] = ("paddle_program", "onnx")
_CONVOLUTIONS = ("conv2d", "depthwise_conv2d")
# Operators whose gradient needs an output that inference programs have dropped.
_RESHAPING = ("flatten2", "flatten_contiguous_range", "reshape2", "squeeze2", "transpose2", "unsqueeze2")
_RESHAPED = ("Out", "XShape")
# What lies between the logits of all cells and the scores and distances of the candidates.
_REARRANGING = ("reshape2", "take_along_axis", "transpose2")
_KEEPS_SIGN = ("pool2d", "nearest_interp_v2", "reshape2", "transpose2")
# 127 steps reach the threshold. Where values cannot be negative the engines have twice as many integers above zero.
_SIGNED_BITS, _UNSIGNED_BITS = 8, 9


def refine(source: Bundle, images: Sequence[Path], start: Calibration, output: Path, options: MethodOptions) -> Refined:
    """Fine-tune the convolutions of `source` on `images`, rounded by the thresholds of `start`; see `method.Refine`.

    The new bundle has the graphs that quantisation needs and no others. Its record has the mean loss (see `_Student`)
    of the first and of the last tenth of the steps. Raises `EngineError` if Paddle fails or the loss is not finite,
    `OutputError`.
    """
    work = output.with_name(f"{output.name}.work")
    work.mkdir()
    request = {
        "bundle": str(source.directory),
        "images": [str(path) for path in images],
        "thresholds": {name: entry.inputs for name, entry in start.convolutions.items()},
        "steps": options.steps,
        "output": str(work),
    }
    losses = run_child(
        "gfldeploy.quant.distill",
        request,
        limits=NO_LIMITS,
        environment=old_program_environment(options.threads),
        subject="the distillation",
        remedy=_REMEDY,
        progress=options.progress,
    )["losses"]
    with np.load(work / "parameters.npz") as file:
        parameters = dict(file)
    tenth = max(1, len(losses) // 10)
    with write_bundle(output) as (directory, manifests):
        (directory / "paddle").mkdir()
        (directory / "onnx").mkdir()
        write_parameters(source, parameters, directory / "paddle")
        _write_onnx(source.graph("onnx")[0], parameters, directory / "onnx/model.onnx")
        shutil.copyfile(source.directory / LAYERS, directory / LAYERS)
        graphs: dict[GraphName, Graph] = {name: source.manifest.graphs[name] for name in _GRAPHS}
        manifests.append(replace(source.manifest, graphs=graphs, files={}))
    shutil.rmtree(work)
    before, after = (float(np.mean(part)) for part in (losses[:tenth], losses[-tenth:]))
    record = {"steps": options.steps, "loss_before": before, "loss_after": after}
    return Refined(Bundle.open(output), "distilled", {"distillation": record})


def _write_onnx(source: Path, parameters: Mapping[str, NDArray[np.float32]], target: Path) -> None:
    """The ONNX file with the new weights, which have their names there too."""
    import onnx
    from onnx import numpy_helper

    model = onnx.load(str(source))
    named = {tensor.name: tensor for tensor in model.graph.initializer}
    if unknown := sorted(set(parameters) - set(named)):
        raise EngineError(f"{source} has no weight {unknown[0]}, the Paddle program does", "Export the bundle again.")
    for name, value in parameters.items():
        named[name].CopyFrom(numpy_helper.from_array(value, name))
    onnx.save(model, str(target))


def _distill(request: dict[str, Any]) -> dict[str, list[float]]:
    """The child: train, write `parameters.npz` and return the loss of each step."""
    import paddle

    bundle = Bundle.open(request["bundle"])
    steps = request["steps"]
    paddle.enable_static()
    executor = paddle.static.Executor(paddle.CPUPlace())
    # Each in a scope of its own: programs that share one share their weights.
    teacher_scope = paddle.static.Scope()
    with paddle.static.scope_guard(teacher_scope):
        teacher = _load(bundle, executor)
        outputs = _every_cell(teacher.global_block(), bundle)
    student = _Student(_load(bundle, executor), bundle, request["thresholds"], executor, steps)
    losses = []
    for batch in _batches(bundle, [Path(name) for name in request["images"]], steps):
        targets = executor.run(teacher, {"image": batch}, fetch_list=list(outputs), scope=teacher_scope)
        losses.append(student.step(batch, *targets))
        if not np.isfinite(losses[-1]):
            raise EngineError(f"the loss is not finite after {len(losses)} steps", _REMEDY)
        PARENT.step("distilling", len(losses), steps)
    np.savez(Path(request["output"]) / "parameters.npz", allow_pickle=False, **student.weights())
    return {"losses": losses}


def _load(bundle: Bundle, executor: Any) -> Any:
    """The FP32 program without its feed and fetch operators, its parameters in the current scope."""
    import paddle

    model, params = bundle.graph("paddle_program")
    assert params is not None
    program, _, _ = paddle.static.load_inference_model(
        str(model.parent), executor, model_filename=model.name, params_filename=params.name
    )
    block = program.global_block()
    for index in reversed(range(len(block.ops))):
        if block.ops[index].type in ("feed", "fetch"):
            block._remove_op(index)
    return program


def _batches(bundle: Bundle, images: Sequence[Path], count: int) -> Iterator[NDArray[np.float32]]:
    """`count` batches [N, 3, H, W] of images that need no padding to go together, half of them mirrored. Seeded."""
    from gfldeploy.images.decode import read_image

    preprocess = bundle.manifest.preprocess
    by_shape: dict[tuple[int, ...], list[int]] = defaultdict(list)
    prepared = [preprocess(read_image(path)) for path in images]
    for index, one in enumerate(prepared):
        by_shape[one.tensor.shape].append(index)
    random = np.random.default_rng(0)
    for _ in range(count):
        pool = by_shape[prepared[random.integers(len(prepared))].tensor.shape]
        chosen = random.choice(pool, min(_BATCH, len(pool)), replace=False)
        batch = preprocess.batch([prepared[index] for index in chosen])
        yield np.ascontiguousarray(batch[..., ::-1]) if random.integers(2) else batch


class _Student:
    """The model with simulated INT8 convolutions, learning.

    Its loss compares candidates [N, A] of the student with the teacher's: the binary cross-entropy of the class scores,
    and the divergence of the four side distributions weighted by the teacher's best score, each summed and divided by
    the sum of those scores. (Li et al., Generalized Focal Loss, 2020, normalise so; Zheng et al., Localization
    Distillation for Dense Object Detection, 2022, distil side distributions.) What the teacher itself would have is
    subtracted, so that 0 is perfect.
    """

    def __init__(
        self, program: Any, bundle: Bundle, thresholds: Mapping[str, Sequence[float]], executor: Any, steps: int
    ) -> None:
        import paddle
        from paddleslim.quant import quant_aware

        self._executor = executor
        self._steps = steps
        self._done = 0
        self._scope = paddle.static.global_scope()
        self._place = paddle.CPUPlace()
        block = program.global_block()
        convolutions = [op for op in block.ops if op.type in _CONVOLUTIONS and op.input("Filter")[0] in thresholds]
        self._trained = list(dict.fromkeys(op.input("Filter")[0] for op in convolutions))
        outputs = _every_cell(block, bundle)
        makers = {output: op for op in block.ops for output in op.output_arg_names}
        unsigned = {name for op in convolutions if _non_negative(name := op.input("Input")[0], makers)}
        startup = paddle.static.Program()
        with paddle.static.program_guard(program, startup):
            _complete(block)
            for name in self._trained:
                variable = block.var(name)
                block.vars[name] = paddle.base.framework.Parameter(
                    block, list(variable.shape), variable.dtype, name=name, trainable=True
                )
            self._loss = _add_loss(block, *outputs)
            paddle.optimizer.Adam(_LEARNING_RATE).minimize(self._loss, startup, self._trained)
            self._rate = next(op for op in block.ops if op.type == "adam").input("LearningRate")[0]
        executor.run(startup)
        self._program = quant_aware(
            program,
            self._place,
            {
                "weight_quantize_type": "channel_wise_abs_max",
                "activation_quantize_type": "moving_average_abs_max",
                "quantize_op_types": list(_CONVOLUTIONS),
                "onnx_format": True,
                "scale_trainable": False,
            },
            return_program=True,
        )
        self._drop_observers()
        uses: dict[str, int] = defaultdict(int)
        for op in convolutions:
            weight, source = op.input("Filter")[0], op.input("Input")[0]
            threshold = thresholds[weight][uses[weight]]
            uses[weight] += 1
            self._set(f"{source}@scale", _reach(threshold, source in unsigned))
        for op in self._program.global_block().ops:
            if op.type in ("quantize_linear", "dequantize_linear"):
                wide = op.input("Scale")[0].removesuffix("@scale") in unsigned
                op._set_attr("bit_length", _UNSIGNED_BITS if wide else _SIGNED_BITS)
        self._follow_weights()

    def step(self, batch: NDArray[np.float32], logits: NDArray[np.float32], sides: NDArray[np.float32]) -> float:
        """Learn from one batch and the teacher's outputs for it; returns the loss before that."""
        scores, best, score_entropy = _binary(logits)
        distributions, side_entropy = _distributions(sides)
        total = float(best.sum()) or 1.0
        weight = np.repeat((best / (4 * total))[..., None, None], 4, axis=2)
        self._set(self._rate, self._learning_rate())
        feed = {
            "image": batch,
            "distill_scores": scores.astype(np.float32),
            "distill_score_weight": np.full(scores.shape, 1 / total, np.float32),
            "distill_sides": distributions.astype(np.float32),
            "distill_side_weight": weight.astype(np.float32),
        }
        (loss,) = self._executor.run(self._program, feed, fetch_list=[self._loss.name])
        self._follow_weights()
        self._done += 1
        return float(loss) - score_entropy / total - float((side_entropy * weight[..., 0]).sum())

    def weights(self) -> dict[str, NDArray[np.float32]]:
        """The trained weights by name."""
        return {name: self._get(name) for name in self._trained}

    def _learning_rate(self) -> float:
        """Rising over the first steps, then falling along half a cosine."""
        warm = max(1, round(_WARM_UP * self._steps))
        if self._done < warm:
            return _LEARNING_RATE * (self._done + 1) / warm
        return _LEARNING_RATE * (1 + math.cos(math.pi * (self._done - warm) / max(1, self._steps - warm))) / 2

    def _follow_weights(self) -> None:
        """The scales of the weights' output channels are those of the weights as they are now."""
        for name in self._trained:
            weight = self._get(name)
            self._set(f"{name}@scale", np.abs(weight).reshape(len(weight), -1).max(axis=1))

    def _drop_observers(self) -> None:
        """Remove what PaddleSlim adds to watch every output's range: nothing reads it here, and it takes time."""
        block = self._program.global_block()
        for index in reversed(range(len(block.ops))):
            if block.ops[index].type == "moving_average_abs_max_scale":
                block._remove_op(index)

    def _get(self, name: str) -> NDArray[np.float32]:
        return np.array(self._scope.find_var(name).get_tensor())

    def _set(self, name: str, value: Any) -> None:
        tensor = self._scope.find_var(name).get_tensor()
        tensor.set(np.broadcast_to(np.float32(value), np.array(tensor).shape).copy(), self._place)


def _reach(threshold: float, non_negative: bool) -> float:
    """The scale that gives 127 steps below `threshold`: Paddle's step is the scale by the largest integer."""
    return threshold * (2 ** (_UNSIGNED_BITS - 1) - 1) / 127 if non_negative else threshold


def _every_cell(block: Any, bundle: Bundle) -> tuple[str, str]:
    """Add to the program, and name, the class logits [N, A, C] and the side distributions' logits [N, A, 4, bins].

    Of all cells, whichever are candidates: student and teacher would choose others. Raises `EngineError` if the program
    has none.
    """
    manifest = bundle.manifest
    bins = manifest.reg_max + 1
    makers = {name: op for op in block.ops for name in op.output_arg_names}
    found = []
    for kind, channels in (("sigmoid", manifest.score_channels), ("softmax", 4 * bins)):
        # The pyramid levels are put together, transposed, and perhaps chosen from, before the last of its kind.
        name = next((op.input("X")[0] for op in reversed(block.ops) if op.type == kind), "")
        while name in makers and makers[name].type in _REARRANGING:
            maker = makers[name]
            name = maker.input("Input" if maker.type == "take_along_axis" else "X")[0]
        if name not in makers or makers[name].type != "concat" or block.var(name).shape[1] != channels:
            raise EngineError(
                f"the program has no {kind} over {channels} channels to distil at", "Export the bundle again."
            )
        found.append(_append(block, "transpose2", {"X": block.var(name)}, {"axis": [0, 2, 1]}, _RESHAPED).name)
    sides = _append(block, "reshape2", {"X": block.var(found[1])}, {"shape": [0, -1, 4, bins]}, _RESHAPED)
    return found[0], sides.name


def _complete(block: Any) -> None:
    """Give the reshaping operators the output that their gradient asks for."""
    from paddle.base import unique_name

    for op in block.ops:
        if op.type in _RESHAPING and "XShape" not in op.output_names:
            shape = block.create_var(name=unique_name.generate("xshape"), dtype="float32")
            op.desc.set_output("XShape", [shape.name])


def _append(
    block: Any, kind: str, inputs: Mapping[str, Any], attributes: Mapping[str, Any], outputs: Sequence[str] = ("Out",)
) -> Any:
    """Append an operator; returns the first of its `outputs`. Paddle 3.2's functions no longer write old programs."""
    from paddle.base import unique_name

    made = [block.create_var(name=unique_name.generate(f"distill_{kind}"), dtype="float32") for _ in outputs]
    block.append_op(
        type=kind,
        inputs={name: [value] for name, value in inputs.items()},
        outputs={name: [value] for name, value in zip(outputs, made, strict=True)},
        attrs=dict(attributes),
    )
    return made[0]


def _add_loss(block: Any, logits: str, sides: str) -> Any:
    """The scalar to minimise."""
    import paddle

    classes, bins = block.var(logits).shape[-1], block.var(sides).shape[-1]
    data = paddle.static.data
    score_loss = _append(
        block,
        "sigmoid_cross_entropy_with_logits",
        {"X": block.var(logits), "Label": data("distill_scores", [-1, -1, classes], "float32")},
        {"normalize": False, "ignore_index": -100},
    )
    side_loss = _append(
        block,
        "softmax_with_cross_entropy",
        {"Logits": block.var(sides), "Label": data("distill_sides", [-1, -1, 4, bins], "float32")},
        {"soft_label": True, "axis": -1, "numeric_stable_mode": True, "use_softmax": True, "ignore_index": -100},
        ("Loss", "Softmax"),
    )
    sums = []
    for loss, weight in (
        (score_loss, data("distill_score_weight", [-1, -1, classes], "float32")),
        (side_loss, data("distill_side_weight", [-1, -1, 4, 1], "float32")),
    ):
        product = _append(block, "elementwise_mul", {"X": loss, "Y": weight}, {"axis": -1})
        sums.append(_append(block, "reduce_sum", {"X": product}, {"reduce_all": True, "dim": [0], "keep_dim": False}))
    return _append(block, "elementwise_add", {"X": sums[0], "Y": sums[1]}, {"axis": -1})


def _non_negative(name: str, makers: Mapping[str, Any]) -> bool:
    op = makers.get(name)
    while op is not None and op.type in _KEEPS_SIGN:
        op = makers.get(op.input("X")[0])
    return op is not None and op.type == "relu"


def _binary(logits: NDArray[np.float32]) -> tuple[NDArray[np.float64], NDArray[np.float64], float]:
    """Scores of logits [N, A, C], the best of each candidate [N, A], and the sum of the scores' binary entropies."""
    scores = 1 / (1 + np.exp(-logits.astype(np.float64)))
    clipped = np.clip(scores, 1e-12, 1 - 1e-12)
    entropy = -(clipped * np.log(clipped) + (1 - clipped) * np.log1p(-clipped)).sum()
    return scores, scores.max(axis=-1), float(entropy)


def _distributions(logits: NDArray[np.float32]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Softmax over the last axis, and the entropy of each distribution."""
    shifted = np.exp(logits.astype(np.float64) - logits.max(axis=-1, keepdims=True))
    found = shifted / shifted.sum(axis=-1, keepdims=True)
    return found, -(found * np.log(np.clip(found, 1e-30, 1))).sum(axis=-1)


if __name__ == "__main__":
    serve(_distill)
