"""PaddleDetection configs come from users: a typo must not pass, and nothing in the file may run."""

from __future__ import annotations

import importlib
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gfldeploy.errors import ConfigError
from gfldeploy.export.config import DetectorConfig, load_detector_config
from gfldeploy.export.model_builder import build_model
from gfldeploy.nms import NmsParams

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


def test_aliases_and_numbers_stay_small(tmp_path: Path) -> None:
    bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 10)}]\n" for level in range(1, 10)
    )
    merges = "m0: &m0 {a: 1, b: 2}\n" + "".join(
        f"m{level}: &m{level}\n  <<: [{', '.join([f'*m{level - 1}'] * 2)}]\n" for level in range(1, 40)
    )
    for text, problem in (
        (bomb + "architecture: *a9\n", "values, aliases written out"),
        (merges, "values, aliases written out"),
        ("a: &a [*a]\n", "an alias refers to the value that it is part of"),
        ("a: &a {<<: *a}\n", "an alias refers to the value that it is part of"),
        ("a: " + "[" * 3000 + "\n", "nested more than 64 levels deep"),
        ("".join(f"{' ' * depth}a:\n" for depth in range(100)), "nested more than 64 levels deep"),
        ("a: {" + ", ".join(f"k{index}: 1" for index in range(1100)) + "}\n", "a mapping of more than 1000 keys"),
        ("x: " + ":".join(["1"] * 200) + ":1.5\n", "a number of"),
        ("x: 0x" + "f" * 5000 + "\n", "a number of"),
        ("x: " + "9" * 5000 + "\n", "a number of"),
        ("x: !!bool foo\n", "'foo' cannot be read as bool"),
        ('x: !!int ""\n', "'' cannot be read as int"),
        ("x: !!timestamp foo\n", "unknown tag"),
        ("x: !!binary aGk=\n", "unknown tag"),
        ("x: !!set {a}\n", "unknown tag"),
        ("x: !!omap [a: 1]\n", "unknown tag"),
        ('x: "\\ud800"\n', "half a surrogate pair"),
        ('_BASE_: ["a\\0.yml"]\n', "NUL"),
        ("x: *nowhere\n", "undefined alias"),
        ("x: \x07\n", "not valid YAML"),
        ("#" * 300_000, "larger than 256 KiB"),
    ):
        assert problem in refusal(write(tmp_path, text)), text[:80]


