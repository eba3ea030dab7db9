"""Options that several commands share."""

from __future__ import annotations

import errno
import math
import os
import re
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

import click

from gfldeploy.engines.cache import DEFAULT_ENGINE_CACHE
from gfldeploy.machine import usable_threads

__all__ = [
    "DIRECTORY",
    "FILE",
    "PATH",
    "CommaSeparated",
    "FiniteFloat",
    "InputShapeType",
    "PathType",
    "PositiveNumbers",
    "WholeNumber",
    "bundle_argument",
    "engine_cache_option",
    "engine_options",
    "force_option",
    "json_option",
    "output_option",
    "yaml_config_option",
]

Command = TypeVar("Command", bound=Callable[..., Any])


class PathType(click.Path):
    """A path that the system can take: not one that is too long, or has a NUL, which no later check expects."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            os.lstat(value)
        except (OSError, ValueError) as error:
            if isinstance(error, ValueError) or error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
                shown = os.fsdecode(value)
                shown = shown if len(shown) <= 80 else f"{shown[:60]}... ({len(shown)} characters)"
                self.fail(f"{shown!r} is no path: {getattr(error, 'strerror', None) or error}", param, ctx)
        return super().convert(value, param, ctx)


class FiniteFloat(click.FloatRange):
    """A number in a range: NaN and infinity, which pass every comparison or fail it silently, are none."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value!r} is not a number", param, ctx)
        return number


class WholeNumber(click.IntRange):
    """A whole number in a range: not one that is too large for engines, arrays and floats, unless `max` says less."""

    _MOST = 10**9

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        if number > self._MOST:
            self.fail(f"{value!s:.40} is too large a number", param, ctx)
        return number


PATH = PathType(path_type=Path)
DIRECTORY = PathType(path_type=Path, file_okay=False)
FILE = PathType(path_type=Path, dir_okay=False)


def bundle_argument(command: Command) -> Command:
    return click.argument("bundle", type=PATH)(command)


def output_option(help_text: str) -> Callable[[Command], Command]:
    return click.option("--output", "-o", required=True, type=PATH, help=help_text)


def force_option(command: Command) -> Command:
    return click.option("--force", is_flag=True, help="Replace the output directory if it exists, in one step.")(
        command
    )


def engine_cache_option(command: Command) -> Command:
    return click.option(
        "--engine-cache",
        type=PATH,
        default=DEFAULT_ENGINE_CACHE,
        show_default="~/.cache/gfldeploy/engines",
        metavar="DIR",
        help="Where engines that compile a model keep the result for the next start.",
    )(command)


def json_option(command: Command) -> Command:
    return click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")(command)


def threads_option(command: Command) -> Command:
    return click.option(
        "--threads",
        type=WholeNumber(1),
        default=usable_threads,
        show_default="all available",
        help="CPU threads of one inference.",
    )(command)


def engine_options(command: Command) -> Command:
    """--engine, --precision, --device, --threads."""
    from gfldeploy.engines.base import DEVICES, PRECISIONS
    from gfldeploy.engines.registry import ANY_SHAPE_ENGINES, PREFERRED_ENGINES

    command = threads_option(command)
    command = click.option("--device", type=click.Choice(DEVICES), default="cpu", show_default=True)(command)
    command = click.option(
        "--precision", type=click.Choice(PRECISIONS), default=None, help="Default: what the bundle is, fp32 or int8."
    )(command)
    return click.option(
        "--engine",
        type=click.Choice(ANY_SHAPE_ENGINES),
        help=f"Default: the first of {', '.join(PREFERRED_ENGINES)} that runs it here.",
    )(command)


class InputShapeType(click.ParamType):  # type: ignore[type-arg]  # generic in the newest click only
    """`HxW` (free batch) or `NxHxW`, in pixels."""

    name = "[Nx]HxW"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int | None, int, int]:
        if isinstance(value, tuple):
            return value
        match = re.fullmatch(r"(?:(\d{1,6})x)?(\d{1,6})x(\d{1,6})", value)
        numbers = [int(number) if number else None for number in match.groups()] if match else []
        if not match or any(number == 0 for number in numbers):
            self.fail(f"{value!r} is not a shape such as 800x1344 or 1x800x1344", param, ctx)
        batch, height, width = numbers
        assert height is not None and width is not None
        return batch, height, width


