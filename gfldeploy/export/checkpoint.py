"""Load a PaddleDetection checkpoint without trusting it.

A `.pdparams` file is a pickle, and a pickle can name any function and have it called. Here no unpickler runs: the
opcodes that a state_dict needs are interpreted one by one, any other is refused, and the few names that pickled arrays
use are answered by functions of this module, which check what they are given and collect plain bytes. The arrays are
made from those bytes afterwards, so that neither a callable of numpy nor numpy's own restoring of dtypes and arrays
(which trusts its input) sees anything from the file.

Opcodes can make much of few bytes: refer to one value a thousand times, copy it, or build keys that hash slowly. So
everything that is made is paid for from an allowance that grows with the size of the file, before it is made; the keys
of mappings can only be text.
"""

from __future__ import annotations

import math
import pickle
import pickletools
import re
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from gfldeploy.errors import CheckpointError
from gfldeploy.export.bounded_text import cut, shown

_SUFFIXES = (".pdparams", ".pdema")
_NAME_TABLE = "StructuredToParameterName@@"  # Paddle's own parameter names; the state_dict's names are what matters
_SPLIT_TABLE = "UnpackBigParamInfor@@"  # pickle protocols 2 and 3: arrays over 1 GiB are stored in slices
_REMEDY_DAMAGED = "Copy or download the checkpoint again."
_REMEDY_UNSAFE = (
    "Do not use this file unless you trust its source; a checkpoint that paddle.save wrote needs none of it."
)
REMEDY_OPTIMIZER = "Pass the .pdparams file beside it."
_REMEDY_STATE = "Pass the .pdparams file of a detector: a state_dict saved with paddle.save."


class _ProblemError(Exception):
    """Why a checkpoint cannot be used, to follow its path, and the remedy."""

    def __init__(self, problem: str, remedy: str) -> None:
        super().__init__(problem)
        self.problem = problem
        self.remedy = remedy


def _refused(what: str) -> _ProblemError:
    """The pickle asks for something that no state_dict of arrays needs."""
    return _ProblemError(f"was refused, it is not plain weights: it contains {what}", _REMEDY_UNSAFE)


def _damaged(what: str) -> _ProblemError:
    """The pickle is well-formed but its arrays are not."""
    return _ProblemError(f"is damaged: {what}", _REMEDY_DAMAGED)


def _not_state(what: str) -> _ProblemError:
    """The pickle is harmless, but no state_dict."""
    return _ProblemError(what, _REMEDY_STATE)


# PyTorch's, also before it wrote zip files: a pickle of this number comes first.
_PYTORCH = "was written by PyTorch"
_PYTORCH_NUMBER = 0x1950A86A20F9469CFC6C


# --- what may be made of a file -----------------------------------------------------------------------------------


class _Allowance:
    """How many bytes of memory may still be made of the file: arrays of it, a copy of them, and what holds them."""

    _EACH_OPCODE = 100  # an empty list or dict, its place on the stack and in the memo

    def __init__(self, size: int) -> None:
        self.left = 4 * size + 64 * 2**20

    def pay(self, count: int) -> None:
        self.left -= count
        if self.left < 0:
            raise _refused("far more than its size (the same values over and over)")

    def pay_opcode(self) -> None:
        self.pay(self._EACH_OPCODE)


# --- stand-ins for what a pickled array names -------------------------------------------------------------------------

_DTYPE = re.compile(r"[<>=|]?(?:b1|[iu][1248]|f[248])\Z")
_MOST_DIMENSIONS = 32


class _Dtype:
    """A pickled numpy.dtype of plain numbers."""

    __slots__ = ("order", "spec")

    def __init__(self, spec: str) -> None:
        self.spec = spec
        self.order = spec[0] if spec[0] in "<>" else "="

    def restore(self, state: Any, allowance: _Allowance) -> None:
        # (version, byte order, subarray, names, fields, item size, alignment, flags); plain numbers have no parts.
        if not isinstance(state, tuple) or len(state) < 5 or state[1] not in ("<", ">", "=", "|"):
            raise _damaged("a dtype is malformed")
        if any(part is not None for part in state[2:5]):
            raise _refused("a structured dtype")
        self.order = state[1]

    def build(self) -> np.dtype[Any]:
        return np.dtype(self.spec.lstrip("<>=|")).newbyteorder(self.order)  # type: ignore[arg-type]


