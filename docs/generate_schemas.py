"""Writes gfldeploy/schemas/*.schema.json from the code: `python docs/generate_schemas.py`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from gfldeploy.schemas import generated, names, path_of


def text_of(schema: Mapping[str, Any]) -> str:
    """The content of its file."""
    return json.dumps(schema, indent=2, ensure_ascii=False) + "\n"


def main() -> None:
    """Write all, and remove those that are no more."""
    schemas = generated()
    for name in names():
        if name not in schemas:
            path_of(name).unlink()
    for name, schema in schemas.items():
        path_of(name).write_text(text_of(schema), encoding="utf-8")


if __name__ == "__main__":
    main()
