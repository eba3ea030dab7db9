"""Read a PaddleDetection config of a GFL detector without trusting it, and build the model it describes.

ppdet's own `load_config` runs the full YAML loader, which calls whatever a `!!python/...` tag names, and merges every
config it loads into one process-wide dictionary, so that a second config inherits what the first one set. Here the
files are read with a safe loader, merged in the same order as ppdet does it, checked against the registered modules,
and handed to ppdet's dictionary only while a model is being built.
"""

from __future__ import annotations

import contextlib
import copy
import difflib
import inspect
import json
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from gfldeploy._quiet import quiet
from gfldeploy.dependencies import require
from gfldeploy.errors import ConfigError

__all__ = ["SUPPORTED_ARCHITECTURES", "SUPPORTED_HEADS", "DetectorConfig", "build_model", "load_detector_config"]

SUPPORTED_ARCHITECTURES = ("GFL",)
SUPPORTED_HEADS = ("GFLHead", "LDGFLHead")

# Top-level keys of PaddleDetection configs that name no module.
_RUNTIME_KEYS_TEXT = """
    architecture arch pretrain_weights weights filename metric map_type IouType classwise num_classes epoch worker_num
    use_gpu use_xpu use_mlu use_npu use_gcu log_iter save_dir snapshot_epoch print_flops print_params export export_onnx
    export_eb find_unused_parameters use_shared_memory norm_type data_format sync_bn use_ema use_simple_ema ema_decay
    ema_decay_type ema_black_list ema_filter_no_grad ema_start_iters cycle_epoch amp amp_level master_grad
    init_loss_scaling custom_white_list custom_black_list use_fused_allreduce_gradients to_static fleet bias
    output_eval save_prediction_only save_proposals proposals_path multi_scale_eval fuse_normalize draw_threshold
    use_vdl vdl_log_dir use_wandb wandb use_visualdl profiler_options early_stop do_eval seed device
    slim slim_method slim_type quant_batch_num unstructured_prune inference_on mosaic_epoch mixup_epoch cutmix_epoch
    eval_height eval_width eval_size image_shape input_shape input_size num_joints loss_weight min_subgraph_size
    UnsupTrainDataset DenseTeacher ARSL SemiTrainReader Global Distillation Quantization TrainConfig PTQ QAT Preprocess
    NMS mask label_list arch_type use_dynamic_shape mode act depth_mult width_mult
"""
_RUNTIME_KEYS = frozenset(_RUNTIME_KEYS_TEXT.split())


class _Tagged(dict[str, Any]):
    """A mapping under a local tag: `!COCODataSet {...}`. It replaces what it is merged over, as ppdet's objects do."""

    def __init__(self, tag: str, values: Mapping[str, Any]) -> None:
        super().__init__(values)
        self.tag = tag

    def __deepcopy__(self, memo: dict[int, Any]) -> _Tagged:
        return _Tagged(self.tag, {key: copy.deepcopy(value, memo) for key, value in self.items()})


