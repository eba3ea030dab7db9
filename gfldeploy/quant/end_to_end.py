"""The files of an INT8 bundle that deploy by themselves, around its ONNX graphs, and whether they hold."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from gfldeploy.bundle import END_TO_END, Bundle, Graph, GraphName
from gfldeploy.engines.base import Engine, EngineOptions
from gfldeploy.engines.registry import graph_for, load_graph
from gfldeploy.errors import EngineError, ParityError
from gfldeploy.export import half
from gfldeploy.export.end_to_end import obstacle, write_end_to_end
from gfldeploy.export.end_to_end_parity import EndToEndComparison, compare_end_to_end
from gfldeploy.progress import Progress
from gfldeploy.quant.measurement import SimulatedTensorRT, int8_engines
from gfldeploy.quant.tensorrt import check_tensorrt

# An engine may round a number between two INT8 convolutions the other way in another graph: a step of 1/127.
_TOLERANCE = half.TOLERANCE


def add_end_to_end(bundle: Bundle, threads: int, progress: Progress) -> tuple[Bundle, list[EndToEndComparison]]:
    """Write them into the bundle's directory; return the bundle with those that hold, and how they compare.

    `bundle`: with the graphs of INT8, and the rest of the FP32 bundle's manifest, whose reason to have none holds here
    too. In each engine a file must give the detections of the graph that it is made around, which passed the gate;
    TensorRT's must keep its rules as well. What does not is left out with the reason. Raises `OutputError`.
    """
    manifest = bundle.manifest
    why = manifest.left_out.get("end_to_end") or obstacle(manifest)
    left_out: dict[GraphName, str] = {}
    compared = []
    for around in [graph for graph in END_TO_END if graph in manifest.graphs]:
        graph, file = END_TO_END[around], Graph(f"onnx/{END_TO_END[around]}.onnx")
        if why is None:
            progress.stage(f"writing the {graph} graph and comparing its detections")
            written = replace(bundle, manifest=replace(manifest, graphs={**bundle.manifest.graphs, graph: file}))
            try:
                compared += _written(written, around, threads)
                bundle = written
                continue
            except (EngineError, ParityError) as error:
                (bundle.directory / file.model).unlink(missing_ok=True)
                left_out[graph] = error.problem.replace(f"{bundle.directory}/", "")
        else:
            left_out[graph] = why
        progress.stage(f"leaving out the {graph} graph: {left_out[graph]}")
    return replace(bundle, manifest=replace(bundle.manifest, left_out=left_out)), compared


def _written(bundle: Bundle, around: GraphName, threads: int) -> list[EndToEndComparison]:
    """Write the file around a graph and compare it. Raises `EngineError` or `ParityError` where it does not hold."""
    import onnx

    graph = END_TO_END[around]
    path, _ = bundle.graph(graph)
    write_end_to_end(bundle.graph(around)[0], path, bundle.manifest)
    if around == "onnx_tensorrt" and (problems := check_tensorrt(onnx.load(str(path)))):
        raise EngineError(f"TensorRT would refuse it: {problems[0]}", "Use the graph without NMS.")
    found = []
    for alone, whole in _engines(bundle, around, graph, EngineOptions("int8", "cpu", threads)):
        with alone, whole:
            found += compare_end_to_end(graph, alone, whole, bundle.manifest, _TOLERANCE)
    return found


def _engines(
    bundle: Bundle, around: GraphName, graph: GraphName, options: EngineOptions
) -> Iterator[tuple[Engine, Engine]]:
    """Each that runs the graph in INT8 here, with the graph and with the file."""
    if around == "onnx_tensorrt":
        yield SimulatedTensorRT(bundle, options, around), SimulatedTensorRT(bundle, options, graph)
        return
    for name in int8_engines():
        if graph_for(name, "int8", "cpu") == around:
            yield load_graph(name, bundle, options, around), load_graph(name, bundle, options, graph)
