"""The bundle: a directory that says everything about one deployable detector.

    DIR/
      manifest.json     what the detector is, and the SHA-256 of every other file
      infer_cfg.yml     the preprocessing and classes in PaddleDetection's own format
      parity.json       how far each graph is from the eager model, as measured when it was made
      layers.json       path of the layer in the eager model by conv weight name, in graph order
      paddle/           model.json (PIR) and model.pdmodel (program), sharing model.pdiparams
      onnx/             model.onnx; FP32: model_fp16.onnx too; INT8: model_tensorrt.onnx too
      calibration.json  INT8 only: scales by conv weight name
      paddledetection/  only with --with-nms: PaddleDetection's own graph, NMS included

Later steps need the bundle and nothing else: not ppdet, not the config, not the checkpoint.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from types import NoneType
from typing import Any, Literal, Self, cast, get_args

from gfldeploy.bundle_records import RECORDS, check_record
from gfldeploy.detections import NmsParams
from gfldeploy.errors import BundleError, GfldeployError, reading
from gfldeploy.files import atomic_directory, read_json, sha256, write_json
from gfldeploy.graph_guard import check_graph
from gfldeploy.images.preprocess import Preprocess

__all__ = [
    "LAYERS",
    "MANIFEST",
    "SCHEMA",
    "Bundle",
    "FileRecord",
    "Graph",
    "GraphName",
    "Manifest",
    "TensorSpec",
    "write_bundle",
]

SCHEMA = 3
_OLDEST_SCHEMA = 2  # older ones are refused, from here on they are upgraded on reading
MANIFEST = "manifest.json"
LAYERS = "layers.json"
_AGAIN = "Export the bundle again."
# What no detector reaches: what a bundle says must not take memory or time that has nothing to do with its size.
_MOST_FILES = 100
_MOST_DEPTH = 8
_MOST_BYTES = 8 << 30  # of a file
_MOST_TEXT = 10_000
_MOST_CLASSES = 100_000
_MOST_STRIDE = 4096
_MOST_BATCH = 4096
_MOST_REG_MAX = 10_000
_MOST_CANDIDATES = 10**7
_LARGEST_SIDE = 8192
GraphName = Literal["paddle", "paddle_program", "onnx", "onnx_fp16", "onnx_tensorrt", "paddledetection"]


@dataclass(frozen=True)
class TensorSpec:
    """A graph input or output. A dimension of `None` is free."""

    name: str
    dtype: str
    shape: tuple[int | None, ...]


@dataclass(frozen=True)
class Graph:
    """The files of one graph, relative to the bundle. ONNX has no `params` file."""

    model: str
    params: str | None = None


@dataclass(frozen=True)
class FileRecord:
    """What a file of the bundle must be."""

    sha256: str
    bytes: int


@dataclass(frozen=True)
class Manifest:
    """`manifest.json`.

    `graphs`: `paddle` (PIR), `paddle_program` (the older format, which PaddleSlim and oneDNN INT8 need), `onnx` (with
    ONNX Runtime's and OpenVINO's Q/DQ in INT8 bundles), and, run by no engine of ours:
    `onnx_fp16` (FP32 bundles: FP16 convolutions for GPUs, the decode and all inputs and outputs FP32; absent where FP16
    differs too much), `onnx_tensorrt` (INT8 bundles: symmetric Q/DQ as TensorRT wants them, from the same calibration),
    `paddledetection` (with NMS, for PaddleDetection's deploy tools).
    `left_out`: why the bundle lacks a graph that a detector usually has, by the graph's name.
    `notes`: what whoever uses the detector must know, one sentence each, such as that its class names are made up.
    `candidates`: how many anchors of an image the graphs decode, those with the highest scores; None for all.
    `classes`: names in the order of the score channels. `score_channels` may exceed their number: GFLv2 has one more.
    `provenance`: config, checkpoint digest, versions, command line; for people, nothing reads it back.
    """

    name: str
    precision: Literal["fp32", "int8"]
    graphs: Mapping[GraphName, Graph]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    preprocess: Preprocess
    nms: NmsParams
    classes: tuple[str, ...]
    score_channels: int
    strides: tuple[int, ...]
    reg_max: int
    parameters: int
    provenance: Mapping[str, Any]
    files: Mapping[str, FileRecord] = field(default_factory=dict)
    candidates: int | None = None
    left_out: Mapping[GraphName, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    schema: int = SCHEMA

    def to_dict(self) -> dict[str, Any]:
        """As JSON-ready data; `from_dict` is the inverse."""
        data = asdict(self)
        data["preprocess"] = self.preprocess.to_dict()
        data["nms"] = self.nms.to_dict()
        return {"schema": data.pop("schema"), **data}

    @classmethod
    def from_dict(cls, data: Any) -> Self:
        """Check and build. Raises `BundleError` for another schema, unknown or missing keys and wrong types."""
        if not isinstance(data, dict) or not _is(data.get("schema"), int) or data["schema"] < 1:
            raise BundleError("the manifest has no schema number", "Export the bundle again.")
        if data["schema"] > SCHEMA:
            raise BundleError(
                f"the manifest has schema {data['schema']}, this gfldeploy reads up to {SCHEMA}",
                "Update gfldeploy, or export the bundle again with this version.",
            )
        if data["schema"] < _OLDEST_SCHEMA:
            raise BundleError(
                f"the manifest has schema {data['schema']}, of an older gfldeploy; this one reads schemas from "
                f"{_OLDEST_SCHEMA} on",
                "Export the bundle again; quantise the new one for INT8.",
            )
        if data["schema"] == 2:  # before `left_out` and `notes`
            data = {"left_out": {}, "notes": [], **data, "schema": SCHEMA}
        known = set(cls.__dataclass_fields__)
        if set(data) != known:
            odd = sorted(set(data) ^ known)
            raise BundleError(f"the manifest has unknown or missing keys: {_some(odd)}", _AGAIN)
        try:
            for key, kind in _KINDS.items():
                _need(_is(data[key], kind), key, data[key])
            _need(data["precision"] in ("fp32", "int8"), "precision", data["precision"])
            for key in ("graphs", "inputs", "outputs"):
                _need(bool(data[key]), key, data[key])
            if data["candidates"] is not None:
                _whole("candidates", data["candidates"], 1, _MOST_CANDIDATES)
            _whole("reg_max", data["reg_max"], 1, _MOST_REG_MAX)
            _whole("parameters", data["parameters"], 0, 10**13)
            manifest = cls(
                **{
                    **data,
                    "name": _text("name", data["name"]),
                    "graphs": {key: _graph(key, value) for key, value in data["graphs"].items()},
                    "inputs": tuple(_tensor_spec(spec) for spec in data["inputs"]),
                    "outputs": tuple(_tensor_spec(spec) for spec in data["outputs"]),
                    "preprocess": Preprocess.from_dict(data["preprocess"]),
                    "nms": NmsParams.from_dict(data["nms"]),
                    "classes": tuple(_text("classes", name) for name in data["classes"][: _MOST_CLASSES + 1]),
                    "strides": tuple(_whole("strides", one, 1, _MOST_STRIDE) for one in data["strides"]),
                    "files": {_inside(key): _file_record(key, value) for key, value in data["files"].items()},
                    "left_out": {_graph_name(key): _text(key, value) for key, value in data["left_out"].items()},
                    "notes": tuple(_text("notes", value) for value in data["notes"]),
                }
            )
            _check_together(manifest)
            return manifest
        except GfldeployError as error:
            raise BundleError(f"the manifest cannot be read: {error.problem}", _AGAIN) from error
        except (TypeError, ValueError, KeyError, AttributeError, OverflowError, RecursionError) as error:
            raise BundleError(f"the manifest cannot be read: {error!s:.200}", _AGAIN) from error


_KINDS: dict[str, type] = {
    "name": str,
    "precision": str,
    "graphs": dict,
    "inputs": list,
    "outputs": list,
    "preprocess": dict,
    "nms": dict,
    "classes": list,
    "score_channels": int,
    "strides": list,
    "reg_max": int,
    "parameters": int,
    "provenance": dict,
    "files": dict,
    "left_out": dict,
    "notes": list,
}


def _is(value: object, kind: type) -> bool:
    """`isinstance`, where true and false are no numbers."""
    return isinstance(value, kind) and not isinstance(value, bool)


def _need(right: bool, key: str, value: object) -> None:
    if not right:
        raise ValueError(f"{key} is {str(value) if isinstance(value, int) else repr(value):.60}")


def _whole(key: str, value: Any, least: int, most: int) -> int:
    _need(_is(value, int) and least <= value <= most, key, value)
    return int(value)


def _text(key: str, value: Any) -> str:
    _need(_is(value, str) and len(value) <= _MOST_TEXT, key, value)
    _need(not any("\ud800" <= one <= "\udfff" for one in value), key, value)  # halves of a pair: no text
    return str(value)


def _inside(name: str) -> str:
    """A path as the manifest writes it: relative, below the bundle, in one spelling."""
    path = PurePosixPath(name)
    if not path.parts or path.is_absolute() or ".." in path.parts or path.as_posix() != name or "\0" in name:
        raise BundleError(f"it names files outside the bundle: {name!r:.60}", "Do not use this bundle.")
    return name


def _graph_name(name: Any) -> GraphName:
    _need(name in get_args(GraphName), "a graph's name", name)
    return cast(GraphName, name)


def _graph(name: str, data: Any) -> Graph:
    _graph_name(name)
    graph = Graph(**data)
    _need(_is(graph.model, str) and _is(graph.params, str if name.startswith("paddle") else NoneType), name, data)
    return graph


def _file_record(name: str, data: Any) -> FileRecord:
    record = FileRecord(**data)
    _need(_is(record.sha256, str) and bool(re.fullmatch("[0-9a-f]{64}", record.sha256)), f"the digest of {name}", data)
    _whole(f"the size of {name}", record.bytes, 0, 1 << 50)
    return record


def _tensor_spec(data: Any) -> TensorSpec:
    spec = TensorSpec(**{**data, "shape": tuple(data["shape"])})
    _text("a tensor's name", spec.name)
    _need(spec.dtype in ("float32", "int32"), "a tensor's type", spec.dtype)
    _need(1 <= len(spec.shape) <= 4, "a tensor's shape", data["shape"])
    for size in spec.shape:
        if size is not None:
            _whole("a tensor's size", size, 1, _MOST_CANDIDATES)
    return spec


def _check_together(manifest: Manifest) -> None:
    """What each part says is possible; here, whether they go together. Raises `ValueError`."""
    image = manifest.inputs[0]
    _need(len(manifest.inputs) == 1 and image.name == "image" and image.dtype == "float32", "inputs", manifest.inputs)
    _need(len(image.shape) == 4 and image.shape[1] == 3, "the image's shape", list(image.shape))
    for size, most in zip(image.shape, (_MOST_BATCH, 3, _LARGEST_SIDE, _LARGEST_SIDE), strict=True):
        _need(size is None or size <= most, "the image's shape", list(image.shape))
    _need(0 < len(manifest.classes) <= _MOST_CLASSES, "classes", list(manifest.classes[:5]))
    _need(0 < len(manifest.strides) <= 16, "strides", list(manifest.strides[:5]))
    extra = manifest.score_channels - len(manifest.classes)
    if extra not in (0, 1):  # 1: GFLv2
        raise ValueError(f"{len(manifest.classes)} classes do not fit {manifest.score_channels} score channels")


def _check_outputs(manifest: Manifest) -> None:
    """Those of a detector, see ARCHITECTURE.md. Raises `BundleError`."""
    outputs = {spec.name: spec for spec in manifest.outputs}
    for name, rank, last in (("scores", 3, manifest.score_channels), ("boxes", 3, 4), ("anchors", 2, None)):
        spec = outputs.pop(name, None)
        right = spec is not None or (name == "anchors" and manifest.candidates is None)
        if spec is not None:
            right = len(spec.shape) == rank and (last is None or spec.shape[-1] in (None, last))
        if not right:
            raise BundleError(f"the output {name} is {list(spec.shape) if spec else 'missing'}", _AGAIN)
    if outputs:
        raise BundleError(f"there is an unknown output: {next(iter(outputs))!r:.60}", _AGAIN)


@dataclass(frozen=True)
class Bundle:
    """An opened bundle: `directory` and its checked `manifest`."""

    directory: Path
    manifest: Manifest

    @classmethod
    def open(cls, directory: Path, *, detector: bool = True) -> Self:
        """Read the manifest and check everything that it and the other files say, whoever made them.

        Every file must be there in its right size, and no other; records must hold what gfldeploy writes (see
        `bundle_records`), and graphs arithmetic alone (see `graph_guard`). Digests are not compared: `verify_files`
        does that. `detector`: False for a graph that is there to be timed and detects nothing. Raises `BundleError`.
        """
        path = directory / MANIFEST
        remedy = "Give the directory that `gfldeploy export` wrote."
        with reading(directory, BundleError, remedy):  # a name that no directory can have
            if not directory.is_dir():
                raise BundleError(f"{directory} is not a directory", remedy)
            found = path.exists()
        if not found:
            raise BundleError(f"{directory} is not a bundle: it has no {MANIFEST}", "Make one with `gfldeploy export`.")
        present = set(_files_below(directory)) - {MANIFEST}
        with reading(path, BundleError, _AGAIN):
            try:
                manifest = Manifest.from_dict(read_json(path))
                if detector:
                    _check_outputs(manifest)
            except BundleError as error:
                raise BundleError(f"{path}: {error.problem}", error.remedy) from error
        bundle = cls(directory, manifest)
        bundle._check_files(present)
        for name in manifest.files:
            if name in RECORDS:
                bundle.record(name)
        for graph in manifest.graphs:
            try:
                check_graph(graph, *bundle.graph(graph))
            except BundleError:
                bundle.verify_files()  # says it better where the file has only been damaged
                raise
        return bundle

    @property
    def name(self) -> str:
        return self.manifest.name

    @property
    def digest(self) -> str:
        """SHA-256 of the manifest, which itself holds the digest of every file: the bundle's identity."""
        return sha256(self.directory / MANIFEST)

    def has_graph(self, name: GraphName) -> bool:
        return name in self.manifest.graphs

    def graph(self, name: GraphName) -> tuple[Path, Path | None]:
        """Paths of a graph's model and parameter files. Raises `BundleError` if the bundle has no such graph."""
        graph = self.manifest.graphs.get(name)
        if graph is None and name in self.manifest.left_out:
            raise BundleError(
                f"{self.directory} has no {name} graph: {self.manifest.left_out[name]}", "Use another engine."
            )
        if graph is None:
            there = ", ".join(self.manifest.graphs)
            raise BundleError(f"{self.directory} has no {name} graph (it has: {there})", "Export the bundle again.")
        return self.directory / graph.model, self.directory / graph.params if graph.params else None

    def layers(self) -> dict[str, str]:
        """Layer path (`backbone.stem.conv`) by convolution weight name, in graph order. Raises `BundleError`."""
        layers = self.record(LAYERS)
        if layers is None:
            raise BundleError(f"{self.directory} has no {LAYERS}, which names its layers", _AGAIN)
        return layers

    def record(self, name: str) -> dict[str, Any] | None:
        """What this JSON file of the bundle says, None where the bundle has none. Raises `BundleError`."""
        if name not in self.manifest.files:
            return None
        path = self.directory / name
        with reading(path, BundleError, _AGAIN):
            return check_record(name, read_json(path), path)

    def verify_files(self) -> None:
        """Hash every file again. Raises `BundleError` naming the first that changed."""
        self._check_files(set(_files_below(self.directory)) - {MANIFEST})
        for name, record in self.manifest.files.items():
            try:
                same = sha256(self.directory / name) == record.sha256
            except OSError as error:
                raise BundleError(
                    f"{self.directory / name} cannot be read: {error.strerror or error}", "Copy the bundle again."
                ) from error
            if not same:
                raise BundleError(
                    f"{self.directory / name} has changed since the bundle was made",
                    "Export the bundle again, or restore the file.",
                )

    def _check_files(self, present: set[str]) -> None:
        expected = self.manifest.files
        named = {path for graph in self.manifest.graphs.values() for path in (graph.model, graph.params) if path}
        if not named <= set(expected):
            raise BundleError(f"{self.directory / MANIFEST} names files outside the bundle", "Do not use this bundle.")
        if missing := sorted(set(expected) - present):
            raise BundleError(f"{self.directory} lacks {_some(missing)}", "Copy the whole directory, or export again.")
        if extra := sorted(present - set(expected)):
            raise BundleError(
                f"{self.directory} has files that are not part of the bundle: {_some(extra)}",
                "Move them elsewhere: a bundle holds nothing but what its manifest lists.",
            )
        for name, record in expected.items():
            size = (self.directory / name).stat().st_size
            if size != record.bytes:
                raise BundleError(
                    f"{self.directory / name} has {size} bytes, {record.bytes} expected",
                    "Copy the whole directory again, or export again.",
                )


@contextmanager
def write_bundle(
    target: Path, *, force: bool = False, need_bytes: int = 0, detector: bool = True
) -> Iterator[tuple[Path, list[Manifest]]]:
    """Yield a directory to fill, and a list to put its `Manifest` in; publish both when the block succeeds.

    The manifest's `files` are filled in here, from what the directory holds, and all is checked as whoever opens the
    bundle will. `detector`: as for `Bundle.open`. Raises `OutputError`, `BundleError`.
    """
    with atomic_directory(target, force=force, need_bytes=need_bytes) as directory:
        manifests: list[Manifest] = []
        yield directory, manifests
        (manifest,) = manifests
        files = {
            name: asdict(FileRecord(sha256(directory / name), (directory / name).stat().st_size))
            for name in sorted(_files_below(directory))
        }
        write_json(directory / MANIFEST, {**manifest.to_dict(), "files": files})
        Bundle.open(directory, detector=detector)


def _files_below(directory: Path) -> Iterator[str]:
    """The files of a bundle, whose directory itself may be a link. Raises `BundleError` for what is no regular file."""
    pending, count = [(directory, 0)], 0
    while pending:
        folder, depth = pending.pop()
        with reading(folder, BundleError, "Copy the bundle again."), os.scandir(folder) as entries:
            for entry in entries:
                path = Path(entry.path)
                status = entry.stat(follow_symlinks=False)
                if stat.S_ISLNK(status.st_mode):
                    raise BundleError(
                        f"{path} is a link", "A bundle holds the files themselves: copy it with `cp -rL`."
                    )
                if stat.S_ISDIR(status.st_mode) and depth < _MOST_DEPTH:
                    pending.append((path, depth + 1))
                    continue
                if not stat.S_ISREG(status.st_mode):
                    raise BundleError(f"{path} is no regular file", "Do not use this bundle.")
                count += 1
                if count > _MOST_FILES or status.st_size > _MOST_BYTES:
                    problem = (
                        f"has over {_MOST_FILES} files"
                        if count > _MOST_FILES
                        else f"has {path.name} of {status.st_size:,} bytes"
                    )
                    raise BundleError(f"{directory} is no bundle: it {problem}", "Do not use this bundle.")
                yield path.relative_to(directory).as_posix()


def _some(names: list[str], most: int = 3) -> str:
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
