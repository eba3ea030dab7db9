"""Checkpoints: pickles as paddle.save writes them, changed byte by byte and opcode by opcode."""

from __future__ import annotations

import contextlib
import itertools
import pickle
import pickletools
import random
import struct
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from mutations import mutate_bytes

from gfldeploy.export.checkpoint import load_checkpoint

_ARRAYS = {
    "backbone.conv.weight": np.arange(24, dtype=np.float32).reshape(2, 3, 2, 2),
    "norm._mean": np.array([0.5, -0.5], dtype=">f2"),
    "head.steps": np.array([3], dtype=np.int64),
    "bits": np.array([16000, 3], dtype=np.uint16),
}
_SPLIT = {
    "w@@.0": np.arange(4, dtype=np.float32),
    "w@@.1": np.arange(2, dtype=np.float32),
    "UnpackBigParamInfor@@": {"w": {"OriginShape": (2, 3), "slices": ["w@@.0", "w@@.1"]}},
    "StructuredToParameterName@@": {"w": "conv2d_0.w_0"},
}
_NAMES = (
    *(b"cnumpy\nndarray\n", b"cnumpy\ndtype\n", b"c_codecs\nencode\n", b"cbuiltins\ntuple\n", b"cos\nsystem\n"),
    *(b"ccollections\nOrderedDict\n", b"cnumpy.core.multiarray\n_reconstruct\n", b"cnumpy.core.numeric\n_frombuffer\n"),
    *(b"cnumpy.core.multiarray\nscalar\n",),
)
_VALUES = (
    *(
        b"N",
        b"\x88",
        b"\x89",
        b")",
        b"]",
        b"}",
        b"\x8f",
        b"K\x00",
        b"K\xff",
        b"J\xff\xff\xff\xff",
        b"J\xff\xff\xff\x7f",
    ),
    *(
        b"\x8b" + struct.pack("<i", 100) + b"\x7f" * 100,
        b"X\x01\0\0\0a",
        b"B\x04\0\0\0abcd",
        b"C\x02ab",
        b"G" + b"\x7f" * 8,
    ),
    *(
        b"X\x02\0\0\0f4",
        b"X\x06\0\0\0latin1",
        b"U\x01a",
        b"I1\n",
        b"L7L\n",
        b"Vx\n",
        b"S'x'\n",
        b"\x96" + struct.pack("<Q", 1) + b"a",
    ),
)
_DOINGS = (
    *(b"(", b".", b"0", b"1", b"2", b"R", b"b", b"s", b"u", b"a", b"e", b"t", b"l", b"d", b"\x85", b"\x86", b"\x87"),
    *(b"\x93", b"\x94", b"h\x00", b"q\x00", b"q\x01", b"h\x01", b"r\xff\xff\xff\x7f", b"p9\n", b"g0\n", b"j\x05\0\0\0"),
    *(b"\x81", b"\x92", b"o", b"\x90", b"\x91", b"Q", b"\x82\x01", b"\x97", b"\x98", b"\x95" + struct.pack("<Q", 9)),
)


def seeds() -> Iterable[bytes]:
    for protocol in (2, 3, 4, 5):
        yield pickle.dumps(_ARRAYS, protocol)
        yield pickle.dumps(OrderedDict(_SPLIT), protocol)
    yield b"\x80\x04}(" + b"".join(b"X\x01\0\0\0" + bytes([97 + i]) + b"]" for i in range(20)) + b"u."


def one(data: bytes, folder: Path) -> object:
    path = folder / "model.pdparams"
    path.write_bytes(data)
    return load_checkpoint(path)


def mutate(data: bytes, rng: random.Random) -> bytes:
    if rng.random() < 0.3:
        return mutate_bytes(data, rng)
    places = [0]
    with contextlib.suppress(Exception):  # up to where it can be read
        places += [position for _, _, position in itertools.islice(pickletools.genops(data), 20000) if position]
    for _ in range(rng.choice((1, 1, 2, 4, 8))):
        at = rng.choice(places)
        piece = rng.choice(rng.choice((_NAMES, _VALUES, _DOINGS)))
        if rng.random() < 0.3:  # a piece of the file again, many times perhaps
            piece = data[at : rng.choice(places)][:10000] or piece
        piece *= rng.choice((1, 1, 1, 2, 100, 20000)) if len(data) < 10**5 else 1
        data = data[:at] + piece + data[at + rng.choice((0, 0, 1, 2)) :]
    return data[: 2 * 10**6]
