"""Images to detections in three lines: `Detector`."""

from __future__ import annotations

import warnings
from collections.abc import Generator, Iterable, Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import cast

from gfldeploy.batching.tiles import InTiles, Tiling
from gfldeploy.bench.cpu_parity import CpuCheck
from gfldeploy.detection_options import DetectionOptions
from gfldeploy.detections import Detections
from gfldeploy.engines.base import ClosesOnExit, Device, Precision
from gfldeploy.engines.registry import open_engine
from gfldeploy.errors import UsageError
from gfldeploy.files import StrPath
from gfldeploy.predict.engine_selection import choose
from gfldeploy.predict.live import LiveFrame, LiveSource, live_frames
from gfldeploy.predict.pipeline import Found, detect_groups, in_order
from gfldeploy.predict.sources import ColorOrder, Image, Picture, is_one_image, picture_of
from gfldeploy.progress import Silent

_BATCHES_AHEAD = 4


class _Warning(Silent):
    """Warns before an engine is built, which may take minutes in the middle of a stream."""

    def stage(self, text: str) -> None:
        warnings.warn(text, stacklevel=2)


class Detector(ClosesOnExit):
    """A detector that is ready to run; a context manager, which frees it::

        detector = Detector("bundle")
        for found in detector.detect(["a.jpg", "b.jpg"]):
            print(found.boxes, found.scores, found.names)

    An engine with TensorRT is built when the first detector is made, for the inputs that `deploy.yml` expects, or for
    all that the detector can be given; and once more for the latter when an input that was not expected comes. It may
    take minutes, and is kept for the next detector. A `UserWarning` comes before.

    An image is a file's path or its content (`bytes`), an array, uint8 [h, w, 3], or a PIL image. A detector is not for
    several threads at once. Processes that use detectors are started by "spawn": after a fork OpenVINO does not run.

    Attributes:
        choice: What runs and how: bundle, engine, options, batch size and order, and in words why. Its `notes` are what
            the user of this detector should know.
    """

    def __init__(
        self,
        source: StrPath,
        *,
        threshold: float | None = None,
        class_thresholds: Mapping[str, float] | None = None,
        classes: Iterable[str | int] | None = None,
        score_threshold: float | None = None,
        nms_threshold: float | None = None,
        keep_top_k: int | None = None,
        class_agnostic: bool | None = None,
        engine: str | None = None,
        precision: Precision | None = None,
        device: Device | None = None,
        tf32: bool | None = None,
        threads: int | None = None,
        streams: int | None = None,
        input_size: tuple[int, int] | None = None,
        tile: tuple[int, int] | None = None,
        overlap: float | None = None,
        batch_size: int | None = None,
        engine_cache: StrPath | None = None,
    ) -> None:
        """Load a bundle, or what a `deploy.yml` chose, and warn (`UserWarning`) of every one of the `choice.notes`.

        Args:
            source: The directory of a bundle, or the `deploy.yml` that `tune_bundles` wrote, which decides on what is
                None here.
            threshold: The lowest score of a detection, by default 0.5; 0 gives all that NMS leaves, which mAP needs.
            class_thresholds: For some classes, by name or id, another one: `{"person": 0.3}`.
            classes: The classes to detect, names or ids; by default all. NMS does not see the others.
            score_threshold: Detections must score more to leave NMS; by default, as the next two, as in the detector's
                config.
            nms_threshold: NMS drops a box whose IoU with a better one of its class is above this.
            keep_top_k: The most detections of an image, the best ones.
            class_agnostic: NMS drops a box for a better one of any class; by default of its own.
            engine: By default the preferred engine of those that can run the bundle.
            precision: By default that of the bundle.
            device: By default the CPU.
            tf32: Let FP32 on a GPU multiply in TF32; by default not.
            threads: CPU threads of one inference; by default all, shared by the streams.
            streams: Inferences at once from one engine, for many images in `stream` or `detect`; on CPUs alone. By
                default 1: then a single image takes the least time. `predict` has as many as there are CPUs.
            input_size: The size, (height, width) in pixels, to which images are resized, as `target_size` in
                PaddleDetection; by default that of the bundle.
            tile: The size, (height, width) in pixels of the image, of tiles that larger images are cut into, so that
                small objects keep their size; such an image is detected in as a whole, too. By default none is cut.
            overlap: Of two neighbouring tiles, by the side of a tile; by default 0.2.
            batch_size: Images, or tiles of an image, of one inference; by default 1.
            engine_cache: A folder in which engines that compile keep the result, for the next start to be faster.
                By default those that take minutes, as with TensorRT, use that of the commands, and others none.

        Raises:
            UsageError: There is no such class, thresholds contradict each other, or the tiles cannot be.
            BundleError: The bundle is damaged, or not the one that `deploy.yml` is about.
            DataError: `source` is a file that is no `deploy.yml`.
            UnsupportedError: Nothing here can run the bundle so.
            MissingDependencyError: The engine is not installed.
            EngineError: The engine failed to load the bundle.
            OutputError: The engine cannot keep what it compiled.
        """
        self._closed = False
        self._tiling = Tiling.of(tile, overlap)
        cache = None if engine_cache is None else Path(engine_cache)
        self.choice = choose(
            Path(source),
            engine,
            precision,
            device,
            threads,
            batch_size,
            cache,
            tf32=tf32,
            streams=streams,
            input_size=input_size,
            detection=DetectionOptions.of(
                threshold, class_thresholds, classes, score_threshold, nms_threshold, keep_top_k, class_agnostic
            ),
        )
        for note in self.choice.notes:
            warnings.warn(note, stacklevel=2)
        options = replace(self.choice.options, progress=_Warning())
        self._engine = open_engine(self.choice.engine, self.choice.bundle, options)
        self._check = CpuCheck(self.choice.engine, self._engine, self.choice.bundle, warnings.warn)

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names, by the numbers in `Detections.classes`."""
        return self.choice.bundle.manifest.classes

    def close(self) -> None:
        """Free the detector, which detects no more."""
        self._closed = True
        self._engine.close()

    def _check_open(self) -> None:
        if self._closed:
            raise UsageError("the detector is closed", "Use it before that, or make another.")

    def detect(
        self,
        images: Image | Iterable[Image],
        *,
        threshold: float | None = None,
        color: ColorOrder = "rgb",
        reduced: bool = False,
    ) -> list[Detections]:
        """Detect in one image or in several.

        Args:
            images: One image, or any number of them.
            threshold: The lowest score of a detection; by default that of the detector. A class that has a threshold of
                its own needs both.
            color: The order of the channels of arrays, and of nothing else; OpenCV's own are "bgr".
            reduced: Decode a JPEG at 1/2, 1/4 or 1/8 where that is no smaller than the network's input: faster, but not
                the same pixels, so that scores and boxes differ a little.

        Returns:
            The detections of each image, in the order of the images.

        Raises:
            DataError: An image cannot be used; it is the first that cannot.
            UsageError: The threshold cannot be, or the detector is closed.
            ValueError: An array is not uint8 [h, w, 3], or `reduced` goes with tiles.
            TypeError: Something is no image.
            EngineError: The engine failed, or its first batch differs from the CPU (compared on GPUs).
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
        threshold: float | None = None,
        color: ColorOrder = "rgb",
        look_ahead: int | None = None,
        reduced: bool = False,
    ) -> Generator[Found]:
        """Detect in any number of images, which are taken as they are needed.

        Decoding, the network and NMS work at the same time, in threads of their own.

        Args:
            images: The images. One thread takes them, which is not the caller's.
            threshold: As for `detect`.
            color: As for `detect`.
            look_ahead: How many images may follow an image before it runs in a batch that is not full; by default four
                batches.
            reduced: As for `detect`.

        Yields:
            What is in each image, in the order of the images. One that cannot be used has its `error`.

        Raises:
            UsageError: The threshold cannot be, or the detector is closed.
            ValueError: An array is not uint8 [h, w, 3], or `reduced` goes with tiles.
            TypeError: Something is no image.
            EngineError: The engine failed, or its first batch differs from the CPU (compared on GPUs).
        """
        self._check_open()
        if color not in ("rgb", "bgr"):
            raise ValueError(f"color is 'rgb' or 'bgr', not {color!r}")
        if reduced and self._tiling is not None:
            raise ValueError("tiles are cut out of all the pixels of an image, not of one decoded smaller")
        detection = self.choice.detection
        shown = detection.shown(self.classes, threshold)
        # What has thresholds by class depends on them: it is not crowded out by what is not shown.
        manifest = self.choice.bundle.manifest.turned(detection, threshold)
        batch_size = self.choice.batch_size
        groups = detect_groups(
            self._engine,
            manifest,
            (picture_of(image, color) for image in images),
            batch_size=batch_size,
            order=self.choice.order,
            look_ahead=_BATCHES_AHEAD * batch_size if look_ahead is None else look_ahead,
            reduced=reduced,
            streams=self.choice.options.streams,
            check=self._check,
            cut=None if self._tiling is None else InTiles(self._tiling, batch_size),
        )
        with closing(groups):
            for found in in_order([(found.index, found) for found in group] for group in groups):
                kept = found.detections and found.detections.select(shown.places(found.detections))
                yield replace(found, detections=kept)

    def live(self, source: LiveSource, *, threshold: float | None = None) -> Generator[LiveFrame]:
        """Detect in the newest frames of a camera or a stream; those that come meanwhile are dropped and counted.

        From reading a frame to its detections it takes no longer than two frames of the detector take. The next frame
        is detected in while you handle this one. The source ends with the iteration.

        Args:
            source: The camera or the stream.
            threshold: As for `detect`.

        Yields:
            Frames, each with its detections, until the source ends: `source.error` then says why.

        Raises:
            UsageError: The threshold cannot be, or the detector is closed.
            EngineError: The engine failed, or its first batch differs from the CPU (compared on GPUs).
        """
        self._check_open()
        detection = self.choice.detection
        shown = detection.shown(self.classes, threshold)
        manifest = self.choice.bundle.manifest.turned(detection, threshold)

        def detect(pictures: Iterable[Picture]) -> Generator[list[Found]]:
            return detect_groups(
                self._engine,
                manifest,
                pictures,
                order="listed",
                streams=self.choice.options.streams,
                check=self._check,
                cut=None if self._tiling is None else InTiles(self._tiling, self.choice.batch_size),
            )

        with closing(live_frames(source, detect, self.choice.options.streams)) as frames:
            for frame in frames:
                yield replace(frame, detections=frame.detections.select(shown.places(frame.detections)))