class _Array:
    """A pickled numpy.ndarray: its shape, dtype and bytes."""

    __slots__ = ("data", "dtype", "fortran", "shape")

    def __init__(self) -> None:
        self.shape: tuple[int, ...] = ()
        self.dtype: _Dtype | None = None
        self.fortran = False
        self.data: bytes | bytearray = b""

    def restore(self, state: Any, allowance: _Allowance) -> None:
        if not isinstance(state, tuple) or len(state) != 5:
            raise _damaged("an array is malformed")
        self.fill(allowance, *state[1:])

    def fill(self, allowance: _Allowance, shape: Any, dtype: Any, fortran: Any, data: Any) -> None:
        if not isinstance(dtype, _Dtype):
            raise _damaged("an array has no dtype")
        if isinstance(data, str):  # protocol 2 may keep bytes as latin-1 text
            allowance.pay(len(data))
            data = data.encode("latin-1")
        if not isinstance(data, bytes | bytearray):
            raise _damaged("an array has no bytes")
        if not isinstance(shape, tuple) or not all(type(size) is int and 0 <= size < 2**48 for size in shape):
            raise _damaged("an array has no shape")
        if len(shape) > _MOST_DIMENSIONS:
            raise _damaged(f"an array has {len(shape)} dimensions")
        self.shape, self.dtype, self.fortran, self.data = shape, dtype, bool(fortran), data

    def build(self, allowance: _Allowance) -> NDArray[Any]:
        """A read-only view of the bytes; only a foreign byte order is copied."""
        if self.dtype is None:
            raise _damaged("an array was never filled")
        dtype = self.dtype.build()
        if math.prod(self.shape) * dtype.itemsize != len(self.data):
            raise _damaged(f"an array of shape {self.shape} has {len(self.data)} bytes")
        allowance.pay(len(self.data) * (1 if dtype.isnative else 2))  # arrays that share bytes take time, too
        try:
            array = np.frombuffer(self.data, dtype).reshape(self.shape, order="F" if self.fortran else "C")
        except ValueError as error:  # without elements, but with sizes beyond numpy's
            raise _damaged(f"an array has the shape {self.shape}") from error
        array = array if dtype.isnative else array.astype(dtype.newbyteorder("="))
        array.flags.writeable = False
        return array


class _Name:
    """What an allowed name of the pickle stands for: calling it calls our function; nothing else can be done to it."""

    __slots__ = ("_function", "name")

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        self.name = name
        self._function = function

    def __call__(self, allowance: _Allowance, args: tuple[Any, ...]) -> Any:
        try:
            return self._function(allowance, *args)
        except (TypeError, ValueError) as error:
            raise _damaged(f"{self.name} is called with the wrong arguments") from error


def _call_ndarray(*_: Any) -> Any:
    raise _refused("calling numpy.ndarray")


_NDARRAY = _Name("numpy.ndarray", _call_ndarray)


def _make_dtype(_: _Allowance, spec: Any, *__: Any) -> _Dtype:
    if not isinstance(spec, str) or not _DTYPE.match(spec):
        raise _refused(f"an array of dtype {shown(spec) if isinstance(spec, str) else _kind(spec)}")
    return _Dtype(spec)


def _reconstruct(_: _Allowance, kind: Any, shape: Any, code: Any) -> _Array:
    if kind is not _NDARRAY:
        raise _refused("an array of another class than numpy.ndarray")
    return _Array()


def _scalar(allowance: _Allowance, dtype: Any, data: Any = b"") -> _Array:
    return _from_buffer(allowance, data, dtype, (), "C")


def _from_buffer(allowance: _Allowance, data: Any, dtype: Any, shape: Any, order: Any) -> _Array:
    array = _Array()
    array.fill(allowance, shape, dtype, order == "F", data)
    return array


def _encode(allowance: _Allowance, text: Any, encoding: Any = "latin1") -> bytes:
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise _refused("_codecs.encode with another encoding than latin1")
    allowance.pay(len(text))
    return text.encode("latin-1")


