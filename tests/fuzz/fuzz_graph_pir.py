"""A bundle's PIR graph, which is JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from gfldeploy.graph_guard import check_graph


def _output(number: int, shape: list[int]) -> list[dict[str, Any]]:
    return [{"%": number, "TT": {"#": "0.t_dtensor", "D": [{"#": "0.t_f32"}, shape, "NCHW", [], 0]}}]


def _operator(kind: str, inputs: list[int], output: int, **attributes: Any) -> dict[str, Any]:
    listed = [{"N": name, "AT": {"#": "0.a", "D": value}} for name, value in attributes.items()]
    return {"#": kind, "A": listed, "I": [{"%": one} for one in inputs], "O": _output(output, [1]), "OA": []}


def seeds() -> Iterable[bytes]:
    """One convolution and one more operator."""
    for more in (
        _operator("1.full", [], 4, shape=[2, 3], value=1.5),
        _operator("1.tile", [3, 2], 4),
        _operator("1.nearest_interp", [3], 4, out_h=8, out_w=8, scale=[2.0, 2.0]),
        _operator("1.save_combine", [3], 4, file_path="x"),
        _operator("2.while", [3], 4) | {"regions": [{"blocks": []}]},
    ):
        parameter = {"#": "p", "A": [0, 1, 1, "weight"], "O": _output(1, [4, 3, 1, 1])[0], "OA": []}
        ops = [
            parameter,
            _operator("1.data", [], 2, name="image", shape=[-1, 3, -1, -1]),
            _operator("1.conv2d", [2, 1], 3, strides=[{"D": 1}, {"D": 1}]),
            _operator("1.full_int_array", [], 5, value=[{"D": 1}, {"D": 4}]),
            more,
        ]
        program = {"regions": [{"#": "region_0", "blocks": [{"#": "block_0", "args": [], "ops": ops}]}]}
        yield json.dumps({"base_code": {"magic": "pir", "version": 3}, "program": program}).encode()


def one(data: bytes, folder: Path) -> None:
    """The graph without its parameters."""
    (folder / "model.json").write_bytes(data)
    check_graph("paddle", folder / "model.json", None)
