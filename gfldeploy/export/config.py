"""Read a PaddleDetection config of a GFL detector without trusting it, and build the model it describes.

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

import contextlib
import copy
import difflib
import inspect
import json
import math
import os
import re
import reprlib
import sys
import threading
import traceback
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from gfldeploy._quiet import quiet
from gfldeploy.engines.dependencies import require
from gfldeploy.errors import ConfigError, GfldeployError, reading
from gfldeploy.yaml_file import PlainLoader, YamlError, read_yaml

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
    the file, which is the order PaddleDetection trains in. Without such a file they are those that PaddleDetection has
    for the metric (COCO's 80, VOC's 20, ...) if they are as many, else `class_0`, `class_1` and so on.

    Raises `ConfigError`, or `MissingDependencyError` where paddle or ppdet is missing.
    """
    path = Path(path)
    layers, settings = _read_chain(path)  # before anything heavy is imported: a missing file is reported at once
    workspace = _workspace()
    checker = _Checker(path, layers, _registered(workspace))
    checker.check_top_level(settings)
    _drop_pretrained(settings, checker.model_sections)
    checker.check_values(settings)
    settings["filename"] = path.stem

    head = checker.check_graph(settings)
    head_values = checker.effective(settings, head)
    num_classes = _positive_int(checker, head_values["num_classes"], "num_classes")
    reg_max = _positive_int(checker, head_values["reg_max"], f"{head}.reg_max")
    strides = head_values["fpn_stride"]
    if not isinstance(strides, list) or not strides:
        raise checker.error(f"{head}.fpn_stride must be a list of strides in pixels", "Write [8, 16, 32, 64, 128].")
    reader = checker.check_reader(settings)
    classes, notes = _class_names(checker, settings, num_classes)
    notes += checker.compare_readers(settings, reader)
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
        notes=notes,
    )


def build_model(config: DetectorConfig) -> Any:
    """Build the paddle model of `config` in evaluation mode, with zeros for most of its weights.

    Raises `ConfigError` when the values do not fit together (a depth that ResNet does not have, for example), when
    they would have code run or a file loaded, or when the model is larger than any that could be deployed.
    """
    workspace = _workspace()
    try:
        with _installed(workspace, _snapshot(config.cfg), {}), quiet(), _confined(config.path):
            model = workspace.create(config.cfg["architecture"])
            model.eval()
    except GfldeployError:
        raise
    except Exception as error:  # ppdet meets values that do not fit with whatever its code runs into
        part, connecting = _part(error, workspace)
        where = f" ({part})" if part else ""
        remedy = f"Correct what the config says of {part}." if part else "Correct the config."
        if connecting:
            remedy = f"Check what feeds {part}: not every backbone and neck of PaddleDetection go together."
        raise ConfigError(
            f"{config.path}: PaddleDetection cannot build this model{where}: {_reason(error)}", remedy
        ) from error
    return model


def _reason(error: Exception) -> str:
    """What an exception of Paddle or ppdet says, in one line: Paddle's end with a summary after the C++ calls."""
    text = " ".join(str(error).rpartition("Error Message Summary:")[2].strip(" -\n").split())
    if isinstance(error, MemoryError) or text.startswith("(ResourceExhausted)"):
        return f"it takes more than the {_MOST_BYTES / 1e9:.1f} GB of memory that any detector does"
    if not text or isinstance(error, KeyError | IndexError | TypeError | ArithmeticError):  # little without their line
        lines = traceback.extract_tb(error.__traceback__)
        at = f" at '{_cut(lines[-1].line, 100)}'" if lines and lines[-1].line else ""
        text = f"{type(error).__name__}{f': {text}' if text else ''}{at}"
    return _cut(text, 300)


def _part(error: Exception, workspace: Any) -> tuple[str | None, bool]:
    """The innermost module of ppdet whose code raised `error`, and whether that was while it looked at its input."""
    part, connecting = None, False
    for frame, _ in traceback.walk_tb(error.__traceback__):
        owner = frame.f_locals.get("self", frame.f_locals.get("cls"))
        name = owner.__name__ if inspect.isclass(owner) else type(owner).__name__
        if name != "GFL" and hasattr(workspace.global_config.get(name), "pymodule"):
            part, connecting = name, frame.f_code.co_name == "from_config"
    return part, connecting


# --- files ------------------------------------------------------------------------------------------------------------


class _Loader(PlainLoader):
    """Plain YAML, with PaddleDetection's own tags as mappings."""


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

Layers = list[tuple[Path, dict[str, Any]]]

