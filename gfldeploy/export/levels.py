"""Do backbone, neck and head fit together, and does the head know the strides of the neck's levels?"""

from __future__ import annotations

from typing import Any

import numpy as np

from gfldeploy._quiet import quiet
from gfldeploy.errors import ConfigError, summary
from gfldeploy.export.config import DetectorConfig
from gfldeploy.export.heads import HEADS
from gfldeploy.images.preprocess import Preprocess


def check_levels(detector: Any, config: DetectorConfig, preprocess: Preprocess, height: int, width: int) -> None:
    """Raise `ConfigError` unless ppdet runs the model on what the reader makes, with a level for each stride.

    `height`, `width`: in pixels, a size that the graphs are compared at; where sizes are free, another is tried too.
    """
    sizes = [(height, width)]
    if not preprocess.fixed and preprocess.pad_stride:
        sizes.append(_odd(preprocess.pad_stride))
    levels: list[tuple[int, int]] = []
    spec = HEADS[config.head]
    for size in reversed(sizes):
        found = _levels(detector, size, len(config.strides))
        if isinstance(found, str):
            remedy = "Check that backbone, neck and head fit together: channels (feat_in_chan), levels (fpn_stride)."
            for stride in (32, 64, 128):
                if not isinstance(_levels(detector, _odd(stride), len(config.strides)), str):
                    how = "use such an --input-shape" if preprocess.fixed else "set PadBatch's pad_to_stride to that"
                    remedy = f"It runs at multiples of {stride} px: {how}."
                    break
            raise ConfigError(
                f"{config.path}: PaddleDetection itself cannot run this model on {size[0]}x{size[1]} px: {found}",
                remedy,
            )
        levels = found
    actual = [int(2 ** round(np.log2(height * width / (rows * columns)) / 2)) for rows, columns in levels]
    strides = list(config.strides)
    if len(levels) != len(strides):
        raise ConfigError(
            f"{config.path}: the neck gives {len(levels)} levels, {config.head}'s {spec.strides} has {len(strides)}: "
            f"{strides}",
            f"Set {spec.strides} to {actual}, or have the neck give {len(strides)} levels.",
        )
    for (rows, columns), stride in zip(levels, strides, strict=True):
        if abs(height / stride - rows) >= 1 or abs(width / stride - columns) >= 1:
            raise ConfigError(
                f"{config.path}: {config.head}'s {spec.strides} is {strides}, but the level for {stride} has "
                f"{rows}x{columns} cells of {height}x{width} px",
                f"Set {spec.strides} to {actual}, the strides of the neck's levels in their order.",
            )


def _odd(stride: int) -> tuple[int, int]:
    """A height and a width that are multiples of `stride`, and of no larger power of two."""
    return (3 * stride, 5 * stride)


def _levels(detector: Any, size: tuple[int, int], strides: int) -> list[tuple[int, int]] | str:
    """Rows and columns of each level that the neck makes of a picture of this size, or why ppdet cannot run it."""
    import paddle

    try:
        with paddle.no_grad(), quiet(native_stderr=True):
            levels = detector.neck(detector.backbone({"image": paddle.zeros([1, 3, *size])}))
            if not isinstance(levels, list | tuple):
                return "the neck gives one level as a tensor, the head takes a list of levels"
            if len(levels) == strides:
                detector.head(levels)
            return [(int(level.shape[2]), int(level.shape[3])) for level in levels]
    except Exception as error:  # noqa: BLE001 - layers that do not fit together may raise anything
        return summary(error)
