"""The table of methods: `--method`, `--algo` and what bundles record derive from it."""

from __future__ import annotations

from dataclasses import replace

from gfldeploy.quant import distill, ptq
from gfldeploy.quant.method import QuantMethod

_PTQ = QuantMethod(
    name="ptq",
    help="calibrates with PaddleSlim.",
    algorithms=ptq.ALGORITHMS,
    calibrate=ptq.calibrate,
    auto=ptq.AUTO,
    unusable=ptq.UNUSABLE,
    packages=("paddleslim",),
)
_DISTILL = replace(
    _PTQ,
    name="distill",
    help="calibrates, then fine-tunes the weights on the same images, without labels, to give in INT8 what FP32 gives, "
    "and keeps whichever is measured to be closer.",
    refine=distill.refine,
)

METHODS: dict[str, QuantMethod] = {method.name: method for method in (_PTQ, _DISTILL)}
