"""When images arrive: random traces of requests of several sizes, with one latency bound."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, get_args

import numpy as np

from gfldeploy.batching.buckets import Size
from gfldeploy.batching.policy import Request

__all__ = ["KINDS", "Kind", "make_trace"]

# poisson: at a constant rate; bursty: a rate that jumps between a low and a high one, each kept for random times
# (a Markov-modulated Poisson process); diurnal: a rate that rises and falls as a sine.
Kind = Literal["poisson", "bursty", "diurnal"]
KINDS: tuple[Kind, ...] = get_args(Kind)

_BURST = (0.5, 2.0)  # times the mean rate, for twice as long in the low state
_SWING = 0.5


def make_trace(
    kind: Kind, rate: float, count: int, mix: Mapping[Size, float], bound_s: float, seed: int
) -> list[Request]:
    """`count` requests at a mean `rate` of images a second, each due `bound_s` seconds after it arrives.

    `mix`: the frequency of each size, in any unit. Raises `ValueError` for nothing to draw from.
    """
    if rate <= 0 or count < 1 or not mix:
        raise ValueError("rate and count must be positive, and there must be sizes")
    draw = np.random.default_rng(seed)
    arrivals = _ARRIVALS[kind](draw, rate, count)
    sizes: Sequence[Size] = list(mix)
    weights = np.array([mix[size] for size in sizes], dtype=np.float64)
    chosen = draw.choice(len(sizes), size=count, p=weights / weights.sum())
    return [
        Request(number, sizes[which], float(at), float(at) + bound_s)
        for number, (at, which) in enumerate(zip(arrivals, chosen, strict=True))
    ]


Draw = np.random.Generator


def _poisson(draw: Draw, rate: float, count: int) -> Sequence[float]:
    times: list[float] = np.cumsum(draw.exponential(1 / rate, count)).tolist()
    return times


def _bursty(draw: Draw, rate: float, count: int) -> Sequence[float]:
    stay_s = 20 / rate  # mean stay in the high state, twice that in the low one
    now, high, until = 0.0, False, float(draw.exponential(2 * stay_s))
    found: list[float] = []
    while len(found) < count:
        following = now + float(draw.exponential(1 / (rate * _BURST[high])))
        if following > until:  # without memory: draw again from the moment of the change
            now, high = until, not high
            until = now + float(draw.exponential(stay_s if high else 2 * stay_s))
        else:
            now = following
            found.append(now)
    return found


def _diurnal(draw: Draw, rate: float, count: int) -> Sequence[float]:
    day_s, now = count / rate, 0.0
    found: list[float] = []
    while len(found) < count:  # thinning (Lewis and Shedler 1979)
        now += float(draw.exponential(1 / (rate * (1 + _SWING))))
        if draw.random() * (1 + _SWING) < 1 + _SWING * math.sin(2 * math.pi * now / day_s):
            found.append(now)
    return found


_ARRIVALS: Mapping[Kind, Callable[[Draw, float, int], Sequence[float]]] = {
    "poisson": _poisson,
    "bursty": _bursty,
    "diurnal": _diurnal,
}