def test_bases_are_files_and_each_is_read_once(tmp_path: Path) -> None:
    for index in range(30):
        write(tmp_path, f"_BASE_: [twice_{index + 1}.yml, twice_{index + 1}.yml]\n", f"twice_{index}.yml")
    write(tmp_path, "- 1\n", "twice_30.yml")  # which is reached, and refused, at once
    assert "twice_30.yml is not a mapping" in refusal(tmp_path / "twice_0.yml")
    for index in range(120):
        write(tmp_path, f"_BASE_: [deep_{index + 1}.yml]\n", f"deep_{index}.yml")
    assert "more than 100 files" in refusal(tmp_path / "deep_0.yml")
    many = "[" + ", ".join(["base.yml"] * 900) + "]"
    write(tmp_path, "a: [" + "1, " * 1000 + "1]\n", "base.yml")
    assert "merges the same files again and again" in refusal(write(tmp_path, f"_BASE_: {many}\n"))

    os.mkfifo(tmp_path / "fifo.yml")
    (tmp_path / "loop.yml").symlink_to("loop.yml")
    (tmp_path / "zero.yml").symlink_to("/dev/zero")
    for name, problem in (
        ("fifo.yml", "not a regular file"),
        ("zero.yml", "not a regular file"),
        ("loop.yml", "symbolic links"),
        ("x" * 5000 + ".yml", "cannot be read"),
        ("~nosuchuser/x.yml", "does not exist"),
    ):
        message = refusal(write(tmp_path, f"_BASE_: ['{name}']\n"))
        assert problem in message
        assert "named by _BASE_" in message
        assert len(message) < 1000
    assert "not a regular file" in refusal(tmp_path / "fifo.yml")


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
            ("GFLHead: {loss_qfl: {name: QualityFocalLoss}}", ("loss_qfl is the old name of loss_class",)),
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
            ("GFLHead: {nms: {score_threshold: 1e-3}}", ("between 0 and 1, not '1e-3'", "Write it as 0.001.")),
            ("GFLHead: {nms: {keep_top_k: 100.0}}", ("keep_top_k must be a positive", "Write it as 100.")),
            ("num_classes: '3'", ("num_classes must be a positive whole number, not '3'", "Write it as 3.")),
            ("GFLHead: {dgqp_module: {name: DGQPHead}}", ("module 'DGQPHead' does not exist", "'DGQP'")),
            ("GFLHead: {conv_feat: {name: GFLFeat}}", ("module 'GFLFeat' does not exist", "'FCOSFeat'")),
            ("GFLHead: {loss_ld: {name: LDLoss}}", ("'loss_ld', which is one of LDGFLHead", "set GFL's head to it")),
            ("TestDataset: {name: ImageFoldr}", ("dataset 'ImageFoldr' does not exist", "'ImageFolder'")),
            ("TestDataset: {name: ImageFolder, anno_path: [a.json]}", ("TestDataset.anno_path is ['a.json']",)),
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
        slim = "pretrain_weights: a.pdparams\nslim: QAT\nQAT: {quant_config: {weight_bits: 8}, print_model: true}\n"
        message = refusal(write(tmp_path, slim, "slim.yml"))
        assert "it configures 'QAT', and no detector. Pass the detector's own config" in message

    def test_values_that_do_not_fit_together(self, tmp_path: Path) -> None:
        for text, problem in (
            ("ResNet: {depth: 51}", r"cannot build this model \(ResNet\): KeyError: 51 at 'block_nums = ResNet_cfg"),
            ("ResNet: {num_stages: 9}", r"AssertionError at 'assert num_stages .* says of ResNet"),
            ("ResNet: {return_idx: [7]}", r"\(ResNet\): the maximum return index must smaller than num_stages"),
            (
                "GFL: {backbone: ConvNeXt}",
                r"\(FPN\): TypeError: unsupported operand .* at '.*stride.* Check what feeds FPN",
            ),
            ("FPN: {out_channel: 0}", "a layer of type Conv2D would have a parameter of shape"),
        ):
            config = load_detector_config(on_zoo(tmp_path, text))
            with pytest.raises(ConfigError, match=problem):
                build_model(config)


# Each as PaddleDetection's own modules evaluate strings: ViT its norm_layer, CustomCSPPAN its stage_fn and block_fn.
VIT = "GFL: {{backbone: VisionTransformer}}\nVisionTransformer: {{embed_dim: 24, depth: 2, num_heads: 2, {}}}"
PAN = "GFL: {{neck: CustomCSPPAN}}\nCustomCSPPAN: {{out_channels: [64, 64, 64], act: relu, {}}}"
RUN = "\"__import__('os').mkdir('{target}')\""


