"""Read a PaddleDetection config of a detector without trusting it.

ppdet's own `load_config` runs the full YAML loader, which calls whatever a `!!python/...` tag names, and merges every
config it loads into one process-wide dictionary, so that a second config inherits what the first one set. Here the
files are read with a safe loader, merged in the same order as ppdet does it, checked against the registered modules,
and handed to ppdet's dictionary only while a model is being built.

Nothing that a config says is run, loaded or fetched. Several of ppdet's modules hand strings of the config to `eval`,
or a path or an address to `paddle.load`. So a value of a model's section can only be a number, a word, a path or a
dotted name, each part of the model comes from where ppdet keeps such parts, and while they are built `eval` looks up
names of layers and nothing else, nothing is loaded, and what is built is counted before memory is taken for it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gfldeploy.export.class_names import class_names
from gfldeploy.export.config_checks import ConfigChecker
from gfldeploy.export.config_files import read_chain
from gfldeploy.export.heads import HEADS
from gfldeploy.export.workspace import fresh, installed, load_workspace, registered, snapshot
from gfldeploy.nms import NmsParams


@dataclass(frozen=True)
class DetectorConfig:
    """A checked PaddleDetection config of one detector.

    `files` are the file itself and everything its `_BASE_` chain reads, in the order they are merged. `cfg` is this
    config's own copy of ppdet's settings: nothing loaded later changes it, and only `model_builder` builds from it.
    `reader` is the whole TestReader section (EvalReader where there is none) with the lists `sample_transforms` and
    `batch_transforms` always present. `nms`: the arguments of MultiClassNMS, defaults included. `strides` are in
    pixels, one for each level. `classes` has `num_classes` names in the order of the score channels.
    `notes`: what was understood otherwise than the user may think, one sentence each; they go into the bundle.
    """

    path: Path
    name: str
    head: str
    num_classes: int
    classes: tuple[str, ...]
    strides: tuple[int, ...]
    reg_max: int
    reader: dict[str, Any] = field(repr=False)
    nms: NmsParams = field(repr=False)
    files: tuple[Path, ...] = field(repr=False)
    cfg: Any = field(repr=False)
    notes: tuple[str, ...] = ()


def load_detector_config(path: Path) -> DetectorConfig:
    """Load the PaddleDetection config at `path` (`.yml` or `.yaml`) and check everything the exporter relies on.

    Refused are: files of the `_BASE_` chain that cannot be read, a cycle in it, Python tags; other architectures and
    heads than those supported; modules that are not registered, and arguments that a module does not take, at any
    depth. Unknown top-level keys are refused where they resemble a known one or are mappings that begin with a capital
    letter, as modules do: PaddleDetection would ignore them without a word. Modules that accept any keyword (readers,
    datasets) refuse only keys that resemble a known one.

    Nothing is downloaded: `pretrain_weights` and every module's `pretrained` are set to None. Class names come from
    the label list or annotations of TestDataset, then EvalDataset, looked up from the working directory and then from
    the folders of the config and its bases; COCO categories keep the order of the file, in which PaddleDetection
    trains. Without such a file they are PaddleDetection's for the metric (COCO's 80, VOC's 20, ...) if they are as
    many, else `class_0`, `class_1` and so on.

    Raises `ConfigError`, or `MissingDependencyError` where paddle or ppdet is missing.
    """
    path = Path(path)
    layers, settings = read_chain(path)  # before anything heavy is imported: a missing file is reported at once
    workspace = load_workspace()
    checker = ConfigChecker(path, layers, registered(workspace))
    checker.check_top_level(settings)
    _drop_pretrained(settings, checker.model_sections)
    checker.check_values(settings)
    settings["filename"] = path.stem

    head = checker.check_graph(settings)
    spec, head_values = HEADS[head], checker.effective(settings, head)
    num_classes = checker.positive_int(head_values["num_classes"], "num_classes")
    reg_max = checker.positive_int(head_values[spec.reg_max], f"{head}.{spec.reg_max}")
    strides = head_values[spec.strides]
    if not isinstance(strides, list) or not strides:
        problem = f"{head}.{spec.strides} must be a list of strides in pixels"
        raise checker.error(problem, "Write [8, 16, 32, 64, 128].")
    reader = checker.check_reader(settings)
    classes, notes = class_names(checker, settings, num_classes)
    notes += checker.compare_readers(settings, reader)
    with installed(workspace, fresh(workspace), settings):
        cfg = snapshot(workspace.global_config)
    return DetectorConfig(
        path=path,
        name=path.stem,
        head=head,
        num_classes=num_classes,
        classes=classes,
        strides=tuple(checker.positive_int(stride, f"every value of {head}.{spec.strides}") for stride in strides),
        reg_max=reg_max,
        reader=reader,
        nms=checker.check_nms(settings, head, head_values),
        files=tuple(file for file, _ in layers),
        cfg=cfg,
        notes=notes,
    )


def _drop_pretrained(settings: dict[str, Any], sections: Iterable[str]) -> None:
    """Nothing may be loaded or fetched while the model is built."""
    settings["pretrain_weights"] = None
    stack = [settings[name] for name in sections if name in settings]
    while stack:
        values = stack.pop()
        if isinstance(values, dict):
            for key in values:
                # `pretrain_img_size` is no such thing, but a size.
                if "pretrain" in str(key) and isinstance(values[key], str | bool):
                    values[key] = None
            stack += values.values()
        elif isinstance(values, list):
            stack += values
