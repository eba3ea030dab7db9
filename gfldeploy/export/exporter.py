"""From config and checkpoint to a bundle of graphs, each compared with the eager model."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from gfldeploy._quiet import quiet
from gfldeploy.bundle import (
    END_TO_END,
    LAYERS,
    Bundle,
    Graph,
    GraphName,
    Manifest,
    TensorSpec,
    needed_multiple,
    write_bundle,
)
from gfldeploy.candidates import MOST_CANDIDATES, default_candidates, suffice
from gfldeploy.engines.base import EngineOptions
from gfldeploy.engines.dependencies import require
from gfldeploy.engines.hardware import usable_threads
from gfldeploy.engines.registry import ENGINES, JUDGES, capability, load_graph, open_engine
from gfldeploy.errors import ConfigError, EngineError, GfldeployError, ParityError, UsageError
from gfldeploy.export import half, parity
from gfldeploy.export.checkpoint import load_checkpoint, locate_checkpoint
from gfldeploy.export.config import DetectorConfig, load_detector_config
from gfldeploy.export.end_to_end import obstacle, write_end_to_end
from gfldeploy.export.end_to_end_parity import EndToEndComparison, compare_end_to_end, compare_with_eager
from gfldeploy.export.golden import golden_picture, write_golden
from gfldeploy.export.heads import HEADS, HeadSpec
from gfldeploy.export.levels import check_levels
from gfldeploy.export.model_builder import build_model
from gfldeploy.export.weights import fit_weights, set_random_weights
from gfldeploy.files import StrPath, check_target, sha256, write_json, write_text
from gfldeploy.images.decode import read_image
from gfldeploy.images.preprocess import Preprocess
from gfldeploy.machine import installed_packages
from gfldeploy.nms import NmsParams
from gfldeploy.progress import SILENT, Progress
from gfldeploy.serialization import plain

InputShape = tuple[int | None, int | None, int | None]

# Three graphs' worth of parameters, the temporary program among them, and the ONNX files.
_SPACE_FACTOR = 8


def export_bundle(
    *,
    config: StrPath,
    output: StrPath,
    weights: StrPath | None = None,
    random_weights: int | None = None,
    input_shape: InputShape | None = None,
    candidates: int | Literal["auto", "all"] = "auto",
    score_threshold: float | None = None,
    nms_threshold: float | None = None,
    keep_top_k: int | None = None,
    with_nms: bool = False,
    end_to_end: bool = True,
    golden: StrPath | None = None,
    threads: int | None = None,
    force: bool = False,
    command: str = "",
    progress: Progress = SILENT,
) -> Bundle:
    """Turn a trained GFL into a bundle of graphs that were compared with the PaddleDetection model.

    Without the PIR graph nothing is published. The others are left out, with the reason, where they cannot be made or
    differ: not every detector fits FP16, or can be traced as the older program or converted to ONNX.

    Args:
        config: PaddleDetection config (.yml) of a GFL.
        output: The directory of the bundle.
        weights: Trained checkpoint (.pdparams).
        random_weights: Seed of reproducible random weights in place of a checkpoint.
        input_shape: Batch, height and width of the network's input, height and width in pixels; None is free.
        candidates: How many anchors of an image the graphs decode, those with the highest scores. "auto" is a number
            that loses nothing of test pictures, or all.
        score_threshold: NMS gives no detection that scores less, in everything that runs the bundle; by default that
            of the config. mAP needs a low one.
        nms_threshold: NMS drops a box whose IoU with a better one of its class is above this; by default as above.
        keep_top_k: The most detections that NMS gives of an image; by default as above.
        with_nms: Add PaddleDetection's own graph with NMS, for its deploy tools. Needs a free input size.
        golden: An image for the bundle to hold, with what it finds in it, for checking ports: reduced to 512 px, as
            PNG. By default a drawn one.
        end_to_end: Add, around each ONNX graph, the file that takes pixels and gives detections.
        threads: CPU threads; all available by default.
        force: Replace an existing bundle at `output`.
        command: The command line that the bundle records.
        progress: Is told what is done.

    Returns:
        The bundle at `output`.

    Raises:
        UsageError: Options contradict each other.
        ConfigError: The config cannot be used.
        CheckpointError: The checkpoint cannot be used, or does not fit the config.
        ParityError: The graphs differ from the model.
        EngineError: Paddle cannot trace or run the model.
        OutputError: The output cannot be written.
        MissingDependencyError: A package is not installed.
    """
    config, output = Path(config), Path(output)
    checkpoint = Path(weights) if weights is not None else None
    # What is cheap to refuse is refused before Paddle is imported.
    if (weights is None) == (random_weights is None):
        raise UsageError("export needs either --weights or --random-weights", "Give one of them.")
    if with_nms and input_shape:
        raise UsageError(
            "--with-nms goes with a free input size only: PaddleDetection cannot pad to a fixed one", "Leave one out."
        )
    if isinstance(candidates, int) and not 1 <= candidates <= MOST_CANDIDATES:
        raise UsageError(f"{candidates} candidates cannot be chosen in the graph", f"Give 1 to {MOST_CANDIDATES}.")
    check_target(output, force=force)
    picture = golden_picture(None if golden is None else read_image(Path(golden)))
    arrays = load_checkpoint(checkpoint) if checkpoint is not None else None
    progress.stage("loading Paddle and building the eager model")
    loaded = load_detector_config(config)
    asked = {"score_threshold": score_threshold, "nms_threshold": nms_threshold, "keep_top_k": keep_top_k}
    changes = {name: value for name, value in asked.items() if value is not None}
    loaded = _with_nms(loaded, changes)
    for note in loaded.notes:
        progress.note(note)
    require("onnxruntime", "comparing the ONNX graph with the eager model")
    require("paddle2onnx", "writing ONNX")
    from paddle.utils import unique_name

    with unique_name.guard():  # weights get the same names, whatever this process has built before
        shape = input_shape or (None, None, None)
        preprocess = _preprocess(loaded, shape)
        detector = build_model(loaded)
        vars(detector.head.nms).update(changes)
        if arrays is not None:
            fit_weights(detector, arrays)
        else:
            set_random_weights(detector, random_weights or 0)
        parameters = sum(int(np.prod(parameter.shape)) for parameter in detector.parameters())
        need = _SPACE_FACTOR * 4 * parameters
        with write_bundle(output, force=force, need_bytes=need) as (directory, manifests):
            images = [parity.parity_images(one, preprocess, seed=0) for one in parity.parity_shapes(preprocess, shape)]
            check_levels(detector, loaded, preprocess, *images[0].shape[2:])
            progress.stage("running the eager model for reference")
            references = [parity.eager_outputs(detector, batch) for batch in images]
            chosen, notes = _candidates(candidates, shape, loaded.nms, references, progress)
            channels = references[0]["scores"].shape[2]
            manifest = Manifest(
                name=loaded.name,
                precision="fp32",
                graphs={"paddle": Graph("paddle/model.json", "paddle/model.pdiparams")},
                inputs=(TensorSpec("image", "float32", (shape[0], 3, *shape[1:])),),
                outputs=_outputs(shape[0], chosen, channels),
                preprocess=preprocess,
                nms=loaded.nms,
                classes=loaded.classes,
                score_channels=channels,
                strides=tuple(loaded.strides),
                reg_max=loaded.reg_max,
                parameters=parameters,
                provenance=_provenance(config, checkpoint, random_weights, command),
                candidates=chosen,
                notes=(*loaded.notes, *notes),
            )
            threads = usable_threads() if threads is None else threads
            export = _Export(directory, manifest, detector, images, references, shape, threads, progress)
            export.write_graphs(HEADS[loaded.head], with_nms)
            export.compare_graphs()
            if with_nms:
                progress.stage("comparing PaddleDetection's graph with its own forward pass")
                parity.check_paddledetection(detector, directory / "paddledetection", images[0], references[0])
            export.add_half()
            export.add_end_to_end(end_to_end)
            export.add_golden(picture)
            write_json(directory / "parity.json", export.parity_record())
            _write_infer_cfg(directory / "infer_cfg.yml", export.manifest)
            if with_nms:
                shutil.copy(directory / "infer_cfg.yml", directory / "paddledetection" / "infer_cfg.yml")
            progress.stage(f"publishing {output}")
            manifests.append(export.manifest)
    return Bundle.open(output)


@dataclass
class _Export:
    """The graphs of one detector, in a directory that is not published yet.

    `images` and `references`: what the graphs are compared on, and what the eager model gives for it.
    """

    directory: Path
    manifest: Manifest
    detector: Any
    images: Sequence[NDArray[np.float32]]
    references: Sequence[parity.Outputs]
    shape: InputShape
    threads: int
    progress: Progress
    tolerance: parity.Tolerance = parity.TOLERANCE
    compared: list[parity.GraphComparison] = field(default_factory=list)
    compared_half: list[parity.GraphComparison] = field(default_factory=list)
    compared_end_to_end: list[EndToEndComparison] = field(default_factory=list)

    def write_graphs(self, head: HeadSpec, with_nms: bool) -> None:
        """Write the graphs, and leave out those that cannot be written. Raises `EngineError` without the PIR graph."""
        import paddle

        from gfldeploy.export.gfl_graph import fold_batch_norm
        from gfldeploy.export.onnx_graph import convert
        from gfldeploy.export.static_graph import save_paddle_graph, save_paddle_program, save_paddledetection_graph

        self.progress.stage("folding BatchNorm and writing the Paddle graphs")
        paddle_folder, onnx_file = self.directory / "paddle", self.directory / "onnx/model.onnx"
        for folder in (paddle_folder, onnx_file.parent):
            folder.mkdir()
        with quiet():
            fold_batch_norm(self.detector, paddle.to_tensor(self.images[0][:1]))
            layer = head.graph()(self.detector, self.manifest.candidates)
            layer.eval()
            try:
                save_paddle_graph(layer, paddle_folder, self.shape)
            except EngineError as error:
                raise self._suggesting_fixed_size(error) from error
        self._add("paddle_program", Graph("paddle/model.pdmodel", "paddle/model.pdiparams"))
        try:
            with quiet():
                save_paddle_program(layer, paddle_folder, self.shape)
        except (EngineError, ParityError) as error:
            self._leave_out("paddle_program", error)
        self.progress.stage("writing the ONNX graph")
        self._add("onnx", Graph("onnx/model.onnx"))
        try:
            convert(paddle_folder / "model.json", paddle_folder / "model.pdiparams", onnx_file)
        except EngineError as error:
            self._leave_out("onnx", error)
        write_json(self.directory / LAYERS, _layers(self.detector, onnx_file if onnx_file.exists() else None))
        if with_nms:
            self.progress.stage("writing PaddleDetection's graph with NMS")
            (self.directory / "paddledetection").mkdir()
            with quiet():
                save_paddledetection_graph(layer, self.directory / "paddledetection", self.shape)
            self._add("paddledetection", Graph("paddledetection/model.json", "paddledetection/model.pdiparams"))

    def compare_graphs(self) -> None:
        """Compare each graph in the engines that run it, and leave out those that differ.

        Raises `EngineError` or `ParityError` for the PIR graph.
        """
        for graph in [graph for graph in self.manifest.graphs if graph != "paddledetection"]:
            self.progress.stage(f"comparing the {graph} graph with the eager model")
            try:
                found = self._compare(graph)
                if self.tolerance is parity.TOLERANCE and any(parity.exceeds(one, self.tolerance) for one in found):
                    self.progress.stage("measuring how far rounding alone moves the eager model")
                    self.tolerance = parity.tolerance(self.detector, self.images)
                parity.check(found, self.tolerance)
                self.compared += found
            except (EngineError, ParityError) as error:
                if graph == "paddle":
                    raise self._suggesting_fixed_size(error) from error
                self._leave_out(graph, error)

    def add_half(self) -> None:
        """Write the FP16 file from the ONNX graph and compare it, or leave it out."""
        if "onnx" in self.manifest.left_out:
            self._leave_out_unwritten("onnx_fp16", "it is made of the ONNX graph")
            return
        self.progress.stage("writing the FP16 ONNX graph and comparing it with the eager model")
        self._add("onnx_fp16", Graph("onnx/model_fp16.onnx"))
        try:
            half.write_half_onnx(self.directory / "onnx/model.onnx", self.directory / "onnx/model_fp16.onnx")
            found = self._compare("onnx_fp16")
            parity.check(found, half.TOLERANCE)
            self.compared_half = found
        except (EngineError, ParityError) as error:
            self._leave_out("onnx_fp16", error)

    def add_end_to_end(self, wanted: bool) -> None:
        """Write what deploys by itself around each ONNX graph and compare it, or leave it out."""
        why = obstacle(self.manifest) if wanted else "it was not asked for (--no-end-to-end)"
        for around, graph in END_TO_END.items():
            if around in self.manifest.left_out:
                self._leave_out_unwritten(graph, f"it is made of the {around} graph")
            elif around in self.manifest.graphs and why:
                self._leave_out_unwritten(graph, why)
            elif around in self.manifest.graphs:
                self.progress.stage(f"writing the {graph} graph and comparing its detections")
                self._add(graph, Graph(f"onnx/{graph}.onnx"))
                try:
                    self._write_end_to_end(around, graph)
                except (EngineError, ParityError) as error:
                    self._leave_out(graph, error)

    def _write_end_to_end(self, around: GraphName, graph: GraphName) -> None:
        bundle, options = Bundle(self.directory, self.manifest), EngineOptions("fp32", "cpu", self.threads)
        write_end_to_end(bundle.graph(around)[0], bundle.graph(graph)[0], self.manifest)
        allowed = half.TOLERANCE if around == "onnx_fp16" else self.tolerance
        batch, _, height, width = self.images[0].shape
        eager = partial(parity.eager_detections, self.detector, self.references[0])
        found = []
        for name in self._judges(around):
            with load_graph(name, bundle, options, around) as alone, load_graph(name, bundle, options, graph) as whole:
                found += compare_end_to_end(graph, alone, whole, self.manifest, allowed)
                if around == "onnx":
                    args = (graph, whole, (batch, height, width), eager, self.manifest, allowed)
                    found.append(compare_with_eager(*args))
        self.compared_end_to_end += found

    def add_golden(self, picture: NDArray[np.uint8]) -> None:
        """Write the picture and what the detector finds in it. Raises `EngineError` and `OutputError`."""
        bundle, options = Bundle(self.directory, self.manifest), EngineOptions("fp32", "cpu", self.threads)
        name: str = "onnxruntime" if bundle.has_graph("onnx") else "paddle"
        with open_engine(name, bundle, options) as engine:
            write_golden(bundle, picture, engine, self.tolerance.times(2.0))

    def parity_record(self) -> dict[str, Any]:
        """`parity.json`."""
        left_out = self.manifest.left_out.get("onnx_fp16")
        outcome = {"left_out": left_out} if left_out else {"comparisons": plain(self.compared_half)}
        return {
            "reference": "the eager ppdet model, before BatchNorm folding",
            "tolerance": plain(self.tolerance),
            "comparisons": plain(self.compared),
            "fp16": {"tolerance": plain(half.TOLERANCE), **outcome},
            "end_to_end": plain(self.compared_end_to_end),
        }

    def _compare(self, graph: GraphName) -> list[parity.GraphComparison]:
        """A graph in its judges. Raises `EngineError` or `ParityError`."""
        bundle, options = Bundle(self.directory, self.manifest), EngineOptions("fp32", "cpu", self.threads)
        found = []
        for opened in [load_graph(name, bundle, options, graph) for name in self._judges(graph)]:
            with opened as engine:
                found += [
                    parity.compare(graph, engine, batch, reference)
                    for batch, reference in zip(self.images, self.references, strict=True)
                ]
        return found

    def _judges(self, graph: GraphName) -> list[str]:
        """Every judge that is installed and runs the graph in FP32 on CPUs.

        Of a graph that none runs so (INT8 is made of the program, GPUs run FP16), the first judge that knows it.
        """
        names = [
            name
            for name in JUDGES
            if ENGINES[name].graph("fp32", "cpu") == graph and capability(name, "fp32", "cpu").works
        ]
        return names or [next(name for name in JUDGES if graph in ENGINES[name].graphs)]

    def _add(self, graph: GraphName, files: Graph) -> None:
        self.manifest = replace(self.manifest, graphs={**self.manifest.graphs, graph: files})

    def _leave_out(self, graph: GraphName, error: GfldeployError) -> None:
        """Take a graph that the error tells against out of the manifest, and its model out of the directory."""
        problem = error.problem.replace(f"{self.directory}/", "")  # engines name the file that they cannot load
        (self.directory / self.manifest.graphs[graph].model).unlink(missing_ok=True)
        graphs = {name: files for name, files in self.manifest.graphs.items() if name != graph}
        self.manifest = replace(self.manifest, graphs=graphs)
        self._leave_out_unwritten(graph, problem)

    def _leave_out_unwritten(self, graph: GraphName, why: str) -> None:
        self.progress.stage(f"leaving out the {graph} graph: {why}")
        self.manifest = replace(self.manifest, left_out={**self.manifest.left_out, graph: why})

    def _suggesting_fixed_size(self, error: GfldeployError) -> GfldeployError:
        """The same error, with a fixed input size as the remedy where the size was free: some models need one."""
        if self.shape[1] is not None:
            return error
        remedy = "If the model only works at one size, fix it: --input-shape HEIGHTxWIDTH."
        return type(error)(f"with a free input size {error.problem}", remedy)


def _candidates(
    asked: int | Literal["auto", "all"],
    shape: InputShape,
    nms: NmsParams,
    references: Sequence[parity.Outputs],
    progress: Progress,
) -> tuple[int | None, tuple[str, ...]]:
    """How many anchors of an image the graphs decode, None for all, and what its user must know of that.

    `references`: of all anchors, for the pictures that the graphs are compared with.
    """
    if asked == "all":
        return None, ()
    default = default_candidates(nms, references[0]["scores"].shape[2])
    kept = "every detection" if nms.keep_top_k == -1 else f"{nms.keep_top_k} detections of an image"
    if asked == "auto":
        if default is not None and suffice(default, references, nms):
            return default, ()
        why = f"the config keeps {kept}" if default is None else f"{default} do not suffice for test pictures"
        progress.stage(f"all anchors will be decoded: {why}")
        return None, ()
    most = max(batch["scores"].shape[1] for batch in references)
    every = None not in shape[1:] and most <= asked  # no size has more anchors than that
    if every or (default is not None and asked >= default and suffice(asked, references, nms)):
        return asked, ()
    note = (
        f"only the {asked} anchors of an image that score highest are decoded, and the config keeps {kept}: detections "
        "that score less than the worst of these anchors may be missing or differ (export --candidates all loses none)"
    )
    progress.note(note)
    return asked, (note,)


def _with_nms(config: DetectorConfig, given: dict[str, float | int]) -> DetectorConfig:
    """The config with these parameters of NMS in place of its own, and a note that says so.

    Raises `ConfigError` for values that cannot work.
    """
    own = vars(config.nms)
    changed = [f"{name} {value:g} (config: {own[name]:g})" for name, value in given.items() if value != own[name]]
    if not changed:
        return config
    note = f"NMS has {', '.join(changed)}, as was asked for at export: mAP is that of these parameters"
    return replace(config, nms=replace(config.nms, **given), notes=(*config.notes, note))  # type: ignore[arg-type]


def _outputs(batch: int | None, candidates: int | None, channels: int) -> tuple[TensorSpec, ...]:
    rows = (batch, candidates)
    specs = (TensorSpec("scores", "float32", (*rows, channels)), TensorSpec("boxes", "float32", (*rows, 4)))
    return specs if candidates is None else (*specs, TensorSpec("anchors", "int32", rows))


def _preprocess(config: DetectorConfig, shape: InputShape) -> Preprocess:
    try:
        preprocess = Preprocess.from_reader(config.reader["sample_transforms"], config.reader.get("batch_transforms"))
    except ConfigError as error:
        raise ConfigError(f"{config.path}: {error.problem}", error.remedy) from error
    needed = needed_multiple(config.strides)
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


def _provenance(config: Path, checkpoint: Path | None, seed: int | None, command: str) -> dict[str, Any]:
    versions = {"python": platform.python_version()}
    versions |= {name: version for name, version in installed_packages().items() if version}
    weights = (
        {"file": checkpoint.name, "sha256": sha256(locate_checkpoint(checkpoint))}
        if checkpoint is not None
        else {"random_seed": seed}
    )
    return {
        "config": {"file": config.name, "sha256": sha256(config)},
        "weights": weights,
        "versions": versions,
        "command": command,
    }
