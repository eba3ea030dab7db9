"""The structure of the package: imports point one way, in no circle, and no two classes share a name."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[1]
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in (ROOT / "gfldeploy").rglob("*.py")
}
# Entry points, above every room: what a process starts with, and the lazily imported public API.
ENTRIES = {"gfldeploy", "gfldeploy.__main__"}


def imports_of(path: Path) -> set[str]:
    """The package's modules that a module imports, in functions too; `if TYPE_CHECKING` is left out."""
    found: set[str] = set()
    nodes: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            nodes += node.orelse
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= names & set(MODULES) or {node.module}
        else:
            nodes += ast.iter_child_nodes(node)
    return found & set(MODULES)


IMPORTS = {name: imports_of(path) for name, path in MODULES.items()}


def room(module: str) -> str:
    return module.split(".")[1]


def drawn_order() -> dict[str, int]:
    """The line of each room in the list that ARCHITECTURE.md draws, the highest first."""
    drawn = re.search(r"```imports\n(.*?)```", (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8"), re.DOTALL)
    assert drawn is not None
    return {name: place for place, line in enumerate(drawn[1].splitlines()) for name in line.split(", ")}


def test_every_room_is_drawn() -> None:
    assert set(drawn_order()) == {room(module) for module in set(MODULES) - ENTRIES}


def test_imports_point_down_the_drawn_order() -> None:
    order = drawn_order()
    wrong = [
        f"{module} imports {imported}"
        for module, found in IMPORTS.items()
        for imported in found - ENTRIES
        if module not in ENTRIES and room(module) != room(imported) and order[room(module)] >= order[room(imported)]
    ]
    assert sorted(wrong) == []


def test_no_module_is_imported_in_a_circle() -> None:
    assert len(tuple(TopologicalSorter(IMPORTS).static_order())) == len(MODULES)  # raises CycleError


def test_no_two_classes_share_a_name() -> None:
    places: dict[str, list[str]] = defaultdict(list)
    for module, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                places[node.name].append(module)
    assert {name: where for name, where in places.items() if len(where) > 1} == {}
