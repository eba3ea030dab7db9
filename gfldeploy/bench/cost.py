"""What the images of a benchmark cost, by arithmetic on the graph."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from gfldeploy.bench.results import Cost
from gfldeploy.bundle import Bundle
from gfldeploy.engines.base import Precision
from gfldeploy.macs import GraphWork, count_work

# By bundle digest, height and width: cells of a benchmark differ in engine and batch size more than in these.
_counted: dict[tuple[str, int, int], GraphWork] = {}


def count_cost(
    bundle: Bundle,
    precision: Precision,
    image_sizes: Sequence[tuple[int, int]],
    batches: Mapping[tuple[int, int, int], int],
    images: int | None = None,
) -> Cost:
    """The mean cost of one image.

    `image_sizes`: height, width in pixels of each image as resized, not padded. The size that is counted is the
    smallest that the network takes for it, that of a batch of this image alone. `batches`: how many there were by batch
    size, height and width, padding included. `images`: how many there are whose tiles these are the sizes and batches
    of; None for whole images.
    Raises `BundleError` if the bundle's ONNX graph cannot be counted, `ValueError` for no images or batches.
    """
    timed = images or len(image_sizes)
    images = images or sum(size * count for (size, _, _), count in batches.items())
    if not image_sizes or images < 1:
        raise ValueError("there must be at least one image and one batch")
    own = [bundle.manifest.preprocess.padded_size(height, width) for height, width in image_sizes]
    counted = _count(bundle, {*own, *((height, width) for _, height, width in batches)})
    padded_macs = traffic_bytes = 0.0
    for (size, height, width), count in batches.items():
        one = counted[height, width]
        padded_macs += size * count * one.macs
        traffic_bytes += size * count * one.traffic_bytes(precision, size)
    return Cost(
        macs=sum(counted[size].macs for size in own) / timed,
        padded_macs=padded_macs / images,
        traffic_mb=traffic_bytes / images / 1e6,
    )


def _count(bundle: Bundle, sizes: Collection[tuple[int, int]]) -> dict[tuple[int, int], GraphWork]:
    digest = bundle.digest
    if new := [size for size in sizes if (digest, *size) not in _counted]:
        onnx_file, _ = bundle.graph("onnx")
        for size, one in count_work(onnx_file, new, bundle.manifest.strides).items():
            _counted[digest, *size] = one
    return {size: _counted[digest, *size] for size in sizes}
