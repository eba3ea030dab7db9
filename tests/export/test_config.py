"""PaddleDetection configs come from users: a typo must not pass, and nothing in the file may run."""

from __future__ import annotations

import importlib
import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gfldeploy.errors import ConfigError
from gfldeploy.export.config import DetectorConfig, build_model, load_detector_config

ZOO = Path(__file__).parents[2] / "configs" / "gfl"
# Trainable and frozen parameters, running statistics not counted.
ZOO_PARAMETERS = {
    "gfl_r18vd_1x_coco": 19_456_249,
    "gfl_r34vd_1x_coco": 29_571_833,
    "gfl_r50_fpn_1x_coco": 32_495_705,
    "gfl_r101vd_fpn_mstrain_2x_coco": 51_559_417,
    "gflv2_r50_fpn_1x_coco": 32_499_419,
    "gfl_slim_ld_r18vd_1x_coco": 19_456_249,
}


def write(folder: Path, text: str, name: str = "own.yml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def on_zoo(folder: Path, text: str, base: str = "gfl_r18vd_1x_coco") -> Path:
    """A user's config on top of a zoo config."""
    return write(folder, f"_BASE_: ['{ZOO / base}.yml']\n{text}\n")


def refusal(path: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        load_detector_config(path)
    message = str(caught.value)
    assert "\n" not in message
    assert caught.value.remedy
    return message


# --- files, before anything heavy is imported -------------------------------------------------------------------------


def test_missing_files(tmp_path: Path) -> None:
    assert "own.yml does not exist" in refusal(tmp_path / "own.yml")
    path = write(tmp_path, "_BASE_: [base.yml]\n")
    message = refusal(path)
    assert "base.yml does not exist" in message
    assert f"named by _BASE_ in {path}" in message
    (tmp_path / "folder.yml").mkdir()
    assert "cannot be read" in refusal(tmp_path / "folder.yml")


def test_base_in_a_circle(tmp_path: Path) -> None:
    write(tmp_path, "_BASE_: [second.yml]\n", "first.yml")
    write(tmp_path, "_BASE_: [./first.yml]\n", "second.yml")
    assert "first.yml -> second.yml -> first.yml" in refusal(tmp_path / "first.yml")


def test_base_must_be_a_list(tmp_path: Path) -> None:
    assert "_BASE_ must be a list" in refusal(write(tmp_path, "_BASE_: base.yml\n"))


def test_files_that_are_no_config(tmp_path: Path) -> None:
    assert "own.yml:3:" in refusal(write(tmp_path, "architecture: GFL\nGFL:\n  head: GFLHead: 3\n"))
    assert "not a mapping" in refusal(write(tmp_path, "- 1\n- 2\n"))
    assert "not a mapping" in refusal(write(tmp_path, "just text"))
    assert "is empty" in refusal(write(tmp_path, "# nothing\n"))
    assert "not a .yml" in refusal(write(tmp_path, "a: 1", "own.json"))
    (tmp_path / "own.yml").write_bytes(b"a: \xff\xfe")
    assert "not UTF-8" in refusal(tmp_path / "own.yml")


@pytest.mark.parametrize(
    ("value", "named"),
    [
        ("!!python/object/apply:os.mkdir ['{target}']", "!!python/object/apply:os.mkdir"),
        ("!!python/object/new:os.mkdir {{args: ['{target}']}}", "!!python/object/new:os.mkdir"),
        ("!!python/name:os.system", "!!python/name:os.system"),
        ("!!python/module:os", "!!python/module:os"),
        ("!<tag:yaml.org,2002:python/object/apply:os.mkdir> ['{target}']", "!!python/object/apply:os.mkdir"),
        ("!Callable {{full_type: os.mkdir, args: ['{target}']}}", "!Callable"),
        ("!<tag:example.org,2024:thing> {{}}", "unknown tag"),
    ],
)
@pytest.mark.parametrize("place", ["weights: {}\n", "TestReader:\n  sample_transforms:\n  - Decode: {}\n"])
def test_python_tags_are_refused_by_name(tmp_path: Path, value: str, named: str, place: str) -> None:
    target = tmp_path / "executed"
    write(tmp_path, "a: 1\n" + place.format(value.format(target=target)), "base.yml")
    message = refusal(write(tmp_path, "_BASE_: [base.yml]\n"))
    assert named in message
    assert "base.yml:" in message
    assert not target.exists()


# --- values -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def workspace(needs_ppdet: None) -> Any:
    """Importing ppdet takes seconds; every test from here on needs it."""
    load_detector_config(ZOO / "gfl_r18vd_1x_coco.yml")
    return importlib.import_module("ppdet.core.workspace")


@pytest.mark.slow
@pytest.mark.usefixtures("workspace")
class TestMistakes:
    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("ResNet: {depht: 50}", ("ResNet has no argument 'depht'", "Did you mean 'depth'?")),
            ("GFLHead: {fpn_strides: [8]}", ("GFLHead has no argument 'fpn_strides'", "'fpn_stride'")),
            ("GFLHead: {loss_qfl: {name: QualityFocalLoss}}", ("GFLHead.loss_qfl is the old name of loss_class", "Call it")),
            ("GFLHead: {conv_feat: {feat_inn: 64}}", ("FCOSFeat has no argument 'feat_inn'", "'feat_in'")),
            ("GFLHead: {nms: {keep_topk: 10}}", ("MultiClassNMS has no argument 'keep_topk'", "'keep_top_k'")),
            ("GFLHead: {nms: {name: MultiClasNMS}}", ("module 'MultiClasNMS' does not exist", "'MultiClassNMS'")),
            ("GFLHead: {loss_bbox: GIouLos}", ("GFLHead.loss_bbox: module 'GIouLos' does not exist", "'GIoULoss'")),
            ("GFLHead: {conv_feat: {name: null}}", ("GFLHead.conv_feat names no module",)),
            ("ResNett: {depth: 50}", ("unknown key 'ResNett'", "Did you mean 'ResNet'?")),
            ("resnet: {depth: 50}", ("unknown key 'resnet'", "Did you mean 'ResNet'?")),
            ("TestReeder: {batch_size: 1}", ("unknown key 'TestReeder'", "'TestReader'")),
            ("num_clases: 80", ("unknown key 'num_clases'", "'num_classes'")),
            ("pretrained_weights: x", ("unknown key 'pretrained_weights'", "'pretrain_weights'")),
            ("MyThing: {size: 3}", ("section MyThing names no module",)),
            ("ResNet: 50", ("section ResNet is not a mapping",)),
            ("FPN:", ("section FPN is empty",)),
            ("TestReader: {sample_transfroms: []}", ("'sample_transfroms'", "'sample_transforms'")),
            ("TestReader: {sample_transforms: [{Resise: {}}]}", ("transform 'Resise' does not exist", "'Resize'")),
            ("TestReader: {sample_transforms: [{Resize: {targetsize: 3}}]}", ("'targetsize'", "'target_size'")),
            ("TestReader: {sample_transforms: [Decode]}", ("must be a list of",)),
            ("TestDataset: !ImageFolder {anno_paht: x}", ("'anno_paht'", "'anno_path'")),
            ("TestDataset: !ImageFoldr {anno_path: x}", ("unknown tag !ImageFoldr", "!ImageFolder")),
            ("architecture: YOLOv3", ("architecture 'YOLOv3' is not supported", "Supported: GFL")),
            ("GFL: {head: FCOSHead}", ("head FCOSHead is not supported", "LDGFLHead")),
            ("GFL: {head: GLFHead}", ("module 'GLFHead' does not exist", "'GFLHead'")),
            ("GFL: {backbone: ResNet50}", ("GFL.backbone: module 'ResNet50' does not exist", "'ResNet'")),
            ("GFL: {neck: [FPN]}", ("GFL.neck names no module",)),
            ("num_classes: '80'", ("num_classes must be a positive whole number, not '80'",)),
            ("GFLHead: {reg_max: 0}", ("GFLHead.reg_max must be a positive",)),
            ("GFLHead: {fpn_stride: 8}", ("fpn_stride must be a list",)),
            ("GFLHead: {fpn_stride: [8, a]}", ("not 'a'",)),
            ("GFLHead: {nms: {name: MatrixNMS}}", ("nms is MatrixNMS, which is not supported",)),
            ("GFLHead: {nms: null}", ("nms is not set",)),
            ("GFLHead: {nms: {nms_threshold: 60}}", ("between 0 and 1, not 60",)),
            ("GFLHead: {nms: {keep_top_k: 0}}", ("keep_top_k must be a positive",)),
        ],
    )  # fmt: skip
    def test_is_one_line_with_a_remedy(self, tmp_path: Path, text: str, expected: tuple[str, ...]) -> None:
        path = on_zoo(tmp_path, text)
        message = refusal(path)
        assert all(part in message for part in expected), message
        assert str(path) in message

    def test_names_the_base_file_that_holds_it(self, tmp_path: Path) -> None:
        write(tmp_path, f"_BASE_: ['{ZOO}/gfl_r50_fpn_1x_coco.yml']\nResNet: {{depht: 18}}\n", "base.yml")
        message = refusal(write(tmp_path, "_BASE_: [base.yml]\nResNet: {depth: 34}\n"))
        assert str(tmp_path / "base.yml") in message

    def test_no_reader_and_no_architecture(self, tmp_path: Path) -> None:
        bases = f"_BASE_: ['{ZOO}/_base_/coco.yml', '{ZOO}/_base_/gfl_r50.yml']\n"
        assert "neither TestReader nor EvalReader" in refusal(write(tmp_path, bases))
        assert "no architecture" in refusal(ZOO / "_base_" / "coco.yml")

    def test_values_that_do_not_fit_together(self, tmp_path: Path) -> None:
        config = load_detector_config(on_zoo(tmp_path, "ResNet: {depth: 51}"))
        with pytest.raises(ConfigError, match="cannot build this model"):
            build_model(config)


