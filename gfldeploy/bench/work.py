"""What one image costs, by arithmetic on a bundle's graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path

from gfldeploy.bench.results import Work
from gfldeploy.bundle import Bundle
from gfldeploy.engines.base import Precision
from gfldeploy.macs import GraphCost, graph_cost

__all__ = ["work"]

# Of an activation and of a weight; INT8's biases and scales are left out.
_BYTES: Mapping[Precision, int] = {"fp32": 4, "fp16": 2, "bf16": 2, "int8": 1}


def work(
    bundle: Bundle,
    precision: Precision,
    image_sizes: Sequence[tuple[int, int]],
    batches: Mapping[tuple[int, int, int], int],
) -> Work:
    """The mean over images of these sizes, (height, width) in pixels as resized, in batches of these shapes.

    `batches`: their number by (batch, height, width). The network rounds an image's own size up to a multiple of its
    largest stride. Raises `BundleError` where the graph cannot be followed.
    """
    strides = bundle.manifest.strides
    step = max(strides)
    model, _ = bundle.graph("onnx")

    def cost(height: int, width: int) -> GraphCost:
        return _cost(model, bundle.digest, -(-height // step) * step, -(-width // step) * step, strides)

    images = sum(batch * count for (batch, _, _), count in batches.items())
    padded_macs = traffic = 0.0
    for (batch, height, width), count in batches.items():
        one = cost(height, width)
        padded_macs += one.macs * batch * count
        traffic += (one.activations * batch + one.weights) * count * _BYTES[precision]
    macs = sum(cost(height, width).macs for height, width in image_sizes) / len(image_sizes)
    return Work(macs, padded_macs / images, traffic / images / 1e6)


@lru_cache(maxsize=256)
def _cost(model: Path, digest: str, height: int, width: int, strides: tuple[int, ...]) -> GraphCost:
    """`digest`: the bundle's, so that another bundle at the same path is not taken for this one."""
    return graph_cost(model, height, width, strides)
