"""Puts weights into a model: those of a checkpoint, if they fit, or random ones."""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gfldeploy.errors import CheckpointError
from gfldeploy.export.bounded_text import cut, shown
from gfldeploy.export.checkpoint import REMEDY_OPTIMIZER, is_finite
from gfldeploy.export.heads import HEADS

_CLASS_OUTPUTS = {head.class_output for head in HEADS.values()}
_BOX_OUTPUTS = {head.box_output for head in HEADS.values()}
_CONSTANT = "distribution_project.project"  # 0 to reg_max: no weight, though in the state_dict


def fit_weights(model: Any, weights: Mapping[str, NDArray[Any]]) -> None:
    """Set every parameter and buffer of `model` (a paddle Layer) from `weights`, converted to the model's dtype.

    Names and shapes must agree both ways; nothing is set unless all do. The constants of the box integral may be
    absent, as PaddleDetection lets them be. One kind of extra name is accepted: where the file holds a whole
    distillation model, `student_model.*` is the detector and `teacher_model.*` and `distill_loss.*` exist for training
    only. uint16 arrays for float parameters are Paddle's bfloat16.

    Raises `CheckpointError` that counts the missing, unexpected and misshapen names, gives the first of each, and says
    what kind of checkpoint it seems to be instead (quantised, pruned, of other classes, a backbone, ...).
    """
    weights = _student(weights)
    if not weights:
        problem = "the checkpoint holds the teacher of a distillation, without its student"
        raise CheckpointError(problem, f"{_USE_TRAINED}.")
    state: dict[str, Any] = {
        name: one for name, one in model.state_dict().items() if name in weights or not name.endswith(_CONSTANT)
    }
    missing = [name for name in state if name not in weights]
    unexpected = [name for name in weights if name not in state]
    misshapen = [
        name for name, tensor in state.items() if name in weights and list(weights[name].shape) != list(tensor.shape)
    ]
    if not missing and not misshapen:
        whole = [name for name, one in state.items() if "float" in str(one.dtype) and not _is_float(weights[name])]
        if whole:
            raise CheckpointError(
                f"the checkpoint holds {weights[whole[0]].dtype} for {len(whole)} float parameters ({_first(whole)}): "
                "it was converted for an integer engine",
                "Export the float checkpoint that it was made from, and then run `gfldeploy quantize` on the bundle.",
            )
    if missing or unexpected or misshapen:
        wrong = [f"{name} ({_shape(weights[name])} instead of {_shape(state[name])})" for name in misshapen]
        named = ((missing, "missing"), (unexpected, "unexpected"), (wrong, "of the wrong shape"))
        problems = ", ".join(f"{len(names)} {what} ({_first(names)})" for names, what in named if names)
        kind, remedy = _explain(state, weights, missing, unexpected, misshapen)
        raise CheckpointError(f"the checkpoint {kind}: of {len(state)} parameters, {problems}", remedy)
    fitted = {name: _as(weights[name], str(tensor.dtype).rpartition(".")[2]) for name, tensor in state.items()}
    for name, array in fitted.items():
        if not is_finite(array):
            problem = f"the checkpoint has values in {shown(name)} that a {array.dtype} cannot hold"
            raise CheckpointError(problem, "Use a checkpoint from before training diverged.")
    for name, tensor in state.items():
        tensor.set_value(fitted[name])


def _is_float(array: NDArray[Any]) -> bool:
    return array.dtype.kind == "f" or array.dtype == np.uint16  # uint16: bfloat16


def _student(weights: Mapping[str, NDArray[Any]]) -> Mapping[str, NDArray[Any]]:
    prefix, training_only = "student_model.", ("teacher_model.", "distill_loss.")
    if not all(name.startswith((prefix, *training_only)) for name in weights):
        return weights
    return {name.removeprefix(prefix): array for name, array in weights.items() if name.startswith(prefix)}


def _shape(array: Any) -> str:
    return "x".join(str(size) for size in array.shape) or "scalar"