def _ordered_dict(allowance: _Allowance, pairs: Any = ()) -> dict[str, Any]:
    """An OrderedDict is called without arguments, or in pickles of Python 2 with a list of pairs."""
    if not isinstance(pairs, list | tuple) or not all(isinstance(pair, list | tuple) for pair in pairs):
        raise _damaged("an OrderedDict is not made of pairs")
    allowance.pay(100 * len(pairs))
    return {_text_key(key): value for key, value in pairs}


def _tuple(allowance: _Allowance, items: Any = ()) -> tuple[Any, ...]:
    if not isinstance(items, list | tuple):
        raise _damaged("a tuple is not made of a list")
    allowance.pay(8 * len(items))
    return tuple(items)


def _text_key(key: Any) -> str:
    if type(key) is not str:
        raise _not_state(f"has a {_kind(key)} among its parameter names")
    return key


# The exact (module, name) pairs that pickles of arrays and containers use. Names with dots are never looked up.
_ALLOWED: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): _NDARRAY,
    ("numpy", "dtype"): _Name("numpy.dtype", _make_dtype),
    ("collections", "OrderedDict"): _Name("collections.OrderedDict", _ordered_dict),
    ("_codecs", "encode"): _Name("_codecs.encode", _encode),
    ("builtins", "tuple"): _Name("tuple", _tuple),
    ("__builtin__", "tuple"): _Name("tuple", _tuple),
}
for _core in ("numpy.core", "numpy._core"):
    _ALLOWED[f"{_core}.multiarray", "_reconstruct"] = _Name("numpy's _reconstruct", _reconstruct)
    _ALLOWED[f"{_core}.multiarray", "scalar"] = _Name("numpy's scalar", _scalar)
    _ALLOWED[f"{_core}.numeric", "_frombuffer"] = _Name("numpy's _frombuffer", _from_buffer)

# --- the opcodes of a state_dict --------------------------------------------------------------------------------------

# Opcodes that reach objects in another way than by a name: persistent ids, copyreg's registry, instances, buffers.
_REFUSED_OPCODES = {
    opcode: what
    for what, opcodes in {
        "a persistent id": "PERSID BINPERSID",
        "an entry of the extension registry": "EXT1 EXT2 EXT4",
        "an instance": "INST OBJ NEWOBJ NEWOBJ_EX",
        "an out-of-band buffer": "NEXT_BUFFER READONLY_BUFFER",
        "a set": "EMPTY_SET ADDITEMS FROZENSET",
    }.items()
    for opcode in opcodes.split()
}
_IGNORED = ("PROTO", "FRAME")
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
# Opcodes whose argument is the value.
_VALUE_OPCODES = """
    INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING BINBYTES SHORT_BINBYTES
    BINBYTES8 BYTEARRAY8 UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8
"""
_VALUES = frozenset(_VALUE_OPCODES.split())


class _Bounded:
    """The file, refusing to reserve memory for more bytes than it has left."""

    def __init__(self, file: IO[bytes], size: int) -> None:
        self._file = file
        self._size = size

    def read(self, count: int = -1) -> bytes:
        if count > self._size - self._file.tell():
            raise EOFError
        return self._file.read(count)

    def readline(self) -> bytes:
        return self._file.readline()


