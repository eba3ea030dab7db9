"""Servers around a bundle's end_to_end.onnx as their users write them, for `serving.py`, which starts this file.

    python serving_rivals.py paddlex|litserve|fastapi MODEL SHORTER LONGER PORT

All three read images with OpenCV, resize them to the detector's rule (SHORTER, LONGER side), and run the file in
OpenVINO with its latency hint on all cores; NMS is in the file. POST /predict, answered with JSON.

- paddlex: the rule of PaddleX's basic serving: FastAPI, base64 in JSON, one lock around the detector, one image after
  the other. Its reading of images is outside the lock, its drawing of results left out.
- litserve: LitServe with `max_batch_size` and `batch_timeout` as its documentation has them, base64 in JSON. Images of
  a batch are padded to a common size.
- fastapi: FastAPI with a queue and a fixed batch of one's own: raw bytes, batches of up to `MOST` images of whatever
  comes within `WAIT_S`, padded to a common size.

Needs fastapi, uvicorn, litserve and openvino, and nothing of gfldeploy.
"""

import asyncio
import base64
import sys
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

MOST, WAIT_S = 8, 0.01
STRIDE = 32  # sides of the network's input are multiples of it

Image = NDArray[np.uint8]


class PlainDetector:
    def __init__(self, model: str, shorter: int, longer: int) -> None:
        import openvino

        core = openvino.Core()
        self.sides = shorter, longer
        self.compiled: Any = core.compile_model(model, "CPU", {"PERFORMANCE_HINT": "LATENCY"})

    def read(self, content: bytes) -> Image:
        image = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR)
        return np.asarray(cv2.cvtColor(image, cv2.COLOR_BGR2RGB), np.uint8)

    def __call__(self, images: Sequence[Image]) -> list[dict[str, Any]]:
        shorter, longer = self.sides
        factors = [min(shorter / min(one.shape[:2]), longer / max(one.shape[:2])) for one in images]
        resized = [cv2.resize(one, None, fx=f, fy=f) for one, f in zip(images, factors, strict=True)]
        height, width = (-(-max(one.shape[axis] for one in resized) // STRIDE) * STRIDE for axis in (0, 1))
        pixels = np.zeros((len(resized), height, width, 3), np.uint8)
        for place, one in zip(pixels, resized, strict=True):
            place[: one.shape[0], : one.shape[1]] = one
        found = self.compiled(
            {
                "image": pixels,
                "im_shape": np.array([one.shape[:2] for one in resized], np.int32),
                "scale_factor": np.array([(f, f) for f in factors], np.float32),
            }
        )
        boxes, scores, classes, count = (found[name] for name in ("boxes", "scores", "classes", "count"))
        return [
            {"boxes": boxes[k, :n].tolist(), "scores": scores[k, :n].tolist(), "classes": classes[k, :n].tolist()}
            for k, n in enumerate(np.ravel(count).tolist())
        ]


def paddlex(model: str, shorter: int, longer: int, port: int) -> None:
    import uvicorn
    from fastapi import Body, FastAPI

    detector, lock = PlainDetector(model, shorter, longer), asyncio.Lock()
    app = FastAPI()

    @app.post("/predict")
    async def predict(image: str = Body(embed=True)) -> dict[str, Any]:
        pixels = await asyncio.to_thread(lambda: detector.read(base64.b64decode(image)))
        async with lock:
            (found,) = await asyncio.to_thread(detector, [pixels])
        return found

    uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning")


def fastapi(model: str, shorter: int, longer: int, port: int) -> None:
    import uvicorn
    from fastapi import FastAPI, Request

    detector = PlainDetector(model, shorter, longer)
    waiting: asyncio.Queue[tuple[Image, asyncio.Future[dict[str, Any]]]] = asyncio.Queue()

    async def run_batches() -> None:
        while True:
            batch = [await waiting.get()]
            end = asyncio.get_running_loop().time() + WAIT_S
            while len(batch) < MOST:
                try:
                    async with asyncio.timeout_at(end):
                        batch.append(await waiting.get())
                except TimeoutError:
                    break
            answers = await asyncio.to_thread(detector, [image for image, _ in batch])
            for (_, future), answer in zip(batch, answers, strict=True):
                if not future.done():
                    future.set_result(answer)

    tasks: list[asyncio.Task[None]] = []
    app = FastAPI()

    @app.post("/predict")
    async def predict(request: Request) -> dict[str, Any]:
        if not tasks:
            tasks.append(asyncio.create_task(run_batches()))
        pixels = await asyncio.to_thread(detector.read, await request.body())
        future: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        waiting.put_nowait((pixels, future))
        return await future

    uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning")


if sys.argv[1:2] == ["litserve"]:  # at the module's level: its workers are processes that import it
    import litserve

    class DetectorAPI(litserve.LitAPI):  # type: ignore[misc, no-any-unimported, unused-ignore]
        def setup(self, device: str) -> None:
            self.detector = PlainDetector(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))

        def decode_request(self, request: dict[str, str]) -> Image:
            return self.detector.read(base64.b64decode(request["image"]))

        def batch(self, inputs: list[Image]) -> list[Image]:
            return inputs  # of several sizes: they are padded in `predict`

        def predict(self, images: list[Image]) -> list[dict[str, Any]]:
            return self.detector(images)

        def unbatch(self, output: list[dict[str, Any]]) -> list[dict[str, Any]]:
            return output

        def encode_response(self, output: dict[str, Any]) -> dict[str, Any]:
            return output

    def litserve_server(model: str, shorter: int, longer: int, port: int) -> None:
        server = litserve.LitServer(DetectorAPI(max_batch_size=MOST, batch_timeout=WAIT_S), accelerator="cpu")
        server.run(host="127.0.0.1", port=port, log_level="warning", generate_client_file=False)


if __name__ == "__main__":
    _, name, *rest = sys.argv
    model_file, shorter_side, longer_side, on_port = rest
    run = litserve_server if name == "litserve" else {"paddlex": paddlex, "fastapi": fastapi}[name]
    run(model_file, int(shorter_side), int(longer_side), int(on_port))
