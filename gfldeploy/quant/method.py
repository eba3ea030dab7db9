"""What a method of quantising is: data, and functions that find thresholds or new weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gfldeploy.bundle import Bundle
from gfldeploy.errors import UnsupportedError
from gfldeploy.progress import SILENT, Progress
from gfldeploy.quant.calibration import Calibration

DEFAULT_STEPS = 200

# The clipping thresholds of a convolution's input, by weight name: one for each use in the order of the graph.
Thresholds = Mapping[str, Sequence[float]]


@dataclass(frozen=True)
class MethodOptions:
    """What the user asked for besides images: CPU `threads`, and the steps of a method that trains.

    `progress`: told how much is done.
    """

    threads: int = 1
    steps: int = DEFAULT_STEPS
    progress: Progress = field(default=SILENT, compare=False)


@dataclass(frozen=True)
class Refined:
    """An FP32 `bundle` with new weights, the `label` that records call it by, and what it adds to `parity.json`."""

    bundle: Bundle
    label: str
    record: Mapping[str, Any]


# (FP32 bundle, images, one of the method's algorithms, options) to thresholds. Convolutions that it leaves out stay in
# float. Raises `EngineError`.
Calibrate = Callable[[Bundle, Sequence[Path], str, MethodOptions], Thresholds]
# (FP32 bundle, images, its calibration, output directory, options) to an FP32 bundle there that loses less in INT8.
Refine = Callable[[Bundle, Sequence[Path], Calibration, Path, MethodOptions], Refined]


@dataclass(frozen=True)
class QuantMethod:
    """One choice of `--method`.

    `help`: what it does, a sentence without its subject. `algorithms`: the choices of `--algo`, the default first;
    `auto`: those that `--algo auto` tries; `unusable`: why an algorithm that users may know is none, and the remedy.
    `packages`: modules besides Paddle and ONNX Runtime that it needs. `refine`: changes the weights
    after the best calibration, and the result is calibrated once more; None if the method leaves them as they are.
    """

    name: str
    help: str
    algorithms: tuple[str, ...]
    calibrate: Calibrate
    refine: Refine | None = None
    auto: tuple[str, ...] = ()
    unusable: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    packages: tuple[str, ...] = ()

    def algorithms_of(self, name: str | None) -> tuple[str, ...]:
        """The algorithms that a value of `--algo` stands for: itself, all of `auto`, or for None the default.

        Raises `UnsupportedError`.
        """
        if name is None:
            return self.algorithms[:1]
        if name == "auto":
            return self.auto or self.algorithms
        if unusable := self.unusable.get(name):
            reason, remedy = unusable
            raise UnsupportedError(f"{name} does not quantise on this stack: {reason}", remedy)
        if name not in self.algorithms:
            raise UnsupportedError(
                f"method {self.name} has no algorithm {name!r}", f"Choose from: auto, {', '.join(self.algorithms)}."
            )
        return (name,)
