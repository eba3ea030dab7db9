"""How long functions say what they do: one protocol for the whole package."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """What a long function tells while it works: pass an object with these methods as `progress`."""

    def stage(self, text: str) -> None:
        """A part of the work begins, and `text` says which."""

    def step(self, label: str, done: int, total: int) -> None:
        """Of the work called `label`, `done` of `total` pieces are done."""

    def note(self, text: str) -> None:
        """The user should know this about the data, the detector or this machine."""


class Silent:
    """Shows nothing; a base for classes that show a part."""

    def stage(self, text: str) -> None:
        pass

    def step(self, label: str, done: int, total: int) -> None:
        pass

    def note(self, text: str) -> None:
        pass


SILENT: Progress = Silent()
