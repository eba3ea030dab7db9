"""oneDNN's log, and what it says beside a Paddle program."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from gfldeploy.bundle import Bundle, Graph, Manifest, TensorSpec
from gfldeploy.engines.base import NOT_ASKED, EngineOptions, ExecutedConvolution, count_precisions, reasons
from gfldeploy.engines.onednn import LoggedConvolution, LoggedPrimitive, read_convolutions, read_primitives
from gfldeploy.engines.paddle_program import Kind, ProgramConvolution, explain, program_convolutions
from gfldeploy.engines.registry import capability, open_engine
from gfldeploy.images.preprocess import Preprocess
from gfldeploy.nms import NmsParams

STEM = "mb1_ic3oc24_ih256oh128kh3sh2dh0ph1_iw320ow160kw3sw2dw0pw1"
HEAD = "mb1_ic64oc64_ih32oh32kh3sh1dh0ph1_iw40ow40kw3sw1dw0pw1"
DEPTHWISE = "mb2_g64ic64oc64_ih32oh32kh3sh1dh0ph1_iw40ow40kw3sw1dw0pw1"
LOG = f"""onednn_verbose,v1,info,oneDNN v3.6.2 (commit 28d696724426b943e2f4a0e607f90cdc19aedaf6)
onednn_verbose,v1,primitive,exec,cpu,reorder,jit:uni,undef,src:f32::blocked:acdb::f0 dst:s8::blocked:acdb::f0,,,1x3,0.01
onednn_verbose,v1,primitive,create:cache_miss,cpu,convolution,brg,forward_inference,src:u8 wei:s8::f0,,alg:x,{STEM},0.2
onednn_verbose,v1,primitive,exec,cpu,convolution,brg_conv_fwd:avx512_core_vnni,forward_inference,src:s8:a:blocked:acdb::f0 wei:s8:ap:blocked:AcdB32a4b::f1:s8m1 bia:undef::undef::: dst:f32::blocked:acdb::f0,attr-scales:src0:0:f32+wei:1:f32,alg:convolution_direct,{STEM},0.24
onednn_verbose,v1,primitive,exec,cpu,convolution,brgconv_1x1:avx512_core_bf16,forward_inference,src:bf16:a:blocked:acdb::f0 wei:bf16:a:blocked:AcdB64a2b::f0 bia:f32::blocked:a::f0 dst:f32:a:blocked:acdb::f0,,alg:convolution_direct,{HEAD},0.1
onednn_verbose,exec,cpu,convolution,jit:avx2,forward_inference,src_f32::blocked:aBcd8b:f0 wei_f32::blocked:ABcd8b8a:f0 bia_f32::blocked:a:f0 dst_f32::blocked:aBcd8b:f0,,alg:convolution_direct,{DEPTHWISE},0.5
"""  # noqa: E501


def test_reading_the_log_in_both_spellings() -> None:
    assert read_convolutions(LOG) == (
        LoggedConvolution("int8", "brg_conv_fwd:avx512_core_vnni", STEM),
        LoggedConvolution("bf16", "brgconv_1x1:avx512_core_bf16", HEAD),
        LoggedConvolution("fp32", "jit:avx2", DEPTHWISE),
    )
    reorder, *convolutions = read_primitives(LOG)
    layouts = "src:f32::blocked:acdb::f0 dst:s8::blocked:acdb::f0"
    assert (reorder, reorder.ms) == (LoggedPrimitive("reorder", "jit:uni", layouts, "1x3"), 0.01)
    assert [(one.kind, one.shape) for one in convolutions] == [("convolution", at) for at in (STEM, HEAD, DEPTHWISE)]
    assert Kind.of(STEM) == Kind(1, 3, 24, (3, 3), (2, 2))
    assert Kind.of(DEPTHWISE) == Kind(64, 64, 64, (3, 3), (1, 1))
    assert Kind.of("4x4:4x4") is None


def ran(shape: str, *precisions: str) -> list[LoggedConvolution]:
    return [LoggedConvolution(precision, "jit", shape) for precision in precisions]


def asked(shape: str, **quantized: bool) -> list[ProgramConvolution]:
    kind = Kind.of(shape)
    assert kind is not None
    return [ProgramConvolution(name, value, kind) for name, value in quantized.items()]


@pytest.mark.parametrize(
    ("log", "program", "expected"),
    [
        (ran(STEM, "int8"), asked(STEM, a=True), [None]),
        (ran(STEM, "fp32"), asked(STEM, a=False), [("a", "kept in float in the program")]),
        (ran(STEM, "fp32"), asked(STEM, a=True), [("a", "oneDNN ran it in f32 although the program quantises it")]),
        # The one that is not quantised cannot be the one that ran in INT8.
        (
            ran(HEAD, "int8", "fp32"),
            asked(HEAD, a=False, b=True),
            [None, ("a", "kept in float in the program")],
        ),
        # Which of the two is which cannot be known.
        (
            ran(HEAD, "fp32", "fp32"),
            asked(HEAD, a=False, b=False),
            [("", "kept in float in the program")] * 2,
        ),
        (
            ran(HEAD, "fp32", "fp32", "int8"),
            asked(HEAD, a=False, b=True, c=True),
            [("", "of 2 of its shape that oneDNN ran in f32 the program keeps 1 in float")] * 2 + [None],
        ),
        (ran(STEM, "fp32"), asked(HEAD, a=False), [("", "oneDNN ran it in f32")]),
    ],
)
def test_explaining(
    log: list[LoggedConvolution], program: list[ProgramConvolution], expected: list[tuple[str, str] | None]
) -> None:
    for one, found, want in zip(log, explain(log, program), expected, strict=True):
        if want is None:
            assert found == ExecutedConvolution("int8", one.shape, None)
        else:
            name, why = want
            assert found == ExecutedConvolution("fp32", f"{name} {one.shape} jit".strip(), why)


def test_counts_and_reasons() -> None:
    found = [
        ExecutedConvolution("int8", "a"),
        ExecutedConvolution("fp32", "b", "not fused"),
        *[ExecutedConvolution("fp32", "c", "kept")] * 2,
        ExecutedConvolution("fp32", "d", "kept"),
    ]
    assert count_precisions(found) == {"fp32": 4, "int8": 1}
    assert reasons(found) == ("kept (3): c x2, d", "not fused (1): b")
    assert reasons(found[:1]) == ()


@pytest.mark.slow
def test_the_convolutions_of_a_program(tmp_path: Path) -> None:
    pytest.importorskip("paddle")
    from paddle.base.proto import framework_pb2

    program = framework_pb2.ProgramDesc()
    block = program.blocks.add(idx=0, parent_idx=-1)

    def operator(kind: str, slots: dict[str, str], output: str) -> object:
        made = block.ops.add(type=kind)
        for name, value in slots.items():
            made.inputs.add(parameter=name, arguments=[value])
        made.outputs.add(parameter="Output", arguments=[output])
        return made

    for weight, groups, strides in (("w", 1, [2, 1]), ("v.dq", 8, [1, 1])):
        variable = block.vars.add(name=weight)
        variable.type.type = framework_pb2.VarType.DENSE_TENSOR
        variable.type.dense_tensor.tensor.data_type = framework_pb2.VarType.FP32
        variable.type.dense_tensor.tensor.dims.extend([8, 4 // groups or 1, 3, 1])
        if weight == "v.dq":
            operator("dequantize_linear", {"X": "v"}, weight)
        made = operator("conv2d", {"Input": "image", "Filter": weight}, f"{weight} map")
        made.attrs.add(name="groups", type=framework_pb2.INT, i=groups)  # type: ignore[attr-defined]
        made.attrs.add(name="strides", type=framework_pb2.INTS, ints=strides)  # type: ignore[attr-defined]
    path = tmp_path / "model.pdmodel"
    path.write_bytes(program.SerializeToString())
    assert program_convolutions(path) == (
        ProgramConvolution("w", False, Kind(1, 4, 8, (3, 1), (2, 1))),
        ProgramConvolution("v", True, Kind(8, 8, 8, (3, 1), (1, 1))),
    )


@pytest.fixture(scope="module")
def paddle_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Two convolutions, as a PIR graph only."""
    paddle = pytest.importorskip("paddle")

    class Two(paddle.nn.Layer):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.first = paddle.nn.Conv2D(3, 16, 3, stride=2, padding=1)
            self.second = paddle.nn.Conv2D(16, 32, 1)

        def forward(self, image):  # type: ignore[no-untyped-def]
            rows = paddle.nn.functional.relu(self.first(image))
            return rows.mean([2, 3]), self.second(rows).mean([2, 3])

    directory = tmp_path_factory.mktemp("paddle")
    layer = Two()
    layer.eval()
    spec = [paddle.static.InputSpec([None, 3, None, None], "float32", name="image")]
    paddle.jit.save(paddle.jit.to_static(layer, input_spec=spec), str(directory / "model"))
    manifest = Manifest(
        name="two",
        precision="fp32",
        graphs={"paddle": Graph("model.json", "model.pdiparams")},
        inputs=(TensorSpec("image", "float32", (None, 3, None, None)),),
        outputs=(TensorSpec("scores", "float32", (None, 16)), TensorSpec("boxes", "float32", (None, 32))),
        preprocess=Preprocess(target_size=(64, 64)),
        nms=NmsParams(score_threshold=0.05, nms_threshold=0.6, nms_top_k=100, keep_top_k=100),
        classes=("one",),
        score_channels=1,
        strides=(8,),
        reg_max=16,
        parameters=0,
        provenance={},
    )
    return Bundle(directory, manifest)


def test_paddle_in_fp32(paddle_bundle: Bundle) -> None:
    image = np.zeros((1, 3, 64, 96), np.float32)
    with open_engine("paddle", paddle_bundle, EngineOptions()) as engine:
        found = engine.executed_convolutions({"image": image})
    assert count_precisions(found) == {"fp32": 2}
    assert [one.why for one in found] == [NOT_ASKED] * 2
    assert found[0].what.startswith("mb1_ic3oc16_ih64oh32kh3sh2dh0ph1_iw96ow48kw3sw2dw0pw1 ")
    assert found[1].what.startswith("mb1_ic16oc32_ih32oh32kh1sh1dh0ph0_iw48ow48kw1sw1dw0pw0 ")


def test_paddle_in_bf16(paddle_bundle: Bundle) -> None:
    if not capability("paddle", "bf16", "cpu").works:
        pytest.skip("this CPU has no BF16")
    with open_engine("paddle", paddle_bundle, EngineOptions("bf16")) as engine:
        found = engine.executed_convolutions({"image": np.zeros((1, 3, 64, 96), np.float32)})
    assert {one.precision for one in found} <= {"bf16", "fp32"} and len(found) == 2
    assert all((one.why is None) == (one.precision == "bf16") for one in found)
