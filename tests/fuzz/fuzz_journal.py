"""What an unfinished benchmark left: its answers, found again or not, and never more than that."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))

from sample_results import OK, RUN

from gfldeploy.bench.journal import Journal
from gfldeploy.bench.results import CellResult, Run
from gfldeploy.serialization import build, plain

_QUESTION = {"schema": 1, "kind": "timing", "cell": {"engine": "onnxruntime"}, "round": 0}


def seeds() -> Iterable[bytes]:
    """The file of one answer."""
    yield json.dumps({"question": _QUESTION, "answer": plain(RUN)}).encode()
    yield json.dumps({"question": _QUESTION, "answer": plain(OK)}).encode()


def one(data: bytes, folder: Path) -> None:
    """Find the answer, and read it."""
    journal = Journal(folder)
    journal.keep(_QUESTION, {})
    (path,) = folder.iterdir()
    path.write_bytes(data)
    answer = journal.find(_QUESTION)
    if answer is not None:
        build(Run if "samples" in answer else CellResult, answer, "the answer")
