"""Writes docs/cli.md from the commands themselves: `python docs/generate_cli.py`."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import click

from gfldeploy.cli import EXIT_CODES, cli

PAGE = Path(__file__).with_name("cli.md")
_HEADER = """# Commands

<!-- Written by docs/generate_cli.py: change the commands in gfldeploy/cli/, then run it. -->
"""


def reference() -> str:
    """The page, in Markdown."""
    context = click.Context(cli, info_name="gfldeploy", show_default=True)
    parts = [_HEADER]
    for name in cli.list_commands(context):
        command = cli.get_command(context, name)
        assert command is not None
        parts.append(_section(command, click.Context(command, context, info_name=name)))
    codes = "\n".join(f"- `{code}`: {meaning}" for code, meaning in EXIT_CODES)
    return "\n".join([*parts, f"## Exit codes\n\n{codes}\n"])


def _section(command: click.Command, context: click.Context) -> str:
    text = inspect.cleandoc(command.help or "").replace("\b\nExample: ", "Example:\n\n    ")
    usage = " ".join([context.command_path, *command.collect_usage_pieces(context)])
    lines = [_option(option, context) for option in command.params if isinstance(option, click.Option)]
    return f"## {command.name}\n\n    {usage}\n\n{text}\n\n" + "".join(lines)


def _option(option: click.Option, context: click.Context) -> str:
    record = option.get_help_record(context)
    assert record is not None
    names, text = record
    text, bracket, extra = text.partition("  [")
    return f"- `{names}`: {text.replace('*', chr(92) + '*')}{f' *[{_plain(extra)}*' if bracket else ''}\n"


def _plain(extra: str) -> str:
    """Defaults in words stand in brackets of their own in the help."""
    return re.sub(r"default: \((.*)\)", r"default: \1", extra)


if __name__ == "__main__":
    PAGE.write_text(reference(), encoding="utf-8")
