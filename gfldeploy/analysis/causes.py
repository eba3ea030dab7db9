"""Why an image takes longer, or no less, in a larger batch: the change in its time, split by cause, in plain words."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from gfldeploy.analysis.sweep import Pass
from gfldeploy.batching.buckets import Order
from gfldeploy.bench.estimates import median
from gfldeploy.engines.base import Device

# What a change is split into: padding to the size of other images; convolutions that run at another rate; everything
# else in the network (normalisation, additions, resizing, box arithmetic), which memory limits; host work; copies to
# and from a GPU, which on a CPU are host work.
Part = Literal["padding", "convolutions", "memory", "network", "host", "transfers"]
PARTS: tuple[Part, ...] = get_args(Part)
Cause = Literal["starved", "padding", "convolutions", "memory", "network", "host", "transfers", "saturated", "faster"]

# A change of the time per image by less than this share is none: a user would not notice.
_NOTICEABLE = 0.05
# From so many rounds on, the two with the extreme changes count for the noise alone.
_ROUNDS_TO_TRIM = 5
# An engine is starved if others use this share of its CPUs; on an idle machine it is below 0.02.
_STARVED = 0.10
# Host work, or copies to and from a GPU, limit the speed if they take at least this share of the time.
_HOST_LIMITS = 0.5


@dataclass(frozen=True)
class Change:
    """Milliseconds of one image, against batch 1: the mean over the typical rounds (`analyze_passes`).

    `low`, `high`: the 95 % interval of the median of all rounds. Up to eight rounds it reaches from the smallest to the
    largest; below six it is less sure than 95 %.
    """

    ms: float
    low: float
    high: float

    @property
    def beyond_noise(self) -> bool:
        """Whether its sign is sure."""
        return self.low > 0 or self.high < 0

    def surely(self, least_ms: float) -> int:
        """1 if it is surely more than so many milliseconds, -1 if surely less than minus as many, else 0."""
        return int(self.low >= least_ms) - int(self.high <= -least_ms)


@dataclass(frozen=True)
class BatchAnalysis:
    """What becomes of the time of one image at `batch_size`, in listed batches.

    `ms`: from file to detections; `single_ms`: the same at batch 1; `bucketed_ms`: in bucketed batches. `change`: of
    `ms` against `single_ms`; `parts` and `unexplained_ms`, which no stage's timer saw, add up to it. Where the engine
    cannot tell its convolutions from the rest, `network` stands for both. `padding`: pixels of the batches by those of
    the images. `host_share`, `transfer_share`: of `ms`. `taken`: see `Pass`. `gmac_per_s`: 10^9 multiply-accumulates a
    second of the network in bucketed batches; `percent_of_peak`: of the most that the engine reaches here;
    `convolutions_percent_of_peak`: the same while convolutions run. These are None where unknown, and where the engine
    was starved, since it may not have been when the peak was measured. `cause`: the main one.
    """

    batch_size: int
    ms: float
    single_ms: float
    bucketed_ms: float
    change: Change
    parts: Mapping[Part, Change]
    unexplained_ms: float
    padding: float
    host_share: float
    transfer_share: float
    taken: float
    gmac_per_s: float | None
    percent_of_peak: float | None
    convolutions_percent_of_peak: float | None
    cause: Cause
    device: Device = "cpu"


def analyze_passes(
    rounds: Sequence[Sequence[Pass]],
    macs: float | None = None,
    peak_gmac_per_s: float | None = None,
    device: Device = "cpu",
) -> list[BatchAnalysis]:
    """Split the change of every batch size above 1, from `measure_passes` with `batch_orders`.

    `macs`: multiply-accumulates of one image without padding to others; `peak_gmac_per_s`: the most that the engine
    reaches here, 10^9 a second. Of five rounds or more, all but the two with the smallest and the largest change at a
    batch size are typical: times are means over these, so that one bad round moves none of them and the parts still add
    up. Raises `ValueError` without batch 1 or without both orders of a batch size.
    """
    by_round = [{(one.batch_size, one.order): one for one in passes} for passes in rounds]
    if any((1, "listed") not in found for found in by_round):
        raise ValueError("batch 1 was not measured")
    sizes = sorted({one.batch_size for one in rounds[0]} - {1})
    return [_analyze(size, by_round, macs, peak_gmac_per_s, device) for size in sizes]


def sentences(found: BatchAnalysis) -> tuple[str, str]:
    """What happens at this batch size, and what to do about it."""
    advice = _ADVICE_ON_GPUS.get(found.cause) if found.device == "gpu" else None
    return _what(found), (advice or _ADVICE[found.cause]).format(
        bucketed=f"{found.bucketed_ms:.1f} ms",
        gain=f"{found.ms / found.bucketed_ms:.2f}x",
        host=f"{found.host_share:.0%}",
        transfers=f"{found.transfer_share:.0%}",
        taken=f"{found.taken:.0%}",
        peak=_of_peak(found),
    )


_ADVICE: Mapping[Cause, str] = {
    "padding": "Put images of one input size into each batch (bucketed): {bucketed} an image ({gain} as fast).",
    "host": "Decoding, preprocessing and NMS take {host} of the time, which a larger batch does not change: run them "
    "beside the network, or on smaller images.",
    "convolutions": "Convolutions run slower in larger batches here, as their data outgrow the caches: use the smaller "
    "batch, or INT8, which needs a quarter of the memory.",
    "memory": "The operators between the convolutions wait for memory: use the smaller batch, or INT8, which moves a "
    "quarter of the bytes.",
    "network": "The network itself is slower in larger batches, without padding too: use the smaller batch.",
    "saturated": "The processor is saturated already{peak}, and a larger batch is only more of the same work: use "
    "INT8, a smaller input, or more cores.",
    "transfers": "Copies to and from the GPU take {transfers} of the time: copy the next batch while the network runs, "
    "as `gfldeploy predict` does, or use smaller images.",
    "starved": "The engine lacked {taken} of its CPUs: other processes use them, or there are fewer CPUs than threads; "
    "free them, or lower --threads.",
    "faster": "Batching pays here: use this size if its latency is short enough.",
}

_ADVICE_ON_GPUS: Mapping[Cause, str] = {
    "saturated": "The GPU is saturated already{peak}, and a larger batch is only more of the same work: use FP16, INT8 "
    "or a smaller input.",
    "starved": "Decoding, preprocessing and NMS take {host} of the time and lacked {taken} of the CPUs: other "
    "processes use them, or there are fewer CPUs than threads.",
}


def _what(found: BatchAnalysis) -> str:
    ratio = found.ms / found.single_ms
    start = f"At batch {found.batch_size} an image takes {found.ms:.1f} ms, {found.single_ms:.1f} ms at batch 1"
    if abs(ratio - 1) < _NOTICEABLE:
        hidden = f", though padding takes {found.parts['padding'].ms:.1f} ms of it" if found.cause == "padding" else ""
        return f"{start}: no change to speak of ({ratio:.2f}x){hidden}."
    if not found.change.surely(_NOTICEABLE * found.single_ms):
        low, high = (1 + ms / found.single_ms for ms in (found.change.low, found.change.high))
        return (
            f"{start} ({ratio:.2f}x), but by the rounds {low:.2f}x to {high:.2f}x: no change that is sure to be "
            "noticed; more rounds on a quieter machine may show one."
        )
    parts = sorted(found.parts.items(), key=lambda item: -abs(item[1].ms))
    told = [f"{PART_NAMES[name]} {change.ms:+.1f} ms" for name, change in parts if change.beyond_noise][:3]
    return f"{start} ({ratio:.2f}x){': ' if told else ''}{', '.join(told)}."


PART_NAMES: Mapping[Part, str] = {
    "padding": "padding",
    "convolutions": "convolutions",
    "memory": "the network's other work",
    "network": "the network",
    "host": "host work",
    "transfers": "copies to and from the GPU",
}


def _of_peak(found: BatchAnalysis) -> str:
    share = found.convolutions_percent_of_peak or found.percent_of_peak
    return f" (convolutions reach {share:.0f}% of what this engine can do here)" if share else ""


def _analyze(
    size: int,
    by_round: Sequence[Mapping[tuple[int, Order], Pass]],
    macs: float | None,
    peak: float | None,
    device: Device,
) -> BatchAnalysis:
    try:
        rows = [(found[1, "listed"], found[size, "listed"], found[size, "bucketed"]) for found in by_round]
    except KeyError as error:
        raise ValueError(f"batch {size} was not measured in both orders") from error
    changes = [listed.end_to_end_ms - single.end_to_end_ms for single, listed, _ in rows]
    order = sorted(range(len(changes)), key=lambda number: changes[number])
    typical = order[1:-1] if len(order) >= _ROUNDS_TO_TRIM else order
    change, parts = _change(changes, typical), {name: _change(ms, typical) for name, ms in _parts(rows, device).items()}

    def mean(values: Iterable[float]) -> float:
        every = list(values)
        return statistics.fmean(every[number] for number in typical)

    single, listed, bucketed = zip(*rows, strict=True)
    ms, single_ms = (mean(one.end_to_end_ms for one in passes) for passes in (listed, single))
    transfer_share = mean(_copied_ms(one, device) for one in listed) / ms
    host_share, taken = mean(one.host_ms for one in listed) / ms - transfer_share, mean(one.taken for one in listed)
    gmac_per_s = macs / mean(one.inference_ms for one in bucketed) / 1e6 if macs else None
    percent = 100 * gmac_per_s / peak if gmac_per_s and peak and taken < _STARVED else None
    share = bucketed[0].convolution_share
    return BatchAnalysis(
        batch_size=size,
        ms=ms,
        single_ms=single_ms,
        bucketed_ms=mean(one.end_to_end_ms for one in bucketed),
        change=change,
        parts=parts,
        unexplained_ms=change.ms - sum(one.ms for one in parts.values()),
        padding=listed[0].padding,
        host_share=host_share,
        transfer_share=transfer_share,
        taken=taken,
        gmac_per_s=gmac_per_s,
        percent_of_peak=percent,
        convolutions_percent_of_peak=percent / share if percent and share else None,
        cause=_cause(ms, single_ms, change, parts, host_share, transfer_share, taken, device),
        device=device,
    )


def _copied_ms(one: Pass, device: Device) -> float:
    return one.copy_ms if device == "gpu" else 0.0


def _parts(rows: Sequence[tuple[Pass, Pass, Pass]], device: Device) -> dict[Part, list[float]]:
    """The change of each part in milliseconds, by round: of a single image, a listed and a bucketed batch."""
    network = [bucketed.inference_ms - single.inference_ms for single, _, bucketed in rows]
    parts: dict[Part, list[float]] = {
        "padding": [listed.inference_ms - bucketed.inference_ms for _, listed, bucketed in rows]
    }
    if any(None in (single.convolution_share, bucketed.convolution_share) for single, _, bucketed in rows):
        parts["network"] = network
    else:
        parts["convolutions"] = [bucketed.convolutions_ms - single.convolutions_ms for single, _, bucketed in rows]
        parts["memory"] = [all_ms - ms for all_ms, ms in zip(network, parts["convolutions"], strict=True)]
    parts["host"] = [listed.host_ms - single.host_ms for single, listed, _ in rows]
    if device == "gpu":
        parts["transfers"] = [listed.copy_ms - single.copy_ms for single, listed, _ in rows]
        parts["host"] = [host - copies for host, copies in zip(parts["host"], parts["transfers"], strict=True)]
    return parts


def _cause(
    ms: float,
    single_ms: float,
    change: Change,
    parts: Mapping[Part, Change],
    host_share: float,
    transfer_share: float,
    taken: float,
    device: Device,
) -> Cause:
    # A GPU does not wait for the CPUs that an engine lacks: only host work does.
    if taken >= _STARVED and (device == "cpu" or host_share >= _HOST_LIMITS):
        return "starved"
    # A change has a cause only if even the low end of its interval would be noticed.
    sign = change.surely(_NOTICEABLE * single_ms)
    name = max(parts, key=lambda name: (parts[name].low > 0, parts[name].ms))
    if sign > 0:
        return name
    # The gain of batching may hide the cost of padding.
    if name == "padding" and parts[name].surely(_NOTICEABLE * ms) > 0:
        return name
    if sign < 0:
        return "faster"
    if transfer_share >= _HOST_LIMITS:
        return "transfers"
    return "host" if host_share >= _HOST_LIMITS else "saturated"


def _change(values: Sequence[float], typical: Sequence[int]) -> Change:
    known = median(values)
    low = min(values) if known.low is None else known.low
    high = max(values) if known.high is None else known.high
    return Change(statistics.fmean(values[number] for number in typical), low, high)
