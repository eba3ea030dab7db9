"""The bundle: a directory that says everything about one deployable detector.

    DIR/
      manifest.json     what the detector is, and the SHA-256 of every other file
      infer_cfg.yml     the preprocessing and classes in PaddleDetection's own format
      parity.json       how far each graph is from the eager model, as measured when it was made
      layers.json       path of the layer in the eager model by conv weight name, in graph order
      paddle/           model.json (PIR) and model.pdmodel (program), sharing model.pdiparams
      onnx/             model.onnx; FP32: model_fp16.onnx too; INT8: model_tensorrt.onnx too; and for each of them the
                        end_to_end.onnx, ... that deploys by itself
      golden/           picture.png and, in golden.json, the tensor and the detections that it becomes
      calibration.json  INT8 only: scales by conv weight name
      paddledetection/  only with --with-nms: PaddleDetection's own graph, NMS included

Later steps need the bundle and nothing else: not ppdet, not the config, not the checkpoint.
"""

from __future__ import annotations

import os
import re
import shutil
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any, Literal, Self

from gfldeploy.bundle_records import RECORDS
from gfldeploy.detection_options import DetectionOptions
from gfldeploy.errors import BundleError, ConfigError, DataError, reading
from gfldeploy.files import StrPath, atomic_directory, read_json, sha256, writing
from gfldeploy.graph_guard import check_graph
from gfldeploy.images.preprocess import Preprocess
from gfldeploy.nms import NmsParams
from gfldeploy.serialization import FileFormat, Versioned, check
from gfldeploy.text import first_of

MANIFEST = "manifest.json"
LAYERS = "layers.json"
GOLDEN = "golden/golden.json"
_AGAIN = "Export the bundle again."
_DISTRUST = "Do not use this bundle."
# What no detector reaches.
_MOST_FILES = 100
_MOST_DEPTH = 8
_MOST_BYTES = 8 << 30  # of a file
_MOST_CLASSES = 100_000
_MOST_LEVELS = 16
_MOST_STRIDE = 4096
_MOST_BATCH = 4096
_MOST_REG_MAX = 10_000
_MOST_PARAMETERS = 10**13
_MOST_CANDIDATES = 10**7
_LARGEST_SIDE = 8192
GraphName = Literal[
    "paddle",
    "paddle_program",
    "onnx",
    "onnx_fp16",
    "onnx_tensorrt",
    "paddledetection",
    "end_to_end",
    "end_to_end_fp16",
    "end_to_end_tensorrt",
]
# What deploys by itself, by the graph that it is made around (`export.end_to_end`), and what it gives.
END_TO_END: Mapping[GraphName, GraphName] = {
    "onnx": "end_to_end",
    "onnx_fp16": "end_to_end_fp16",
    "onnx_tensorrt": "end_to_end_tensorrt",
}
END_TO_END_OUTPUTS = ("boxes", "scores", "classes", "count")


@dataclass(frozen=True)
class TensorSpec:
    """A graph input or output. A dimension of `None` is free."""

    name: str
    dtype: Literal["float32", "int32"]
    shape: tuple[int | None, ...]

    def __post_init__(self) -> None:
        _need(1 <= len(self.shape) <= 4, "shape", list(self.shape))
        for size in self.shape:
            _need(size is None or 1 <= size <= _MOST_CANDIDATES, "shape", list(self.shape))


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

    def __post_init__(self) -> None:
        _need(bool(re.fullmatch("[0-9a-f]{64}", self.sha256)), "sha256", self.sha256)


