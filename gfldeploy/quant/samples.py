"""Chooses the calibration images and makes sure that none of them is an evaluation image."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gfldeploy.errors import DataError
from gfldeploy.files import sha256
from gfldeploy.images.coco import CocoDataset, list_images

DEFAULT_SAMPLES = 64


def calibration_images(data: Path, images: Path | None, samples: int | None = None) -> list[Path]:
    """`samples` images, spread evenly over a COCO file's or a folder's; by default up to `DEFAULT_SAMPLES`.

    The same data give the same images. Raises `DataError` if there are fewer than `samples`, or none.
    """
    if samples is not None and samples < 1:
        raise ValueError(f"samples must be at least 1, not {samples}")
    paths = list_images(data) if data.is_dir() else [image.path for image in CocoDataset.load(data, images).images]
    if not paths:
        raise DataError(f"{data} has no images", "Add some: INT8 is fitted to what they look like.")
    if samples is not None and len(paths) < samples:
        raise DataError(
            f"{data} has {len(paths)} images, {samples} were asked for", f"Add images, or use --samples {len(paths)}."
        )
    return spread(paths, samples or DEFAULT_SAMPLES)


def spread(paths: Sequence[Path], count: int) -> list[Path]:
    """`count` of the paths at even distances, or all if there are fewer."""
    count = min(count, len(paths))
    return [paths[index * len(paths) // count] for index in range(count)]


def digests(paths: Sequence[Path]) -> dict[str, str]:
    """The files as {SHA-256: file name}; of equal files the last. Raises `DataError` for one that cannot be read."""
    found = {}
    for path in paths:
        try:
            found[sha256(path)] = path.name
        except OSError as error:
            raise DataError(
                f"cannot read {path}: {error.strerror or error}", "Replace the image, or leave it out."
            ) from error
    return found


def refuse_overlap(calibration: Mapping[str, str], evaluation: Mapping[str, str]) -> None:
    """Raise `DataError` if an image to evaluate on is, by content, a calibration image.

    Both are as `digests` gives them.
    """
    if shared := [name for digest, name in evaluation.items() if digest in calibration]:
        raise DataError(
            f"{len(shared)} of the {len(evaluation)} evaluation images are calibration images too, the first "
            f"{shared[0]}",
            "Calibrate on other images: mAP on images that INT8 was fitted to flatters it.",
        )


def evaluation_record(annotations: Path | None, images: Mapping[str, str]) -> dict[str, Any]:
    """The evaluation data as JSON-ready data: the digest of the annotation file, and one of all images.

    `images`: as `digests` gives them; their digest is SHA-256 over the sorted hex digests, one per line.
    """
    together = "".join(f"{digest}\n" for digest in sorted(images))
    return {
        "annotations_sha256": sha256(annotations) if annotations else None,
        "images_sha256": hashlib.sha256(together.encode()).hexdigest(),
        "images": len(images),
    }
