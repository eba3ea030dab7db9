"""What the file finds in a picture: python detect.py BUNDLE/onnx/end_to_end.onnx PICTURE [LEAST_SCORE]"""

import json
import sys

import numpy as np
import onnxruntime
from PIL import Image, ImageOps


def factors(height, width, rule):
    """By which an image is resized, as PaddleDetection does it: (y, x)."""
    target, (shorter, longer) = rule["target_size"], sorted(rule["target_size"])
    y, x = target[0] / height, target[1] / width
    if rule["keep_ratio"]:
        y = x = min(y, x) if rule["fixed"] else min(shorter / min(height, width), longer / max(height, width))
    return y, x


def places(size, factor):
    """Of each pixel of a resized side: the two that it lies between, and their weights in 2048ths."""
    at = ((np.arange(round(size * factor)) + 0.5) * (1 / factor) - 0.5).astype(np.float32)
    low = np.floor(at)
    weights = np.rint(np.stack([low + 1 - at, at - low]) * 2048).astype(np.int32)
    return *np.clip([low, low + 1], 0, size - 1).astype(int), *weights


def resize(image, y, x):
    """Linear, in the integers of OpenCV's INTER_LINEAR: the pixels are the same. Pillow's gives other boxes."""
    left, right, first, second = places(image.shape[1], x)
    rows = image[:, left] * first[:, None] + image[:, right] * second[:, None] >> 4
    above, below, first, second = places(image.shape[0], y)
    rows = (rows[above] * first[:, None, None] >> 16) + (rows[below] * second[:, None, None] >> 16)
    return (rows + 2 >> 2).astype(np.uint8)


def main(model, picture, least_score=0.4):
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    about = json.loads(session.get_modelmeta().custom_metadata_map.get("gfldeploy", "{}"))
    if about.get("preprocess", {}).get("interp") != 1:  # linear
        sys.exit("Error: give onnx/end_to_end.onnx of a bundle; if that file's `interp` is not 1, change `resize`.")
    opened = ImageOps.exif_transpose(Image.open(picture))
    if opened.mode.startswith("I;16"):  # 16-bit grey, of which `convert` makes white all that is above 255
        opened = Image.fromarray((np.asarray(opened) >> 8).astype(np.uint8))
    image = np.asarray(opened.convert("RGB"))
    y, x = factors(*image.shape[:2], about["preprocess"])
    resized = resize(image, y, x)
    fixed = [size if isinstance(size, int) else 0 for size in session.get_inputs()[0].shape]
    pixels = np.zeros((max(fixed[0], 1), *np.maximum(fixed[1:3], resized.shape[:2]), 3), np.uint8)
    pixels[:, : resized.shape[0], : resized.shape[1]] = resized
    im_shape = np.array([resized.shape[:2]] * len(pixels), np.int32)
    inputs = {"image": pixels, "im_shape": im_shape, "scale_factor": np.array([(y, x)] * len(pixels), np.float32)}
    boxes, scores, classes, count = session.run(["boxes", "scores", "classes", "count"], inputs)
    for box, score, category in zip(boxes[0, : count[0]], scores[0], classes[0]):
        if score >= float(least_score):
            print(about["classes"][category], f"{score:.4f}", *(f"{corner:.2f}" for corner in box))


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4):
        sys.exit(f"Error: give the file and a picture. {__doc__}")
    main(*sys.argv[1:])