def _first(names: Sequence[str]) -> str:
    return ", ".join(cut(repr(name)[1:-1]) for name in names[:3]) + (", ..." if len(names) > 3 else "")


_OPTIMIZER_STATE = re.compile(r"_(?:velocity|moment[12]?|beta[12]_pow_acc)_\d+\Z")
# What PaddleSlim and Paddle add to a layer that trains quantised, and where they keep its weights.
_QUANTISED = re.compile(
    r"\._(?:ma_)?out(?:put)?_scale\.|[._](?:fake_)?quant(?:er|_)|\._(?:act|weight)_preprocess\.|observer", re.ASCII
)
_MASK = re.compile(r"_mask\Z")
_USE_ITS_CONFIG = "Use the config this checkpoint was trained with."
_SAVE_ALL = "save the detector's whole state_dict with paddle.save."
_USE_TRAINED = "Pass the checkpoint that training with this config saved, such as output/CONFIG/model_final.pdparams"


def _explain(
    state: Mapping[str, Any],
    weights: Mapping[str, NDArray[Any]],
    missing: list[str],
    unexpected: list[str],
    misshapen: list[str],
) -> tuple[str, str]:
    """What a checkpoint that does not fit seems to be, to follow "the checkpoint", and what to do about it."""
    if any(_QUANTISED.search(name) for name in unexpected):
        return (
            "was saved by quantisation-aware training",
            "Export the float checkpoint that this training started from (its pretrain_weights), or train without "
            "--slim_config, and then run `gfldeploy quantize` on the bundle.",
        )
    if any(_OPTIMIZER_STATE.search(name) for name in unexpected):
        return "is the optimizer's state, not weights", REMEDY_OPTIMIZER
    fitting = len(state) - len(missing) - len(misshapen)
    if not fitting:
        if sum(f"backbone.{name}" in state for name in weights) > len(weights) // 2:
            return "holds a backbone alone, as trained to classify images", f"{_USE_TRAINED}."
        first = next(iter(state))
        prefix = next((name.removesuffix(first) for name in weights if name.endswith(f".{first}")), "")
        if prefix and sum(name.removeprefix(prefix) in state for name in weights) > len(weights) // 2:
            return (
                f"has {cut(repr(prefix)[1:-1])} before every name",
                "Save the detector's own state_dict with paddle.save, its names without that prefix.",
            )
    if not missing and not misshapen and all(_MASK.search(name) for name in unexpected):
        return (
            "has the masks of sparse training beside its weights",
            "Save its state_dict again with paddle.save, without the names that end in _mask.",
        )
    whole_backbone = not any(name.startswith("backbone.") for name in (*missing, *misshapen))
    if whole_backbone and all(name.startswith("backbone.") for name in weights):
        return "holds a backbone alone", f"{_USE_TRAINED}."
    parts = {name.split(".", 1)[0] for name in (*missing, *unexpected, *misshapen)}
    if (missing or unexpected) and all(".dgqp_module." in name for name in (*missing, *unexpected)) and not misshapen:
        if unexpected:
            return "is of a GFLv2 (dgqp_module), the config is not", "Add GFLHead's dgqp_module of the training config."
        return "has no dgqp_module, the config has one", "Remove dgqp_module, or use a checkpoint of a GFLv2."
    if not missing and not unexpected:
        if all(_is_of(name, _CLASS_OUTPUTS) for name in misshapen):
            has, wants = (int(shapes[misshapen[0]].shape[0]) for shapes in (weights, state))
            return (
                f"is of {has} classes, the config of {wants} (one more where loss_class has use_sigmoid: false)",
                f"Set num_classes as it was in training. {_USE_TRAINED}, not the one that it started from.",
            )
        if all(_is_of(name, (*_BOX_OUTPUTS, "distribution_project")) for name in misshapen):
            return "has another reg_max than the config", "Set GFLHead's reg_max as it was in training."
        if all(_narrower(weights[name].shape, state[name].shape) for name in misshapen):
            return (
                "has fewer channels than the config: it was pruned, or trained with narrower layers",
                "Export the checkpoint from before pruning, or use the config this checkpoint was trained with.",
            )
    if not unexpected and not misshapen:
        return "is not complete, or the config has more layers", f"{_USE_ITS_CONFIG} If this is it: {_SAVE_ALL}"
    if len(parts) == 1 and (part := parts.pop()) in ("backbone", "neck", "head"):
        return f"fits the config but for the {part}, which is another", _USE_ITS_CONFIG
    return "does not fit the config", _USE_ITS_CONFIG


