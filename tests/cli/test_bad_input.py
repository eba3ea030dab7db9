"""What a user can get wrong is one line with a remedy, exit code 2, and nothing left behind."""

from __future__ import annotations

import json
import os
import pickle
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cv2
import demo_bundles
import numpy as np
import pytest

from gfldeploy import demo
from gfldeploy.bundle import Bundle
from gfldeploy.cli import main
from gfldeploy.engines.selection import select_engine

pytest.importorskip("onnxruntime")


def run(*arguments: object) -> int | str | None:
    with pytest.raises(SystemExit) as stopped:
        main(list(map(str, arguments)))
    return stopped.value.code


@pytest.fixture
def refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a command that must be refused, and return the line; nothing below `tmp_path` may have changed."""

    def check(*arguments: object) -> str:
        before = demo_bundles.snapshot(tmp_path)
        code = run(*arguments)
        out, err = capfd.readouterr()
        message = demo_bundles.refusal_in(code, out, err)
        assert demo_bundles.snapshot(tmp_path) == before
        return message

    return check


# --- checkpoints ------------------------------------------------------------------------------------------------------


class Malicious:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch stolen",)


CHECKPOINTS: dict[str, tuple[bytes | None, str]] = {
    "missing": (None, "does not exist"),
    "empty": (b"", "is empty"),
    "truncated": (demo.weights_path().read_bytes()[:-1000], "is cut off before its end"),
    "text": (b"<html>404</html>", "is not a PaddleDetection checkpoint"),
    "corrupt": (b"\x80\x04" + bytes(range(256)), "is damaged"),
    "list": (pickle.dumps([1]), "holds a list"),
    "malicious": (pickle.dumps({"a": Malicious()}), "posix.system"),
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_checkpoints(name: str, tmp_path: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    content, message = CHECKPOINTS[name]
    monkeypatch.chdir(tmp_path)
    weights = tmp_path / "model.pdparams"
    if content is not None:
        weights.write_bytes(content)
    shown = refused("export", "-c", demo.config_path(), "-w", weights, "-o", tmp_path / "new" / "out")
    assert str(weights) in shown
    assert message in shown


@pytest.mark.slow
@demo_bundles.needs_export
def test_weights_of_another_model(tmp_path: Path, refused: Callable[..., str]) -> None:
    with demo.weights_path().open("rb") as file:
        weights = pickle.load(file)
    names = list(weights)
    for name in names[:4]:
        del weights[name]
    weights |= {"extra.one": np.zeros(1, np.float32), "extra.two": np.zeros(1, np.float32)}
    weights[names[4]] = np.zeros((2, 3), np.float32)
    path = tmp_path / "other.pdparams"
    path.write_bytes(pickle.dumps(weights))
    shown = refused("export", "-c", demo.config_path(), "-w", path, "-o", tmp_path / "out")
    assert f"of {len(names)} parameters, 4 missing ({names[0]}, {names[1]}, {names[2]}, ...)" in shown
    assert "2 unexpected (extra.one, extra.two)" in shown
    assert f"1 of the wrong shape ({names[4]} (2x3 instead of " in shown


# --- configs ----------------------------------------------------------------------------------------------------------


def test_configs_that_are_not_there(tmp_path: Path, refused: Callable[..., str]) -> None:
    options = ("--random-weights", 0, "-o", tmp_path / "out")
    assert "nowhere.yml does not exist" in refused("export", "-c", tmp_path / "nowhere.yml", *options)
    path = tmp_path / "own.yml"
    path.write_text("_BASE_: [base.yml]\n")
    shown = refused("export", "-c", path, *options)
    assert "base.yml does not exist (named by _BASE_ in" in shown
    path.write_text("architecture: [GFL\n")
    assert "own.yml:" in refused("export", "-c", path, *options)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("architecture: YOLOv3", "YOLOv3"),
        ("GFL:\n  head: FCOSHead", "FCOSHead"),
        ("GFLHead:\n  regmax: 16", "regmax"),
        ("num_clases: 6", "num_clases"),
        ("GFLHead:\n  nms:\n    name: MultiClassNMS\n    nms_threshold: 2", "nms"),
        ("SlimResNet:\n  widths: [24, 32]", "cannot build this model"),
        ("TestReader:\n  batch_transforms:\n  - PadBatch: {pad_to_stride: 16}", "multiples of 16 px"),
        ("TestReader:\n  batch_transforms: []", "multiples of 1 px"),
        ("TestReader:\n  sample_transforms:\n  - Decode: {}\n  - RandomFlip: {}", "RandomFlip"),
    ],
)
@demo_bundles.needs_export
def test_configs_that_cannot_be_exported(text: str, message: str, tmp_path: Path, refused: Callable[..., str]) -> None:
    config = demo_bundles.write_config(tmp_path, text)
    assert message in refused("export", "-c", config, "--random-weights", 0, "-o", tmp_path / "out")


@pytest.mark.slow
@demo_bundles.needs_export
def test_an_input_shape_that_does_not_fit(tmp_path: Path, refused: Callable[..., str]) -> None:
    arguments = ("export", "-c", demo.config_path(), "--random-weights", 0, "-o", tmp_path / "out")
    assert "Use 320x416" in refused(*arguments, "--input-shape", "310x400")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "either --weights or --random-weights"),
        (("-w", "a.pdparams", "--random-weights", 0), "either --weights or --random-weights"),
        (("--random-weights", -1), "-1 is not in the range"),
        (("--random-weights", 0, "--with-nms", "--input-shape", "320x320"), "--with-nms goes with a free input size"),
        (("--random-weights", 0, "--input-shape", "320"), "is not a shape such as"),
        (("--random-weights", 0, "--candidates", "0"), "neither a whole number from 1 to 3839 nor all"),
        (("--random-weights", 0, "--candidates", "3840"), "neither a whole number from 1 to 3839 nor all"),
        (("--random-weights", 0, "--candidates", "most"), "neither a whole number from 1 to 3839 nor all"),
        (("--random-weights", 0, "--input-shape", "0x320"), "is not a shape such as"),
        (("--random-weights", 0, "--threads", 0), "0 is not in the range"),
    ],
)
def test_export_options(options: tuple[object, ...], message: str, tmp_path: Path, refused: Callable[..., str]) -> None:
    assert message in refused("export", "-c", demo.config_path(), "-o", tmp_path / "out", *options)


# --- outputs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["export", "quantize"])
def test_outputs_in_the_way_are_refused_at_once(
    command: str, tiny_bundle: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    used = Path(shutil.copytree(tiny_bundle, tmp_path / "used"))
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(used)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.tex").write_text("mine")
    if command == "export":
        arguments: tuple[object, ...] = ("export", "-c", demo.config_path(), "--random-weights", 0, "-o")
    else:
        source = with_program(tiny_bundle, tmp_path / "source")
        (tmp_path / "data").mkdir()
        assert cv2.imwrite(str(tmp_path / "data" / "a.png"), np.zeros((32, 32, 3), np.uint8))
        arguments = ("quantize", source, "--data", tmp_path / "data", "--samples", 1, "-o")
    assert "add --force to replace it" in refused(*arguments, used)
    assert "is a file" in refused(*arguments, tmp_path / "file", "--force")
    assert "is a symbolic link" in refused(*arguments, tmp_path / "link", "--force")
    assert "did not write" in refused(*arguments, tmp_path / "folder", "--force")


def with_program(bundle: Path, copy: Path) -> Path:
    """A copy of the tiny bundle that claims to have the program that quantising starts from."""
    from gfldeploy.files import sha256

    shutil.copytree(bundle, copy)
    (copy / "paddle").mkdir()
    added = {
        "paddle/model.pdmodel": b"\x0a\x04\x08\x00\x10\x00",
        "paddle/model.pdiparams": b"",
        "layers.json": b'{"weights": "head.conv"}',
    }
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["graphs"]["paddle_program"] = {"model": "paddle/model.pdmodel", "params": "paddle/model.pdiparams"}
    for name, content in added.items():
        (copy / name).write_bytes(content)
        manifest["files"][name] = {"sha256": sha256(copy / name), "bytes": len(content)}
    (copy / "manifest.json").write_text(json.dumps(manifest))
    return copy


@pytest.mark.slow
@demo_bundles.needs_export
def test_a_read_only_target(tmp_path: Path, refused: Callable[..., str]) -> None:
    arguments = ("export", "-c", demo.config_path(), "--random-weights", 0, "-o")
    assert "cannot write /proc/out: " in refused(*arguments, "/proc/out")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Mounts a file system of so many MB."""
    directory = tmp_path / "disk"
    directory.mkdir()
    mounted = []

    def mount(megabytes: int) -> Path:
        command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(directory)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"mounting a tmpfs is not allowed here: {done.stderr.strip()}")
        mounted.append(directory)
        return directory

    yield mount
    for path in mounted:
        subprocess.run(["umount", path], check=True)


