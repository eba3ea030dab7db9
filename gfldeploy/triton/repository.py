"""A Triton model repository from a bundle or a `deploy.yml`: what `gfldeploy triton` writes.

    REPO/
      triton.json       what gfldeploy wrote here; Triton does not look at it
      NAME/
        config.pbtxt
        warmup/         images that Triton runs before the model is ready
        1/              model.py, gfldeploy.json, the bundle, deploy.yml if it was given

With the backend onnxruntime, NAME is an ensemble of NAME_preprocess, in Python, and of NAME_network: the file of the
bundle that deploys by itself.
"""

from __future__ import annotations

import re
import shutil
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from gfldeploy.batching.buckets import Size, size_in_words
from gfldeploy.bundle import END_TO_END, END_TO_END_OUTPUTS, MANIFEST, Bundle
from gfldeploy.engines.base import Device, Precision, check_tf32, remedy_sentence
from gfldeploy.engines.registry import check_bundle, graph_for, missing_graph
from gfldeploy.errors import UnsupportedError, UsageError
from gfldeploy.export.golden import PICTURE
from gfldeploy.files import StrPath, atomic_directory, check_apart, check_target, files_below, write_json, write_text
from gfldeploy.predict.engine_selection import DEPLOY_SUFFIXES, check_int8_size
from gfldeploy.progress import SILENT, Progress
from gfldeploy.serialization import Versioned
from gfldeploy.triton.config import EnsembleStep, TritonConfig, TritonTensor, WarmUpRequest
from gfldeploy.triton.settings import BUNDLE, DEPLOY, SETTINGS, DetectorSettings, PreprocessSettings
from gfldeploy.tune.deploy_file import Deploy

TritonBackend = Literal["python", "onnxruntime"]
NOTE = "triton.json"
_VERSION = "1"
_MODEL_DIRECTORY = "$$TRITON_MODEL_DIRECTORY"  # as Triton writes the model's own folder in EXECUTION_ENV_PATH
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")
_PHOTOGRAPH = (3000, 4000)  # (height, width): what most cameras take
_WARMED = 8  # sizes of images, at most
_MODEL = '''"""The model in this folder, for Triton's Python backend. Written by `gfldeploy triton`."""

try:
    from gfldeploy.triton.model import {model} as TritonPythonModel  # noqa: F401 - Triton looks for this name
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"{{error}}. Install gfldeploy and an engine in Triton's Python environment, or name another with "
        "`gfldeploy triton --python-env`."
    ) from error
'''
_IMAGE = TritonTensor("image", "TYPE_STRING", (1,))
_DETECTIONS = (
    TritonTensor("boxes", "TYPE_FP32", (-1, 4)),
    TritonTensor("scores", "TYPE_FP32", (-1,)),
    TritonTensor("classes", "TYPE_INT32", (-1,)),
    TritonTensor("names", "TYPE_STRING", (-1,)),
    TritonTensor("count", "TYPE_INT32", (1,)),
)


@dataclass(frozen=True)
class _Plan:
    """What to write. `bundle`: at the input size that is asked for. `python_env`: for the Python backend, or None.

    `settings`: of the model that runs the bundle. `batch`, `instances`, `device`: of the model that has the network.
    """

    name: str
    bundle: Bundle
    deploy: Deploy | None
    settings: DetectorSettings
    batch: int
    instances: int
    device: Device
    python_env: str | None


