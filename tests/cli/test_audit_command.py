"""`gfldeploy audit` on real files: what it says, and what it leaves out or refuses."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import demo_bundles
import numpy as np
import pytest

from gfldeploy.bundle import Bundle, Graph, GraphName, write_bundle
from gfldeploy.cli import main
from gfldeploy.images.preprocess import Preprocess

# What the tiny bundle makes of 48x80 (of 80x48): resized to 58x96, padded to 64x96.
LANDSCAPE, PORTRAIT = (64, 96), (96, 64)
CONVOLUTION = 6 * 27  # MACs of the tiny bundle for each cell of 8x8 pixels


def picture(folder: Path, name: str, height: int, width: int) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / name
    assert cv2.imwrite(str(path), np.zeros((height, width, 3), np.uint8))
    return path


def bundle_with(tiny_bundle: Path, target: Path, preprocess: Preprocess, batch: int | None = None) -> Path:
    """The tiny bundle with another preprocessing, and for one batch size alone if wanted."""
    source = Bundle.open(tiny_bundle).manifest
    shape = (batch, *source.inputs[0].shape[1:])
    with write_bundle(target) as (directory, manifests):
        shutil.copytree(tiny_bundle / "onnx", directory / "onnx")
        inputs = (replace(source.inputs[0], shape=shape),)
        graphs: dict[GraphName, Graph] = {"onnx": Graph("onnx/model.onnx")}
        manifests.append(replace(source, graphs=graphs, files={}, preprocess=preprocess, inputs=inputs))
    return target


@pytest.fixture
def audit(capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[str, str]]:
    """Run the command, which must succeed, and return stdout and stderr."""

    def run(*arguments: object) -> tuple[str, str]:
        with pytest.raises(SystemExit) as stopped:
            main(["audit", *map(str, arguments)])
        out, err = capfd.readouterr()
        assert stopped.value.code == 0, err
        return out, err

    return run


@pytest.fixture
def rows(audit: Callable[..., tuple[str, str]]) -> Callable[..., tuple[dict[str, Any], dict[tuple[int, str], Any]]]:
    """The JSON, and its rows by batch size and order."""

    def run(*arguments: object) -> tuple[dict[str, Any], dict[tuple[int, str], Any]]:
        result = json.loads(audit(*arguments, "--json")[0])
        return result, {(row["batch_size"], row["order"]): row for row in result["rows"]}

    return run


@pytest.fixture
def refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run the command, which must be refused, and return the line; nothing below `tmp_path` may have changed."""

    def run(*arguments: object) -> str:
        before = demo_bundles.snapshot(tmp_path)
        with pytest.raises(SystemExit) as stopped:
            main(["audit", *map(str, arguments)])
        message = demo_bundles.refusal_in(stopped.value.code, *capfd.readouterr())
        assert demo_bundles.snapshot(tmp_path) == before
        return message

    return run


def test_the_example_of_both_orientations(
    tiny_bundle: Path, tmp_path: Path, audit: Callable[..., tuple[str, str]], rows: Callable[..., Any]
) -> None:
    picture(tmp_path / "data", "a.jpg", 800, 1216)
    picture(tmp_path / "data", "b.jpg", 1216, 800)
    bundle = bundle_with(tiny_bundle, tmp_path / "bundle", Preprocess(target_size=(800, 1216), pad_stride=32))
    arguments = ("--data", tmp_path / "data", "--config-or-bundle", bundle)
    result, by_key = rows(*arguments, "--batch-sizes", "1,2")
    listed, bucketed = by_key[2, "listed"], by_key[2, "bucketed"]
    assert listed["largest"] == [2, 1216, 1216]
    assert (listed["padding"], listed["mixed"], bucketed["padding"], bucketed["mixed"]) == (1.52, 1, 1.0, 0)
    assert result["macs"] == bucketed["macs"] == CONVOLUTION * 100 * 152
    assert listed["macs"] == 1.52 * result["macs"]
    assert (result["sizes"], result["rounding"], result["limited"]) == (2, 1.0, {"1": 1.52, "2": 1.0})
    assert result["left_out"] == []
    assert listed["activation_bytes"] > listed["input_bytes"] == 2 * 3 * 1216 * 1216 * 4

    out, err = audit(*arguments, "--batch-sizes", "1,2")
    shown = " ".join(out.split())
    assert err == ""
    assert "1 any 1.000x" in shown and "2 listed 1.520x" in shown
    assert (
        "At batch 2, listed, an image costs 1.52x its pixels (0.00374 GMAC instead of 0.00246): "
        "100% of the batches hold portrait and landscape images. Bucketed: 1.00x."
    ) in out
    assert "2 images make 2 input sizes at batch 1; rounding up to the stride makes them 1.000x" in out
    assert "Bucketed with at most this number of sizes: 1: 1.52x, 2: 1.00x." in out