@pytest.mark.slow
@pytest.mark.usefixtures("workspace")
def test_settings_of_real_configs_pass(tmp_path: Path) -> None:
    text = """
use_xpu: false
use_mlu: false
print_params: false
snapshot_epoch: 5
export: {post_process: true, nms: true, benchmark: false, fuse_conv_bn: false}
norm_type: sync_bn
use_ema: true
eval_size: &eval_size [640, 640]
my_note: hello
_anchor: {deep: {x: 1}}
ResNet: {lr_mult_list: [0.05, 0.05, 0.1, 0.15]}
TrainReader: {mosaic_epoch: 3, collate_batch: false}
EvalDataset: {name: COCODataSet, image_dir: val, anno_path: val.json, dataset_dir: nowhere}
TestReader: {inputs_def: {image_shape: [3, 640, 640]}, fuse_normalize: true}
MultiClassNMS: {nms_top_k: 500}
pretrain_weights: https://example.invalid/weights.pdparams
slim: Distill
slim_method: LD
"""
    config = load_detector_config(on_zoo(tmp_path, text))
    assert config.cfg["pretrain_weights"] is None
    assert config.cfg["my_note"] == "hello"
    assert config.nms["nms_top_k"] == 1000  # the head's own value is set last


@pytest.mark.slow
@pytest.mark.usefixtures("workspace")
def test_fields() -> None:
    config = load_detector_config(ZOO / "gfl_r50_fpn_1x_coco.yml")
    assert (config.name, config.head, config.num_classes, config.reg_max) == ("gfl_r50_fpn_1x_coco", "GFLHead", 80, 16)
    assert config.strides == (8, 16, 32, 64, 128)
    assert config.classes[:2] == ("person", "bicycle")
    assert config.classes[-1] == "toothbrush"
    assert [next(iter(step)) for step in config.reader["sample_transforms"]] == [
        "Decode",
        "Resize",
        "NormalizeImage",
        "Permute",
    ]
    assert config.reader["sample_transforms"][1]["Resize"] == {
        "target_size": [800, 1333],
        "keep_ratio": True,
        "interp": 1,
    }
    assert config.reader["batch_transforms"] == [{"PadBatch": {"pad_to_stride": 32}}]
    assert {key: config.nms[key] for key in ("score_threshold", "nms_threshold", "nms_top_k", "keep_top_k")} == {
        "score_threshold": 0.025,
        "nms_threshold": 0.6,
        "nms_top_k": 1000,
        "keep_top_k": 100,
    }
    assert [file.name for file in config.files] == [
        "coco.yml",
        "schedule_1x.yml",
        "reader_800.yml",
        "gfl_r50.yml",
        "gfl_r50_fpn_1x_coco.yml",
    ]


