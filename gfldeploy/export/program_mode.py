"""Tracing a model as Paddle's older program, which Paddle 3.2 has half given up.

There `paddle.matmul`, `paddle.multiply`, `Tensor.sigmoid` and some thirty more are bare `_C_ops`: they take tensors and
values of PIR, and refuse the Variables of the older program. Most backbones use one of them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial, wraps
from types import BuiltinFunctionType, ModuleType
from typing import Any

# Other spellings of arguments that Paddle allows.
_SAME = {"input": "x", "other": "y", "dim": "axis"}


@contextmanager
def program_mode() -> Iterator[None]:
    """While open, Paddle traces the older program, and the functions that lost their form for it have one again.

    They are replaced wherever Paddle's modules, and modules that imported them by name, hold them, and as methods of
    Variables. Tensors are still given to the originals.
    """
    from paddle import _C_ops
    from paddle.base.framework import Variable
    from paddle.pir_utils import OldIrGuard

    restored: list[tuple[Any, str, Any]] = []
    # By identity: a module may hold a function under another name.
    instead = {id(getattr(_C_ops, name)): _either(getattr(_C_ops, name), form) for name, form in _FORMS.items()}
    try:
        for owner in (Variable, *_modules()):
            for name, value in list(vars(owner).items()):
                if id(value) in instead and isinstance(value, BuiltinFunctionType):
                    restored.append((owner, name, value))
                    setattr(owner, name, instead[id(value)])
        with OldIrGuard():
            yield
    finally:
        for owner, name, value in restored:
            setattr(owner, name, value)


def _modules() -> list[ModuleType]:
    """Loaded modules that functions may be replaced in: not those that define them."""
    natives = ("paddle.base.libpaddle", "paddle._pir_ops")
    return [
        module
        for name, module in list(sys.modules.items())
        if isinstance(module, ModuleType) and not name.startswith(natives)
    ]


def _either(original: Callable[..., Any], form: Callable[..., Any]) -> Callable[..., Any]:
    """The `original` for tensors and PIR's values, the `form` where an argument is a Variable of the older program."""
    import paddle
    from paddle.base.framework import Variable

    @wraps(form)
    def either(*args: Any, **kwargs: Any) -> Any:
        if not any(isinstance(value, Variable) for value in (*args, *kwargs.values())):
            return original(*args, **kwargs)
        kwargs.pop("name", None)
        return form(*args, **{_SAME.get(key, key): value for key, value in kwargs.items()})

    # Tracing rewrites the Python of what it calls; this is to be called as it is.
    return paddle.jit.not_to_static(either)  # type: ignore[no-any-return]


# --- forms ------------------------------------------------------------------------------------------------------------


def _append(kind: str, inputs: dict[str, Any], attributes: dict[str, Any] | None = None, dtype: Any = None) -> Any:
    """Append the operator `kind` to the program being traced; its output has `dtype`, by default that of input X."""
    from paddle.base.layer_helper import LayerHelper

    helper = LayerHelper(kind)
    out = helper.create_variable_for_type_inference(dtype or inputs["X"].dtype)
    helper.append_op(type=kind, inputs=inputs, outputs={"Out": out}, attrs=attributes or {})
    return out


def _unary(kind: str, dtype: str | None, x: Any) -> Any:
    return _append(kind, {"X": x}, dtype=dtype)


def _binary(kind: str, dtype: str | None, x: Any, y: Any) -> Any:
    return _append(kind, {"X": x, "Y": y}, dtype=dtype)


def _axes(axis: int | Sequence[int] | None) -> list[int]:
    if axis is None:
        return []
    return [axis] if isinstance(axis, int) else list(axis)


def _reduce(kind: str, x: Any, axis: Any = None, keepdim: bool = False) -> Any:
    # reduce_amax goes by `dim` for the shape of its output even where `reduce_all` is set.
    axes = _axes(axis) or list(range(len(x.shape)))
    return _append(kind, {"X": x}, {"dim": axes, "keep_dim": keepdim, "reduce_all": len(axes) == len(x.shape)})


def _logsumexp(x: Any, axis: Any = None, keepdim: bool = False) -> Any:
    axes = _axes(axis) or list(range(len(x.shape)))
    return _append("logsumexp", {"X": x}, {"axis": axes, "keepdim": keepdim, "reduce_all": len(axes) == len(x.shape)})


def _matmul(x: Any, y: Any, transpose_x: bool = False, transpose_y: bool = False) -> Any:
    return _append("matmul_v2", {"X": x, "Y": y}, {"trans_x": transpose_x, "trans_y": transpose_y})


def _expand_as(x: Any, y: Any) -> Any:
    return _append("expand_as_v2", {"X": x, "Y": y}, {"target_shape": list(y.shape)})


def _roll(x: Any, shifts: Any, axis: Any = None) -> Any:
    return _append("roll", {"X": x}, {"shifts": _axes(shifts), "axis": _axes(axis)})


def _triangle(lower: bool, x: Any, diagonal: int = 0) -> Any:
    return _append("tril_triu", {"X": x}, {"diagonal": diagonal, "lower": lower})


_FORMS: dict[str, Callable[..., Any]] = {
    **{
        name: partial(_unary, name, None) for name in ("cos", "floor", "log", "rsqrt", "sigmoid", "sign", "sin", "sqrt")
    },
    **{name: partial(_unary, f"{name}_v2", "bool") for name in ("isfinite", "isinf", "isnan")},
    "logical_not": partial(_unary, "logical_not", "bool"),
    **{name: partial(_binary, name, "bool") for name in ("greater_than", "logical_and", "logical_or", "logical_xor")},
    "bmm": partial(_binary, "bmm", None),
    "maximum": partial(_binary, "elementwise_max", None),
    "minimum": partial(_binary, "elementwise_min", None),
    "multiply": partial(_binary, "elementwise_mul", None),
    **{name: partial(_reduce, f"reduce_{name}") for name in ("all", "amax", "amin", "any")},
    "expand_as": _expand_as,
    "logsumexp": _logsumexp,
    "matmul": _matmul,
    "roll": _roll,
    "tril": partial(_triangle, True),
    "triu": partial(_triangle, False),
}
