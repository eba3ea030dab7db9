"""TensorRT, whatever runs it: what it builds an engine for, and where that is kept. Nothing here needs a GPU."""

from __future__ import annotations

from collections.abc import Mapping
from ctypes.util import find_library
from dataclasses import asdict, dataclass
from importlib import metadata, util
from pathlib import Path
from typing import Self

import numpy as np

from gfldeploy.engines.base import EngineOptions, Tensors
from gfldeploy.engines.cache import DEFAULT_ENGINE_CACHE, digest_of, engine_directory
from gfldeploy.engines.hardware import gpu_models, nvidia_driver
from gfldeploy.errors import EngineError

__all__ = ["TensorRtOptions", "cache_directory", "cache_key", "example", "tensorrt_library"]

Shape = tuple[int, int, int]

_DISTRIBUTIONS = ("tensorrt", "tensorrt-cu13", "tensorrt-cu12", "tensorrt_cu12", "tensorrt_cu13")


@dataclass(frozen=True)
class TensorRtOptions:
    """How a graph is built with TensorRT.

    `smallest`, `most_common`, `largest`: (batch, height, width) of the inputs. TensorRT refuses what is smaller or
    larger in any dimension, and is fastest at the most common. `cache_dir`: the folder of all engines. `workspace_mb`:
    2^20 bytes that its tactics may use; 4096 is more than the convolutions of a GFL need at 800x1344, and what is too
    little makes TensorRT choose slower ones in silence. `min_subgraph`: nodes below which a part of the graph is not
    worth the copies around it.
    """

    smallest: Shape
    most_common: Shape
    largest: Shape
    cache_dir: Path
    workspace_mb: int = 4096
    min_subgraph: int = 3

    def __post_init__(self) -> None:
        sides = zip(self.smallest, self.most_common, self.largest, strict=True)
        if not all(0 < low <= middle <= high for low, middle, high in sides):
            raise ValueError(f"smallest, most common and largest must be positive and in this order: {self}")
        if self.workspace_mb < 1 or self.min_subgraph < 1:
            raise ValueError("workspace_mb and min_subgraph must be at least 1")

    @classmethod
    def of(cls, options: EngineOptions) -> Self:
        """For the shapes of `options`. Raises `EngineError` if there are none."""
        if not options.shapes:
            raise EngineError(
                "TensorRT has to know the shapes of its inputs before",
                "Use `gfldeploy bench`, which takes them from the data.",
            )
        batches, heights, widths = zip(*options.shapes, strict=True)
        smallest, largest = (min(batches), min(heights), min(widths)), (max(batches), max(heights), max(widths))
        return cls(smallest, options.shapes[0], largest, options.cache_dir or DEFAULT_ENGINE_CACHE)


def example(shape: Shape) -> Tensors:
    """An input of this shape, to build an engine with."""
    batch, height, width = shape
    return {"image": np.zeros((batch, 3, height, width), np.float32)}


def cache_key(options: TensorRtOptions, depends_on: Mapping[str, str]) -> str:
    """A digest of all that a built engine depends on, so that it is never used for anything else."""
    return digest_of({**depends_on, **asdict(options), "cache_dir": None})  # the folder can be moved


def cache_directory(options: TensorRtOptions, engine: str, version: str, precision: str, bundle: str) -> Path:
    """The folder of one built engine on this machine, made if it is not there.

    `version`: of the engine's library; `bundle`: its digest. Raises `OutputError`.
    """
    depends_on = {
        "engine": engine,
        "version": version,
        "precision": precision,
        "bundle": bundle,
        "tensorrt": str(tensorrt_library()),
        "gpu": ", ".join(gpu_models()),
        "driver": str(nvidia_driver()),
    }
    return engine_directory(options.cache_dir, cache_key(options, depends_on))


def tensorrt_library() -> str | None:
    """The version of the installed TensorRT, "unknown version" of a bare library, None without one.

    Found without loading it: the `tensorrt` wheels bring the library in `tensorrt_libs`, an installation of NVIDIA's
    puts it where the linker looks.
    """
    for name in _DISTRIBUTIONS:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    if util.find_spec("tensorrt_libs") or find_library("nvinfer"):
        return "unknown version"
    return None
