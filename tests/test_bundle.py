"""A bundle says what it is; one that was changed, damaged or made up is refused in one line."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gfldeploy.bundle import LAYERS, MANIFEST, Bundle, Manifest, write_bundle
from gfldeploy.engines.registry import missing_graph
from gfldeploy.errors import BundleError
from gfldeploy.inspection import inspect
from gfldeploy.macs import count_work

ONNX = "onnx/model.onnx"
SCHEMA = Manifest.FORMAT.schema


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))


def refusal(directory: Path) -> str:
    with pytest.raises(BundleError) as caught:
        Bundle.open(directory).verify_files()
    message = str(caught.value)
    assert caught.value.remedy
    assert "\n" not in message
    assert str(directory) in message
    return message


def rewrite(directory: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the manifest as JSON."""
    manifest = json.loads((directory / MANIFEST).read_text())
    change(manifest)
    (directory / MANIFEST).write_text(json.dumps(manifest))


def rehash(directory: Path) -> None:
    """Let the manifest agree with the files again, as somebody who tampers with them would."""

    def change(manifest: dict[str, Any]) -> None:
        for name, record in manifest["files"].items():
            content = (directory / name).read_bytes()
            record |= {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}

    rewrite(directory, change)


def test_an_opened_bundle_stays_what_it_was(bundle: Path) -> None:
    opened = Bundle.open(bundle)
    digest = opened.digest
    rewrite(bundle, lambda manifest: manifest["provenance"].update(made="again"))
    assert opened.digest == opened.at_size((128, 192)).digest == digest
    assert Bundle.open(bundle).digest != digest
    shutil.rmtree(bundle)
    assert opened.digest == digest


def test_what_is_written_is_read_back(tiny_bundle: Path, tmp_path: Path) -> None:
    manifest = Bundle.open(tiny_bundle).manifest
    assert Manifest.from_dict(json.loads(json.dumps(manifest.to_dict()))) == manifest
    assert next(iter(manifest.to_dict().items())) == ("schema", SCHEMA) and set(manifest.files) == {ONNX}
    with write_bundle(tmp_path / "again") as (directory, manifests):
        shutil.copytree(tiny_bundle / "onnx", directory / "onnx")
        manifests.append(manifest)
    assert Bundle.open(tmp_path / "again").digest == Bundle.open(tiny_bundle).digest


def test_nothing_incomplete_is_published(tiny_bundle: Path, tmp_path: Path) -> None:
    manifest = Bundle.open(tiny_bundle).manifest
    with pytest.raises(BundleError), write_bundle(tmp_path / "out") as (_, manifests):
        manifests.append(manifest)  # which names a graph that is not there
    assert list(tmp_path.iterdir()) == []


# --- files ------------------------------------------------------------------------------------------------------------


