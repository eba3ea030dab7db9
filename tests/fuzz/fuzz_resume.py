"""What an unfinished prediction left: its batches are used or made again, and the results can be written from them."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from pathlib import Path

import mutations

from gfldeploy.predict.outputs import write_outputs
from gfldeploy.predict.pipeline import in_order
from gfldeploy.predict.resume import WorkingFile

_QUESTION = {"schema": 1, "bundle": "ab" * 32, "images": ["a.jpg", "b.jpg", "c.jpg"]}
_BOX = {"class": "ball", "class_id": 1, "score": 0.75, "bbox": [1.5, 2.0, 30.0, 40.25]}


def seeds() -> Iterable[bytes]:
    """Working files: the question, batches, the end."""
    found = {"file": "a.jpg", "width": 64, "height": 48, "detections": [_BOX]}
    frame = {"file": "b.mp4", "frame": 0, "time_s": 0.0, "width": 64, "height": 48, "detections": []}
    batches = [
        {"batch": 0, "images": [[0, found], [2, {"file": "c.jpg", "error": "it is empty"}]]},
        {"batch": 1, "images": [[1, {**frame, "may_lack_below": 0.5}]]},
    ]
    lines = [json.dumps(entry) for entry in (_QUESTION, *batches, {"end": True})]
    yield "".join(f"{line}\n" for line in lines).encode()
    yield "".join(f"{line}\n" for line in lines[:2]).encode() + lines[2][:20].encode()


def mutate(data: bytes, rng: random.Random) -> bytes:
    """Of the lines after the first, which has to be that question, one is damaged."""
    lines = data.split(b"\n")
    place = rng.randrange(1, len(lines))
    return b"\n".join([*lines[:place], mutations.mutate(lines[place], rng), *lines[place + 1 :]])


def one(data: bytes, folder: Path) -> None:
    """Take up the work, and write what is done."""
    path = folder / "working.jsonl"
    path.write_bytes(data)
    with WorkingFile(path, _QUESTION, 3, 2) as working:
        records = list(in_order(working.groups()))
    write_outputs(folder, records, ("box", "ball"))
