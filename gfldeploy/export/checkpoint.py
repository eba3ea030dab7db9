"""Load a PaddleDetection checkpoint without trusting it, and put weights into a model.

A `.pdparams` file is a pickle, and a pickle can name any function and have it called. Here a name outside a short list
is refused, and the names on the list never reach numpy: each is answered by a stand-in that checks what it is given
and collects plain bytes. The arrays are made from those bytes afterwards, so that neither a callable of numpy nor
numpy's own restoring of dtypes and arrays (which trusts its input) sees anything from the file.
"""

from __future__ import annotations

import pickle
import pickletools
import re
import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from gfldeploy.errors import CheckpointError

__all__ = ["fit_weights", "load_checkpoint", "locate_checkpoint", "random_weights"]

_SUFFIXES = (".pdparams", ".pdema")
_NAME_TABLE = "StructuredToParameterName@@"  # Paddle's own parameter names; the state_dict's names are what matters
_SPLIT_TABLE = "UnpackBigParamInfor@@"  # pickle protocols 2 and 3: arrays over 1 GiB are stored in slices
_REMEDY_DAMAGED = "Copy or download the checkpoint again."
_REMEDY_UNSAFE = (
    "Do not use this file unless you trust its source; a checkpoint that paddle.save wrote needs none of it."
)
_REMEDY_STATE = "Pass the .pdparams file of a detector: a state_dict saved with paddle.save."


class _RefusedError(Exception):
    """The pickle asks for something that no state_dict of arrays needs."""


class _DamagedError(Exception):
    """The pickle is well-formed but its arrays are not."""


# --- stand-ins for what a pickled array names -------------------------------------------------------------------------


class _Name:
    """What an allowed name of the pickle stands for: calling it calls our function; nothing else can be done to it."""

    __slots__ = ("_function", "_name")

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        self._name = name
        self._function = function

    def __call__(self, *args: Any) -> Any:
        try:
            return self._function(*args)
        except (TypeError, ValueError) as error:
            raise _DamagedError(f"{self._name} is called with the wrong arguments") from error

    def __setstate__(self, state: Any) -> None:
        raise _RefusedError(f"changing {self._name}")


_DTYPE = re.compile(r"[<>=|]?(?:b1|[iu][1248]|f[248])\Z")


class _Dtype:
    """A pickled numpy.dtype of plain numbers."""

    __slots__ = ("order", "spec")

    def __init__(self, spec: str) -> None:
        self.spec = spec
        self.order = spec[0] if spec[0] in "<>" else "="

    def __setstate__(self, state: Any) -> None:
        # (version, byte order, subarray, names, fields, item size, alignment, flags); plain numbers have no parts.
        if not isinstance(state, tuple) or len(state) < 5 or state[1] not in ("<", ">", "=", "|"):
            raise _DamagedError("a dtype is malformed")
        if any(part is not None for part in state[2:5]):
            raise _RefusedError("a structured dtype")
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

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, tuple) or len(state) != 5:
            raise _DamagedError("an array is malformed")
        self.fill(*state[1:])

    def fill(self, shape: Any, dtype: Any, fortran: Any, data: Any) -> None:
        if not isinstance(dtype, _Dtype):
            raise _DamagedError("an array has no dtype")
        if isinstance(data, str):  # protocol 2 may keep bytes as latin-1 text
            data = data.encode("latin-1")
        if not isinstance(data, bytes | bytearray):
            raise _DamagedError("an array has no bytes")
        if not isinstance(shape, tuple) or not all(type(size) is int and size >= 0 for size in shape):
            raise _DamagedError("an array has no shape")
        self.shape, self.dtype, self.fortran, self.data = shape, dtype, bool(fortran), data

    def build(self) -> NDArray[Any]:
        """A read-only view of the bytes; only a foreign byte order is copied."""
        if self.dtype is None:
            raise _DamagedError("an array was never filled")
        dtype = self.dtype.build()
        count = 1
        for size in self.shape:
            count *= size
        if count * dtype.itemsize != len(self.data):
            raise _DamagedError(f"an array of shape {self.shape} has {len(self.data)} bytes")
        array = np.frombuffer(self.data, dtype).reshape(self.shape, order="F" if self.fortran else "C")
        array = array if dtype.isnative else array.astype(dtype.newbyteorder("="))
        array.flags.writeable = False
        return array


