"""TensorRT, whatever runs it: what it builds an engine for, and where that is kept. Nothing here needs a GPU."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np

from gfldeploy.bundle import Bundle
from gfldeploy.engines.base import Engine, EngineOptions, Tensors
from gfldeploy.engines.cache import DEFAULT_ENGINE_CACHE, engine_directory
from gfldeploy.engines.hardware import gpu_models, nvidia_driver
from gfldeploy.engines.nvidia_libraries import tensorrt_library as tensorrt_library
from gfldeploy.errors import EngineError

Shape = tuple[int, int, int]

# What TensorRT's tactics may use: more than the convolutions of a GFL need at 800x1344. With too little, TensorRT
# silently chooses slower ones.
WORKSPACE_BYTES = 4096 * 2**20
# Nodes below which a part of the graph is not worth the copies around it.
MIN_SUBGRAPH = 3


@dataclass(frozen=True)
class TensorRtOptions:
    """How a graph is built with TensorRT.

    `smallest`, `most_common`, `largest`: (batch, height, width) of the inputs. TensorRT refuses what is smaller or
    larger in any dimension, and is fastest at the most common. `cache_dir`: the folder of all engines.
    """

    smallest: Shape
    most_common: Shape
    largest: Shape
    cache_dir: Path

    @classmethod
    def of(cls, options: EngineOptions) -> Self:
        """For the shapes of `options`. Raises `EngineError` if there are none."""
        if not options.shapes:
            problem = "TensorRT has to know the shapes of its inputs before"
            raise EngineError(problem, "Use `gfldeploy bench`, which takes them from the data.")
        batches, heights, widths = zip(*options.shapes, strict=True)
        smallest, largest = (min(batches), min(heights), min(widths)), (max(batches), max(heights), max(widths))
        return cls(smallest, options.shapes[0], largest, options.cache_dir or DEFAULT_ENGINE_CACHE)

    def directory(self, engine: Engine, bundle: Bundle) -> Path:
        """The folder of what `engine` built of `bundle` on this machine, created if it is absent; `OutputError`."""
        machine = {"tensorrt": tensorrt_library(), "gpus": gpu_models(), "driver": nvidia_driver()}
        shapes = (self.smallest, self.most_common, self.largest)
        settings = (WORKSPACE_BYTES, MIN_SUBGRAPH)
        return engine_directory(self.cache_dir, engine, bundle, **machine, shapes=shapes, settings=settings)


def example(shape: Shape) -> Tensors:
    """An input of this shape, to build an engine with."""
    batch, height, width = shape
    return {"image": np.zeros((batch, 3, height, width), np.float32)}
