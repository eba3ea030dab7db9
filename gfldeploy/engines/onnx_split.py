"""Cuts the FP16 graph of a detector in two: the network in FP16, and the decode, which makes boxes of what it gives.

An engine that chooses the precision of each operator itself, as TensorRT 10 does where FP16 is allowed, may then run
the network so and never sees the decode, whose coordinates FP16 cannot hold.
"""

from __future__ import annotations

from typing import Any

from gfldeploy.errors import EngineError

_CONVOLUTIONS = {"Conv", "ConvTranspose", "DeformConv"}
_REMEDY = "Export the model again."


def split_decode(model: Any) -> tuple[Any, Any]:
    """The network and the decode, as ONNX models; run one after the other they are `model`, which is left alone.

    The network is whatever a convolution depends on, and the Casts that take the results of the last convolutions from
    FP16 to FP32. These are its outputs, and the inputs of the decode, which is all the rest: the choice of candidates,
    the DFL integral and the boxes. GFLv2's statistics of the distribution are in the network, since convolutions read
    them, in FP16 in the file, too. Raises `EngineError` where the graph has no such place.
    """
    import onnx

    from_convolutions, network = _network(model.graph)
    decode = [node for index, node in enumerate(model.graph.node) if index not in network]
    first = [node for index, node in enumerate(model.graph.node) if index in network]
    given = {name for node in first for name in node.output}
    cast = {node.input[0]: node.output[0] for node in first if node.op_type == "Cast" and node.input[0] in given}
    decode = [_reading_float(node, cast) for node in decode]
    read = list(dict.fromkeys(name for node in decode for name in node.input if name in given))
    inputs = [value for value in model.graph.input if any(value.name in node.input for node in decode)]
    types = {value.name: value for value in onnx.shape_inference.infer_shapes(model).graph.value_info}
    computed = {name for node in decode if node.op_type != "Shape" for name in node.input}
    halves = [name for name in read if name in computed and _kind(types, name) == onnx.TensorProto.FLOAT16]
    if not from_convolutions or not decode or not read or halves:
        why = f"{halves[0]} is FP16" if halves else "nothing follows its convolutions"
        raise EngineError(f"the FP16 graph cannot be cut where its decode begins: {why}", _REMEDY)
    between = [types[name] for name in read]
    return _part(model, first, model.graph.input, between), _part(model, decode, inputs + between, model.graph.output)


def _network(graph: Any) -> tuple[set[int], set[int]]:
    """Indices of what the convolutions depend on, and of these nodes and of the Casts to FP32 that read them."""
    from onnx import TensorProto, helper

    makers = {name: index for index, node in enumerate(graph.node) for name in node.output}
    found: set[int] = set()
    pending = [index for index, node in enumerate(graph.node) if node.op_type in _CONVOLUTIONS]
    while pending:
        index = pending.pop()
        if index not in found:
            found.add(index)
            pending += [makers[name] for name in graph.node[index].input if name in makers]
    casts = {
        index
        for index, node in enumerate(graph.node)
        if node.op_type == "Cast"
        and makers.get(node.input[0]) in found
        and helper.get_node_attr_value(node, "to") == TensorProto.FLOAT
    }
    return found, found | casts


def _reading_float(node: Any, cast: dict[str, str]) -> Any:
    """A copy that reads the shape of what was cast to FP32 instead of that of the FP16 tensor, which is the same."""
    copy = type(node)()
    copy.CopyFrom(node)
    if copy.op_type == "Shape":
        copy.input[0] = cast.get(copy.input[0], copy.input[0])
    return copy


def _kind(types: dict[str, Any], name: str) -> int | None:
    return types[name].type.tensor_type.elem_type if name in types else None


def _part(model: Any, nodes: list[Any], inputs: Any, outputs: Any) -> Any:
    from onnx import helper

    used = {name for node in nodes for name in node.input}
    constants = [tensor for tensor in model.graph.initializer if tensor.name in used]
    graph = helper.make_graph(nodes, model.graph.name, list(inputs), list(outputs), constants)
    return helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)
