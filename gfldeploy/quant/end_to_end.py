"""The files of an INT8 bundle that deploy by themselves, around its ONNX graphs, and whether they hold."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from gfldeploy.bundle import END_TO_END, Bundle, Graph, GraphName
from gfldeploy.engines.base import Engine, EngineOptions
from gfldeploy.errors import EngineError, ParityError
from gfldeploy.export import half
from gfldeploy.export.end_to_end import obstacle, write_end_to_end
from gfldeploy.export.end_to_end_parity import EndToEndComparison, compare_end_to_end
from gfldeploy.quant.evaluation import Evaluation, Evaluator
from gfldeploy.quant.gate import Int8Measurement, failure
from gfldeploy.quant.measurement import PlainOnnxRuntime, PlainOpenVino, SimulatedTensorRT, int8_engines
from gfldeploy.quant.tensorrt import check_tensorrt

# An engine may round a number between two INT8 convolutions the other way in another graph: a step of 1/127.
_TOLERANCE = half.TOLERANCE


@dataclass(frozen=True)
class EndToEndFiles:
    """The `bundle` with the files that hold. `compared`: each with its graph. `judged`: what the gate asked besides."""

    bundle: Bundle
    compared: tuple[EndToEndComparison, ...]
    judged: dict[str, Int8Measurement]


def add_end_to_end(evaluation: Evaluation, evaluator: Evaluator) -> EndToEndFiles:
    """Write them into the directory of the INT8 bundle that passed the gate.

    In each engine a file must give the detections of the graph that it is made around, and TensorRT's must keep its
    rules. Without gfldeploy engines run the graph otherwise, and have to pass the gate once more. What does not hold is
    left out with the reason; where FP32 has no such file, INT8 has none either. Raises `OutputError`.
    """
    bundle = evaluation.evaluated.bundle
    manifest, kept = bundle.manifest, len(evaluation.evaluated.kept)
    why = manifest.left_out.get("end_to_end") or obstacle(manifest)
    left_out: dict[GraphName, str] = {}
    judged: dict[str, Int8Measurement] = {}
    compared: list[EndToEndComparison] = []
    for around in [graph for graph in END_TO_END if graph in manifest.graphs]:
        graph = END_TO_END[around]
        file = Graph(f"onnx/{graph}.onnx")
        if why is None:
            evaluator.progress.stage(f"writing the {graph} graph and comparing its detections")
            with_file = replace(bundle, manifest=replace(manifest, graphs={**bundle.manifest.graphs, graph: file}))
            try:
                found = _written(with_file, around, evaluator)
                if around == "onnx":
                    judged = _judged(with_file, evaluator, kept)
            except (EngineError, ParityError) as error:
                (bundle.directory / file.model).unlink(missing_ok=True)
                left_out[graph] = error.problem.replace(f"{bundle.directory}/", "")
            else:
                compared += found
                bundle = with_file
                continue
        else:
            left_out[graph] = why
        evaluator.progress.stage(f"leaving out the {graph} graph: {left_out[graph]}")
    return EndToEndFiles(replace(bundle, manifest=replace(bundle.manifest, left_out=left_out)), tuple(compared), judged)


def _written(bundle: Bundle, around: GraphName, evaluator: Evaluator) -> list[EndToEndComparison]:
    """Write the file around a graph and compare it. Raises `EngineError` or `ParityError` where it does not hold."""
    import onnx

    graph = END_TO_END[around]
    path, _ = bundle.graph(graph)
    write_end_to_end(bundle.graph(around)[0], path, bundle.manifest)
    if around == "onnx_tensorrt" and (problems := check_tensorrt(onnx.load(str(path)))):
        raise EngineError(f"TensorRT would refuse it: {problems[0]}", "Use the graph without NMS.")
    found = []
    for alone, whole in _engines(bundle, around, graph, EngineOptions("int8", "cpu", evaluator.fp32_reference.threads)):
        with alone, whole:
            found += compare_end_to_end(graph, alone, whole, bundle.manifest, _TOLERANCE)
    return found


def _engines(
    bundle: Bundle, around: GraphName, graph: GraphName, options: EngineOptions
) -> Iterator[tuple[Engine, Engine]]:
    """Each that runs the graph in INT8 here, with the graph and with the file."""
    classes = _plain() if around == "onnx" else [SimulatedTensorRT]
    for engine in classes:
        yield engine(bundle, options, around), engine(bundle, options, graph)


def _plain() -> list[Callable[[Bundle, EngineOptions, GraphName], Engine]]:
    """Those that are installed and run the file in INT8, without what gfldeploy changes before they load it."""
    classes: dict[str, Callable[[Bundle, EngineOptions, GraphName], Engine]] = {
        "onnxruntime": PlainOnnxRuntime,
        "openvino": PlainOpenVino,
    }
    return [engine for name, engine in classes.items() if name in int8_engines()]


def _judged(bundle: Bundle, evaluator: Evaluator, kept: int) -> dict[str, Int8Measurement]:
    """What engines make of the graph as it is. Raises `ParityError` where the gate does not hold."""
    found: dict[str, Int8Measurement] = {}
    fp32 = evaluator.fp32_reference
    for opened in _plain():
        with opened(bundle, fp32.int8_options, "onnx") as engine:
            found[engine.name] = fp32.measured(engine, bundle, engine.name, "INT8", evaluator.progress)
    if problem := failure(found, fp32.accuracy, evaluator.limits, kept) if found else None:
        raise problem
    return found
