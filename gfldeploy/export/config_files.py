"""The files of a PaddleDetection config: read with a safe loader, and merged in the order in which ppdet does it."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from gfldeploy.errors import ConfigError
from gfldeploy.export.bounded_text import cut
from gfldeploy.yaml_file import PlainLoader, YamlError, read_yaml


class Tagged(dict[str, Any]):
    """A mapping under a local tag: `!COCODataSet {...}`. It replaces what it is merged over, as ppdet's objects do."""

    def __init__(self, tag: str, values: Mapping[str, Any]) -> None:
        super().__init__(values)
        self.tag = tag

    def __deepcopy__(self, memo: dict[int, Any]) -> Tagged:
        return Tagged(self.tag, {key: copy.deepcopy(value, memo) for key, value in self.items()})


class _Loader(PlainLoader):
    """Plain YAML, with PaddleDetection's own tags as mappings."""


def _construct_local(loader: _Loader, tag: str, node: yaml.Node) -> Any:
    if tag == "Callable":  # ppdet's wrapper for "call this Python function"
        raise yaml.constructor.ConstructorError(
            None, None, "refused !Callable, which runs Python code", node.start_mark
        )
    if isinstance(node, yaml.MappingNode):
        return Tagged(tag, {str(key): value for key, value in loader.construct_mapping(node, deep=True).items()})
    if isinstance(node, yaml.ScalarNode) and not node.value:
        return Tagged(tag, {})
    raise yaml.constructor.ConstructorError(None, None, f"!{tag} must be followed by a mapping", node.start_mark)


def _refuse_python(loader: _Loader, suffix: str, node: yaml.Node) -> Any:
    raise yaml.constructor.ConstructorError(
        None, None, f"refused !!python/{suffix}, which runs Python code", node.start_mark
    )


_Loader.add_multi_constructor("!", _construct_local)
_Loader.add_multi_constructor("tag:yaml.org,2002:python/", _refuse_python)

Layers = list[tuple[Path, dict[str, Any]]]

_MOST_FILES = 100  # of a `_BASE_` chain
_MOST_MERGED = 200_000  # values: a file that is named again is merged again


def read_chain(path: Path) -> tuple[Layers, dict[str, Any]]:
    """Every file of the `_BASE_` chain, bases first, with its own values; and the values of all, merged."""
    layers: Layers = []
    merged: dict[str, dict[str, Any]] = {}  # by real path: no file is read twice
    spent = 0

    def visit(file: Path, chain: tuple[Path, ...]) -> dict[str, Any]:
        nonlocal spent
        real = os.path.realpath(file)
        if real in merged:
            return merged[real]
        if real in map(os.path.realpath, chain):
            cycle = " -> ".join(link.name for link in (*chain, file))
            raise ConfigError(f"{chain[0]}: _BASE_ goes in a circle: {cut(cycle)}", "Remove one of these references.")
        if len(layers) + len(chain) >= _MOST_FILES:
            raise ConfigError(f"{path}: its _BASE_ chain has more than {_MOST_FILES} files", "Merge some of them.")
        values = _read_config(file, asked_by=chain[-1] if chain else None)
        bases = values.pop("_BASE_", None) or []
        if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
            raise ConfigError(f"{file}: _BASE_ must be a list of files", "Write it as ['../base.yml'].")
        settings: dict[str, Any] = {}
        for base in bases:
            home = os.path.expanduser(base) if base.startswith("~") else base  # noqa: PTH111 - unknown users stay
            below = visit(file.parent / home, (*chain, file))
            spent += _size(below)
            if spent > _MOST_MERGED:
                raise ConfigError(f"{path}: its _BASE_ chain merges the same files again and again", "Name each once.")
            _merge(settings, below)
        _merge(settings, values)
        layers.append((file, values))
        merged[real] = settings
        return settings

    return layers, visit(path, ())


def _size(value: Any) -> int:
    """How many values a mapping or list holds, itself included."""
    if isinstance(value, dict):
        return 1 + sum(map(_size, value.values()))
    return 1 + sum(map(_size, value)) if isinstance(value, list) else 1


def _read_config(file: Path, asked_by: Path | None) -> dict[str, Any]:
    origin = f" (named by _BASE_ in {asked_by})" if asked_by else ""
    if file.suffix not in (".yml", ".yaml"):
        raise ConfigError(
            f"{cut(str(file))} is not a .yml or .yaml file{origin}", "Pass the PaddleDetection config of the detector."
        )
    try:
        values = read_yaml(file, _Loader)
    except FileNotFoundError:
        remedy = "Correct _BASE_, or copy that file too." if asked_by else "Check the path."
        raise ConfigError(f"config file {cut(str(file))} does not exist{origin}", remedy) from None
    except OSError as error:
        reason = error.strerror or error
        raise ConfigError(
            f"config file {cut(str(file))} cannot be read{origin}: {reason}", "Check the file."
        ) from error
    except YamlError as error:
        if error.problem == "not UTF-8 text":
            raise ConfigError(f"config file {file} is not UTF-8 text{origin}", "Save it as UTF-8.") from error
        line = f":{error.line}" if error.line else ""
        remedy = "Remove that tag." if error.problem.startswith(("refused", "unknown tag")) else "Correct the YAML."
        raise ConfigError(f"{file}{line}: {error.problem}", remedy) from error
    if values is None:
        raise ConfigError(f"{file} is empty{origin}", "Pass a PaddleDetection config.")
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ConfigError(f"{file} is not a mapping of settings{origin}", "Pass a PaddleDetection config.")
    return values


def _merge(into: dict[str, Any], new: Mapping[str, Any]) -> None:
    """Merge `new` over `into`, mapping by mapping, as ppdet does; values are copied."""
    for key, value in new.items():
        old = into.get(key)
        if type(old) is dict and type(value) is dict:
            _merge(old, value)
        else:
            into[key] = copy.deepcopy(value)
