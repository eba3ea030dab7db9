"""Asks a Triton server through tritonclient, in an environment of its own, and prints what it answers as JSON.

Usage: triton_client.py http|grpc HOST:PORT MODEL THRESHOLD IMAGE...   (a THRESHOLD of "none" is left out)

All images are sent at once, so that Triton batches them.
"""

from __future__ import annotations

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

_AT_ONCE = 8


def main(protocol: str, address: str, model: str, threshold: str, *images: str) -> None:
    client: Any = import_module(f"tritonclient.{protocol}")
    failure: Any = import_module("tritonclient.utils").InferenceServerException

    def ask(server: Any, path: str) -> dict[str, Any]:
        image = client.InferInput("image", [1, 1], "BYTES")
        image.set_data_from_numpy(np.array([[Path(path).read_bytes()]], np.object_))
        inputs = [image]
        if threshold != "none":
            inputs.append(client.InferInput("threshold", [1, 1], "FP32"))
            inputs[-1].set_data_from_numpy(np.array([[threshold]], np.float32))
        try:
            answer = server.infer(model, inputs)
        except failure as error:
            return {"error": error.message(), "status": str(error.status())}
        whole = answer.get_response()
        names = [one["name"] for one in whole["outputs"]] if protocol == "http" else [one.name for one in whole.outputs]
        values = {name: answer.as_numpy(name)[0].tolist() for name in names}
        return {**values, "names": [name.decode() for name in values.get("names", ())]}

    def ask_all(paths: list[str]) -> list[dict[str, Any]]:
        # A client for each thread: that for HTTP must stay in the thread that made it.
        with client.InferenceServerClient(address) as server:
            return [ask(server, path) for path in paths]

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        parts = list(pool.map(ask_all, [list(images[place::_AT_ONCE]) for place in range(_AT_ONCE)]))
    answers: list[Any] = [None] * len(images)
    for place, part in enumerate(parts):
        answers[place::_AT_ONCE] = part
    print(json.dumps(answers))


if __name__ == "__main__":
    main(*sys.argv[1:])
