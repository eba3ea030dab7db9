"""What runs: by `deploy.yml`, by what is asked for, or by what works here."""

from __future__ import annotations

import importlib.util
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gfldeploy import Detector
from gfldeploy.batching.buckets import Order, Size
from gfldeploy.bench.cell import BundleIdentity, Cell
from gfldeploy.bench.estimates import Estimate
from gfldeploy.bench.results import DataDescription
from gfldeploy.bundle import Bundle
from gfldeploy.engines import base, selection
from gfldeploy.engines.base import EngineOptions, Precision, Shape
from gfldeploy.engines.hardware import usable_threads
from gfldeploy.errors import BundleError, DataError, EngineError, UnsupportedError
from gfldeploy.machine import describe_machine
from gfldeploy.predict import engine_selection
from gfldeploy.predict.engine_selection import choose
from gfldeploy.tune.deploy_file import Configuration, Deploy, Evidence, SearchRecord, check_deploy
from gfldeploy.tune.search import Bounds

pytest.importorskip("onnxruntime")

ONE = Estimate(1.0, None, None, 1)
EVIDENCE = Evidence(ONE, ONE, None, 1.0, ONE, ONE, False, False, 99, None, None, None, 1, "2026-01-01T00:00:00+00:00")


def write_deploy(
    folder: Path,
    bundle: Path,
    machine: dict[str, Any] | None = None,
    digest: str = "",
    order: Order = "bucketed",
    tf32: bool = False,
    streams: int = 1,
    precision: Precision = "fp32",
    input_size: Size | None = None,
    ap_drop: float | None = None,
    shapes: tuple[Shape, ...] = (),
) -> Path:
    """A deploy.yml beside a copy of the bundle: onnxruntime, 3 threads, batches of 2."""
    shutil.copytree(bundle, folder / "tiny")
    cell = Cell(
        bundle=BundleIdentity("tiny", "tiny", digest or Bundle.open(bundle).digest),
        engine="onnxruntime",
        precision=precision,
        device="gpu" if tf32 else "cpu",
        threads=3,
        batch_size=2,
        order=order,
        scenario="offline" if order == "bucketed" else "multi-stream",
        tf32=tf32,
        streams=streams,
        input_size=input_size,
    )
    choice = Configuration("tiny", cell, replace(EVIDENCE, ap_drop=ap_drop))
    deploy = Deploy(
        "2026-01-01T00:00:00+00:00", "Deploy it.", choice, None, Bounds(), None, SearchRecord(1, 1, 0, 1, True, True),
        replace(describe_machine(), **machine or {}), DataDescription("ab" * 32, "cd" * 32, 1, None), shapes,
    )  # fmt: skip
    deploy.write(folder / "deploy.yml")
    return folder / "deploy.yml"


def test_a_bundle_gets_what_works_here(tiny_bundle: Path) -> None:
    choice = choose(tiny_bundle)
    best = "openvino" if importlib.util.find_spec("openvino") else "onnxruntime"
    assert (choice.engine, choice.options.precision, choice.options.device) == (best, "fp32", "cpu")
    assert (choice.batch_size, choice.options.threads, choice.notes) == (1, usable_threads(), ())
    assert "runs fp32 on cpu" in choice.why


def test_what_is_asked_for_goes_first(tiny_bundle: Path) -> None:
    choice = choose(tiny_bundle, engine="onnxruntime", threads=1, batch_size=4)
    assert (choice.engine, choice.options.threads, choice.batch_size) == ("onnxruntime", 1, 4)
    assert choice.why == "as asked for"


def test_a_deploy_file(tiny_bundle: Path, tmp_path: Path) -> None:
    path = write_deploy(tmp_path, tiny_bundle)
    choice = choose(path)
    assert (choice.engine, choice.options.threads, choice.batch_size) == ("onnxruntime", 3, 2)
    assert (choice.why, choice.notes) == ("as deploy.yml says", ())
    assert choice.bundle.directory == tmp_path / "tiny"
    other = choose(path, batch_size=1, threads=1)
    assert (other.options.threads, other.batch_size) == (1, 1)


