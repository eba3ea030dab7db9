"""The public API: what `gfldeploy` exports, and that each command's options are its function's parameters."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path
from typing import Any

import click
import pytest

import gfldeploy
from gfldeploy import errors
from gfldeploy.cli import cli

# Of each command: its function, and the options that are about the terminal alone.
FUNCTIONS: dict[str, tuple[Any, set[str]]] = {
    "export": (gfldeploy.export_bundle, set()),
    "quantize": (gfldeploy.quantize_bundle, set()),
    "inspect": (gfldeploy.inspect, {"as_json"}),
    "verify": (gfldeploy.verify, set()),
    "eval": (gfldeploy.evaluate, {"as_json", "min_map"}),
    "audit": (gfldeploy.audit, {"as_json", "max_padding"}),
    "analyze": (gfldeploy.analyze, set()),
    "bench": (gfldeploy.benchmark, {"config"}),
    "tune": (gfldeploy.tune_bundles, {"config", "check"}),
    "predict": (gfldeploy.predict_images, set()),
    "merge": (gfldeploy.merge_parts, set()),
    "load": (gfldeploy.load_server, set()),
    "triton": (gfldeploy.triton_repository, set()),
    "serve": (gfldeploy.serve_detector, set()),
    "compare": (gfldeploy.compare, {"as_json", "fail_if_slower"}),
    "report": (gfldeploy.report, set()),
    "schema": (gfldeploy.schema, set()),
    "doctor": (gfldeploy.diagnose, {"as_json", "show_all"}),
}
# What a program gives and a user of the command line does not: `command` is for a bundle's record of how it was made.
PROGRAMMATIC = {"progress", "command"}


def test_every_name_is_exported_and_typed() -> None:
    source = ast.parse(Path(gfldeploy.__file__).read_text(encoding="utf-8"))
    (checked,) = (node for node in source.body if isinstance(node, ast.If))
    typed = {
        (node.module, alias.name) for node in checked.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert typed == {(module, name) for module, names in gfldeploy._EXPORTS.items() for name in names}
    assert len(set(gfldeploy.__all__)) == len(gfldeploy.__all__) == len(typed) + 1
    assert set(gfldeploy.__all__) <= set(dir(gfldeploy))
    for name in gfldeploy.__all__:
        assert getattr(gfldeploy, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'Detectr'"):
        gfldeploy.Detectr  # noqa: B018


def test_every_exception_is_exported() -> None:
    tree = {name for name, one in vars(errors).items() if isinstance(one, type) and issubclass(one, Exception)}
    assert tree <= set(gfldeploy.__all__)


@pytest.mark.parametrize("name", gfldeploy.__all__)
def test_what_is_exported_is_documented(name: str) -> None:
    one = getattr(gfldeploy, name)
    if not inspect.isfunction(one):
        assert name in ("__version__", "SILENT") or inspect.getdoc(one)
        return
    documented = inspect.getdoc(one) or ""
    parameters = inspect.signature(one).parameters
    missing = [parameter for parameter in parameters if f"\n    {parameter}: " not in documented]
    assert missing == []
    assert "\nReturns:\n" in documented
    raised = documented.partition("\nRaises:\n")[2]
    assert all(
        line[:4] == "    " and (line[4] == " " or line[4:].split(":")[0] in gfldeploy.__all__)
        for line in raised.splitlines()
    )


@pytest.mark.parametrize("name", FUNCTIONS)
def test_options_are_parameters(name: str) -> None:
    function, terminal = FUNCTIONS[name]
    command = cli.get_command(click.Context(cli), name)
    assert command is not None
    defaults = command.make_context(name, [], resilient_parsing=True).params
    options = {option.name: option for option in command.params if option.name not in terminal}
    parameters = {key: one for key, one in inspect.signature(function).parameters.items() if key not in PROGRAMMATIC}
    assert set(options) == set(parameters)
    assert set(options) <= {one.replace("-", "_") for option in options.values() for one in words_of(option)}
    for key, option in options.items():
        parameter = parameters[key]
        if isinstance(option, click.Argument):
            assert parameter.kind is parameter.POSITIONAL_OR_KEYWORD
            continue
        assert key in ("a", "b") or parameter.kind in (parameter.KEYWORD_ONLY, parameter.POSITIONAL_OR_KEYWORD)
        if option.required or (name, key) == ("tune", "data"):  # --check needs none
            assert parameter.default is parameter.empty, key
        elif key == "output":
            assert parameter.default in (None, str(defaults[key])), "None: nothing is written"
        else:
            assert parameter.default == defaults[key], key


def words_of(option: click.Parameter) -> list[str]:
    return [option.name or ""] if isinstance(option, click.Argument) else [one.lstrip("-") for one in option.opts]


def test_every_command_has_a_function() -> None:
    assert set(cli.list_commands(click.Context(cli))) == {*FUNCTIONS, "demo"}


def test_paths_are_text_too(tiny_bundle: Path) -> None:
    assert gfldeploy.Bundle.open(str(tiny_bundle)) == gfldeploy.Bundle.open(tiny_bundle)
    assert gfldeploy.inspect(str(tiny_bundle))["name"] == gfldeploy.inspect(gfldeploy.Bundle.open(tiny_bundle))["name"]
    with pytest.raises(gfldeploy.DataError, match=r"no\.yml cannot be read: No such file"):
        gfldeploy.Deploy.read("no.yml")
    for bundles in (str(tiny_bundle), tiny_bundle, [str(tiny_bundle)]):
        with pytest.raises(gfldeploy.DataError, match=r"no\.json cannot be read"):
            gfldeploy.benchmark(bundles, data="no.json")
        with pytest.raises(gfldeploy.DataError, match=r"no\.json cannot be read"):
            gfldeploy.tune_bundles(bundles, data="no.json", accuracy=False, output="no.yml")


def test_values_that_no_option_takes_are_refused(tiny_bundle: Path, tiny_coco: Path) -> None:
    wrong: Any = "by size"
    for call in (
        lambda: gfldeploy.evaluate(tiny_bundle, data=tiny_coco, order=wrong),
        lambda: gfldeploy.evaluate(tiny_bundle, data=tiny_coco, threads=0),
        lambda: gfldeploy.verify(tiny_bundle, threads=0),
        lambda: gfldeploy.tune_bundles(tiny_bundle, data=tiny_coco, orders=[wrong], output="no.yml"),
        lambda: gfldeploy.inspect(tiny_bundle, size=(0, 320)),
        lambda: gfldeploy.Detector(tiny_bundle, batch_size=0),
        lambda: gfldeploy.predict_images(tiny_bundle, tiny_coco.parent, output="no", batch_size=0),
        lambda: gfldeploy.predict_images(tiny_bundle, tiny_coco.parent, output="no", decode=wrong),
        lambda: gfldeploy.analyze(tiny_bundle, data=tiny_coco, batch_sizes=[0]),
        lambda: gfldeploy.benchmark(tiny_bundle, data=tiny_coco, input_sizes=[(0, 320)]),
        lambda: gfldeploy.evaluate(tiny_bundle, data=tiny_coco, input_sizes=[(320, 0)]),
        lambda: gfldeploy.predict_images(tiny_bundle, tiny_coco.parent, output="no", input_size=(0, 320)),
        lambda: gfldeploy.Detector(tiny_bundle, input_size=wrong),
    ):
        with pytest.raises(ValueError, match=r"must be"):
            call()
    with pytest.raises(gfldeploy.UsageError, match="there is no bundle to measure"):
        gfldeploy.benchmark([], data=tiny_coco)
