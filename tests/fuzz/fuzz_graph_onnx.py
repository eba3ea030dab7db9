"""A bundle's ONNX graph: what the guard lets through is counted, too."""

from __future__ import annotations

import random
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))

import onnx
from conftest import write_tiny_bundle
from mutations import mutate_bytes, mutate_message

from gfldeploy.graph_guard import check_graph
from gfldeploy.macs import count_work, peak_activations

_HOME = tempfile.TemporaryDirectory()
_TINY = (write_tiny_bundle(Path(_HOME.name) / "tiny") / "onnx/model.onnx").read_bytes()


def seeds() -> Iterable[bytes]:
    """The tiny detector, with and without an operator of each kind that makes tensors, and things that are refused."""
    yield _TINY
    model = onnx.ModelProto.FromString(_TINY)
    for kind, inputs in (
        ("ConstantOfShape", ["flat"]),
        ("Expand", ["bias", "flat"]),
        ("Tile", ["bias", "split"]),
        ("Resize", ["image", "", "", "flat"]),
        ("Pad", ["image", "flat"]),
        ("Range", ["split", "split", "split"]),
        ("Loop", ["flat", ""]),
    ):
        more = onnx.ModelProto()
        more.CopyFrom(model)
        node = more.graph.node.add(op_type=kind, input=inputs, output=["extra"])
        if kind == "Loop":
            node.attribute.add(name="body", type=onnx.AttributeProto.GRAPH).g.CopyFrom(model.graph)
        yield more.SerializeToString()


def mutate(data: bytes, rng: random.Random) -> bytes:
    """By fields of the message, where `data` is one."""
    try:
        model = onnx.ModelProto.FromString(data)
    except Exception:  # noqa: BLE001, whatever protobuf raises
        return mutate_bytes(data, rng)
    return mutate_message(model, rng)


def one(data: bytes, folder: Path) -> None:
    """Check, then count at two sizes."""
    path = folder / "model.onnx"
    path.write_bytes(data)
    check_graph("onnx", path, None)
    count_work(path, [(64, 96), (800, 1344)], (8,))
    peak_activations(path, [(64, 96)], (8,))
