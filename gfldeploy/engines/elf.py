"""What a shared library says of itself in its ELF file: its name, the libraries it needs, where it looks for them.

64-bit little-endian ELF, the only kind that runs here. Nothing is loaded, and reading is bounded whatever the file
holds.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

_IDENT = b"\x7fELF\x02\x01"  # 64 bits, little-endian
_LOAD, _DYNAMIC = 1, 2  # types of program headers
_END, _NEEDED, _STRINGS, _STRINGS_BYTES, _SONAME, _RPATH, _RUNPATH = 0, 1, 5, 10, 14, 15, 29  # tags of the dynamic part
_MOST_HEADERS = 256
_MOST_DYNAMIC_BYTES = 1 << 18
_MOST_NEEDED = 1024
_MOST_TEXT = 1 << 14  # bytes; search paths are the longest


@dataclass(frozen=True)
class SharedLibrary:
    """`soname`: what others need it by, None for a library that is opened by its file name. `needed`: the sonames of
    what must be loaded with it. `paths`: the folders where it has them looked for, `$ORIGIN` being its own."""

    soname: str | None
    needed: tuple[str, ...]
    paths: tuple[str, ...]


def read_shared_library(path: Path) -> SharedLibrary:
    """Read the headers of a shared library. Raises `ValueError` for a file that is none, and `OSError`."""
    with path.open("rb") as file:
        try:
            return _read(file)
        except (struct.error, UnicodeDecodeError, OverflowError) as error:
            raise ValueError(f"{path.name} is no shared library, or a damaged one") from error


def _read(file: BinaryIO) -> SharedLibrary:
    ident, place, size, count = struct.unpack("<6s26xQ14xHH6x", file.read(64))
    if ident != _IDENT or size != 56 or count > _MOST_HEADERS:
        raise ValueError("not a 64-bit little-endian ELF file")
    file.seek(place)
    # Type, place in the file, address in memory, bytes in the file.
    headers = [struct.unpack("<I4xQQ8xQ16x", file.read(size)) for _ in range(count)]
    dynamic = next((one for one in headers if one[0] == _DYNAMIC), None)
    if dynamic is None or dynamic[3] > _MOST_DYNAMIC_BYTES:
        raise ValueError("not dynamically linked")
    file.seek(dynamic[1])
    entries: list[tuple[int, int]] = []
    for tag, value in struct.iter_unpack("<QQ", file.read(dynamic[3] // 16 * 16)):
        if tag == _END:
            break
        entries.append((tag, value))
    one_of_each = dict(entries)
    address, length = one_of_each.get(_STRINGS), one_of_each.get(_STRINGS_BYTES, 0)
    segment = next((one for one in headers if one[0] == _LOAD and address and 0 <= address - one[2] < one[3]), None)
    if segment is None or address is None:
        raise ValueError("it has no names")
    strings = segment[1] + address - segment[2]

    def text(offset: int) -> str:
        if offset >= length:
            raise ValueError("a name outside its table")
        file.seek(strings + offset)
        found, end, _ = file.read(min(length - offset, _MOST_TEXT)).partition(b"\0")
        if not end:
            raise ValueError("a name without an end")
        return found.decode()

    needed = [value for tag, value in entries if tag == _NEEDED]
    if len(needed) > _MOST_NEEDED:
        raise ValueError("it needs too many others")
    paths = one_of_each.get(_RUNPATH, one_of_each.get(_RPATH))
    return SharedLibrary(
        soname=text(one_of_each[_SONAME]) if _SONAME in one_of_each else None,
        needed=tuple(map(text, needed)),
        paths=() if paths is None else tuple(filter(None, text(paths).split(":"))),
    )