@pytest.mark.slow
@pytest.mark.usefixtures("workspace")
def test_eval_reader_stands_in(tmp_path: Path) -> None:
    bases = f"_BASE_: ['{ZOO}/_base_/coco.yml', '{ZOO}/_base_/gfl_r50.yml']\n"
    text = "EvalReader:\n  sample_transforms:\n  - Decode: {}\n  - Resize: {target_size: 320}\n"
    config = load_detector_config(write(tmp_path, bases + text))
    assert config.reader["sample_transforms"] == [{"Decode": {}}, {"Resize": {"target_size": 320}}]
    assert config.reader["batch_transforms"] == []


@pytest.mark.slow
@pytest.mark.usefixtures("workspace")
class TestClasses:
    def test_from_annotations_in_file_order(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "data").mkdir()
        categories = [{"id": 7, "name": "dog"}, {"id": 2, "name": "cat"}]
        (tmp_path / "data" / "val.json").write_text(json.dumps({"categories": categories}))
        text = "num_classes: 2\nTestDataset: !ImageFolder {dataset_dir: data, anno_path: val.json}"
        path = on_zoo(tmp_path, text)
        assert load_detector_config(path).classes == ("dog", "cat")  # beside the config
        monkeypatch.chdir(tmp_path)
        assert load_detector_config(path).classes == ("dog", "cat")  # from the working directory
        from ppdet.data.source.category import get_categories

        assert tuple(get_categories("COCO", "data/val.json")[1].values()) == ("dog", "cat")

    def test_from_a_label_list(self, tmp_path: Path) -> None:
        (tmp_path / "labels.txt").write_text("background\nred\ngreen\n\n")
        (tmp_path / "trainval.txt").write_text("images/1.jpg 1.xml\n")
        for dataset in (
            "TestDataset: !ImageFolder {anno_path: labels.txt}",
            "TestDataset: !VOCDataSet {anno_path: trainval.txt, label_list: labels.txt}",
        ):
            assert load_detector_config(on_zoo(tmp_path, f"num_classes: 2\n{dataset}")).classes == ("red", "green")

    def test_numbered_where_nothing_names_them(self, tmp_path: Path) -> None:
        assert load_detector_config(on_zoo(tmp_path, "num_classes: 3")).classes == ("class_0", "class_1", "class_2")

    def test_of_the_head_win_over_the_top_level(self, tmp_path: Path) -> None:
        assert load_detector_config(on_zoo(tmp_path, "GFLHead: {num_classes: 2}")).num_classes == 2

    def test_must_be_as_many_as_num_classes(self, tmp_path: Path) -> None:
        (tmp_path / "labels.txt").write_text("red\ngreen\n")
        message = refusal(on_zoo(tmp_path, "TestDataset: !ImageFolder {anno_path: labels.txt}"))
        assert "num_classes is 80" in message
        assert "names 2 classes" in message

    def test_damaged_annotations(self, tmp_path: Path) -> None:
        for content in ("{", "[]", "{}", '{"categories": [{"id": 1}]}'):
            (tmp_path / "val.json").write_text(content)
            message = refusal(on_zoo(tmp_path, "TestDataset: !ImageFolder {anno_path: val.json}"))
            assert "no list of COCO categories" in message