@pytest.mark.slow
@pytest.mark.usefixtures("workspace")
class TestHostileConfigs:
    @pytest.mark.parametrize(
        ("text", "named"),
        [
            (VIT.format(f"norm_layer: {RUN}"), "VisionTransformer.norm_layer is"),
            (PAN.format(f"stage_fn: {RUN}"), "CustomCSPPAN.stage_fn is"),
            (PAN.format(f"block_fn: [[{{a: {RUN}}}]]"), "CustomCSPPAN.block_fn.a is"),
            (PAN.format(f"{RUN}: 1"), "has no argument"),
            (VIT.format(f"{RUN}: 1"), "has the key"),  # it takes any keyword
            (f"norm_type: {RUN}", "norm_type is"),  # which sections share
            (f"GFLHead: {{conv_feat: {{norm_type: {RUN}}}}}", "GFLHead.conv_feat.norm_type is"),
            ("GFLHead: {conv_feat: {name: SwinTransformer, pretrained: evil.pdparams}}", "cannot be used as conv_feat"),
            ("GFLHead: {conv_feat: GFLHead}", "cannot be used as conv_feat"),
            ("GFLHead: {loss_class: PCBPyramid}", "cannot be used as loss_class"),
            ("GFLHead: {nms: {name: JDETracker}}", "nms is JDETracker"),
            ("GFL: {neck: GFL}", "GFL.neck: GFL cannot be used as neck"),
            ("GFL: {backbone: GFL}", "GFL.backbone: GFL cannot be used as backbone"),
            ("GFL: {neck: TrainReader}", "cannot be used as neck"),
            ("GFL: {neck: ResNet}", "cannot be used as neck"),
            ("GFLHead: !TrainReader {conv_feat: PCBPyramid}", "GFLHead is tagged !TrainReader"),
            ("GFLHead: {reg_max: 1000000000000}", "GFLHead.reg_max is 1000000000000"),
            ("num_classes: 1000000000", "num_classes is 1000000000"),
            ("ResNet: {return_idx: [1, 2, 99999]}", "ResNet.return_idx is 99999"),
            ("GFLHead: {prior_prob: .inf}", "GFLHead.prior_prob is inf"),
            ("GFLHead: {prior_prob: .nan}", "GFLHead.prior_prob is nan"),
            ("ResNet: {variant: '" + "d" * 5000 + "'}", "ResNet.variant is"),
            ("TestReader: {sample_transforms: [{Resize: {target_size: [1000000000, 3]}}]}", "is 1000000000"),
            ("architecture: [[1, 2, 3]]", "architecture [[1, 2, 3]] is not supported"),
        ],
    )  # fmt: skip
    def test_are_refused_by_name(self, tmp_path: Path, text: str, named: str) -> None:
        target = tmp_path / "executed"
        message = refusal(on_zoo(tmp_path, text.replace("{target}", str(target))))
        assert named in message
        assert len(message) < 1000
        assert not target.exists()

    @pytest.mark.parametrize(
        ("text", "named"),
        [
            (VIT.format("norm_layer: breakpoint"), "would run 'breakpoint'"),
            (VIT.format("norm_layer: nn.functional.common.paddle.load"), "would run 'nn.functional"),
            (PAN.format("stage_fn: exec, block_fn: exit"), "would run 'exec'"),
            (PAN.format("block_fn: print"), "would run 'print'"),
            ("FPN: {out_channel: 8192}", "the model has more than 400000000 parameters"),
            ("FPN: {extra_stage: 8192, out_channel: 1}", "the model has more than 6000 tensors"),
            ("ResNet: {depth: 51}", "cannot build this model"),
        ],
    )
    def test_build_nothing_but_layers_of_bounded_size(self, tmp_path: Path, text: str, named: str) -> None:
        config = load_detector_config(on_zoo(tmp_path, text))
        with pytest.raises(ConfigError, match=re.escape(named)) as caught:
            build_model(config)
        assert "\n" not in str(caught.value)
        # Nothing of that stays behind.
        assert "eval" not in vars(importlib.import_module("ppdet.modeling.necks.custom_pan"))
        import paddle

        assert paddle.load.__module__ == "paddle.framework.io"

    def test_memory_beside_parameters_is_bounded(self, tmp_path: Path) -> None:
        text = "GFL: {backbone: SwinTransformer}\nSwinTransformer: {window_size: 8000}"
        with pytest.raises(ConfigError, match="cannot build this model"):
            build_model(load_detector_config(on_zoo(tmp_path, text)))

    def test_nothing_is_loaded_at_any_depth(self, tmp_path: Path) -> None:
        (tmp_path / "evil.pdparams").write_bytes(b"cos\nabort\n.")
        names = [f"pretrained: {tmp_path}/evil.pdparams", "pretrained: https://example.invalid/x.pdparams"]
        for pretrained in names:
            text = VIT.format(f"out_indices: [0, 1], with_fpn: true, num_fpn_levels: 2, {pretrained}")
            model = build_model(load_detector_config(on_zoo(tmp_path, text)))
            assert type(model.backbone).__name__ == "VisionTransformer"

    def test_legitimate_values_still_work(self, tmp_path: Path) -> None:
        text = VIT.format("out_indices: [0, 1], with_fpn: true, num_fpn_levels: 2, norm_layer: nn.LayerNorm")
        model = build_model(load_detector_config(on_zoo(tmp_path, text)))
        assert type(model.backbone.blocks[0].norm2).__name__ == "LayerNorm"
        text = PAN.format("stage_fn: CSPStage, block_fn: BasicBlock, spp: true").replace("relu", "leaky_relu")
        model = build_model(load_detector_config(on_zoo(tmp_path, text)))
        assert type(model.neck.fpn_stages[0][0]).__name__ == "CSPStage"