_MOST_FILES = 100  # of a `_BASE_` chain
_MOST_MERGED = 200_000  # values: a file that is named again is merged again


def _read_chain(path: Path) -> tuple[Layers, dict[str, Any]]:
    """Every file of the `_BASE_` chain, bases first, with its own values; and the values of all, merged."""
    layers: Layers = []
    merged: dict[str, dict[str, Any]] = {}  # by real path: no file is read twice
    spent = 0

    def visit(file: Path, chain: tuple[Path, ...]) -> dict[str, Any]:
        nonlocal spent
        real = os.path.realpath(file)
        if real in merged:
            return merged[real]
        if real in map(os.path.realpath, chain):
            cycle = " -> ".join(link.name for link in (*chain, file))
            raise ConfigError(f"{chain[0]}: _BASE_ goes in a circle: {_cut(cycle)}", "Remove one of these references.")
        if len(layers) + len(chain) >= _MOST_FILES:
            raise ConfigError(f"{path}: its _BASE_ chain has more than {_MOST_FILES} files", "Merge some of them.")
        values = _read_config(file, asked_by=chain[-1] if chain else None)
        bases = values.pop("_BASE_", None) or []
        if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
            raise ConfigError(f"{file}: _BASE_ must be a list of files", "Write it as ['../base.yml'].")
        settings: dict[str, Any] = {}
        for base in bases:
            home = os.path.expanduser(base) if base.startswith("~") else base  # noqa: PTH111 - unknown users stay
            below = visit(file.parent / home, (*chain, file))
            spent += _size(below)
            if spent > _MOST_MERGED:
                raise ConfigError(f"{path}: its _BASE_ chain merges the same files again and again", "Name each once.")
            _merge(settings, below)
        _merge(settings, values)
        layers.append((file, values))
        merged[real] = settings
        return settings

    return layers, visit(path, ())


def _size(value: Any) -> int:
    """How many values a mapping or list holds, itself included."""
    if isinstance(value, dict):
        return 1 + sum(map(_size, value.values()))
    return 1 + sum(map(_size, value)) if isinstance(value, list) else 1


def _read_config(file: Path, asked_by: Path | None) -> dict[str, Any]:
    origin = f" (named by _BASE_ in {asked_by})" if asked_by else ""
    if file.suffix not in (".yml", ".yaml"):
        raise ConfigError(
            f"{_cut(str(file))} is not a .yml or .yaml file{origin}", "Pass the PaddleDetection config of the detector."
        )
    try:
        values = read_yaml(file, _Loader)
    except FileNotFoundError:
        remedy = "Correct _BASE_, or copy that file too." if asked_by else "Check the path."
        raise ConfigError(f"config file {_cut(str(file))} does not exist{origin}", remedy) from None
    except OSError as error:
        reason = error.strerror or error
        raise ConfigError(
            f"config file {_cut(str(file))} cannot be read{origin}: {reason}", "Check the file."
        ) from error
    except YamlError as error:
        if error.problem == "not UTF-8 text":
            raise ConfigError(f"config file {file} is not UTF-8 text{origin}", "Save it as UTF-8.") from error
        line = f":{error.line}" if error.line else ""
        remedy = "Remove that tag." if error.problem.startswith(("refused", "unknown tag")) else "Correct the YAML."
        raise ConfigError(f"{file}{line}: {error.problem}", remedy) from error
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
    require("paddle", "export")
    require("ppdet", "export")
    with quiet():
        import gfldeploy.export.demo_backbone  # noqa: F401  # the import registers it

    return require("ppdet.core.workspace", "export")


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


# --- what may happen while ppdet builds -------------------------------------------------------------------------------

# Above what any backbone of ppdet comes to (its largest transformers have some 350 million parameters).
_MOST_PARAMETERS = 400_000_000
_MOST_TENSORS = 6_000
_MOST_BYTES = 5 * 2**29  # 1.6 GB of parameters, and what is computed beside them
_NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*\Z", re.ASCII)


