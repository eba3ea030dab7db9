"""Checkpoints come from anywhere: nothing in them may run, and nothing that does not fit may be used."""

from __future__ import annotations

import collections
import os
import pickle
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from gfldeploy.errors import CheckpointError
from gfldeploy.export.checkpoint import load_checkpoint
from gfldeploy.export.weights import fit_weights, set_random_weights

WEIGHTS = {
    "backbone.conv.weight": np.arange(24, dtype=np.float32).reshape(2, 3, 2, 2),
    "backbone.norm._mean": np.array([0.5, -0.5], dtype=np.float16),
    "head.steps": np.array([3], dtype=np.int64),
}


def write(path: Path, content: Any, protocol: int = 4) -> Path:
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    return path


# --- what Paddle writes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_arrays_of_every_protocol_are_read(tmp_path: Path, protocol: int) -> None:
    content = {**WEIGHTS, "StructuredToParameterName@@": {"backbone.conv.weight": "conv2d_0.w_0"}}
    weights = load_checkpoint(write(tmp_path / "model.pdparams", content, protocol))
    assert list(weights) == list(WEIGHTS)
    for name, expected in WEIGHTS.items():
        assert isinstance(expected, np.ndarray)
        assert weights[name].dtype == expected.dtype
        np.testing.assert_array_equal(weights[name], expected)
        assert not weights[name].flags.writeable


def test_names_of_numpy_1_and_of_the_other_containers_are_read(tmp_path: Path) -> None:
    data = pickle.dumps(collections.OrderedDict(WEIGHTS), protocol=2)
    assert b"numpy._core.multiarray" in data
    (tmp_path / "old.pdparams").write_bytes(data.replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
    assert list(load_checkpoint(tmp_path / "old.pdparams")) == list(WEIGHTS)
    named = {name: ("conv2d_0.w_0", array) for name, array in WEIGHTS.items()}
    assert list(load_checkpoint(write(tmp_path / "named.pdparams", named))) == list(WEIGHTS)


def test_layouts_survive(tmp_path: Path) -> None:
    arrays = {
        "fortran": np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3)),
        "big_endian": np.arange(4, dtype=">f4"),
        "scalar": np.float32(2.5),
        "zero_dim": np.array(7.0),
        "empty": np.zeros((0, 3), np.float32),
        "flags": np.array([True, False]),
    }
    weights = load_checkpoint(write(tmp_path / "model.pdparams", arrays))
    for name, expected in arrays.items():
        np.testing.assert_array_equal(weights[name], expected)
        assert weights[name].dtype.isnative


def test_arrays_split_by_old_protocols_are_joined(tmp_path: Path) -> None:
    content = {
        "w@@.0": np.arange(4, dtype=np.float32),
        "w@@.1": np.arange(4, 6, dtype=np.float32),
        "UnpackBigParamInfor@@": {"w": {"OriginShape": (2, 3), "slices": ["w@@.0", "w@@.1"]}},
    }
    weights = load_checkpoint(write(tmp_path / "model.pdparams", content, protocol=2))
    np.testing.assert_array_equal(weights["w"], np.arange(6, dtype=np.float32).reshape(2, 3))
    content["UnpackBigParamInfor@@"] = {"w": {"OriginShape": (2, 4), "slices": ["w@@.0", "w@@.1"]}}
    with pytest.raises(CheckpointError, match="split arrays"):
        load_checkpoint(write(tmp_path / "model.pdparams", content, protocol=2))


def test_the_suffix_may_be_left_out(tmp_path: Path) -> None:
    write(tmp_path / "v1.2_final.pdparams", WEIGHTS)
    assert list(load_checkpoint(tmp_path / "v1.2_final")) == list(WEIGHTS)
    write(tmp_path / "model.pdema", {"raw": np.ones(1)})
    assert list(load_checkpoint(tmp_path / "model.pdema")) == ["raw"]


# --- what an attacker writes ------------------------------------------------------------------------------------------