@dataclass(frozen=True)
class DetectorConfig:
    """A checked PaddleDetection config of one detector.

    `files` are the file itself and everything its `_BASE_` chain reads, in the order they are merged. `cfg` is this
    config's own copy of ppdet's settings: nothing loaded later changes it, and only `build_model` builds from it.
    `reader` is the whole TestReader section (EvalReader where there is none) with the lists `sample_transforms` and
    `batch_transforms` always present. `nms` holds every argument of MultiClassNMS, defaults included. `strides` are in
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
    nms: dict[str, Any] = field(repr=False)
    files: tuple[Path, ...] = field(repr=False)
    cfg: Any = field(repr=False)
    notes: tuple[str, ...] = ()


def load_detector_config(path: Path) -> DetectorConfig:
    """Load the PaddleDetection config at `path` (`.yml` or `.yaml`) and check everything the exporter relies on.

    What counts as a mistake: a missing or unreadable file anywhere in the `_BASE_` chain, a cycle in it, a Python tag;
    an architecture or head other than those supported; a module that is not registered; an argument its module does
    not take, at any depth. Of the top-level keys that are neither a registered module nor a PaddleDetection setting,
    those that resemble one are refused as misspelt, and so are mappings with a capital letter in front, which is how
    PaddleDetection writes a module: it would ignore them without a word. Other unknown keys (`my_size: &size [640,
    640]`) pass. Modules that accept any keyword (readers, datasets) refuse only keys that resemble a known one.

    Nothing is downloaded: `pretrain_weights` and every module's `pretrained` are set to None. Class names come from
    the label list or annotations of TestDataset, then EvalDataset, looked up from the working directory as
    PaddleDetection does and then from the config's own folder and those of its bases; COCO categories keep the order of
    the file, which is the order PaddleDetection trains in. Without such a file they are COCO's 80 names if there are 80
    classes, else `class_0`, `class_1` and so on.

    Raises `ConfigError`, or `MissingDependencyError` where paddle or ppdet is missing.
    """
    path = Path(path)
    layers = _read_chain(path)  # before anything heavy is imported: a missing file is reported at once
    workspace = _workspace()
    settings: dict[str, Any] = {}
    for _, values in layers:
        _merge(settings, values)
    checker = _Checker(path, layers, _registered(workspace))
    checker.check_top_level(settings)
    _drop_pretrained(settings, checker.modules)
    settings["filename"] = path.stem

    head = checker.check_graph(settings)
    head_values = checker.effective(settings, head)
    num_classes = _positive_int(checker, head_values["num_classes"], "num_classes")
    reg_max = _positive_int(checker, head_values["reg_max"], f"{head}.reg_max")
    strides = head_values["fpn_stride"]
    if not isinstance(strides, list) or not strides:
        raise checker.error(f"{head}.fpn_stride must be a list of strides in pixels", "Write [8, 16, 32, 64, 128].")
    reader = checker.check_reader(settings)
    classes = _class_names(checker, settings, num_classes)
    with _installed(workspace, _fresh(workspace), settings):
        cfg = _snapshot(workspace.global_config)
    return DetectorConfig(
        path=path,
        name=path.stem,
        head=head,
        num_classes=num_classes,
        classes=classes,
        strides=tuple(_positive_int(checker, stride, f"every value of {head}.fpn_stride") for stride in strides),
        reg_max=reg_max,
        reader=reader,
        nms=checker.check_nms(settings, head, head_values),
        files=tuple(file for file, _ in layers),
        cfg=cfg,
    )


def build_model(config: DetectorConfig) -> Any:
    """Build the paddle model of `config` in evaluation mode, with the random weights its layers start with.

    Raises `ConfigError` when the values do not fit together (a depth that ResNet does not have, for example).
    """
    workspace = _workspace()
    try:
        with _installed(workspace, _snapshot(config.cfg), {}), quiet():
            model = workspace.create(config.cfg["architecture"])
            model.eval()
    except (AssertionError, AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        detail = str(error) or type(error).__name__
        raise ConfigError(
            f"{config.path}: PaddleDetection cannot build this model: {detail}", "Correct the config."
        ) from error
    return model


# --- files ------------------------------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """YAML's safe loader, plus PaddleDetection's plain tags as mappings."""


def _construct_local(loader: _Loader, tag: str, node: yaml.Node) -> Any:
    if tag == "Callable":  # ppdet's wrapper for "call this Python function"
        raise yaml.constructor.ConstructorError(
            None, None, "refused !Callable, which runs Python code", node.start_mark
        )
    if isinstance(node, yaml.MappingNode):
        return _Tagged(tag, {str(key): value for key, value in loader.construct_mapping(node, deep=True).items()})
    if isinstance(node, yaml.ScalarNode) and not node.value:
        return _Tagged(tag, {})
    raise yaml.constructor.ConstructorError(None, None, f"!{tag} must be followed by a mapping", node.start_mark)


def _refuse_python(loader: _Loader, suffix: str, node: yaml.Node) -> Any:
    raise yaml.constructor.ConstructorError(
        None, None, f"refused !!python/{suffix}, which runs Python code", node.start_mark
    )


_Loader.add_multi_constructor("!", _construct_local)
_Loader.add_multi_constructor("tag:yaml.org,2002:python/", _refuse_python)


def _read_chain(path: Path) -> list[tuple[Path, dict[str, Any]]]:
    """Every file of the `_BASE_` chain with its own values, in the order they are merged: bases first."""
    layers: list[tuple[Path, dict[str, Any]]] = []

    def visit(file: Path, chain: tuple[Path, ...]) -> None:
        resolved = file.resolve()
        if resolved in (parent.resolve() for parent in chain):
            cycle = " -> ".join(link.name for link in (*chain, file))
            raise ConfigError(f"{chain[0]}: _BASE_ goes in a circle: {cycle}", "Remove one of these references.")
        values = _read_yaml(file, asked_by=chain[-1] if chain else None)
        bases = values.pop("_BASE_", None) or []
        if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
            raise ConfigError(f"{file}: _BASE_ must be a list of files", "Write it as ['../base.yml'].")
        for base in bases:
            visit(file.parent / Path(base).expanduser(), (*chain, file))
        layers.append((file, values))

    visit(path, ())
    return layers


def _read_yaml(file: Path, asked_by: Path | None) -> dict[str, Any]:
    origin = f" (named by _BASE_ in {asked_by})" if asked_by else ""
    if file.suffix not in (".yml", ".yaml"):
        raise ConfigError(
            f"{file} is not a .yml or .yaml file{origin}", "Pass the PaddleDetection config of the detector."
        )
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        remedy = "Correct _BASE_, or copy that file too." if asked_by else "Check the path."
        raise ConfigError(f"config file {file} does not exist{origin}", remedy) from None
    except OSError as error:
        reason = error.strerror or error
        raise ConfigError(f"config file {file} cannot be read{origin}: {reason}", "Check the file.") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"config file {file} is not UTF-8 text{origin}", "Save it as UTF-8.") from error
    try:
        values = yaml.load(text, Loader=_Loader)  # a SafeLoader that constructs plain mappings only
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark else ""
        problem = error.problem or error.context or "not valid YAML"
        if problem.startswith("could not determine a constructor"):
            problem = problem.replace("could not determine a constructor for the tag", "unknown tag")
        remedy = "Remove that tag." if problem.startswith(("refused", "unknown tag")) else "Correct the YAML there."
        raise ConfigError(f"{file}{line}: {problem}", remedy) from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{file}: not valid YAML: {error}", "Correct the YAML.") from error
    if values is None:
        raise ConfigError(f"{file} is empty{origin}", "Pass a PaddleDetection config.")
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ConfigError(f"{file} is not a mapping of settings{origin}", "Pass a PaddleDetection config.")
    return values


def _merge(into: dict[str, Any], new: Mapping[str, Any]) -> None:
    """Merge `new` over `into`, mapping by mapping, as ppdet does; values are copied."""
    for key, value in new.items():
        old = into.get(key)
        if type(old) is dict and type(value) is dict:
            _merge(old, value)
        else:
            into[key] = copy.deepcopy(value)


# --- ppdet's process-wide dictionary ----------------------------------------------------------------------------------

_LOCK = threading.RLock()


def _workspace() -> Any:
    """`ppdet.core.workspace` with every module registered, the demo's backbone among them."""
    require("paddle", "paddle", "export")
    require("ppdet", "export", "export")
    from gfldeploy.demo import register_backbone

    with quiet():
        register_backbone()
    return require("ppdet.core.workspace", "export", "export")


