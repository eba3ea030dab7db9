"""Graphs that hold anything but arithmetic, or ask for absurd sizes, are refused before anything loads them."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gfldeploy.errors import BundleError
from gfldeploy.graph_guard import ONNX_OPERATORS, check_graph

onnx = pytest.importorskip("onnx")


def refusal(name: str, model: Path, params: Path | None = None) -> str:
    with pytest.raises(BundleError) as caught:
        check_graph(name, model, params)
    assert str(model.parent) in str(caught.value)
    assert "\n" not in str(caught.value)
    return caught.value.problem


# --- ONNX -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def changed(tiny_bundle: Path, tmp_path: Path) -> Callable[[Callable[[Any], object]], Path]:
    def write(change: Callable[[Any], object]) -> Path:
        model = onnx.load(str(tiny_bundle / "onnx/model.onnx"))
        change(model)
        path = tmp_path / "model.onnx"
        path.write_bytes(model.SerializeToString())
        return path

    return write


def node(kind: str, inputs: Iterable[str] = ("image",), **attributes: Any) -> Callable[[Any], object]:
    return lambda model: model.graph.node.append(onnx.helper.make_node(kind, list(inputs), ["new"], **attributes))


def external(model: Any) -> None:
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="/etc/passwd")


def constant(name: str, values: Any) -> Callable[[Any], object]:
    return lambda model: model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(values), name))


def both(*changes: Callable[[Any], object]) -> Callable[[Any], object]:
    return lambda model: [change(model) for change in changes]


def shapes_of(kind: str, inputs: Iterable[str], values: list[int]) -> Callable[[Any], object]:
    return both(constant("huge", np.array(values, np.int64)), node(kind, inputs))


SUBGRAPH = onnx.helper.make_graph([], "body", [], [])
BRANCH = onnx.helper.make_graph([onnx.helper.make_node("ReadFile", [], ["x"])], "branch", [], [])
DEEP = SUBGRAPH
for _ in range(5):
    DEEP = onnx.helper.make_graph([onnx.helper.make_node("If", ["c"], ["x"], then_branch=DEEP)], "deep", [], [])
HOSTILE: dict[str, tuple[Callable[[Any], object], str]] = {
    "domain": (node("Gelu", domain="com.microsoft"), "domain 'com.microsoft'"),
    "imported domain": (lambda model: model.opset_import.add(domain="evil", version=1), "domain 'evil'"),
    "scan": (node("Scan", body=SUBGRAPH, num_scan_inputs=1), "operator 'Scan' has a graph of its own"),
    "loop without end": (
        lambda model: [constant("turns", np.int64(2**62))(model), node("Loop", ["turns"], body=SUBGRAPH)(model)],
        "Loop makes",
    ),
    "hidden in a loop": (lambda model: node("Loop", body=BRANCH)(model), "operator 'ReadFile'"),
    "hidden in a branch": (node("If", then_branch=BRANCH, else_branch=SUBGRAPH), "operator 'ReadFile'"),
    "branches without end": (node("If", then_branch=DEEP), "operator 'If' has a graph of its own"),
    "random": (node("RandomNormal", [], shape=[3]), "operator 'RandomNormal'"),
    "files": (node("ImageDecoder"), "operator 'ImageDecoder'"),
    "unheard of": (node("ReadFile"), "operator 'ReadFile'"),
    "function": (lambda model: model.functions.add(name="f"), "model has the field 25"),
    "metadata": (lambda model: model.metadata_props.add(key="ort_config", value="{}"), "has the metadata 'ort_config'"),
    "training": (lambda model: model.training_info.add(), "model has the field 20"),
    "external data": (external, "tensor has the field 13"),
    "sparse": (lambda model: model.graph.sparse_initializer.add(), "graph has the field 15"),
    "text": (lambda model: model.graph.initializer.add(name="t", data_type=8, string_data=[b"x"]), "field 6"),
    "shape product": (lambda model: model.graph.initializer[0].dims.append(10**9), "damaged: a tensor of shape"),
    "negative shape": (lambda model: model.graph.initializer[0].dims.insert(0, -1), "damaged: a tensor has the shape"),
    "constant of shape": (shapes_of("ConstantOfShape", ["huge"], [10**6, 10**6]), "ConstantOfShape makes a tensor"),
    "expand": (shapes_of("Expand", ["bias", "huge"], [10**9, 1]), "Expand makes a tensor"),
    "tile": (shapes_of("Tile", ["image", "huge"], [1, 1, 10**5, 1]), "Tile makes a tensor"),
    "resize": (shapes_of("Resize", ["image", "", "", "huge"], [1, 3, 10**6, 10**6]), "Resize makes a tensor"),
    "range": (shapes_of("Range", ["split", "huge", "split"], [2**62]), "Range makes a tensor"),
    "pad": (node("AveragePool", kernel_shape=[3, 3], pads=[10**9] * 4), "pads of 1,000,000,000"),
    "stride": (node("AveragePool", kernel_shape=[3, 3], strides=[0, 1]), "strides of 0"),
    "group": (node("Conv", ["image", "weights"], group=-3), "group of -3"),
    "no graph": (lambda model: model.ClearField("graph"), "no graph"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_onnx_graphs_that_are_refused(name: str, changed: Callable[[Callable[[Any], object]], Path]) -> None:
    change, message = HOSTILE[name]
    assert message in refusal("onnx", changed(change))


def test_arithmetic_passes(changed: Callable[[Callable[[Any], object]], Path], tiny_bundle: Path) -> None:
    check_graph("onnx", tiny_bundle / "onnx/model.onnx", None)
    sizes = constant("four", np.array([1, 3, 64, 64], np.int64))
    check_graph("onnx", changed(both(sizes, node("Resize", ["image", "", "", "four"]))), None)
    check_graph("onnx", changed(node("If", then_branch=SUBGRAPH, else_branch=SUBGRAPH)), None)
    check_graph("onnx", changed(node("DeformConv", ["image", "weights", "offset"], kernel_shape=[3, 3])), None)
    check_graph(
        "onnx", changed(both(constant("end", np.array([2**63 - 1], np.int64)), node("Slice", ["image", "end"]))), None
    )


def test_every_listed_operator_exists() -> None:
    known = {schema.name for schema in onnx.defs.get_all_schemas_with_history() if schema.domain == ""}
    newer = {"RMSNormalization", "Swish"}  # than the oldest onnx that is supported
    assert ONNX_OPERATORS - known <= newer


@pytest.mark.parametrize(
    "content", [b"", b"\xff" * 99, b"\x08", b"\x3a\xff\xff\xff\xff\x0f", b"\x0b\x0c", b"\x80" * 20]
)
def test_bytes_that_are_no_onnx(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(content)
    assert re.search("damaged|refused", refusal("onnx", tmp_path / "model.onnx"))


def test_another_format_under_the_name(tmp_path: Path) -> None:
    (tmp_path / "model.xml").write_text("<net/>")  # which OpenVINO would read with what lies beside it
    assert "no file of a graph that is called onnx" in refusal("onnx", tmp_path / "model.xml")


# --- Paddle's older programs, written byte by byte: no Paddle ---------------------------------------------------------


def number(field: int, value: int) -> bytes:
    return varint(field << 3) + varint(value & (2**64 - 1))


def message(field: int, *parts: bytes) -> bytes:
    content = b"".join(parts)
    return varint(field << 3 | 2) + varint(len(content)) + content


def varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes((*out, value))


def operator(kind: str, inputs: bytes = b"", outputs: bytes = b"", *attributes: bytes) -> bytes:
    return message(4, inputs, outputs, message(3, kind.encode()), *attributes)


def slot(field: int, name: str, *tensors: str) -> bytes:
    return message(field, message(1, name.encode()), *(message(2, tensor.encode()) for tensor in tensors))


def whole(name: str, *values: int) -> bytes:
    return message(4, message(1, name.encode()), number(2, 11), *(number(15, value) for value in values))


WEIGHT = message(
    3, message(1, b"weight"), message(2, number(1, 7), message(3, message(1, number(1, 5), number(2, 4)))), number(3, 1)
)


def program(*operators: bytes, more: bytes = b"") -> bytes:
    return message(1, number(1, 0), number(2, 0), WEIGHT, *operators) + more


PROGRAMS: dict[str, tuple[bytes, str]] = {
    "save": (program(operator("relu"), operator("save")), "operator 'save'"),
    "python": (program(operator("py_func")), "operator 'py_func'"),
    "run_program": (program(operator("run_program")), "operator 'run_program'"),
    "load": (program(operator("load_combine")), "operator 'load_combine'"),
    "print": (program(operator("print")), "operator 'print'"),
    "custom": (program(operator("custom_relu")), "operator 'custom_relu'"),
    "uninitialised memory": (program(operator("empty")), "operator 'empty'"),
    "two blocks": (program(operator("relu"), more=message(1, number(1, 1))), "blocks besides"),
    "block attribute": (
        program(operator("relu", b"", b"", message(4, message(1, b"x"), number(2, 8)))),
        "block of its own",
    ),
    "block number": (
        program(operator("relu", b"", b"", message(4, message(1, b"x"), number(2, 0), number(12, 1)))),
        "field 12",
    ),
    "two types": (program(message(4, message(3, b"relu"), message(3, b"save"))), "occurs twice"),
    "fill": (program(operator("fill_constant", b"", b"", whole("shape", 10**6, 10**6))), "fill_constant makes"),
    "tile": (program(operator("tile", b"", b"", whole("repeat_times", 10**9))), "tile makes"),
    "range": (
        program(
            operator("fill_constant", b"", slot(2, "Out", "end"), whole("value", 2**60)),
            operator("range", slot(1, "End", "end")),
        ),
        "range makes",
    ),
    "stride": (program(operator("pool2d", b"", b"", whole("paddings", 2**40))), "paddings of"),
    "unknown field": (program(more=number(9, 1)), "field 9"),
    "cut": (program(operator("relu"))[:-3], "damaged"),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_programs_that_are_refused(name: str, tmp_path: Path) -> None:
    content, expected = PROGRAMS[name]
    (tmp_path / "model.pdmodel").write_bytes(content)
    assert expected in refusal("paddle_program", tmp_path / "model.pdmodel")


def parameter(*sizes: int, values: int) -> bytes:
    description = number(1, 5) + b"".join(number(2, size) for size in sizes)
    return struct.pack("<IQIi", 0, 0, 0, len(description)) + description + bytes(4 * values)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (parameter(4, values=4), None),
        (parameter(1, 4, values=4), None),  # PaddleSlim's scales
        (b"", "cut off before the parameter 'weight'"),
        (parameter(4, values=3), "parameters 40"),
        (parameter(4, values=5), "parameters 40"),
        (parameter(10**9, 10**9, values=4), "another parameter than 'weight'"),
        (b"\1" + parameter(4, values=4)[1:], "does not hold the parameters"),
        (struct.pack("<IQIi", 0, 2**60, 0, 4), "does not hold the parameters"),
        (struct.pack("<IQIi", 0, 0, 0, 2**31 - 1), "does not hold the parameters"),
    ],
)
def test_parameters(content: bytes, expected: str | None, tmp_path: Path) -> None:
    model, params = tmp_path / "model.pdmodel", tmp_path / "model.pdiparams"
    model.write_bytes(program(operator("conv2d")))
    params.write_bytes(content)
    if expected is None:
        check_graph("paddle_program", model, params)
    else:
        assert expected in refusal("paddle_program", model, params)


# --- PIR --------------------------------------------------------------------------------------------------------------


def pir(*operators: dict[str, Any], **more: Any) -> str:
    block = {"#": "block_0", "args": [], "ops": list(operators)}
    regions = [{"#": "region_0", "blocks": [block]}]
    return json.dumps({"base_code": {"magic": "pir", "version": 3}, "program": {"regions": regions}, **more})


def one(kind: str, inputs: Iterable[int] = (), output: int = 9, **attributes: Any) -> dict[str, Any]:
    listed = [{"N": name, "AT": {"#": "0.a_array", "D": value}} for name, value in attributes.items()]
    return {"#": kind, "A": listed, "I": [{"%": number} for number in inputs], "O": [{"%": output}], "OA": []}


RELU = one("1.relu")
PIR: dict[str, tuple[str, str | None]] = {
    "good": (pir(one("1.full", (), 1, shape=[2, 3]), one("1.batch_norm_"), one("0.combine"), RELU), None),
    "save": (pir(one("1.save_combine")), "operator 'save_combine'"),
    "load": (pir(one("1.load_combine")), "operator 'load_combine'"),
    "python": (pir(one("1.py_func")), "operator 'py_func'"),
    "control flow": (pir(one("2.while")), "operator '2.while'"),
    "custom": (pir(one("3.custom_op")), "operator '3.custom_op'"),
    "builtin": (pir(one("0.set_parameter")), "operator '0.set_parameter'"),
    "inner block": (pir(RELU | {"regions": []}), "block of its own"),
    "other parts": (pir(RELU, patch={}), "unknown parts"),
    "twice": ('{"base_code": {}, "program": {}, "program": {}}', "a key occurs twice"),
    "full": (pir(one("1.full", shape=[10**6, 10**6])), "full makes"),
    "tile": (pir(one("1.full_int_array", (), 1, value=[{"D": 10**9}]), one("1.tile", (0, 1))), "tile makes"),
    "interp": (pir(one("1.nearest_interp", out_h=10**9)), "nearest_interp makes"),
    "deep": ("[" * 100_000, "nested too deeply"),
    "numbers": (pir({"#": 5}), "damaged"),
    "no JSON": ("hello", "damaged"),
}


@pytest.mark.parametrize("name", PIR)
def test_pir_graphs(name: str, tmp_path: Path) -> None:
    content, expected = PIR[name]
    (tmp_path / "model.json").write_text(content)
    if expected is None:
        check_graph("paddle", tmp_path / "model.json", None)
    else:
        assert expected in refusal("paddle", tmp_path / "model.json")
