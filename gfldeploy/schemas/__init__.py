"""The JSON Schemas beside this module, of all that is written for programs: `docs/generate_schemas.py` makes them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from gfldeploy.errors import UsageError

_SUFFIX = ".schema.json"


def names() -> list[str]:
    """Of the schemas."""
    return sorted(path.name.removesuffix(_SUFFIX) for path in Path(__file__).parent.glob(f"*{_SUFFIX}"))


def path_of(name: str) -> Path:
    """The file of a schema."""
    return Path(__file__).with_name(f"{name}{_SUFFIX}")


def schema(name: str) -> dict[str, Any]:
    """Give the JSON Schema (draft 2020-12) of a file that gfldeploy writes, or of what a command prints with `--json`.

    Args:
        name: Of the schema, such as "results" or "deploy"; docs/formats.md lists them.

    Returns:
        The schema, JSON-ready.

    Raises:
        UsageError: There is no such schema.
    """
    if name not in names():
        raise UsageError(f"there is no schema {name!r:.60}", f"Give one of {', '.join(names())}.")
    content: dict[str, Any] = json.loads(path_of(name).read_text(encoding="utf-8"))
    return content


@dataclass(frozen=True)
class _Source:
    """What a schema is made of: see `json_schema`."""

    kind: Any
    title: str
    description: str
    computed: Mapping[type, Mapping[str, Any]] = field(default_factory=dict)
    closed: bool = True


def generated() -> dict[str, dict[str, Any]]:
    """All schemas anew, by name, from the code."""
    from gfldeploy.json_schema import json_schema

    return {
        name: json_schema(one.kind, name, one.title, one.description, one.computed, one.closed)
        for name, one in _sources().items()
    }


def _sources() -> dict[str, _Source]:
    from gfldeploy.accuracy import EVALUATED
    from gfldeploy.analysis.record import Analysis
    from gfldeploy.batching.audit import Audit
    from gfldeploy.bench.compare import Comparison
    from gfldeploy.bench.results import BenchResults
    from gfldeploy.bundle import Manifest
    from gfldeploy.bundle_records import RECORDS
    from gfldeploy.doctor import Diagnosis
    from gfldeploy.engines.registry import Capability
    from gfldeploy.inspection import INSPECTED
    from gfldeploy.predict.outputs import COCO_RESULTS, DETECTED, LISTED_IMAGES
    from gfldeploy.predict.session import PART_NOTE, RESULTS_NOTE
    from gfldeploy.serve.access_log import LOGGED
    from gfldeploy.triton.settings import DetectorSettings, PreprocessSettings
    from gfldeploy.tune.deploy_file import Deploy

    records = {
        "parity": ("parity.json", "How far the graphs of a bundle are from what they were made of."),
        "layers": ("layers.json", "The path of each layer in PaddleDetection's model, by the name of its weights."),
        "calibration": ("calibration.json", "The ranges by which an INT8 bundle was quantised."),
        "sensitivity": ("sensitivity.json", "Which convolutions INT8 hurts most."),
        "golden/golden": ("golden/golden.json", "What the golden picture of a bundle becomes, step by step."),
    }
    return {
        "results": _Source(BenchResults, "results.json", "Of `gfldeploy bench`, `demo` and `load`."),
        "deploy": _Source(Deploy, "deploy.yml", "Of `gfldeploy tune`."),
        "manifest": _Source(Manifest, "manifest.json", "Of a bundle of `gfldeploy export` or `quantize`."),
        **{
            name.rpartition("/")[2]: _Source(
                RECORDS[f"{name}.json"], title, f"Of a bundle. {text} Other fields may be there.", closed=False
            )
            for name, (title, text) in records.items()
        },
        "analysis": _Source(
            Analysis, "analysis.json", "Of `gfldeploy analyze`.", {Analysis: {"schema": Literal[1], "answer": [str]}}
        ),
        "detections": _Source(DETECTED, "A line of detections.jsonl", "Of `gfldeploy predict` and `merge`: an image."),
        "coco": _Source(COCO_RESULTS, "coco.json", "Of `gfldeploy predict` and `merge`: results in COCO's format."),
        "images": _Source(LISTED_IMAGES, "images.json", "Of `gfldeploy predict` and `merge`: what ids stand for."),
        "predict": _Source(RESULTS_NOTE, "predict.json", "Of `gfldeploy predict` and `merge`: how it was made."),
        "part": _Source(PART_NOTE, "predict.json of a part", "Of `gfldeploy predict --shard K/N`."),
        "triton-detector": _Source(DetectorSettings, "gfldeploy.json", "Of a model of `gfldeploy triton`: a detector."),
        "triton-preprocess": _Source(
            PreprocessSettings, "gfldeploy.json", "Of a model of `gfldeploy triton`: preprocessing."
        ),
        "access-log": _Source(LOGGED, "A line of the access log", "Of `gfldeploy serve`: a request."),
        "audit": _Source(Audit, "audit --json", "What `gfldeploy audit --json` prints."),
        "compare": _Source(Comparison, "compare --json", "What `gfldeploy compare --json` prints."),
        "eval": _Source(EVALUATED, "eval --json", "What `gfldeploy eval --json` prints."),
        "inspect": _Source(INSPECTED, "inspect --json", "What `gfldeploy inspect --json` prints."),
        "doctor": _Source(
            Diagnosis, "doctor --json", "What `gfldeploy doctor --json` prints.", {Capability: {"works": bool}}
        ),
    }