def triton_repository(
    source: StrPath,
    *,
    output: StrPath,
    name: str | None = None,
    backend: TritonBackend = "python",
    instances: int | None = None,
    python_env: str | None = None,
    engine: str | None = None,
    precision: Precision | None = None,
    device: Device | None = None,
    tf32: bool | None = None,
    threads: int | None = None,
    input_size: Size | None = None,
    batch_size: int | None = None,
    force: bool = False,
    progress: Progress = SILENT,
) -> Path:
    """Write a model repository for Triton Inference Server, with everything but Python packages in it.

    An argument that is None is as in `deploy.yml`, or is decided where Triton runs, as `Detector` does. Nothing is
    loaded here: the repository may be for another machine.

    Args:
        source: The directory of a bundle, or the `deploy.yml` that `tune_bundles` wrote.
        output: The model repository to write.
        name: The name of the model; by default that of the bundle.
        backend: "python" runs the bundle with gfldeploy in any engine. "onnxruntime" runs the bundle's file that
            deploys by itself in Triton's own backend, behind a Python model that decodes and resizes.
        instances: Processes of the model, each with an engine of its own; by default the streams of `deploy.yml`, or 1.
        python_env: The environment with gfldeploy in it, for Triton's Python backend: an absolute path where Triton
            runs; by default Triton's own environment.
        engine: The engine that runs the bundle.
        precision: The precision in which it runs.
        device: The device that it runs on.
        tf32: Let FP32 on a GPU multiply in TF32.
        threads: CPU threads of one inference; by default the instances share all.
        input_size: The size, (height, width) in pixels, to which images are resized, as `target_size` in
            PaddleDetection.
        batch_size: The most images of one inference, which Triton's dynamic batcher collects; by default 1.
        force: Replace the output if gfldeploy made it.
        progress: Told of notes, and of what has not run.

    Returns:
        The model repository.

    Raises:
        UsageError: The name cannot be that of a model, or options do not go together.
        BundleError: The bundle is damaged, or not the one that `deploy.yml` is about.
        DataError: `source` is a file that is no `deploy.yml`.
        UnsupportedError: Nothing runs the bundle so, on any machine.
        OutputError: The output cannot be written, or something is in the way.
    """
    if backend not in ("python", "onnxruntime"):
        raise ValueError(f"backend must be python or onnxruntime, not {backend!r}")
    if any(value is not None and value < 1 for value in (instances, threads, batch_size)):
        raise ValueError("instances, threads and batch_size must be at least 1")
    path, target = Path(source), Path(output)
    deploy = Deploy.read(path) if path.suffix in DEPLOY_SUFFIXES and not path.is_dir() else None
    bundle = Bundle.open(deploy.bundle_path(path) if deploy else path)
    check_apart(target, [path, bundle.directory], bundle.directory)
    check_target(target, "triton", force=force)
    source_name = DEPLOY if deploy else BUNDLE
    settings = DetectorSettings(
        source_name, bundle.digest, engine, precision, device, tf32, threads, input_size, batch_size
    )
    plan = _plan(bundle, deploy, settings, name, instances, python_env)
    write = _write_detector if backend == "python" else _write_ensemble
    for note in bundle.manifest.notes:
        progress.note(note)
    need = sum(record.bytes for record in bundle.manifest.files.values())
    with atomic_directory(target, "triton", force=force, need_bytes=need) as directory:
        write(directory, plan)
        about = {"what": "a model repository of gfldeploy triton", "model": plan.name, "bundle": bundle.digest}
        write_json(directory / NOTE, {**about, "files": files_below(directory)})
    return target


