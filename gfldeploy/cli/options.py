"""Options that several commands share, each declared once, and the types of their values.

An entry added to a group reaches every command that has the group, its `--help`, the files of its `--config`, and
docs/cli.md; its value arrives as a keyword argument of the public function that the command calls.
"""

from __future__ import annotations

import errno
import math
import os
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from difflib import get_close_matches
from functools import reduce
from pathlib import Path
from typing import Any

import click

from gfldeploy.detection_options import DEFAULT_THRESHOLD
from gfldeploy.engines.base import DEVICES, PRECISIONS
from gfldeploy.engines.cache import DEFAULT_ENGINE_CACHE
from gfldeploy.engines.registry import DEFAULT_ENGINES, ENGINES, PREFERRED_ENGINES
from gfldeploy.errors import DataError
from gfldeploy.storage import is_address, source_of

Command = Callable[..., Any]
Option = Callable[[Command], Command]
Group = tuple[Option, ...]


class PathType(click.Path):
    """A path that the system can take: not one that is empty or too long, has a NUL, or is a link that leads to itself.

    No later check expects these. An empty one, as of a variable that is not set, would be the current folder.
    """

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not os.fsdecode(value):
            self.fail("'' is no path", param, ctx)
        try:
            Path(os.fsdecode(value)).stat()
        except (OSError, ValueError) as error:
            if isinstance(error, ValueError) or error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
                shown = os.fsdecode(value)
                shown = shown if len(shown) <= 80 else f"{shown[:60]}... ({len(shown)} characters)"
                self.fail(f"{shown!r} is no path: {getattr(error, 'strerror', None) or error}", param, ctx)
        return super().convert(value, param, ctx)


class SourceType(PathType):
    """A path, or the address of a filesystem, which stays text: no path has two slashes side by side."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not is_address(os.fsdecode(value)):
            return super().convert(value, param, ctx)
        try:
            return str(source_of(value))
        except DataError as error:
            self.fail(str(error), param, ctx)


class InputType(SourceType):
    """The same, or a camera or a stream."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        from gfldeploy.predict.live import is_live

        text = os.fsdecode(value)
        return text if is_live(text) else super().convert(value, param, ctx)