def test_other_input_sizes(
    tiny_bundle: Path, tmp_path: Path, audit: Callable[..., tuple[str, str]], rows: Callable[..., Any]
) -> None:
    picture(tmp_path / "data", "a.jpg", 800, 1216)
    picture(tmp_path / "data", "b.jpg", 1216, 800)
    bundle = bundle_with(tiny_bundle, tmp_path / "bundle", Preprocess(target_size=(800, 1216), pad_stride=32))
    arguments = ("--data", tmp_path / "data", "--config-or-bundle", bundle, "--batch-sizes", "2")
    result, _ = rows(*arguments, "--input-sizes", "400x608,800x1216")
    half, same = result["at_sizes"]
    # 400 x 608 px, whose shorter side is padded to 416.
    assert (half["input_size"], half["pixels"], half["macs"]) == ([400, 608], 416 * 608, CONVOLUTION * 52 * 76)
    assert [row["padding"] for row in half["rows"] if row["order"] == "listed"] == [608 / 416]
    assert {**same, "input_size": None} == {**result, "at_sizes": [], "answer": same["answer"]}
    out, _ = audit(*arguments, "--input-sizes", "400x608")
    assert (
        "At 400x608 an image has 0.26x the pixels (0.00064 GMAC instead of 0.00246); at batch 2, listed, 1.46x" in out
    )


def test_annotations(
    tiny_bundle: Path, tiny_coco: Path, tmp_path: Path, audit: Callable[..., tuple[str, str]], rows: Callable[..., Any]
) -> None:
    result, by_key = rows("--data", tiny_coco, "--config-or-bundle", tiny_bundle, "--batch-sizes", "6")
    assert (result["images"], by_key[6, "listed"]["largest"]) == (6, [6, 96, 96])
    annotations = json.loads(tiny_coco.read_text())
    annotations["images"][0]["height"] += 1
    path = tmp_path / "lies.json"
    path.write_text(json.dumps(annotations))
    arguments = ("--data", path, "--images", tiny_coco.parent / "images", "--config-or-bundle", tiny_bundle)
    assert rows(*arguments, "--batch-sizes", "6")[1] == by_key, "the sizes of the files count"
    assert (
        "1 images have another size than their annotations say (1.jpg); the sizes of the files count"
        in (audit(*arguments)[1])
    )


def test_what_cannot_be_used_is_named_and_left_out(
    tiny_bundle: Path, tmp_path: Path, audit: Callable[..., tuple[str, str]], rows: Callable[..., Any]
) -> None:
    data = tmp_path / "data"
    first = picture(data, "0.jpg", 48, 80)
    for number in range(1, 300):
        shutil.copy(first, data / f"{number}.jpg")
    (data / "150.jpg").write_bytes(first.read_bytes()[:60])
    picture(data, "narrow.png", 1, 10_000)
    picture(data, "small.png", 3, 5)  # smaller than the stride: enlarged like any other
    arguments = ("--data", data, "--config-or-bundle", tiny_bundle)
    out, err = audit(*arguments)
    assert "2 of 302 images cannot be used and are left out:" in err
    assert "150.jpg is truncated" in err and "narrow.png: an image of 10000 x 1 px is too elongated" in err
    assert "300 images make" in out
    result, _ = rows(*arguments)
    assert [Path(one["path"]).name for one in result["left_out"]] == ["150.jpg", "narrow.png"]
    for number in range(4):
        (data / f"{number}.jpg").write_bytes(b"")
    assert "and 3 more (--json names all)" in audit(*arguments)[1]


