"""From config and checkpoint to a bundle whose every graph was compared with the eager model."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from gfldeploy._quiet import quiet
from gfldeploy.bundle import LAYERS, Bundle, Graph, GraphName, Manifest, TensorSpec, write_bundle
from gfldeploy.candidates import MOST_CANDIDATES, default_candidates, suffice
from gfldeploy.detections import NmsParams
from gfldeploy.engines.base import Engine, EngineOptions
from gfldeploy.engines.dependencies import require
from gfldeploy.engines.registry import ENGINES, JUDGES, capability, load_graph
from gfldeploy.errors import ConfigError, DataError, EngineError, GfldeployError, ParityError, summary
from gfldeploy.export import half, parity
from gfldeploy.export.checkpoint import fit_weights, load_checkpoint, locate_checkpoint, random_weights
from gfldeploy.export.config import DetectorConfig, build_model, load_detector_config
from gfldeploy.files import check_target, sha256, write_json, write_text
from gfldeploy.images.preprocess import Preprocess
from gfldeploy.machine import installed_packages
from gfldeploy.serialization import build

__all__ = ["ExportRequest", "export_bundle"]

# Three graphs' worth of parameters, the temporary program among them, and the ONNX files.
_SPACE_FACTOR = 6
# Arguments of MultiClassNMS that say what it returns, not what it keeps.
_NMS_OUTPUT_KEYS = ("name", "return_index", "return_rois_num", "trt")


@dataclass(frozen=True)
class ExportRequest:
    """What to export.

    `weights`: a `.pdparams` file; None with `random_seed` set builds reproducible random weights instead.
    `input_shape`: batch, height, width in pixels; None is free. `candidates`: how many anchors of an image the graphs
    decode, those with the highest scores; None for all; "auto" for `candidates.default_candidates`, or all where these
    lose something of the pictures that the graphs are compared with.
    """

    config: Path
    output: Path
    weights: Path | None
    random_seed: int | None = None
    input_shape: tuple[int | None, int | None, int | None] = (None, None, None)
    candidates: int | Literal["auto"] | None = "auto"
    with_nms: bool = False
    force: bool = False
    threads: int = 1
    command: str = ""


def export_bundle(request: ExportRequest, report: Callable[[str], None] = lambda stage: None) -> Bundle:
    """Export, compare with the eager model, publish. No graph is published that differs in the engine that runs it.

    Without the PIR graph nothing is published. The others are left out, with the reason, where they cannot be made or
    differ: not every detector fits FP16, or can be traced as the older program or converted to ONNX.

    Raises `ConfigError`, `CheckpointError`, `ParityError`, `OutputError`, `EngineError`, `MissingDependencyError`.
    """
    # What is cheap to refuse is refused before Paddle is imported.
    if isinstance(request.candidates, int) and not 1 <= request.candidates <= MOST_CANDIDATES:
        raise ConfigError(
            f"{request.candidates} candidates cannot be chosen in the graph", f"Give 1 to {MOST_CANDIDATES}, or all."
        )
    check_target(request.output, force=request.force)
    weights = load_checkpoint(request.weights) if request.weights is not None else None
    report("loading Paddle and building the eager model")
    config = load_detector_config(request.config)
    for note in config.notes:
        report(f"note: {note}")
    require("onnxruntime", "comparing the ONNX graph with the eager model")
    require("paddle2onnx", "writing ONNX")
    from paddle.utils import unique_name

    with unique_name.guard():  # weights get the same names, whatever this process has built before
        return _export(request, config, weights, report)


def _export(
    request: ExportRequest,
    config: DetectorConfig,
    weights: Mapping[str, NDArray[Any]] | None,
    report: Callable[[str], None],
) -> Bundle:
    preprocess = _preprocess(config, request.input_shape)
    shapes = parity.parity_shapes(preprocess, request.input_shape)
    nms = _nms_params(config)
    detector = build_model(config)
    if weights is not None:
        fit_weights(detector, weights)
    else:
        random_weights(detector, request.random_seed or 0)
    parameters = sum(int(np.prod(parameter.shape)) for parameter in detector.parameters())
    with write_bundle(request.output, force=request.force, need_bytes=_SPACE_FACTOR * 4 * parameters) as (
        directory,
        manifests,
    ):
        images = [parity.parity_images(shape, preprocess, seed=0) for shape in shapes]
        _check_levels(detector, config, preprocess, *shapes[0][1:])
        report("running the eager model for reference")
        references = [parity.eager_outputs(detector, batch) for batch in images]
        tolerance = parity.TOLERANCE
        channels = references[0]["scores"].shape[2]
        candidates, notes = _candidates(request, nms, references, report)
        graphs, left_out = _write_graphs(detector, directory, request, candidates, images[0][:1], report)
        manifest = Manifest(
            name=config.name,
            precision="fp32",
            graphs=graphs,
            inputs=(TensorSpec("image", "float32", (request.input_shape[0], 3, *request.input_shape[1:])),),
            outputs=_outputs(request, candidates, channels),
            preprocess=preprocess,
            nms=nms,
            classes=config.classes,
            score_channels=channels,
            strides=tuple(config.strides),
            reg_max=config.reg_max,
            parameters=parameters,
            provenance=_provenance(request),
            candidates=candidates,
            notes=(*config.notes, *notes),
            left_out=left_out,
        )
        found = []
        for graph in tuple(graph for graph in manifest.graphs if graph != "paddledetection"):
            try:
                compared = _compare(Bundle(directory, manifest), graph, images, references, request.threads, report)
                if tolerance is parity.TOLERANCE and any(parity.exceeds(one, tolerance) for one in compared):
                    report("measuring how far rounding alone moves the eager model")
                    tolerance = parity.tolerance(detector, images)
                parity.check(compared, tolerance)
                found += compared
            except (EngineError, ParityError) as error:
                if graph == "paddle":
                    raise _suggest_fixed_size(error, request) from error
                manifest = _leave_out(directory, manifest, graph, error, report)
        if request.with_nms:
            report("comparing PaddleDetection's graph with its own forward pass")
            parity.check_paddledetection(detector, directory / "paddledetection", images[0], references[0])
        halves: list[parity.GraphComparison] = []
        if manifest.left_out.get("onnx"):
            manifest = replace(manifest, left_out={**manifest.left_out, "onnx_fp16": "it is made of the ONNX graph"})
        else:
            report("writing the FP16 ONNX graph and comparing it with the eager model")
            manifest = replace(manifest, graphs={**manifest.graphs, "onnx_fp16": Graph("onnx/model_fp16.onnx")})
            try:
                halves = _write_half(Bundle(directory, manifest), images, references, request.threads)
            except (EngineError, ParityError) as error:
                manifest = _leave_out(directory, manifest, "onnx_fp16", error, report)
        write_json(
            directory / "parity.json",
            {
                "reference": "the eager ppdet model, before BatchNorm folding",
                "tolerance": {"score": tolerance.score, "box_px": tolerance.box_px},
                "comparisons": [comparison.to_dict() for comparison in found],
                "fp16": {
                    "tolerance": {"score": half.TOLERANCE.score, "box_px": half.TOLERANCE.box_px},
                    **(
                        {"comparisons": [comparison.to_dict() for comparison in halves]}
                        if halves
                        else {"left_out": manifest.left_out["onnx_fp16"]}
                    ),
                },
            },
        )
        _write_infer_cfg(directory / "infer_cfg.yml", manifest)
        if request.with_nms:
            shutil.copy(directory / "infer_cfg.yml", directory / "paddledetection" / "infer_cfg.yml")
        report(f"publishing {request.output}")
        manifests.append(manifest)
    return Bundle.open(request.output)


def _check_levels(detector: Any, config: DetectorConfig, preprocess: Preprocess, height: int, width: int) -> None:
    """Raise `ConfigError` unless ppdet runs the model on what the reader makes, with a level for each stride.

    `height`, `width`: in pixels, a size that the graphs are compared at; where sizes are free, another is tried too.
    """
    sizes = [(height, width)]
    if not preprocess.fixed and preprocess.pad_stride:
        sizes.append(_odd(preprocess.pad_stride))
    levels: list[tuple[int, int]] = []
    for size in reversed(sizes):
        found = _levels(detector, size)
        if isinstance(found, str):
            remedy = "Check that backbone, neck and head fit together: channels (feat_in_chan), levels (fpn_stride)."
            for stride in (32, 64, 128):
                if not isinstance(_levels(detector, _odd(stride)), str):
                    how = "use such an --input-shape" if preprocess.fixed else "set PadBatch's pad_to_stride to that"
                    remedy = f"It runs at multiples of {stride} px: {how}."
                    break
            raise ConfigError(
                f"{config.path}: PaddleDetection itself cannot run this model on {size[0]}x{size[1]} px: {found}",
                remedy,
            )
        levels = found
    actual = [int(2 ** round(np.log2(height * width / (rows * columns)) / 2)) for rows, columns in levels]
    strides = list(config.strides)
    if len(levels) != len(strides):
        raise ConfigError(
            f"{config.path}: the neck gives {len(levels)} levels, GFLHead's fpn_stride has {len(strides)}: {strides}",
            f"Set fpn_stride to {actual}, or have the neck give {len(strides)} levels.",
        )
    for (rows, columns), stride in zip(levels, strides, strict=True):
        if abs(height / stride - rows) >= 1 or abs(width / stride - columns) >= 1:
            raise ConfigError(
                f"{config.path}: GFLHead's fpn_stride is {strides}, but the level for {stride} has {rows}x{columns} "
                f"cells of {height}x{width} px",
                f"Set fpn_stride to {actual}, the strides of the neck's levels in their order.",
            )


def _odd(stride: int) -> tuple[int, int]:
    """A height and a width that are multiples of `stride`, and of no larger power of two."""
    return (3 * stride, 5 * stride)


def _levels(detector: Any, size: tuple[int, int]) -> list[tuple[int, int]] | str:
    """Rows and columns of each level that the neck makes of a picture of this size, or why ppdet cannot run it."""
    import paddle

    try:
        with paddle.no_grad(), quiet(native_stderr=True):
            levels = detector.neck(detector.backbone({"image": paddle.zeros([1, 3, *size])}))
            if not isinstance(levels, list | tuple):
                return "the neck gives one level as a tensor, the head takes a list of levels"
            if len(levels) == len(detector.head.fpn_stride):
                detector.head(levels)
            return [(int(level.shape[2]), int(level.shape[3])) for level in levels]
    except Exception as error:  # noqa: BLE001 - layers that do not fit together may raise anything
        return summary(error)


def _open_judges(bundle: Bundle, graph: GraphName, threads: int) -> list[Engine]:
    """The graph in every judge that is installed and runs it in FP32 on CPUs.

    A graph that none runs so (INT8 is made of the program, GPUs run FP16) is opened in the first judge that knows it.
    """
    names = [
        name for name in JUDGES if ENGINES[name].graph("fp32", "cpu") == graph and capability(name, "fp32", "cpu").works
    ]
    names = names or [next(name for name in JUDGES if graph in ENGINES[name].graphs)]
    return [load_graph(name, bundle, EngineOptions("fp32", "cpu", threads), graph) for name in names]


def _candidates(
    request: ExportRequest, nms: NmsParams, references: Sequence[parity.Outputs], report: Callable[[str], None]
) -> tuple[int | None, tuple[str, ...]]:
    """How many anchors of an image the graphs decode, None for all, and what its user must know of that.

    `references`: of all anchors, for the pictures that the graphs are compared with.
    """
    asked, most = request.candidates, max(batch["scores"].shape[1] for batch in references)
    if asked is None:
        return None, ()
    default = default_candidates(nms, references[0]["scores"].shape[2])
    kept = "every detection" if nms.keep_top_k == -1 else f"{nms.keep_top_k} detections of an image"
    if asked == "auto":
        if default is not None and suffice(default, references, nms):
            return default, ()
        why = f"the config keeps {kept}" if default is None else f"{default} do not suffice for test pictures"
        report(f"all anchors will be decoded: {why}")
        return None, ()
    every = None not in request.input_shape[1:] and most <= asked  # no size has more anchors than that
    if every or (default is not None and asked >= default and suffice(asked, references, nms)):
        return asked, ()
    note = (
        f"only the {asked} anchors of an image that score highest are decoded, and the config keeps {kept}: detections "
        "that score less than the worst of these anchors may be missing or differ (export --candidates all loses none)"
    )
    report(f"note: {note}")
    return asked, (note,)


def _outputs(request: ExportRequest, candidates: int | None, channels: int) -> tuple[TensorSpec, ...]:
    rows = (request.input_shape[0], candidates)
    specs = (TensorSpec("scores", "float32", (*rows, channels)), TensorSpec("boxes", "float32", (*rows, 4)))
    return specs if candidates is None else (*specs, TensorSpec("anchors", "int32", rows))


def _write_half(
    bundle: Bundle, images: Sequence[NDArray[np.float32]], references: Sequence[parity.Outputs], threads: int
) -> list[parity.GraphComparison]:
    """Write the bundle's FP16 file from its FP32 one. Raises `EngineError` or `ParityError` where it cannot be used."""
    half.write_half_onnx(bundle.graph("onnx")[0], bundle.graph("onnx_fp16")[0])
    (opened,) = _open_judges(bundle, "onnx_fp16", threads)
    with opened as engine:
        found = [
            parity.compare("onnx_fp16", engine, batch, reference)
            for batch, reference in zip(images, references, strict=True)
        ]
    parity.check(found, half.TOLERANCE)
    return found