# --- building ---------------------------------------------------------------------------------------------------------


def shapes(model: Any) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def parameters(model: Any) -> int:
    return sum(int(parameter.size) for parameter in model.parameters())


@pytest.mark.slow
@pytest.mark.usefixtures("workspace")
def test_configs_do_not_leak_into_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """In ppdet's one dictionary, GFLv2's quality branch and 81 channels would stay in every model built after it."""

    def no_network(*_: object, **__: object) -> None:
        raise AssertionError("building a model must not open a connection")

    monkeypatch.setattr(socket.socket, "connect", no_network)
    order = ["gflv2_r50_fpn_1x_coco", "gfl_slim_ld_r18vd_1x_coco", "gfl_r50_fpn_1x_coco", "gfl_r18vd_1x_coco"]
    configs: dict[str, DetectorConfig] = {}
    for name in order:
        configs[name] = load_detector_config(ZOO / f"{name}.yml")
        model = build_model(configs[name])
        assert parameters(model) == ZOO_PARAMETERS[name], name
        assert not model.training
    # An earlier config still builds what it built before.
    v2 = build_model(configs[order[0]])
    assert parameters(v2) == ZOO_PARAMETERS[order[0]]
    assert v2.head.cls_out_channels == 81
    assert configs["gfl_r18vd_1x_coco"].cfg["GFLHead"].get("dgqp_module") is None