def _registered(workspace: Any) -> dict[str, Any]:
    """Module name to its SchemaDict."""
    return {name: value for name, value in workspace.global_config.items() if hasattr(value, "pymodule")}


def _fresh(workspace: Any) -> Any:
    """ppdet's dictionary as it is before any config is loaded: every registered module without a value."""
    pristine = workspace.AttrDict()
    for name, module in _registered(workspace).items():
        pristine[name] = _copy_schema(module, {})
    return pristine


def _snapshot(config: Any) -> Any:
    """A copy of such a dictionary that shares no value with it."""
    copied = type(config)()
    for name, value in config.items():
        values = copy.deepcopy(dict(value)) if hasattr(value, "pymodule") else copy.deepcopy(value)
        copied[name] = _copy_schema(value, values) if hasattr(value, "pymodule") else values
    return copied


def _copy_schema(module: Any, values: Mapping[str, Any]) -> Any:
    copied = type(module)()
    copied.__dict__.update(module.__dict__)
    copied.update(values)
    return copied


@contextlib.contextmanager
def _installed(workspace: Any, content: Any, settings: Mapping[str, Any]) -> Iterator[None]:
    """Let ppdet's dictionary hold `content` with `settings` merged in; afterwards it is what it was before."""
    config = workspace.global_config
    with _LOCK:
        before = dict(config)
        try:
            config.clear()
            config.update(content)
            workspace.merge_config(copy.deepcopy(dict(settings)))
            yield
        finally:
            config.clear()
            config.update(before)


