"""What users turn behind the network: thresholds, classes and NMS, as plain data."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property, lru_cache
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from gfldeploy.detections import Detections
from gfldeploy.errors import ConfigError, UsageError
from gfldeploy.nms import NmsParams, UserNms
from gfldeploy.text import first_of, meant

# The lowest score that is shown unless told otherwise: what PaddleDetection draws from.
DEFAULT_THRESHOLD = 0.5


@dataclass(frozen=True)
class Shown:
    """Which of the detections that NMS leaves are shown: those that score at least the `lowest` of their class id."""

    lowest: tuple[float, ...]

    @cached_property
    def _by_class(self) -> NDArray[np.float64]:
        return np.array(self.lowest, np.float64)

    @cached_property
    def least(self) -> float:
        """The lowest score that is shown of any class."""
        return min(self.lowest, default=0.0)

    def places(self, found: Detections) -> NDArray[np.intp]:
        """The places of those that are shown. The classes must all have names."""
        return np.flatnonzero(found.scores.astype(np.float64) >= self._by_class[found.classes])

    def lacks(self, found: Detections) -> bool:
        """Whether some that would be shown may be missing."""
        return found.may_lack_below > max(self.least, 0)


@dataclass(frozen=True)
class DetectionOptions:
    """What users turn behind the network, plain data. A field that is None is as the detector's config says.

    `threshold`: the lowest score that is shown, 0.5 where it is None. `class_thresholds`: by name or id of a class,
    that of this class instead. They never take anything away from `coco.json`, and from what mAP is measured of.

    `classes`: names or ids of those that are kept; NMS does not see the others. `score_threshold`, `nms_threshold`,
    `keep_top_k`: as in `NmsParams`. `class_agnostic`: NMS drops a box for a better one of any class.

    Raises `UsageError` for values that cannot work, or contradict each other.
    """

    threshold: float | None = None
    class_thresholds: Mapping[str, float] | None = None
    classes: tuple[str, ...] | None = None
    score_threshold: float | None = None
    nms_threshold: float | None = None
    keep_top_k: int | None = None
    class_agnostic: bool | None = None

    def __post_init__(self) -> None:
        by_class = {f"class_thresholds of {name!r:.60}": value for name, value in (self.class_thresholds or {}).items()}
        for name, value in {"threshold": self.threshold, **by_class}.items():
            if value is not None:
                _check_score(name, value)
        if not isinstance(self.class_agnostic, bool | None):
            raise UsageError(f"class_agnostic is {self.class_agnostic!r:.40}", "Give true or false.")
        if self.classes == ():
            raise UsageError("no class is kept", "Name one, or leave classes out for all of them.")
        if self.score_threshold is not None:
            for name, value in {"threshold": self.threshold, **by_class}.items():
                if value and value < self.score_threshold:
                    raise UsageError(
                        f"{name} is {value:g}, and score_threshold {self.score_threshold:g}: nothing between them "
                        "leaves NMS",
                        "Leave score_threshold out, or give a lower one.",
                    )

    @classmethod
    def of(
        cls,
        threshold: float | None = None,
        class_thresholds: Mapping[str | int, float] | Mapping[str, float] | None = None,
        classes: Iterable[str | int] | None = None,
        score_threshold: float | None = None,
        nms_threshold: float | None = None,
        keep_top_k: int | None = None,
        class_agnostic: bool | None = None,
    ) -> Self:
        """As arguments of functions give them: ids may be numbers. Raises `UsageError`, and `TypeError` for a text."""
        if isinstance(classes, str):
            raise TypeError(f"classes are a list of names, not a text: [{classes!r:.60}]")
        by_class = {str(one): _plain(value) for one, value in class_thresholds.items()} if class_thresholds else None
        return cls(
            _plain(threshold),
            by_class,
            None if classes is None else tuple(dict.fromkeys(map(str, classes))),
            *map(_plain, (score_threshold, nms_threshold, keep_top_k, class_agnostic)),
        )

    @property
    def lowest(self) -> float:
        """The lowest score that is shown of a class that has no threshold of its own."""
        return DEFAULT_THRESHOLD if self.threshold is None else float(self.threshold)

    @property
    def given(self) -> dict[str, Any]:
        """The fields that are not None, by name."""
        return {one.name: value for one in fields(self) if (value := getattr(self, one.name)) is not None}

    def over(self, other: Self) -> Self:
        """These, and where they say nothing the others. Raises `UsageError`."""
        return replace(other, **self.given)

    def nms(self, own: NmsParams, class_names: Sequence[str], threshold: float | None = None) -> NmsParams:
        """The NMS of a detector with these classes whose config says `own`, which it is where nothing turns it.

        `threshold`: as for `shown`. Raises `UsageError`, also for a class that the detector does not have.
        """
        shown = self.shown(class_names, threshold)
        if not self.given.keys() - {"threshold"}:
            return own
        try:
            return UserNms(
                own.score_threshold if self.score_threshold is None else self.score_threshold,
                own.nms_threshold if self.nms_threshold is None else self.nms_threshold,
                own.nms_top_k,
                own.keep_top_k if self.keep_top_k is None else self.keep_top_k,
                own.normalized,
                own.nms_eta,
                kept=self.kept(class_names),
                class_agnostic=bool(self.class_agnostic),
                lowest=shown.lowest if self.class_thresholds else (),
                most=-1 if self.keep_top_k is None else self.keep_top_k,
            )
        except ConfigError as error:
            raise UsageError(error.problem, error.remedy) from error

    def shown(self, class_names: Sequence[str], threshold: float | None = None) -> Shown:
        """What is shown of a detector with these classes.

        `threshold`: another one that somebody asks for, who never gets less than that. Raises `UsageError` for one that
        cannot be, and for a class that the detector does not have.
        """
        if threshold is not None:
            _check_score("threshold", threshold := _plain(threshold))
        one_for_all = self.lowest if threshold is None else float(threshold)
        if self.classes is None and not self.class_thresholds:
            return _alike(one_for_all, len(class_names))
        kept = set(self.kept(class_names))
        lowest = [one_for_all] * len(class_names)
        named: dict[int, str] = {}
        for word, value in (self.class_thresholds or {}).items():
            (number,) = class_ids([word], class_names)
            if number in named:
                raise UsageError(f"class_thresholds name {class_names[number]!r:.80} twice", "Give one of them.")
            if number not in kept:
                raise UsageError(
                    f"class_thresholds name {class_names[number]!r:.80}, which is not among the classes that are kept",
                    "Add it to classes, or leave its threshold out.",
                )
            named[number] = word
            lowest[number] = max(value, threshold or 0.0)
        return Shown(tuple(value if number in kept else math.inf for number, value in enumerate(lowest)))

    def notes(self, own: NmsParams) -> tuple[str, ...]:
        """What the user should know of them, of a detector whose config says `own`."""
        asked = [self.threshold, *(self.class_thresholds or {}).values()]
        low = [value for value in asked if value and value < own.score_threshold]
        if not low or self.score_threshold is not None:
            return ()
        return (
            f"nothing that scores {own.score_threshold:g} or less leaves the detector's NMS, whatever the threshold: "
            f"give a score_threshold below {min(low):g} for what scores less",
        )

    def kept(self, class_names: Sequence[str]) -> tuple[int, ...]:
        """The ids of the classes that are kept, in rising order. Raises `UsageError` for one that is not there."""
        if self.classes is None:
            return tuple(range(len(class_names)))
        return tuple(sorted(class_ids(self.classes, class_names)))


AS_CONFIGURED = DetectionOptions()


def _check_score(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise UsageError(f"{name} is {value!r:.40}", "Give a number from 0 to 1.")


def _plain(value: Any) -> Any:
    """A number of NumPy as one of Python, anything else as it is."""
    return value.item() if isinstance(value, np.generic) else value


@lru_cache(maxsize=64)
def _alike(lowest: float, classes: int) -> Shown:
    """One score for so many classes. Kept, since servers ask for each image."""
    return Shown((lowest,) * classes)


def class_ids(words: Iterable[str], class_names: Sequence[str]) -> tuple[int, ...]:
    """The ids of classes by their names or ids, each once; a name that is a number is a name.

    Raises `UsageError` for one that is not there, with those that may be meant.
    """
    ids = {name: number for number, name in reversed(list(enumerate(class_names)))}
    ids = {str(number): number for number in range(len(class_names))} | ids
    found = []
    for word in words:
        if (number := ids.get(word)) is None:
            remedy = meant(word, class_names) or f"Name some of {first_of(class_names, 20)}, or their ids from 0."
            raise UsageError(f"there is no class {word[:80]!r}", remedy)
        found.append(number)
    return tuple(dict.fromkeys(found))
