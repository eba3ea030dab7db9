"""Convolutions grouped by the paths of their layers, into parts of a detector that people can name."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from gfldeploy.errors import DataError
from gfldeploy.quant.calibration import ConvUse

_TOWERS = ["head", "conv_feat"]
# The number of a convolution in its tower: `fcos_head_cls_tower_conv_3`.
_NUMBER = re.compile(r"(_conv)?_?\d+$")
_LEVEL = re.compile(r"\[\d+\]$")


@dataclass(frozen=True)
class ConvGroup:
    """Uses of convolutions that belong together, and what the part of the detector is called."""

    name: str
    uses: tuple[ConvUse, ...]


def groups(layers: Mapping[str, str], uses: Iterable[ConvUse]) -> tuple[ConvGroup, ...]:
    """Group `uses`, in their order. `layers`: layer path by weight name, see `Bundle.layers`.

    Backbone and neck by the first two parts of the path (`backbone.res4`), and so the head's other parts; its towers
    each as one (`head.conv_feat.fcos_head_cls_tower`); its output convolutions, which are the head's own and shared by
    all levels, one group a level, finest first (`head.gfl_head_reg[0]`). A weight that `layers` does not have goes by
    its own name.
    """
    listed = tuple(uses)
    counts = Counter(use.weight for use in listed)
    found: dict[str, list[ConvUse]] = {}
    for use in listed:
        path = layers.get(use.weight, use.weight)
        found.setdefault(_group_of(path, use.use, counts[use.weight] > 1), []).append(use)
    return tuple(ConvGroup(name, tuple(members)) for name, members in found.items())


def match(layers: Mapping[str, str], uses: Iterable[ConvUse], patterns: Iterable[str]) -> frozenset[ConvUse]:
    """The uses whose layer path or group name fits one of `patterns`.

    `*` and `?` stand for any text and any character; brackets for themselves, as in `head.gfl_head_*[0]`. Raises
    `DataError` for a pattern that fits nothing.
    """
    listed = tuple(uses)
    named = groups(layers, listed)
    names = [(use, (layers.get(use.weight, use.weight), group.name)) for group in named for use in group.uses]
    chosen: set[ConvUse] = set()
    for pattern in patterns:
        literal = pattern.replace("[", "[[]")
        fitting = {use for use, both in names if any(fnmatchcase(name, literal) for name in both)}
        if not fitting:
            known = dict.fromkeys(_LEVEL.sub("[LEVEL]", group.name) for group in named)
            raise DataError(f"no layer and no group is called {pattern}", f"Groups: {', '.join(known)}.")
        chosen |= fitting
    return frozenset(chosen)


def _group_of(path: str, use: int, shared: bool) -> str:
    parts = path.split(".")
    if parts[:2] == _TOWERS and len(parts) > 2:
        return ".".join((*_TOWERS, _NUMBER.sub("", parts[2]) or parts[2]))
    if parts[0] == "head" and len(parts) == 2 and shared:
        return f"{path}[{use}]"
    return ".".join(parts[:2])
