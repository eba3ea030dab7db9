"""Text in any script: for each character a font of the system that has it, else an escape."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterable, Iterator
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from gfldeploy.system import font_folders

if TYPE_CHECKING:
    from PIL.ImageFont import FreeTypeFont, ImageFont

    Font: TypeAlias = "FreeTypeFont | ImageFont"

_SUFFIXES = (".otf", ".ttc", ".ttf")
_NO_CHARACTER = "\U0010ffff"  # no font has it: its picture is that of every character that a font lacks
_PROBED_SIZE = 16
_MOST_CHARACTERS = 80
# The plainest fonts first, and among equals by name, so that a machine always takes the same.
_PLAIN = ("sans", "regular")
_SPECIAL = ("bold", "condensed", "italic", "light", "mono", "oblique", "serif", "thin")


def runs(text: str, size: int) -> Iterator[tuple[str, Font]]:
    """The text, or its first 80 characters, in pieces of one font each, to be drawn one after the other.

    Characters that no font has become the letter without its accent or, like control characters, a code (`\\u4e2d`).
    """
    text = unicodedata.normalize("NFC", text)
    if len(text) > _MOST_CHARACTERS:
        text = text[: _MOST_CHARACTERS - 3] + "..."
    placed: list[tuple[str, Path | None]] = []
    for char in text:
        if _joins(char):  # in the font of the character before it, and left out if that font lacks it
            placed += [(char, placed[-1][1])] if placed and _has(placed[-1][1], char) else []
        elif _has_none(char):
            base = unicodedata.normalize("NFD", char)[0]  # a letter without its accent
            code = char.encode("unicode_escape").decode() if _has_none(base) else base
            placed += [(one, _font_of(one)) for one in code]
        else:
            placed.append((char, _font_of(char)))
    for path, pieces in groupby(placed, lambda one: one[1]):
        yield "".join(char for char, _ in pieces), _font(path, size)


def missing_glyphs(texts: Iterable[str]) -> list[str]:
    """The characters of these texts that no font here has, each once."""
    return [char for char in dict.fromkeys("".join(texts)) if not _joins(char) and _has_none(char)]


def _joins(char: str) -> bool:
    """Accents, joiners and the like, which are drawn with the character before them."""
    return unicodedata.category(char) in ("Cf", "Me", "Mn")


@cache
def _has_none(char: str) -> bool:
    if unicodedata.category(char) in ("Cc", "Cn", "Co", "Cs"):
        return True
    return _font_of(char) is None and not _has(None, char)


@cache
def _font_of(char: str) -> Path | None:
    """The font of the system that has this character; None for Pillow's own, or if none has it."""
    if char.isspace() or _has(None, char):
        return None
    return next((path for path in _system_fonts() if _has(path, char)), None)


def _has(path: Path | None, char: str) -> bool:
    if char.isspace():
        return True
    try:
        font = _font(path, _PROBED_SIZE)
        own, none = (font.getmask(one) for one in (char, _NO_CHARACTER))
    except (OSError, ValueError, UnicodeError):  # no font that can be used
        return False
    return (own.size, bytes(own)) != (none.size, bytes(none))


@cache
def _font(path: Path | None, size: int) -> Font:
    from PIL import ImageFont

    return ImageFont.load_default(size) if path is None else ImageFont.truetype(path, size)


@cache
def _system_fonts() -> tuple[Path, ...]:
    """The font files of the system and of this user, the plainest first."""
    found = {
        Path(name) / file
        for folder in font_folders()
        for name, _, files in os.walk(folder)
        for file in files
        if file.lower().endswith(_SUFFIXES)
    }

    def rank(path: Path) -> tuple[int, str]:
        name = path.name.lower()
        return sum(word in name for word in _SPECIAL) - sum(word in name for word in _PLAIN), str(path)

    return tuple(sorted(found, key=rank))
