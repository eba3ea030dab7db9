"""What a long function told, kept for a test to look at."""

from __future__ import annotations


class RecordedProgress:
    """`Progress` that keeps everything."""

    def __init__(self) -> None:
        self.stages: list[str] = []
        self.steps: list[tuple[str, int, int]] = []
        self.notes: list[str] = []

    def stage(self, text: str) -> None:
        self.stages.append(text)

    def step(self, label: str, done: int, total: int) -> None:
        self.steps.append((label, done, total))

    def note(self, text: str) -> None:
        self.notes.append(text)