class Call:
    """Pickles as a call of `function(*args)`."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.function, self.args = function, args

    def __reduce__(self) -> Any:
        return self.function, self.args


def text(value: str) -> bytes:
    return b"\x8c" + bytes([len(value)]) + value.encode()


def stack_global(module: str, name: str, argument: str) -> bytes:
    """A protocol 4 pickle that calls module.name(argument)."""
    return b"\x80\x04" + text(module) + text(name) + b"\x93" + text(argument) + b"\x85R."


PAYLOADS: dict[str, tuple[Callable[[Path], bytes], str]] = {
    "os.system": (lambda target: pickle.dumps({"w": Call(os.system, f"touch {target}")}, 2), r"posix\.system"),
    "os.system by its public name": (lambda target: stack_global("os", "system", f"touch {target}"), r"os\.system"),
    "protocol 2 global": (lambda target: b"\x80\x02cos\nsystem\nU\x05touch\x85R.", r"os\.system"),
    "protocol 3 global": (
        lambda target: b"\x80\x03c__builtin__\neval\nX\x01\x00\x00\x001\x85R.",
        r"__builtin__\.eval",
    ),
    "builtins.eval": (
        lambda target: pickle.dumps({"w": Call(eval, f"__import__('os').mkdir({str(target)!r})")}, 4),
        r"builtins\.eval",
    ),
    "paddle's own eval of a DenseTensor": (
        lambda target: pickle.dumps({"w": Call(eval, "data", {"data": np.ones(1)})}, 4),
        r"builtins\.eval",
    ),
    "numpy.testing": (
        lambda target: stack_global(
            "numpy.testing._private.utils", "runstring", f"__import__('os').mkdir({str(target)!r})"
        ),
        r"numpy\.testing\._private\.utils\.runstring",
    ),
    "numpy.f2py": (
        lambda target: stack_global("numpy.f2py.crackfortran", "myeval", f"__import__('os').mkdir({str(target)!r})"),
        r"numpy\.f2py\.crackfortran\.myeval",
    ),
    "numpy.load": (lambda target: stack_global("numpy", "load", str(target)), r"numpy\.load"),
    "dotted name below an allowed module": (
        lambda target: stack_global("numpy", "f2py.crackfortran.myeval", f"__import__('os').mkdir({str(target)!r})"),
        r"numpy\.f2py\.crackfortran\.myeval",
    ),
    "dotted name below an allowed name": (
        lambda target: stack_global("collections", "OrderedDict.__init__.__globals__", "x"),
        r"OrderedDict\.__init__\.__globals__",
    ),
    "dotted name of the codecs module": (
        lambda target: stack_global("_codecs", "encode.__self__.lookup", "x"),
        r"_codecs\.encode\.__self__",
    ),
    "persistent id, as torch uses": (lambda target: b"\x80\x02(X\x07\x00\x00\x00storageo" + b".", "an instance"),
    "binary persistent id": (lambda target: b"\x80\x04" + text("storage") + b"Q.", "a persistent id"),
    "text persistent id": (lambda target: b"\x80\x02Pstorage\n.", "a persistent id"),
    "extension registry": (lambda target: b"\x80\x02\x82\x01.", "the extension registry"),
    "instance opcode": (lambda target: b"\x80\x02(ios\nsystem\n.", "an instance"),
    "newobj": (lambda target: b"\x80\x02ccollections\nOrderedDict\n)\x81.", "an instance"),
    "another codec": (
        lambda target: b"\x80\x02c_codecs\nencode\n(X\x01\x00\x00\x00aX\x05\x00\x00\x00rot13tR.",
        "another encoding",
    ),
    "object array": (lambda target: pickle.dumps({"w": np.array([{"a": 1}], dtype=object)}, 4), "dtype 'O8'"),
    "structured array": (lambda target: pickle.dumps({"w": np.zeros(1, dtype="f4,O")}, 4), "dtype"),
    "text array": (lambda target: pickle.dumps({"w": np.array(["a"])}, 4), "dtype 'U1'"),
    "array of another class": (lambda target: pickle.dumps({"w": np.matrix([[1.0]])}, 4), r"numpy\.matrix"),
    "calling ndarray": (lambda target: b"\x80\x02cnumpy\nndarray\n)R.", "calling numpy.ndarray"),
    "changing an allowed function": (
        lambda target: b"\x80\x02c_codecs\nencode\n}X\x09\x00\x00\x00_functionX\x01\x00\x00\x00xsb.",
        "changing _codecs.encode",
    ),
    "changing an allowed class": (
        lambda target: b"\x80\x02ccollections\nOrderedDict\nN}X\x03\x00\x00\x00popNs\x86b.",
        "changing collections.OrderedDict",
    ),
}


@pytest.mark.parametrize("payload", PAYLOADS)
def test_nothing_in_a_checkpoint_runs(tmp_path: Path, payload: str) -> None:
    target = tmp_path / "executed"
    make, named = PAYLOADS[payload]
    path = tmp_path / "model.pdparams"
    path.write_bytes(make(target))
    with pytest.raises(CheckpointError, match=named) as caught:
        load_checkpoint(path)
    assert "refused" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not target.exists()
    # The next good checkpoint loads as if nothing had happened.
    assert list(load_checkpoint(write(tmp_path / "good.pdparams", WEIGHTS))) == list(WEIGHTS)


def test_the_payloads_would_run(tmp_path: Path) -> None:
    """The test above would pass with payloads that do nothing."""
    for name in ("os.system", "builtins.eval", "os.system by its public name"):
        target = tmp_path / f"executed by {name}".replace(" ", "_")
        pickle.loads(PAYLOADS[name][0](target))
        assert target.exists()


# --- what takes more than its size ------------------------------------------------------------------------------------


def number(value: int) -> bytes:
    packed = value.to_bytes((value.bit_length() + 8) // 8, "little", signed=True)
    return b"\x8b" + struct.pack("<i", len(packed)) + packed


def long_text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def raw(value: bytes) -> bytes:
    return b"B" + struct.pack("<I", len(value)) + value


def array(shape: bytes, data: bytes, dtype: str = "f4") -> bytes:
    spec = b"cnumpy\ndtype\n(" + long_text(dtype) + b"\x89\x88tR"
    return b"cnumpy.core.numeric\n_frombuffer\n(" + raw(data) + spec + shape + long_text("C") + b"tR"


def of(*pairs: tuple[str, bytes]) -> bytes:
    return b"\x80\x04}(" + b"".join(long_text(key) + value for key, value in pairs) + b"u."


def sizes(*values: int) -> bytes:
    return b"(" + b"".join(map(number, values)) + b"t"


def many_slices() -> bytes:
    """20,000 slices that are one array of half a megabyte: 10 GB."""
    parts = [f"p{index}" for index in range(20000)]
    table = b"}(" + long_text("slices") + b"](" + b"".join(map(long_text, parts)) + b"e"
    table += long_text("OriginShape") + sizes(2**17 * 20000) + b"u"
    shared = array(sizes(2**17), bytes(2**19)) + b"q\x020}("
    pairs = b"".join(long_text(part) + b"h\x02" for part in parts)
    return b"\x80\x04" + shared + pairs + long_text("UnpackBigParamInfor@@") + b"}(" + long_text("w") + table + b"uu."


LARGE = 2**20
SHARED = b"h\x00h\x01R" * 2000 + b"e."
GREEDY = {
    "tuples of one buffer": (
        b"\x80\x04cbuiltins\ntuple\nq\x000" + raw(b"\1" * LARGE) + b"\x85q\x010](" + SHARED,
        "a tuple is not made of a list",
    ),
    "tuples of one list": (
        b"\x80\x04cbuiltins\ntuple\nq\x000](" + b"N" * 10000 + b"e\x85q\x010](" + SHARED,
        "far more than its size",
    ),
    "encodes of one text": (
        b"\x80\x04c_codecs\nencode\nq\x000" + long_text("a" * LARGE) + b"\x85q\x010](" + SHARED,
        "far more than its size",
    ),
    "arrays of one buffer": (
        b"\x80\x04" + array(sizes(LARGE // 4), bytes(LARGE)) + b"q\x020}("
        + b"".join(long_text(str(index)) + b"h\x02" for index in range(3000)) + b"u.",
        "far more than its size",
    ),
    "copies of one array": (
        b"\x80\x04" + array(sizes(LARGE // 4), bytes(LARGE), ">f4") + b"q\x020}("
        + b"".join(long_text(str(index)) + b"h\x02" for index in range(3000)) + b"u.",
        "far more than its size",
    ),
    "slices that are one": (many_slices(), "far more than its size"),
    "dicts": (b"\x80\x04(" + b"}" * 10**6 + b"t.", "far more than its size"),
    "sets": (b"\x80\x04\x8f.", "a set"),
    "keys that collide": (
        b"\x80\x04}(" + b"".join(number(((1 << 61) - 1) * index) + b"N" for index in range(1, 3000)) + b"u.",
        "a int among its parameter names",
    ),
    "a key too deep to hash": (
        b"\x80\x04}()" + b"\x85" * 10**4 + b"K\x01u.",
        "a tuple among its parameter names",
    ),
    "many dimensions": (of(("a", array(sizes(*[1] * 100), bytes(4)))), "an array has 100 dimensions"),
    "no elements, by a size beyond any": (of(("a", array(sizes(0, 2**70), b""))), "an array has no shape"),
    "sizes whose product is no shape": (of(("a", array(sizes(0, 2**47, 2**47), b""))), "an array has the shape"),
    "a size of many digits": (of(("a", array(sizes(1 << 20000, 3), bytes(4)))), "an array has no shape"),
    "terminal control": (b"\x80\x04cos\x1b]0;title\x07\x1b[31mred\nsystem\n.", r"contains os\\x1b\]0;title"),
    "a name as long as the file": (b"\x80\x04c" + b"o" * LARGE + b"\nsystem\n.", "contains ooo"),
    "PyTorch's number": (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.", "was written by PyTorch"),
    "a tensor of PyTorch": (b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n.", "was written by PyTorch"),
    "an unknown call": (b"\x80\x04N)R.", "a NoneType is called"),
    "a stack that runs empty": (b"\x80\x04\x87.", "stack runs empty"),
    "no end": (b"\x80\x04N", "cut off"),
}  # fmt: skip


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=pytest.mark.slow if kind == "dicts" else ()) for kind in GREEDY]
)
def test_nothing_is_made_beyond_a_multiple_of_the_size(tmp_path: Path, kind: str) -> None:
    content, problem = GREEDY[kind]
    path = tmp_path / "model.pdparams"
    path.write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match=problem) as caught:
            load_checkpoint(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    message = str(caught.value)
    assert message.isprintable()
    assert len(message) < 1000
    assert peak < 5 * len(content) + 100 * 2**20


# --- what a broken disk or a wrong command writes ---------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 20, 200, -200, -2, -1])
def test_truncated(tmp_path: Path, size: int) -> None:
    data = pickle.dumps(WEIGHTS, 4)
    path = tmp_path / "model.pdparams"
    path.write_bytes(data[:size])
    with pytest.raises(CheckpointError, match=r"cut off|damaged"):
        load_checkpoint(path)


@pytest.mark.parametrize("protocol", [2, 4])
def test_any_flipped_byte_ends_in_weights_or_in_one_line(tmp_path: Path, protocol: int) -> None:
    data = pickle.dumps(WEIGHTS, protocol)
    path = tmp_path / "model.pdparams"
    for position in range(len(data)):
        for flip in (0xFF, 0x01, 0x40):
            damaged = bytearray(data)
            damaged[position] ^= flip
            path.write_bytes(damaged)
            try:
                weights = load_checkpoint(path)
            except CheckpointError as error:
                assert "\n" not in str(error)
            else:
                assert all(isinstance(array, np.ndarray) for array in weights.values())


def test_wrong_byte_counts(tmp_path: Path) -> None:
    path = tmp_path / "model.pdparams"
    for damaged in (
        b"\x80\x04\x8e" + struct.pack("<Q", 1 << 40) + b"x.",  # a terabyte of bytes announced
        b"\x80\x04]r" + struct.pack("<I", 0x7FFFFFFF) + b".",  # memo index that would reserve gigabytes
        pickle.dumps(WEIGHTS, 2).replace(b"K\x02K\x03K\x02K\x02", b"K\x02K\x03K\x02K\x09"),
    ):
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"cut off|damaged"):
            load_checkpoint(path)


def test_missing_empty_and_wrong_files(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"model\.pdparams does not exist"):
        load_checkpoint(tmp_path / "model")
    with pytest.raises(CheckpointError, match="is a folder"):
        load_checkpoint(tmp_path)
    (tmp_path / "empty.pdparams").touch()
    with pytest.raises(CheckpointError, match="is empty"):
        load_checkpoint(tmp_path / "empty")
    (tmp_path / "page.pdparams").write_text("<html>not found</html>")
    with pytest.raises(CheckpointError, match="not a PaddleDetection checkpoint"):
        load_checkpoint(tmp_path / "page")
    write(tmp_path / "model.pdopt", WEIGHTS)
    with pytest.raises(CheckpointError, match="optimizer"):
        load_checkpoint(tmp_path / "model.pdopt")


def test_not_a_state_dict(tmp_path: Path) -> None:
    for content, problem in (
        ([1, 2], "holds a list"),
        (np.ones(3), "holds a numpy array"),
        ({}, "no weights"),
        ({"StructuredToParameterName@@": {}}, "no weights"),
        ({"model": dict(WEIGHTS)}, "has 'model', which is a dict"),
        ({"epoch": 3}, "has 'epoch', which is a int"),
        ({"w": None}, "has 'w', which is a NoneType"),
        ({3: np.ones(3)}, "a int among its parameter names"),
    ):
        with pytest.raises(CheckpointError, match=problem):
            load_checkpoint(write(tmp_path / "model.pdparams", content))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_non_finite_values_are_named(tmp_path: Path, value: float) -> None:
    content = {"good": np.ones(3), "head.bias": np.array([0.0, value], np.float32)}
    with pytest.raises(CheckpointError, match=r"NaN or infinity in 'head\.bias'"):
        load_checkpoint(write(tmp_path / "model.pdparams", content))
    bfloat16 = (np.array([value], np.float32).view(np.uint32) >> 16).astype(np.uint16)
    with pytest.raises(CheckpointError, match="NaN or infinity in 'w'"):
        load_checkpoint(write(tmp_path / "model.pdparams", {"w": bfloat16}))


# --- into a model -----------------------------------------------------------------------------------------------------


class FakeTensor:
    """As much of a paddle tensor as fit_weights uses."""

    def __init__(self, *shape: int, dtype: str = "paddle.float32") -> None:
        self.shape, self.dtype, self.value = list(shape), dtype, np.zeros(0)

    def set_value(self, value: np.ndarray) -> None:
        self.value = value


def model(**shapes: tuple[int, ...]) -> Any:
    state = {name: FakeTensor(*shape) for name, shape in shapes.items()}
    return SimpleNamespace(state_dict=lambda: state)


def test_weights_are_set_in_the_dtype_of_the_model() -> None:
    target = model(a=(2,), b=(1, 3), c=(2,))
    values = np.array([1.5, -2.0], np.float32)
    bits = (values.view(np.uint32) >> 16).astype(np.uint16)
    fit_weights(target, {"b": np.ones((1, 3), np.float16), "a": np.array([1.0, 2.0]), "c": bits})
    state = target.state_dict()
    assert [state[name].value.dtype for name in "abc"] == [np.float32] * 3
    np.testing.assert_array_equal(state["c"].value, values)


def test_mismatch_both_ways_in_one_line_and_nothing_is_set() -> None:
    target = model(a=(2,), b=(1, 3), **{f"gone{index}": (1,) for index in range(5)})
    with pytest.raises(CheckpointError) as caught:
        fit_weights(target, {"a": np.ones(2), "b": np.ones((3, 1)), "more": np.ones(1)})
    message = str(caught.value)
    assert "5 missing (gone0, gone1, gone2, ...)" in message
    assert "1 unexpected (more)" in message
    assert "1 of the wrong shape (b (3x1 instead of 1x3))" in message
    assert "\n" not in message
    assert all(tensor.value.size == 0 for tensor in target.state_dict().values())
    with pytest.raises(CheckpointError, match="1 unexpected"):
        fit_weights(model(a=(1,)), {"a": np.ones(1), "extra": np.ones(1)})
    whole = model(**{"a": (1,), "head.distribution_project.project": (17,)})
    fit_weights(whole, {"a": np.ones(1)})
    assert whole.state_dict()["a"].value == 1, "the other is no weight"


DETECTOR = {
    "backbone.res2a.conv.weight": (4, 3, 3, 3),
    "backbone.res2a.norm._mean": (4,),
    "neck.fpn.weight": (4, 4, 1, 1),
    "head.gfl_head_cls.weight": (3, 4, 3, 3),
    "head.gfl_head_cls.bias": (3,),
    "head.gfl_head_reg.weight": (68, 4, 3, 3),
}


@pytest.mark.parametrize(
    ("change", "problem", "remedy"),
    [
        (
            lambda weights: {
                **{name.replace("conv.", "conv._layer."): array for name, array in weights.items()},
                "backbone.res2a.conv._layer._fake_quant_input._scale": np.ones(1),
            },
            "was saved by quantisation-aware training",
            "Export the float checkpoint that this training started from",
        ),
        *(
            (
                lambda weights, left=left: {**weights, f"backbone.res2a.conv.{left}": np.ones(1)},
                "was saved by quantisation-aware training",
                "gfldeploy quantize",
            )
            for left in (
                "activation_quanter._scale", "_act_preprocess.alpha", "_ptq_quanter", "_out_scale._scale",
                "_observer.scale", "_quant_scale",
            )
        ),
        (
            lambda weights: {name: (array * 100).astype(np.int8) for name, array in weights.items()},
            "holds int8 for 6 float parameters",
            "Export the float checkpoint",
        ),
        (
            lambda weights: {name: array * np.float64(1e300) for name, array in weights.items()},
            "that a float32 cannot hold",
            "before training diverged",
        ),
        (
            lambda weights: {**weights, "backbone.res2a.conv.conv2d_0_w_0_mask": np.ones(1)},
            "has the masks of sparse training",
            "without the names that end in _mask",
        ),
        (
            lambda weights: {name: array for name, array in weights.items() if "backbone" in name},
            "holds a backbone alone",
            "model_final.pdparams",
        ),
        (
            lambda weights: {f"teacher_model.{name}": array for name, array in weights.items()},
            "holds the teacher of a distillation",
            "model_final.pdparams",
        ),
        (
            lambda weights: {f"model.module.{name}": array for name, array in weights.items()},
            "has model.module. before every name",
            "without that prefix",
        ),
        (lambda weights: {"conv2d_0.w_0_moment1_0": np.ones(3)}, "is the optimizer's state", ".pdparams file beside"),
        (
            lambda weights: {**weights, "head.gfl_head_cls.weight": np.ones((80, 4, 3, 3))},
            "is of 80 classes, the config of 3",
            "Set num_classes",
        ),
        (
            lambda weights: {**weights, "head.gfl_head_reg.weight": np.ones((36, 4, 3, 3))},
            "has another reg_max",
            "Set GFLHead's reg_max",
        ),
        (
            lambda weights: {**weights, "backbone.res2a.conv.weight": np.ones((2, 3, 3, 3))},
            "has fewer channels than the config: it was pruned",
            "before pruning",
        ),
        (
            lambda weights: {("neck.other" if "neck" in name else name): array for name, array in weights.items()},
            "fits the config but for the neck",
            "Use the config",
        ),
        (
            lambda weights: {name: array for name, array in weights.items() if "cls.bias" not in name},
            "is not complete, or the config has more layers: of 6 parameters, 1 missing (head.gfl_head_cls.bias)",
            "save the detector's whole state_dict",
        ),
        (
            lambda weights: {name.removeprefix("backbone."): array for name, array in weights.items() if "res" in name},
            "holds a backbone alone",
            "model_final.pdparams",
        ),
        (
            lambda weights: {f"module.{name}": array for name, array in weights.items()},
            "has module. before every name",
            "without that prefix",
        ),
        (
            lambda weights: {**weights, "head.dgqp_module.reg_conv1.weight": np.ones(1)},
            "is of a GFLv2",
            "Add GFLHead's dgqp_module",
        ),
        (lambda weights: {**weights, "\x1b[31m" + "x" * 5000: np.ones(1)}, "does not fit the config", "Use the config"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(change: Any, problem: str, remedy: str) -> None:
    weights = {name: np.ones(shape, np.float32) for name, shape in DETECTOR.items()}
    fit_weights(model(**DETECTOR), weights)
    with pytest.raises(CheckpointError) as caught:
        fit_weights(model(**DETECTOR), change(weights))
    assert problem in caught.value.problem
    assert remedy in str(caught.value.remedy)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 1000


def test_the_student_of_a_distillation_checkpoint_is_used() -> None:
    target = model(**{"head.w": (1,)})
    fit_weights(target, {"student_model.head.w": np.ones(1), "teacher_model.head.w": np.zeros(4)})
    assert target.state_dict()["head.w"].value == 1
    with pytest.raises(CheckpointError, match="1 unexpected"):
        fit_weights(target, {"head.w": np.ones(1), "teacher_model.head.w": np.zeros(4)})


def test_random_weights_depend_on_seed_and_name_only() -> None:
    first, second, other = (model(**{"a.weight": (4, 3, 3, 3), "a.bias": (4,)}) for _ in range(3))
    set_random_weights(first, 1)
    set_random_weights(second, 1)
    set_random_weights(other, 2)
    drawn = [{name: tensor.value for name, tensor in each.state_dict().items()} for each in (first, second, other)]
    np.testing.assert_array_equal(drawn[0]["a.weight"], drawn[1]["a.weight"])
    assert not np.array_equal(drawn[0]["a.weight"], drawn[2]["a.weight"])
    with pytest.raises(ValueError, match="negative"):
        set_random_weights(first, -1)


@pytest.mark.slow
def test_a_real_state_dict_round_trips_through_paddle_save(tmp_path: Path) -> None:
    import paddle

    def build() -> Any:
        return paddle.nn.Sequential(paddle.nn.Conv2D(3, 4, 3), paddle.nn.BatchNorm2D(4), paddle.nn.GroupNorm(2, 4))

    saved, loaded = build(), build()
    set_random_weights(saved, 5)
    for protocol in (2, 3, 4):
        paddle.save(saved.state_dict(), str(tmp_path / "model.pdparams"), protocol=protocol)
        weights = load_checkpoint(tmp_path / "model")
        assert weights.keys() == saved.state_dict().keys()
        fit_weights(loaded, weights)
        for name, tensor in loaded.state_dict().items():
            np.testing.assert_array_equal(tensor.numpy(), saved.state_dict()[name].numpy())