@dataclass(frozen=True)
class Manifest(Versioned):
    """`manifest.json`.

    `graphs`: `paddle` (PIR), `paddle_program` (the older format, which PaddleSlim and oneDNN INT8 need), `onnx` (with
    ONNX Runtime's and OpenVINO's Q/DQ in INT8 bundles), and graphs that no engine here runs:
    `onnx_fp16` (FP32 bundles: FP16 convolutions for GPUs, the decode and all inputs and outputs FP32; absent where FP16
    differs too much), `onnx_tensorrt` (INT8 bundles: symmetric Q/DQ as TensorRT wants them, from the same calibration),
    `paddledetection` (with NMS, for PaddleDetection's deploy tools), and, around each ONNX graph, `end_to_end`,
    `end_to_end_fp16` or `end_to_end_tensorrt`: pixels in, detections out.
    `left_out`: why the bundle lacks a graph that a detector usually has, by the graph's name.
    `notes`: what users of the detector should know, one sentence each, such as that its class names are made up.
    `candidates`: how many anchors of an image the graphs decode, those with the highest scores; None for all.
    `classes`: names in the order of the score channels. `score_channels` may exceed their number: GFLv2 has one more.
    `provenance`: config, checkpoint digest, versions, command line; for people, nothing reads it back.

    Raises `BundleError` for values that no detector has, so that a manifest cannot claim memory or time that has
    nothing to do with the size of its bundle.
    """

    # Schema 2 added `candidates`, schema 3 `left_out` and `notes`: absent, they have their defaults.
    FORMAT = FileFormat("a manifest", "gfldeploy export", 3, {1: dict, 2: dict}, BundleError)

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

    def __post_init__(self) -> None:
        for name, value, least, most in (
            ("candidates", self.candidates, 1, _MOST_CANDIDATES),
            ("reg_max", self.reg_max, 1, _MOST_REG_MAX),
            ("parameters", self.parameters, 0, _MOST_PARAMETERS),
            ("the number of strides", len(self.strides), 1, _MOST_LEVELS),
            ("the number of classes", len(self.classes), 1, _MOST_CLASSES),
            ("the number of graphs", len(self.graphs), 1, _MOST_FILES),
            ("the number of outputs", len(self.outputs), 1, _MOST_FILES),
            ("the number of inputs", len(self.inputs), 1, 1),
        ):
            _need(value is None or least <= value <= most, name, value)
        _need(all(1 <= stride <= _MOST_STRIDE for stride in self.strides), "strides", list(self.strides))
        extra = self.score_channels - len(self.classes)
        if extra not in (0, 1):  # 1: GFLv2
            raise BundleError(f"{len(self.classes)} classes do not fit {self.score_channels} score channels", _AGAIN)
        for graph, files in self.graphs.items():
            _need((files.params is None) != graph.startswith("paddle"), f"graphs.{graph}", files)
        image = self.inputs[0]
        _need((image.name, image.dtype) == ("image", "float32"), "inputs", image)
        _need(len(image.shape) == 4 and image.shape[1] == 3, "the image's shape", list(image.shape))
        for size, most in zip(image.shape, (_MOST_BATCH, 3, _LARGEST_SIDE, _LARGEST_SIDE), strict=True):
            _need(size is None or size <= most, "the image's shape", list(image.shape))
        for file in self.files:  # relative, below the bundle, in one spelling
            path = PurePosixPath(file)
            if not path.parts or path.is_absolute() or ".." in path.parts or path.as_posix() != file or "\0" in file:
                raise BundleError(f"it names files outside the bundle: {file!r:.60}", _DISTRUST)

    def turned(self, detection: DetectionOptions, threshold: float | None = None) -> Self:
        """With the NMS that a user has turned so; itself where nothing is turned.

        `threshold`: as for `DetectionOptions.shown`. Raises as `DetectionOptions.nms`.
        """
        nms = detection.nms(self.nms, self.classes, threshold)
        return self if nms is self.nms else replace(self, nms=nms)


def needed_multiple(strides: Sequence[int]) -> int:
    """What the sides of a network's input must be multiples of, in pixels, for pyramid levels of these strides.

    FPN adds each level, doubled, to the next finer one: they only fit if the levels of the backbone, the coarsest of
    which has a stride of 32, halve exactly. What else a model needs is seen when it is exported (`export.levels`).
    """
    return max((stride for stride in strides if stride <= 32), default=32)


def _need(right: bool, key: str, value: object) -> None:
    if not right:
        raise BundleError(f"{key} is {value!r:.60}", _AGAIN)


def _wrong_output(manifest: Manifest) -> str | None:
    """What keeps the outputs from being those of a detector, see docs/contracts.md."""
    outputs = {spec.name: spec for spec in manifest.outputs}
    for name, rank, last in (("scores", 3, manifest.score_channels), ("boxes", 3, 4), ("anchors", 2, None)):
        spec = outputs.pop(name, None)
        right = spec is not None or (name == "anchors" and manifest.candidates is None)
        if spec is not None:
            right = len(spec.shape) == rank and (last is None or spec.shape[-1] in (None, last))
        if not right:
            return f"the output {name} is {list(spec.shape) if spec else 'missing'}"
    return f"there is an unknown output: {next(iter(outputs))!r:.60}" if outputs else None


