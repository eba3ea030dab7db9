"""What an unfinished prediction left: its batches are used or made again, and the results can be written from them."""

from __future__ import annotations

import base64
import json
import random
import struct
from collections.abc import Iterable
from pathlib import Path

import mutations

from gfldeploy.predict.outputs import write_outputs
from gfldeploy.predict.pipeline import Found, in_order
from gfldeploy.predict.resume import WorkingFile

_QUESTION = {"schema": 1, "bundle": "ab" * 32, "images": ["a.jpg", "b.jpg", "c.jpg"]}
# A box, its score, its class.
_BOX = base64.b64encode(struct.pack("<5fi", 1.5, 2.0, 31.5, 42.25, 0.75, 1)).decode()


def seeds() -> Iterable[bytes]:
    """Working files: the question, batches, the end."""
    found = {"index": 0, "file": "a.jpg", "size": [48, 64], "detections": _BOX, "may_lack_below": 0.0}
    frame = {"index": 1, "file": "b.mp4", "frame": 0, "time_s": 0.0, "size": [48, 64], "detections": ""}
    batches = [
        {"shard": 1, "bad": {"0": "it ends its worker"}},
        {"shard": 0, "batch": 0, "batches": [[found, {"index": 2, "file": "c.jpg", "error": "empty", "remedy": None}]]},
        {"shard": 1, "batch": 0, "batches": [[{**frame, "index": 0, "may_lack_below": 0.5}]]},
        {"shard": 0, "batch": 1, "batches": [[{**frame, "may_lack_below": 0.5}]]},
    ]
    ends = [{"shard": 0, "end": 3, "processor": "cpu"}, {"shard": 1, "end": 1, "processor": "cpu"}]
    lines = [json.dumps(entry) for entry in ({"form": 2, **_QUESTION}, *batches, *ends)]
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
    found: list[Found] = []
    with WorkingFile(path, _QUESTION, range(2), 2) as working:
        for shard in range(2):
            groups = [[(image.index, image) for image in group] for group in working.groups(shard)]
            found += in_order(groups if working.ended(shard) else [])
    write_outputs(folder, found, ("box", "ball"))
