"""The options of the commands: each shared one is declared once, and each says what it does."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest

from gfldeploy.cli import bench, cli, main, options, tune

COMMANDS = {name: cli.get_command(click.Context(cli), name) for name in cli.list_commands(click.Context(cli))}


@pytest.fixture
def toy_option(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`--toy` in the group that `bench` and `tune` share: one more entry in one file."""
    toy = click.option("--toy", type=options.WholeNumber(1), default=1, help="Play with this number of bricks.")
    with monkeypatch.context() as patch:
        patch.setattr(options, "MEASUREMENT", (*options.MEASUREMENT, toy))
        for module in (bench, tune):
            importlib.reload(module)
        yield
    for module in (bench, tune):
        importlib.reload(module)


@pytest.mark.usefixtures("toy_option")
@pytest.mark.parametrize(
    ("module", "function"),
    [(bench, "gfldeploy.bench.session.benchmark"), (tune, "gfldeploy.tune.session.tune_bundles")],
)
def test_an_option_added_to_a_group_reaches_its_commands(
    module: Any, function: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given: list[Any] = []

    class Reached(Exception):
        """Instead of measuring."""

    def record(*_: object, toy: int, **rest: object) -> None:
        given.append(toy)
        raise Reached

    monkeypatch.setattr(function, record)
    config = tmp_path / "options.yml"
    config.write_text("toy: 3\n")
    name = module.command.name
    arguments = [name, "bundle", "--data", "data.json"]
    for more in ([], ["--toy", "2"], ["--config", str(config)], ["--config", str(config), "--toy", "4"]):
        with pytest.raises(Reached):
            main([*arguments, *more])
    assert given == [1, 2, 3, 4]
    with pytest.raises(SystemExit):
        main([name, "--help"])
    assert re.search(r"--toy INTEGER RANGE +Play with this number of bricks\.", capsys.readouterr().out)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_and_option_says_what_it_does(name: str) -> None:
    command = COMMANDS[name]
    assert command is not None
    first = (command.help or "").partition("\n")[0]
    assert re.fullmatch(r"[A-Z][^.]{20,}\.|[A-Z].{20,}[:,].+\.", first), first
    for option in command.params:
        if isinstance(option, click.Option):
            assert re.match(r"[A-Z][^ ]* .*[.]$", option.help or "", re.DOTALL), option.name
            assert (option.help or "").count(" ") >= 2, option.name


@pytest.mark.parametrize(
    ("text", "files"),
    [("results: a.json", ["a.json"]), ("results: [a.json, b.json]", ["a.json", "b.json"]), ("results: null", [])],
)
def test_a_file_of_options_gives_what_may_be_given_more_than_once(text: str, files: list[str], tmp_path: Path) -> None:
    config = tmp_path / "options.yml"
    config.write_text(text)
    context = tune.command.make_context("tune", ["bundle", "--config", str(config)])
    assert context.params["results"] == tuple(map(Path, files))
    config.write_text("results: [a.json, null]")
    with pytest.raises(click.BadParameter, match="results must be a path or a list of paths"):
        tune.command.make_context("tune", ["bundle", "--config", str(config)])