def _preprocess(config: DetectorConfig, shape: tuple[int | None, int | None, int | None]) -> Preprocess:
    try:
        preprocess = Preprocess.from_reader(config.reader["sample_transforms"], config.reader.get("batch_transforms"))
    except ConfigError as error:
        raise ConfigError(f"{config.path}: {error.problem}", error.remedy) from error
    # FPN adds each level, doubled, to the next finer one: they only fit if the three backbone levels halve exactly.
    # What else a model needs is seen when it runs: `_check_levels`.
    needed = max((stride for stride in config.strides if stride <= 32), default=32)
    _, height, width = shape
    if height is None or width is None:
        pad = preprocess.pad_stride
        sizes = () if preprocess.keep_ratio else preprocess.target_size
        if pad % needed or (pad == 0 and (not sizes or any(size % needed for size in sizes))):
            raise ConfigError(
                f"the reader pads to multiples of {max(pad, 1)} px, this GFL needs multiples of {needed}",
                f"Set PadBatch's pad_to_stride to {needed} in TestReader.",
            )
        return preprocess
    if height % needed or width % needed:
        raise ConfigError(
            f"the input shape {height}x{width} is not a multiple of {needed} px, the stride of the backbone",
            f"Use {-(-height // needed) * needed}x{-(-width // needed) * needed}.",
        )
    return replace(preprocess, target_size=(height, width), fixed=True)


