"""The command line. Commands are imported when they are called, so that `--help` stays instant.

Errors become one line on stderr here and nowhere else: exit code 2 for a user's mistake, 130 when interrupted.
A bug keeps its traceback.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

import click

from gfldeploy import __version__
from gfldeploy.cli.plain_text import plain_streams
from gfldeploy.errors import GfldeployError
from gfldeploy.files import terminate_as_interrupt

__all__ = ["cli", "main"]

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
    "compare": ("gfldeploy.cli.compare", "Compare two results files, with intervals."),
    "report": ("gfldeploy.cli.report", "Turn a results file into one HTML page."),
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


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="gfldeploy")
def cli() -> None:
    """Deploy PaddleDetection GFL detectors: export, quantise, benchmark, compare, predict."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0, 2 for a user's mistake, 130 when interrupted."""
    with plain_streams():
        _main(arguments)


def _main(arguments: Sequence[str] | None) -> None:
    # Paddle's C++ side logs its progress to stderr unless told not to, and only listens before it is loaded.
    os.environ.setdefault("GLOG_minloglevel", "2")
    try:
        with terminate_as_interrupt():
            result = cli.main(args=arguments, prog_name="gfldeploy", standalone_mode=False)
    except GfldeployError as error:
        _fail(str(error), 2)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        sys.exit(2)
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        command = context.command_path if context is not None else "gfldeploy"
        _fail(f"{error.format_message().rstrip('.')}. See `{command} --help`.", 2)
    except (click.Abort, KeyboardInterrupt):
        _fail("interrupted; nothing half-written was left behind", 130)
    except BrokenPipeError:
        # The reader of our output went away (`gfldeploy ... | head`): not an error.
        sys.stderr.close()
        sys.exit(0)
    sys.exit(result if isinstance(result, int) else 0)


def _fail(message: str, code: int) -> None:
    click.echo(f"Error: {' '.join(message.split())}", err=True)
    sys.exit(code)
