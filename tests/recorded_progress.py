"""Progress that tests can look at."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["RecordedProgress"]


@dataclass
class RecordedProgress:
    """`lines`: stages and notes in their order, notes with "note: " before them."""

    lines: list[str] = field(default_factory=list)
    steps: list[tuple[str, int, int]] = field(default_factory=list)

    def stage(self, text: str) -> None:
        self.lines.append(text)

    def step(self, label: str, done: int, total: int) -> None:
        self.steps.append((label, done, total))

    def note(self, text: str) -> None:
        self.lines.append(f"note: {text}")
