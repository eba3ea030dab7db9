"""From an RGB image to the network's input, bit for bit as PaddleDetection's readers do it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gfldeploy.errors import ConfigError, DataError

_NORM_TYPES = ("mean_std", "none")
_INTERPOLATIONS = range(7)  # cv2.INTER_NEAREST (0) to cv2.INTER_NEAREST_EXACT (6)
# Beyond what any detector asks for: one image of these sizes takes 800 MB.
_LARGEST_SIDE = 8192
_LARGEST_STRIDE = 1024
_LARGEST_SHIFT = 1e6  # of mean and std, and the inverse of the smallest std
# The operators that are reproduced here, in the only order that is, and their arguments.
_OPERATORS: Mapping[str, frozenset[str]] = {
    "Decode": frozenset(),
    "Resize": frozenset({"target_size", "keep_ratio", "interp"}),
    "NormalizeImage": frozenset({"mean", "std", "is_scale", "norm_type"}),
    "Permute": frozenset(),
    "PadBatch": frozenset({"pad_to_stride"}),
    "PadStride": frozenset({"stride"}),
}
_ORDER = tuple(_OPERATORS)


def new_memory(values: int) -> NDArray[np.float32]:
    return np.empty(values, np.float32)


@dataclass(frozen=True)
class Prepared:
    """One image, ready for the network.

    `tensor`: float32 [3, h, w], C-contiguous, not yet padded. `scale`: (y, x), network-input pixels per original pixel:
    dividing a box of the network by it gives original pixels.
    """

    tensor: NDArray[np.float32]
    scale: tuple[float, float]

    def __post_init__(self) -> None:
        if self.tensor.ndim != 3 or self.tensor.shape[0] != 3 or self.tensor.dtype != np.float32:
            raise ValueError(f"tensor must be float32 [3, h, w], not {self.tensor.dtype} {list(self.tensor.shape)}")
        if not all(math.isfinite(value) and value > 0 for value in self.scale):
            raise ValueError(f"scale must be positive, not {self.scale}")


@dataclass(frozen=True)
class Preprocess:
    """What PaddleDetection's TestReader does to an image: `Decode`, `Resize`, `NormalizeImage`, `Permute`, padding.

    `target_size`: (h, w) in pixels; with `keep_ratio` the image is scaled by one factor so that its shorter side is at
    most the smaller and its longer side at most the larger of the two. `interp`: OpenCV's interpolation code.
    `is_scale`: multiply by 1/255 first. `norm_type`: "mean_std" subtracts `mean` and divides by `std` (RGB order);
    "none" does not. `pad_stride`: pad right and bottom with zeros to a multiple of this many pixels; 0 = none.
    `fixed`: the network takes `target_size` and no other. With `keep_ratio` the image is then scaled by one factor to
    fit inside, whatever its orientation, and padded right and bottom. PaddleDetection has no such rule: its own (above)
    makes a portrait image too high for a landscape network.

    Raises `ConfigError` for values that cannot work.
    """

    target_size: tuple[int, int]
    keep_ratio: bool = True
    interp: int = 1
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    is_scale: bool = True
    norm_type: str = "mean_std"
    pad_stride: int = 0
    fixed: bool = False

    def __post_init__(self) -> None:
        if not (_is_tuple_of(self.target_size, 2, int) and min(self.target_size) >= 1):
            raise ConfigError(f"target_size is {self.target_size!r}", "Give it as (height, width), two whole pixels.")
        if max(self.target_size) > _LARGEST_SIDE:
            raise ConfigError(f"target_size is {self.target_size!r}", f"No side may be longer than {_LARGEST_SIDE} px.")
        for name in ("keep_ratio", "is_scale", "fixed"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} is {getattr(self, name)!r}", "Set it to true or false.")
        if not _is_int(self.interp) or self.interp not in _INTERPOLATIONS:
            raise ConfigError(f"interp is {self.interp!r}", "Use an OpenCV code from 0 to 6, such as 1 for linear.")
        for name in ("mean", "std"):
            value = getattr(self, name)
            if not (_is_tuple_of(value, 3, (int, float)) and all(abs(number) < _LARGEST_SHIFT for number in value)):
                raise ConfigError(f"{name} is {value!r:.80}", "Give three numbers, for red, green and blue.")
        if min(map(abs, self.std)) < 1 / _LARGEST_SHIFT:
            raise ConfigError(f"std is {self.std!r}", "No entry may be 0 or next to it: the image is divided by it.")
        if self.norm_type not in _NORM_TYPES:
            raise ConfigError(f"norm_type is {self.norm_type!r}", f"Use one of {', '.join(_NORM_TYPES)}.")
        if not _is_int(self.pad_stride) or not 0 <= self.pad_stride <= _LARGEST_STRIDE:
            remedy = f"Give a number of pixels up to {_LARGEST_STRIDE}, 0 for none."
            raise ConfigError(f"pad_stride is {self.pad_stride!r:.40}", remedy)

    @classmethod
    def from_reader(
        cls,
        sample_transforms: Sequence[Mapping[str, Any]],
        batch_transforms: Sequence[Mapping[str, Any]] | None = None,
    ) -> Preprocess:
        """Build it from the `sample_transforms` and `batch_transforms` of a PaddleDetection reader.

        Supported, each at most once and in this order: Decode, Resize, NormalizeImage, Permute, then PadBatch or
        PadStride; NormalizeImage and the pad may be absent.

        Raises `ConfigError` for any other operator, order or argument.
        """
        found: dict[str, Mapping[str, Any]] = {}
        for entry in [*sample_transforms, *(batch_transforms or [])]:
            if not isinstance(entry, Mapping) or len(entry) != 1:
                remedy = "Write it as one `- Operator: {...}` entry."
                raise ConfigError(f"the reader has the transform {entry!r}", remedy)
            [(name, arguments)] = entry.items()
            _check_operator(name, arguments, list(found))
            found[name] = arguments or {}
        for name in ("Decode", "Resize", "Permute"):
            if name not in found:
                raise ConfigError(f"the reader has no {name}", f"Add it; the order is {', '.join(_ORDER)}.")
        resize = found["Resize"]
        if "target_size" not in resize or "keep_ratio" not in resize:
            raise ConfigError("the reader's Resize lacks target_size or keep_ratio", "Give both.")
        size = resize["target_size"]
        if resize["keep_ratio"] is True and isinstance(size, list) and len(size) == 1:
            size = size[0]  # PaddleDetection takes the smallest and the largest of the list
        values: dict[str, Any] = {
            "target_size": (size, size) if _is_int(size) else _as_tuple(size),
            "keep_ratio": resize["keep_ratio"],
            "interp": resize.get("interp", 1),
            "pad_stride": _pad_stride(found),
        }
        nothing = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0), "is_scale": False, "norm_type": "none"}
        normalize = found.get("NormalizeImage", nothing)
        return cls(**values, **{name: _as_tuple(value) for name, value in normalize.items()})

    def to_infer_cfg(self) -> list[dict[str, Any]]:
        """The `Preprocess` list of PaddleDetection's infer_cfg.yml, as its own export writes it (PadStride, no Decode).

        A normalisation that changes nothing is left out.
        """
        size = {"target_size": list(self.target_size), "keep_ratio": self.keep_ratio, "interp": self.interp}
        shift = {"mean": list(self.mean), "std": list(self.std), "is_scale": self.is_scale}
        if self.norm_type != "mean_std":
            shift["norm_type"] = self.norm_type
        return [
            {"type": "Resize", **size},
            *([{"type": "NormalizeImage", **shift}] if self.is_scale or self.norm_type != "none" else []),
            {"type": "Permute"},
            *([{"type": "PadStride", "stride": self.pad_stride}] if self.pad_stride else []),
        ]

    def same_size(self, size: tuple[int, int]) -> bool:
        """Whether images would be resized as they are now if this, (h, w) in pixels, was the `target_size`."""
        either = self.keep_ratio and not self.fixed  # only the shorter and the longer of the two count
        return size == self.target_size or (either and size == self.target_size[::-1])

    def scales(self, height: int, width: int) -> tuple[float, float]:
        """The factors (y, x) by which an image of this size, in pixels, is resized."""
        target_h, target_w = self.target_size
        if not self.keep_ratio:
            return target_h / height, target_w / width
        if self.fixed:
            scale = min(target_h / height, target_w / width)
        else:
            scale = min(min(target_h, target_w) / min(height, width), max(target_h, target_w) / max(height, width))
        return scale, scale

    def __call__(self, image: NDArray[np.uint8]) -> Prepared:
        """Prepare an RGB image, uint8 [h, w, 3]; the result is not padded (`batch` pads).

        Raises `DataError` when the image is so elongated that a side would vanish.
        """
        _check_image(image)
        tensor = np.empty((3, *self.resized_size(*image.shape[:2])), dtype=np.float32)
        return Prepared(tensor, self.into(image, tensor))

    def into(
        self, image: NDArray[np.uint8], out: NDArray[np.float32], original: tuple[int, int] | None = None
    ) -> tuple[float, float]:
        """Prepare an RGB image, uint8 [h, w, 3], straight into `out`, float32 [3, H, W], such as a row of a batch.

        `out` is overwritten whole: zeros on the right and at the bottom. `original`: the size (h, w) in pixels of an
        image that was decoded at a reduced scale; the result has the size that the whole image would have. Returns the
        scale (y, x), network-input pixels per original pixel.

        Raises `DataError` as `__call__`, and `ValueError` for an `out` that does not hold the image.
        """
        import cv2

        _check_image(image)
        size = original or (image.shape[0], image.shape[1])
        height, width = self.resized_size(*size)
        if out.dtype != np.float32 or out.ndim != 3 or out.shape[0] != 3 or out.strides[2] != out.itemsize:
            raise ValueError(f"out must be float32 [3, H, W], not {out.dtype} {list(out.shape)}")
        if out.shape[1] < height or out.shape[2] < width:
            raise ValueError(f"out {list(out.shape)} does not hold an image of {height} x {width}")
        resized = self._resized(image, size)
        table = self.table
        for channel, plane in enumerate(cv2.split(resized)):
            cv2.LUT(plane, table[channel], dst=out[channel, :height, :width])
        out[:, height:] = 0
        out[:, :height, width:] = 0
        return self.scales(*size)

    def _resized(self, image: NDArray[np.uint8], original: tuple[int, int]) -> NDArray[np.uint8]:
        """The image, uint8 [h, w, 3], in the size that one of the size `original` gets."""
        import cv2

        if image.shape[:2] == original:
            # By factors, not by size: OpenCV samples at fx and fy themselves, and so does PaddleDetection.
            y, x = self.scales(*original)
            return cv2.resize(image, None, None, fx=x, fy=y, interpolation=self.interp)  # type: ignore[no-any-return]
        size = self.resized_size(*original)[::-1]
        return cv2.resize(image, size, interpolation=self.interp)  # type: ignore[no-any-return]

    def pixels_of(self, images: Sequence[NDArray[np.uint8]]) -> dict[str, NDArray[Any]]:
        """RGB images, uint8 [h, w, 3], as the file that deploys by itself takes them (`export.end_to_end`): resized.

        Beside and below the smaller ones are zeros, which the file does not look at. Raises `DataError` as `__call__`.
        """
        for image in images:
            _check_image(image)
        sizes = [self.resized_size(*image.shape[:2]) for image in images]
        height, width = (max(sides) for sides in zip(*sizes, strict=True))
        if self.fixed:
            height, width = self.padded_size(height, width)
        pixels = np.zeros((len(images), height, width, 3), np.uint8)
        for row, image, (height, width) in zip(pixels, images, sizes, strict=True):
            row[:height, :width] = self._resized(image, (image.shape[0], image.shape[1]))
        scales = [self.scales(*image.shape[:2]) for image in images]
        return {
            "image": pixels,
            "im_shape": np.array(sizes, np.int32),
            "scale_factor": np.array(scales, np.float32),
        }

    def batch_of(
        self,
        images: Sequence[NDArray[np.uint8]],
        memory: Callable[[int], NDArray[np.float32]] = new_memory,
    ) -> tuple[NDArray[np.float32], list[tuple[float, float]]]:
        """Prepare RGB images, uint8 [h, w, 3], as the network's input, float32 [N, 3, H, W]; return their scales too.

        The same as `__call__` and `batch`, without copies in between. `memory`: gives memory for so many values. Raises
        `DataError` as `__call__`.
        """
        heights, widths = zip(*(self.resized_size(*image.shape[:2]) for image in images), strict=True)
        shape = (len(images), 3, *self.padded_size(max(heights), max(widths)))
        batch = memory(math.prod(shape)).reshape(shape)
        return batch, [self.into(image, row) for image, row in zip(images, batch, strict=True)]

    def reduction(self, height: int, width: int) -> int:
        """How many times smaller (1, 2, 4 or 8) an image of this size may be decoded without being enlarged next."""
        scale = max(self.scales(height, width))
        return next((factor for factor in (8, 4, 2) if scale * factor <= 1), 1)

    def resized_size(self, height: int, width: int, file: object = None) -> tuple[int, int]:
        """The size (h, w) of an image of this size once resized, without padding; all in pixels.

        Raises `DataError`, naming the `file` if it is given, when the image is so elongated that a side would vanish.
        """
        scale_y, scale_x = self.scales(height, width)
        # OpenCV rounds the new size to the nearest even half, as Python's round does.
        resized = round(height * scale_y), round(width * scale_x)
        if min(resized) < 1:
            named = "" if file is None else f"{file}: "
            raise DataError(
                f"{named}an image of {width} x {height} px is too elongated: one side vanishes when it is resized",
                "Remove it from the data.",
            )
        return resized

    def input_size(self, height: int, width: int) -> tuple[int, int]:
        """The size (h, w) of the network's input for one image of this size, padding included; all in pixels."""
        scale_y, scale_x = self.scales(height, width)
        return self.padded_size(round(height * scale_y), round(width * scale_x))

    def padded_size(self, height: int, width: int) -> tuple[int, int]:
        """The size (h, w) of the network's input for one image of this size after it was resized; all in pixels."""
        smallest_h, smallest_w = self.target_size if self.fixed else (1, 1)
        step = max(self.pad_stride, 1)
        return -(-max(height, smallest_h) // step) * step, -(-max(width, smallest_w) // step) * step

    def batch(self, prepared: Sequence[Prepared], smallest: tuple[int, int] = (1, 1)) -> NDArray[np.float32]:
        """Stack prepared images into the network's input, float32 [N, 3, H, W], with zeros on the right and below.

        As PaddleDetection's PadBatch: H and W are those of the largest image, rounded up to the stride. `smallest`:
        (h, w) in pixels that the input has at least, such as those of a bucket.
        """
        if not prepared:
            raise ValueError("a batch needs at least one image")
        sizes = [one.tensor.shape[1:] for one in prepared]
        height, width = (max(sides) for sides in zip(smallest, *sizes, strict=True))
        batch = np.zeros((len(prepared), 3, *self.padded_size(height, width)), dtype=np.float32)
        for row, one, (height, width) in zip(batch, prepared, sizes, strict=True):
            row[:, :height, :width] = one.tensor
        return batch

    @cached_property
    def table(self) -> NDArray[np.float32]:
        """What each of the 256 pixel values becomes in each channel, float32 [3, 256].

        The operations and their precisions are PaddleDetection's: multiply in float32, subtract and divide in float64
        with the result rounded to float32 each time.
        """
        table = np.tile(np.arange(256, dtype=np.float32), (3, 1))
        if self.is_scale:
            table *= np.float32(1.0 / 255.0)
        if self.norm_type == "mean_std":
            table -= np.array(self.mean, dtype=np.float64)[:, np.newaxis]
            table /= np.array(self.std, dtype=np.float64)[:, np.newaxis]
        return table


def _check_image(image: NDArray[np.uint8]) -> None:
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or 0 in image.shape:
        raise ValueError(f"the image must be uint8 [h, w, 3], not {image.dtype} {list(image.shape)}")


def _check_operator(name: object, arguments: object, before: list[str]) -> None:
    """Raise `ConfigError` unless this operator, with these arguments, may come after those before it."""
    if name not in _OPERATORS:
        raise ConfigError(f"the reader uses {name}, which is not supported", f"Supported: {', '.join(_ORDER)}.")
    assert isinstance(name, str)
    if name in before:
        raise ConfigError(f"the reader uses {name} twice", "Keep one.")
    if {name, *before} >= {"PadBatch", "PadStride"}:
        raise ConfigError("the reader uses both PadBatch and PadStride", "Keep one.")
    if before and _ORDER.index(name) < _ORDER.index(before[-1]):
        raise ConfigError(f"the reader applies {name} after {before[-1]}", f"Use the order {', '.join(_ORDER)}.")
    if arguments is not None and not isinstance(arguments, Mapping):
        raise ConfigError(f"the reader's {name} has {arguments!r}", "Give its arguments as `name: value` pairs.")
    if unknown := sorted(str(key) for key in set(arguments or {}) - _OPERATORS[name]):
        known = ", ".join(sorted(_OPERATORS[name])) or "none"
        raise ConfigError(f"the reader's {name} has unknown arguments: {', '.join(unknown)}", f"Supported: {known}.")


def _pad_stride(found: Mapping[str, Mapping[str, Any]]) -> Any:
    if "PadStride" in found:
        return found["PadStride"].get("stride", 0)
    stride = found.get("PadBatch", {}).get("pad_to_stride", 0)
    # PadBatch takes any number below 1 for "no rounding up".
    return max(stride, 0) if _is_int(stride) else stride


def _as_tuple(value: Any) -> Any:
    """Lists as tuples; anything else as it is, for `__post_init__` to judge."""
    return tuple(value) if isinstance(value, list) else value


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_tuple_of(value: object, length: int, kind: type | tuple[type, ...]) -> bool:
    return (
        isinstance(value, tuple)
        and len(value) == length
        and all(isinstance(item, kind) and not isinstance(item, bool) for item in value)
    )
