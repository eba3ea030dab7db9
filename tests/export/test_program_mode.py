"""Every function that the installed Paddle gives out bare has a form for the older program, which computes the same."""

from __future__ import annotations

import subprocess
import sys

import demo_bundles
import pytest

pytestmark = [pytest.mark.slow, demo_bundles.needs_export]

# What each function is called with; arrays are drawn in [-1, 1].
_CHECK = """
from gfldeploy.engines.dependencies import require
require("paddle", "this test")
import sys
import types
import numpy as np
import paddle
from gfldeploy._quiet import quiet
import gfldeploy.export.program_mode as program_mode_module
from gfldeploy.export.program_mode import program_mode

def lost_functions() -> dict[str, list[str]]:
    # Names in `_C_ops` of what models may call and the installed Paddle gives out bare, and where it holds each.
    from paddle import _C_ops
    from paddle.base.dygraph import generated_tensor_methods_patch as replaced
    from paddle.base.framework import Variable

    names = {id(value): name for name, value in vars(_C_ops).items() if isinstance(value, types.BuiltinFunctionType)}
    held: dict[str, list[str]] = {}
    for owner in (Variable, *program_mode_module._modules()):
        if owner is Variable or owner is paddle or owner.__name__.startswith(("paddle.tensor", "paddle.nn")):
            for name, value in list(vars(owner).items()):
                if id(value) in names:
                    held.setdefault(names[id(value)], []).append(f"{owner.__name__}.{name}")
    for table in (replaced.methods_map, replaced.funcs_map, replaced.nn_funcs_map):
        for name, function in table:
            held.setdefault(name, []).append(f"{replaced.__name__}.{function.__name__}")
    return held


rng = np.random.default_rng(0)
a, b, c = (rng.uniform(-1, 1, shape).astype("float32") for shape in ((2, 3, 4), (2, 4, 3), (3, 1)))
odd = np.float32([[1, np.inf], [np.nan, 0]])
p, q = a > 0, a > 0.5
above = np.abs(a) + 0.1
unary = {name: [((a,), {}), ((), {"x": a, "name": None})] for name in "cos floor sigmoid sign sin".split()}
binary = {name: [((a, c), {}), ((a,), {"y": a[:, ::-1].copy()})] for name in
          "maximum minimum multiply greater_than".split()}
logical = {name: [((p, q), {}), ((p,), {"y": q})] for name in "logical_and logical_or logical_xor".split()}
reduce = [((), {}), ((1,), {}), (([0, 2], True), {}), ((), {"axis": -1, "keepdim": True})]
calls = {
    **unary, **binary, **logical,
    **{name: [((above,), {})] for name in ("log", "rsqrt", "sqrt")},
    **{name: [((odd,), {})] for name in ("isfinite", "isinf", "isnan")},
    "logical_not": [((p,), {})],
    **{name: [((p, *args), kwargs) for args, kwargs in reduce] for name in ("all", "any")},
    **{name: [((a, *args), kwargs) for args, kwargs in reduce] for name in ("amax", "amin", "logsumexp")},
    "bmm": [((a, b), {})],
    "matmul": [((a, b), {}), ((a, a, False, True), {}), ((b,), {"y": b, "transpose_x": True})],
    "expand_as": [((c, a), {})],
    "roll": [((a, 1), {}), ((a, [1, 2], [0, 2]), {}), ((a,), {"shifts": -1, "axis": 1})],
    "tril": [((a,), {}), ((a, 1), {})],
    "triu": [((a,), {}), ((a,), {"diagonal": -1})],
}
lost = lost_functions()
assert set(lost) >= {"matmul", "multiply", "sigmoid"}, lost
if missing := set(lost) - set(calls):
    sys.exit(f"no call to try: {sorted(missing)}")
own = types.ModuleType("imports_by_name")
own.multiply, own.product = paddle.multiply, paddle.tensor.math.multiply
sys.modules[own.__name__] = own


def ways(name):
    '''Every function of this name that a model may have got hold of.'''
    places = [paddle, paddle.tensor, paddle.tensor.math, paddle.nn.functional, paddle._C_ops]
    found = [getattr(place, name) for place in places if hasattr(place, name)]
    found.append(lambda x, *args, **kwargs: getattr(x, name)(*args, **kwargs))
    return found + ([own.multiply, own.product] if name == "multiply" else [])


def values(of, args, kwargs):
    return [of(one) for one in args], {key: of(one) for key, one in kwargs.items()}


def lift(make):
    return lambda one: make(one) if isinstance(one, np.ndarray) else one


eager, before = {}, ways("multiply")
for name in lost:
    for number, (args, kwargs) in enumerate(calls[name]):
        args, kwargs = values(lift(paddle.to_tensor), args, kwargs)
        eager[name, number] = getattr(paddle, name)(*args, **kwargs).numpy()
feeds, fetches, keys = {}, [], []


def feed(array):
    name = f"in{len(feeds)}"
    feeds[name] = array
    return paddle.static.data(name, array.shape, str(array.dtype))


with program_mode():
    program, startup = paddle.static.Program(), paddle.static.Program()
    with paddle.static.program_guard(program, startup):
        for name in lost:
            for number, (args, kwargs) in enumerate(calls[name]):
                args, kwargs = values(lift(feed), args, kwargs)
                for way in ways(name):
                    if args or "lambda" not in way.__name__:
                        fetches.append(way(*args, **kwargs))
                        keys.append((name, number))
    kinds = [operator.type for operator in program.global_block().ops]
    outputs = paddle.static.Executor(paddle.CPUPlace()).run(program, feed=feeds, fetch_list=fetches)
for key, output in zip(keys, outputs, strict=True):
    assert output.dtype == eager[key].dtype and output.shape == eager[key].shape, (key, output, eager[key])
    np.testing.assert_allclose(output, eager[key], rtol=1e-6, atol=1e-6, err_msg=str(key))
assert len(kinds) >= len(fetches) > 3 * len(lost)
after = ways("multiply")
assert [f is g for f, g in zip(before, after)].count(False) == 1, "all but the lambda are put back"
paddle.multiply(paddle.ones([1]), paddle.ones([1]))
print(len(lost))
"""


def test_every_function_without_a_program_form_gets_one_that_computes_the_same() -> None:
    done = subprocess.run([sys.executable, "-c", _CHECK], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout) >= 30
