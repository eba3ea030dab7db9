"""One picture in every bundle, and what it has to become: a port of the detector is checked with it in a minute.

`golden/picture.png` is the user's, or a drawn one: pictures that a detector was calibrated on may be nobody else's
business. `golden/golden.json` says, in the order of the work, which pixels it is decoded to, which it is resized to,
which tensor they become, and which detections come out, each so that the first step that goes wrong is seen.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gfldeploy.bundle import GOLDEN, Bundle
from gfldeploy.detections import Detections
from gfldeploy.engines.base import Engine
from gfldeploy.engines.detect import found_in, inputs_of
from gfldeploy.errors import OutputError, ParityError
from gfldeploy.export.end_to_end_parity import missing_in
from gfldeploy.export.parity import Tolerance, parity_pictures
from gfldeploy.files import native_writes, write_json
from gfldeploy.images.decode import read_image
from gfldeploy.images.preprocess import Preprocess

PICTURE = "golden/picture.png"
_DRAWN = (240, 320)  # height and width in pixels
_LONGEST = 512  # side in pixels of a picture of the user's
_KEPT = 20  # detections
# What they may always differ by, and the share of them that may be others: rounding decides about equal ones, and each
# engine rounds INT8 in its own way.
_ALWAYS = {"fp32": (Tolerance(score=1e-4, box_px=0.1), 0.1), "int8": (Tolerance(score=0.2, box_px=16.0), 0.5)}
_SLICE = 8  # values of each channel, of the row in the middle


def golden_picture(given: NDArray[np.uint8] | None) -> NDArray[np.uint8]:
    """The picture, RGB [h, w, 3]: the user's, no larger than a bundle should carry, or one that is drawn."""
    import cv2

    if given is None:
        picture: NDArray[np.uint8] = parity_pictures((1, *_DRAWN), seed=2)[0]
        return picture
    factor = _LONGEST / max(given.shape[:2])
    if factor >= 1:
        return given
    return cv2.resize(given, None, None, fx=factor, fy=factor, interpolation=cv2.INTER_AREA)  # type: ignore[no-any-return]


def write_golden(bundle: Bundle, picture: NDArray[np.uint8], engine: Engine, tolerance: Tolerance) -> None:
    """Write the picture, RGB [h, w, 3], and what the bundle makes of it in `engine`, into the bundle's directory.

    `tolerance`: of the graphs; what a port may differ by is no less. Raises `OutputError`, and `EngineError`.
    """
    import cv2

    manifest = bundle.manifest
    path = bundle.directory / PICTURE
    path.parent.mkdir(exist_ok=True)
    with native_writes(path.parent):
        if not cv2.imwrite(str(path), cv2.cvtColor(picture, cv2.COLOR_RGB2BGR)):
            raise OutputError(f"{path} cannot be written", "Check the disk.")
    (found,) = detect(bundle, picture, engine)[:1]
    best = found.named(manifest.classes).select(slice(_KEPT))
    allowed, may_miss = _allowed(manifest.precision, tolerance)
    record = {
        **_steps(picture, manifest.preprocess),
        "detections": [
            {"class_id": category, "class": name, "score": score, "box": box}
            for category, name, score, box in zip(
                best.classes.tolist(), best.names, best.scores.tolist(), best.boxes.tolist(), strict=True
            )
        ],
        "engine": engine.name,
        "tolerance": {"score": allowed.score, "box_px": allowed.box_px, "missing": may_miss},
    }
    write_json(bundle.directory / GOLDEN, record)


def read_golden(bundle: Bundle) -> tuple[NDArray[np.uint8], str]:
    """The picture, and whether decoding and preprocessing give here what they gave where the bundle was made.

    Another version of OpenCV may resize otherwise. Raises `DataError` where the picture cannot be read.
    """
    record = bundle.record(GOLDEN)
    assert record is not None
    picture = read_image(bundle.directory / PICTURE)
    steps = _steps(picture, bundle.manifest.preprocess)
    for name, what in (("picture", "is decoded"), ("resized", "is resized"), ("input", "is normalised")):
        if steps[name]["sha256"] != record[name]["sha256"]:
            return picture, f"{PICTURE} {what} otherwise than where the bundle was made: detections may differ a little"
    return picture, f"{PICTURE} becomes the tensor that it became where the bundle was made"