def _plan(
    bundle: Bundle,
    deploy: Deploy | None,
    settings: DetectorSettings,
    name: str | None,
    instances: int | None,
    python_env: str | None,
) -> _Plan:
    """Check what can be checked without the machine that serves, and fill in what `deploy.yml` says."""
    if name is not None and not _NAME.fullmatch(name):
        raise UsageError(f"{name!r:.60} cannot be the name of a model", "Use letters, digits, _, - and dots.")
    if python_env is not None and not python_env.startswith(("/", _MODEL_DIRECTORY)):
        raise UsageError(
            f"--python-env {python_env!r:.60} is no absolute path",
            f"Or begin it with {_MODEL_DIRECTORY}, Triton's word.",
        )
    manifest = bundle.manifest
    name = name or re.sub(r"[^A-Za-z0-9_.-]+", "_", manifest.name).strip("._-")[:100] or "detector"
    precision, device, size = settings.precision or manifest.precision, settings.device or "cpu", settings.input_size
    measured = False  # whether the input size was chosen with the mAP measured there
    if deploy is not None:
        deploy.check(bundle, deploy.machine)
        cell = deploy.choice.cell
        given = (settings.engine, settings.precision, settings.device, settings.input_size)
        measured = given == (None,) * 4 and deploy.choice.evidence.ap_drop is not None
        precision, device = settings.precision or cell.precision, settings.device or cell.device
        size = size or cell.input_size
        if (settings.engine or cell.engine, device) == (cell.engine, cell.device) and settings.threads is None:
            # A stream becomes an instance: Triton gives the next batch to whichever of them is free.
            instances = instances or cell.streams
            settings = replace(settings, threads=cell.threads)
    fixed = manifest.inputs[0].shape[0]
    if fixed is not None and settings.batch_size not in (None, fixed):
        raise UnsupportedError(f"{bundle.directory} takes batches of {fixed} only", "Leave the batch size out.")
    batch = fixed or settings.batch_size or (deploy.choice.cell.batch_size if deploy else 1)
    engine = settings.engine or (deploy.choice.cell.engine if deploy else None)
    obstacle = check_bundle(bundle, precision) or (engine and missing_graph(bundle, engine, precision, device)) or None
    if obstacle:
        problem = f"{engine or 'any engine'} {precision} on {device} is not possible: {obstacle.reason}"
        raise UnsupportedError(problem, remedy_sentence(obstacle.remedy))
    if settings.tf32:
        check_tf32((precision,), device)
    resized = bundle.at_size(size)
    if precision == "int8" and resized is not bundle and not measured:
        check_int8_size(bundle, resized)
    return _Plan(name, resized, deploy, settings, batch, instances or 1, device, python_env)


def _write_detector(directory: Path, plan: _Plan) -> None:
    """The model that runs the bundle in an engine of gfldeploy."""
    folder = directory / plan.name
    config = TritonConfig(
        plan.name,
        "python",
        plan.batch,
        (_IMAGE, TritonTensor("threshold", "TYPE_FP32", (1,), optional=True)),
        _DETECTIONS,
        plan.device,
        plan.instances,
        [WarmUpRequest(name, batch) for name in _write_warm_ups(folder / "warmup", plan) for batch in {1, plan.batch}],
        _environment(plan),
    )
    version = _write_python_model(folder, config, "DetectorModel", plan.settings)
    for name in (MANIFEST, *plan.bundle.manifest.files):
        copy = version / BUNDLE / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(plan.bundle.directory / name, copy)
    if plan.deploy is not None:  # without the runner-up, whose bundle is not here
        choice = replace(plan.deploy.choice, path=BUNDLE)
        replace(plan.deploy, choice=choice, runner_up=None).write(version / DEPLOY)


