"""Files and what commands print, against the JSON Schemas that the package ships."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import yaml
from jsonschema import Draft202012Validator

from gfldeploy.schemas import schema


@functools.cache
def validator(name: str) -> Draft202012Validator:
    """Of the schema of this name."""
    return Draft202012Validator(schema(name))


def problems(name: str, data: Any) -> list[str]:
    """What the schema has against the data, or against a file: JSON, lines of it, or YAML."""
    if isinstance(data, Path):
        text = data.read_text(encoding="utf-8")
        if data.suffix == ".jsonl":
            return [problem for line in text.splitlines() for problem in problems(name, json.loads(line))]
        data = yaml.safe_load(text) if data.suffix == ".yml" else json.loads(text)
    found = validator(name).iter_errors(json.loads(json.dumps(data)))  # which turns tuples into lists
    return [f"{error.json_path}: {error.message:.200}" for error in found]


def check_schema(name: str, data: Any) -> None:
    """Fail unless the data, or the file, is as the schema says."""
    assert problems(name, data) == []
