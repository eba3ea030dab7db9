"""The package as a whole: what importing it costs, what it depends on, and that every --help works."""

from __future__ import annotations

import ast
import json
import pkgutil
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import gfldeploy
from gfldeploy.cli import cli
from gfldeploy.engines.dependencies import TOOL_CHAINS

ROOT = Path(__file__).parents[1]
HEAVY = ("paddle", "ppdet", "paddleslim", "paddle2onnx", "onnxruntime")
COMMANDS = cli.list_commands(None)  # type: ignore[arg-type]  # the names do not depend on it
# Written against Paddle's classes, and imported by code that has made sure of Paddle.
PADDLE_AT_MODULE_LEVEL = {"gfldeploy.export.gfl_graph", "gfldeploy.export.demo_backbone"}


def loaded_by(code: str, *, blocked: tuple[str, ...] = ()) -> set[str]:
    """The top-level packages that a fresh process has imported after `code`."""
    # None in sys.modules makes an import of that name fail.
    script = f"import sys, json\nsys.modules.update(dict.fromkeys({blocked}))\n{code}\n"
    script += "print('\\n' + json.dumps([name for name, module in sys.modules.items() if module]))\n"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return {name.partition(".")[0] for name in json.loads(done.stdout.splitlines()[-1])}


def run_cli(*arguments: str) -> str:
    call = f"try:\n    main({list(arguments)})\nexcept SystemExit as stopped:\n    assert not stopped.code"
    return f"from gfldeploy.cli import main\n{call}"


def test_next_to_nothing_is_imported_before_interruptions_are_answered() -> None:
    code = "import sys; sys.path.insert(0, sys.argv[1]); import gfldeploy.__main__; print(*sys.modules)"
    # Without the site's own imports.
    loaded = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code, str(ROOT)], check=True, capture_output=True, text=True
    ).stdout.split()
    assert "gfldeploy.__main__" in loaded
    assert not {"typing", "re", "click", "pathlib"} & {*loaded}


def test_the_group_help_imports_nothing_heavy() -> None:
    for code in ("import gfldeploy", run_cli("--help"), run_cli("--version")):
        assert loaded_by(code) & {*HEAVY, "numpy", "cv2", "onnx", "rich", "pycocotools", "yaml"} == set()


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_every_command(command: str) -> None:
    loaded = loaded_by(run_cli(command, "--help"), blocked=HEAVY)
    assert loaded & {*HEAVY, "cv2", "onnx", "pycocotools"} == set()


def test_the_group_help_lists_every_command() -> None:
    done = subprocess.run([sys.executable, "-m", "gfldeploy", "-h"], capture_output=True, text=True, check=True)
    assert set(re.findall(r"^  ([a-z]+) ", done.stdout, re.MULTILINE)) == set(COMMANDS)


@pytest.mark.parametrize("arguments", [(), ("nonsense",), ("inspect",), ("--nonsense",)])
def test_wrong_usage_is_exit_code_2_without_a_traceback(arguments: tuple[str, ...]) -> None:
    done = subprocess.run([sys.executable, "-m", "gfldeploy", *arguments], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    if arguments:
        assert re.fullmatch(r"Error: .*--help`\.\n", done.stderr)


def modules() -> Iterator[tuple[str, Path]]:
    for found in pkgutil.walk_packages(gfldeploy.__path__, "gfldeploy."):
        spec = found.module_finder.find_spec(found.name, None)
        assert spec is not None and spec.origin is not None
        yield found.name, Path(spec.origin)


def imports_at_module_level(path: Path) -> set[str]:
    """Top-level names of what a module imports when it is imported, `if TYPE_CHECKING` left out."""
    found: set[str] = set()
    statements: list[Any] = list(ast.parse(path.read_text(encoding="utf-8")).body)
    while statements:
        node = statements.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or "").partition(".")[0])
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        elif isinstance(node, ast.If | ast.Try | ast.With | ast.For | ast.ClassDef):
            statements += ast.iter_child_nodes(node)
    return found


def test_only_two_modules_need_paddle_to_be_imported() -> None:
    found = dict(modules())
    assert {"gfldeploy.bundle", "gfldeploy.cli.export", "gfldeploy.engines.paddle_engine"} < set(found)
    heavy = {name for name, path in found.items() if imports_at_module_level(path) & set(HEAVY)}
    assert heavy == PADDLE_AT_MODULE_LEVEL
    light = sorted(set(found) - heavy - {"gfldeploy.__main__"})
    imports = "\n".join(f"import {name}" for name in light)
    assert loaded_by(imports, blocked=HEAVY) & set(HEAVY) == set()


# --- pyproject.toml ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    with (ROOT / "pyproject.toml").open("rb") as file:
        content: dict[str, Any] = tomllib.load(file)["project"]
    return content


def distributions(requirements: list[str]) -> set[str]:
    names = {re.match(r"[A-Za-z0-9._-]+", requirement) for requirement in requirements}
    return {re.sub(r"[-_.]+", "-", name[0]).lower() for name in names if name}


def test_the_core_names_no_engine_and_no_toolkit(project: dict[str, Any]) -> None:
    core = distributions(project["dependencies"])
    assert core & {"onnxruntime", "onnxruntime-gpu"} == set()
    assert [name for name in core if name.startswith("paddle")] == []


@pytest.mark.parametrize(
    ("distribution", "owner"),
    [
        ("onnxruntime", "onnxruntime"),
        ("onnxruntime-gpu", "onnxruntime-gpu"),
        ("paddlepaddle", "paddle"),
        ("paddlepaddle-gpu", None),  # from Paddle's own index only
    ],
)
def test_wheels_that_overwrite_each_other_are_named_once(
    project: dict[str, Any], distribution: str, owner: str | None
) -> None:
    extras = project["optional-dependencies"]
    naming = [extra for extra, wanted in extras.items() if distribution in distributions(wanted)]
    assert naming == ([owner] if owner else [])


def test_every_extra_that_a_message_names_exists(project: dict[str, Any]) -> None:
    named: set[str] = set()
    for _, path in modules():
        text = path.read_text(encoding="utf-8")
        for extras in re.findall(r"gfldeploy\[([a-z0-9,-]+)\]", text):
            named |= set(extras.split(","))
        named |= set(re.findall(r"--extra ([a-z][a-z0-9-]*)", text))
    named |= {tools.extra for tools in TOOL_CHAINS.values()}
    assert named
    assert named <= set(project["optional-dependencies"])