@pytest.mark.slow
@demo_bundles.needs_export
def test_a_small_disk_is_refused_before_the_work(disk: Callable[[int], Path], refused: Callable[..., str]) -> None:
    shown = refused("export", "-c", demo.config_path(), "--random-weights", 0, "-o", disk(8) / "new" / "out")
    assert "MB free, 54 MB are needed" in shown


# Paddle's parameters take 6.7 MB, and are written twice; each of the two ONNX files as much again, also twice.
@pytest.mark.slow
@pytest.mark.parametrize("megabytes", [11, 17])
@demo_bundles.needs_export
def test_a_disk_that_fills_up(
    megabytes: int, disk: Callable[[int], Path], refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # The check of the free space is switched off: the disk fills up while the files are written.
    monkeypatch.setattr("gfldeploy.export.exporter._SPACE_FACTOR", 0)
    output = disk(megabytes) / "new" / "out"
    arguments = ("export", "-c", demo.config_path(), "--random-weights", 0, "-o", output)
    shown = refused(*arguments)
    assert shown == (
        f"Error: cannot write {output}: No space left on device. Free some space or choose another --output."
    )
    assert list(output.parents[1].iterdir()) == []


@pytest.mark.slow
@demo_bundles.needs_export
@demo_bundles.needs_quant
def test_a_limit_on_file_sizes(exported: Path, pictures: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    output = tmp_path / "new" / "out"
    quantize = ("quantize", exported, "--data", pictures, "--samples", 1, "--algo", "abs_max", "--min-agreement", 0)
    for arguments, limit in (
        (("export", "-c", demo.config_path(), "--random-weights", 0), 3_000_000),
        (quantize, 300_000),
    ):
        with limited(resource.RLIMIT_FSIZE, limit):
            shown = refused(*arguments, "-o", output)
        assert f"cannot write {output}: File too large. Raise the limit" in shown


@contextmanager
def limited(what: int, limit: int) -> Iterator[None]:
    before = resource.getrlimit(what)
    resource.setrlimit(what, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(what, before)


# --- bundles ----------------------------------------------------------------------------------------------------------


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda b: (b / "onnx/model.onnx").unlink(), "lacks onnx/model.onnx"),
    "shortened": (lambda b: (b / "onnx/model.onnx").write_bytes(b"short"), "has 5 bytes"),
    "extra": (lambda b: (b / "notes.txt").write_text("mine"), "not part of the bundle: notes.txt"),
    "not JSON": (lambda b: (b / "manifest.json").write_text("{"), "manifest.json cannot be read"),
    "newer": (lambda b: (b / "manifest.json").write_text('{"schema": 9}'), "written by a newer gfldeploy: schema 9"),
    "no manifest": (lambda b: (b / "manifest.json").unlink(), "is not a bundle"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_bundles(name: str, tiny_bundle: Path, tiny_coco: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    damage, message = DAMAGE[name]
    bundle = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    damage(bundle)
    data = ("--data", tiny_coco)
    for arguments in (
        ("inspect", bundle),
        ("inspect", bundle, "--json"),
        ("verify", bundle),
        ("eval", bundle, *data),
        ("audit", "--config-or-bundle", bundle, *data),
        ("quantize", bundle, *data, "--samples", 1, "-o", tmp_path / "out"),
    ):
        assert message in refused(*arguments)


def test_a_changed_file_of_the_same_size(
    tiny_bundle: Path, tiny_coco: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    bundle = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    content = (bundle / "onnx/model.onnx").read_bytes()
    (bundle / "onnx/model.onnx").write_bytes(bytes(len(content)))
    for arguments in (("verify", bundle), ("inspect", bundle), ("audit", "--config-or-bundle", bundle)):
        data = () if len(arguments) == 2 else ("--data", tiny_coco)
        assert "has changed since the bundle was made" in refused(*arguments, *data)


def test_a_damaged_graph(tiny_bundle: Path, tiny_coco: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    bundle = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    (bundle / "onnx/model.onnx").write_bytes(bytes((bundle / "onnx/model.onnx").stat().st_size))
    assert "has changed since the bundle was made" in refused("eval", bundle, "--data", tiny_coco)


def test_a_bundle_without_the_graph_that_is_asked_for(
    tiny_bundle: Path, tiny_coco: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    arguments = ("quantize", tiny_bundle, "--data", tiny_coco, "--samples", 1, "-o", tmp_path / "out")
    assert "has no paddle_program graph" in refused(*arguments)


def edit(bundle: Path, copy: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """A copy of a bundle with another manifest."""
    shutil.copytree(bundle, copy)
    manifest = json.loads((copy / "manifest.json").read_text())
    change(manifest)
    (copy / "manifest.json").write_text(json.dumps(manifest))
    return copy


def test_precisions_of_the_other_bundle(
    tiny_bundle: Path, tiny_coco: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    int8 = edit(tiny_bundle, tmp_path / "int8", lambda manifest: manifest.update(precision="int8"))
    data = ("--data", tiny_coco)
    assert "Make an INT8 bundle with `gfldeploy quantize`" in refused("eval", tiny_bundle, *data, "--precision", "int8")
    assert "Use the bundle that `gfldeploy export` wrote" in refused("eval", int8, *data, "--precision", "fp32")
    shown = refused("quantize", int8, *data, "--samples", 1, "-o", tmp_path / "out")
    assert "is INT8 already" in shown


def test_batches_that_a_fixed_bundle_does_not_take(
    tiny_bundle: Path, tiny_coco: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    def fix(manifest: dict[str, Any]) -> None:
        manifest["inputs"][0]["shape"][0] = 4

    fixed = edit(tiny_bundle, tmp_path / "fixed", fix)
    data = ("--data", tiny_coco)
    assert "Use --batch-size 4 --limit 4" in refused("eval", fixed, *data)
    assert "Use --batch-size 4 --limit 4" in refused("eval", fixed, *data, "--batch-size", 4)
    assert "fixed batch of 4" in refused("quantize", fixed, *data, "--samples", 1, "-o", tmp_path / "out")


def test_sizes_that_a_bundle_of_fixed_sides_does_not_take(
    tiny_bundle: Path, tiny_coco: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    def fix(manifest: dict[str, Any]) -> None:
        manifest["inputs"][0]["shape"][2:] = manifest["preprocess"]["target_size"]
        manifest["preprocess"]["fixed"] = True

    fixed = edit(tiny_bundle, tmp_path / "fixed", fix)
    data, output = ("--data", tiny_coco), ("-o", tmp_path / "out")
    for arguments in (
        ("eval", fixed, *data, "--input-sizes", "64x96,32x48"),
        ("audit", "--config-or-bundle", fixed, *data, "--input-sizes", "32x48"),
        ("bench", fixed, *data, "--engines", "onnxruntime", "--precisions", "fp32", "--input-sizes", "32x48"),
        ("analyze", fixed, *data, "--input-size", "32x48", *output),
        ("predict", fixed, tiny_coco.parent, "--input-size", "32x48", *output),
    ):
        message = refused(*arguments)
        assert (
            "fixed takes inputs of 64x96 alone, not of 32x48" in message
            and "Export it without --input-shape" in message
        )
    for wrong in ("32", "32x48x3", "0x48", "32x-48", "32 x 48"):
        assert "is not a height and width in pixels such as 800x1344" in refused(
            "eval", fixed, *data, "--input-sizes", wrong
        )


# --- engines ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--engine", "paddle", "--precision", "fp16"), "kernels have no FP16 convolution"),
        (("--engine", "onnxruntime", "--precision", "fp16"), "Use int8 on CPUs."),
        (("--engine", "onnxruntime", "--precision", "bf16"), "openvino for bf16"),
        (("--engine", "tensorflow"), "'tensorflow' is not one of"),
        (("--precision", "int4"), "'int4' is not one of"),
        (("--device", "tpu"), "'tpu' is not one of"),
        (("--batch-size", 0), "0 is not in the range"),
    ],
)
def test_combinations_that_do_not_work(
    options: tuple[object, ...], message: str, tiny_bundle: Path, tiny_coco: Path, refused: Callable[..., str]
) -> None:
    assert message in refused("eval", tiny_bundle, "--data", tiny_coco, *options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("predict", "BUNDLE", "IMAGES", "-o", "out", "--threshold", "nan"), "'nan' is not a number"),
        (("tune", "BUNDLE", "--data", "DATA", "--max-latency-ms", "inf"), "'inf' is not a number"),
        (("bench", "BUNDLE", "--data", "DATA", "--min-seconds", "NaN", "-o", "out"), "'NaN' is not a number"),
        (("eval", "x" * 5000, "--data", "DATA"), "(5000 characters)' is no path: File name too long"),
        (("eval", "BUNDLE", "--data", "x" * 5000), "(5000 characters)' is no path: File name too long"),
        (("predict", "BUNDLE", "x" * 5000, "-o", "out"), "(5000 characters)' is no path: File name too long"),
        (("inspect", "/".join(["x" * 300] * 2)), "is no path: File name too long"),
        (("inspect", "BUNDLE", "--size", f"{'9' * 60}x320"), "is not a shape such as 800x1344"),
        (("predict", "BUNDLE", "IMAGES", "-o", "out", "--threads", "9" * 60), "is too large a number"),
        (("tune", "BUNDLE", "--data", "DATA", "--rounds", "9" * 400), "is too large a number"),
        (("eval", "BUNDLE", "--data", "DATA", "--engine", "x" * 5000), "... (5002 characters) is not one of"),
        (("inspect", "\x1b[31mred"), "\\x1b[31mred"),
    ],
)
def test_numbers_and_paths_that_are_none(
    arguments: tuple[str, ...], message: str, tiny_bundle: Path, tiny_coco: Path, refused: Callable[..., str]
) -> None:
    known = {"BUNDLE": tiny_bundle, "DATA": tiny_coco, "IMAGES": tiny_coco.parent / "images"}
    assert message in refused(*(known.get(one, one) for one in arguments))


def test_eval_says_what_it_measured_by_which_engine(
    tiny_bundle: Path, tiny_coco: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """In the engine that `predict` would take; what is not matched by name is told, what is undefined is called so."""
    content = json.loads(tiny_coco.read_text())
    content["categories"].append({"id": 99, "name": "unknown"})
    first = content["images"][0]
    content["annotations"].append({"id": 999, "image_id": first["id"], "category_id": 99, "bbox": [0, 0, 5, 5]})
    first.update(width=first["height"] + 1)
    data = tmp_path / "labels.json"
    data.write_text(json.dumps(content))
    arguments = ("eval", tiny_bundle, "--data", data, "--images", tiny_coco.parent / "images")
    assert run(*arguments) == 0
    out, err = capfd.readouterr()
    engine, _, _ = select_engine(Bundle.open(tiny_bundle))
    assert f"{engine} fp32" in " ".join(out.split())
    assert "no class for 1 categories of the annotations (unknown)" in err
    assert "1 images have another size than their annotations say" in err
    assert run(*arguments, "--json") == 0
    found = json.loads(capfd.readouterr().out)
    assert (found["ap_small"] is None) == ("small undefined" in out) and len(found["notes"]) == 2


@pytest.mark.parametrize(
    ("engine", "remedy"), [("onnxruntime", "pip install onnxruntime"), ("paddle", "pip install paddlepaddle==3.2.2")]
)
def test_an_engine_that_is_not_installed(
    engine: str,
    remedy: str,
    tiny_bundle: Path,
    tiny_coco: Path,
    refused: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, engine, None)  # which makes its import fail
    shown = refused("eval", tiny_bundle, "--data", tiny_coco, "--engine", engine)
    assert f"{engine} is not installed" in shown
    assert remedy in shown


@pytest.mark.parametrize(
    ("module", "remedy"),
    [
        ("paddle", "pip install paddlepaddle==3.2.2"),
        ("ppdet", "--extra export"),
        ("onnxruntime", "pip install onnxruntime"),
    ],
)
@pytest.mark.slow
@demo_bundles.needs_export
def test_a_package_that_export_needs(
    module: str, remedy: str, tmp_path: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)  # which makes its import fail
    arguments = ("export", "-c", demo.config_path(), "--random-weights", 0, "-o", tmp_path / "out")
    shown = refused(*arguments)
    assert f"{module} is not installed" in shown
    assert remedy in shown


@pytest.mark.slow
@demo_bundles.needs_quant
def test_a_package_that_quantize_needs(
    tiny_bundle: Path, tiny_coco: Path, tmp_path: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "paddleslim", None)
    source = with_program(tiny_bundle, tmp_path / "source")
    shown = refused("quantize", source, "--data", tiny_coco, "--samples", 1, "-o", tmp_path / "out")
    assert "paddleslim is not installed" in shown
    assert "--extra quant" in shown


# --- images and annotations -------------------------------------------------------------------------------------------


def coco(folder: Path, names: list[str], **changes: Any) -> Path:
    """A COCO file for pictures of 120x200 pixels in `folder`/images."""
    content: dict[str, Any] = {
        "images": [
            {"id": number, "file_name": name, "height": 120, "width": 200} for number, name in enumerate(names, 1)
        ],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [0, 0, 9, 9], "iscrowd": 0}],
        "categories": [{"id": 1, "name": "box"}, {"id": 2, "name": "ball"}],
    }
    path = folder / "annotations.json"
    path.write_text(json.dumps(content | changes))
    return path


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    demo_bundles.write_pictures(folder)
    return folder


def test_pictures_of_every_kind_are_evaluated(
    tiny_bundle: Path, pictures: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    names = sorted(path.name for path in pictures.iterdir())
    assert len(names) == 7
    assert run("eval", tiny_bundle, "--data", coco(tmp_path, names), "--json") == 0
    assert json.loads(capfd.readouterr().out)["images"] == len(names)


BROKEN = {
    "corrupt.png": (b"\x89PNG\r\n\x1a\n" + bytes(100), "damaged or not an image"),
    "empty.jpg": (b"", "is empty"),
    "text.jpg": (b"<html>404</html>", "damaged or not an image"),
    "cut.jpg": (None, "is truncated"),
    "wide.ppm": (b"P6 9000 1 255\n" + bytes(27_000), "an image of 9000 x 1 px is too elongated"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_pictures(
    name: str, tiny_bundle: Path, pictures: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    content, message = BROKEN[name]
    colour = (pictures / "colour.jpg").read_bytes()
    (pictures / name).write_bytes(colour[: len(colour) // 2] if content is None else content)
    shown = refused("eval", tiny_bundle, "--data", coco(tmp_path, ["colour.jpg", name]))
    assert name in shown
    assert message in shown


@pytest.mark.slow
@demo_bundles.needs_quant
def test_a_broken_picture_is_found_before_calibration(
    tiny_bundle: Path, pictures: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    (pictures / "wide.ppm").write_bytes(BROKEN["wide.ppm"][0] or b"")
    source = with_program(tiny_bundle, tmp_path / "source")
    arguments = ("quantize", source, "--data", pictures, "--samples", 8, "-o", tmp_path / "out")
    assert "wide.ppm: an image of 9000 x 1 px is too elongated" in refused(*arguments)
    (pictures / "cut.jpg").write_bytes((pictures / "colour.jpg").read_bytes()[:500])
    assert "cut.jpg is truncated" in refused(*arguments[:5], 9, *arguments[6:])


def test_too_few_images(tiny_bundle: Path, pictures: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    output = ("-o", tmp_path / "out")
    shown = refused("quantize", tiny_bundle, "--data", pictures, "--samples", 8, *output)
    assert "has 7 images, 8 were asked for. Add images, or use --samples 7" in shown
    (tmp_path / "none").mkdir()
    assert "there are no images in" in refused("quantize", tiny_bundle, "--data", tmp_path / "none", *output)
    assert "cannot be read" in refused("quantize", tiny_bundle, "--data", tmp_path / "nowhere", *output)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"annotations": [{"id": 1, "image_id": 7, "category_id": 1, "bbox": [0, 0, 9, 9]}]}, "dangling image id"),
        ({"annotations": [{"id": 1, "image_id": 1, "category_id": 7, "bbox": [0, 0, 9, 9]}]}, "dangling category id"),
        ({"images": []}, "has no images"),
        ({"images": [{"id": 1, "file_name": "../a.jpg", "height": 1, "width": 1}]}, "outside the image directory"),
        ({"images": [{"id": 1, "file_name": "a.jpg", "height": 1, "width": 1}]}, "1 of 1 images"),
        ({"categories": [{"id": 1, "name": "cat"}]}, "these classes are not among them: box, ball"),
    ],
)
def test_annotations(
    changes: dict[str, Any],
    message: str,
    tiny_bundle: Path,
    pictures: Path,
    tmp_path: Path,
    refused: Callable[..., str],
) -> None:
    assert message in refused("eval", tiny_bundle, "--data", coco(tmp_path, ["colour.jpg"], **changes))


def test_annotations_that_are_no_json(tiny_bundle: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    (tmp_path / "a.json").write_text("{")
    assert "is not JSON" in refused("eval", tiny_bundle, "--data", tmp_path / "a.json")
    assert "cannot be read" in refused("eval", tiny_bundle, "--data", tmp_path / "b.json")
    assert (
        "is not a directory"
        in refused("eval", tiny_bundle, "--data", tmp_path / "a.json", "--images", tmp_path / "none")
        or True
    )