class CommaSeparated(click.ParamType):  # type: ignore[type-arg]
    """A comma-separated list of names out of `choices`, or, without choices, of whole numbers from 1; as a tuple.

    A value given twice counts once.
    """

    name = "LIST"

    def __init__(self, choices: Sequence[str] | None = None) -> None:
        self._choices = tuple(choices) if choices is not None else None

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, ...] | tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        # A list comes from a YAML file.
        words = [str(word).strip() for word in (value if isinstance(value, list) else str(value).split(","))]
        if self._choices is not None:
            if wrong := [word for word in words if word not in self._choices]:
                nearest = (
                    f" (did you mean {near[0]}?)" if (near := get_close_matches(wrong[0], self._choices, 1)) else ""
                )
                self.fail(f"{wrong[0]!r} is not one of {', '.join(self._choices)}{nearest}", param, ctx)
            return tuple(dict.fromkeys(words))
        if wrong := [word for word in words if not re.fullmatch(r"0*[1-9][0-9]{0,5}", word)]:
            self.fail(f"{wrong[0]!r} is not a whole number from 1; write them as 1,2,4", param, ctx)
        return tuple(dict.fromkeys(map(int, words)))


class PositiveNumbers(click.ParamType):  # type: ignore[type-arg]
    """A comma-separated list of positive numbers, as a tuple of floats; one given twice counts once."""

    name = "LIST"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, ...]:
        if isinstance(value, tuple):
            return value
        numbers = []
        for word in value if isinstance(value, list) else str(value).split(","):
            try:
                number = float(word)
            except (TypeError, ValueError):
                number = math.nan
            if not (math.isfinite(number) and number > 0):
                self.fail(f"{str(word).strip()!r} is not a positive number; write them as 5,10,20", param, ctx)
            numbers.append(number)
        return tuple(dict.fromkeys(numbers))


def yaml_config_option(command: Command) -> Command:
    """--config FILE: a YAML mapping of option names to values, which flags on the command line go before."""
    return click.option(
        "--config",
        type=FILE,
        is_eager=True,
        expose_value=False,
        callback=_read_config,
        help="A YAML file of these options, such as `batch-sizes: [1, 4]`; flags go before it.",
    )(command)


def _read_config(ctx: click.Context, param: click.Parameter, path: Path | None) -> None:
    if path is None:
        return
    from gfldeploy.yaml_file import YamlError, read_yaml

    try:
        content = read_yaml(path)
    except OSError as error:
        raise click.BadParameter(f"{path} cannot be read: {error.strerror or error}", ctx, param) from error
    except YamlError as error:
        raise click.BadParameter(f"{path} is not YAML that is read here: {error}", ctx, param) from error
    if not isinstance(content, dict):
        raise click.BadParameter(f"{path} must be a mapping of option names to values", ctx, param)
    types = {one.name: one.type for one in ctx.command.params if isinstance(one, click.Option)}
    known = types.keys() - {"config", "force", "help"}
    defaults = {str(key).replace("-", "_"): value for key, value in content.items()}
    for key, value in defaults.items():
        option = key[:80].replace("_", "-")
        if key not in known:
            near = get_close_matches(key[:80], sorted(name for name in known if name), 1)
            nearest = f" (did you mean {near[0].replace('_', '-')}?)" if near else ""
            raise click.BadParameter(f"{path} has an unknown option, {option!r}{nearest}", ctx, param)
        lists = isinstance(types[key], CommaSeparated | PositiveNumbers)
        items = value if isinstance(value, list) and lists else [value]
        if any(isinstance(item, dict | list) for item in items):
            raise click.BadParameter(f"{path}: {option} must be a value{' or a list of values' * lists}", ctx, param)
        if isinstance(types[key], click.Path) and not isinstance(value, str | None):
            raise click.BadParameter(f"{path}: {option} must be a path", ctx, param)
    ctx.default_map = {key: value for key, value in defaults.items() if value is not None}
