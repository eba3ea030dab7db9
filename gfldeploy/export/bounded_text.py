"""What files from elsewhere say, for messages: bounded, however large it is."""

from __future__ import annotations

import reprlib

_SHORTEN = reprlib.Repr()
_SHORTEN.maxstring = _SHORTEN.maxother = _SHORTEN.maxlong = 80


def shown(value: object) -> str:
    """The value as Python writes it."""
    return _SHORTEN.repr(value)


def cut(text: str, length: int = 200) -> str:
    """The beginning of a text."""
    return text if len(text) <= length else text[:length] + "..."