def test_a_changed_file_of_the_same_size(bundle: Path) -> None:
    content = bytearray((bundle / ONNX).read_bytes())
    content[len(content) // 2] ^= 1
    (bundle / ONNX).write_bytes(content)
    Bundle.open(bundle)  # sizes only
    assert "has changed since the bundle was made" in refusal(bundle)


def test_a_shortened_file(bundle: Path) -> None:
    size = (bundle / ONNX).stat().st_size
    (bundle / ONNX).write_bytes((bundle / ONNX).read_bytes()[:-1])
    assert f"has {size - 1} bytes, {size} expected" in refusal(bundle)


def test_a_missing_file(bundle: Path) -> None:
    (bundle / ONNX).unlink()
    assert f"lacks {ONNX}" in refusal(bundle)


@pytest.mark.parametrize("name", ["notes.txt", "onnx/model.onnx.bak", ".hidden"])
def test_an_extra_file(bundle: Path, name: str) -> None:
    (bundle / name).write_text("mine")
    assert f"files that are not part of the bundle: {name}" in refusal(bundle)


def test_a_link_to_nothing(bundle: Path) -> None:
    (bundle / ONNX).unlink()
    (bundle / ONNX).symlink_to("nowhere")
    assert "is a link" in refusal(bundle)


def test_places_that_are_no_bundle(tmp_path: Path) -> None:
    assert "is not a directory" in refusal(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    assert "is not a directory" in refusal(tmp_path / "file")
    (tmp_path / "empty").mkdir()
    assert f"has no {MANIFEST}" in refusal(tmp_path / "empty")
    assert "File name too long" in refusal(tmp_path / ("x" * 5000))
    assert "is not a directory" in refusal(tmp_path / "a\0b")


# --- manifests --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b"null", b"[]", b'{"schema": "1"}'])
def test_what_is_no_manifest(bundle: Path, content: bytes) -> None:
    (bundle / MANIFEST).write_bytes(content)
    assert MANIFEST in refusal(bundle)


def test_a_newer_schema(bundle: Path) -> None:
    rewrite(bundle, lambda manifest: manifest.update(schema=SCHEMA + 1, novelty=1))
    message = refusal(bundle)
    assert f"a newer gfldeploy: schema {SCHEMA + 1}, this one reads schema 1 to {SCHEMA}" in message
    assert "Update gfldeploy" in message


def test_a_schema_that_there_never_was(bundle: Path) -> None:
    rewrite(bundle, lambda manifest: manifest.update(schema=0))
    message = refusal(bundle)
    assert "an older gfldeploy: schema 0" in message
    assert "Make it again with `gfldeploy export`" in message


@pytest.mark.parametrize(("schema", "absent"), [(1, ("candidates", "notes", "left_out")), (2, ("notes", "left_out"))])
def test_older_schemas_are_upgraded_on_reading(bundle: Path, schema: int, absent: tuple[str, ...]) -> None:
    expected = Bundle.open(bundle).manifest
    rewrite(bundle, lambda manifest: (manifest.update(schema=schema), *map(manifest.pop, absent)))
    assert Bundle.open(bundle).manifest == expected


def test_a_graph_that_was_left_out(bundle: Path) -> None:
    rewrite(bundle, lambda manifest: manifest.update(left_out={"paddle_program": "it cannot be traced"}))
    opened = Bundle.open(bundle)
    with pytest.raises(BundleError, match="has no paddle_program graph: it cannot be traced"):
        opened.graph("paddle_program")
    reason, _ = missing_graph(opened, "paddle", "int8", "cpu") or ("", "")
    assert reason.endswith("has no paddle_program graph: it cannot be traced")
    assert missing_graph(opened, "onnxruntime", "fp32", "cpu") is None


def test_unknown_and_missing_keys(bundle: Path) -> None:
    def change(manifest: dict[str, Any]) -> None:
        manifest["clases"] = manifest.pop("classes")

    rewrite(bundle, change)
    assert "unknown fields: clases" in refusal(bundle)
    rewrite(bundle, lambda manifest: manifest.pop("clases"))
    assert "lacks classes" in refusal(bundle)


@pytest.mark.parametrize("wrong", [None, True, 1.5, "text", [], {}, [None], ["a", 1], {"a": 1}, {"a": {}}])
@pytest.mark.parametrize("key", ["schema", *(key for key in Manifest.__dataclass_fields__ if key != "provenance")])
def test_wrong_types(bundle: Path, key: str, wrong: Any) -> None:
    if (key, wrong) == ("candidates", None):
        wrong = 0
    if (key, wrong) in (("name", "text"), ("left_out", {}), ("notes", []), ("notes", ["a", 1])):
        wrong = 3
    rewrite(bundle, lambda manifest: manifest.update({key: wrong}))
    assert MANIFEST in refusal(bundle)


@pytest.mark.parametrize(
    ("key", "wrong"),
    [
        ("provenance", []),
        ("precision", "int4"),
        ("schema", 0),
        ("classes", "ab"),
        ("classes", []),
        ("strides", [True]),
        ("graphs", {"tensorrt": {"model": ONNX, "params": None}}),
        ("graphs", {"onnx": {"model": 3, "params": None}}),
        ("graphs", {"onnx": {"model": ONNX, "params": None, "extra": 1}}),
        ("inputs", [{"name": "image", "dtype": "float32", "shape": "abcd"}]),
        ("inputs", [{"name": "image", "dtype": "float32", "shape": [-1, 3, None, None]}]),
        ("files", {ONNX: {"sha256": 1, "bytes": 1}}),
        ("files", {ONNX: {"sha256": "0", "bytes": "1"}}),
        ("nms", {"score_threshold": 0.1}),
        ("preprocess", {"target_size": [0, 0]}),
    ],
)
def test_wrong_values(bundle: Path, key: str, wrong: Any) -> None:
    rewrite(bundle, lambda manifest: manifest.update({key: wrong}))
    assert MANIFEST in refusal(bundle)


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "onnx/../../secret"])
def test_files_outside_the_bundle(bundle: Path, name: str) -> None:
    (bundle.parent / "secret").write_text("s")
    record = {"sha256": hashlib.sha256(b"s").hexdigest(), "bytes": 1}
    rewrite(bundle, lambda manifest: manifest["files"].update({name: record}))
    message = refusal(bundle)
    assert "names files outside the bundle" in message and message.endswith("Do not use this bundle.")


