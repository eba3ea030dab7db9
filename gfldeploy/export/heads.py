"""The table of heads that can be exported, and what differs between them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class HeadSpec:
    """One head of PaddleDetection.

    `architecture`: the one whose detectors have it. `strides` and `reg_max`: its arguments for the pixels between cells
    of each level, and for the largest distance of a side, in strides. `class_output` and `box_output`: its last
    convolutions. `graph`: imports the Layer that is exported, which takes a detector and a number of candidates and
    does what `gfl_graph.GflGraph` says.
    """

    name: str
    architecture: str
    strides: str
    reg_max: str
    class_output: str
    box_output: str
    graph: Callable[[], Any]


def _gfl_graph() -> Any:
    from gfldeploy.export.gfl_graph import GflGraph

    return GflGraph


HEADS: dict[str, HeadSpec] = {
    name: HeadSpec(name, "GFL", "fpn_stride", "reg_max", "gfl_head_cls", "gfl_head_reg", _gfl_graph)
    for name in ("GFLHead", "LDGFLHead")
}
ARCHITECTURES = tuple(dict.fromkeys(head.architecture for head in HEADS.values()))
