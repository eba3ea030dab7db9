"""A bundle's manifest, and the records beside it."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))

from conftest import write_tiny_bundle

from gfldeploy.bundle import MANIFEST, Bundle
from gfldeploy.cli.inspect import show
from gfldeploy.inspection import inspect

_HOME = tempfile.TemporaryDirectory()
_BUNDLE = write_tiny_bundle(Path(_HOME.name) / "tiny")

_ONE = {"batch": 1, "height": 320, "width": 256, "max_score_difference": 1e-6, "max_box_difference_px": 1e-4}
_ENGINE = {"score_difference": 1e-3, "score_difference_max": 0.05, "detections": 89, "detections_found": 0.99}
_ACCURACY = {"fp32": {"ap": 0.5, "images": 6}, "engines": {"onnxruntime": {"ap": 0.49}}}
_RECORDS = {
    "parity.json": {
        "reference": "eager",
        "tolerance": {"score": 5e-5, "box_px": 0.05},
        "comparisons": [{"graph": "onnx", "engine": "onnxruntime", **_ONE}],
        "fp16": {"left_out": "it is too far off"},
        "engines": {"onnxruntime": {**_ENGINE, "convolutions": {"int8": 50, "fp32": 7}, "not_int8": ["head (7)"]}},
        "accuracy": _ACCURACY,
        "sizes": [
            {"size": [32, 64], "problem": "too small", "engines": {}},
            {"size": [64, 64], "problem": None, "accuracy": _ACCURACY, "engines": {"onnxruntime": _ENGINE}},
        ],
        "kept_float": [{"name": "head", "convolutions": 2, "why": "asked for"}],
        "speed": {"onnxruntime": {"fp32_ms": 30.0, "int8_ms": 10.0, "ratio": 3.0}},
        "evaluation": {"images": 6},
        "algorithms": {
            "chosen": "avg",
            "tried": [
                {"algorithm": "avg", "error": None, "engines": {"onnxruntime": {**_ENGINE, "ap": None}}},
                {"algorithm": "hist", "error": "no", "engines": {}},
            ],
        },
    },
    "sensitivity.json": {
        "measure": "outputs",
        "groups": [
            {
                "name": "head",
                "convolutions": 2,
                "macs_share": 0.5,
                "score_difference": 0.1,
                "box_difference": 0.2,
                "total": 0.3,
            }
        ],
    },
    "calibration.json": {
        "algorithm": "avg",
        "images": {"ab": "a.jpg"},
        "convolutions": {"w": {"inputs": [3.0], "outputs": [{"low": -1, "high": 2.5}], "weights": [0.1]}},
        "kept_float": [["w", 0]],
    },
}


def seeds() -> Iterable[bytes]:
    """JSON objects: the content of the bundle's JSON files by name."""
    manifest = json.loads((_BUNDLE / MANIFEST).read_text())
    yield json.dumps({MANIFEST: manifest}).encode()
    more = {"left_out": {"paddle": "no Paddle"}, "notes": ["made up"], "provenance": {"versions": {"python": "3.11"}}}
    yield json.dumps({MANIFEST: manifest | more, "layers.json": {"weights": "head.conv"}, **_RECORDS}).encode()


def one(data: bytes, folder: Path) -> None:
    """Everything is sealed with the right digests, unless `data` is no such object: then it is the manifest."""
    directory = folder / "bundle"
    shutil.copytree(_BUNDLE, directory)
    try:
        files = json.loads(data)
        manifest = files.pop(MANIFEST)
        for name, content in files.items():
            (directory / name).write_text(json.dumps(content))
        record = {
            path.relative_to(directory).as_posix(): {
                "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
                "bytes": path.stat().st_size,
            }
            for path in directory.rglob("*")
            if path.is_file() and path.name != MANIFEST
        }
        if isinstance(manifest, dict) and "files" in manifest:
            manifest["files"] = record
        (directory / MANIFEST).write_text(json.dumps(manifest))
    except (ValueError, AttributeError, KeyError, TypeError, OSError, RecursionError):
        (directory / MANIFEST).write_bytes(data)
    bundle = Bundle.open(directory)
    show(inspect(bundle))
    bundle.manifest.preprocess.input_size(480, 640)