def _write_ensemble(directory: Path, plan: _Plan) -> None:
    """The file that deploys by itself in Triton's ONNX Runtime, a model in Python before it, and both as one."""
    manifest, asked = plan.bundle.manifest, plan.settings
    if plan.deploy is not None and plan.deploy.detection:
        raise UsageError(
            f"deploy.yml says {', '.join(plan.deploy.detection.given)}, and the file that deploys by itself has the "
            "NMS of the config",
            "Use --backend python, or take `detection` out of deploy.yml.",
        )
    if (asked.engine or "onnxruntime") != "onnxruntime":
        raise UsageError(
            f"Triton's backend for ONNX Runtime does not run the engine {asked.engine}",
            "Leave --engine out, or --backend.",
        )
    precision = asked.precision or manifest.precision
    graph = END_TO_END[graph_for("onnxruntime", precision, plan.device)]
    path, _ = plan.bundle.graph(graph)
    batch, _, height, width = manifest.inputs[0].shape
    if batch is not None:
        raise UnsupportedError(
            f"{plan.bundle.directory} takes batches of {batch} only, and Triton's ONNX Runtime needs a free batch size",
            "Use --backend python, or export it without a batch size in --input-shape.",
        )
    most = manifest.nms.keep_top_k
    prepared = (
        TritonTensor("image", "TYPE_UINT8", (height or -1, width or -1, 3)),
        TritonTensor("im_shape", "TYPE_INT32", (2,)),
        TritonTensor("scale_factor", "TYPE_FP32", (2,)),
    )
    found = (
        TritonTensor("boxes", "TYPE_FP32", (most, 4)),
        TritonTensor("scores", "TYPE_FP32", (most,)),
        TritonTensor("classes", "TYPE_INT32", (most,)),
        TritonTensor("count", "TYPE_INT32", (1,), scalar=True),
    )
    first, second = f"{plan.name}_preprocess", f"{plan.name}_network"
    config = TritonConfig(first, "python", plan.batch, (_IMAGE,), prepared, parameters=_environment(plan))
    _write_python_model(directory / first, config, "PreprocessModel", PreprocessSettings(manifest.preprocess))
    options = {"intra_op_thread_count": str(asked.threads)} if asked.threads else {}
    network = TritonConfig(
        *(second, "onnxruntime", plan.batch, prepared, found, plan.device, plan.instances),
        parameters=options,
        tf32=bool(asked.tf32),
    )
    _write_model(directory / second, network)
    shutil.copyfile(path, directory / second / _VERSION / "model.onnx")
    names = {one.name: one.name for one in prepared}
    steps = (
        EnsembleStep(first, {"image": "image"}, {name: f"prepared_{name}" for name in names}),
        EnsembleStep(second, {name: f"prepared_{name}" for name in names}, {name: name for name in END_TO_END_OUTPUTS}),
    )
    outputs = tuple(replace(one, scalar=False) for one in found)
    _write_model(
        directory / plan.name, TritonConfig(plan.name, "ensemble", plan.batch, (_IMAGE,), outputs, steps=steps)
    )


def _environment(plan: _Plan) -> Mapping[str, str]:
    return {} if plan.python_env is None else {"EXECUTION_ENV_PATH": plan.python_env}


def _write_model(folder: Path, config: TritonConfig) -> Path:
    """Write the config; return the folder of the only version, which is there."""
    version = folder / _VERSION
    version.mkdir(parents=True)
    write_text(folder / "config.pbtxt", str(config))
    return version


def _write_python_model(folder: Path, config: TritonConfig, model: str, settings: Versioned) -> Path:
    version = _write_model(folder, config)
    write_text(version / "model.py", _MODEL.format(model=model))
    settings.write(version / SETTINGS)
    return version


def _write_warm_ups(folder: Path, plan: _Plan) -> list[str]:
    """Write images for Triton to run before the model is ready, one for each size that will come; their names.

    Those are the sizes that `deploy.yml` says, or of photographs upright and lying, and the bundle's golden picture.
    """
    import cv2

    preprocess = plan.bundle.manifest.preprocess
    known = [(height, width) for _, height, width in plan.deploy.shapes] if plan.deploy else []
    # An image of the size of the network's input is given that size again, unless the shape is of another input size.
    sizes = [size for size in dict.fromkeys(known) if preprocess.input_size(*size) == size][:_WARMED]
    files = {}
    for size in sizes or list(dict.fromkeys(preprocess.input_size(*one) for one in (_PHOTOGRAPH, _PHOTOGRAPH[::-1]))):
        written, data = cv2.imencode(".png", np.full((*size, 3), 128, np.uint8))
        assert written
        files[f"grey_{size_in_words(size)}"] = data.tobytes()
    if PICTURE in plan.bundle.manifest.files:
        files["golden"] = (plan.bundle.directory / PICTURE).read_bytes()
    folder.mkdir(parents=True)
    for name, content in files.items():
        # An element of TYPE_STRING: its length, then its bytes.
        (folder / name).write_bytes(struct.pack("<I", len(content)) + content)
    return list(files)