@pytest.mark.slow
def test_the_dictionary_of_ppdet_is_left_alone(workspace: Any) -> None:
    workspace.global_config["ResNet"]["depth"] = 152
    workspace.global_config["somebody"] = "else"
    try:
        config = load_detector_config(ZOO / "gfl_r18vd_1x_coco.yml")
        build_model(config)
        assert dict(workspace.global_config["ResNet"]) == {"depth": 152}
        assert workspace.global_config["somebody"] == "else"
        assert "architecture" not in workspace.global_config
        assert "somebody" not in config.cfg
    finally:
        del workspace.global_config["somebody"]
        workspace.global_config["ResNet"].clear()


# Every config in a process of its own, since ppdet keeps what it reads; forked, since importing it takes seconds.
FRESH = """
import json, os, sys
from ppdet.core.workspace import create, load_config
for path in sys.argv[1:]:
    if os.fork():
        os.wait()
        continue
    model = create(load_config(path).architecture)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    print("@" + json.dumps([path, shapes]), flush=True)
    os._exit(0)
"""


@pytest.fixture(scope="module")
def built_by_ppdet(needs_ppdet: None) -> dict[str, dict[str, list[int]]]:
    """The shapes of every config's parameters, by config."""
    paths = [str(ZOO / f"{name}.yml") for name in ZOO_PARAMETERS]
    done = subprocess.run(
        [sys.executable, "-c", FRESH, *paths], capture_output=True, text=True, check=True, timeout=300
    )
    found = [json.loads(line[1:]) for line in done.stdout.splitlines() if line.startswith("@")]
    return {Path(path).stem: shapes for path, shapes in found}


@pytest.mark.slow
@pytest.mark.usefixtures("workspace")
@pytest.mark.parametrize("name", ZOO_PARAMETERS)
def test_the_zoo_builds_as_ppdet_builds_it_in_a_fresh_process(
    name: str, built_by_ppdet: dict[str, dict[str, list[int]]]
) -> None:
    model = build_model(load_detector_config(ZOO / f"{name}.yml"))
    expected = built_by_ppdet[name]
    assert shapes(model) == {key: tuple(shape) for key, shape in expected.items()}
    assert parameters(model) == ZOO_PARAMETERS[name]


@pytest.mark.slow
def test_nothing_is_printed(needs_ppdet: None) -> None:
    code = (
        "import sys; from pathlib import Path; from gfldeploy.export.config import build_model, load_detector_config;"
        "build_model(load_detector_config(Path(sys.argv[1])))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, ZOO / "gfl_r18vd_1x_coco.yml"], capture_output=True, text=True, timeout=300
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_importing_the_module_is_cheap() -> None:
    code = "import sys, gfldeploy.export.config, gfldeploy.export.checkpoint; sys.exit('paddle' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