@contextlib.contextmanager
def _confined(path: Path) -> Iterator[None]:
    """While ppdet builds a model: `eval` finds layers by name, nothing is loaded, parameters are counted and zero."""
    import paddle

    remedy = "Correct the config; use it only if you trust its source."
    tensors = parameters = 0

    def look_up(module: Any) -> Any:
        def look_up_in_module(text: Any) -> Any:
            found = None
            if isinstance(text, str) and _NAME.match(text):
                first, *rest = text.split(".")
                found = vars(module).get(first)
                for name in rest:
                    found = getattr(found, name, None)
            layer = inspect.isclass(found) and issubclass(found, paddle.nn.Layer)
            home = str(getattr(found, "__module__", None))
            if not layer and not (inspect.isfunction(found) and home.startswith(("paddle.nn.", "ppdet.modeling."))):
                problem = f"{path}: PaddleDetection would run {_shown(text)}, which is not the name of a layer"
                raise ConfigError(problem, remedy)
            return found

        return look_up_in_module

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise ConfigError(f"{path}: building the model would load {_shown(args[0] if args else kwargs)}", remedy)

    create, zeros = paddle.nn.Layer.create_parameter, paddle.nn.initializer.Constant(0.0)

    def counted(self: Any, shape: Any, attr: Any = None, *args: Any, **kwargs: Any) -> Any:
        nonlocal tensors, parameters
        tensors += 1
        sizes = [int(size) for size in shape]
        if any(size < 1 for size in sizes):
            problem = f"{path}: a layer of type {type(self).__name__} would have a parameter of shape {sizes}"
            raise ConfigError(problem, "Correct the channels in the config.")
        parameters += math.prod(sizes)
        if tensors > _MOST_TENSORS or parameters > _MOST_PARAMETERS:
            many = f"{_MOST_TENSORS} tensors" if tensors > _MOST_TENSORS else f"{_MOST_PARAMETERS} parameters"
            raise ConfigError(f"{path}: the model has more than {many}", "Correct the sizes in the config.")
        if len(shape) > 1:  # drawing them takes longer than all else
            if isinstance(attr, paddle.ParamAttr):
                attr = copy.copy(attr)
                attr.initializer = zeros
            elif attr is not False:
                attr = None
            if len(args) > 2:
                args = (*args[:2], zeros, *args[3:])
            else:
                kwargs["default_initializer"] = zeros
        return create(self, shape, attr, *args, **kwargs)

    with contextlib.ExitStack() as stack:
        for name, module in list(sys.modules.items()):
            if name.startswith("ppdet.") and module is not None:
                stack.enter_context(_replaced(module, "eval", look_up(module)))
        stack.enter_context(_replaced(paddle, "load", refuse))
        stack.enter_context(_replaced(paddle.utils.download, "get_weights_path_from_url", refuse))
        stack.enter_context(_replaced(paddle.nn.Layer, "create_parameter", counted))
        stack.enter_context(_limited_memory())
        yield


