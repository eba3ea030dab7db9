"""What the speed recipes run on: photographs of both orientations, and GFL-R50 as bundles.

    python benchmarks/materials.py --output materials [--photographs 16] [--algo hist] [--samples 16]

Writes materials/photos/ (annotations.json without boxes, images/ with JPEGs of 640x427 and 427x640 in turn, from the
two photographs that scikit-learn brings), materials/calib/ (others of the same kind), and the bundles fp32/, int8/ and
exact/ (FP32; every candidate leaves the graph, as plain exports have it). At the model zoo's 800x1333 rule the
photographs become inputs of 800x1216 and 1216x800, in one batch padded to 1216x1216: 1.52 times the pixels.

The weights are random, since no trained ones can be had offline: times, memory and sizes are those of the real model.
The class bias is lower than that of `gfldeploy export --random-weights`, so that some hundreds of an
image's candidates come through the score threshold, as with a trained detector, and NMS costs what it costs there.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from gfldeploy.files import write_json
from gfldeploy.images.decode import read_image

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "gfl" / "gfl_r50_fpn_1x_coco.yml"
SEED = 0
CLASS_BIAS = -7.5
JPEG_QUALITY = 95  # what scikit-learn's own have
CALIBRATION_IMAGES = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--photographs", type=int, default=16, metavar="N", help="half of each orientation")
    parser.add_argument("--samples", type=int, default=CALIBRATION_IMAGES, metavar="N", help="images to calibrate on")
    parser.add_argument("--algo", default="hist", metavar="NAME", help="of `gfldeploy quantize`")
    args = parser.parse_args()
    write_photographs(args.output / "photos", args.photographs, seed=0)
    write_photographs(args.output / "calib", args.samples, seed=1)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "gfl_r50.pdparams"
        write_checkpoint(checkpoint)
        for name, options in {"fp32": (), "exact": ("--candidates", "all")}.items():
            gfldeploy("export", "-c", CONFIG, "-w", checkpoint, "-o", args.output / name, "--force", *options)
    gfldeploy(
        *("quantize", args.output / "fp32", "--data", args.output / "calib" / "images", "--samples", args.samples),
        *("--algo", args.algo, "--min-agreement", 0, "-o", args.output / "int8", "--force"),
    )


def write_photographs(folder: Path, count: int, seed: int) -> None:
    """So many JPEGs in `folder`/images, landscape and portrait in turn, with COCO annotations of their sizes."""
    from sklearn.datasets import load_sample_images

    sources = [read_image(Path(name)) for name in load_sample_images()["filenames"]]
    rng = np.random.default_rng(seed)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    images = []
    for number in range(count):
        picture = variant(sources[number // 2 % len(sources)], rng)
        if number % 2:
            picture = cv2.rotate(picture, cv2.ROTATE_90_CLOCKWISE)
        name = f"{number:04}.jpg"
        pixels = cv2.cvtColor(picture, cv2.COLOR_RGB2BGR)
        if not cv2.imwrite(str(folder / "images" / name), pixels, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY]):
            raise SystemExit(f"cannot write {folder / 'images' / name}")
        images.append({"id": number + 1, "file_name": name, "height": picture.shape[0], "width": picture.shape[1]})
    categories = [{"id": 1, "name": "any"}]
    write_json(folder / "annotations.json", {"images": images, "annotations": [], "categories": categories})


def variant(picture: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
    """The picture of the same size, some of its border cut off, mirrored or not."""
    height, width = picture.shape[:2]
    share = rng.uniform(0.8, 1.0)
    h, w = round(height * share), round(width * share)
    top, left = int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1))
    cut = cv2.resize(picture[top : top + h, left : left + w], (width, height), interpolation=cv2.INTER_AREA)
    return np.asarray(cut[:, ::-1] if rng.random() < 0.5 else cut, np.uint8)


def write_checkpoint(path: Path) -> None:
    """Random weights of GFL-R50, with fewer candidates above the score threshold."""
    import paddle

    from gfldeploy.export.config import load_detector_config
    from gfldeploy.export.model_builder import build_model
    from gfldeploy.export.weights import set_random_weights

    model = build_model(load_detector_config(CONFIG))
    set_random_weights(model, SEED)
    bias = model.head.gfl_head_cls.bias
    bias.set_value(paddle.full_like(bias, CLASS_BIAS))
    paddle.save(model.state_dict(), str(path))


def gfldeploy(*arguments: object) -> None:
    subprocess.run([sys.executable, "-m", "gfldeploy", *map(str, arguments)], check=True)


if __name__ == "__main__":
    main()
