"""What a benchmark has finished so far, on disk: an interrupted one resumes where it stopped."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gfldeploy.files import read_json, scratch_directory, unfinished_beside, write_json

_MADE = r"[0-9a-f]{64}\.(json|npz)"


class Journal:
    """Answers of finished processes, one file each, found again by what was asked.

    The question holds everything that the answer depends on (the bundle's digest, the settings, the data, the machine
    and its software, ...), so that an answer is never used for another question.
    """

    def __init__(self, directory: Path) -> None:
        """Keep the files in `directory`, which exists."""
        self._directory = directory
        self._kept: set[Path] = set()

    def find(self, question: Mapping[str, Any]) -> dict[str, Any] | None:
        """The answer to this question, if there is one. A damaged file is none."""
        try:
            entry = read_json(self._path(question))
        except (OSError, ValueError):
            return None
        if not isinstance(entry, dict) or entry.get("question") != json.loads(_canonical(question)):
            return None
        answer = entry.get("answer")
        return answer if isinstance(answer, dict) else None

    def file(self, question: Mapping[str, Any]) -> Path:
        """A file for what the answer to this question has besides: made by whoever answers, good if it is kept."""
        return self._path(question).with_suffix(".npz").absolute()

    def keep(self, question: Mapping[str, Any], answer: Mapping[str, Any]) -> None:
        """Write the answer, in one step. Raises `OutputError`."""
        write_json(self._path(question), {"question": question, "answer": answer})
        self._kept.add(self._path(question))

    def kept_now(self, question: Mapping[str, Any]) -> bool:
        """Whether the answer is this run's own, rather than of one before it."""
        return self._path(question) in self._kept

    def _path(self, question: Mapping[str, Any]) -> Path:
        return self._directory / f"{hashlib.sha256(_canonical(question).encode()).hexdigest()}.json"


@contextmanager
def journal_beside(output: Path | None, command: str) -> Iterator[Journal]:
    """The journal of `command` for the file `output`: a folder beside it, removed when the block ends without an error.

    Without a file it is a temporary folder, always removed. An error or an interruption leaves what is in it for the
    next run, and so does a kill. Raises `OutputError` if another process is measuring for the same file, or the folder
    cannot be written or is somebody else's.
    """
    if output is None:
        with scratch_directory() as folder:
            yield Journal(folder)
        return
    with unfinished_beside(output, command, _MADE) as unfinished:
        try:
            yield Journal(unfinished.directory)
        finally:
            unfinished.worth_keeping = any(unfinished.directory.glob("*.json"))


def _canonical(question: Mapping[str, Any]) -> str:
    return json.dumps(question, sort_keys=True)