class FiniteFloat(click.FloatRange):
    """A number in a range: NaN and infinity, which pass every comparison or fail it silently, are none."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value!r} is not a number", param, ctx)
        return number


class WholeNumber(click.IntRange):
    """A whole number in a range: not one that is too large for engines, arrays and floats, unless `max` says less."""

    _MOST = 10**9

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        if number > self._MOST:
            self.fail(f"{value!s:.40} is too large a number", param, ctx)
        return number


PATH = PathType(path_type=Path)
SOURCE = SourceType(path_type=Path)
INPUT = InputType(path_type=Path)
DIRECTORY = PathType(path_type=Path, file_okay=False)
FILE = PathType(path_type=Path, dir_okay=False)


class Parsed(click.ParamType):  # type: ignore[type-arg]  # generic in the newest click only
    """What `parse` makes of a word; it raises `ValueError` with what is wrong.

    `listed`: of each word of a comma-separated list, or of a list of a YAML file, as a tuple; a value given twice
    counts once.
    """

    def __init__(self, name: str, parse: Callable[[str], Any], listed: bool = False) -> None:
        self.name = name
        self.listed = listed
        self._parse = parse

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if isinstance(value, tuple):
            return value
        try:
            if not self.listed:
                return self._parse(str(value))
            words = value if isinstance(value, list) else str(value).split(",")
            return tuple(dict.fromkeys(self._parse(str(word).strip()) for word in words))
        except ValueError as error:
            self.fail(str(error), param, ctx)


def input_shape(word: str) -> tuple[int | None, int, int]:
    """Batch size, which may be left out, height and width in pixels."""
    match = re.fullmatch(r"(?:(\d{1,6})x)?(\d{1,6})x(\d{1,6})", word)
    if match is None or any(number and int(number) == 0 for number in match.groups()):
        raise ValueError(f"{word!r} is not a shape such as 800x1344 or 1x800x1344")
    return int(match[1]) if match[1] else None, int(match[2]), int(match[3])


def input_size(word: str) -> tuple[int, int]:
    """Height and width in pixels."""
    match = re.fullmatch(r"(\d{1,6})x(\d{1,6})", word)
    if match is None or 0 in (size := (int(match[1]), int(match[2]))):
        raise ValueError(f"{word!r} is not a height and width in pixels such as 800x1344")
    return size


def replicas(word: str) -> int | tuple[int, int]:
    """A number of replicas, or (least, most)."""
    match = re.fullmatch(r"(\d{1,4})(?:-(\d{1,4}))?", word)
    least, most = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not 1 <= least <= most:
        raise ValueError(f"{word!r} is not a number of replicas such as 4, or a range such as 2-8")
    return least if least == most else (least, most)


def part(word: str) -> tuple[int, int]:
    """Which part of how many, from 1."""
    match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", word)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise ValueError(f"{word!r} is not a part such as 1/8, with K from 1 to N")
    return int(match[1]), int(match[2])


def _whole_number(word: str) -> int:
    if not re.fullmatch(r"0*[1-9][0-9]{0,5}", word):
        raise ValueError(f"{word!r} is not a whole number from 1; write them as 1,2,4")
    return int(word)


def _class_threshold(word: str) -> tuple[str, float]:
    """A class, by name or id, and a score."""
    name, _, score = word.rpartition("=")
    with suppress(ValueError):
        if name and 0 <= float(score) <= 1:
            return name.strip(), float(score)
    raise ValueError(f"{word!r} is not a class and a score from 0 to 1 such as person=0.3")


def _by_class(
    ctx: click.Context, param: click.Parameter, given: tuple[tuple[str, float], ...] | None
) -> dict[str, float] | None:
    """Pairs as a mapping: two scores of one class contradict each other."""
    if given is None:
        return None
    found = dict(given)
    if len(found) < len(given):
        raise click.BadParameter("a class has two scores; give one", ctx, param)
    return found


def _positive_number(word: str) -> float:
    with suppress(ValueError):
        if 0 < (number := float(word)) < math.inf:
            return number
    raise ValueError(f"{word!r} is not a positive number; write them as 5,10,20")


def names(choices: Sequence[str]) -> Parsed:
    """A list of names out of `choices`."""

    def parse(word: str) -> str:
        if word not in choices:
            near = get_close_matches(word, choices, 1)
            nearest = f" (did you mean {near[0]}?)" if near else ""
            raise ValueError(f"{word!r} is not one of {', '.join(choices)}{nearest}")
        return word

    return Parsed("LIST", parse, listed=True)


WHOLE_NUMBERS = Parsed("LIST", _whole_number, listed=True)
INPUT_SIZES = Parsed("LIST", input_size, listed=True)
POSITIVE_NUMBERS = Parsed("LIST", _positive_number, listed=True)


def _read_config(ctx: click.Context, param: click.Parameter, path: Path | None) -> None:
    if path is None:
        return
    from gfldeploy.yaml_file import YamlError, read_yaml

    try:
        content = read_yaml(path)
    except OSError as error:
        raise click.BadParameter(f"{path} cannot be read: {error.strerror or error}", ctx, param) from error
    except YamlError as error:
        raise click.BadParameter(f"{path} is not YAML that is read here: {error}", ctx, param) from error
    if not isinstance(content, dict):
        raise click.BadParameter(f"{path} must be a mapping of option names to values", ctx, param)
    declared = {one.name: one for one in ctx.command.params if isinstance(one, click.Option)}
    known = declared.keys() - {"config", "force", "help"}
    defaults = {str(key).replace("-", "_"): value for key, value in content.items()}
    for key, value in defaults.items():
        option = key[:80].replace("_", "-")
        if key not in known:
            near = get_close_matches(key[:80], sorted(name for name in known if name), 1)
            nearest = f" (did you mean {near[0].replace('_', '-')}?)" if near else ""
            raise click.BadParameter(f"{path} has an unknown option, {option!r}{nearest}", ctx, param)
        if value is None:
            continue
        kind, several = declared[key].type, declared[key].multiple
        lists = several or getattr(kind, "listed", False)
        items = value if isinstance(value, list) and lists else [value]
        if any(isinstance(item, dict | list) for item in items):
            raise click.BadParameter(f"{path}: {option} must be a value{' or a list of values' * lists}", ctx, param)
        if isinstance(kind, click.Path) and not all(isinstance(item, str) for item in items):
            raise click.BadParameter(f"{path}: {option} must be a path{' or a list of paths' * lists}", ctx, param)
        # As typed: whole numbers and flags take 2.7 or false for something else without a word.
        texts = list(map(str, items))
        defaults[key] = texts if several or isinstance(value, list) else texts[0]
    ctx.default_map = {key: value for key, value in defaults.items() if value is not None}


def group(*declared: Option) -> Option:
    """One decorator of all of these options; `--help` shows them in this order."""

    def decorate(command: Command) -> Command:
        return reduce(lambda decorated, option: option(decorated), reversed(declared), command)

    return decorate


def output(help_text: str, default: Path | None = None, **settings: Any) -> Option:
    """--output, required unless it has a `default` or `settings` say otherwise, and --force."""
    settings = {"required": default is None, "default": default, "type": PATH, **settings}
    return group(
        click.option("--output", "-o", help=help_text, **settings),
        click.option("--force", is_flag=True, help="Replace the output if it exists and gfldeploy made it."),
    )


def limit(default: int | None = None, purpose: str = "", name: str = "--limit") -> Option:
    """How many images are used, and for which purpose if not for all."""
    help_text = f"Use only this number of images{purpose}, the first of the list."
    shown = None if default else "all"
    return click.option(name, type=WholeNumber(1), default=default, show_default=shown, help=help_text)


def batch_sizes(purpose: str, default: str | None = None, **settings: Any) -> Option:
    """--batch-sizes: a list, for the `purpose`."""
    help_text = f"Batch sizes to {purpose}."
    return click.option("--batch-sizes", type=WHOLE_NUMBERS, default=default, help=help_text, **settings)


def batching(orders: Sequence[str], order: str | None = None, batch_size: str = "1") -> Option:
    """--batch-size and --order: how one engine runs images; without a default `order` deploy.yml decides on both."""
    help_text = "How images are put into batches. bucketed: of one input size each; others: padded to a common size, "
    return group(
        click.option(
            "--batch-size",
            type=WholeNumber(1),
            default=order and 1,
            show_default=batch_size,
            help="Number of images of one inference.",
        ),
        click.option(
            "--order",
            type=click.Choice(orders),
            default=order,
            show_default=order or "bucketed",
            help=f"{help_text}which changes scores and boxes.",
        ),
    )


def seed(subject: str) -> Option:
    """--seed: of the `subject`."""
    return click.option("--seed", type=WholeNumber(0), default=0, help=f"Seed of {subject}.")


def annotations_of(images: str = "the images", prefix: str = "--", required: bool = True) -> Group:
    """--data and --images: COCO annotations, and where their images are."""
    return (
        click.option(
            f"{prefix}data", required=required, type=FILE, metavar="COCO.json", help=f"COCO annotations of {images}."
        ),
        click.option(
            f"{prefix}images",
            type=DIRECTORY,
            show_default="images/ beside the annotations, else their folder",
            help=f"Folder in which the file names of {prefix}data start.",
        ),
    )


def input_sizes(purpose: str, default: str = "the bundle's own") -> Option:
    """--input-sizes: a list, for the `purpose`; `default`: what there is without, in words."""
    return click.option(
        "--input-sizes",
        type=INPUT_SIZES,
        default=(),
        metavar="HEIGHTxWIDTH,...",
        show_default=default,
        help=f"Input sizes to {purpose}, in pixels, as the target_size of PaddleDetection's Resize.",
    )


INPUT_SIZE = click.option(
    "--input-size",
    type=Parsed("HEIGHTxWIDTH", input_size),
    metavar="HEIGHTxWIDTH",
    show_default="the bundle's own",
    help="Size that images are resized to, in pixels, as the target_size of PaddleDetection's Resize.",
)

# Large images in tiles.
TILES: Group = (
    click.option(
        "--tile",
        type=Parsed("HEIGHTxWIDTH", input_size),
        metavar="HEIGHTxWIDTH",
        show_default="images are not cut",
        help="Size of tiles, in pixels of the image, that larger images are cut into, so that small objects keep their "
        "size. Such an image is detected in as a whole, too.",
    ),
    click.option(
        "--overlap",
        type=FiniteFloat(0, 0.9),
        show_default="0.2",
        help="Share of its side by which a tile overlaps the next: more than the size of small objects.",
    ),
)

BUNDLE = click.argument("bundle", type=PATH)


ANNOTATIONS = annotations_of()

# A folder of images, or COCO annotations, of which the boxes are not needed.
IMAGES: Group = (
    click.option("--data", required=True, type=PATH, help="Folder of images, or COCO annotations (.json)."),
    ANNOTATIONS[1],
)

THREADS = click.option(
    "--threads", type=WholeNumber(1), show_default="all available", help="Number of CPU threads of one inference."
)


def _tf32(default: bool | None) -> Option:
    """--tf32; None: not given."""
    help_text = "Let FP32 on a GPU multiply in TF32, which keeps 10 of 23 bits of the mantissa: faster, less exact."
    return click.option("--tf32/--no-tf32", default=default, show_default="no-tf32", help=help_text)


# The one engine that runs a bundle.
ENGINE: Group = (
    click.option(
        "--engine",
        type=click.Choice(tuple(ENGINES)),
        metavar="ENGINE",
        show_default=f"the first of {', '.join(PREFERRED_ENGINES)} that can run the bundle",
        help=f"Engine that runs the bundle, one of {', '.join(ENGINES)}.",
    ),
    click.option(
        "--precision",
        type=click.Choice(PRECISIONS),
        show_default="that of the bundle, fp32 or int8",
        help="Precision in which the engine runs the bundle.",
    ),
    click.option("--device", type=click.Choice(DEVICES), show_default="cpu", help="Device that the engine runs on."),
    _tf32(None),
    THREADS,
)

DECODE = click.option(
    "--decode",
    type=click.Choice(["exact", "fast"]),
    default="exact",
    help="How JPEGs are decoded. fast: at 1/2, 1/4 or 1/8 where they are that much larger than the network's input; "
    "scores and boxes then differ a little.",
)

# What is shown of what NMS leaves.
SHOWN: Group = (
    click.option(
        "--threshold",
        type=FiniteFloat(0, 1),
        show_default=f"{DEFAULT_THRESHOLD:g}",
        help="Lowest score that is shown; 0: all that NMS leaves.",
    ),
    click.option(
        "--class-thresholds",
        type=Parsed("CLASS=SCORE,...", _class_threshold, listed=True),
        callback=_by_class,
        metavar="CLASS=SCORE,...",
        show_default="--threshold",
        help="Lowest scores that are shown of single classes, by name or id.",
    ),
)
# NMS otherwise than in the config of the detector, by the names that it has there.
NMS: Group = (
    click.option(
        "--classes",
        type=Parsed("CLASS,...", str, listed=True),
        metavar="CLASS,...",
        show_default="all",
        help="Classes to detect, by name or id. NMS does not see the others.",
    ),
    click.option(
        "--score-threshold",
        type=FiniteFloat(0, 1),
        show_default="the config's",
        help="Score that a detection must exceed to leave NMS. mAP needs a low one.",
    ),
    click.option(
        "--nms-threshold",
        type=FiniteFloat(0, 1),
        show_default="the config's",
        help="IoU with a better box above which NMS drops a box.",
    ),
    click.option(
        "--keep-top-k",
        type=WholeNumber(1, 100_000),
        show_default="the config's",
        help="The most detections of an image, the best ones.",
    ),
    click.option(
        "--class-agnostic/--class-wise",
        default=None,
        show_default="class-wise",
        help="Whether NMS drops a box for a better one of any class, or of its own class alone.",
    ),
)

DRAW = group(
    click.option(
        "--draw",
        is_flag=True,
        help="Draw the boxes too: pictures/*.jpg, and *.mp4 of videos, which browsers play where OpenCV has the codec.",
    ),
    click.option(
        "--draw-threshold",
        type=FiniteFloat(0, 1),
        show_default="that of --threshold",
        help="Lowest score in pictures, if a higher one.",
    ),
)

ENGINE_CACHE = click.option(
    "--engine-cache",
    type=PATH,
    default=DEFAULT_ENGINE_CACHE,
    show_default="~/.cache/gfldeploy/engines",
    metavar="DIR",
    help="Folder in which engines keep what they compiled, for the next start to be faster.",
)

# Where work is done that needs not be done on this machine.
RAY_ON_CPUS: Group = (
    click.option(
        "--ray",
        metavar="ADDRESS|auto|local",
        help="Run on a Ray cluster: HOST:PORT of its head; auto: that of this machine; local: one of this machine "
        "alone, which ends with the command. Every machine needs the same gfldeploy and engine.",
    ),
    click.option(
        "--workers",
        type=WholeNumber(1),
        show_default="as many as the cluster has room for",
        help="Number of workers on the cluster. Each has an engine, and takes as many CPUs as that has threads.",
    ),
)
RAY: Group = (
    *RAY_ON_CPUS,
    click.option(
        "--gpus-per-worker",
        type=FiniteFloat(0),
        show_default="1 with --device gpu, else 0",
        help="GPUs of one worker; a part of one lets several workers share it.",
    ),
)

PEAK = click.option("--peak/--no-peak", default=True, help="Measure the peak throughput of the engines too.")

JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")

# What `bench` and `tune` measure, and for how long.
MEASUREMENT: Group = (
    click.option(
        "--config",
        type=FILE,
        is_eager=True,
        expose_value=False,
        callback=_read_config,
        help="YAML file with values of these options, such as `batch-sizes: [1, 4]`; the command line overrides them.",
    ),
    click.option(
        "--engines",
        type=names(tuple(ENGINES)),
        default=",".join(DEFAULT_ENGINES),
        help=f"Engines to measure, a list of {', '.join(ENGINES)}.",
    ),
    click.option(
        "--precisions",
        type=names(PRECISIONS),
        default=",".join(PRECISIONS),
        help="Precisions to measure, each in every engine that supports it.",
    ),
    click.option("--device", type=click.Choice(DEVICES), default="cpu", help="Device that engines run on."),
    _tf32(False),
    click.option(
        "--rounds",
        type=WholeNumber(1),
        default=3,
        help="Number of interleaved rounds: each runs every cell once, so that a machine that slows down favours none.",
    ),
    click.option(
        "--min-seconds", type=FiniteFloat(0), default=2.0, help="Time each cell for at least this long in each round."
    ),
    click.option(
        "--min-count",
        type=WholeNumber(1),
        default=10,
        help="Time at least this number of inferences of each cell in each round.",
    ),
    limit(32, " for timing"),
    click.option("--accuracy/--no-accuracy", default=True, help="Measure COCO mAP too."),
    limit(purpose=" for mAP", name="--accuracy-limit"),
    click.option(
        "--cell-timeout",
        type=FiniteFloat(0, min_open=True),
        default=600.0,
        help="Give a cell up after this number of seconds; for mAP, after as long without an image done.",
    ),
    ENGINE_CACHE,
)