def compare_golden(bundle: Bundle, picture: NDArray[np.uint8], engine: Engine) -> str:
    """Run the picture and say how far the detections are from those expected.

    Raises `EngineError`, and `ParityError` as `agreement`.
    """
    (found,) = detect(bundle, picture, engine)[:1]
    return agreement(bundle, found, engine.name)


def is_expected(bundle: Bundle, precision: str, input_size: tuple[int, int] | None, tf32: bool) -> bool:
    """Whether a detector that runs so is to find what the bundle's golden picture expects."""
    own = (bundle.manifest.precision, None, False)
    return bundle.record(GOLDEN) is not None and (precision, input_size, tf32) == own


def agreement(bundle: Bundle, found: Detections, engine: str) -> str:
    """How far all that NMS leaves of the picture, in the bundle's own precision, is from what is expected, in words.

    Raises `ParityError` where too many are missing: in INT8 engines round differently.
    """
    record = bundle.record(GOLDEN)
    assert record is not None
    rows = record["detections"]
    expected = Detections(
        np.array([one["box"] for one in rows], np.float32).reshape(-1, 4),
        np.array([one["score"] for one in rows], np.float32),
        np.array([one["class_id"] for one in rows], np.int64),
    )
    recorded = Tolerance(record["tolerance"]["score"], record["tolerance"]["box_px"])
    allowed, may_miss = _allowed(bundle.manifest.precision, recorded)
    missing, score, box = missing_in(found, expected, allowed)
    if missing > may_miss * len(expected):
        raise ParityError(
            f"{engine} does not give {missing} of the {len(expected)} detections that {record['engine']} gave of "
            f"{PICTURE} where the bundle was made",
            "Do not deploy it in this engine here.",
        )
    same = f"{len(expected) - missing} of {len(expected)} expected detections"
    return f"{engine} finds {same} in {PICTURE}: scores differ by at most {score:.2g}, boxes by {box:.2g} px"


def difference(found: Detections, before: Detections, precision: str) -> str | None:
    """What is missing of what the same detector found in the same picture before, in words; None if little is.

    Two batches of it may round differently, as two engines do.
    """
    allowed, may_miss = _ALWAYS[precision]
    missing, _, _ = missing_in(found, before, allowed)
    more, _, _ = missing_in(before, found, allowed)
    if max(missing, more) <= may_miss * max(len(before), len(found)):
        return None
    return f"{missing} of {len(before)} are missing, {more} are new"


def detect(bundle: Bundle, picture: NDArray[np.uint8], engine: Engine) -> list[Detections]:
    """What an engine of the bundle finds in the picture, as often as the batch has images. Raises `EngineError`."""
    manifest = bundle.manifest
    images = [picture] * (manifest.inputs[0].shape[0] or 1)
    inputs, scales = inputs_of(engine, images, manifest.preprocess)
    return found_in(engine, engine.infer(inputs), scales, manifest.nms)


def _allowed(precision: str, tolerance: Tolerance) -> tuple[Tolerance, float]:
    """What a port and every engine may differ by, and the share of the detections that they may not have."""
    always, may_miss = _ALWAYS[precision]
    return Tolerance(max(always.score, tolerance.score), max(always.box_px, tolerance.box_px)), may_miss


def _steps(picture: NDArray[np.uint8], preprocess: Preprocess) -> dict[str, Any]:
    """What the picture becomes."""
    pixels = preprocess.pixels_of([picture])
    tensor, _ = preprocess.batch_of([picture])
    height, width = pixels["im_shape"][0].tolist()
    row = height // 2
    return {
        "picture": {"file": PICTURE, **_array(picture)},
        "resized": _array(np.ascontiguousarray(pixels["image"][0, :height, :width])),
        "im_shape": [height, width],
        "scale_factor": pixels["scale_factor"][0].tolist(),
        "input": {**_array(tensor), "row": row, "values": tensor[0, :, row, :_SLICE].tolist()},
    }


def _array(array: NDArray[Any]) -> dict[str, Any]:
    """Shape, type and SHA-256 of the bytes, row by row, numbers with the lowest byte first."""
    little = array.astype(array.dtype.newbyteorder("<"), copy=False)
    return {
        "shape": list(array.shape),
        "dtype": array.dtype.name,
        "sha256": hashlib.sha256(np.ascontiguousarray(little).tobytes()).hexdigest(),
    }