def test_a_graph_that_is_not_listed(bundle: Path) -> None:
    rewrite(bundle, lambda manifest: manifest["graphs"]["onnx"].update(model="../secret"))
    assert "names files outside the bundle" in refusal(bundle)


def test_a_graph_that_is_not_there(tiny_bundle: Path) -> None:
    with pytest.raises(BundleError, match=r"has no paddle graph \(it has: onnx\)"):
        Bundle.open(tiny_bundle).graph("paddle")


def variant(bundle: Path, height: int | None = None, width: int | None = None, **preprocess: Any) -> Bundle:
    """The bundle with other preprocessing, or with a fixed height and width."""
    opened = Bundle.open(bundle)
    image = replace(opened.manifest.inputs[0], shape=(None, 3, height, width))
    changed = replace(opened.manifest.preprocess, **preprocess)
    return replace(opened, manifest=replace(opened.manifest, inputs=(image,), preprocess=changed))


def test_at_another_size_only_the_images_are_resized_otherwise(tiny_bundle: Path) -> None:
    bundle = Bundle.open(tiny_bundle)
    smaller = bundle.at_size((48, 64))
    assert (smaller.digest, smaller.directory) == (bundle.digest, bundle.directory)
    assert smaller.manifest.preprocess == replace(bundle.manifest.preprocess, target_size=(48, 64))
    assert replace(smaller.manifest, preprocess=bundle.manifest.preprocess) == bundle.manifest
    # 40 x 80 px: the longer side becomes 64, the shorter 32.
    assert smaller.manifest.preprocess.input_size(40, 80) == (32, 64)
    smaller.verify_files()


def test_at_its_own_size_a_bundle_is_itself(tiny_bundle: Path) -> None:
    bundle = Bundle.open(tiny_bundle)
    assert bundle.at_size(None) is bundle is bundle.at_size((64, 96))
    assert bundle.at_size((96, 64)) is bundle, "only the shorter and the longer side count"
    for stretching in (variant(tiny_bundle, keep_ratio=False), variant(tiny_bundle, 64, 96, fixed=True)):
        assert stretching.at_size((64, 96)) is stretching
    assert variant(tiny_bundle, keep_ratio=False).at_size((96, 64)).manifest.preprocess.target_size == (96, 64)


