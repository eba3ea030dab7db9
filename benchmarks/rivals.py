"""Plain uses of ONNX Runtime, and of OpenVINO with and without NNCF, as their users write them.

For `end_to_end.py`, two ways to run GFL-R50 as paddle2onnx exports it (every candidate leaves the graph), one image
after the other, at one fixed input size: the image in a corner of a square that holds both orientations ("letterbox"),
or stretched to 800x1344 ("stretch"). For `files_to_boxes.py`, which runs this file as a script, the queue of
asynchronous requests that OpenVINO recommends for throughput. Boxes go through OpenCV's NMS.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

SIZES = {"letterbox": (1344, 1344), "stretch": (800, 1344)}  # height, width
LONG, SHORT = 1333, 800
MEAN, STD = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])
SCORE_THRESHOLD, NMS_THRESHOLD, KEEP = 0.025, 0.6, 100

Infer = Callable[[NDArray[np.float32]], tuple[NDArray[np.float32], NDArray[np.float32]]]


def preprocess(path: Path, way: str) -> tuple[NDArray[np.float32], tuple[float, float]]:
    """The network's input [1, 3, H, W], and by how much (y, x) the image was scaled."""
    image = cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB)
    height, width = image.shape[:2]
    if way == "letterbox":
        scale = min(SHORT / min(height, width), LONG / max(height, width))
        resized = cv2.resize(image, (round(width * scale), round(height * scale)))
        scales = scale, scale
    else:
        resized = cv2.resize(image, SIZES[way][::-1])
        scales = SIZES[way][0] / height, SIZES[way][1] / width
    normalised = (resized.astype(np.float32) / 255.0 - MEAN) / STD
    tensor = np.zeros((1, 3, *SIZES[way]), np.float32)
    tensor[0, :, : resized.shape[0], : resized.shape[1]] = normalised.transpose(2, 0, 1)
    return tensor, scales


def detections(
    scores: NDArray[np.float32], boxes: NDArray[np.float32], scales: tuple[float, float]
) -> NDArray[np.float32]:
    """Class, score and corners [K, 6] of one image, from scores [1, A, C] and boxes [1, A, 4]."""
    anchors, classes = np.nonzero(scores[0] > SCORE_THRESHOLD)
    found = boxes[0, anchors] / np.float32([scales[1], scales[0]] * 2)
    confidence = scores[0, anchors, classes]
    xywh = np.concatenate([found[:, :2], found[:, 2:] - found[:, :2]], axis=1)
    kept = cv2.dnn.NMSBoxesBatched(xywh.tolist(), confidence.tolist(), classes.tolist(), SCORE_THRESHOLD, NMS_THRESHOLD)
    kept = np.array(kept, np.int64)[:KEEP]
    return np.concatenate([classes[kept, None], confidence[kept, None], found[kept]], axis=1, dtype=np.float32)


def detect_all(infer: Infer, paths: Sequence[Path], way: str) -> int:
    """How many detections there are in these images."""
    count = 0
    for path in paths:
        tensor, scales = preprocess(path, way)
        count += len(detections(*infer(tensor), scales))
    return count


def onnxruntime_fp32(model: Path, threads: int) -> Infer:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    return lambda tensor: tuple(session.run(["scores", "boxes"], {"image": tensor}))


def openvino_int8(model: Path, calibration: Sequence[Path], way: str, threads: int) -> Infer:
    """NNCF's post-training quantisation as its guide has it, compiled for one shape."""
    import nncf
    import openvino

    core = openvino.Core()
    network: Any = core.read_model(str(model))
    network.reshape([1, 3, *SIZES[way]])
    data = nncf.Dataset(calibration, lambda path: {"image": preprocess(path, way)[0]})
    quantized = nncf.quantize(network, data, subset_size=len(calibration))
    compiled = core.compile_model(quantized, "CPU", {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads})
    request = compiled.create_infer_request()

    def infer(tensor: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        request.infer({"image": tensor}, share_inputs=True)
        return request.get_tensor("scores").data, request.get_tensor("boxes").data

    return infer


def openvino_throughput(model: Path, paths: Sequence[Path], size: tuple[int, int]) -> int:
    """How many detections there are in these images, stretched to `size` (h, w), by as many requests as suit OpenVINO.

    The model is a bundle's ONNX file, which OpenVINO reads as it is.
    """
    import openvino

    core = openvino.Core()
    network: Any = core.read_model(str(model))
    network.reshape([1, 3, *size])
    compiled = core.compile_model(network, "CPU", {"PERFORMANCE_HINT": "THROUGHPUT"})
    queue = openvino.AsyncInferQueue(compiled)
    found: dict[Path, NDArray[np.float32]] = {}

    def keep(request: Any, asked: tuple[Path, tuple[float, float]]) -> None:
        path, scales = asked
        found[path] = detections(request.get_tensor("scores").data, request.get_tensor("boxes").data, scales)

    queue.set_callback(keep)
    for path in paths:
        image = cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB)
        resized = cv2.resize(image, size[::-1]).astype(np.float32)
        tensor = ((resized / 255.0 - MEAN) / STD).transpose(2, 0, 1)[np.newaxis]
        queue.start_async({"image": tensor}, (path, (size[0] / image.shape[0], size[1] / image.shape[1])))
    queue.wait_all()
    return sum(map(len, found.values()))


if __name__ == "__main__":
    _, model_file, folder, height, width = sys.argv
    print(openvino_throughput(Path(model_file), sorted(Path(folder).iterdir()), (int(height), int(width))))
