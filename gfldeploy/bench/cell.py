"""What a benchmark measures: the one declaration of its axes, and how a cell is named."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, Self, get_args

from gfldeploy.batching.buckets import Order, Size, size_in_words
from gfldeploy.batching.tiles import Tiling
from gfldeploy.bundle import Bundle
from gfldeploy.engines.base import DEVICES, PRECISIONS, Device, Precision, with_tf32
from gfldeploy.text import printable

# After MLPerf Inference. single-stream: one query of one image after the other; multi-stream: one query of several
# images after the other; offline: all images at once, in the order and batches that are fastest; server: images arrive
# at random times, whether or not the earlier ones are done. http: files of images are sent to a running server, at
# random times or by clients that wait for their answers (`gfldeploy load`).
Scenario = Literal["single-stream", "multi-stream", "offline", "server", "http"]
# Those that `bench` measures.
SCENARIOS: tuple[Scenario, ...] = ("single-stream", "multi-stream", "offline", "server")
# The two scenarios that the batch size tells apart.
STREAMS: tuple[Scenario, ...] = ("single-stream", "multi-stream")
# What a server does with the images that wait. no-batching: one after the other as they arrive; fixed-timeout: a batch
# as soon as it is full or its oldest image has waited for a tenth of the latency bound, Triton Inference Server's rule;
# adaptive: the dynamic batcher's (`batching.policy.Adaptive`).
ServerPolicy = Literal["no-batching", "fixed-timeout", "adaptive"]
POLICIES: tuple[ServerPolicy, ...] = get_args(ServerPolicy)

_ALLOWED = {
    "precision": PRECISIONS,
    "device": DEVICES,
    "order": ("listed", "bucketed"),
    "scenario": get_args(Scenario),
    "policy": (None, *POLICIES),
}


@dataclass(frozen=True)
class BundleIdentity:
    """A bundle's `name` in its manifest, the last part of its `directory`, as it is shown, and the SHA-256 of its
    manifest.

    Results are published: where the bundle lies on the machine that measured it is not part of it.
    """

    name: str
    directory: str
    digest: str

    @classmethod
    def of(cls, bundle: Bundle) -> Self:
        """The identity of an opened bundle."""
        return cls(bundle.name, printable(bundle.directory.resolve().name, keep=""), bundle.digest)


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One thing to measure: a bundle in an engine, in a scenario.

    `threads`: CPU threads of one inference. `order`: "listed" (batches of the images in their order) or "bucketed"
    (batches of images of one size), which takes all images at once: the offline scenario. `rate`: images arriving a
    second, and `policy`: how they become batches, in the server scenario alone; its `batch_size` is the largest that
    the policy may form. The http scenario has either a `rate` or a number of `clients`, each of which sends an image
    when its last one is answered; its `batch_size` is the largest that the server forms. `input_size`: (height, width)
    in pixels that images are resized to (`Bundle.at_size`), None for the bundle's own. `tf32`: FP32 on a GPU may
    multiply in TF32 (`EngineOptions`). `streams`: inferences at once from one engine; single-stream and multi-stream
    have one, since each query waits for the one before.
    `end_to_end`: the file that deploys by itself runs in place of the graph that it is made around, so that
    normalisation, padding and NMS are part of the network's time; not where images arrive at a server.
    `tiling`: how images are cut, None for whole ones. A query is then one image, with all its inferences, each of
    `batch_size` tiles of that image at most; not where images arrive at a server.
    """

    bundle: BundleIdentity
    engine: str
    precision: Precision
    device: Device
    threads: int
    batch_size: int
    order: Order = "listed"
    scenario: Scenario
    rate: float | None = None
    policy: ServerPolicy | None = None
    tf32: bool = False
    streams: int = 1
    input_size: Size | None = None
    clients: int | None = None
    end_to_end: bool = False
    tiling: Tiling | None = None

    def __post_init__(self) -> None:
        for name, allowed in _ALLOWED.items():
            if (value := getattr(self, name)) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(map(str, allowed))}, not {value!r}")
        if self.batch_size < 1 or self.threads < 1 or self.streams < 1:
            raise ValueError("batch_size, threads and streams must be at least 1")
        if self.input_size is not None and min(self.input_size) < 1:
            raise ValueError(f"input_size must be of at least one pixel, not {size_in_words(self.input_size)}")
        if self.streams > 1 and self.scenario in STREAMS:
            raise ValueError(f"{self.scenario} has one inference at once")
        if self.end_to_end and (self.scenario in ("server", "http") or self.device != "cpu"):
            raise ValueError("the file that deploys by itself is measured on CPUs, and not as a server")
        if self.tiling is not None and (self.end_to_end or self.is_server):
            raise ValueError("tiles are measured in networks, and not as a server")
        if self.tf32 and (self.precision, self.device) != ("fp32", "gpu"):
            raise ValueError("only FP32 on a GPU may multiply in TF32")
        if not suits(self.scenario, self.batch_size):
            raise ValueError(f"{self.scenario} does not go with batches of {self.batch_size}")
        if self.order == "bucketed" and self.scenario != "offline":
            raise ValueError("only the offline scenario has all images at once, to put those of one size into a batch")
        if (self.scenario == "server") != (self.policy is not None) or (
            (self.scenario == "server") != (self.rate is not None) and self.scenario != "http"
        ):
            raise ValueError("the server scenario has a rate and a policy, and no other has")
        if (self.clients is not None) != (self.scenario == "http" and self.rate is None):
            raise ValueError("the http scenario has either a rate or clients, and no other has clients")
        if self.clients is not None and self.clients < 1:
            raise ValueError("clients must be at least 1")
        if self.rate is not None and self.rate <= 0:
            raise ValueError("rate must be positive")
        if self.policy is not None and not forms(self.policy, self.batch_size):
            raise ValueError(f"{self.policy} does not go with batches of {self.batch_size}")

    def __str__(self) -> str:
        return f"{self.bundle.directory}: {self.name()}"

    def name(self, among: Iterable[Cell] = ()) -> str:
        """Such as "onnxruntime int8, batch 4": what tells it from the other cells `among` which it is shown."""
        return f"{self.setup(among)}, batch {self.batch_size}{self.load}"

    def setup(self, among: Iterable[Cell] = ()) -> str:
        """Engine and precision, TF32 included, the file that deploys by itself, several streams, tiles, and an input
        size that is not the bundle's own; the device, threads and bundle where the cells `among` differ in them.

        The bundle is named where an engine runs several in one precision.
        """
        cells = list(among)
        parts = [f"{self.engine} {with_tf32(self.precision, self.tf32)}"]
        if self.end_to_end:
            parts.append("by itself")
        if self.input_size is not None:
            parts.append(f"at {size_in_words(self.input_size)}")
        if self.tiling is not None:
            parts.append(f"in {self.tiling}")
        if len({cell.device for cell in cells}) > 1:
            parts.append(f"on {self.device}")
        if len({cell.threads for cell in cells}) > 1:
            parts.append(f"with {self.threads} thread{'s' if self.threads > 1 else ''}")
        if self.streams > 1:
            parts.append(f"in {self.streams} streams")
        if several_bundles(cells):
            parts.append(f"of {self.bundle.directory}")
        return " ".join(parts)

    @property
    def load(self) -> str:
        """The scenario where the batch size does not say it: ", offline", ", server at 5 images/s, adaptive" or
        ", http from 16 clients"."""
        if self.scenario in STREAMS:
            return ""
        if self.scenario == "offline" and self.order == "listed" and self.batch_size > 1:
            return ", offline as listed"
        at = f" at {self.rate:g} images/s" if self.rate else f" from {self.clients} clients" if self.clients else ""
        return f", {self.scenario}{at}{f', {self.policy}' if self.policy else ''}"

    @property
    def query_images(self) -> int:
        """Images of one query, of which latencies are."""
        return self.batch_size if self.tiling is None else 1

    @property
    def is_server(self) -> bool:
        """Whether its latencies are of single images that came to a server, from their arrival to their answer."""
        return self.scenario in ("server", "http")


