"""Which convolutions belong together, and how they are named."""

from __future__ import annotations

import pytest

from gfldeploy.errors import DataError
from gfldeploy.quant.calibration import ConvUse
from gfldeploy.quant.groups import ConvGroup, groups, match

# As ResNet, ppdet's FPN and a GFLv2 head name their layers; "w9" has none.
LAYERS = {
    "w0": "backbone.conv1.conv1_1.conv",
    "w1": "backbone.res2.res2a.branch2a.conv",
    "w2": "backbone.res2.res2b.branch2a.conv",
    "w3": "neck.fpn_inner_res3_sum_lateral",
    "w4": "head.conv_feat.fcos_head_cls_tower_conv_0.conv",
    "w5": "head.conv_feat.fcos_head_reg_tower_conv_0.conv",
    "w6": "head.conv_feat.fcos_head_cls_tower_conv_10.conv",
    "w7": "head.gfl_head_cls",
    "w8": "head.gfl_head_reg",
    "w10": "head.dgqp_module.reg_conv1",
}
SHARED = ("w4", "w5", "w6", "w7", "w8", "w10")
USES = tuple(
    ConvUse(weight, use)
    for weight in ("w0", "w1", "w2", "w3", "w9", *SHARED)
    for use in range(3 if weight in SHARED else 1)
)


def of(*weights: str) -> tuple[ConvUse, ...]:
    return tuple(use for weight in weights for use in USES if use.weight == weight)


def test_groups_are_parts_in_graph_order() -> None:
    assert groups(LAYERS, USES) == (
        ConvGroup("backbone.conv1", of("w0")),
        ConvGroup("backbone.res2", of("w1", "w2")),
        ConvGroup("neck.fpn_inner_res3_sum_lateral", of("w3")),
        ConvGroup("w9", of("w9")),
        ConvGroup("head.conv_feat.fcos_head_cls_tower", of("w4", "w6")),
        ConvGroup("head.conv_feat.fcos_head_reg_tower", of("w5")),
        *(ConvGroup(f"head.gfl_head_cls[{level}]", (ConvUse("w7", level),)) for level in range(3)),
        *(ConvGroup(f"head.gfl_head_reg[{level}]", (ConvUse("w8", level),)) for level in range(3)),
        ConvGroup("head.dgqp_module", of("w10")),
    )


def test_what_is_used_once_has_no_levels() -> None:
    assert groups({"w": "head.out"}, [ConvUse("w", 0)]) == (ConvGroup("head.out", (ConvUse("w", 0),)),)
    assert groups({"w": "neck.out"}, [ConvUse("w", 0), ConvUse("w", 1)])[0].name == "neck.out"
    assert groups({"w": "head.conv_feat.cls.3.conv"}, [ConvUse("w", 0)])[0].name == "head.conv_feat.cls"
    assert groups({"w": "head.conv_feat.3.conv"}, [ConvUse("w", 0)])[0].name == "head.conv_feat.3"
    assert groups(LAYERS, []) == ()


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        ([], ()),
        (["backbone.res2"], of("w1", "w2")),
        (["backbone.*"], of("w0", "w1", "w2")),
        (["*.res2b.*"], of("w2")),
        (["head.gfl_head_reg"], of("w8")),
        (["head.gfl_head_reg[1]"], (ConvUse("w8", 1),)),
        (["head.gfl_head_*[0]"], (ConvUse("w7", 0), ConvUse("w8", 0))),
        (["*_cls_tower"], of("w4", "w6")),
        (["*_tower_conv_0.conv"], of("w4", "w5")),
        (["backbone.conv?", "neck.*"], of("w0", "w3")),
        (["w9"], of("w9")),
        (["*"], USES),
    ],
)
def test_patterns(patterns: list[str], expected: tuple[ConvUse, ...]) -> None:
    assert match(LAYERS, USES, patterns) == frozenset(expected)


@pytest.mark.parametrize("pattern", ["", "backbone", "head.gfl_head_reg[3]", "head.gfl_head_[cr]*", "Backbone.*"])
def test_a_pattern_that_matches_nothing(pattern: str) -> None:
    with pytest.raises(DataError, match="no layer and no group is called") as caught:
        match(LAYERS, USES, ["backbone.*", pattern])
    assert pattern in caught.value.problem
    remedy = caught.value.remedy or ""
    assert "backbone.res2, neck.fpn_inner_res3_sum_lateral" in remedy
    assert remedy.count("head.gfl_head_reg") == 1, "one name for all levels"
