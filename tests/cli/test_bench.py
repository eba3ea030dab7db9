"""`gfldeploy bench` from end to end, over ONNX Runtime and the tiny detector."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from schema_checks import check_schema

from gfldeploy.bench.results import BenchResults
from gfldeploy.cli import main

pytest.importorskip("onnxruntime")


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stopped:
        main(["bench", *map(str, arguments)])
    assert isinstance(stopped.value.code, int)
    return stopped.value.code


@pytest.mark.slow
def test_everything(tiny_bundle: Path, tiny_coco: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "new" / "results.json"
    quick = ("--min-seconds", 0, "--min-count", 3, "--threads", 1, "--batch-sizes", "1,2", "--rounds", 2, "--no-peak")
    engines = ("--engines", "paddle,onnxruntime")
    assert run(tiny_bundle, "--data", tiny_coco, "-o", output, *engines, *quick) == 0
    shown, progress = capfd.readouterr()
    assert "1.000" in shown and "images/s" in shown and "0 of 1" in shown
    assert "onnxruntime int8: skipped: no INT8 bundle was given; make an INT8 bundle" in shown
    skip = progress.index("skip  onnxruntime fp16")
    assert skip < progress.index("1/5 tiny: onnxruntime fp32, batch 1\n")
    assert re.search(r"3/5 tiny: onnxruntime fp32, batch 1 \(about \d+ s left\)\n", progress)
    assert re.search(r"5/5 tiny: onnxruntime fp32, accuracy \(about \d+ s left\)\n", progress)
    results = BenchResults.read(output)
    assert (results.data.timed_images, results.data.accuracy_images) == (6, 6)
    one, two = (cell for cell in results.cells if cell.status == "ok")
    assert (one.cell.batch_size, two.cell.batch_size) == (1, 2)
    assert one.accuracy == two.accuracy and one.accuracy is not None and one.accuracy.ap == pytest.approx(1)
    assert results.settings.rounds == len(one.runs) == len(two.runs) == 2
    run_one, run_two = one.runs[0], two.runs[0]
    assert len(run_one.samples.latency_ms) >= 3
    assert run_one.convolutions == {"fp32": 1} and run_one.not_low_precision == ()
    # Prepared: 58x96, 96x58, 64x64 and 64x96, padded to multiples of 32; in twos, landscape meets portrait.
    assert 1 < (run_one.padding_ratio or 0) < (run_two.padding_ratio or 0)
    assert len(run_one.samples.warmup_ms) == 2 * 3  # three distinct shapes
    assert run_one.stages is not None and len(run_one.stages.decode_ms) >= 2
    assert output.with_suffix(".csv").read_text().count("\n") == 1 + len(results.cells)
    assert not output.with_name("results.json.unfinished").exists()
    assert str(tiny_bundle.parent) not in output.read_text()
    check_schema("results", output)


@pytest.mark.slow
def test_each_input_size_has_its_speed_cost_and_accuracy(tiny_bundle: Path, tiny_coco: Path, tmp_path: Path) -> None:
    output = tmp_path / "results.json"
    quick = ("--min-seconds", 0, "--min-count", 3, "--threads", 1, "--rounds", 1, "--no-peak", "--precisions", "fp32")
    sizes = ("--input-sizes", "64x96,32x48", "--batch-sizes", 1, "--engines", "onnxruntime")
    assert run(tiny_bundle, "--data", tiny_coco, "-o", output, *quick, *sizes) == 0
    own, half = BenchResults.read(output).cells
    assert (own.cell.input_size, half.cell.input_size) == (None, (32, 48))
    # As long as the detector's box is 48 px, at half the size it is twice as large as what is to be found.
    assert own.ap == pytest.approx(1) and half.ap is not None and half.ap < 0.1
    assert {"1x3x64x96", "1x3x96x64"} < set(own.runs[0].shapes) and {"1x3x32x64", "1x3x64x32"} <= set(
        half.runs[0].shapes
    )
    assert own.cost is not None and half.cost is not None and half.cost.macs < own.cost.macs
    assert own.runs[0].stages is not None and half.runs[0].stages is not None
    header, *table = [line.split(",") for line in output.with_suffix(".csv").read_text().splitlines()]
    assert [line[header.index("input_size")] for line in table] == ["own", "32x48"]


def test_an_existing_output_is_refused_before_anything_else(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "results.json"
    output.write_text("mine")
    assert run(tmp_path / "no bundle", "--data", tmp_path / "no data", "-o", output) == 2
    error = capfd.readouterr().err
    assert error.startswith("Error:") and "--force" in error and error.count("\n") == 1
    assert output.read_text() == "mine"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("--engines", "onnxruntime,tensorflow"),
            "'tensorflow' is not one of paddle, paddle-plain, paddle-tensorrt, onnx",
        ),
        (("--engines", "onnxrutime"), "(did you mean onnxruntime?)"),
        (("--precisions", "in8"), "(did you mean int8?)"),
        (("--scenarios", "server"), "the server scenario needs --rates"),
        (("--streams", "1,2"), "several --streams are of the offline and server scenarios. Add offline to --scenarios"),
        (("--scenarios", "server", "--rates", "5"), "--latency-bound-ms. See `gfldeploy bench --help`."),
        (("--policies", "adaptve"), "(did you mean adaptive?)"),
        (("--rates", "5"), "--rates needs the server scenario"),
        (("--rates", "5,-1", "--scenarios", "server"), "'-1' is not a positive number"),
        (("--max-seconds", "1"), "--max-seconds is less than --min-seconds"),
        (
            ("--scenarios", "single-stream", "--batch-sizes", "2", "--engines", "onnxruntime", "--precisions", "fp32"),
            "the scenarios do not go with the batch sizes",
        ),
        (("--precisions", "int4"), "'int4' is not one of fp32, fp16, bf16, int8"),
        (("--batch-sizes", "1,0"), "'0' is not a whole number from 1"),
        (("--batch-sizes", "1;2"), "'1;2' is not a whole number from 1"),
        (("--batch-sizes", ""), "'' is not a whole number from 1"),
        (
            ("--precisions", "int8", "--engines", "onnxruntime"),
            "nothing to run: onnxruntime int8 on cpu: no INT8",
        ),
        (("--threads", "0"), "0 is not in the range"),
        (("--output", "."), "is a directory"),
        (("--output", "results.txt"), "results.txt does not end in .json"),
        (("--images", "nowhere"), "nowhere is not a directory"),
    ],
)
def test_bad_values_are_one_line(
    arguments: tuple[str, ...],
    message: str,
    tiny_bundle: Path,
    tiny_coco: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(tiny_bundle, "--data", tiny_coco, *arguments) == 2
    error = capfd.readouterr().err.splitlines()[-1]
    assert error.startswith("Error:") and message in error
    assert list(tmp_path.iterdir()) == []


def test_bundles_that_results_cannot_tell_apart(
    tiny_bundle: Path, tiny_coco: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    other = shutil.copytree(tiny_bundle, tmp_path / "other" / tiny_bundle.name)
    assert run(tiny_bundle, other, "--data", tiny_coco, "-o", tmp_path / "r.json") == 2
    assert f"{tiny_bundle} and {other} would both be {tiny_bundle.name} in the results" in capfd.readouterr().err


def test_classes_that_do_not_fit_are_found_before_measuring(
    tiny_bundle: Path, tiny_coco: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    source = json.loads(tiny_coco.read_text())
    source["categories"] = [{**source["categories"][0], "name": "cat"}, {"id": 8, "name": "box"}]
    other = tmp_path / "other.json"
    other.write_text(json.dumps(source))
    arguments = (tiny_bundle, "--data", other, "--images", tiny_coco.parent / "images", "-o", tmp_path / "r.json")
    assert run(*arguments) == 2
    error = capfd.readouterr().err
    assert "ball" in error and "--no-accuracy" in error


def test_no_cell_measured(
    tiny_bundle: Path, tiny_coco: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "results.json"
    arguments = ("--engines", "onnxruntime", "--precisions", "fp32", "--batch-sizes", 1, "--cell-timeout", 0.001)
    assert run(tiny_bundle, "--data", tiny_coco, *arguments, "-o", output) == 2
    shown, error = capfd.readouterr()
    assert "onnxruntime fp32: failed: it took longer than 0.001 s" in shown
    assert error.splitlines()[-1].startswith("Error: no cell could be measured; onnxruntime fp32: it took longer")
    assert [cell.status for cell in BenchResults.read(output).cells] == ["failed"]


def test_options_from_a_file(
    tiny_bundle: Path, tiny_coco: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config, output = tmp_path / "quick.yml", tmp_path / "results.json"
    config.write_text(
        f"data: {tiny_coco}\nengines: [onnxruntime]\nprecisions: fp32\nbatch-sizes: [1, 2]\nrounds: 1\n"
        "min_seconds: 0\nmin-count: 2\nthreads: 1\naccuracy: false\npeak: false\n"
    )
    # What the command line says goes before.
    assert run(tiny_bundle, "--config", config, "--batch-sizes", "2", "-o", output) == 0
    results = BenchResults.read(output)
    assert [one.cell.name() for one in results.cells] == ["onnxruntime fp32, batch 2"]
    assert (results.settings.rounds, results.settings.min_count, results.settings.quick) == (1, 2, True)
    assert results.cells[0].accuracy is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("batchsizes: [1]", "has an unknown option, 'batchsizes' (did you mean batch-sizes?)"),
        ("- 1", "must be a mapping of option names to values"),
        ("{", "is not YAML"),
        ("engines: [tensorflow]", "'tensorflow' is not one of"),
        ("rounds: many", "'many' is not a valid integer range"),
        ("rounds: 2.7", "'2.7' is not a valid integer range"),
        ("min-seconds: false", "'False' is not a valid float range"),
        ("accuracy: 2", "'2' is not a valid boolean"),
        ("batch-sizes: [1, 0]", "'0' is not a whole number from 1"),
        ("force: true", "has an unknown option, 'force'"),
        ("data: 5", "data must be a path"),
        ("threads: [1, 2]", "threads must be a value"),
        ("engines: [{a: 1}]", "engines must be a value or a list of values"),
        ("a: &a [*a]", "an alias refers to the value that it is part of"),
    ],
)
def test_a_bad_file_of_options(
    text: str,
    message: str,
    tiny_bundle: Path,
    tiny_coco: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("bad.yml").write_text(text)
    assert run(tiny_bundle, "--data", tiny_coco, "--config", "bad.yml") == 2
    error = capfd.readouterr().err.splitlines()
    assert len(error) == 1 and error[0].startswith("Error:") and message in error[0]


@pytest.mark.parametrize("config", sorted((Path(__file__).parents[2] / "configs" / "bench").glob("*.yml")))
def test_the_committed_files_of_options(config: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    # They are read, and the first thing that is wrong is the bundle.
    assert run(tmp_path / "none", "--config", config, "--data", "x.json", "-o", tmp_path / "r.json") == 2
    assert "none is not a directory" in capfd.readouterr().err


@pytest.mark.slow
def test_killed_and_resumed(tiny_bundle: Path, tiny_coco: Path, tmp_path: Path) -> None:
    output, log = tmp_path / "results.json", tmp_path / "log"
    arguments = [
        *(tiny_bundle, "--data", tiny_coco, "-o", output, "--engines", "onnxruntime", "--precisions", "fp32"),
        *("--min-seconds", 0, "--min-count", 2, "--threads", 1, "--batch-sizes", "1,2,4", "--rounds", 2, "--no-peak"),
    ]
    command = [sys.executable, "-m", "gfldeploy", "bench", *map(str, arguments)]
    with log.open("w") as errors, subprocess.Popen(command, stderr=errors, stdout=subprocess.DEVNULL) as process:
        for _ in range(1200):
            if "] 4/7 " in log.read_text():
                break
            time.sleep(0.05)
        process.kill()
    assert not output.exists()
    kept = list(output.with_name("results.json.unfinished").glob("*.json"))
    assert len(kept) in (3, 4)
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert f"1/{7 - len(kept)} " in done.stderr and f"/{7 - len(kept) + 1} " not in done.stderr
    assert [len(cell.runs) for cell in BenchResults.read(output).cells] == [2, 2, 2]
    assert not output.with_name("results.json.unfinished").exists()


def test_two_at_once_for_one_file(tmp_path: Path) -> None:
    from gfldeploy.bench.journal import journal_beside
    from gfldeploy.errors import OutputError

    output = tmp_path / "r.json"
    with (
        journal_beside(output, "bench"),
        pytest.raises(OutputError, match="another gfldeploy is working on"),
        journal_beside(output, "bench"),
    ):
        pass
    assert list(tmp_path.iterdir()) == []
