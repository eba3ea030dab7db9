"""The whole product on the built-in detector: data, export, quantise, benchmark, and what was seen."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from gfldeploy import demo
from gfldeploy.bench.csv_file import write_csv
from gfldeploy.bench.journal import Journal
from gfldeploy.bench.report.page import write_report
from gfldeploy.bench.results import BenchResults, CellResult, Settings
from gfldeploy.bench.session import BenchRequest, prepare, run
from gfldeploy.bench.table import images_per_s
from gfldeploy.demo.dataset import generate
from gfldeploy.export.exporter import ExportRequest, export_bundle
from gfldeploy.files import (
    atomic_directory,
    files_below,
    scratch_directory,
    write_json,
    write_text,
)
from gfldeploy.quant.quantizer import QuantizeRequest, quantize_bundle
from gfldeploy.quant.samples import calibration_images

__all__ = ["DemoSize", "explain", "run_demo"]

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class DemoSize:
    """How much the demo does: images for mAP, for calibration and for timing; seconds for each cell."""

    val_images: int = 200
    calib_images: int = 32
    timed_images: int = 32
    min_seconds: float = 1.0
    batch_sizes: tuple[int, ...] = (1, 2, 4, 8)


def run_demo(
    output: Path,
    *,
    force: bool = False,
    threads: int = 1,
    size: DemoSize | None = None,
    report: Callable[[str], None] = lambda stage: None,
    progress: Progress = lambda label, done, total: None,
) -> BenchResults:
    """Write `output`: data/, fp32/ and int8/ (bundles), results (.json, .csv, .html), summary.md: all at once, or none.

    Raises whatever the steps raise, and `OutputError`.
    """
    size = size or DemoSize()
    # Three copies of a 2 M-parameter model, 264 JPEGs and room to spare.
    with atomic_directory(output, "demo", force=force, need_bytes=200_000_000) as directory:
        report("generating images")
        calib = generate(
            directory / "data", "calib", size.calib_images, lambda done, total: progress("images", done, total)
        )
        val = generate(directory / "data", "val", size.val_images, lambda done, total: progress("images", done, total))
        report("exporting the built-in detector")
        fp32 = export_bundle(
            ExportRequest(
                config=demo.config_path(),
                weights=demo.weights_path(),
                output=directory / "fp32",
                threads=threads,
                command="gfldeploy demo",
            ),
            lambda stage: report(f"  {stage.replace(str(directory), str(output))}"),
        )
        report("quantising it to INT8")
        int8 = quantize_bundle(
            QuantizeRequest(
                bundle=fp32.directory,
                images=calibration_images(calib, None, size.calib_images),
                output=directory / "int8",
                threads=threads,
                command="gfldeploy demo",
            ),
            lambda stage: report(f"  {stage.replace(str(directory), str(output))}"),
            progress,
        )
        report("benchmarking both")
        prepared = prepare(
            BenchRequest(
                bundles=(fp32.directory, int8.directory),
                annotations=val,
                batch_sizes=size.batch_sizes,
                threads=threads,
                settings=Settings(size.min_seconds, 10, 2 * size.min_seconds, quick=True),
                engines=("paddle", "paddle-plain", "onnxruntime", "openvino"),
                engine_cache=directory / "engines",
                timed_images=size.timed_images,
                peaks=False,  # a minute more, for what is of no use without the user's own detector
            )
        )
        with scratch_directory() as journal:
            results = run(
                prepared,
                Journal(journal),
                lambda done, total, description: report(f"  {min(done + 1, total)}/{total} {description}"),
            )
        shutil.rmtree(directory / "engines", ignore_errors=True)
        results.write(directory / "results.json")
        write_csv(results, directory / "results.csv")
        write_report(results, directory / "results.html")
        write_text(directory / "summary.md", "# What the demo saw\n\n" + "\n\n".join(explain(results)) + "\n")
        note = {"what": "made by `gfldeploy demo`; safe to delete", "files": files_below(directory)}
        write_json(directory / "demo.json", note)
    return results


def explain(results: BenchResults) -> list[str]:
    """What the results say, in a few plain sentences; every number in them is computed from `results`."""
    measured = [cell for cell in results.cells if cell.status == "ok"]
    if not measured:
        return ["Nothing could be measured; results.json holds the reasons."]
    best = max(measured, key=images_per_s)
    lines = [
        f"Fastest here: {_name(best)} at batch {best.batch_size}, {images_per_s(best):.1f} images/s"
        f"{_accuracy(best)}. Deploy the {best.bundle.directory if best.bundle else '?'} bundle."
    ]
    single = {(cell.engine, cell.precision): cell for cell in measured if cell.batch_size == 1}
    for engine in dict.fromkeys(cell.engine for cell in measured):
        base = single.get((engine, "fp32"))
        for precision in ("bf16", "int8"):
            cell = single.get((engine, precision))
            if base is None or cell is None:
                continue
            ratio = images_per_s(cell) / images_per_s(base)
            drop = f", mAP {cell.accuracy.ap - base.accuracy.ap:+.4f}" if cell.accuracy and base.accuracy else ""
            lines.append(f"{engine} {precision} at batch 1 runs {ratio:.2f} times as fast as its fp32{drop}.")
    for (engine, precision), first in single.items():
        cells = [cell for cell in measured if (cell.engine, cell.precision) == (engine, precision)]
        last = max(cells, key=lambda cell: cell.batch_size or 0)
        if last is first or (engine, precision) != (best.engine, best.precision):
            continue
        lines.append(
            f"{_name(last)} from batch 1 to {last.batch_size}: {images_per_s(first):.1f} to {images_per_s(last):.1f} "
            f"images/s. The images are of mixed orientation, so a batch of {last.batch_size} is padded to "
            f"{last.runs[0].padding_ratio:.2f} times its real pixels (batch 1: {first.runs[0].padding_ratio:.2f})."
        )
    lines.append(
        f"Speeds are of this machine ({results.machine.cpu}); the ratios within one run mean more than they do."
    )
    return lines


def _name(cell: CellResult) -> str:
    return f"{cell.engine} {cell.precision}"


def _accuracy(cell: CellResult) -> str:
    return f", mAP {cell.accuracy.ap:.4f}" if cell.accuracy else ""
