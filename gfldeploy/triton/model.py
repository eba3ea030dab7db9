"""What runs in Triton's Python backend: its `model.py` takes these classes by the name `TritonPythonModel`.

Triton's batcher decides which requests come together, and `Detector` puts those of one input size into a batch: images
have the detections that they have alone. There is no second queue here.
"""

from __future__ import annotations

import importlib
import itertools
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gfldeploy.bundle import Bundle
from gfldeploy.detection_options import AS_CONFIGURED
from gfldeploy.detections import Detections
from gfldeploy.detector import Detector
from gfldeploy.engines.hardware import usable_threads
from gfldeploy.errors import BundleError, DataError, EngineError, GfldeployError, RejectedError, summary
from gfldeploy.export.golden import agreement, compare_golden, is_expected, read_golden
from gfldeploy.images.decode import decode_image
from gfldeploy.triton.settings import BUNDLE, SETTINGS, DetectorSettings, PreprocessSettings

Outputs = Mapping[str, NDArray[Any]]  # by the names of config.pbtxt


@dataclass(frozen=True)
class _Asked:
    """A request: the content of an image file, and the lowest score of its answer, None for the detector's."""

    image: bytes
    threshold: float | None


class _PythonModel:
    """What both models share: requests in, a response for each, whatever happens to one of them."""

    def __init__(self) -> None:
        # Triton's own process adds to this module what it offers; elsewhere there is none.
        self._triton: Any = importlib.import_module("triton_python_backend_utils")

    def initialize(self, args: Mapping[str, str]) -> None:
        """Load what is beside `model.py`. Raises Triton's `TritonModelException`: the model then never gets ready."""
        with self._explained():
            self._load(Path(args["model_repository"]) / args["model_version"], json.loads(args["model_config"]))

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """A response for each request, in order: those that cannot be answered have an error of their own."""
        asked = [self._asked(request) for request in requests]
        usable = [one for one in asked if not isinstance(one, Exception)]
        try:
            found = iter(self._answers(usable) if usable else [])
        except Exception as error:  # noqa: BLE001 - told to those who asked, and the next requests may fare better
            found = itertools.repeat(error)
        return [
            self._response(request, one if isinstance(one, Exception) else next(found))
            for request, one in zip(requests, asked, strict=True)
        ]

    def _load(self, folder: Path, config: Mapping[str, Any]) -> None:
        raise NotImplementedError

    def _answers(self, asked: Sequence[_Asked]) -> Sequence[Outputs | Exception]:
        raise NotImplementedError

    def _asked(self, request: Any) -> _Asked | Exception:
        """What the request asks for, or why it cannot be answered."""
        if request.is_cancelled():
            return RejectedError("the client has cancelled the request")
        image, threshold = (self._triton.get_input_tensor_by_name(request, name) for name in ("image", "threshold"))
        images = image.as_numpy().reshape(-1)
        if len(images) != 1:
            remedy = "Send one image in a request, as BYTES [1, 1]: Triton puts requests into batches."
            return DataError(f"the request has {len(images)} images", remedy)
        if threshold is None:
            return _Asked(bytes(images[0]), None)
        lowest = threshold.as_numpy().reshape(-1).tolist()
        if len(lowest) != 1 or not 0 <= lowest[0] <= 1:
            return DataError(f"the threshold is {lowest!s:.40}", "Send one number from 0 to 1, as FP32 [1, 1].")
        return _Asked(bytes(images[0]), lowest[0])

    def _response(self, request: Any, answer: Outputs | Exception) -> Any:
        triton = self._triton
        if isinstance(answer, Mapping):
            wanted = set(request.requested_output_names())
            tensors = [triton.Tensor(name, array[np.newaxis]) for name, array in answer.items() if name in wanted]
            return triton.InferenceResponse(output_tensors=tensors)
        if not isinstance(answer, GfldeployError):
            triton.Logger.log_error(f"a bug, in gfldeploy or in an engine: {answer!r}")
            answer = EngineError(f"the request failed: {summary(answer)}")
        codes = triton.TritonError
        code = {DataError: codes.INVALID_ARG, RejectedError: codes.CANCELLED}.get(type(answer), codes.INTERNAL)
        return triton.InferenceResponse(error=triton.TritonError(str(answer), code))

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Errors of ours as Triton's, one line each; warnings into its log."""
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always", UserWarning)
                yield
        except GfldeployError as error:
            raise self._triton.TritonModelException(str(error)) from error
        for warning in caught:
            self._triton.Logger.log_warn(str(warning.message))


