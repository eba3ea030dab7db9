"""The JSON Schemas that the package ships: as the code says, true of what is written, and of nothing else."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import demo_bundles
import pytest
import yaml
from demo_bundles import ROOT, RunHere
from jsonschema import Draft202012Validator
from sample_deploy import DEPLOY
from sample_results import FAILED, OK, SKIPPED, altered, sample_results
from schema_checks import check_schema, problems

from gfldeploy import (
    audit,
    compare,
    diagnose,
    evaluate,
    inspect,
    merge_parts,
    predict_images,
    schemas,
    triton_repository,
)
from gfldeploy.bench.estimates import Estimate
from gfldeploy.json_schema import json_schema
from gfldeploy.serialization import plain
from gfldeploy.tune.deploy_file import SizeChoice

GONE = object()
# Of which this file makes none: they take PaddleDetection or minutes, and are checked where they are made.
ELSEWHERE = {"analysis", "layers", "parity", "calibration", "sensitivity", "access-log"}


def test_they_are_those_of_the_code() -> None:
    pytest.importorskip("starlette")
    with demo_bundles.imported(ROOT / "docs/generate_schemas.py") as generator:
        made = {name: generator.text_of(schema) for name, schema in generator.generated().items()}
    committed = {name: schemas.path_of(name).read_text(encoding="utf-8") for name in schemas.names()}
    assert made == committed, "run python docs/generate_schemas.py"


@dataclass(frozen=True)
class Sampled:
    """What a file holds.

    `low`, `high`: the ends; `kinds`: which,
    None for all.

    Raises nothing.
    """

    low: float
    high: float | None
    kinds: tuple[Literal["a", "b"], ...] | None = None
    nested: tuple[Sampled, ...] = ()


def test_a_schema_is_that_of_the_types() -> None:
    """Written out by hand."""
    fields = {
        "low": {"type": "number", "description": "The ends."},
        "high": {"type": ["number", "null"], "description": "The ends."},
        "kinds": {
            "anyOf": [{"type": "array", "items": {"enum": ["a", "b"]}}, {"type": "null"}],
            "description": "Which, null for all.",
            "default": None,
        },
        "nested": {"type": "array", "items": {"$ref": "#/$defs/Sampled"}, "default": []},
        "sum": {"type": "number"},
    }
    shape = {"type": "object", "properties": fields, "required": ["low", "high", "sum"], "additionalProperties": False}
    made = json_schema(Sampled, "sampled", "A file", "Of a test.", {Sampled: {"sum": float}})
    assert made == {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": "urn:gfldeploy:schema:sampled",
        "title": "A file",
        "description": "Of a test.",
        **shape,
        "$defs": {"Sampled": {"description": "What a file holds.", **shape}},
    }
    with pytest.raises(TypeError, match="no schema is known for"):
        json_schema(complex, "x", "x", "x")


@pytest.mark.parametrize("name", schemas.names())
def test_a_schema_is_one(name: str, run_here: RunHere) -> None:
    schema = schemas.schema(name)
    Draft202012Validator.check_schema(schema)
    done = run_here("schema", name)
    assert json.loads(done.stdout) == schema
    assert problems(name, "text") and problems(name, 1)


def test_the_command_lists_them(run_here: RunHere) -> None:
    done = run_here("schema")
    listed = {line.split()[0]: Path(line.split("  ")[-1].strip()) for line in done.stdout.splitlines()}
    assert {name: path.read_bytes() for name, path in listed.items()} == {
        name: schemas.path_of(name).read_bytes() for name in schemas.names()
    }
    done = run_here("schema", "result")
    assert done.returncode == 2 and "Give one of access-log, analysis, " in done.stderr


@pytest.fixture(scope="module")
def written(tiny_whole: Path, tiny_coco: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """Real files, and what commands print, by the name of the schema."""
    folder = tmp_path_factory.mktemp("written")
    images = shutil.copytree(tiny_coco.parent / "images", folder / "images")
    (images / "broken.jpg").write_bytes(b"no image")
    sample_results().write(folder / "results.json")
    one = replace(sample_results(), cells=(OK, replace(SKIPPED, status="failed"), altered(OK, batch_size=4)))
    other = replace(one, cells=(*one.cells[:2], replace(altered(FAILED, batch_size=4), runs=())))
    sizes = SizeChoice((64, 96), Estimate(1.5, 1.4, 1.6, 12), 0.01, (((64, 96), 0.004), ((32, 48), 0.2)))
    replace(DEPLOY, sizes=sizes).write(folder / "deploy.yml")
    found, part, merged = (folder / name for name in ("found", "part", "merged"))
    predict_images(tiny_whole, images, output=found, engine="onnxruntime")
    predict_images(tiny_whole, data=tiny_coco, output=part, engine="onnxruntime", shard=(1, 1), input_size=(32, 64))
    merge_parts(part, output=merged)
    triton_repository(tiny_whole, output=folder / "detector")
    triton_repository(tiny_whole, output=folder / "ensemble", backend="onnxruntime")
    measured = [
        evaluate(tiny_whole, data=tiny_coco, engine="onnxruntime", input_sizes=sizes)
        for sizes in ((), ((64, 96), (32, 64)))
    ]
    return {
        "manifest": [tiny_whole / "manifest.json"],
        "golden": [tiny_whole / "golden/golden.json"],
        "results": [folder / "results.json"],
        "deploy": [folder / "deploy.yml"],
        "detections": [found / "detections.jsonl", merged / "detections.jsonl"],
        "coco": [found / "coco.json", merged / "coco.json"],
        "images": [found / "images.json"],
        "predict": [found / "predict.json", merged / "predict.json"],
        "part": [part / "predict.json"],
        "triton-detector": list((folder / "detector").rglob("gfldeploy.json")),
        "triton-preprocess": list((folder / "ensemble").rglob("gfldeploy.json")),
        "audit": [plain(audit(data=images, config_or_bundle=tiny_whole, input_sizes=[(32, 64)]))],
        "compare": [plain(compare(one, other))],
        "eval": [one.to_dict() for one in measured],
        "inspect": [inspect(tiny_whole)],
        "doctor": [diagnose().to_dict()],
    }


def content(one: Any) -> Any:
    """As JSON has it; of a file with lines the first."""
    if not isinstance(one, Path):
        return json.loads(json.dumps(one))
    text = one.read_text()
    if one.suffix == ".jsonl":
        return json.loads(text.splitlines()[0])
    return yaml.safe_load(text) if one.suffix == ".yml" else json.loads(text)


def test_what_is_written_is_as_they_say(written: dict[str, list[Any]]) -> None:
    assert set(written) == set(schemas.names()) - ELSEWHERE
    for name, some in written.items():
        assert some, name
        for one in some:
            check_schema(name, one)


@pytest.mark.parametrize(
    ("name", "place", "value"),
    [
        ("results", "schema", 7),
        ("results", "cells.0.cell.threads", None),
        ("results", "cells.0.cell.thread", 2),
        ("results", "cells.0.cell.precision", "int4"),
        ("results", "cells.0.cell.input_size", [320]),
        ("results", "cells.0.runs.0.samples.latency_ms", [1.0, "2.0"]),
        ("results", "cells.0.runs.0.samples.wall_s", -1),
        ("results", "machine.memory_gb", GONE),
        ("deploy", "choice.path", GONE),
        ("deploy", "choice.evidence.images_per_s.n", 1.5),
        ("deploy", "sizes.drops.0", [[64, 96], 0.004, 1]),
        ("manifest", "graphs.onnx_fp64", {"model": "a"}),
        ("manifest", "preprocess.mean", "0.485"),
        ("golden", "detections.0.box", [1, 2, 3]),
        ("golden", "tolerance", GONE),
        ("detections", "width", GONE),
        ("detections", "error", "both"),
        ("detections", "detections.0.score", "0.9"),
        ("coco", "0.category_id", None),
        ("images", "categories.0.name", GONE),
        ("predict", "what", "anything"),
        ("predict", "files", GONE),
        ("part", "records", GONE),
        ("triton-detector", "device", "tpu"),
        ("triton-preprocess", "preprocess", {}),
        ("audit", "rows.0.order", "random"),
        ("audit", "at_sizes.0.at_sizes.0", {}),
        ("audit", "limited.many", 1.0),
        ("compare", "pairs.0.slowness.0.at_least", "1"),
        ("eval", "ap", None),
        ("inspect", "nms.nms_top_k", "all"),
        ("doctor", "capabilities.0.works", "yes"),
    ],
)
def test_what_is_damaged_is_not(written: dict[str, list[Any]], name: str, place: str, value: object) -> None:
    data = content(written[name][0])
    *way, key = (int(word) if word.isdecimal() else word for word in place.split("."))
    holder = data
    for word in way:
        holder = holder[word]
    if value is GONE:
        del holder[key]
    elif isinstance(holder, list) and key == len(holder):
        holder.append(value)
    else:
        holder[key] = value
    assert problems(name, data)
