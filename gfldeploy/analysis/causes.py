"""Why an image takes longer in a larger batch, or no less: the change in its time, split by cause, in plain words."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from gfldeploy.analysis.passes import Arrangement, Pass

__all__ = ["PARTS", "PART_NAMES", "BatchAnalysis", "Cause", "Change", "Part", "analyze_passes", "sentences"]

# What a change is split into: padding to the size of other images; convolutions that run at another rate; everything
# else in the network (normalisation, additions, resizing, box arithmetic), which memory limits; host work.
Part = Literal["padding", "convolutions", "memory", "network", "host"]
PARTS: tuple[Part, ...] = ("padding", "convolutions", "memory", "network", "host")
Cause = Literal["starved", "padding", "convolutions", "memory", "network", "host", "saturated", "faster"]

# Time per image within this of batch 1's counts as no change: what a user would not see.
_NOTICEABLE = 0.05
# Others used this share of the engine's CPUs: far above what an idle machine shows (below 0.02).
_STARVED = 0.10
# Host work is what limits where it takes at least this share of the time.
_HOST_LIMITS = 0.5


@dataclass(frozen=True)
class Change:
    """Milliseconds of one image, against batch 1: the mean over the rounds, with the least and the most of a round."""

    ms: float
    low: float
    high: float

    @property
    def beyond_noise(self) -> bool:
        """Whether every round says the same of its sign."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True)
class BatchAnalysis:
    """What becomes of the time of one image at `batch_size`, in batches as the images are listed.

    `ms`: from file to detections; `single_ms`: the same at batch 1; `grouped_ms`: in batches of one size each.
    `change`: of `ms` against `single_ms`; `parts` add up to it but for `unexplained_ms`, what no stage's timer saw.
    Where the engine cannot tell its convolutions from the rest, `network` stands for both. `padding`: pixels of the
    batches by those of the images. `host_share`: of `ms`. `taken`: see `Pass`. `gmac_per_s`: multiply-accumulates a
    second of the network in grouped batches, 10^9; `percent_of_peak`: of what the engine reaches here at best;
    `convolutions_percent_of_peak`: the same while convolutions run; None where unknown. `cause`: the main one.
    """

    batch_size: int
    ms: float
    single_ms: float
    grouped_ms: float
    change: Change
    parts: Mapping[Part, Change]
    unexplained_ms: float
    padding: float
    host_share: float
    taken: float
    gmac_per_s: float | None
    percent_of_peak: float | None
    convolutions_percent_of_peak: float | None
    cause: Cause


def analyze_passes(
    rounds: Sequence[Sequence[Pass]], macs: float | None = None, peak_gmac_per_s: float | None = None
) -> list[BatchAnalysis]:
    """Split the change of every batch size above 1, from `measure_passes` with `arrangements`.

    `macs`: multiply-accumulates of one image without padding to others; `peak_gmac_per_s`: what the engine reaches here
    at best, 10^9 a second. Raises `ValueError` without batch 1 or without both orders of a batch size.
    """
    by_round = [{one.arrangement: one for one in passes} for passes in rounds]
    sizes = sorted({one.arrangement.batch_size for one in rounds[0]} - {1})
    if any(Arrangement(1, "listed") not in found for found in by_round):
        raise ValueError("batch 1 was not measured")
    return [_analyze(size, by_round, macs, peak_gmac_per_s) for size in sizes]


def sentences(found: BatchAnalysis) -> tuple[str, str]:
    """What happens at this batch size, and what to do about it."""
    return _what(found), _ADVICE[found.cause].format(
        batch=found.batch_size,
        grouped=f"{found.grouped_ms:.1f} ms",
        gain=f"{found.ms / found.grouped_ms:.2f}x",
        host=f"{found.host_share:.0%}",
        taken=f"{found.taken:.0%}",
        peak=_of_peak(found),
    )


_ADVICE: Mapping[Cause, str] = {
    "padding": "Group images by size: batches of one size each take {grouped} an image ({gain} as fast).",
    "host": "Decoding, preprocessing and NMS take {host} of the time: a larger batch leaves that as it is; run them "
    "beside the network, or on smaller images.",
    "convolutions": "Convolutions run slower in larger batches here, as what they work on outgrows the caches: stay at "
    "the smaller batch, or use INT8, which needs a quarter of the memory.",
    "memory": "What stands between the convolutions waits for memory: stay at the smaller batch, or use INT8, which "
    "moves a quarter of the bytes.",
    "network": "The network itself is slower in larger batches, without padding too: stay at the smaller batch.",
    "saturated": "The processor is saturated already{peak}: a larger batch is only more of the same work; what helps "
    "is INT8, a smaller input, or more cores.",
    "starved": "The engine had to do without {taken} of its CPUs: others use them, or there are fewer than threads; "
    "free them, or lower --threads.",
    "faster": "Batching pays here: use this size if its latency is short enough.",
}


