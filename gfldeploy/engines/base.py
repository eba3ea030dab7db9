"""What every inference engine looks like from outside."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Protocol, Self, get_args, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from gfldeploy.errors import EngineError

__all__ = [
    "DEVICES",
    "NOT_ASKED",
    "PRECISIONS",
    "SHARE_RUNS",
    "ClosesOnExit",
    "CopyTimes",
    "Device",
    "Engine",
    "EngineOptions",
    "ExecutedConvolution",
    "Precision",
    "ReportsPrecision",
    "Tensors",
    "TimesConvolutions",
    "TimesCopies",
    "count_precisions",
    "reasons",
]

Precision = Literal["fp32", "fp16", "bf16", "int8"]
Device = Literal["cpu", "gpu"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
DEVICES: tuple[Device, ...] = get_args(Device)

Tensors = Mapping[str, NDArray[np.float32]]

if TYPE_CHECKING:
    from gfldeploy.engines.tensorrt import TensorRtOptions

SHARE_RUNS = 3  # inferences behind a `convolution_share`
NOT_ASKED = "FP32 was asked for"
_MOST_THREADS = 1024


@dataclass(frozen=True)
class EngineOptions:
    """How an engine runs a bundle.

        `threads` is the number of CPU threads of one inference, at least 1; `EngineError` is raised for more than
    any machine runs, as engines start them all. `tensorrt`: for the engines that build with it, which need it.
    `cache_dir`: where other engines keep what they compiled, None for nowhere. `shapes`: (batch, height, width) of
    the inputs to come, the most common first, for engines that compile for shapes: what runs an input then depends
    on these, not on the inputs before it; () where they are not known.
    """

    precision: Precision = "fp32"
    device: Device = "cpu"
    threads: int = 1
    tensorrt: TensorRtOptions | None = None
    cache_dir: Path | None = None
    shapes: tuple[tuple[int, int, int], ...] = ()

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, not {self.precision!r}")
        if self.device not in DEVICES:
            raise ValueError(f"device must be one of {', '.join(DEVICES)}, not {self.device!r}")
        if self.threads < 1:
            raise ValueError(f"threads must be at least 1, not {self.threads}")
        if self.threads > (most := max(_MOST_THREADS, os.cpu_count() or 1)):
            raise EngineError(f"{self.threads:,} threads are more than {most:,}", "Use as many as there are CPU cores.")


@runtime_checkable
class Engine(Protocol):
    """A loaded model, used as a context manager; leaving the block frees it.

    `infer` takes `{"image": float32 [N, 3, H, W]}` and returns
    `{"scores": float32 [N, A, C], "boxes": float32 [N, A, 4]}`, boxes as x1, y1, x2, y2 in pixels of the network input;
    of a bundle that decodes K candidates, A is K, and `"anchors"` int32 [N, K] says which they are, -1 for none.
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

    def infer(self, inputs: Tensors) -> dict[str, NDArray[Any]]: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class CopyTimes:
    """Milliseconds of one inference: host to device, the inference itself, device to host.

    On a CPU the copies are those into and out of the engine's own buffers, 0 where it has none.
    """

    input_copy_ms: float
    inference_ms: float
    output_copy_ms: float


@runtime_checkable
class TimesCopies(Protocol):
    """An engine that can tell its copies from its computing."""

    def infer_timed(self, inputs: Tensors) -> tuple[dict[str, NDArray[Any]], CopyTimes]:
        """As `infer`, the same outputs to the bit, with the times of its parts."""
        ...


@runtime_checkable
class TimesConvolutions(Protocol):
    """An engine that can tell how long its convolutions take."""

    def convolution_share(self, inputs: Tensors) -> float | None:
        """The share, 0 to 1, of the time of one inference that its convolutions take; None where it cannot be told.

        It infers `inputs` a few times. Raises `EngineError`.
        """
        ...


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


@dataclass(frozen=True)
class ExecutedConvolution:
    """One convolution of one inference, as the engine itself tells of it.

    `precision`: that it ran in. `what`: how the engine identifies it, by its weight name where it can, with "use N" (0
    is the first in the file) where several share the weight, else by its shape or the name of its node. `why` it did
    not run in less than FP32; None if it did.
    """

    precision: str
    what: str
    why: str | None = None


@runtime_checkable
class ReportsPrecision(Protocol):
    """An engine that can tell what it really ran."""

    def executed_convolutions(self, inputs: Tensors) -> tuple[ExecutedConvolution, ...]:
        """The convolutions of one inference of `inputs`; none where the engine cannot tell. Raises `EngineError`."""
        ...

    def executed_precisions(self, inputs: Tensors) -> dict[str, int]:
        """Number of convolutions of one inference of `inputs`, by the precision that they ran in.

        Empty where the engine cannot tell. Raises `EngineError`.
        """
        return count_precisions(self.executed_convolutions(inputs))


def count_precisions(convolutions: Iterable[ExecutedConvolution]) -> dict[str, int]:
    """Number of convolutions by the precision that they ran in."""
    return dict(sorted(Counter(one.precision for one in convolutions).items()))


def reasons(convolutions: Iterable[ExecutedConvolution]) -> tuple[str, ...]:
    """Why those convolutions that did not run in less than FP32 did not: a line for each reason, the most common first.

    A line reads `REASON (COUNT): WHAT, WHAT xCOUNT, ...`.
    """
    found: dict[str, Counter[str]] = defaultdict(Counter)
    for one in convolutions:
        if one.why is not None:
            found[one.why][one.what] += 1
    return tuple(
        f"{why} ({which.total()}): {', '.join(f'{what} x{n}' if n > 1 else what for what, n in which.items())}"
        for why, which in sorted(found.items(), key=lambda item: -item[1].total())
    )