def _nms_params(config: DetectorConfig) -> NmsParams:
    values = {key: value for key, value in config.nms.items() if key not in _NMS_OUTPUT_KEYS}
    # Paddle takes any number: no score is below 0, and an nms_eta above 1 does nothing.
    if isinstance(values.get("score_threshold"), int | float):
        values["score_threshold"] = max(values["score_threshold"], 0.0)
    if isinstance(values.get("nms_eta"), int | float):
        values["nms_eta"] = min(values["nms_eta"], 1.0)
    try:
        return build(NmsParams, values)
    except DataError as error:
        raise ConfigError(f"{config.path}: its nms cannot be used: {error.problem}", error.remedy) from error


def _compare(
    bundle: Bundle,
    graph: GraphName,
    images: Sequence[NDArray[np.float32]],
    references: Sequence[parity.Outputs],
    threads: int,
    report: Callable[[str], None],
) -> list[parity.GraphComparison]:
    """A graph in every engine that is here and runs it on CPUs. Raises `EngineError` or `ParityError`."""
    report(f"comparing the {graph} graph with the eager model")
    found = []
    for opened in _open_judges(bundle, graph, threads):
        with opened as engine:
            found += [
                parity.compare(graph, engine, batch, reference)
                for batch, reference in zip(images, references, strict=True)
            ]
    return found


