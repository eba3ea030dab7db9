"""`gfldeploy export`."""

from __future__ import annotations

import re
from typing import Any, Literal

import click

from gfldeploy.candidates import DEFAULT_CANDIDATES, MOST_CANDIDATES
from gfldeploy.cli.console import TerminalProgress, command_line
from gfldeploy.cli.options import FILE, THREADS, InputShapeType, WholeNumber, output_options
from gfldeploy.export.exporter import export_bundle

__all__ = ["command"]


class _Candidates(click.ParamType):  # type: ignore[type-arg]
    """A whole number from 1 to `MOST_CANDIDATES`, `all` or `auto`."""

    name = "K|all|auto"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> int | Literal["auto", "all"]:
        if value in ("auto", "all"):
            return value  # type: ignore[no-any-return]
        if not re.fullmatch(r"[0-9]{1,6}", str(value)) or not 1 <= int(value) <= MOST_CANDIDATES:
            self.fail(f"{value!r} is neither a whole number from 1 to {MOST_CANDIDATES} nor all or auto", param, ctx)
        return int(value)


@click.command("export")
@click.option("--config", "-c", required=True, type=FILE, help="PaddleDetection config (.yml) of a GFL.")
@click.option("--weights", "-w", type=FILE, help="Trained checkpoint (.pdparams).")
@click.option(
    "--random-weights",
    type=WholeNumber(0),
    metavar="SEED",
    help="Use reproducible random weights in place of a checkpoint.",
)
@output_options("Directory to write the bundle to.")
@click.option(
    "--input-shape",
    type=InputShapeType(),
    metavar="[Nx]HxW",
    show_default="any size",
    help="Fix the size of the network's input, in pixels.",
)
@click.option(
    "--candidates",
    type=_Candidates(),
    metavar="K|all|auto",
    default="auto",
    help=f"Number of anchors that are decoded of each image, those with the highest scores: 1 to {MOST_CANDIDATES}, or "
    f"all. auto: {DEFAULT_CANDIDATES}; all where keep_top_k is above {DEFAULT_CANDIDATES // 10} or -1, or where test "
    "pictures would lose detections; with one class at least nms_top_k.",
)
@click.option("--with-nms", is_flag=True, help="Add PaddleDetection's own graph with NMS, for its deploy tools.")
@THREADS
def command(**given: Any) -> None:
    """Turn a trained GFL into a bundle: Paddle and ONNX graphs without NMS, BatchNorm folded.

    The graphs decode the anchors that score highest: as many as NMS can make use of, of the tens of thousands there
    are. Where a number given for --candidates may lose detections, export says so, and so do inspect and predict.

    Every graph is compared with the eager PaddleDetection model, in the engine that will run it, before the bundle is
    published.

    \b
    Example: gfldeploy export --config gfl_r50.yml --weights model_final.pdparams --output gfl_r50
    """
    bundle = export_bundle(**given, command=command_line(), progress=TerminalProgress())
    click.echo(bundle.directory)