def _drop_pretrained(settings: dict[str, Any], modules: Mapping[str, Any]) -> None:
    """Nothing may be fetched while the model is built."""
    settings["pretrain_weights"] = None
    for name, values in settings.items():
        if name in modules and isinstance(values, dict) and "pretrained" in values:
            values["pretrained"] = None


# --- checks -----------------------------------------------------------------------------------------------------------


def _closest(word: str, known: Iterable[str], cutoff: float = 0.8) -> str | None:
    folded = {name.casefold(): name for name in sorted(known)}
    found = difflib.get_close_matches(word.casefold(), folded, n=1, cutoff=cutoff)
    return folded[found[0]] if found else None


class _Checker:
    """The checks of one config; messages name the file of the `_BASE_` chain that holds the mistake."""

    def __init__(self, path: Path, layers: list[tuple[Path, dict[str, Any]]], modules: dict[str, Any]) -> None:
        self.path = path
        self.folders = [file.parent for file, _ in reversed(layers)]  # the config's own first
        self.modules = modules
        self._layers = layers
        self._known = _RUNTIME_KEYS | modules.keys() | _shared_keys(modules)

    def error(self, problem: str, remedy: str, *keys: str) -> ConfigError:
        """`keys`: where the mistake is, to name the file it comes from."""
        file = self.path
        for layer, values in reversed(self._layers):
            node: Any = values
            for key in keys:
                node = node.get(key, _MISSING) if isinstance(node, dict) else _MISSING
            if node is not _MISSING:
                file = layer
                break
        return ConfigError(f"{file}: {problem}", remedy)

    def check_top_level(self, settings: Mapping[str, Any]) -> None:
        for name, values in settings.items():
            if name in self.modules:
                if not isinstance(values, dict):
                    kind = "empty" if values is None else "not a mapping"
                    raise self.error(f"section {name} is {kind}", "Give it its arguments, or remove it.", name)
                self._check_section(name, values)
            elif name not in self._known:
                close = _closest(name, self._known)
                if close:
                    raise self.error(f"unknown key {name!r}", f"Did you mean {close!r}?", name)
                if isinstance(values, dict) and name[:1].isupper():
                    raise self.error(
                        f"section {name} names no module of PaddleDetection and would be ignored",
                        "Correct its name, or remove it.",
                        name,
                    )

    def _check_section(self, name: str, values: Mapping[str, Any]) -> None:
        # A dataset is written `TestDataset: !ImageFolder {...}` or `TestDataset: {name: ImageFolder, ...}`.
        target = name
        if isinstance(values, _Tagged):
            target = values.tag
            if target not in self.modules:
                close = _closest(target, self.modules, 0.6)
                remedy = f"Did you mean !{close}?" if close else "Use a tag PaddleDetection knows."
                raise self.error(f"unknown tag !{target} in section {name}", remedy, name)
        self._check_arguments(target, values, (name,))
        if isinstance(values, _Tagged):
            return
        if name in SUPPORTED_HEADS and "nms" in values:
            self._check_nms_kind(name, values["nms"])
        for key in self.modules[name].inject:
            self._check_injected(values.get(key), (name, key))

    def _check_arguments(self, module: str, values: Mapping[str, Any], keys: tuple[str, ...]) -> None:
        schema = self.modules[module].schema
        strict = self.modules[module].strict
        for key in values:
            if key in schema or (key == "name" and (len(keys) > 1 or not strict)):
                continue
            close = _closest(str(key), schema, 0.6 if strict else 0.8)
            if strict or close:
                where = ".".join(keys)
                takes = "It takes: " + ", ".join(schema) + "." if schema else "It takes no arguments."
                remedy = f"Did you mean {close!r}?" if close else takes
                raise self.error(f"{where}: {module} has no argument {key!r}", remedy, *keys, str(key))

    def _check_injected(self, value: Any, keys: tuple[str, ...]) -> None:
        """A module given as another's argument: its name, or `{name: ..., argument: ...}`."""
        where = ".".join(keys)
        if value is None:
            return
        if isinstance(value, _Tagged):
            raise self.error(f"{where} is tagged !{value.tag}", f"Write {{name: {value.tag}, ...}} instead.", *keys)
        name = value.get("name") if isinstance(value, dict) else value
        if not isinstance(name, str):
            raise self.error(f"{where} names no module", "Give it as a name, or as {name: ..., argument: ...}.", *keys)
        self._check_registered(name, keys)
        if isinstance(value, dict):
            self._check_arguments(name, value, keys)
            for key in self.modules[name].inject:
                self._check_injected(value.get(key), (*keys, key))

    def _check_registered(self, name: str, keys: tuple[str, ...]) -> None:
        if name not in self.modules:
            close = _closest(name, self.modules, 0.6)
            remedy = f"Did you mean {close!r}?" if close else "Use a module that PaddleDetection 2.6 has."
            raise self.error(f"{'.'.join(keys)}: module {name!r} does not exist", remedy, *keys)

    def check_graph(self, settings: Mapping[str, Any]) -> str:
        """Check architecture, backbone, neck and head; return the head's name."""
        architecture = settings.get("architecture")
        if architecture is None:
            raise self.error("no architecture is set", "Pass a detector's config, with 'architecture: GFL'.")
        if architecture not in SUPPORTED_ARCHITECTURES:
            raise self.error(
                f"architecture {architecture!r} is not supported",
                f"Supported: {', '.join(SUPPORTED_ARCHITECTURES)} with head {' or '.join(SUPPORTED_HEADS)}.",
                "architecture",
            )
        graph = self.effective(settings, str(architecture))
        for part in ("backbone", "neck", "head"):
            name = graph.get(part)
            if not isinstance(name, str):
                raise self.error(
                    f"{architecture}.{part} names no module", f"Write '{part}: NAME'.", str(architecture), part
                )
            self._check_registered(name, (str(architecture), part))
        head = str(graph["head"])
        if head not in SUPPORTED_HEADS:
            raise self.error(
                f"head {head} is not supported", f"Supported: {', '.join(SUPPORTED_HEADS)}.", str(architecture), "head"
            )
        return head

    def effective(self, settings: Mapping[str, Any], module: str) -> dict[str, Any]:
        """The arguments `module` is built with: its defaults, top-level shared settings, its own section."""
        values: dict[str, Any] = {}
        for key, argument in self.modules[module].schema.items():
            if not argument.has_default():
                continue
            default = argument.default
            if hasattr(default, "default_value"):  # shared: a top-level key of that name, if there is one
                default = settings.get(default.key, default.default_value)
            values[key] = copy.deepcopy(default)
        values.update(copy.deepcopy(dict(settings.get(module) or {})))
        return values

    def _check_nms_kind(self, head: str, given: Any) -> None:
        name = given.get("name") if isinstance(given, dict) else given
        if name is None or (name in self.modules and name != "MultiClassNMS"):
            raise self.error(
                f"{head}.nms is {name or 'not set'}, which is not supported",
                "Write 'nms: {name: MultiClassNMS, ...}'.",
                head,
                "nms",
            )

    def check_nms(self, settings: Mapping[str, Any], head: str, head_values: Mapping[str, Any]) -> dict[str, Any]:
        given = head_values.get("nms")
        self._check_nms_kind(head, given)
        values = self.effective(settings, "MultiClassNMS")
        if isinstance(given, dict):
            values.update({key: value for key, value in given.items() if key != "name"})
        for key in ("score_threshold", "nms_threshold"):
            value = values[key]
            number = isinstance(value, int | float) and not isinstance(value, bool)
            # A score threshold below 0 lets everything pass, as 0 does.
            if not number or not value <= 1 or (key == "nms_threshold" and value < 0):
                raise self.error(f"{head}.nms.{key} must be between 0 and 1, not {value!r}", "Correct it.", head, "nms")
        for key in ("nms_top_k", "keep_top_k"):
            value = values[key]
            if not isinstance(value, int) or isinstance(value, bool) or value < -1 or value == 0:
                problem = f"{head}.nms.{key} must be a positive whole number, or -1 for no limit, not {value!r}"
                raise self.error(problem, "Correct it.", head, "nms")
        return values

    def check_reader(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """TestReader, or EvalReader where there is none, with transforms that exist and take their arguments."""
        name = "TestReader" if settings.get("TestReader") else "EvalReader"
        section = settings.get(name)
        if not section:
            raise self.error("it has neither TestReader nor EvalReader", "Add one: it says how images are prepared.")
        reader: dict[str, Any] = copy.deepcopy(dict(section))
        transforms = require("ppdet.data.transform", "export", "export")
        for key in ("sample_transforms", "batch_transforms"):
            steps = reader.setdefault(key, [])
            if steps is None:
                steps = reader[key] = []
            if not isinstance(steps, list) or not all(isinstance(step, dict) and len(step) == 1 for step in steps):
                raise self.error(f"{name}.{key} must be a list of '- Name: {{...}}'", "Correct it.", name, key)
            for step in steps:
                ((operator, arguments),) = step.items()
                self._check_transform(transforms, f"{name}.{key}", operator, arguments, (name, key))
        return reader

    def _check_transform(self, known: Any, where: str, name: str, arguments: Any, keys: tuple[str, ...]) -> None:
        operator = getattr(known, name, None)
        if not inspect.isclass(operator):
            classes = [other for other in dir(known) if inspect.isclass(getattr(known, other))]
            close = _closest(name, classes, 0.6)
            remedy = f"Did you mean {close!r}?" if close else "Use a transform that PaddleDetection 2.6 has."
            raise self.error(f"{where}: transform {name!r} does not exist", remedy, *keys)
        if arguments is not None and not isinstance(arguments, dict):
            raise self.error(f"{where}: {name} must be followed by its arguments", f"Write '{name}: {{}}'.", *keys)
        parameters = inspect.signature(operator.__init__).parameters
        if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
            return
        accepted = [key for key in parameters if key != "self"]
        for key in arguments or {}:
            if key not in accepted:
                close = _closest(str(key), accepted, 0.6)
                remedy = (
                    f"Did you mean {close!r}?" if close else "It takes: " + (", ".join(accepted) or "nothing") + "."
                )
                raise self.error(f"{where}: {name} has no argument {key!r}", remedy, *keys)


_MISSING = object()


def _shared_keys(modules: Mapping[str, Any]) -> set[str]:
    """Settings that modules read from the top level unless their own section sets them (`num_classes`, ...)."""
    return {
        argument.default.key
        for module in modules.values()
        for argument in module.schema.values()
        if argument.has_default() and hasattr(argument.default, "default_value")
    }


def _positive_int(checker: _Checker, value: Any, what: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise checker.error(f"{what} must be a positive whole number, not {value!r}", "Correct it.", what)
    return value


# --- classes ----------------------------------------------------------------------------------------------------------


def _class_names(checker: _Checker, settings: Mapping[str, Any], num_classes: int) -> tuple[str, ...]:
    for section in ("TestDataset", "EvalDataset"):
        file = _class_file(checker.folders, section, settings.get(section))
        if file is None:
            continue
        names = _names_from_json(file) if file.suffix == ".json" else _names_from_text(file)
        if len(names) != num_classes:
            raise checker.error(
                f"num_classes is {num_classes}, but {file} ({section}) names {len(names)} classes",
                "Set num_classes to that, or point the dataset at the right file.",
                "num_classes",
            )
        return names
    if num_classes == 80 and str(settings.get("metric", "COCO")).upper() == "COCO":
        category = require("ppdet.data.source.category", "export", "export")
        _, by_id = category._coco17_category()
        return tuple(by_id.values())
    return tuple(f"class_{index}" for index in range(num_classes))


def _class_file(folders: Iterable[Path], section: str, values: Any) -> Path | None:
    """The existing file that names the classes, if the dataset section `values` points at one."""
    if not isinstance(values, dict):
        return None
    kind = values.tag if isinstance(values, _Tagged) else values.get("name")
    root = Path(str(values.get("dataset_dir") or ""))
    for key in ("label_list", "anno_path"):
        given = values.get(key)
        if not isinstance(given, str) or not given:
            continue
        # A .txt `anno_path` lists classes for ImageFolder, but images for VOCDataSet.
        lists_classes = key == "label_list" or kind == "ImageFolder" or (kind is None and section == "TestDataset")
        if not given.endswith(".json") and not (given.endswith(".txt") and lists_classes):
            continue
        beside = [path for folder in folders for path in (folder / root / given, folder / given)]
        for candidate in (root / given, *beside):
            if candidate.is_file():
                return candidate
    return None


def _names_from_json(file: Path) -> tuple[str, ...]:
    try:
        document = json.loads(file.read_bytes())
        return tuple(str(category["name"]) for category in document["categories"])
    except OSError as error:
        raise ConfigError(f"annotation file {file} cannot be read: {error.strerror}", "Check the file.") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ConfigError(
            f"annotation file {file} has no list of COCO categories", "Point anno_path at COCO annotations."
        ) from error


def _names_from_text(file: Path) -> tuple[str, ...]:
    try:
        names = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"label list {file} cannot be read: {error}", "Save it as UTF-8 text.") from error
    names = [name for name in names if name]
    return tuple(names[1:] if names[:1] == ["background"] else names)