@dataclass(frozen=True)
class Bundle:
    """An opened bundle: `directory` and its checked `manifest`."""

    directory: Path
    manifest: Manifest
    _opened_digest: str | None = field(default=None, repr=False, compare=False)

    @classmethod
    def open(cls, directory: StrPath, *, detector: bool = True) -> Self:
        """Read the manifest, and check it and the other files, whoever made them.

        Every file must be there with the recorded size, and no other; records must hold what gfldeploy writes (see
        `bundle_records`), graphs only arithmetic (see `graph_guard`). Digests are not compared: `verify_files` does
        that. `detector`: False for a graph that is only timed and detects nothing. Raises `BundleError`.
        """
        directory = Path(directory)
        path = directory / MANIFEST
        remedy = "Give the directory that `gfldeploy export` wrote."
        with reading(directory, BundleError, remedy):  # a name that no directory can have
            if not directory.is_dir():
                raise BundleError(f"{directory} is not a directory", remedy)
            found = path.stat() if path.exists() else None
        if found is None:
            raise BundleError(f"{directory} is not a bundle: it has no {MANIFEST}", "Make one with `gfldeploy export`.")
        present = set(_files_below(directory)) - {MANIFEST}
        manifest, digest = Manifest.read(path), sha256(path)
        if not os.path.samestat(found, path.stat()):
            raise BundleError(f"{directory} was replaced while it was read", "Try again.")
        if detector and (problem := _wrong_output(manifest)):
            raise BundleError(f"{path}: {problem}", _AGAIN)
        bundle = cls(directory, manifest, digest)
        bundle._check_files(present)
        for name in manifest.files:
            if name in RECORDS:
                bundle.record(name)
        for graph in manifest.graphs:
            try:
                check_graph(graph, *bundle.graph(graph))
            except BundleError:
                bundle.verify_files()  # a damaged file has a clearer message
                raise
        return bundle

    def __fspath__(self) -> str:
        """The directory: a function that takes the path of a bundle takes an opened one, too."""
        return os.fspath(self.directory)

    @property
    def name(self) -> str:
        return self.manifest.name

    @property
    def digest(self) -> str:
        """SHA-256 of the manifest, which itself holds the digest of every file: the bundle's identity.

        It stays that of the bundle that was opened, whatever has taken its place in the directory since.
        """
        return self._opened_digest or sha256(self.directory / MANIFEST)

    def at_size(self, size: tuple[int, int] | None) -> Self:
        """The same bundle, with the same files and digest, whose images are resized to another `target_size`.

        `size`: (height, width) in pixels as in `Preprocess`; None, or what resizes images as it does now, gives the
        bundle itself. Raises `BundleError` where the graphs do not take inputs of this size, and `ValueError` for what
        is no size.
        """
        preprocess = self.manifest.preprocess
        if size is not None and not (isinstance(size, tuple) and len(size) == 2 and min(size) >= 1):
            raise ValueError(f"an input size must be a tuple of height and width in pixels, not {size!r}")
        if size is None or preprocess.same_size(size):
            return self
        asked, own = ("x".join(map(str, sides)) for sides in (size, preprocess.target_size))
        if preprocess.fixed or self.manifest.inputs[0].shape[2:] != (None, None):
            raise BundleError(
                f"{self.directory} takes inputs of {own} alone, not of {asked}",
                "Export it without --input-shape for all sizes, or with another for just that.",
            )
        try:
            resized = replace(preprocess, target_size=size)
        except ConfigError as error:
            raise BundleError(f"{self.directory} at {asked}: {error.problem}", error.remedy) from error
        step, pad = needed_multiple(self.manifest.strides), preprocess.pad_stride
        # With keep_ratio a side may be of any number of pixels, and is padded to any multiple of the stride.
        sides = (max(pad, 1),) if preprocess.keep_ratio else resized.padded_size(*size)
        if any(side % step for side in sides):
            nearest = "x".join(str(max(round(side / step), 1) * step) for side in size)
            padded = f"images are padded to multiples of {pad}" if pad else "images are not padded"
            other = f"Use --input-size {nearest}, or export" if not preprocess.keep_ratio else "Export"
            raise BundleError(
                f"{self.directory} does not run at {asked}: its network takes multiples of {step} px, and {padded}",
                f"{other} it with pad_to_stride {step} in TestReader's PadBatch.",
            )
        return replace(self, manifest=replace(self.manifest, preprocess=resized))

    def has_graph(self, name: GraphName) -> bool:
        return name in self.manifest.graphs

    def graph(self, name: GraphName) -> tuple[Path, Path | None]:
        """Paths of a graph's model and parameter files. Raises `BundleError` if the bundle has no such graph."""
        graph = self.manifest.graphs.get(name)
        if graph is None:
            problem = f"{self.directory} has no {name} graph"
            if name in self.manifest.left_out:
                raise BundleError(f"{problem}: {self.manifest.left_out[name]}", "Use another engine.")
            raise BundleError(f"{problem} (it has: {', '.join(self.manifest.graphs)})", _AGAIN)
        return self.directory / graph.model, self.directory / graph.params if graph.params else None

    def outputs(self, name: GraphName) -> tuple[str, ...]:
        """The names of what a graph gives."""
        of_network = tuple(spec.name for spec in self.manifest.outputs)
        return END_TO_END_OUTPUTS if name in END_TO_END.values() else of_network

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
            data = read_json(path)
            try:
                check(RECORDS[name], data)
            except DataError as error:
                raise BundleError(f"{path}: {error.problem}", _AGAIN) from error
            assert isinstance(data, dict)
            return data

    def verify_files(self) -> None:
        """Hash every file again. Raises `BundleError` naming the first that changed."""
        self._check_files(set(_files_below(self.directory)) - {MANIFEST})
        for name, record in self.manifest.files.items():
            path = self.directory / name
            with reading(path, BundleError, "Copy the bundle again."):
                same = sha256(path) == record.sha256
            if not same:
                raise BundleError(
                    f"{path} has changed since the bundle was made", "Export the bundle again, or restore the file."
                )

    def _check_files(self, present: set[str]) -> None:
        expected = self.manifest.files
        named = {path for graph in self.manifest.graphs.values() for path in (graph.model, graph.params) if path}
        if not named <= set(expected):
            raise BundleError(f"{self.directory / MANIFEST} names files outside the bundle", _DISTRUST)
        if missing := sorted(set(expected) - present):
            raise BundleError(
                f"{self.directory} lacks {first_of(missing, 3)}", "Copy the whole directory, or export again."
            )
        if extra := sorted(present - set(expected)):
            raise BundleError(
                f"{self.directory} has files that are not part of the bundle: {first_of(extra, 3)}",
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

    The manifest's `files` are filled in here, from what the directory holds, and the bundle is opened once to check
    it. `detector`: as for `Bundle.open`. Raises `OutputError`, `BundleError`.
    """
    with atomic_directory(target, force=force, need_bytes=need_bytes) as directory:
        manifests: list[Manifest] = []
        yield directory, manifests
        (manifest,) = manifests
        _write_manifest(directory, manifest)
        Bundle.open(directory, detector=detector)


@contextmanager
def complete_bundle(bundle: Bundle) -> Iterator[Bundle]:
    """The bundle, or, of one that is being made and has no manifest on disk, a copy of it that can be opened.

    The copy is beside it for as long as the block runs. Raises `OutputError`, `BundleError`.
    """
    if (bundle.directory / MANIFEST).exists():
        yield bundle
        return
    with TemporaryDirectory(dir=bundle.directory.parent) as parent:
        directory = Path(parent) / bundle.directory.name
        with writing(bundle.directory):
            shutil.copytree(bundle.directory, directory)
            _write_manifest(directory, bundle.manifest)
        yield Bundle.open(directory)


def _write_manifest(directory: Path, manifest: Manifest) -> None:
    """With a record of every file of the directory."""
    files = {
        name: FileRecord(sha256(directory / name), (directory / name).stat().st_size)
        for name in sorted(_files_below(directory))
    }
    replace(manifest, files=files).write(directory / MANIFEST)


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
                    raise BundleError(f"{path} is a link", "Copy the bundle with `cp -rL`, which follows links.")
                if stat.S_ISDIR(status.st_mode) and depth < _MOST_DEPTH:
                    pending.append((path, depth + 1))
                    continue
                if not stat.S_ISREG(status.st_mode):
                    raise BundleError(f"{path} is no regular file", _DISTRUST)
                count += 1
                if count > _MOST_FILES:
                    raise BundleError(f"{directory} is no bundle: it has over {_MOST_FILES} files", _DISTRUST)
                if status.st_size > _MOST_BYTES:
                    raise BundleError(f"{path} has {status.st_size:,} bytes, more than files of bundles", _DISTRUST)
                yield path.relative_to(directory).as_posix()
