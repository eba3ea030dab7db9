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
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Self, cast, get_args

from gfldeploy.detections import NmsParams
from gfldeploy.errors import BundleError, ConfigError, DataError
from gfldeploy.files import atomic_directory, read_json, sha256, write_json
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
            raise BundleError(f"the manifest has unknown or missing keys: {', '.join(odd)}", "Export the bundle again.")
        try:
            for key, kind in _KINDS.items():
                _need(_is(data[key], kind), key, data[key])
            _need(data["precision"] in ("fp32", "int8"), "precision", data["precision"])
            for key in ("graphs", "inputs", "outputs"):
                _need(bool(data[key]), key, data[key])
            candidates = data["candidates"]
            _need(candidates is None or (_is(candidates, int) and candidates > 0), "candidates", candidates)
            return cls(
                **{
                    **data,
                    "graphs": {key: _graph(key, value) for key, value in data["graphs"].items()},
                    "inputs": tuple(_tensor_spec(spec) for spec in data["inputs"]),
                    "outputs": tuple(_tensor_spec(spec) for spec in data["outputs"]),
                    "preprocess": Preprocess.from_dict(data["preprocess"]),
                    "nms": NmsParams.from_dict(data["nms"]),
                    "classes": _all("classes", data["classes"], str),
                    "strides": _all("strides", data["strides"], int),
                    "files": {key: _file_record(key, value) for key, value in data["files"].items()},
                    "left_out": {_graph_name(key): _text(key, value) for key, value in data["left_out"].items()},
                    "notes": tuple(_text("notes", value) for value in data["notes"]),
                }
            )
        except (TypeError, ValueError, KeyError, AttributeError, ConfigError, DataError) as error:
            raise BundleError(f"the manifest cannot be read: {error}", "Export the bundle again.") from error


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
        raise ValueError(f"{key} is {value!r:.60}")


def _all(key: str, values: Any, kind: type) -> tuple[Any, ...]:
    _need(bool(values) and all(_is(value, kind) for value in values), key, values)
    return tuple(values)


def _text(key: str, value: Any) -> str:
    _need(_is(value, str), key, value)
    return str(value)


def _graph_name(name: Any) -> GraphName:
    _need(name in get_args(GraphName), "a graph's name", name)
    return cast(GraphName, name)


def _graph(name: str, data: Any) -> Graph:
    _graph_name(name)
    graph = Graph(**data)
    _need(_is(graph.model, str) and (graph.params is None or _is(graph.params, str)), f"graph {name}", data)
    return graph


def _file_record(name: str, data: Any) -> FileRecord:
    record = FileRecord(**data)
    _need(_is(record.sha256, str) and _is(record.bytes, int), f"the record of {name}", data)
    return record


def _tensor_spec(data: Any) -> TensorSpec:
    spec = TensorSpec(**{**data, "shape": tuple(data["shape"])})
    _need(_is(spec.name, str) and _is(spec.dtype, str) and len(spec.shape) >= 1, "a tensor", data)
    _need(all(size is None or (_is(size, int) and size > 0) for size in spec.shape), "a tensor's shape", data["shape"])
    return spec


@dataclass(frozen=True)
class Bundle:
    """An opened bundle: `directory` and its checked `manifest`."""

    directory: Path
    manifest: Manifest

    @classmethod
    def open(cls, directory: Path) -> Self:
        """Read the manifest and check that every file is there in its right size, and no other.

        Sizes are compared, not contents: `verify_files` does that. Raises `BundleError`.
        """
        path = directory / MANIFEST
        if not directory.is_dir():
            raise BundleError(f"{directory} is not a directory", "Give the directory that `gfldeploy export` wrote.")
        if not path.is_file():
            raise BundleError(f"{directory} is not a bundle: it has no {MANIFEST}", "Make one with `gfldeploy export`.")
        try:
            data = read_json(path)
        except (OSError, ValueError) as error:
            raise BundleError(f"{path} cannot be read: {error}", "Export the bundle again.") from error
        try:
            manifest = Manifest.from_dict(data)
        except BundleError as error:
            raise BundleError(f"{path}: {error.problem}", error.remedy) from error
        bundle = cls(directory, manifest)
        bundle._check_files()
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
        path = self.directory / LAYERS
        remedy = "Export the bundle again."
        if not path.is_file():
            raise BundleError(f"{self.directory} has no {LAYERS}, which names its layers", remedy)
        try:
            data = read_json(path)
        except (OSError, ValueError) as error:
            raise BundleError(f"{path} cannot be read: {error}", remedy) from error
        if not isinstance(data, dict) or not all(isinstance(name, str) for name in data.values()):
            raise BundleError(f"{path} does not name layers", remedy)
        return data

    def verify_files(self) -> None:
        """Hash every file again. Raises `BundleError` naming the first that changed."""
        self._check_files()
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

    def _check_files(self) -> None:
        expected = self.manifest.files
        present = set(_files_below(self.directory)) - {MANIFEST}
        escaping = [name for name in expected if Path(name).is_absolute() or ".." in Path(name).parts]
        named = {path for graph in self.manifest.graphs.values() for path in (graph.model, graph.params) if path}
        if escaping or not named <= set(expected):
            raise BundleError(f"{self.directory / MANIFEST} names files outside the bundle", "Do not use this bundle.")
        if missing := sorted(set(expected) - present):
            raise BundleError(f"{self.directory} lacks {_some(missing)}", "Copy the whole directory, or export again.")
        if extra := sorted(present - set(expected)):
            raise BundleError(
                f"{self.directory} has files that are not part of the bundle: {_some(extra)}",
                "Move them elsewhere: a bundle holds nothing but what its manifest lists.",
            )
        for name, record in expected.items():
            try:
                size = (self.directory / name).stat().st_size
            except OSError as error:  # a symbolic link to nothing
                raise BundleError(
                    f"{self.directory / name} cannot be read: {error.strerror or error}", "Copy the bundle again."
                ) from error
            if size != record.bytes:
                raise BundleError(
                    f"{self.directory / name} has {size} bytes, {record.bytes} expected",
                    "Copy the whole directory again, or export again.",
                )


@contextmanager
def write_bundle(target: Path, *, force: bool = False, need_bytes: int = 0) -> Iterator[tuple[Path, list[Manifest]]]:
    """Yield a directory to fill, and a list to put its `Manifest` in; publish both when the block succeeds.

    The manifest's `files` are filled in here, from what the directory holds. Raises `OutputError`.
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
        Bundle.open(directory)


def _files_below(directory: Path) -> Iterator[str]:
    for folder, _, names in os.walk(directory):
        for name in names:
            yield (Path(folder) / name).relative_to(directory).as_posix()


def _some(names: list[str], most: int = 3) -> str:
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
