"""`gfldeploy inspect`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, repeat
from operator import itemgetter
from typing import Any

import click

from gfldeploy.batching.buckets import size_in_words
from gfldeploy.bench.columns import Column
from gfldeploy.cli import options
from gfldeploy.cli.console import console
from gfldeploy.cli.tables import show_table
from gfldeploy.inspection import inspect, int8_lines

# Classes shown by name before the rest is counted.
_SHOWN = 12
_INTERPOLATIONS = ("nearest", "linear", "cubic", "area", "lanczos")  # OpenCV's codes 0 to 4


def _size(word: str) -> tuple[int, int]:
    batch, *size = options.input_shape(word)
    if batch is not None:
        raise ValueError(f"{word!r} is not a size such as 800x1344")
    return size[0], size[1]


@click.command("inspect")
@options.group(options.BUNDLE)
@click.option(
    "--size",
    type=options.Parsed("SIZE", _size),
    metavar="HxW",
    show_default="the largest that the preprocessing makes",
    help="Size of the image, in pixels, whose MACs are counted.",
)
@options.JSON
def command(as_json: bool, **given: Any) -> None:
    """Show what a bundle holds: inputs, outputs, classes, parameters, MACs, size, provenance, parity.

    \b
    Example: gfldeploy inspect gfl_r50_int8
    """
    facts = inspect(**given)
    if as_json:
        click.echo(json.dumps(facts, indent=2))
    else:
        show(facts)


def show(facts: Mapping[str, Any]) -> None:
    """Print what `inspect` gives."""
    from rich.markup import escape
    from rich.table import Table

    sheet = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    sheet.add_column(style="bold", no_wrap=True)
    sheet.add_column(overflow="fold")
    for label, text in _rows(facts):
        sheet.add_row(label, escape(text))
    console().print(sheet)
    if facts["parity"]:
        _show_parity(facts["parity"])
    if facts["sensitivity"]:
        _show_sensitivity(facts["sensitivity"])


def _rows(facts: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    classes = facts["classes"]
    more = [f"and {len(classes) - _SHOWN} more"] if len(classes) > _SHOWN else []
    yield "name", f"{facts['name']}, {facts['precision'].upper()}"
    yield "digest", facts["digest"]
    yield "input", "; ".join(facts["inputs"])
    yield "output", "; ".join(facts["outputs"])
    yield "classes", f"{len(classes)}: {', '.join([*classes[:_SHOWN], *more])}"
    gmac = facts["macs"]["gmac"]
    work = "MACs unknown without an ONNX graph" if gmac is None else f"{gmac} GMAC at {facts['macs']['at']}"
    yield "network", f"{facts['parameters']:,} parameters, {work}"
    yield "preprocess", _preprocess(facts["preprocess"])
    yield "nms", _pairs(facts["nms"])
    yield "size in MB", ", ".join(f"{name} {size}" for name, size in facts["size_on_disk_mb"].items())
    parity = facts["parity"] or {}
    several = {
        "left out": [f"{graph}: {why}" for graph, why in facts["left_out"].items()],
        "note": facts["notes"],
        "provenance": [f"{key}: {_pairs(value)}" for key, value in facts["provenance"].items()],
        "int8": int8_lines(parity),
    }
    for label, texts in several.items():
        yield from zip(chain([label], repeat("")), texts, strict=False)
    if evaluation := parity.get("evaluation"):
        yield "evaluated", f"on {evaluation['images']} images"


def _preprocess(data: Mapping[str, Any]) -> str:
    steps = [f"resize to {size_in_words(data['target_size'])}"]
    if data["fixed"]:
        steps[0] += " and no other"
    if data["keep_ratio"]:
        steps[0] += " keeping the aspect ratio"
    if data["interp"] < len(_INTERPOLATIONS):
        steps[0] += f" ({_INTERPOLATIONS[data['interp']]})"
    if data["is_scale"]:
        steps.append("scale to 0..1")
    if data["norm_type"] == "mean_std":
        steps.append(f"subtract {_numbers(data['mean'])}, divide by {_numbers(data['std'])}")
    if data["pad_stride"]:
        steps.append(f"pad to multiples of {data['pad_stride']}")
    return "; ".join(steps)


def _numbers(values: Iterable[float]) -> str:
    return " ".join(f"{value:g}" for value in values)


def _pairs(data: Any) -> str:
    if not isinstance(data, dict):
        return str(data)
    return ", ".join(
        f"{key} ({_pairs(value)})" if isinstance(value, dict) else f"{key} {value}" for key, value in data.items()
    )


def _show_parity(data: Mapping[str, Any]) -> None:
    click.echo(f"\nLargest differences from {data.get('reference', 'the reference')}:")
    if "comparisons" in data:
        _show_comparisons(data)
    if fp16 := data.get("fp16"):
        if "comparisons" in fp16:
            click.echo("\nThe FP16 ONNX file:")
            _show_comparisons(fp16)
        else:
            click.echo(f"\nThere is no FP16 ONNX file: {fp16.get('left_out', 'no reason was recorded')}")
    if "engines" in data:
        keys = ("score_difference", "score_difference_max")
        engines = [(name, *_exponents(one, *keys)) for name, one in data["engines"].items()]
        _show_table(("engine",), ("score, mean", "score, largest"), engines)
    _show_end_to_end(data.get("end_to_end") or ())
    if "algorithms" in data:
        click.echo(f"\nAlgorithms tried, of which {data['algorithms']['chosen']} was chosen:")
        lines = []
        for tried in data["algorithms"]["tried"]:
            if tried["error"]:
                lines.append((tried["algorithm"], f"failed: {tried['error']}", "", "", ""))
            for name, one in tried["engines"].items():
                ap = "-" if one["ap"] is None else f"{one['ap']:.4f}"
                found = f"{one['detections_found']:.1%}"
                lines.append((tried["algorithm"], name, ap, found, *_exponents(one, "score_difference")))
        _show_table(("algorithm", "engine"), ("mAP", "found again", "score, mean"), lines)


def _show_comparisons(data: Mapping[str, Any]) -> None:
    keys = ("max_score_difference", "max_box_difference_px")
    lines = [
        (one["graph"], one["engine"], f"{one['batch']}x3x{one['height']}x{one['width']}", *_exponents(one, *keys))
        for one in data["comparisons"]
    ]
    _show_table(("graph", "engine"), ("shape", "score", "box, px"), lines)
    allowed = data.get("tolerance", {})
    click.echo(f"Allowed: score {allowed.get('score', 0):.0e}, box {allowed.get('box_px', 0):g} px.")


def _show_end_to_end(data: Sequence[Mapping[str, Any]]) -> None:
    for reference in dict.fromkeys(one["reference"] for one in data):
        click.echo(f"\nDetections of the files that deploy by themselves, against {reference}:")
        lines = [
            (
                one["graph"],
                one["engine"],
                f"{one['batch']}x{one['height']}x{one['width']}x3",
                f"{one['missing']} of {one['detections']}",
                *_exponents(one, "max_score_difference", "max_box_difference_px"),
            )
            for one in data
            if one["reference"] == reference
        ]
        _show_table(("graph", "engine"), ("shape", "missing", "score", "box, px"), lines, drop="shape")


def _show_sensitivity(data: Mapping[str, Any]) -> None:
    """The groups of convolutions by what INT8 in each alone does to the outputs, the worst first."""
    click.echo(f"\nSensitivity to INT8{': ' + data['measure'] if 'measure' in data else ''}:")
    keys = ("score_difference", "box_difference", "total")
    lines = [
        (one["name"], str(one["convolutions"]), f"{one['macs_share']:.1%}", *_exponents(one, *keys))
        for one in sorted(data.get("groups", ()), key=lambda one: -one["total"])
    ]
    _show_table(("group",), ("convs", "MACs", "score", "box", "total"), lines)


def _exponents(record: Mapping[str, float], *keys: str) -> list[str]:
    return [f"{record[key]:.1e}" for key in keys]


def _show_table(
    texts: Sequence[str], numbers: Sequence[str], lines: Sequence[Sequence[str]], drop: str | None = None
) -> None:
    """`drop`: the column that a narrow terminal may go without."""
    columns: list[Column[Sequence[str]]] = [
        Column(header, header, itemgetter(place), words=header in texts, wrap=header in texts, drop=int(header == drop))
        for place, header in enumerate([*texts, *numbers])
    ]
    show_table(columns, lines)