def _what(found: BatchAnalysis) -> str:
    ratio = found.ms / found.single_ms
    head = f"At batch {found.batch_size} an image takes {found.ms:.1f} ms, {found.single_ms:.1f} ms at batch 1"
    if abs(ratio - 1) < _NOTICEABLE:
        return f"{head}: no change to speak of ({ratio:.2f}x)."
    if not found.change.beyond_noise:
        return f"{head} ({ratio:.2f}x), but the rounds do not agree on it: run more of them on a quieter machine."
    parts = sorted(found.parts.items(), key=lambda item: -abs(item[1].ms))
    told = [f"{PART_NAMES[name]} {change.ms:+.1f} ms" for name, change in parts if change.beyond_noise][:3]
    return f"{head} ({ratio:.2f}x){': ' if told else ''}{', '.join(told)}."


PART_NAMES: Mapping[Part, str] = {
    "padding": "padding",
    "convolutions": "convolutions",
    "memory": "the network's other work",
    "network": "the network",
    "host": "host work",
}


def _of_peak(found: BatchAnalysis) -> str:
    share = found.convolutions_percent_of_peak or found.percent_of_peak
    return f" (convolutions reach {share:.0f}% of what this engine can do here)" if share else ""


def _analyze(
    size: int, by_round: Sequence[Mapping[Arrangement, Pass]], macs: float | None, peak: float | None
) -> BatchAnalysis:
    single = [found[Arrangement(1, "listed")] for found in by_round]
    try:
        listed = [found[Arrangement(size, "listed")] for found in by_round]
        grouped = [found[Arrangement(size, "bucketed")] for found in by_round]
    except KeyError as error:
        raise ValueError(f"batch {size} was not measured in both orders") from error
    change = _change([many.end_to_end_ms - one.end_to_end_ms for many, one in zip(listed, single, strict=True)])
    parts = _parts(single, listed, grouped)
    ms, host_ms = _mean(one.end_to_end_ms for one in listed), _mean(one.host_ms for one in listed)
    inference_ms = _mean(one.inference_ms for one in grouped)
    gmac_per_s = macs / inference_ms / 1e6 if macs else None
    percent = 100 * gmac_per_s / peak if gmac_per_s and peak else None
    share = grouped[0].convolution_share
    single_ms, host_share = _mean(one.end_to_end_ms for one in single), host_ms / ms
    taken = _mean(one.taken for one in listed)
    return BatchAnalysis(
        batch_size=size,
        ms=ms,
        single_ms=single_ms,
        grouped_ms=_mean(one.end_to_end_ms for one in grouped),
        change=change,
        parts=parts,
        unexplained_ms=change.ms - sum(one.ms for one in parts.values()),
        padding=listed[0].padding,
        host_share=host_share,
        taken=taken,
        gmac_per_s=gmac_per_s,
        percent_of_peak=percent,
        convolutions_percent_of_peak=percent / share if percent and share else None,
        cause=_cause(ms, single_ms, change, parts, host_share, taken),
    )


def _parts(single: Sequence[Pass], listed: Sequence[Pass], grouped: Sequence[Pass]) -> dict[Part, Change]:
    rows = list(zip(single, listed, grouped, strict=True))
    parts: dict[Part, Change] = {"padding": _change([many.inference_ms - same.inference_ms for _, many, same in rows])}
    if all(one.convolution_share is not None and same.convolution_share is not None for one, _, same in rows):
        parts["convolutions"] = _change([_convolutions_ms(same) - _convolutions_ms(one) for one, _, same in rows])
        parts["memory"] = _change(
            [
                (same.inference_ms - _convolutions_ms(same)) - (one.inference_ms - _convolutions_ms(one))
                for one, _, same in rows
            ]
        )
    else:
        parts["network"] = _change([same.inference_ms - one.inference_ms for one, _, same in rows])
    parts["host"] = _change([many.host_ms - one.host_ms for one, many, _ in rows])
    return parts


def _cause(
    ms: float, single_ms: float, change: Change, parts: Mapping[Part, Change], host_share: float, taken: float
) -> Cause:
    ratio, name = ms / single_ms, max(parts, key=lambda name: parts[name].ms)
    if taken >= _STARVED:
        return "starved"
    if change.beyond_noise and ratio >= 1 + _NOTICEABLE:
        return name
    # What batching gains may hide what padding costs.
    if name == "padding" and parts[name].beyond_noise and parts[name].ms >= _NOTICEABLE * ms:
        return name
    if change.beyond_noise and ratio <= 1 - _NOTICEABLE:
        return "faster"
    return "host" if host_share >= _HOST_LIMITS else "saturated"


def _convolutions_ms(one: Pass) -> float:
    return one.inference_ms * (one.convolution_share or 0.0)


def _change(values: Sequence[float]) -> Change:
    return Change(statistics.fmean(values), min(values), max(values))


def _mean(values: Iterable[float]) -> float:
    return statistics.fmean(values)