_NDARRAY = _Name("numpy.ndarray", lambda *args: _refuse("calling numpy.ndarray"))


def _refuse(what: str) -> Any:
    raise _RefusedError(what)


def _make_dtype(spec: Any, *_: Any) -> _Dtype:
    if not isinstance(spec, str) or not _DTYPE.match(spec):
        raise _RefusedError(f"an array of dtype {spec if isinstance(spec, str) else type(spec).__name__!r}")
    return _Dtype(spec)


def _reconstruct(kind: Any, shape: Any, code: Any) -> _Array:
    if kind is not _NDARRAY:
        raise _RefusedError("an array of another class than numpy.ndarray")
    return _Array()


def _scalar(dtype: Any, data: Any = b"") -> _Array:
    array = _Array()
    array.fill((), dtype, False, data)
    return array


def _from_buffer(data: Any, dtype: Any, shape: Any, order: Any) -> _Array:
    array = _Array()
    array.fill(shape, dtype, order == "F", data)
    return array


def _encode(text: Any, encoding: Any = "latin1") -> bytes:
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise _RefusedError("_codecs.encode with another encoding than latin1")
    return text.encode("latin-1")


def _ordered_dict(*args: Any) -> dict[Any, Any]:
    return dict(*args)


def _tuple(*args: Any) -> tuple[Any, ...]:
    return tuple(*args)


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

# Opcodes that reach objects in another way than by a name: persistent ids, copyreg's registry, instances, buffers.
_REFUSED_OPCODES = {
    "PERSID": "a persistent id",
    "BINPERSID": "a persistent id",
    "EXT1": "an entry of the extension registry",
    "EXT2": "an entry of the extension registry",
    "EXT4": "an entry of the extension registry",
    "INST": "an instance",
    "OBJ": "an instance",
    "NEWOBJ": "an instance",
    "NEWOBJ_EX": "an instance",
    "NEXT_BUFFER": "an out-of-band buffer",
    "READONLY_BUFFER": "an out-of-band buffer",
}


class _SafeUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ALLOWED[module, name]
        except KeyError:
            raise _RefusedError(f"{module}.{name}") from None

    def persistent_load(self, pid: Any) -> Any:
        raise _RefusedError("a persistent id")


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


def _scan(file: Any) -> None:
    """Walk the opcodes without running them."""
    for count, (opcode, argument, _) in enumerate(pickletools.genops(file), start=1):
        if opcode.name in _REFUSED_OPCODES:
            raise _RefusedError(_REFUSED_OPCODES[opcode.name])
        if opcode.name == "GLOBAL":  # its argument is "module name"; a space in either could only hide something
            pair = tuple(str(argument).split(" ", 1))
            if pair not in _ALLOWED:
                raise _RefusedError(str(argument).replace(" ", "."))
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and isinstance(argument, int) and argument > count:
            raise _DamagedError(
                "its memo is out of order"
            )  # a huge index would make the unpickler reserve that much memory


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
        content = _unpickle(path)
        if isinstance(content, dict):
            content.pop(_NAME_TABLE, None)
            split = content.pop(_SPLIT_TABLE, None)
            weights = {_key(path, key): _array(path, key, value) for key, value in content.items()}
            if split is not None:
                _join(weights, split)
    except _RefusedError as refused:
        raise CheckpointError(
            f"checkpoint {path} was refused, it is not plain weights: it contains {refused}", _REMEDY_UNSAFE
        ) from None
    except _DamagedError as damaged:
        raise CheckpointError(f"checkpoint {path} is damaged: {damaged}", _REMEDY_DAMAGED) from None
    if not isinstance(content, dict):
        raise CheckpointError(
            f"checkpoint {path} holds a {_kind(content)}, not a dict of parameter name to array", _REMEDY_STATE
        )
    if not weights:
        raise CheckpointError(f"checkpoint {path} holds no weights", _REMEDY_STATE)
    for name, array in weights.items():
        if not _finite(array):
            raise CheckpointError(
                f"checkpoint {path} has NaN or infinity in {name!r}", "Use a checkpoint from before training diverged."
            )
    return weights