def _leave_out(
    directory: Path, manifest: Manifest, graph: GraphName, error: GfldeployError, report: Callable[[str], None]
) -> Manifest:
    """The manifest without a graph that the error tells against, and the directory without its model."""
    problem = error.problem.replace(f"{directory}/", "")  # engines name the file that they cannot load
    report(f"leaving out the {graph} graph: {problem}")
    (directory / manifest.graphs[graph].model).unlink(missing_ok=True)
    graphs = {name: files for name, files in manifest.graphs.items() if name != graph}
    return replace(manifest, graphs=graphs, left_out={**manifest.left_out, graph: problem})


def _suggest_fixed_size(error: GfldeployError, request: ExportRequest) -> GfldeployError:
    """The same error, with a fixed input size as the remedy where the size was free: some models bind themselves."""
    if request.input_shape[1] is not None:
        return error
    remedy = "If the model only works at one size, fix it: --input-shape HEIGHTxWIDTH"
    return type(error)(f"with a free input size {error.problem}", f"{remedy}.")


def _write_graphs(
    detector: Any,
    directory: Path,
    request: ExportRequest,
    candidates: int | None,
    image: NDArray[np.float32],
    report: Callable[[str], None],
) -> tuple[dict[GraphName, Graph], dict[GraphName, str]]:
    """Write the graphs, and say why for those that cannot be. `image` [1, 3, H, W]: of a size that the model takes."""
    import paddle

    from gfldeploy.export.gfl_graph import GflGraph, fold_batch_norm
    from gfldeploy.export.onnx_graph import convert
    from gfldeploy.export.static_graph import save_paddle_graph, save_paddle_program, save_paddledetection_graph

    report("folding BatchNorm and writing the Paddle graphs")
    for folder in ("paddle", "onnx"):
        (directory / folder).mkdir()
    with quiet():
        fold_batch_norm(detector, paddle.to_tensor(image))
        layer = GflGraph(detector, candidates)
        layer.eval()
        try:
            save_paddle_graph(layer, directory / "paddle", request.input_shape)
        except EngineError as error:
            raise _suggest_fixed_size(error, request) from error
    graphs: dict[GraphName, Graph] = {"paddle": Graph("paddle/model.json", "paddle/model.pdiparams")}
    left_out: dict[GraphName, str] = {}
    try:
        with quiet():
            save_paddle_program(layer, directory / "paddle", request.input_shape)
        graphs["paddle_program"] = Graph("paddle/model.pdmodel", "paddle/model.pdiparams")
    except (EngineError, ParityError) as error:
        left_out["paddle_program"] = error.problem
    report("writing the ONNX graph")
    try:
        convert(directory / "paddle/model.json", directory / "paddle/model.pdiparams", directory / "onnx/model.onnx")
        graphs["onnx"] = Graph("onnx/model.onnx")
    except EngineError as error:
        left_out["onnx"] = error.problem.replace(f"{directory}/", "")
        (directory / "onnx/model.onnx").unlink(missing_ok=True)
    for graph, why in left_out.items():
        report(f"leaving out the {graph} graph: {why}")
    write_json(directory / LAYERS, _layers(detector, directory / "onnx/model.onnx" if "onnx" in graphs else None))
    if request.with_nms:
        report("writing PaddleDetection's graph with NMS")
        (directory / "paddledetection").mkdir()
        with quiet():
            save_paddledetection_graph(layer, directory / "paddledetection", request.input_shape)
        graphs["paddledetection"] = Graph("paddledetection/model.json", "paddledetection/model.pdiparams")
    return graphs, left_out


