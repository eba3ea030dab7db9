"""`gfldeploy export`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

import click

from gfldeploy.candidates import DEFAULT_CANDIDATES, MOST_CANDIDATES
from gfldeploy.cli.console import TerminalProgress, command_line
from gfldeploy.cli.options import FILE, THREADS, InputShapeType, WholeNumber, output_options
from gfldeploy.engines.hardware import usable_threads
from gfldeploy.export.exporter import ExportRequest, export_bundle

__all__ = ["command"]


class _Candidates(click.ParamType):  # type: ignore[type-arg]
    """A whole number from 1 to `MOST_CANDIDATES`; `all`, which is None; or `auto`."""

    name = "K|all|auto"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> int | Literal["auto"] | None:
        if value == "all":
            return None
        if value == "auto":
            return "auto"
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
def command(
    config: Path,
    weights: Path | None,
    random_weights: int | None,
    output: Path,
    input_shape: tuple[int | None, int, int] | None,
    candidates: int | Literal["auto"] | None,
    with_nms: bool,
    threads: int | None,
    force: bool,
) -> None:
    """Turn a trained GFL into a bundle: Paddle and ONNX graphs without NMS, BatchNorm folded.

    The graphs decode the anchors that score highest: as many as NMS can make use of, of the tens of thousands there
    are. Where a number given for --candidates may lose detections, export says so, and so do inspect and predict.

    Every graph is compared with the eager PaddleDetection model, in the engine that will run it, before the bundle is
    published.

    \b
    Example: gfldeploy export --config gfl_r50.yml --weights model_final.pdparams --output gfl_r50
    """
    if (weights is None) == (random_weights is None):
        raise click.UsageError("give either --weights or --random-weights")
    if with_nms and input_shape:
        raise click.UsageError("--with-nms goes with a free input size only: PaddleDetection cannot pad to a fixed one")
    bundle = export_bundle(
        ExportRequest(
            config=config,
            output=output,
            weights=weights,
            random_seed=random_weights,
            input_shape=input_shape or (None, None, None),
            candidates=candidates,
            with_nms=with_nms,
            force=force,
            threads=threads or usable_threads(),
            command=command_line(),
        ),
        TerminalProgress().stage,
    )
    click.echo(bundle.directory)
