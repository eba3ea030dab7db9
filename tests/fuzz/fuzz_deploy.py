"""A deploy file: read, compared with this machine, and followed to its bundle."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterable
from pathlib import Path

import yaml

sys.path.append(str(Path(__file__).resolve().parents[1]))

from mutations import mutate_bytes, mutate_value
from sample_deploy import DEPLOY

from gfldeploy.bench.compare import software_differences
from gfldeploy.machine import describe_machine
from gfldeploy.predict.engine_selection import choose
from gfldeploy.tune.deploy_file import Deploy

_MACHINE = describe_machine()
_ODD = (
    b"a: &a [x, x, x, x, x, x, x, x, x]\nb: &b [*a, *a, *a, *a, *a, *a, *a, *a]\nc: [*b, *b, *b, *b, *b]\n",
    *(b"x: !!python/object/apply:os.system [true]\n", b"x: !!int ''\n", b"x: " + b":".join([b"1"] * 3000) + b"\n"),
    *(
        b"{" * 2000,
        b"- " * 2000,
        b"x: !!timestamp foo\n",
        b"? [a]\n: b\n",
        b"x: 2001-99-99\n",
        b"<<: 5\n",
        b"&a [*a]\n",
    ),
)


def seeds() -> Iterable[bytes]:
    """A good one, and YAML that is not what it seems."""
    yield yaml.safe_dump(DEPLOY.to_dict(), sort_keys=False, allow_unicode=True).encode()
    yield from _ODD


def mutate(data: bytes, rng: random.Random) -> bytes:
    """By structure, mostly; YAML is a superset of JSON."""
    try:
        value = yaml.safe_load(data) if len(data) < 20_000 and data not in _ODD else None
    except Exception:  # noqa: BLE001, whatever PyYAML raises
        value = None
    if not isinstance(value, dict) or rng.random() < 0.3:
        return mutate_bytes(data, rng)
    try:
        return json.dumps(mutate_value(value, rng)).encode("utf-8", "surrogatepass")
    except (ValueError, TypeError, RecursionError):
        return mutate_bytes(data, rng)


def one(data: bytes, folder: Path) -> None:
    """Read, and use as `predict` does."""
    path = folder / "deploy.yml"
    path.write_bytes(data)
    deploy = Deploy.read(path)
    list(software_differences(deploy.machine, _MACHINE))
    deploy.bundle_path(path)
    choose(path)