def _finite(array: NDArray[Any]) -> bool:
    if array.dtype == np.uint16:  # bfloat16: infinity and NaN have every bit of the exponent set
        return not bool(((array & 0x7F80) == 0x7F80).any())
    return array.dtype.kind != "f" or bool(np.isfinite(array).all())


def locate_checkpoint(path: Path) -> Path:
    """The file that `path` means, with or without `.pdparams`. Raises `CheckpointError` if there is none."""
    candidates = [path] if path.suffix in _SUFFIXES else [path, path.with_name(path.name + ".pdparams")]
    for candidate in candidates:
        if candidate.is_file():
            break
    else:
        if path.is_dir():
            raise CheckpointError(f"checkpoint {path} is a folder", "Pass the .pdparams file inside it.")
        raise CheckpointError(f"checkpoint {candidates[-1]} does not exist", "Check the path.")
    if candidate.suffix == ".pdopt":
        raise CheckpointError(
            f"{candidate} is the optimizer's state, not weights", "Pass the .pdparams file beside it."
        )
    return candidate


def _unpickle(path: Path) -> Any:
    try:
        size = path.stat().st_size
        if size == 0:
            raise CheckpointError(f"checkpoint {path} is empty", _REMEDY_DAMAGED)
        with path.open("rb") as file:
            if file.read(1) != pickle.PROTO:
                raise CheckpointError(f"{path} is not a PaddleDetection checkpoint, or is damaged", _REMEDY_STATE)
            bounded = _Bounded(file, size)
            file.seek(0)
            _scan(bounded)
            file.seek(0)
            return _SafeUnpickler(bounded).load()
    except (CheckpointError, _RefusedError, _DamagedError):
        raise
    except OSError as error:
        reason = error.strerror or error
        raise CheckpointError(f"checkpoint {path} cannot be read: {reason}", "Check the file.") from error
    except Exception as error:  # unpickling damaged bytes can raise nearly anything
        cut = isinstance(error, EOFError) or "truncated" in str(error) or "exhausted" in str(error)
        problem = "is cut off before its end" if cut or "not enough data" in str(error) else "is damaged"
        raise CheckpointError(f"checkpoint {path} {problem}", _REMEDY_DAMAGED) from error


def _kind(value: Any) -> str:
    if isinstance(value, _Array):
        return "numpy array"
    return value._name if isinstance(value, _Name) else type(value).__name__


def _key(path: Path, key: Any) -> str:
    if not isinstance(key, str):
        raise CheckpointError(f"checkpoint {path} has a {_kind(key)} among its parameter names", _REMEDY_STATE)
    return key


def _array(path: Path, key: Any, value: Any) -> NDArray[Any]:
    if isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], str):
        value = value[1]  # a tensor saved outside a state_dict: (Paddle's name, array)
    if not isinstance(value, _Array):
        raise CheckpointError(f"checkpoint {path}: {key!r} is a {_kind(value)}, not an array", _REMEDY_STATE)
    return value.build()


def _join(weights: dict[str, NDArray[Any]], split: Any) -> None:
    try:
        for name, entry in split.items():
            parts = [weights.pop(part) for part in entry["slices"]]
            weights[name] = np.concatenate(parts).reshape(entry["OriginShape"])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise _DamagedError("the table of split arrays does not fit") from error


# --- into the model ---------------------------------------------------------------------------------------------------


def fit_weights(model: Any, weights: Mapping[str, NDArray[Any]]) -> None:
    """Set every parameter and buffer of `model` (a paddle Layer) from `weights`, converted to the model's dtype.

    Names and shapes must agree both ways; nothing is set unless all do. One kind of extra name is accepted: where
    the file holds a whole distillation model, `student_model.*` is the detector and `teacher_model.*` and
    `distill_loss.*` exist for training only. uint16 arrays for float parameters are Paddle's bfloat16.

    Raises `CheckpointError` that counts the missing, unexpected and misshapen names and gives the first of each.
    """
    weights = _student(weights)
    state: dict[str, Any] = model.state_dict()
    missing = [name for name in state if name not in weights]
    unexpected = [name for name in weights if name not in state]
    misshapen = [
        f"{name} ({_shape(weights[name].shape)} instead of {_shape(tensor.shape)})"
        for name, tensor in state.items()
        if name in weights and list(weights[name].shape) != list(tensor.shape)
    ]
    problems = [
        f"{len(names)} {what} ({_first(names)})"
        for names, what in ((missing, "missing"), (unexpected, "unexpected"), (misshapen, "of the wrong shape"))
        if names
    ]
    if problems:
        raise CheckpointError(
            f"the checkpoint does not fit the config: of {len(state)} parameters, {', '.join(problems)}",
            "Use the config this checkpoint was trained with.",
        )
    for name, tensor in state.items():
        tensor.set_value(_as(weights[name], str(tensor.dtype).rpartition(".")[2]))