@pytest.mark.parametrize(
    ("cpus", "batch_size", "expected"),
    [(1, 1, (1, 1)), (2, 1, (2, 1)), (2, 16, (1, 2)), (16, 1, (16, 1)), (24, 1, (12, 2)), (64, 1, (16, 4)),
     (64, 4, (4, 16)), (64, 32, (1, 64))],
)  # fmt: skip
def test_for_throughput_streams_share_the_cpus(
    cpus: int, batch_size: int, expected: tuple[int, int], tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No more than 16 images are in the network at once."""
    for module in (base, selection):
        monkeypatch.setattr(module, "usable_threads", lambda: cpus)
    options = choose(tiny_bundle, batch_size=batch_size, throughput=True).options
    assert (options.streams, options.threads) == expected
    assert choose(tiny_bundle, batch_size=batch_size).options.streams == 1
    assert choose(tiny_bundle, threads=1, throughput=True).options.streams == 1, "as before"
    assert choose(tiny_bundle, streams=1, throughput=True).options.threads == cpus
    with pytest.raises(EngineError, match=rf"^{cpus + 1} streams of 1 thread each are more than the {cpus} usable"):
        choose(tiny_bundle, streams=cpus + 1)


@pytest.mark.parametrize(
    ("cpus", "engine", "size", "expected"),
    [(2, "onnxruntime", (320, 512), (4, 2)), (8, "onnxruntime", (320, 512), (2, 8)), (16, "onnxruntime", None, (1, 16)),
     (2, "onnxruntime", (800, 1312), (1, 2)), (2, "openvino", (320, 512), (1, 2))],
)  # fmt: skip
def test_small_images_run_several_at_once_where_no_cpu_loses_its_stream(
    cpus: int,
    engine: str,
    size: Size | None,
    expected: tuple[int, int],
    tiny_bundle: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip(engine)
    for module in (base, selection):
        monkeypatch.setattr(module, "usable_threads", lambda: cpus)

    def chosen(**options: Any) -> tuple[int, int]:
        choice = choose(tiny_bundle, engine, input_size=size, throughput=True, small_batches=True, **options)
        return choice.batch_size, choice.options.streams

    assert chosen() == expected
    assert chosen(batch_size=1) == (1, cpus)
    assert chosen(order="listed") == (1, cpus), "which would change boxes"


def test_streams_of_a_deploy_file(tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_deploy(tmp_path, tiny_bundle, streams=2)
    for module in (base, engine_selection):
        monkeypatch.setattr(module, "usable_threads", lambda: 7)
    for throughput in (False, True):
        choice = choose(path, throughput=throughput)
        assert (choice.options.streams, choice.options.threads, choice.notes) == (2, 3, ())
    assert "2 streams of 3 threads (as deploy.yml says)" in str(choice)
    assert choose(path, threads=2).options.streams == 1
    for module in (base, engine_selection):
        monkeypatch.setattr(module, "usable_threads", lambda: 5)
    choice = choose(path)
    assert (choice.options.streams, choice.options.threads) == (1, 3)
    assert choice.notes == ("2 streams of 3 threads each are more than the 5 usable CPUs: deploy.yml runs with 1 here",)


def test_a_deploy_file_is_of_its_input_size(tiny_bundle: Path, tmp_path: Path) -> None:
    path = write_deploy(tmp_path, tiny_bundle, input_size=(32, 48), shapes=((2, 32, 64),))
    choice = choose(path)
    assert (choice.input_size, choice.bundle.manifest.preprocess.target_size) == ((32, 48), (32, 48))
    assert "tiny in onnxruntime fp32 at 32x48 on cpu, batch 2" in str(choice)
    own = choose(path, input_size=(64, 96))
    assert (own.input_size, own.bundle.manifest.preprocess.target_size) == (None, (64, 96)) and " at " not in str(own)
    assert check_deploy(path) == ()
    # The network's input has up to 64 px there, and at the bundle's own size up to 96.
    other = write_deploy(tmp_path / "b", tiny_bundle, input_size=(32, 48), shapes=((2, 96, 96),))
    with pytest.raises(BundleError, match="makes no input of 2x96x96 of any image"):
        choose(other)


def test_a_deploy_file_of_another_machine_is_used_with_a_note(tiny_bundle: Path, tmp_path: Path) -> None:
    (hardware,) = choose(write_deploy(tmp_path / "a", tiny_bundle, {"cpu": "Abacus"})).notes
    assert "made on another machine" in hardware and "gfldeploy tune" in hardware
    (software,) = choose(write_deploy(tmp_path / "b", tiny_bundle, {"python": "9.9"})).notes
    assert "other software" in software
    with (
        pytest.warns(UserWarning, match="made on another machine"),
        Detector(tmp_path / "a" / "deploy.yml") as detector,
    ):
        assert detector.choice.batch_size == 2


def test_a_deploy_file_of_another_bundle_is_refused(tiny_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="is not the bundle that was tuned"):
        choose(write_deploy(tmp_path, tiny_bundle, digest="ab" * 32))


def test_tf32_is_as_the_deploy_file_says_where_it_can_be(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(selection, "check_possible", lambda *_: None)  # as if there were a GPU
    path = write_deploy(tmp_path, tiny_bundle, tf32=True)
    choice = choose(path)
    assert choice.options.tf32 and "fp32 in TF32 on gpu" in str(choice)
    assert not choose(path, tf32=False).options.tf32
    assert not choose(path, device="cpu").options.tf32
    with pytest.raises(UnsupportedError, match=r"TF32 is a format of GPUs.*Leave --tf32 out, or add --device gpu"):
        choose(path, device="cpu", tf32=True)
    with pytest.raises(UnsupportedError, match=r"TF32 is a way to compute FP32, and this is fp16"):
        EngineOptions("fp16", "gpu", tf32=True)


def test_int8_runs_at_the_sizes_at_which_it_was_found_to_hold(tiny_bundle: Path, tmp_path: Path) -> None:
    int8 = Path(shutil.copytree(tiny_bundle, tmp_path / "int8"))
    judged = [{"size": [32, 64], "problem": None}, {"size": [48, 64], "problem": "INT8 in paddle loses 0.0060 mAP"}]
    impossible = [{"size": size, "problem": None} for size in ([0, 0], [99_999, 99_999])]  # by a bundle from elsewhere
    text = json.dumps({"sizes": [*impossible, *judged]})
    (int8 / "parity.json").write_text(text)
    manifest = json.loads((int8 / "manifest.json").read_text()) | {"precision": "int8"}
    manifest["files"]["parity.json"] = {"sha256": "0" * 64, "bytes": len(text)}
    (int8 / "manifest.json").write_text(json.dumps(manifest))
    for size in (None, (64, 96), (96, 64), (32, 64), (64, 32)):  # images of either orientation are resized alike
        assert choose(int8, input_size=size).options.precision == "int8"
    unjudged, failed = (128, 160), (48, 64)
    with pytest.raises(UnsupportedError, match=r"not judged at 128x160\. Quantise .* `--input-sizes 128x160`, which"):
        choose(int8, input_size=unjudged)
    with pytest.raises(
        UnsupportedError, match=r"does not hold at 48x64: INT8 in paddle loses 0\.0060 mAP\. Use another"
    ):
        Detector(int8, input_size=failed)
    assert choose(tiny_bundle, input_size=unjudged).input_size == unjudged, "FP32"

    path = write_deploy(tmp_path / "known", int8, precision="int8", input_size=failed, ap_drop=0.006)
    assert choose(path).input_size == failed
    with pytest.raises(UnsupportedError, match="not judged at 128x160"):
        choose(path, input_size=unjudged)
    if importlib.util.find_spec("openvino"):
        with pytest.raises(UnsupportedError, match="does not hold at 48x64"):
            choose(path, engine="openvino")
    with pytest.raises(UnsupportedError, match="does not hold at 48x64"):
        choose(write_deploy(tmp_path / "unknown", int8, precision="int8", input_size=failed))
    with pytest.raises(UnsupportedError, match="not judged at 128x160"):
        choose(write_deploy(tmp_path / "own", int8, precision="int8", ap_drop=0.001), input_size=unjudged)


def test_what_cannot_be_is_refused(tiny_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"int8 is not possible: .* is FP32"):
        choose(tiny_bundle, precision="int8")
    with pytest.raises(UnsupportedError, match=r"no engine runs fp16 on cpu: openvino: .*; onnxruntime: .*; paddle: "):
        choose(tiny_bundle, precision="fp16")
    with pytest.raises(BundleError, match=r"there is no .*nowhere"):
        choose(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="streams must be at least 1, not 0"):
        choose(tiny_bundle, streams=0)
    (tmp_path / "file").touch()
    with pytest.raises(BundleError, match="neither a bundle nor a deploy file"):
        choose(tmp_path / "file")
    with pytest.raises(DataError, match=r"absent\.yml cannot be read"):
        choose(tmp_path / "absent.yml")


def test_batches_are_formed_as_the_deploy_file_says(tiny_bundle: Path, tmp_path: Path) -> None:
    orders: tuple[Order, ...] = ("listed", "bucketed")
    for order in orders:
        path = write_deploy(tmp_path / order, tiny_bundle, order=order)
        choice = choose(path)
        assert choice.order == order
        assert any("padded to a common size" in note for note in choice.notes) == (order == "listed")
    assert choose(path, order="listed").order == "listed"
    assert choose(tiny_bundle).order == "bucketed"