def _is_of(name: str, layers: Iterable[str]) -> bool:
    """Whether a parameter belongs to one of these layers."""
    return not set(layers).isdisjoint(name.split("."))


def _narrower(shape: Iterable[int], other: Iterable[int]) -> bool:
    shape, other = tuple(shape), tuple(other)
    return len(shape) == len(other) and all(mine <= its for mine, its in zip(shape, other, strict=True))


def _as(array: NDArray[Any], dtype: str) -> NDArray[Any]:
    if array.dtype == np.uint16 and dtype.startswith("float"):
        array = (array.astype(np.uint32) << 16).view(np.float32)
    with np.errstate(over="ignore"):  # `is_finite` finds it
        return np.require(array, dtype=dtype, requirements=["C"])


# --- random weights ---------------------------------------------------------------------------------------------------


def set_random_weights(model: Any, seed: int) -> None:
    """Give `model` weights that depend on `seed` and the parameter names only, and that exercise the whole graph.

    The values a freshly built model has would hide most export errors: normalisation statistics are 0 and 1, the
    class scores nearly constant. Here convolutions are He-normal, BatchNorm statistics and every scale and shift are
    random, residual branches are damped so that activations stay near 1 through 101 layers, and the head's last
    convolutions are scaled so that class logits spread over several units (scores over most of 0..1) and box distances
    over most of 0..reg_max. Fixed buffers (the projection 0..reg_max) keep their values.
    """
    if seed < 0:
        raise ValueError(f"seed must not be negative, not {seed}")
    state: dict[str, Any] = model.state_dict()
    for name, tensor in state.items():
        if name.endswith(_CONSTANT):
            continue
        rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
        values = _draw(rng, name, tuple(int(size) for size in tensor.shape), state.keys())
        tensor.set_value(_as(values, str(tensor.dtype).rpartition(".")[2]))


def _draw(rng: np.random.Generator, name: str, shape: tuple[int, ...], names: Iterable[str]) -> NDArray[np.float64]:
    owner, _, kind = name.rpartition(".")
    if kind == "_mean":
        return rng.normal(0.0, 0.1, shape)
    if kind in ("_variance", "scale_reg"):
        return rng.uniform(0.5, 1.5, shape)
    if len(shape) >= 2:
        fan_in = int(np.prod(shape[1:])) if len(shape) > 2 else shape[0]
        return rng.normal(0.0, _spread(name) / np.sqrt(fan_in), shape)
    if kind == "bias":
        # The class bias keeps most scores low, as in a trained detector.
        return rng.normal(-3.0 if _is_of(name, _CLASS_OUTPUTS) else 0.0, 0.1, shape)
    damping = 0.15 if _ends_branch(owner, names) else 1.0
    return rng.uniform(0.5, 1.5, shape) * damping


def _spread(name: str) -> float:
    """Standard deviation of a convolution's output where its input has a mean square of 1."""
    if _is_of(name, (*_CLASS_OUTPUTS, *_BOX_OUTPUTS)):
        return 1.5
    if "offset" in name:  # deformable convolution: displacements of a fraction of a pixel
        return 0.1
    if name.startswith("neck."):  # no ReLU follows
        return 1.0
    return float(np.sqrt(2.0))


def _ends_branch(owner: str, names: Iterable[str]) -> bool:
    """Whether `owner` normalises the last convolution of a ResNet block's residual branch."""
    block, found, _ = owner.rpartition(".branch2")
    if not found:
        return False
    last = "c" if any(name.startswith(f"{block}.branch2c.") for name in names) else "b"
    return owner.startswith(f"{block}.branch2{last}.")