@pytest.mark.slow
@pytest.mark.usefixtures("workspace")
class TestNotes:
    def test_a_missing_label_file(self, tmp_path: Path) -> None:
        config = load_detector_config(on_zoo(tmp_path, "num_classes: 2\nTestDataset: !ImageFolder {anno_path: a.json}"))
        assert config.classes == ("class_0", "class_1")
        (note,) = config.notes
        assert "TestDataset's anno_path a.json does not exist, so the names class_0 to class_1 are used" in note
        config = load_detector_config(on_zoo(tmp_path, "TestDataset: !ImageFolder {anno_path: a.json}"))
        assert "COCO's 80 class names are used" in config.notes[0]

    def test_cocos_own_names_are_no_replacement(self) -> None:
        assert load_detector_config(ZOO / "gfl_r50_fpn_1x_coco.yml").notes == ()

    def test_a_test_reader_that_differs(self, tmp_path: Path) -> None:
        text = """
TestReader:
  sample_transforms:
  - Decode: {}
  - Resize: {target_size: 640, keep_ratio: true, interp: 2}
  - NormalizeImage: {mean: [0.5, 0.456, 0.406], std: [0.229, 0.224, 0.225]}
  - Permute: {}
"""
        (note,) = load_detector_config(on_zoo(tmp_path, text)).notes
        assert "Resize's target_size is [640, 640], not [800, 1333]" in note
        assert "interp is 2, not 1" in note
        assert "NormalizeImage's mean is [0.5, 0.456, 0.406]" in note
        assert "tools/eval.py" in note
        assert "copy the transforms of EvalReader" in note

    def test_an_eval_reader_without_transforms(self, tmp_path: Path) -> None:
        text = "EvalReader: {sample_transforms: 5, batch_transforms: [a, {b: c}]}"
        (note,) = load_detector_config(on_zoo(tmp_path, text)).notes
        assert "TestReader, which is exported, differs from EvalReader" in note

    def test_readers_that_only_look_different(self, tmp_path: Path) -> None:
        text = """
EvalReader:
  sample_transforms:
  - Decode:
  - Resize: {keep_ratio: true, target_size: [800, 1333]}
  - NormalizeImage: {mean: [0.485, 0.456, 0.406], std: [0.229, 0.224, 0.225], norm_type: mean_std}
  - Permute:
  batch_transforms: [{PadBatch: {pad_to_stride: 32, pad_gt: false}}]
  batch_size: 4
"""
        assert load_detector_config(on_zoo(tmp_path, text)).notes == ()


