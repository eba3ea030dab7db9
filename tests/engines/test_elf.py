"""What a shared library needs, read from the file: what the linker reads, and nothing but an error of damaged ones."""

from __future__ import annotations

import ctypes
import random
from pathlib import Path

import pytest
from fake_gpu import shared_library

from gfldeploy.engines.elf import SharedLibrary, read_shared_library


def test_a_library_of_the_system() -> None:
    mapped = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "libm.so.6" in line}
    (found,) = (read_shared_library(Path(path)) for path in mapped or {"/lib/x86_64-linux-gnu/libm.so.6"})
    assert found.soname == "libm.so.6" and "libc.so.6" in found.needed


def test_what_the_linker_reads(tmp_path: Path) -> None:
    inner, outer = tmp_path / "libinner.so.2", tmp_path / "libouter.so"
    inner.write_bytes(shared_library("libinner.so.2", ["libc.so.6"]))
    outer.write_bytes(shared_library(None, ["libinner.so.2", "libc.so.6"], "$ORIGIN:/nowhere"))
    assert read_shared_library(inner) == SharedLibrary("libinner.so.2", ("libc.so.6",), ())
    assert read_shared_library(outer) == SharedLibrary(None, ("libinner.so.2", "libc.so.6"), ("$ORIGIN", "/nowhere"))
    ctypes.CDLL(str(outer))  # which finds the other beside it
    lost = tmp_path / "libother.so"
    lost.write_bytes(shared_library(None, ["libnowhere.so.1"]))
    with pytest.raises(OSError, match="libnowhere"):
        ctypes.CDLL(str(lost))


def test_anything_else_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "file.so"
    whole = shared_library("libwhole.so.1", ["libc.so.6", "libm.so.6"], "$ORIGIN")
    for other in (b"", b"\x7fELF", b"#!/bin/sh\n" * 9, bytes(5000), whole[:200], b"\x7fELF\x01\x01" + whole[6:]):
        path.write_bytes(other)
        with pytest.raises(ValueError, match=r"."):
            read_shared_library(path)
    chance = random.Random(0)
    for _ in range(300):
        damaged = bytearray(whole)
        for _ in range(chance.randint(1, 8)):
            damaged[chance.randrange(len(damaged))] = chance.choice((0, 1, 127, 128, 255))
        path.write_bytes(damaged[: chance.randint(len(damaged) // 2, 2 * len(damaged))])
        try:
            found = read_shared_library(path)
        except (ValueError, OSError):
            continue
        assert len(found.needed) <= len(damaged)