def test_few_buckets(tiny_bundle: Path, tiny_coco: Path, rows: Callable[..., Any]) -> None:
    arguments = ("--data", tiny_coco, "--config-or-bundle", tiny_bundle, "--batch-sizes", "2")
    assert rows(*arguments)[1][2, "bucketed"]["padding"] == 1.0
    _, by_key = rows(*arguments, "--buckets", "1")
    assert by_key[2, "bucketed"]["largest"] == [2, 96, 96]


def test_a_fixed_network(
    tiny_bundle: Path,
    tiny_coco: Path,
    tmp_path: Path,
    audit: Callable[..., tuple[str, str]],
    refused: Callable[..., str],
) -> None:
    preprocess = Preprocess(target_size=(64, 96), pad_stride=32, fixed=True)
    bundle = bundle_with(tiny_bundle, tmp_path / "bundle", preprocess, batch=4)
    arguments = ("--data", tiny_coco, "--config-or-bundle", bundle)
    shown = " ".join(audit(*arguments)[0].split())
    assert "4 any 1.000x" in shown and "8 any" not in shown
    assert "6 images make 1 input size at batch 1; bars around the image makes them 1." in shown
    assert "takes batches of 4 only. Use --batch-sizes 4." in refused(*arguments, "--batch-sizes", "4,8")


@pytest.mark.slow
@demo_bundles.needs_export
def test_a_config(tmp_path: Path, audit: Callable[..., tuple[str, str]], rows: Callable[..., Any]) -> None:
    config = Path(__file__).parents[2] / "configs" / "gfl" / "gfl_r50_fpn_1x_coco.yml"
    picture(tmp_path / "data", "a.jpg", 800, 1216)
    picture(tmp_path / "data", "b.jpg", 1216, 800)
    arguments = ("--data", tmp_path / "data", "--config-or-bundle", config, "--batch-sizes", "2")
    result, by_key = rows(*arguments)
    assert by_key[2, "listed"]["padding"] == 1.52
    assert result["macs"] is by_key[2, "listed"]["activation_bytes"] is None
    out, _ = audit(*arguments)
    assert "GMAC" not in out and "For MACs and the memory of activations, give a bundle" in out


def test_what_is_refused(tiny_bundle: Path, tiny_coco: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    source = ("--config-or-bundle", tiny_bundle)
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.jpg").write_bytes(b"no picture")
    (tmp_path / "text.txt").write_text("text")
    assert "there are no images in" in refused("--data", tmp_path / "empty", *source)
    assert "none of 1 images can be used: " in refused("--data", tmp_path / "bad", *source)
    assert "cannot be read" in refused("--data", tmp_path / "absent", *source)
    assert "is not JSON" in refused("--data", tmp_path / "text.txt", *source)
    assert "--images goes with annotations" in refused("--data", tiny_coco.parent, "--images", tmp_path, *source)
    data = ("--data", tiny_coco, "--config-or-bundle")
    assert "is not a bundle" in refused(*data, tmp_path / "empty")
    assert "neither a bundle nor a config" in refused(*data, tmp_path / "text.txt")
    assert "neither a bundle nor a config" in refused(*data, tmp_path / "absent")
    assert "absent.yml does not exist" in refused(*data, tmp_path / "absent.yml")
    assert "is not a whole number from 1" in refused("--data", tiny_coco, *source, "--batch-sizes", "0")
    assert "0 is not in the range" in refused("--data", tiny_coco, *source, "--buckets", "0")


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_an_unreadable_folder(tiny_bundle: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    folder = tmp_path / "locked"
    folder.mkdir(mode=0)
    try:
        assert "cannot be read" in refused("--data", folder, "--config-or-bundle", tiny_bundle)
    finally:
        folder.chmod(0o700)