@pytest.mark.parametrize(
    ("changes", "size", "message"),
    [
        (
            {"height": 64, "width": 96, "fixed": True},
            (32, 48),
            "takes inputs of 64x96 alone, not of 32x48.*--input-shape",
        ),
        ({"height": 64, "width": 96, "fixed": True}, (96, 64), "takes inputs of 64x96 alone"),
        ({"height": 64, "width": 96}, (32, 48), "takes inputs of 64x96 alone"),
        ({}, (64, 8193), "at 64x8193: target_size is .64, 8193.*No side may be longer than 8192 px"),
        (
            {"pad_stride": 0, "keep_ratio": False},
            (60, 100),
            "does not run at 60x100: its network takes multiples of 8 px, and images are not padded. "
            "Use --input-size 64x96, or export it with pad_to_stride 8",
        ),
        ({"pad_stride": 0}, (48, 64), "multiples of 8 px, and images are not padded. Export it with pad_to_stride 8"),
        ({"pad_stride": 4}, (48, 64), "images are padded to multiples of 4. Export it with pad_to_stride 8"),
    ],
)
def test_a_size_that_the_graphs_cannot_take(
    changes: dict[str, Any], size: tuple[int, int], message: str, tiny_bundle: Path
) -> None:
    with pytest.raises(BundleError, match=message):
        variant(tiny_bundle, **changes).at_size(size)


def test_images_that_are_stretched_fit_without_padding_at_multiples_of_the_stride(tiny_bundle: Path) -> None:
    stretching = variant(tiny_bundle, pad_stride=0, keep_ratio=False).at_size((40, 56))
    assert stretching.manifest.preprocess.input_size(1000, 10) == (40, 56)


def test_layers(tiny_bundle: Path, tmp_path: Path) -> None:
    layers = {"conv2d_1.w_0": "backbone.stem.conv", "conv2d_0.w_0": "head.gfl_head_cls"}
    with write_bundle(tmp_path / "layered") as (directory, manifests):
        shutil.copytree(tiny_bundle / "onnx", directory / "onnx")
        (directory / LAYERS).write_text(json.dumps(layers))
        manifests.append(Bundle.open(tiny_bundle).manifest)
    assert list(Bundle.open(tmp_path / "layered").layers().items()) == list(layers.items()), "in graph order"


