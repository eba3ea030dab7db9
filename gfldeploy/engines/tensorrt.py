"""TensorRT through ONNX Runtime and through Paddle: what both are told, as plain data.

Nothing here imports either of them, or needs a GPU: whoever has one can read what would be asked of TensorRT, and tests
can hold it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from ctypes.util import find_library
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path
from typing import Any

import numpy as np

from gfldeploy.engines.base import EngineOptions, Precision, Tensors
from gfldeploy.engines.cache import DEFAULT_ENGINE_CACHE, digest_of, engine_directory
from gfldeploy.engines.hardware import gpu_models, nvidia_driver
from gfldeploy.errors import EngineError

__all__ = [
    "Call",
    "Profile",
    "TensorRtOptions",
    "cache_directory",
    "cache_key",
    "example",
    "onnxruntime_options",
    "paddle_calls",
    "profile",
    "required",
    "shape_file",
    "tensorrt_library",
]

Shape = tuple[int, int, int]

_DISTRIBUTIONS = ("tensorrt", "tensorrt-cu13", "tensorrt-cu12", "tensorrt_cu12", "tensorrt_cu13")


@dataclass(frozen=True)
class Profile:
    """The inputs that an engine is built for: (batch, height, width) of the smallest, the most common and the largest.

    `smallest` and `largest` bound each dimension by itself. TensorRT refuses what lies outside, and is fastest at
    `most_common`.
    """

    smallest: Shape
    most_common: Shape
    largest: Shape

    def __post_init__(self) -> None:
        if not all(
            0 < low <= mid <= high for low, mid, high in zip(self.smallest, self.most_common, self.largest, strict=True)
        ):
            raise ValueError(f"smallest, most common and largest must be positive and in this order: {self}")


def profile(shapes: Iterable[Shape]) -> Profile:
    """The profile of inputs of these shapes, (batch, height, width). Raises `ValueError` for none."""
    counts = Counter(shapes)
    if not counts:
        raise ValueError("there must be at least one shape")
    batches, heights, widths = zip(*counts, strict=True)
    (most_common, _), *_ = counts.most_common(1)
    return Profile((min(batches), min(heights), min(widths)), most_common, (max(batches), max(heights), max(widths)))


@dataclass(frozen=True)
class TensorRtOptions:
    """How a graph is built with TensorRT.

    `cache_dir`: the folder of all engines. `workspace_mb`: 2^20 bytes that its tactics may use; 4096 is more than the
    convolutions of a GFL need at 800x1344, and what is too little makes TensorRT choose slower ones in silence.
    `min_subgraph`: nodes below which a part of the graph is not worth the copies around it.
    """

    profile: Profile
    cache_dir: Path
    workspace_mb: int = 4096
    min_subgraph: int = 3

    def __post_init__(self) -> None:
        if self.workspace_mb < 1 or self.min_subgraph < 1:
            raise ValueError("workspace_mb and min_subgraph must be at least 1")


@dataclass(frozen=True)
class Call:
    """A call of a method of `paddle.inference.Config`.

    `positional`: arguments that the method has no names for. A value of `precision_mode` is the name of a member of
    `paddle.inference.PrecisionType`.
    """

    method: str
    arguments: Mapping[str, Any]
    positional: tuple[Any, ...] = ()


def required(options: EngineOptions) -> TensorRtOptions:
    """How to build for these options. Raises `EngineError` if they do not say which shapes come."""
    if not options.shapes:
        raise EngineError(
            "TensorRT has to know the shapes of its inputs before",
            "Use `gfldeploy bench`, which takes them from the data.",
        )
    return TensorRtOptions(profile(options.shapes), options.cache_dir or DEFAULT_ENGINE_CACHE)


def example(shape: Shape) -> Tensors:
    """An input of this shape, to build an engine with."""
    batch, height, width = shape
    return {"image": np.zeros((batch, 3, height, width), np.float32)}


def cache_key(options: TensorRtOptions, depends_on: Mapping[str, str]) -> str:
    """A digest of all that a built engine depends on, so that it is never used for anything else."""
    shapes = options.profile
    everything = {
        **depends_on,
        "profile": [shapes.smallest, shapes.most_common, shapes.largest],
        "workspace_mb": options.workspace_mb,
        "min_subgraph": options.min_subgraph,
    }
    return digest_of(everything)


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


def onnxruntime_options(precision: Precision, options: TensorRtOptions, directory: Path) -> dict[str, str]:
    """Provider options of ONNX Runtime's TensorrtExecutionProvider, by the names in its documentation.

    INT8 is by the graph's own Q/DQ: no calibration table. FP16 is not allowed beside it: TensorRT would take it for the
    box arithmetic too, which FP16 cannot hold. `directory`: of the engine; the timing cache serves all engines.
    """
    shapes = options.profile
    return {
        "trt_fp16_enable": _flag(precision == "fp16"),
        "trt_int8_enable": _flag(precision == "int8"),
        "trt_max_workspace_size": str(options.workspace_mb * 2**20),
        "trt_min_subgraph_size": str(options.min_subgraph),
        "trt_profile_min_shapes": _named(shapes.smallest),
        "trt_profile_opt_shapes": _named(shapes.most_common),
        "trt_profile_max_shapes": _named(shapes.largest),
        "trt_engine_cache_enable": _flag(True),
        "trt_engine_cache_path": str(directory),
        "trt_timing_cache_enable": _flag(True),
        "trt_timing_cache_path": str(options.cache_dir),
    }


def paddle_calls(precision: Precision, options: TensorRtOptions, directory: Path) -> tuple[Call, ...]:
    """What `paddle.inference.Config` is told, in this order.

    `directory` keeps the serialised engine, and the shapes of the tensors inside the graph: a run that collects those
    comes before the first build (`shape_file`). INT8 is by the program's own quantize_linear operators: no calibration.
    """
    modes = {"fp32": "Float32", "fp16": "Half", "int8": "Int8"}
    calls = [
        Call("set_optim_cache_dir", {}, (str(directory),)),
        Call(
            "enable_tensorrt_engine",
            {
                "workspace_size": options.workspace_mb * 2**20,
                "max_batch_size": options.profile.largest[0],
                "min_subgraph_size": options.min_subgraph,
                "precision_mode": modes[precision],
                "use_static": True,
                "use_calib_mode": False,
            },
        ),
        Call(
            "enable_tuned_tensorrt_dynamic_shape",
            {"shape_range_info_path": str(shape_file(directory)), "allow_build_at_runtime": True},
        ),
    ]
    if precision == "int8":
        calls.append(Call("enable_tensorrt_explicit_quantization", {}))
    return tuple(calls)


def shape_file(directory: Path) -> Path:
    """Where Paddle keeps the shapes that tensors inside the graph have."""
    return directory / "shapes.pbtxt"


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


def _flag(value: bool) -> str:
    return "True" if value else "False"


def _named(shape: Shape) -> str:
    batch, height, width = shape
    return f"image:{batch}x3x{height}x{width}"
