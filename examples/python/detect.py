"""Detect objects with the file of a bundle that deploys by itself. Needs onnxruntime, numpy and Pillow.

python detect.py bundle/onnx/end_to_end.onnx picture.png [LEAST_SCORE]
"""

import json
import sys

import numpy as np
import onnxruntime
from PIL import Image


def factors(height, width, rule):
    """By which an image is resized, as PaddleDetection does it: (y, x)."""
    target_height, target_width = rule["target_size"]
    if not rule["keep_ratio"]:
        return target_height / height, target_width / width
    if rule["fixed"]:
        factor = min(target_height / height, target_width / width)
    else:
        shorter, longer = sorted(rule["target_size"])
        factor = min(shorter / min(height, width), longer / max(height, width))
    return factor, factor


def resize(image, factor, axis):
    """Along one axis, as OpenCV's linear interpolation does it: without Pillow's smoothing, which gives other boxes."""
    size = image.shape[axis]
    places = np.clip((np.arange(round(size * factor)) + 0.5) / factor - 0.5, 0, size - 1)
    low = places.astype(int)
    share = (places - low).reshape([-1 if one == axis else 1 for one in range(3)])
    return image.take(low, axis) * (1 - share) + image.take(np.minimum(low + 1, size - 1), axis) * share


def main(model, picture, least_score=0.4):
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    about = json.loads(session.get_modelmeta().custom_metadata_map["gfldeploy"])
    if about["preprocess"]["interp"] != 1:
        sys.exit("this detector was trained with another interpolation than the linear one: change `resize`")
    image = np.asarray(Image.open(picture).convert("RGB"))
    y, x = factors(*image.shape[:2], about["preprocess"])
    resized = np.rint(resize(resize(image, y, 0), x, 1)).astype(np.uint8)
    fixed = [size if isinstance(size, int) else 0 for size in session.get_inputs()[0].shape]
    pixels = np.zeros((max(fixed[0], 1), *np.maximum(fixed[1:3], resized.shape[:2]), 3), np.uint8)
    pixels[:, : resized.shape[0], : resized.shape[1]] = resized
    inputs = {
        "image": pixels,
        "im_shape": np.array([resized.shape[:2]] * len(pixels), np.int32),
        "scale_factor": np.array([(y, x)] * len(pixels), np.float32),
    }
    boxes, scores, classes, count = session.run(["boxes", "scores", "classes", "count"], inputs)
    for box, score, category in zip(boxes[0, : count[0]], scores[0], classes[0]):
        if score >= float(least_score):
            print(about["classes"][category], f"{score:.4f}", *(f"{corner:.2f}" for corner in box))


if __name__ == "__main__":
    main(*sys.argv[1:])