def test_a_bundle_without_layers(tiny_bundle: Path) -> None:
    with pytest.raises(BundleError, match=rf"has no {LAYERS}.* Export the bundle again\."):
        Bundle.open(tiny_bundle).layers()


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[" * 100_000, b"[]", b"null", b'{"w": 1}', b'{"w": null}'])
def test_layers_that_cannot_be_read(bundle: Path, content: bytes) -> None:
    opened = Bundle.open(bundle)
    (bundle / LAYERS).write_bytes(content)
    with pytest.raises(BundleError, match=rf"{LAYERS}.* Export the bundle again\."):
        opened.layers()


# --- describing -------------------------------------------------------------------------------------------------------


def test_macs_by_hand(tiny_bundle: Path) -> None:
    # One 3x3 convolution from 3 to 6 channels, of stride 8.
    assert count_work(tiny_bundle / ONNX, [(64, 96)], (8,))[64, 96].macs == (64 // 8) * (96 // 8) * 6 * 3 * 3 * 3
    facts = inspect(tiny_bundle, size=(33, 64))
    assert facts["macs"] == {"gmac": 0.0, "at": "64x64"}, "padded as the preprocessing does"
    assert facts["parity"] is None
    assert facts["classes"] == ["box", "ball"]


@pytest.mark.parametrize("damage", [lambda content: b"", lambda content: content[:-200], lambda content: b"\xff" * 99])
def test_macs_of_a_damaged_graph(bundle: Path, damage: Callable[[bytes], bytes]) -> None:
    (bundle / ONNX).write_bytes(damage((bundle / ONNX).read_bytes()))
    rehash(bundle)
    with pytest.raises(BundleError, match=r"model\.onnx") as caught:
        inspect(bundle)
    assert caught.value.remedy


@pytest.mark.parametrize("content", ["{", "[]", ""])
def test_parity_that_is_no_json_object(bundle: Path, content: str) -> None:
    (bundle / "parity.json").write_text(content)
    rewrite(bundle, lambda manifest: manifest["files"].update({"parity.json": {}}))
    rehash(bundle)
    with pytest.raises(BundleError, match=r"parity\.json"):
        inspect(bundle)


# --- what is hostile --------------------------------------------------------------------------------------------------


HUGE = 10**18
HOSTILE: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "target size": (lambda one: one["preprocess"].update(target_size=[HUGE, HUGE]), "target_size"),
    "pad stride": (lambda one: one["preprocess"].update(pad_stride=10**9), "pad_stride"),
    "mean": (lambda one: one["preprocess"].update(mean=[1e300, 0, 0]), "mean"),
    "std": (lambda one: one["preprocess"].update(std=[1e-300, 1, 1]), "std"),
    "nms": (lambda one: one["nms"].update(keep_top_k=HUGE), "keep_top_k"),
    "one class for two channels": (lambda one: one.update(classes=["a"], score_channels=3), "1 classes do not fit 3"),
    "negative channels": (lambda one: one.update(score_channels=-5), "do not fit -5"),
    "no classes": (lambda one: one.update(classes=[]), "classes is"),
    "half a character": (lambda one: one.update(name="\ud800"), "name must be text"),
    "long text": (lambda one: one.update(notes=["x" * 10**6]), "notes[0] must be text"),
    "zero stride": (lambda one: one.update(strides=[0]), "strides is [0]"),
    "huge stride": (lambda one: one.update(strides=[HUGE]), "strides is"),
    "many strides": (lambda one: one.update(strides=[8] * 1000), "strides is"),
    "reg_max": (lambda one: one.update(reg_max=HUGE), "reg_max is"),
    "parameters": (lambda one: one.update(parameters=-1), "parameters is"),
    "candidates": (lambda one: one.update(candidates=HUGE), "candidates is"),
    "short input": (lambda one: one["inputs"][0].update(shape=[7]), "the image's shape is [7]"),
    "huge input": (lambda one: one["inputs"][0].update(shape=[1, 3, 10**6, 10**6]), "the image's shape"),
    "huge batch": (lambda one: one["inputs"][0].update(shape=[10**6, 3, None, None]), "the image's shape"),
    "two inputs": (lambda one: one["inputs"].append(one["inputs"][0]), "inputs is"),
    "no boxes": (lambda one: one["outputs"].pop(), "the output boxes is missing"),
    "boxes of five numbers": (lambda one: one["outputs"][1].update(shape=[None, None, 5]), "the output boxes"),
    "other scores": (lambda one: one["outputs"][0].update(shape=[None, None, 7]), "the output scores"),
    "unknown output": (lambda one: one["outputs"].append({**one["outputs"][0], "name": "x"}), "unknown output: 'x'"),
    "parent directory": (lambda one: one["files"].update({"../x": one["files"][ONNX]}), "outside the bundle"),
    "absolute path": (lambda one: one["files"].update({"/etc/passwd": one["files"][ONNX]}), "outside the bundle"),
    "NUL in a path": (lambda one: one["files"].update({"a\0b": one["files"][ONNX]}), "outside the bundle"),
    "digest": (lambda one: one["files"][ONNX].update(sha256="x"), "sha256 is"),
    "size": (lambda one: one["files"][ONNX].update(bytes=-1), "bytes must be 0 or more"),
    "deep": (lambda one: one.update(provenance=json.loads('{"a":' * 900 + "1" + "}" * 900)), "nested too deeply"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_manifests(name: str, bundle: Path) -> None:
    change, message = HOSTILE[name]
    rewrite(bundle, change)
    assert message in refusal(bundle)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"schema": ' + "9" * 400 + "}", "400 digits"),
        ('{"schema": NaN}', "NaN is no number"),
        ('{"schema": 1e999}', "too large a number"),
        ("[" * 100_000, "nested too deeply"),
        ('{"schema": 3, "x": "\xff"}', "cannot be read"),
    ],
)
def test_manifests_that_are_hardly_json(text: str, message: str, bundle: Path) -> None:
    (bundle / MANIFEST).write_bytes(text.encode("latin-1"))
    assert message in refusal(bundle)


@pytest.mark.parametrize("kind", ["file", "folder", "manifest", "outside"])
def test_links_in_a_bundle(kind: str, bundle: Path, tmp_path: Path) -> None:
    place = {"file": ONNX, "folder": "onnx", "manifest": MANIFEST, "outside": "more"}[kind]
    if kind != "outside":
        (bundle / place).rename(tmp_path / "moved")
    (bundle / place).symlink_to(tmp_path / "moved" if kind != "outside" else "/etc")
    assert f"{bundle / place} is a link" in refusal(bundle)


def test_the_bundle_itself_may_be_a_link(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(bundle)
    assert Bundle.open(tmp_path / "link").name == "tiny"


@pytest.mark.posix
@pytest.mark.parametrize("place", ["onnx/pipe", ONNX, MANIFEST])
def test_a_pipe_in_a_bundle_is_not_waited_for(place: str, bundle: Path) -> None:
    (bundle / place).unlink(missing_ok=True)
    os.mkfifo(bundle / place)
    assert "is no regular file" in refusal(bundle)


def test_a_bundle_of_too_many_files(bundle: Path) -> None:
    for index in range(200):
        (bundle / str(index)).touch()
    assert "over 100 files" in refusal(bundle)


RECORDS: dict[str, tuple[str, str, str]] = {
    "comparison": ("parity.json", '{"comparisons":[{}]}', "comparisons[0] must be an object with graph, not {}"),
    "engines": ("parity.json", '{"engines":[1]}', "engines must be an object, not [1]"),
    "number": (
        "parity.json",
        '{"engines":{"e":{"score_difference":"1"}}}',
        "score_difference must be a finite number, not '1'",
    ),
    "size": (
        "parity.json",
        '{"sizes":[{"size":[256],"problem":null}]}',
        "sizes[0].size must be a list of 2, not [256]",
    ),
    "verdict": ("parity.json", '{"sizes":[{"size":[256,384]}]}', "sizes[0] must be an object with problem, not {'si"),
    "boolean": ("parity.json", '{"tolerance":{"score":true}}', "tolerance.score must be a finite number, not True"),
    "list": ("parity.json", "[]", "it must be an object, not []"),
    "groups": ("sensitivity.json", '{"groups":[{"name":1}]}', "groups[0].name must be of type str, not 1"),
    "layers": ("layers.json", '{"w":1}', "w must be of type str, not 1"),
    "calibration": ("calibration.json", "{}", "it must be an object with algorithm"),
    "infinite": ("parity.json", '{"tolerance":{"score":1e999}}', "too large a number"),
    "deep": ("parity.json", '{"x":' + "[" * 500 + "]" * 500 + "}", "nested too deeply"),
}


@pytest.mark.parametrize("name", RECORDS)
def test_hostile_records(name: str, bundle: Path) -> None:
    file, text, message = RECORDS[name]
    (bundle / file).write_text(text)
    rewrite(bundle, lambda manifest: manifest["files"].update({file: {"sha256": "0" * 64, "bytes": len(text)}}))
    assert message in refusal(bundle)


def test_a_graph_with_other_operators_is_refused(bundle: Path) -> None:
    import onnx

    model = onnx.load(str(bundle / ONNX))
    model.graph.node.append(onnx.helper.make_node("Save", ["image"], ["x"], domain="evil"))
    onnx.save(model, str(bundle / ONNX))
    rehash(bundle)
    assert "is refused: it uses an operator of the domain 'evil'" in refusal(bundle)
