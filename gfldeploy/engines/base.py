"""What every inference engine looks like from outside."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Literal, Protocol, Self, get_args, runtime_checkable

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "DEVICES",
    "PRECISIONS",
    "ClosesOnExit",
    "Device",
    "Engine",
    "EngineOptions",
    "Precision",
    "ReportsPrecision",
    "Tensors",
]

Precision = Literal["fp32", "fp16", "bf16", "int8"]
Device = Literal["cpu", "gpu"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
DEVICES: tuple[Device, ...] = get_args(Device)

Tensors = Mapping[str, NDArray[np.float32]]


@dataclass(frozen=True)
class EngineOptions:
    """How an engine runs a bundle.

    `threads` is the number of CPU threads of one inference; it must be at least 1.
    """

    precision: Precision = "fp32"
    device: Device = "cpu"
    threads: int = 1

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, not {self.precision!r}")
        if self.device not in DEVICES:
            raise ValueError(f"device must be one of {', '.join(DEVICES)}, not {self.device!r}")
        if self.threads < 1:
            raise ValueError(f"threads must be at least 1, not {self.threads}")


@runtime_checkable
class Engine(Protocol):
    """A loaded model, used as a context manager; leaving the block frees it.

    `infer` takes `{"image": float32 [N, 3, H, W]}` and returns
    `{"scores": float32 [N, A, C], "boxes": float32 [N, A, 4]}`, boxes as x1, y1, x2, y2 in pixels of the network input.
    The arrays returned are the caller's to keep: a later `infer` never overwrites them.
    It raises `EngineError` when the engine refuses the input or fails.
    """

    name: str
    version: str
    options: EngineOptions

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def infer(self, inputs: Tensors) -> dict[str, NDArray[np.float32]]: ...

    def close(self) -> None: ...


class ClosesOnExit:
    """The context manager half of an `Engine`."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        raise NotImplementedError


@runtime_checkable
class ReportsPrecision(Protocol):
    """An engine that can tell what it really ran."""

    def executed_precisions(self, inputs: Tensors) -> dict[str, int]:
        """Number of convolutions of one inference of `inputs`, by the precision that they ran in.

        Empty where the engine cannot tell. Raises `EngineError`.
        """
        ...
