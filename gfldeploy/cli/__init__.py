"""The command line. Commands are imported when they are called, so that `--help` stays instant.

Errors become one line on stderr here and nowhere else; a bug keeps its traceback. Exit codes are in `EXIT_CODES`.
"""

from __future__ import annotations

import importlib
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from gfldeploy import __version__
from gfldeploy.cli.plain_text import plain_streams
from gfldeploy.cli.streams import standard_streams
from gfldeploy.errors import GfldeployError, OutputError, UsageError
from gfldeploy.signals import interrupt_again, terminate_as_interrupt, was_interrupted

EXIT_CODES = (
    ("0", "done"),
    ("1", "done, but predict could not read some images, or a gate failed: --min-map, --fail-if-slower, --max-padding"),
    ("2", "not done: one line says what is wrong, and what to do about it"),
    ("70", "a bug, with its traceback"),
    ("130", "interrupted, by Ctrl-C or SIGTERM"),
)

_COMMANDS = {
    "demo": ("gfldeploy.cli.demo", "Export, quantise and benchmark the built-in detector."),
    "export": ("gfldeploy.cli.export", "Turn a trained GFL into a bundle: Paddle and ONNX graphs, checked."),
    "inspect": ("gfldeploy.cli.inspect", "Show what a bundle holds."),
    "verify": ("gfldeploy.cli.verify", "Hash a bundle again and compare its graphs."),
    "eval": ("gfldeploy.cli.eval", "Measure COCO mAP through an engine."),
    "quantize": ("gfldeploy.cli.quantize", "Make an INT8 bundle from an FP32 one."),
    "audit": ("gfldeploy.cli.audit", "Show what batches of your images would cost, before any inference."),
    "analyze": ("gfldeploy.cli.analyze", "Say why images take longer in larger batches, or no less."),
    "bench": ("gfldeploy.cli.bench", "Measure engines, precisions and batch sizes side by side."),
    "tune": ("gfldeploy.cli.tune", "Find the fastest configuration that keeps the bounds you set."),
    "predict": ("gfldeploy.cli.predict", "Detect in images, folders of them, and videos."),
    "merge": ("gfldeploy.cli.merge", "Make the results of one run from parts that many machines did."),
    "serve": ("gfldeploy.cli.serve", "Serve detections over HTTP."),
    "triton": ("gfldeploy.cli.triton", "Write a model repository for Triton Inference Server."),
    "load": ("gfldeploy.cli.load", "Send images to a running server, and measure its answers."),
    "compare": ("gfldeploy.cli.compare", "Compare two results files, with intervals."),
    "report": ("gfldeploy.cli.report", "Turn a results file into one HTML page."),
    "schema": ("gfldeploy.cli.schema", "Print the JSON Schema of a file that gfldeploy writes."),
    "doctor": ("gfldeploy.cli.doctor", "Show what works on this machine, and why the rest does not."),
}


class _LazyGroup(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        command = importlib.import_module(_COMMANDS[cmd_name][0]).command
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, help_text) for name, (_, help_text) in _COMMANDS.items()])
        with formatter.section("Exit codes"):
            formatter.write_dl(EXIT_CODES)


# color: click would take escape sequences out of names where there is no terminal, and the streams show them.
@click.group(
    cls=_LazyGroup,
    context_settings={
        "help_option_names": ["-h", "--help"],
        "max_content_width": 100,
        "color": True,
        "show_default": True,
    },
)
@click.version_option(__version__, prog_name="gfldeploy")
def cli() -> None:
    """Deploy PaddleDetection GFL detectors: export, quantise, benchmark, compare, predict."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit with its code; see `EXIT_CODES`."""
    # Paddle's C++ side logs its progress to stderr unless told not to, and only listens before it is loaded.
    os.environ.setdefault("GLOG_minloglevel", "2")
    try:
        with terminate_as_interrupt(), standard_streams() as failure, plain_streams():
            code = _run(arguments)
            if (error := failure()) and code in (0, 1):
                code = _fail(f"cannot write to standard output: {error.strerror}. Send it somewhere else.", 2)
    except KeyboardInterrupt as stopped:
        code = _interrupted(stopped)
    sys.exit(code)


def _run(arguments: Sequence[str] | None) -> int:
    """Run the command, print its error if any, and return the exit code."""
    unraisable = sys.unraisablehook
    sys.unraisablehook = _lost_interrupt(unraisable)
    try:
        _check_current_directory()
        # The object of the context says whether the process ends with the command.
        result = cli.main(args=arguments, prog_name="gfldeploy", standalone_mode=False, obj=arguments is None)
    except (click.Abort, KeyboardInterrupt) as error:
        return _interrupted(error)
    except BaseException as error:
        # C++ code and packages that catch everything turn an interruption into errors of their own.
        if was_interrupted():
            return _interrupted(error)
        if isinstance(error, UsageError) and error.remedy is None:
            name = next(iter(sys.argv[1:] if arguments is None else arguments), "")
            return _fail(f"{error.problem}. See `gfldeploy {name} --help`.", 2)
        if isinstance(error, GfldeployError):
            return _fail(str(error), 2)
        if isinstance(error, click.exceptions.NoArgsIsHelpError):
            click.echo(error.format_message(), err=True)
            return 2
        if isinstance(error, click.ClickException):
            context = getattr(error, "ctx", None)
            command = context.command_path if context is not None else "gfldeploy"
            told = re.sub(
                r"\S{300,}", lambda word: f"{word[0][:60]}... ({len(word[0])} characters)", error.format_message()
            )
            return _fail(f"{told.rstrip('.')}. See `{command} --help`.", 2)
        raise
    finally:
        sys.unraisablehook = unraisable
    return result if isinstance(result, int) else 0


def _check_current_directory() -> None:
    try:
        Path.cwd()
    except OSError as error:
        raise OutputError("the current directory does not exist any more", "Change to another one.") from error


def _lost_interrupt(otherwise: Callable[[Any], object]) -> Callable[[Any], object]:
    """A hook for errors that Python cannot raise, in a finaliser: an interruption there is asked for again."""

    def hook(lost: Any) -> object:
        if not issubclass(lost.exc_type, KeyboardInterrupt):
            return otherwise(lost)
        interrupt_again()
        return None

    return hook


def _interrupted(error: BaseException) -> int:
    kept: dict[str, None] = {}  # what those say who had something to leave behind
    one: BaseException | None = error
    while one is not None:
        kept |= dict.fromkeys(getattr(one, "__notes__", ()))
        one = one.__cause__ or one.__context__  # click makes an error of its own of it
    return _fail(f"interrupted; {'; '.join(kept) or 'nothing half-written was left behind'}", 130)


def _fail(message: str, code: int) -> int:
    click.echo(f"Error: {' '.join(message.split())}", err=True, color=True)
    return code
