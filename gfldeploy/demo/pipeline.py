"""The whole product on the built-in detector: data, export, quantise, benchmark, and what was seen."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from gfldeploy import demo
from gfldeploy.bench.columns import text_of
from gfldeploy.bench.report.page import short_answer
from gfldeploy.bench.results import BenchResults
from gfldeploy.bench.session import benchmark
from gfldeploy.bench.table import Row, best_of_each, rows
from gfldeploy.demo.dataset import generate
from gfldeploy.export.exporter import export_bundle
from gfldeploy.files import atomic_directory, files_below, write_json, write_text
from gfldeploy.progress import SILENT, Progress
from gfldeploy.quant.quantizer import quantize_bundle


@dataclass(frozen=True)
class DemoSize:
    """How much the demo does: images for mAP, for calibration and for timing; seconds for each cell; batch sizes."""

    val_images: int = 100
    calib_images: int = 16
    timed_images: int = 16
    min_seconds: float = 0.5
    batch_sizes: tuple[int, ...] = (1, 4)


def run_demo(
    output: Path,
    *,
    force: bool = False,
    threads: int | None = None,
    size: DemoSize | None = None,
    progress: Progress = SILENT,
) -> BenchResults:
    """Write `output`: data/, fp32/ and int8/ (bundles), results (.json, .csv, .html), summary.md: all at once, or none.

    Raises whatever the steps raise, and `OutputError`.
    """
    size = size or DemoSize()
    # Three copies of a 2 M-parameter model, the JPEGs and room to spare.
    with atomic_directory(output, "demo", force=force, need_bytes=200_000_000) as directory:
        progress.stage("generating images")
        calib = generate(directory / "data", "calib", size.calib_images, progress)
        val = generate(directory / "data", "val", size.val_images, progress)
        progress.stage("exporting the built-in detector")
        shown = _Indented(progress, directory, output)
        fp32 = export_bundle(
            config=demo.config_path(),
            weights=demo.weights_path(),
            output=directory / "fp32",
            threads=threads,
            command="gfldeploy demo",
            progress=shown,
        )
        progress.stage("quantising it to INT8")
        int8 = quantize_bundle(
            fp32.directory,
            data=calib,
            samples=size.calib_images,
            output=directory / "int8",
            threads=threads,
            command="gfldeploy demo",
            progress=shown,
        )
        progress.stage("benchmarking both")
        results = benchmark(
            (fp32.directory, int8.directory),
            data=val,
            precisions=("fp32", "int8"),
            batch_sizes=size.batch_sizes,
            threads=threads,
            rounds=1,
            min_seconds=size.min_seconds,
            max_seconds=2 * size.min_seconds,
            limit=size.timed_images,
            peak=False,  # a minute more, for what is of no use without the user's own detector
            engine_cache=directory / "engines",
            output=directory / "results.json",
            progress=shown,
        )
        shutil.rmtree(directory / "engines", ignore_errors=True)
        write_text(directory / "summary.md", "# What the demo saw\n\n" + "\n\n".join(explain(results)) + "\n")
        note = {"what": "made by `gfldeploy demo`; safe to delete", "files": files_below(directory)}
        write_json(directory / "demo.json", note)
    return results


class _Indented:
    """The progress of one step of the demo: below it, and with the place that things will have in the end."""

    def __init__(self, progress: Progress, directory: Path, output: Path) -> None:
        self._progress, self._directory, self._output = progress, str(directory), str(output)
        self.step, self.note = progress.step, progress.note

    def stage(self, text: str) -> None:
        self._progress.stage(f"  {text.replace(self._directory, self._output)}")


def explain(results: BenchResults) -> list[str]:
    """What the results say, in a few plain sentences; every number in them is computed from `results`."""
    lines = short_answer(results)
    measured = [row for row in rows(results) if row.ok and not row.is_server]
    if not measured:
        return lines
    single = {(row.cell.engine, row.cell.precision): row for row in measured if row.cell.batch_size == 1}
    for (engine, precision), row in single.items():
        base = single.get((engine, "fp32"))
        if base and precision != "fp32":
            lines.append(f"{engine} {precision} at batch 1 against its fp32: {_against(row, base)}.")
    best = best_of_each(measured)[0]
    first = single.get((best.cell.engine, best.cell.precision))
    same = [row for row in measured if row.cell.setup() == best.cell.setup()]
    last = max(same, key=lambda row: row.cell.batch_size)
    if first and last is not first:
        size = last.cell.batch_size
        lines.append(
            f"{last.cell.setup()} from batch 1 to {size}: {_speed(first)} to {_speed(last)} images/s. The images "
            f"are of mixed orientation, so a batch of {size} is padded to {last.padding or 1:.2f} times its "
            f"real pixels (batch 1: {first.padding or 1:.2f})."
        )
    lines.append(
        f"Speeds are of this machine ({results.machine.cpu}); the ratios within one run mean more than they do."
    )
    return lines


def _against(row: Row, base: Row) -> str:
    """How many times as fast, and what that does to mAP."""
    parts = [
        f"{mine / its:.2f} times the images/s {what}"
        for what, mine, its in (
            ("from file to boxes", row.file_images_per_s, base.file_images_per_s),
            ("of the network alone", row.images_per_s, base.images_per_s),
        )
        if mine and its
    ]
    if row.ap is not None and base.ap is not None:
        parts.append(f"mAP {row.ap - base.ap:+.4f}")
    return ", ".join(parts)


def _speed(row: Row) -> str:
    """From file to boxes; of the network alone where that was not measured."""
    file = row.file_images_per_s
    return f"{text_of(row.images_per_s)} (network alone)" if file is None else text_of(file)
