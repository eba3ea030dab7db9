"""Images to detections in three lines: `Detector`."""

from __future__ import annotations

import os
import warnings
from collections.abc import Generator, Iterable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import cast

from gfldeploy.detections import Detections
from gfldeploy.engines.base import ClosesOnExit, Device, Precision
from gfldeploy.engines.registry import open_engine
from gfldeploy.predict.engine_selection import choose
from gfldeploy.predict.outputs import DEFAULT_THRESHOLD
from gfldeploy.predict.pipeline import Found, detect_groups, in_order
from gfldeploy.predict.sources import ColorOrder, Image, is_one_image, picture_of

__all__ = ["Detector", "Image"]

_BATCHES_AHEAD = 4


class Detector(ClosesOnExit):
    """A detector that is ready to run; a context manager, which frees it.

        from gfldeploy import Detector
        detector = Detector("bundle")
        for found in detector.detect(["a.jpg", "b.jpg"]): print(found.boxes, found.scores, found.classes)

    An image is a file's path or its content (`bytes`), an array, uint8 [h, w, 3], RGB unless `color` says otherwise
    (OpenCV's own are BGR), or a PIL image. `classes`: their names; `Detections.classes` are indices into them.
    `choice`: what runs, how, and why that; its `notes`: what the user of this detector should know. Not for several
    threads at once.
    """

    def __init__(
        self,
        source: str | os.PathLike[str],
        *,
        engine: str | None = None,
        precision: Precision | None = None,
        device: Device | None = None,
        threads: int | None = None,
        batch_size: int | None = None,
        engine_cache: str | os.PathLike[str] | None = None,
    ) -> None:
        """Load a bundle, or what a `deploy.yml` chose; see `predict.engine_selection.choose` for what is not given.

        `engine_cache`: a folder where engines that compile keep the result, for the next start to be faster.

        Warns (`UserWarning`) of every one of the `choice.notes`: what the bundle says of the detector, and where a
        `deploy.yml` was made on another machine or with other software. Raises
        `BundleError`, `DataError`, `UnsupportedError`, `MissingDependencyError` and `EngineError`.
        """
        cache = None if engine_cache is None else Path(engine_cache)
        self.choice = choose(Path(source), engine, precision, device, threads, batch_size, cache)
        for note in self.choice.notes:
            warnings.warn(note, stacklevel=2)
        self._manifest = self.choice.bundle.manifest
        self._engine = open_engine(self.choice.engine, self.choice.bundle, self.choice.options)

    @property
    def classes(self) -> tuple[str, ...]:
        """Names, by the numbers in `Detections.classes`."""
        return self._manifest.classes

    def close(self) -> None:
        self._engine.close()

    def detect(
        self,
        images: Image | Iterable[Image],
        *,
        threshold: float = DEFAULT_THRESHOLD,
        color: ColorOrder = "rgb",
        reduced: bool = False,
    ) -> list[Detections]:
        """What is in each image, in their order; a single image makes a list of one.

        `color`: "rgb" or "bgr", the order of the channels of arrays; of nothing else. `threshold`, `reduced`: as for
        `stream`. Raises `DataError` for the first image that cannot be used, `ValueError` for an array that is not
        uint8 [h, w, 3], `TypeError` for what is no image, and `EngineError`.
        """
        given = [cast(Image, images)] if is_one_image(images) else cast("Iterable[Image]", images)
        detections = []
        with closing(self.stream(given, threshold=threshold, color=color, reduced=reduced)) as stream:
            for found in stream:
                if found.detections is None:
                    raise found.error or AssertionError(found)
                detections.append(found.detections)
        return detections

    def stream(
        self,
        images: Iterable[Image],
        *,
        threshold: float = DEFAULT_THRESHOLD,
        color: ColorOrder = "rgb",
        look_ahead: int | None = None,
        reduced: bool = False,
    ) -> Generator[Found]:
        """What is in each image, in their order, as it is found: an image that cannot be used has its `error`.

        Images are taken as they are needed, so that there may be any number; decoding, the network and NMS work at the
        same time. `threshold`: the least score of a detection; 0 is all that NMS leaves, which mAP needs.
        `look_ahead`: how many images may come after one before it must run, though its batch is not full; default: four
        batches. `reduced`: decode a JPEG at 1/2, 1/4 or 1/8 where that is no less than the network's
        input: faster, but not the same pixels, so that scores and boxes differ a little.

        `color`, and what it raises: as for `detect`.
        """
        if color not in ("rgb", "bgr"):
            raise ValueError(f"color is 'rgb' or 'bgr', not {color!r}")
        batch_size = self.choice.batch_size
        groups = detect_groups(
            self._engine,
            self._manifest,
            (picture_of(image, color) for image in images),
            batch_size=batch_size,
            order=self.choice.order,
            look_ahead=_BATCHES_AHEAD * batch_size if look_ahead is None else look_ahead,
            reduced=reduced,
        )
        with closing(groups):
            for found in in_order([(found.index, found) for found in group] for group in groups):
                kept = found.detections and found.detections.at_least(threshold)
                yield replace(found, detections=kept)
