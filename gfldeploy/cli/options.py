"""Options that several commands share."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

from gfldeploy.machine import usable_threads

__all__ = [
    "CommaSeparated",
    "InputShapeType",
    "bundle_argument",
    "engine_options",
    "force_option",
    "json_option",
    "output_option",
]

Command = TypeVar("Command", bound=Callable[..., Any])

DIRECTORY = click.Path(path_type=Path, file_okay=False)
FILE = click.Path(path_type=Path, dir_okay=False)


def bundle_argument(command: Command) -> Command:
    return click.argument("bundle", type=click.Path(path_type=Path))(command)


def output_option(help_text: str) -> Callable[[Command], Command]:
    return click.option("--output", "-o", required=True, type=click.Path(path_type=Path), help=help_text)


def force_option(command: Command) -> Command:
    return click.option("--force", is_flag=True, help="Replace the output directory if it exists, in one step.")(
        command
    )


def json_option(command: Command) -> Command:
    return click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")(command)


def threads_option(command: Command) -> Command:
    return click.option(
        "--threads",
        type=click.IntRange(1),
        default=usable_threads,
        show_default="all available",
        help="CPU threads of one inference.",
    )(command)


def engine_options(command: Command) -> Command:
    """--engine, --precision, --device, --threads."""
    from gfldeploy.engines.base import DEVICES, PRECISIONS
    from gfldeploy.engines.registry import ENGINES

    command = threads_option(command)
    command = click.option("--device", type=click.Choice(DEVICES), default="cpu", show_default=True)(command)
    command = click.option(
        "--precision", type=click.Choice(PRECISIONS), default=None, help="Default: what the bundle is, fp32 or int8."
    )(command)
    return click.option("--engine", type=click.Choice(list(ENGINES)), default="onnxruntime", show_default=True)(command)


class InputShapeType(click.ParamType):  # type: ignore[type-arg]  # generic in the newest click only
    """`HxW` (free batch) or `NxHxW`, in pixels."""

    name = "[Nx]HxW"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int | None, int, int]:
        if isinstance(value, tuple):
            return value
        match = re.fullmatch(r"(?:(\d+)x)?(\d+)x(\d+)", value)
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
        words = [word.strip() for word in value.split(",")]
        if self._choices is not None:
            if wrong := [word for word in words if word not in self._choices]:
                self.fail(f"{wrong[0]!r} is not one of {', '.join(self._choices)}", param, ctx)
            return tuple(dict.fromkeys(words))
        if wrong := [word for word in words if not re.fullmatch(r"0*[1-9][0-9]{0,5}", word)]:
            self.fail(f"{wrong[0]!r} is not a whole number from 1; write them as 1,2,4", param, ctx)
        return tuple(dict.fromkeys(map(int, words)))
