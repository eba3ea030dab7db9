"""What Triton's own process offers a Python model as `triton_python_backend_utils`, for tests without that process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

OUTPUTS = ("boxes", "scores", "classes", "names", "count")


@dataclass
class Tensor:
    name: str
    array: NDArray[Any]

    def as_numpy(self) -> NDArray[Any]:
        return self.array


class TritonError:
    INTERNAL, INVALID_ARG, CANCELLED = "internal", "invalid", "cancelled"

    def __init__(self, text: str, code: str) -> None:
        self.text, self.code = text, code


@dataclass
class InferenceResponse:
    output_tensors: Sequence[Tensor] = ()
    error: TritonError | None = None


class TritonModelException(Exception):
    pass


@dataclass
class AskedOf:
    """A request; `outputs`: the names of those it wants."""

    inputs: dict[str, NDArray[Any]]
    cancelled: bool = False
    outputs: Sequence[str] = OUTPUTS

    def is_cancelled(self) -> bool:
        return self.cancelled

    def requested_output_names(self) -> list[str]:
        return list(self.outputs)


@dataclass
class Logger:
    lines: list[str] = field(default_factory=list)

    def log_info(self, text: str) -> None:
        self.lines.append(f"info: {text}")

    def log_warn(self, text: str) -> None:
        self.lines.append(f"warning: {text}")

    def log_error(self, text: str) -> None:
        self.lines.append(f"error: {text}")


def image_request(*images: bytes, threshold: float | None = None, **about: Any) -> AskedOf:
    inputs: dict[str, NDArray[Any]] = {"image": np.array([[image] for image in images], np.object_)}
    if threshold is not None:
        inputs["threshold"] = np.array([[threshold]], np.float32)
    return AskedOf(inputs, **about)


def triton_module() -> Any:
    module: Any = ModuleType("triton_python_backend_utils")
    module.Tensor, module.TritonError, module.InferenceResponse = Tensor, TritonError, InferenceResponse
    module.TritonModelException, module.Logger = TritonModelException, Logger()

    def get_input_tensor_by_name(request: AskedOf, name: str) -> Tensor | None:
        return Tensor(name, request.inputs[name]) if name in request.inputs else None

    module.get_input_tensor_by_name = get_input_tensor_by_name
    return module
