"""Text from elsewhere, such as class names, file names and messages, made safe to show."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from typing import TypeVar

Value = TypeVar("Value")

# Besides control characters (Cc): marks and overrides of direction, tags, line separators, halves of a pair.
_HIDDEN = {0x061C, 0x200E, 0x200F, 0xFEFF, *range(0x202A, 0x202F), *range(0x2066, 0x206A), *range(0xE0000, 0xE0080)}
_CATEGORIES = ("Cc", "Cs", "Zl", "Zp")
_MOST_COMPARED = 80  # characters of a word
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "\uff1d", "\uff0b", "\uff0d", "\uff20")  # full-width ones too


def printable(text: str, keep: str = "\n\t") -> str:
    """`text` with control characters and marks of direction, except those to `keep`, written as Python does (`\\x1b`).

    A terminal would obey them: an escape sequence could retitle a window, or hide and forge lines.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(one if one in keep or not _obeyed(one) else _written(one) for one in text)


def spreadsheet_cell(value: Value) -> Value | str:
    """`value`; text that a spreadsheet would take for a formula gets an apostrophe before it, numbers do not."""
    if not isinstance(value, str) or not value.startswith(_FORMULA):
        return value
    try:
        float(value)
    except ValueError:
        return f"'{value}"
    return value


def first_of(items: Iterable[object], shown: int = 1) -> str:
    """The first of these items, each cut to 200 characters, and how many more there are."""
    texts = [str(one) for one in items]
    first = ", ".join(one if len(one) <= 200 else f"{one[:100]} ..." for one in texts[:shown])
    return f"{first} and {len(texts) - shown} more" if len(texts) > shown else first


def meant(word: str, names: Sequence[str]) -> str | None:
    """A remedy that lists those of the names that the word may stand for."""
    folded = {name.casefold(): name for name in reversed(names)}
    near = get_close_matches(word[:_MOST_COMPARED].casefold(), folded, 3)
    return f"Did you mean {' or '.join(repr(folded[one]) for one in near)}?" if near else None


def _obeyed(character: str) -> bool:
    if character == "\x7f":  # terminals pass over it, and JSON holds it as it is
        return False
    return unicodedata.category(character) in _CATEGORIES or ord(character) in _HIDDEN


def _written(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