class DetectorModel(_PythonModel):
    """Image files in, detections out, by any engine."""

    def _load(self, folder: Path, config: Mapping[str, Any]) -> None:
        settings = DetectorSettings.read(folder / SETTINGS)
        bundle = Bundle.open(folder / BUNDLE)
        if bundle.digest != settings.digest:
            raise BundleError(
                f"{bundle.directory} is another bundle than the one that the repository was written with",
                "Write the repository again, with `gfldeploy triton`.",
            )
        bundle.verify_files()
        instances = sum(group["count"] for group in config["instance_group"])
        usable = usable_threads()
        threads = settings.threads or max(usable // instances, 1)
        self._detector = Detector(
            folder / settings.source,
            engine=settings.engine,
            precision=settings.precision,
            device=settings.device,
            tf32=settings.tf32,
            threads=threads,
            streams=1,  # each instance is a process of its own, to which Triton gives one batch at a time
            input_size=settings.input_size,
            batch_size=settings.batch_size,
        )
        self._triton.Logger.log_info(f"{self._detector.choice}, {instances} instance{'s' * (instances > 1)}")
        self._check_golden(bundle)
        if self._detector.choice.options.device == "cpu" and instances * threads > usable:
            self._triton.Logger.log_warn(
                f"{instances} instances of {threads} threads are more than the {usable} usable CPUs: they wait for "
                "each other. Write the repository again with fewer --instances or --threads."
            )

    def _check_golden(self, bundle: Bundle) -> None:
        """Compare with what the bundle gave where it was made. Raises `ParityError`."""
        choice = self._detector.choice
        if is_expected(bundle, choice.options.precision, choice.input_size, choice.options.tf32):
            picture, _ = read_golden(bundle)
            if choice.detection == AS_CONFIGURED:
                (found,) = self._detector.detect(picture, threshold=0)
                self._triton.Logger.log_info(agreement(bundle, found, choice.engine))
            else:  # it expects what the config's own NMS leaves
                self._triton.Logger.log_info(compare_golden(bundle, picture, self._detector._engine))

    def finalize(self) -> None:
        """Free the detector."""
        if hasattr(self, "_detector"):  # or it could not be loaded
            self._detector.close()

    def _answers(self, asked: Sequence[_Asked]) -> Sequence[Outputs | Exception]:
        detection, names = self._detector.choice.detection, self._detector.classes
        if detection.class_thresholds and len({one.threshold for one in asked}) > 1:
            # Which `keep_top_k` leave NMS then depends on the threshold: no request may turn what another gets.
            return [self._answers([one])[0] for one in asked]
        every = [detection.shown(names, one.threshold) for one in asked]
        # Thresholds of single classes hold beside whichever of these is lowest; without any it is the detector's own.
        least = None if {one.threshold for one in asked} == {None} else min(shown.least for shown in every)
        found = self._detected([one.image for one in asked], least)
        return [
            one if isinstance(one, Exception) else _outputs(one.select(shown.places(one)))
            for one, shown in zip(found, every, strict=True)
        ]

    def _detected(self, images: Sequence[bytes], threshold: float | None) -> Sequence[Detections | Exception]:
        """What is in each image, or its error. If all fail together, they are tried one by one."""
        try:
            found = self._detector.stream(images, threshold=threshold)
            return [one.detections if one.detections is not None else one.error or AssertionError(one) for one in found]
        except EngineError as error:
            if len(images) == 1:
                return [error]
        return [self._detected([image], threshold)[0] for image in images]


class PreprocessModel(_PythonModel):
    """Image files in; out comes what a file that deploys by itself takes (`export.end_to_end`), padded to the stride.

    Padded, since Triton puts images into a batch whose sides are the same, and the file does not look at the padding.
    """

    def _load(self, folder: Path, config: Mapping[str, Any]) -> None:
        self._preprocess = PreprocessSettings.read(folder / SETTINGS).preprocess

    def _answers(self, asked: Sequence[_Asked]) -> Sequence[Outputs | Exception]:
        return [self._prepared(one.image) for one in asked]

    def _prepared(self, image: bytes) -> Outputs | Exception:
        try:
            prepared = {name: array[0] for name, array in self._preprocess.pixels_of([decode_image(image)]).items()}
        except DataError as error:
            return error
        height, width = prepared["image"].shape[:2]
        rows, columns = self._preprocess.padded_size(height, width)
        padded = np.pad(prepared["image"], ((0, rows - height), (0, columns - width), (0, 0)))
        return {**prepared, "image": padded}


def _outputs(found: Detections) -> Outputs:
    return {
        "boxes": found.boxes.astype(np.float32, copy=False),
        "scores": found.scores.astype(np.float32, copy=False),
        "classes": found.classes.astype(np.int32),
        "names": np.array([name.encode() for name in found.names], np.object_),
        "count": np.array([len(found)], np.int32),
    }