class _Machine:
    """Interprets the opcodes of one pickle; `run` returns what it holds."""

    def __init__(self, allowance: _Allowance) -> None:
        self._allowance = allowance
        self._stack: list[Any] = []
        self._below: list[list[Any]] = []  # the stacks under each mark
        self._memo: dict[int, Any] = {}

    def run(self, file: Any) -> Any:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(file), start=1):
            self._allowance.pay_opcode()
            name = opcode.name
            if name in _VALUES:
                self._push(argument)
            elif name in _CONSTANTS:
                self._push(_CONSTANTS[name])
            elif name == "STOP":
                return self._stack.pop()
            elif name in _REFUSED_OPCODES:
                raise _refused(_REFUSED_OPCODES[name])
            elif name not in _IGNORED:
                self._step(name, argument, count)
        raise EOFError

    def _step(self, name: str, argument: Any, count: int) -> None:
        stack = self._stack
        match name:
            case "MEMOIZE":
                self._memo[len(self._memo)] = stack[-1]
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                if argument > count:  # picklers count from 0
                    raise _damaged("its memo is out of order")
                self._memo[argument] = stack[-1]
            case "GET" | "BINGET" | "LONG_BINGET":
                stack.append(self._memo[argument])
            case "MARK":
                self._below.append(stack)
                self._stack = []
            case "POP" if stack:
                stack.pop()
            case "POP" | "POP_MARK":
                self._since_mark()
            case "DUP":
                stack.append(stack[-1])
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_DICT":
                stack.append({})
            case "LIST":
                self._push(self._since_mark())
            case "TUPLE":
                self._push(tuple(self._since_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                size = int(name[-1])
                stack[-size:] = [tuple(_last(stack, size))]
            case "DICT":
                items = self._since_mark()
                self._push({})
                self._set_items(items)
            case "APPEND":
                self._append([stack.pop()])
            case "APPENDS":
                self._append(self._since_mark())
            case "SETITEM":
                items = _last(stack, 2)
                del stack[-2:]
                self._set_items(items)
            case "SETITEMS":
                self._set_items(self._since_mark())
            case "GLOBAL":  # its argument is "module name"; a space in either could only hide something
                module, _, attribute = argument.partition(" ")
                stack.append(_allowed(module, attribute))
            case "STACK_GLOBAL":
                module, attribute = _last(stack, 2)
                stack[-2:] = [_allowed(module, attribute)]
            case "REDUCE":
                function, args = _last(stack, 2)
                if not isinstance(args, tuple) or not isinstance(function, _Name):
                    raise _damaged(f"a {_kind(function)} is called")
                stack[-2:] = [function(self._allowance, args)]
            case "BUILD":
                state = stack.pop()
                self._restore(stack[-1], state)
            case _:
                raise _refused(f"the opcode {name}")

    def _push(self, value: Any) -> None:
        self._stack.append(value)

    def _since_mark(self) -> list[Any]:
        items, self._stack = self._stack, self._below.pop()
        return items

    def _append(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if type(target) is not list:
            raise _damaged(f"items are added to a {_kind(target)}")
        target += items

    def _set_items(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if type(target) is not dict or len(items) % 2:
            raise _damaged(f"items are set in a {_kind(target)}")
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[_text_key(key)] = value

    def _restore(self, target: Any, state: Any) -> None:
        if isinstance(target, _Name):
            raise _refused(f"changing {target.name}")
        if not isinstance(target, _Array | _Dtype):
            raise _damaged(f"a {_kind(target)} is given a state")
        target.restore(state, self._allowance)


def _last(stack: list[Any], count: int) -> list[Any]:
    if len(stack) < count:
        raise _damaged("its stack runs empty")
    return stack[-count:]


def _allowed(module: Any, attribute: Any) -> Any:
    if not isinstance(module, str) or not isinstance(attribute, str):
        raise _damaged("a name is no text")
    if module.partition(".")[0] == "torch":
        raise _not_state(_PYTORCH)
    try:
        return _ALLOWED[module, attribute]
    except KeyError:
        raise _refused(cut(repr(f"{module}.{attribute}")[1:-1])) from None


def _kind(value: Any) -> str:
    if isinstance(value, _Array):
        return "numpy array"
    return value.name if isinstance(value, _Name) else type(value).__name__


# --- loading ----------------------------------------------------------------------------------------------------------


def load_checkpoint(path: Path) -> dict[str, NDArray[Any]]:
    """Read the checkpoint at `path` (with or without `.pdparams`) into read-only arrays by parameter name.

    Nothing in the file is executed. Paddle's table of internal names is dropped, arrays that old protocols split are
    joined, and bfloat16 arrays stay the uint16 bits Paddle stores (`fit_weights` decodes them). With EMA training
    PaddleDetection already keeps the averaged weights in `.pdparams`; a `.pdema` beside it (the raw weights) is loaded
    only when it is the path asked for. Memory used is about the size of the file.

    Raises `CheckpointError` when the file is missing, empty, damaged, not a flat dict of number arrays, holds NaN or
    infinity, or names anything to be called or imported that an array does not need.
    """
    path = locate_checkpoint(Path(path))
    try:
        return _load(path)
    except _ProblemError as error:
        raise CheckpointError(f"checkpoint {path} {error.problem}", error.remedy) from error.__cause__


def _load(path: Path) -> dict[str, NDArray[Any]]:
    content, allowance = _unpickle(path)
    if not isinstance(content, dict):
        if content == _PYTORCH_NUMBER:
            raise _not_state(_PYTORCH)
        raise _not_state(f"holds a {_kind(content)}, not a dict of parameter name to array")
    content.pop(_NAME_TABLE, None)
    split = content.pop(_SPLIT_TABLE, None)
    weights = {name: _array(name, value, allowance) for name, value in content.items()}
    if split is not None:
        _join(weights, split, allowance)
    if not weights:
        raise _not_state("holds no weights")
    for name, array in weights.items():
        if not is_finite(array):
            remedy = "Use a checkpoint from before training diverged."
            raise _ProblemError(f"has NaN or infinity in {shown(name)}", remedy)
    return weights


def is_finite(array: NDArray[Any]) -> bool:
    if array.dtype == np.uint16:  # bfloat16: infinity and NaN have every bit of the exponent set
        return not bool(((array & 0x7F80) == 0x7F80).any())
    return array.dtype.kind != "f" or bool(np.isfinite(array).all())


def locate_checkpoint(path: Path) -> Path:
    """The file that `path` means, with or without `.pdparams`. Raises `CheckpointError` if there is none."""
    candidates = [path] if path.suffix in _SUFFIXES else [path, path.with_name(path.name + ".pdparams")]
    try:
        candidate = next((candidate for candidate in candidates if candidate.is_file()), None)
        if candidate is None:
            if path.is_dir():
                raise CheckpointError(f"checkpoint {path} is a folder", "Pass the .pdparams file inside it.")
            if path.exists():
                raise CheckpointError(f"checkpoint {path} is not a regular file", "Pass a .pdparams file.")
            raise CheckpointError(f"checkpoint {candidates[-1]} does not exist", "Check the path.")
    except OSError as error:  # a name that is too long, or a folder that may not be entered
        problem = f"checkpoint {cut(str(path))} cannot be read: {error.strerror or error}"
        raise CheckpointError(problem, "Check the path.") from error
    if candidate.suffix == ".pdopt":
        raise CheckpointError(f"{candidate} is the optimizer's state, not weights", REMEDY_OPTIMIZER)
    return candidate


def _unpickle(path: Path) -> tuple[Any, _Allowance]:
    """What the pickle holds, with stand-ins for arrays; and what may still be made of it."""
    try:
        size = path.stat().st_size
        if size == 0:
            raise _ProblemError("is empty", _REMEDY_DAMAGED)
        with path.open("rb") as file:
            if (first := file.read(2))[:1] != pickle.PROTO:
                if first == b"PK":
                    raise _not_state("is a zip file, as PyTorch writes checkpoints")
                raise _not_state("is not a PaddleDetection checkpoint, or is damaged")
            file.seek(0)
            allowance = _Allowance(size)
            return _Machine(allowance).run(_Bounded(file, size)), allowance
    except _ProblemError:
        raise
    except OSError as error:
        raise _ProblemError(f"cannot be read: {error.strerror or error}", "Check the file.") from error
    except Exception as error:  # damaged bytes can raise nearly anything
        cut_off = isinstance(error, EOFError) or any(
            said in str(error) for said in ("not enough data", "exhausted", "truncated")
        )
        raise _ProblemError("is cut off before its end" if cut_off else "is damaged", _REMEDY_DAMAGED) from error


def _array(name: str, value: Any, allowance: _Allowance) -> NDArray[Any]:
    if isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], str):
        value = value[1]  # a tensor saved outside a state_dict: (Paddle's name, array)
    if not isinstance(value, _Array):
        if name in ("LR_Scheduler", "master_weights"):
            raise _ProblemError("is the optimizer's state, not weights", REMEDY_OPTIMIZER)
        raise _not_state(f"has {shown(name)}, which is a {_kind(value)}, not an array")
    return value.build(allowance)


def _join(weights: dict[str, NDArray[Any]], split: Any, allowance: _Allowance) -> None:
    try:
        for name, entry in split.items():
            parts = [weights.pop(part) for part in entry["slices"]]
            shape = entry["OriginShape"]
            if len(shape) > _MOST_DIMENSIONS or not all(type(size) is int and 0 <= size < 2**48 for size in shape):
                raise _damaged("the table of split arrays has no shapes")
            allowance.pay(sum(part.nbytes for part in parts))
            weights[name] = np.concatenate(parts).reshape(shape)
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise _damaged("the table of split arrays does not fit") from error