def names(some: Sequence[Cell], every: Sequence[Cell], whole: bool = True) -> str:
    """Cells among `every` one, such as "onnxruntime int8, batch 1, 2; openvino bf16".

    `whole`: of a setup that has no other cells its name says enough.
    """
    setups = {cell: cell.setup(every) for cell in every}
    counts, parts = Counter(setups.values()), []
    for setup in dict.fromkeys(setups[cell] for cell in some):
        mine = [cell for cell in dict.fromkeys(some) if setups[cell] == setup]
        if whole and len(mine) == counts[setup]:
            parts.append(setup)
            continue
        for load in dict.fromkeys(cell.load for cell in mine):
            sizes = ", ".join(str(cell.batch_size) for cell in mine if cell.load == load)
            parts.append(f"{setup}, batch {sizes}{load}")
    return "; ".join(parts)


def several_bundles(cells: Collection[Cell]) -> bool:
    """Whether an engine runs several bundles in one precision, so that only the bundle tells the cells apart."""
    models = {(cell.engine, cell.precision) for cell in cells}
    return len({(cell.engine, cell.precision, cell.bundle) for cell in cells}) > len(models)


def suits(scenario: Scenario, batch_size: int) -> bool:
    """Whether the scenario takes batches of this size."""
    return scenario not in STREAMS or (scenario == "single-stream") == (batch_size == 1)


def forms(policy: ServerPolicy, batch_size: int) -> bool:
    """Whether the policy may form batches of this size at most."""
    return (policy == "no-batching") == (batch_size == 1)