def _layers(detector: Any, onnx_file: Path | None) -> dict[str, str]:
    """The layer path of each convolution by weight name, in the order of the ONNX graph, or the model's without one."""
    import onnx
    from paddle import nn

    paths: dict[str, str] = {}
    for path, layer in detector.named_sublayers():
        if isinstance(layer, nn.Conv2D):
            paths.setdefault(layer.weight.name, path)
    if onnx_file is None:
        return paths
    weights = (node.input[1] for node in onnx.load(str(onnx_file)).graph.node if node.op_type == "Conv")
    return {weight: paths[weight] for weight in weights if weight in paths}


def _write_infer_cfg(path: Path, manifest: Manifest) -> None:
    """PaddleDetection's description of an exported model: what its deploy tools read."""
    import yaml

    content = {
        "mode": "paddle",
        "draw_threshold": 0.5,
        "metric": "COCO",
        "use_dynamic_shape": manifest.inputs[0].shape[2] is None,
        "arch": "GFL",
        "min_subgraph_size": 16,
        "Preprocess": manifest.preprocess.to_infer_cfg(),
        "label_list": list(manifest.classes),
    }
    write_text(path, yaml.safe_dump(content, sort_keys=False, allow_unicode=True))


def _provenance(request: ExportRequest) -> dict[str, Any]:
    versions = {"python": platform.python_version()}
    versions |= {name: version for name, version in installed_packages().items() if version}
    weights = (
        {"file": request.weights.name, "sha256": sha256(locate_checkpoint(request.weights))}
        if request.weights is not None
        else {"random_seed": request.random_seed or 0}
    )
    return {
        "config": {"file": request.config.name, "sha256": sha256(request.config)},
        "weights": weights,
        "versions": versions,
        "command": request.command,
    }