@contextlib.contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Let `owner.name` be `value`, and afterwards what it was, or absent."""
    before = vars(owner).get(name, _MISSING)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if before is _MISSING:
            delattr(owner, name)
        else:
            setattr(owner, name, before)


@contextlib.contextmanager
def _limited_memory() -> Iterator[None]:
    """No more memory than now and `_MOST_BYTES`, where the system can say and keep it (Linux)."""
    try:
        import resource

        pages = int(Path("/proc/self/statm").read_text().split()[5])
    except (ImportError, OSError, ValueError, IndexError):
        yield
        return
    soft, hard = before = resource.getrlimit(resource.RLIMIT_DATA)
    limit = pages * resource.getpagesize() + _MOST_BYTES
    for other in (soft, hard):
        limit = limit if other == resource.RLIM_INFINITY else min(limit, other)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


# --- checks -----------------------------------------------------------------------------------------------------------

# A word, a number, a path or a dotted name: with `eval`, too, none of them runs anything.
_PLAIN_TEXT = re.compile(r"[\w./~+-]{0,200}\Z", re.ASCII)
_LARGEST = 8192  # of any whole number of a model's section: sizes, channels, counts of layers
# What the graphs come to with the number of anchors grows with the first two.
_LARGEST_OF = {"num_classes": 20_000, "reg_max": 256, "nms_top_k": 100_000, "keep_top_k": 100_000, "nms_pre": 100_000}
_LARGEST_FACTOR = 1e6
# Where ppdet keeps what may be given as each part; modules from outside ppdet are the caller's own.
_PLACES = {
    "backbone": (r"ppdet\.modeling\.backbones\.", r"\w+"),
    "neck": (r"ppdet\.modeling\.necks\.", r"\w+"),
    "conv_feat": (r"ppdet\.modeling\.heads\.", r"\w+Feat"),
    "dgqp_module": (r"ppdet\.modeling\.heads\.", r"DGQP"),
    "nms": (r"ppdet\.modeling\.layers", r"\w+NMS"),
    "dataset": (r"ppdet\.data\.source\.", r"\w+"),
    "loss": (r"ppdet\.modeling\.losses\.|ppdet\.slim\.distill_loss", r"\w+"),
}
# Sections of modules that are no part of a model.
_NOT_BUILT = ("ppdet.data.", "ppdet.optimizer", "ppdet.slim.", "ppdet.metrics.", "ppdet.engine.")
# What earlier releases of PaddleDetection called what 2.6 has.
_OLD_ARGUMENTS = {
    "loss_qfl": ("loss_class", "Call it loss_class."),
    "spatial_scale": ("spatial_scales", "Call it spatial_scales."),
    "num_chan": ("out_channel", "Call it out_channel."),
    "feature_maps": ("return_idx", "Write 'return_idx: [1, 2, 3]' for 'feature_maps: [3, 4, 5]'."),
}
_OLD_MODULES = {"PAN": "CSPPAN", "LiteGFLFeat": "PicoFeat"}  # 2.1
# Arguments of transforms that are gone, with the value by which every image is prepared since.
_DROPPED_ARGUMENTS = {
    "is_channel_first": False,
    "to_bgr": False,
    "channel_first": True,
    "to_rgb": True,
    "pad_gt": False,
    "use_padded_im_info": False,
    "use_padded_im_shape": False,
}
_OLD_TRANSFORMS = {"DecodeImage": "Decode", "ResizeImage": "Resize"}  # 0.x

_shorten = reprlib.Repr()
_shorten.maxstring = _shorten.maxother = _shorten.maxlong = 80


def _shown(value: Any) -> str:
    """What a config says, for a message: bounded, however large it is."""
    return _shorten.repr(value)


def _cut(text: str, length: int = 200) -> str:
    return text if len(text) <= length else text[:length] + "..."


def _closest(word: str, known: Iterable[str], cutoff: float = 0.8) -> str | None:
    if len(word) > 100:
        return None
    folded = {name.casefold(): name for name in sorted(known)}
    found = difflib.get_close_matches(word.casefold(), folded, n=1, cutoff=cutoff)
    return folded[found[0]] if found else None


class _Checker:
    """The checks of one config; messages name the file of the `_BASE_` chain that holds the mistake."""

    def __init__(self, path: Path, layers: list[tuple[Path, dict[str, Any]]], modules: dict[str, Any]) -> None:
        self.path = path
        self.folders = [file.parent for file, _ in reversed(layers)]  # the config's own first
        self.modules = modules
        # The sections of what a model can be built of.
        self.model_sections = [
            name for name, module in modules.items() if not module.pymodule.__name__.startswith(_NOT_BUILT)
        ]
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
        return ConfigError(f"{file}: {_cut(problem, 500)}", remedy)

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
                    new = _OLD_MODULES.get(name)
                    raise self.error(
                        f"section {_cut(name)} names no module of PaddleDetection and would be ignored",
                        f"It is called {new} now." if new else "Correct its name, or remove it.",
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
        kind = values.get("name")
        named = name.endswith("Dataset") and kind is not None and not isinstance(values, _Tagged)
        if named and not (isinstance(kind, str) and kind in self.modules):
            close = _closest(str(kind), self._kind("dataset"), 0.6)
            remedy = f"Did you mean {close!r}?" if close else "Use a dataset that PaddleDetection 2.6 has."
            raise self.error(f"{name}: dataset {_shown(kind)} does not exist", remedy, name, "name")
        self._check_arguments(target, values, (name,))
        if isinstance(values, _Tagged):
            return
        if name in SUPPORTED_HEADS and "nms" in values:
            self._check_nms_kind(name, values["nms"])
        for key in self.modules[name].inject:
            self._check_injected(values.get(key), (name, key))

    def check_values(self, settings: Mapping[str, Any]) -> None:
        """What a model is built with can only be numbers within reason, words, paths and dotted names, at any depth."""
        for name in (*self.model_sections, *sorted(_shared_keys(self.modules))):
            if name in settings:
                self._check_value(settings[name], (name,))

    def _check_value(self, value: Any, keys: tuple[str, ...]) -> None:
        where = _cut(".".join(keys))
        if isinstance(value, _Tagged):
            raise self.error(f"{where} is tagged !{_cut(value.tag)}", "Write it as a plain mapping.", *keys)
        if isinstance(value, dict):
            for key, item in value.items():
                if not isinstance(key, str) or not _PLAIN_TEXT.match(key):
                    raise self.error(f"{where} has the key {_shown(key)}, which is not a name", "Correct it.", *keys)
                self._check_value(item, (*keys, key))
        elif isinstance(value, list):
            for item in value:
                self._check_value(item, keys)
        elif isinstance(value, str):
            if not _PLAIN_TEXT.match(value):
                raise self.error(
                    f"{where} is {_shown(value)}, which is neither a word nor a number, path or dotted name",
                    "Correct it; PaddleDetection may run what stands there as code.",
                    *keys,
                )
        elif isinstance(value, bool) or value is None:
            pass
        elif isinstance(value, int):
            largest = _LARGEST_OF.get(keys[-1], _LARGEST)
            if abs(value) > largest:
                raise self.error(f"{where} is {value}, more than {largest}", "Give a size that can be built.", *keys)
        elif not math.isfinite(value) or abs(value) > _LARGEST_FACTOR:
            raise self.error(f"{where} is {value}, which is no number to build with", "Correct it.", *keys)

    def _check_arguments(self, module: str, values: Mapping[str, Any], keys: tuple[str, ...]) -> None:
        schema = self.modules[module].schema
        strict = self.modules[module].strict
        for key in values:
            if key in schema or (key == "name" and (len(keys) > 1 or not strict)):
                continue
            close = _closest(str(key), schema, 0.6 if strict else 0.8)
            new, rename = _OLD_ARGUMENTS.get(str(key), ("", ""))
            if new in schema and (strict or close):
                raise self.error(f"{'.'.join(keys)}.{key} is the old name of {new}", rename, *keys, str(key))
            other = next((head for head in SUPPORTED_HEADS if key in self.modules[head].schema), None)
            if strict and module in SUPPORTED_HEADS and other:
                problem = f"{module} has no argument {_shown(key)}, which is one of {other}"
                remedy = f"Name the section {other} and set GFL's head to it, as it was in training."
                raise self.error(f"{'.'.join(keys)}: {problem}", remedy, *keys, str(key))
            if strict or close:
                where = ".".join(keys)
                takes = "It takes: " + ", ".join(schema) + "." if schema else "It takes no arguments."
                remedy = f"Did you mean {close!r}?" if close else takes
                raise self.error(f"{where}: {module} has no argument {_shown(key)}", remedy, *keys, str(key))

    def _check_injected(self, value: Any, keys: tuple[str, ...]) -> None:
        """A module given as another's argument: its name, or `{name: ..., argument: ...}`."""
        where = ".".join(keys)
        if value is None:
            return
        if isinstance(value, _Tagged):
            tag = _cut(value.tag)
            raise self.error(f"{where} is tagged !{tag}", f"Write {{name: {tag}, ...}} instead.", *keys)
        name = value.get("name") if isinstance(value, dict) else value
        if not isinstance(name, str):
            raise self.error(f"{where} names no module", "Give it as a name, or as {name: ..., argument: ...}.", *keys)
        self._check_part(name, keys)
        if isinstance(value, dict):
            self._check_arguments(name, value, keys)
            for key in self.modules[name].inject:
                self._check_injected(value.get(key), (*keys, key))

    def _check_part(self, name: str, keys: tuple[str, ...]) -> None:
        """`name` is a module, and one that can be what the last of `keys` asks for."""
        where, part = ".".join(keys), keys[-1]
        if name not in self.modules:
            close = _closest(name, self._kind(part), 0.6)
            remedy = f"Did you mean {close!r}?" if close else "Use a module that PaddleDetection 2.6 has."
            if name in _OLD_MODULES:
                remedy = f"It is called {_OLD_MODULES[name]} now, and takes other arguments."
            raise self.error(f"{where}: module {_shown(name)} does not exist", remedy, *keys)
        if name not in self._kind(part) and self.modules[name].pymodule.__name__.startswith("ppdet."):
            raise self.error(f"{where}: {name} cannot be used as {part}", "Name a module of that kind.", *keys)

    def _kind(self, part: str) -> list[str]:
        """ppdet's modules that can be what the argument `part` asks for; of heads, those that are supported."""
        if part == "head":
            return list(SUPPORTED_HEADS)
        place, names = _PLACES.get("loss" if part.startswith("loss") else part, (r"ppdet\.modeling\.", r"\w+"))
        return [
            name
            for name, module in self.modules.items()
            if re.match(place, module.pymodule.__name__) and re.fullmatch(names, name)
        ]

    def check_graph(self, settings: Mapping[str, Any]) -> str:
        """Check architecture, backbone, neck and head; return the head's name."""
        architecture = settings.get("architecture")
        if architecture is None:
            if settings.get("slim") is not None:
                remedy = "Pass the detector's own config: this one goes with --slim_config of PaddleDetection's tools."
                raise self.error(f"it configures {_shown(settings['slim'])}, and no detector", remedy, "slim")
            raise self.error("no architecture is set", "Pass a detector's config, with 'architecture: GFL'.")
        if not isinstance(architecture, str) or architecture not in SUPPORTED_ARCHITECTURES:
            raise self.error(
                f"architecture {_shown(architecture)} is not supported",
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
            if part != "head":
                self._check_part(name, (str(architecture), part))
        head = str(graph["head"])
        if head not in self.modules:
            self._check_part(head, (str(architecture), "head"))
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
        if name is None:
            raise self.error(f"{head}.nms is not set", "Write 'nms: {name: MultiClassNMS, ...}'.", head, "nms")
        if isinstance(name, str) and name in self.modules and name != "MultiClassNMS":
            raise self.error(
                f"{head}.nms is {name}, which is not supported",
                "'nms: {name: MultiClassNMS, ...}' can be exported, but gives other detections and another mAP than "
                f"{name}: set its thresholds, and evaluate the detector with it in PaddleDetection first.",
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
                problem = f"{head}.nms.{key} must be between 0 and 1, not {_shown(value)}"
                raise self.error(problem, _as_number(value), head, "nms")
        for key in ("nms_top_k", "keep_top_k"):
            value = values[key]
            if not isinstance(value, int) or isinstance(value, bool) or value < -1 or value == 0:
                problem = f"{head}.nms.{key} must be a positive whole number, or -1 for no limit, not {_shown(value)}"
                raise self.error(problem, _as_number(value), head, "nms")
        return values

    def check_reader(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """TestReader, or EvalReader where there is none, with transforms that exist and take their arguments."""
        name = "TestReader" if settings.get("TestReader") else "EvalReader"
        section = settings.get(name)
        if not section:
            raise self.error("it has neither TestReader nor EvalReader", "Add one: it says how images are prepared.")
        if not isinstance(section, dict):
            raise self.error(f"section {name} is not a mapping", "Give it its transforms.", name)
        reader: dict[str, Any] = copy.deepcopy(dict(section))
        transforms = require("ppdet.data.transform", "export")
        for key in ("sample_transforms", "batch_transforms"):
            steps = reader.setdefault(key, [])
            if steps is None:
                steps = reader[key] = []
            if not isinstance(steps, list) or not all(isinstance(step, dict) and len(step) == 1 for step in steps):
                raise self.error(f"{name}.{key} must be a list of '- Name: {{...}}'", "Correct it.", name, key)
            for step in steps:
                ((operator, arguments),) = step.items()
                self._check_transform(transforms, f"{name}.{key}", str(operator), arguments, (name, key))
                self._check_value(arguments, (name, key, str(operator)))
        return reader

    def compare_readers(self, settings: Mapping[str, Any], reader: Mapping[str, Any]) -> tuple[str, ...]:
        """What PaddleDetection's tools/eval.py does to images and the exported TestReader does not, as a sentence."""
        evaluation = settings.get("EvalReader")
        if not settings.get("TestReader") or not isinstance(evaluation, dict):
            return ()
        transforms = require("ppdet.data.transform", "export")
        exported, evaluated = _steps(transforms, reader), _steps(transforms, evaluation)
        differences = []
        for name in [*exported, *(name for name in evaluated if name not in exported)]:
            one, other = exported.get(name), evaluated.get(name)
            if one is None or other is None:
                differences.append(f"{name} is in {'EvalReader' if one is None else 'TestReader'} alone")
                continue
            for key in [*one, *(key for key in other if key not in one)]:
                if one.get(key) != other.get(key):
                    differences.append(f"{name}'s {key} is {_shown(one.get(key))}, not {_shown(other.get(key))}")
        if not differences:
            return ()
        return (
            f"TestReader, which is exported, differs from EvalReader ({_cut('; '.join(differences), 300)}), so that "
            "`gfldeploy eval` does not give the mAP of PaddleDetection's tools/eval.py; to export what that "
            "measures, copy the transforms of EvalReader to TestReader",
        )

    def _check_transform(self, known: Any, where: str, name: str, arguments: Any, keys: tuple[str, ...]) -> None:
        operator = getattr(known, name, None)
        if not inspect.isclass(operator):
            classes = [other for other in dir(known) if inspect.isclass(getattr(known, other))]
            close = _closest(name, classes, 0.6)
            remedy = f"Did you mean {close!r}?" if close else "Use a transform that PaddleDetection 2.6 has."
            new = _OLD_TRANSFORMS.get(name, name.removesuffix("Op"))  # 2.0-beta: DecodeOp
            if new != name and new in classes:
                remedy = f"It is called {new!r} now."
            raise self.error(f"{where}: transform {_shown(name)} does not exist", remedy, *keys)
        if arguments is not None and not isinstance(arguments, dict):
            raise self.error(f"{where}: {name} must be followed by its arguments", f"Write '{name}: {{}}'.", *keys)
        parameters = inspect.signature(operator.__init__).parameters
        if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
            return
        accepted = [key for key in parameters if key != "self"]
        for key, value in (arguments or {}).items():
            if key in _DROPPED_ARGUMENTS and key not in accepted and value is _DROPPED_ARGUMENTS[key]:
                remedy = "Remove it: it is how images are prepared now."
                raise self.error(f"{where}: {name} has lost the argument {key}", remedy, *keys)
            if key not in accepted:
                close = _closest(str(key), accepted, 0.6)
                remedy = (
                    f"Did you mean {close!r}?" if close else "It takes: " + (", ".join(accepted) or "nothing") + "."
                )
                raise self.error(f"{where}: {name} has no argument {_shown(key)}", remedy, *keys)


_MISSING = object()


def _steps(transforms: Any, reader: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The transforms of a reader that decide what the network sees, each with all its arguments, defaults too."""
    steps: dict[str, dict[str, Any]] = {}
    lists = [reader.get(key) for key in ("sample_transforms", "batch_transforms")]
    for step in [step for given in lists if isinstance(given, list) for step in given]:
        for name, given in step.items() if isinstance(step, dict) else ():
            arguments: dict[str, Any] = {}
            if inspect.isclass(operator := getattr(transforms, str(name), None)):
                parameters = inspect.signature(operator.__init__).parameters.values()
                arguments = {item.name: item.default for item in parameters if item.default is not item.empty}
            arguments |= given if isinstance(given, dict) else {}
            if name in ("PadBatch", "PadStride"):  # 0 and -1 both mean none, which leaves single images as they are
                stride = arguments.get("pad_to_stride", arguments.get("stride"))
                if not isinstance(stride, int) or stride > 0:
                    steps["padding"] = {"stride": stride}
                continue
            if name == "Resize":
                arguments["target_size"] = _pair(arguments.get("target_size"))
            steps[str(name)] = arguments
    return steps


def _pair(size: Any) -> Any:
    """The target size as two numbers: one number stands for both."""
    numbers = size if isinstance(size, list) else [size]
    return numbers * 2 if len(numbers) == 1 else numbers


def _shared_keys(modules: Mapping[str, Any]) -> set[str]:
    """Settings that modules read from the top level unless their own section sets them (`num_classes`, ...)."""
    return {
        argument.default.key
        for module in modules.values()
        for argument in module.schema.values()
        if argument.has_default() and hasattr(argument.default, "default_value")
    }


def _as_number(value: Any) -> str:
    """What to do about a value that is no number as it stands: YAML takes 1e-3 and '3' as text."""
    try:
        number = float(value) if isinstance(value, str | float) else math.nan
    except ValueError:
        number = math.nan
    if not math.isfinite(number) or (isinstance(value, float) and not value.is_integer()):
        return "Correct it."
    whole = number.is_integer() and not (isinstance(value, str) and "e" in value.casefold())
    shown = int(number) if whole else f"{number:f}".rstrip("0")
    return f"Write it as {shown}." if str(shown) != str(value) or isinstance(value, str) else "Correct it."


def _positive_int(checker: _Checker, value: Any, what: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        problem = f"{what} must be a positive whole number, not {_shown(value)}"
        raise checker.error(problem, _as_number(value), what)
    return value


# --- classes ----------------------------------------------------------------------------------------------------------


_MOST_NAME_BYTES = 16 * 2**20  # of a label list
_LABEL_LISTS = (".txt", ".names", ".label", ".labels", ".list")


def _class_names(
    checker: _Checker, settings: Mapping[str, Any], num_classes: int
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The names of the classes, and what to say where they are not the config's own."""
    missing: list[str] = []
    for section in ("TestDataset", "EvalDataset"):
        found = _class_source(checker, section, settings.get(section), missing)
        if found is None:
            continue
        if isinstance(found, Path):
            names = _names_from_json(found) if found.suffix.lower() == ".json" else _names_from_text(found)
        else:
            names = found
        source = f"{found} ({section})" if isinstance(found, Path) else f"{section}'s label_list"
        for name in names:
            if len(name) > 1000 or any("\ud800" <= character <= "\udfff" for character in name):
                raise checker.error(f"{source} names a class {_shown(name)}", "Give it a name that can be shown.")
        if len(names) != num_classes:
            raise checker.error(
                f"num_classes is {num_classes}, but {source} names {len(names)} classes",
                "Set num_classes to that, or point the dataset at the right file.",
                "num_classes",
            )
        return names, ()
    metric = str(settings.get("metric", "COCO")).upper()
    used = _default_names(metric)
    if len(used) == num_classes:
        if metric == "COCO" and (not missing or _COCO_FILE.search(missing[0])):  # the file has these very names
            return used, ()
        shown = f"{metric}'s {num_classes} class names are" if num_classes > 1 else f"{metric}'s class name is"
    else:
        used = tuple(f"class_{index}" for index in range(num_classes))
        shown = f"the names class_0 to class_{num_classes - 1} are" if num_classes > 1 else "the name class_0 is"
    why = missing[0] if missing else "no dataset of the config says where its classes are named"
    note = (
        f"{why}, so {shown} used; to have your own, set TestDataset's anno_path to COCO annotations or a list of "
        "names, and export again"
    )
    return used, (note,)


def _default_names(metric: str) -> tuple[str, ...]:
    """The class names that PaddleDetection goes by where no file names them."""
    category = require("ppdet.data.source.category", "export")
    if metric not in ("COCO", "SNIPERCOCO", "RBOX", "VOC", "OID", "WIDERFACE", "MOT"):
        return ()
    with quiet():
        by_class, names = category.get_categories(metric)
    return tuple(str(names[by_class[index]]) for index in sorted(by_class))


# COCO's own annotation files.
_COCO_FILE = re.compile(r"(?:instances_(?:train|val)20\d\d|image_info_test(?:-dev)?20\d\d)\.json ")


def _class_source(checker: _Checker, section: str, values: Any, missing: list[str]) -> Path | tuple[str, ...] | None:
    """The existing file that names the classes, or the names themselves, if the dataset section `values` has one.

    What it points at and cannot be read as names is added to `missing`, in words.
    """
    if not isinstance(values, dict):
        return None
    kind = values.tag if isinstance(values, _Tagged) else values.get("name")
    root = Path(str(values.get("dataset_dir") or ""))
    for key in ("label_list", "anno_path"):
        given: Any = values.get(key)
        if key == "label_list" and isinstance(given, list) and all(isinstance(name, str) for name in given):
            return tuple(given)
        if given is None or given == "":
            continue
        if not isinstance(given, str):
            remedy = "Give the path of COCO annotations (.json) or of a list of names (.txt)."
            raise checker.error(f"{section}.{key} is {_shown(given)}", remedy, section, key)
        # A .txt `anno_path` lists classes for ImageFolder, but images for VOCDataSet.
        lists_classes = key == "label_list" or kind == "ImageFolder" or (kind is None and section == "TestDataset")
        suffix = Path(given).suffix.lower()
        if suffix != ".json" and not (suffix in _LABEL_LISTS and lists_classes):
            if lists_classes:
                missing.append(f"{section}'s {key} {_cut(given)} is neither .json nor .txt")
            continue
        beside: list[Path] = [path for folder in checker.folders for path in (folder / root / given, folder / given)]
        for candidate in (root / given, *beside):
            if _is_file(candidate):
                return candidate
        missing.append(f"{section}'s {key} {_cut(given)} does not exist")
    return None


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that is too long, or a folder that may not be entered
        return False


def _names_from_json(file: Path) -> tuple[str, ...]:
    remedy = "Point anno_path at COCO annotations, or at a .txt file with one name a line."
    with reading(f"annotation file {file}", ConfigError, remedy):
        try:
            categories = json.loads(file.read_bytes())["categories"]
            names = [category["name"] for category in categories]
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"annotation file {file} has no list of COCO categories", remedy) from error
    for name in names:
        if not isinstance(name, str | int | float):
            raise ConfigError(f"annotation file {file} names a class {_shown(name)}", "Give it as text.")
    return tuple(map(str, names))


def _names_from_text(file: Path) -> tuple[str, ...]:
    try:
        with file.open("rb") as opened:
            data = opened.read(_MOST_NAME_BYTES + 1)
        if len(data) > _MOST_NAME_BYTES:
            raise ConfigError(f"label list {file} is too large", "Point label_list at a list of class names.")
        text = data.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
        names = [line.strip() for line in text.split("\n")]  # as ppdet's lines end: other separators belong to a name
    except OSError as error:
        raise ConfigError(f"label list {file} cannot be read: {error.strerror or error}", "Check the file.") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"label list {file} is not UTF-8 text", "Save it as UTF-8 text.") from error
    names = [name for name in names if name]
    return tuple(names[1:] if names[:1] == ["background"] else names)