def _student(weights: Mapping[str, NDArray[Any]]) -> Mapping[str, NDArray[Any]]:
    prefix, training_only = "student_model.", ("teacher_model.", "distill_loss.")
    if not all(name.startswith((prefix, *training_only)) for name in weights):
        return weights
    return {name.removeprefix(prefix): array for name, array in weights.items() if name.startswith(prefix)}


def _shape(shape: Iterable[int]) -> str:
    return "x".join(str(size) for size in shape) or "scalar"


def _first(names: list[str], limit: int = 3) -> str:
    return ", ".join(names[:limit]) + (", ..." if len(names) > limit else "")


def _as(array: NDArray[Any], dtype: str) -> NDArray[Any]:
    if array.dtype == np.uint16 and dtype.startswith("float"):
        array = (array.astype(np.uint32) << 16).view(np.float32)
    return np.require(array, dtype=dtype, requirements=["C"])


# --- random weights ---------------------------------------------------------------------------------------------------


def random_weights(model: Any, seed: int) -> None:
    """Give `model` weights that depend on `seed` and the parameter names only, and that exercise the whole graph.

    The values a freshly built model has would hide most export errors: normalisation statistics are 0 and 1, the
    class scores nearly constant. Here convolutions are He-normal, BatchNorm statistics and every scale and shift are
    random, residual branches are damped so that activations stay near 1 through 101 layers, and the head's last
    convolutions are scaled so that class logits spread over several units (scores over most of 0..1) and box distances
    over most of 0..reg_max. Fixed buffers (the projection 0..reg_max) keep their values.
    """
    if seed < 0:
        raise ValueError(f"seed must not be negative, not {seed}")
    state: dict[str, Any] = model.state_dict()
    for name, tensor in state.items():
        if name.endswith("distribution_project.project"):
            continue
        rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
        values = _draw(rng, name, tuple(int(size) for size in tensor.shape), state.keys())
        tensor.set_value(_as(values, str(tensor.dtype).rpartition(".")[2]))


def _draw(rng: np.random.Generator, name: str, shape: tuple[int, ...], names: Iterable[str]) -> NDArray[np.float64]:
    owner, _, kind = name.rpartition(".")
    if kind == "_mean":
        return rng.normal(0.0, 0.1, shape)
    if kind in ("_variance", "scale_reg"):
        return rng.uniform(0.5, 1.5, shape)
    if len(shape) >= 2:
        fan_in = int(np.prod(shape[1:])) if len(shape) > 2 else shape[0]
        return rng.normal(0.0, _spread(name) / np.sqrt(fan_in), shape)
    if kind == "bias":
        # The class bias keeps most scores low, as in a trained detector.
        return rng.normal(-3.0 if "gfl_head_cls" in name else 0.0, 0.1, shape)
    damping = 0.15 if _ends_branch(owner, names) else 1.0
    return rng.uniform(0.5, 1.5, shape) * damping


def _spread(name: str) -> float:
    """Standard deviation of a convolution's output where its input has a mean square of 1."""
    if "gfl_head_cls" in name or "gfl_head_reg" in name:
        return 1.5
    if "offset" in name:  # deformable convolution: displacements of a fraction of a pixel
        return 0.1
    if name.startswith("neck."):  # no ReLU follows
        return 1.0
    return float(np.sqrt(2.0))


def _ends_branch(owner: str, names: Iterable[str]) -> bool:
    """Whether `owner` normalises the last convolution of a ResNet block's residual branch."""
    block, found, _ = owner.rpartition(".branch2")
    if not found:
        return False
    last = "c" if any(name.startswith(f"{block}.branch2c.") for name in names) else "b"
    return owner.startswith(f"{block}.branch2{last}.")
