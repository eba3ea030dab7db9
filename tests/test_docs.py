"""The documentation: commands and options that exist, links that resolve, modules that are there, every page listed."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from importlib import import_module
from itertools import pairwise
from pathlib import Path

import click
import pytest
import yaml

import gfldeploy
from gfldeploy.bench.table import FLAGS
from gfldeploy.cli import EXIT_CODES, cli
from gfldeploy.engines.base import DEVICES, PRECISIONS
from gfldeploy.engines.registry import ENGINES

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(
    page
    for pattern in ("*.md", "docs/**/*.md", "benchmarks/*.md", "configs/**/*.md", "export/*.md", "quant/*.md")
    for page in ROOT.glob(pattern)
)
# What docs/extending/engine.md adds.
ADDED = {"onnx-reference", "gfldeploy/engines/reference_engine.py"}
FENCED = re.compile(r"```.*?```", re.DOTALL)


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def code_lines(text: str) -> list[str]:
    """The lines of code blocks, those that end in a backslash joined with the next."""
    blocks = [*FENCED.findall(text), *re.findall(r"(?:^    .*\n?)+", FENCED.sub("", text), re.MULTILINE)]
    return re.sub(r"\\\n\s*", " ", "\n".join(blocks)).splitlines()


def commands_in(text: str) -> Iterator[str]:
    """What follows `gfldeploy` in code blocks and in code within sentences."""
    for line in code_lines(text):
        if found := re.search(r"(?:^\s*|&& |uv run )gfldeploy (.*)", line):
            yield found[1]
    for code in re.findall(r"`([^`]+)`", FENCED.sub("", text)):
        if code.startswith("gfldeploy "):
            yield code.removeprefix("gfldeploy ")


def wrong_with(command: str) -> str | None:
    """What of a command line does not exist: the command, an option, or the choice given to an option."""
    words = shlex.split(command, comments=True)
    if not words:
        return None
    context = click.Context(cli)
    known: click.Command = cli
    if not words[0].startswith("-"):
        found = cli.get_command(context, words[0])
        if found is None:
            return f"no command {words[0]!r}"
        known, words = found, words[1:]
    options = {name: one for one in known.get_params(context) for name in (*one.opts, *one.secondary_opts)}
    for word, following in pairwise([*words, ""]):
        name, _, value = word.partition("=")
        if not re.match(r"--?[a-z]", name):
            continue
        if name not in options:
            return f"{known.name} has no {name}"
        kind = options[name].type
        value = value or following
        if isinstance(kind, click.Choice) and value not in kind.choices and value.islower() and value not in ADDED:
            return f"{name} takes {', '.join(kind.choices)}, not {value}"
    return None


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_command_lines_are_true(page: Path) -> None:
    wrong = {command: wrong_with(command) for command in commands_in(page.read_text(encoding="utf-8"))}
    assert {command: problem for command, problem in wrong.items() if problem} == {}


def test_command_lines_are_found_and_judged() -> None:
    text = """
    gfldeploy eval b --order \\
        sizes  # a comment

See `gfldeploy bench
--no-such`.

```sh
gfldeploy peek b
```
"""
    assert [wrong_with(command) for command in commands_in(text)] == [
        "no command 'peek'",
        "--order takes listed, shuffled, sorted, bucketed, not sizes",
        "bench has no --no-such",
    ]
    assert len([one for page in PAGES for one in commands_in(page.read_text(encoding="utf-8"))]) > 30


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_scripts_and_their_options_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    runs = [
        re.search(r"python3? ([\w/]+\.py)(.*)", line) for line in [*code_lines(text), *re.findall(r"`(.*?)`", text)]
    ]
    for script, arguments in [(ROOT / run[1], run[2].split(" -- ")[0]) for run in runs if run]:
        assert script.exists()
        source = script.read_text(encoding="utf-8")
        assert [option for option in re.findall(r"--[a-z][a-z0-9-]*", arguments) if f'"{option}"' not in source] == []


def anchors_of(page: Path) -> set[str]:
    """The anchors of a page's headings, as its hosts and Sphinx make them."""
    text = FENCED.sub("", page.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", one.lower()).strip().replace(" ", "-") for one in headings}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_resolve(page: Path) -> None:
    text = FENCED.sub("", page.read_text(encoding="utf-8"))
    broken = []
    for target in re.findall(r"\]\((?!\w+:)([^)\s]+)\)", text):
        file, _, anchor = target.partition("#")
        path = (page.parent / file) if file else page
        if not path.exists() or (anchor and path.suffix == ".md" and anchor not in anchors_of(path)):
            broken.append(target)
    assert broken == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_modules_that_are_named_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    named = set(re.findall(r"`((?:[a-z_0-9]+/)+[a-z_0-9]+\.(?:py|md|yml|toml))`", text))
    missing = [
        name for name in named - ADDED if not any((ROOT / folder / name).exists() for folder in ("", "gfldeploy"))
    ]
    assert missing == []


def test_every_page_is_in_the_contents() -> None:
    contents = (DOCS / "index.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```{toctree}\n(.*?)```", contents, re.DOTALL)
    listed = {line.rstrip(">").rpartition("<")[2] for block in blocks for line in block.splitlines()}
    pages = {page.relative_to(DOCS).with_suffix("").as_posix() for page in DOCS.rglob("*.md")}
    assert pages - {"index"} == {line for line in listed if line and not line.startswith(":")}


def test_the_api_page_has_every_public_name() -> None:
    documented = set(
        re.findall(r"^\.\. auto\w+:: gfldeploy\.(\w+)", (DOCS / "api.md").read_text(encoding="utf-8"), re.M)
    )
    assert documented == set(gfldeploy.__all__) - {"__version__"}


def test_the_table_of_engines_is_that_of_the_package() -> None:
    page = (DOCS / "guides" / "choosing-an-engine.md").read_text(encoding="utf-8")
    rows = [row.split(" | ") for row in re.findall(r"^\| `([\w`|, -]+) \|$", page, re.MULTILINE)]
    drawn = {row[0].rstrip("`"): [set(re.findall("[CG]PU", cell)) for cell in row[1:]] for row in rows}
    assert drawn == {
        name: [
            {device.upper() for device in DEVICES if isinstance(spec.graph(precision, device), str)}
            for precision in PRECISIONS
        ]
        for name, spec in ENGINES.items()
    }


def test_the_formats_have_the_numbers_of_the_package() -> None:
    page = (DOCS / "formats.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\|[^|]*\| (\d+) \| `(gfldeploy[\w.]*)\.(\w+)` \|", page, re.MULTILINE)
    assert len(rows) >= 3
    for number, module, name in rows:
        found = import_module(module)
        form = getattr(getattr(found, name), "FORMAT", None)
        assert int(number) == (form.schema if form else found.SCHEMA), name


def test_every_flag_of_the_report_is_explained() -> None:
    page = (DOCS / "guides" / "reading-the-report.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| (\w+) \|", page.partition("## Flags")[2], re.MULTILINE) == ["flag", *FLAGS]


def test_the_exit_codes_are_those_of_the_command_line() -> None:
    page = (DOCS / "exit-codes.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| (\d+) \|", page, re.MULTILINE) == [code for code, _ in EXIT_CODES]


def test_the_citation_is_of_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert str(citation["version"]) == gfldeploy.__version__
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