@pytest.mark.slow
@pytest.mark.usefixtures("workspace")
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("GFLHead: {loss_qfl: {name: QualityFocalLoss}}", "Call it loss_class."),
        ("FPN: {num_chan: 256}", "Call it out_channel."),
        ("ResNet: {feature_maps: [3, 4, 5]}", "Write 'return_idx: [1, 2, 3]'"),
        ("GFL: {neck: PAN}", "It is called CSPPAN now"),
        ("GFLHead: {conv_feat: {name: LiteGFLFeat}}", "It is called PicoFeat now"),
        ("TestReader: {sample_transforms: [DecodeOp: {}]}", "It is called 'Decode' now."),
        ("TestReader: {sample_transforms: [ResizeImage: {}]}", "It is called 'Resize' now."),
        ("TestReader: {sample_transforms: [Permute: {to_bgr: false}]}", "Remove it: it is how images are prepared now"),
        ("TestReader: {sample_transforms: [Permute: {to_bgr: true}]}", "It takes: nothing."),
        ("GFLHead: {nms: {name: MatrixNMS}}", "gives other detections and another mAP than MatrixNMS"),
    ],
)
def test_old_names_have_a_remedy(tmp_path: Path, text: str, expected: str) -> None:
    assert expected in refusal(on_zoo(tmp_path, text))


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
    assert config.nms.nms_top_k == 1000  # the head's own value is set last


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
    assert config.nms == NmsParams(score_threshold=0.025, nms_threshold=0.6, nms_top_k=1000, keep_top_k=100)
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

    def test_from_a_label_list_of_any_editor(self, tmp_path: Path) -> None:
        for name, content in (
            ("bom.txt", "\ufeffred\r\ngreen\r\n"),
            ("list.names", "red\ngreen\n"),
            ("LIST.TXT", "red\rgreen"),
        ):
            (tmp_path / name).write_bytes(content.encode())
            path = on_zoo(tmp_path, f"num_classes: 2\nTestDataset: {{name: ImageFolder, anno_path: {name}}}")
            assert load_detector_config(path).classes == ("red", "green")
        (tmp_path / "odd.txt").write_text("dark\u2028red\nlight\x0cgreen\n")
        for dataset in ("anno_path: odd.txt", 'label_list: ["dark\\u2028red", "light\\fgreen"]'):
            path = on_zoo(tmp_path, f"num_classes: 2\nTestDataset: {{name: ImageFolder, {dataset}}}")
            assert load_detector_config(path).classes == ("dark\u2028red", "light\x0cgreen")

    def test_a_file_that_is_no_list_is_named(self, tmp_path: Path) -> None:
        (tmp_path / "classes.xlsx").write_bytes(b"PK")
        path = on_zoo(tmp_path, "num_classes: 2\nTestDataset: {name: ImageFolder, anno_path: classes.xlsx}")
        assert "anno_path classes.xlsx is neither .json nor .txt, so the names" in load_detector_config(path).notes[0]

    @pytest.mark.parametrize(
        ("metric", "count", "first", "said"),
        [("VOC", 20, "aeroplane", "VOC's 20 class names are"), ("WiderFace", 1, "face", "WIDERFACE's class name is")],
    )
    def test_of_the_metric_as_ppdet_has_them(
        self, tmp_path: Path, metric: str, count: int, first: str, said: str
    ) -> None:
        config = load_detector_config(on_zoo(tmp_path, f"metric: {metric}\nnum_classes: {count}\nTestDataset: {{}}"))
        assert config.classes[0] == first
        assert said in config.notes[0]

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
        "import sys; from pathlib import Path; from gfldeploy.export.config import load_detector_config;"
        "from gfldeploy.export.model_builder import build_model;"
        "build_model(load_detector_config(Path(sys.argv[1])))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, ZOO / "gfl_r18vd_1x_coco.yml"], capture_output=True, text=True, timeout=300
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_importing_the_module_is_cheap() -> None:
    code = "import sys, gfldeploy.export.config, gfldeploy.export.checkpoint; sys.exit('paddle' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
