"""Read YAML from anywhere within bounds: regular files of bounded size, plain data, aliases that stay small."""

from __future__ import annotations

import errno
import stat
from pathlib import Path
from typing import Any

import yaml

# Several times the size of PaddleDetection's largest config, of an options file and of a deploy file.
_MOST_BYTES = 256 * 1024
_MOST_VALUES = 20_000  # aliases written out
_MOST_KEYS = 1000  # of one mapping
_MOST_LEVELS = 64
_MOST_DIGITS = 64

_PREFIX = "tag:yaml.org,2002:"
_PLAIN = tuple(_PREFIX + name for name in ("null", "bool", "int", "float", "str", "seq", "map"))


class YamlError(Exception):
    """The text is not YAML, or exceeds the bounds. `line` counts from 1, where it is known."""

    def __init__(self, problem: str, line: int | None = None) -> None:
        super().__init__(problem)
        self.problem = problem
        self.line = line


def _refused(problem: str, node: Any) -> yaml.MarkedYAMLError:
    return yaml.constructor.ConstructorError(None, None, problem, node.start_mark)


class PlainLoader(yaml.SafeLoader):
    """YAML's safe loader without dates, binary data and sets, and with bounds on aliases and numbers."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._level = 0
        self._extents: dict[int, tuple[int, int]] = {}  # by the node's id: its values with aliases written out, levels

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            node = super().compose_node(parent, index)
            if id(node) not in self._extents:  # it is still being read
                raise _refused("an alias refers to the value that it is part of", node)
            return node
        self._level += 1
        if self._level > _MOST_LEVELS:
            raise yaml.composer.ComposerError(None, None, _TOO_DEEP, self.get_mark())
        node = super().compose_node(parent, index)
        self._level -= 1
        parts: list[Any] = []
        if isinstance(node, yaml.SequenceNode):
            parts = node.value
        elif isinstance(node, yaml.MappingNode):
            if len(node.value) > _MOST_KEYS:
                raise _refused(f"a mapping of more than {_MOST_KEYS} keys", node)
            parts = [part for pair in node.value for part in pair]
        values, levels = 1, 1
        for part in parts:
            more, below = self._extents[id(part)]
            values, levels = values + more, max(levels, below + 1)
        if values > _MOST_VALUES:
            raise _refused(f"more than {_MOST_VALUES} values, aliases written out", node)
        if levels > _MOST_LEVELS:
            raise _refused(_TOO_DEEP, node)
        self._extents[id(node)] = values, levels
        return node

    def construct_plain(self, node: yaml.ScalarNode) -> Any:
        """A number or a boolean, or an error where a tag only claims that it is one."""
        kind = node.tag.removeprefix(_PREFIX)
        if isinstance(node.value, str) and len(node.value) > _MOST_DIGITS:
            raise _refused(f"a number of {len(node.value)} characters", node)
        try:
            return yaml.SafeLoader.yaml_constructors[node.tag](self, node)
        except (ValueError, KeyError, IndexError, OverflowError) as error:
            raise _refused(f"{node.value!r} cannot be read as {kind}", node) from error

    def construct_text(self, node: yaml.ScalarNode) -> str:
        text: str = self.construct_scalar(node)
        if any(character == "\0" or "\ud800" <= character <= "\udfff" for character in text):
            raise _refused("text with a NUL or half a surrogate pair", node)
        return text


# Dates stay text.
PlainLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag in (*_PLAIN, _PREFIX + "merge")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
PlainLoader.yaml_constructors = {
    tag: constructor for tag, constructor in yaml.SafeLoader.yaml_constructors.items() if tag in (None, *_PLAIN)
}
_TOO_DEEP = f"nested more than {_MOST_LEVELS} levels deep"
for _kind in ("bool", "int", "float"):
    PlainLoader.add_constructor(_PREFIX + _kind, PlainLoader.construct_plain)
PlainLoader.add_constructor(_PREFIX + "str", PlainLoader.construct_text)


def read_yaml(path: Path, loader: type[PlainLoader] = PlainLoader) -> Any:
    """The content of a YAML file as plain data: None, bool, int, float, str, list and dict.

    Raises `OSError` where the file cannot be read, is no regular file or too large; `YamlError` for anything else, with
    a problem of one line.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError(errno.EINVAL, "it is not a regular file")
    with path.open("rb") as file:
        data = file.read(_MOST_BYTES + 1)
    if len(data) > _MOST_BYTES:
        raise OSError(errno.EFBIG, f"it is larger than {_MOST_BYTES // 1024} KiB")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise YamlError("not UTF-8 text") from error
    try:
        return yaml.load(text, Loader=loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        problem = error.problem or error.context or "not valid YAML"
        problem = problem.replace("could not determine a constructor for the tag", "unknown tag")
        raise YamlError(_one_line(problem), mark.line + 1 if mark else None) from error
    except yaml.YAMLError as error:
        raise YamlError(f"not valid YAML: {_one_line(str(error))}") from error
    except RecursionError as error:
        raise YamlError(_TOO_DEEP) from error


def _one_line(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 200 else text[:200] + "..."
