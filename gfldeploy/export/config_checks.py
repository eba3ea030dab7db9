"""What a PaddleDetection config may say of a detector that is to be exported."""

from __future__ import annotations

import copy
import difflib
import inspect
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from gfldeploy.engines.dependencies import require
from gfldeploy.errors import ConfigError, DataError
from gfldeploy.export.bounded_text import cut, shown
from gfldeploy.export.config_files import Layers, Tagged
from gfldeploy.export.heads import ARCHITECTURES, HEADS
from gfldeploy.nms import NmsParams
from gfldeploy.serialization import build

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
# Arguments of MultiClassNMS that say what it returns, not what it keeps.
_NMS_OUTPUT_KEYS = ("name", "return_index", "return_rois_num", "trt")
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


def _takes(arguments: Iterable[str]) -> str:
    return f"It takes: {', '.join(arguments) or 'nothing'}."


def _closest(word: str, known: Iterable[str], cutoff: float = 0.8) -> str | None:
    if len(word) > 100:
        return None
    folded = {name.casefold(): name for name in sorted(known)}
    found = difflib.get_close_matches(word.casefold(), folded, n=1, cutoff=cutoff)
    return folded[found[0]] if found else None


def _hint(word: str, known: Iterable[str], otherwise: str, cutoff: float = 0.6) -> str:
    """A remedy that names what resembles `word`, if something does."""
    close = _closest(word, known, cutoff)
    return f"Did you mean {close!r}?" if close else otherwise


class ConfigChecker:
    """The checks of one config; messages name the file of the `_BASE_` chain that holds the mistake."""

    def __init__(self, path: Path, layers: Layers, modules: dict[str, Any]) -> None:
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
        return ConfigError(f"{file}: {cut(problem, 500)}", remedy)

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
                        f"section {cut(name)} names no module of PaddleDetection and would be ignored",
                        f"It is called {new} now." if new else "Correct its name, or remove it.",
                        name,
                    )

    def _check_section(self, name: str, values: Mapping[str, Any]) -> None:
        # A dataset is written `TestDataset: !ImageFolder {...}` or `TestDataset: {name: ImageFolder, ...}`.
        target = name
        if isinstance(values, Tagged):
            target = values.tag
            if target not in self.modules:
                close = _closest(target, self.modules, 0.6)
                remedy = f"Did you mean !{close}?" if close else "Use a tag PaddleDetection knows."
                raise self.error(f"unknown tag !{target} in section {name}", remedy, name)
        kind = values.get("name")
        named = name.endswith("Dataset") and kind is not None and not isinstance(values, Tagged)
        if named and not (isinstance(kind, str) and kind in self.modules):
            remedy = _hint(str(kind), self._kind("dataset"), "Use a dataset that PaddleDetection 2.6 has.")
            raise self.error(f"{name}: dataset {shown(kind)} does not exist", remedy, name, "name")
        self._check_arguments(target, values, (name,))
        if isinstance(values, Tagged):
            return
        if name in HEADS and "nms" in values:
            self._check_nms_kind(name, values["nms"])
        for key in self.modules[name].inject:
            self._check_injected(values.get(key), (name, key))

    def positive_int(self, value: Any, what: str) -> int:
        """The value, if it is one."""
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self.error(f"{what} must be a positive whole number, not {shown(value)}", _as_number(value), what)
        return value

    def check_values(self, settings: Mapping[str, Any]) -> None:
        """What a model is built with can only be numbers within reason, words, paths and dotted names, at any depth."""
        for name in (*self.model_sections, *sorted(_shared_keys(self.modules))):
            if name in settings:
                self._check_value(settings[name], (name,))

    def _check_value(self, value: Any, keys: tuple[str, ...]) -> None:
        where = cut(".".join(keys))
        if isinstance(value, Tagged):
            raise self.error(f"{where} is tagged !{cut(value.tag)}", "Write it as a plain mapping.", *keys)
        if isinstance(value, dict):
            for key, item in value.items():
                if not isinstance(key, str) or not _PLAIN_TEXT.match(key):
                    raise self.error(f"{where} has the key {shown(key)}, which is not a name", "Correct it.", *keys)
                self._check_value(item, (*keys, key))
        elif isinstance(value, list):
            for item in value:
                self._check_value(item, keys)
        elif isinstance(value, str):
            if not _PLAIN_TEXT.match(value):
                raise self.error(
                    f"{where} is {shown(value)}, which is neither a word nor a number, path or dotted name",
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
            other = next((head for head in HEADS if key in self.modules[head].schema), None)
            if strict and module in HEADS and other:
                problem = f"{module} has no argument {shown(key)}, which is one of {other}"
                remedy = f"Name the section {other} and set GFL's head to it, as it was in training."
                raise self.error(f"{'.'.join(keys)}: {problem}", remedy, *keys, str(key))
            if strict or close:
                remedy = f"Did you mean {close!r}?" if close else _takes(schema)
                problem = f"{'.'.join(keys)}: {module} has no argument {shown(key)}"
                raise self.error(problem, remedy, *keys, str(key))

    def _check_injected(self, value: Any, keys: tuple[str, ...]) -> None:
        """A module given as another's argument: its name, or `{name: ..., argument: ...}`."""
        where = ".".join(keys)
        if value is None:
            return
        if isinstance(value, Tagged):
            tag = cut(value.tag)
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
            remedy = _hint(name, self._kind(part), "Use a module that PaddleDetection 2.6 has.")
            if name in _OLD_MODULES:
                remedy = f"It is called {_OLD_MODULES[name]} now, and takes other arguments."
            raise self.error(f"{where}: module {shown(name)} does not exist", remedy, *keys)
        if name not in self._kind(part) and self.modules[name].pymodule.__name__.startswith("ppdet."):
            raise self.error(f"{where}: {name} cannot be used as {part}", "Name a module of that kind.", *keys)

    def _kind(self, part: str) -> list[str]:
        """ppdet's modules that can be what the argument `part` asks for; of heads, those that are supported."""
        if part == "head":
            return list(HEADS)
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
                raise self.error(f"it configures {shown(settings['slim'])}, and no detector", remedy, "slim")
            raise self.error("no architecture is set", "Pass a detector's config, with 'architecture: GFL'.")
        if not isinstance(architecture, str) or architecture not in ARCHITECTURES:
            raise self.error(
                f"architecture {shown(architecture)} is not supported",
                f"Supported: {', '.join(ARCHITECTURES)} with head {' or '.join(HEADS)}.",
                "architecture",
            )
        graph = self.effective(settings, architecture)
        for part in ("backbone", "neck", "head"):
            name, keys = graph.get(part), (architecture, part)
            if not isinstance(name, str):
                raise self.error(f"{architecture}.{part} names no module", f"Write '{part}: NAME'.", *keys)
            if part != "head" or name not in self.modules:
                self._check_part(name, keys)
            elif name not in HEADS:
                raise self.error(f"head {name} is not supported", f"Supported: {', '.join(HEADS)}.", *keys)
        return str(graph["head"])

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

    def check_nms(self, settings: Mapping[str, Any], head: str, head_values: Mapping[str, Any]) -> NmsParams:
        given = head_values.get("nms")
        self._check_nms_kind(head, given)
        values = self.effective(settings, "MultiClassNMS")
        if isinstance(given, dict):
            values.update({key: value for key, value in given.items() if key != "name"})
        # A score threshold below 0 lets everything pass, as 0 does.
        share, count = "between 0 and 1", "a positive whole number, or -1 for no limit"
        for key, wanted, kind, low, high in (
            ("score_threshold", share, int | float, -math.inf, 1),
            ("nms_threshold", share, int | float, 0, 1),
            ("nms_top_k", count, int, -1, math.inf),
            ("keep_top_k", count, int, -1, math.inf),
        ):
            value = values[key]
            fits = isinstance(value, kind) and not isinstance(value, bool) and low <= value <= high
            if not fits or (kind is int and value == 0):
                problem = f"{head}.nms.{key} must be {wanted}, not {shown(value)}"
                raise self.error(problem, _as_number(value), head, "nms")
        kept = {key: value for key, value in values.items() if key not in _NMS_OUTPUT_KEYS}
        # Paddle takes any number: no score is below 0, and an nms_eta above 1 does nothing.
        kept["score_threshold"] = max(kept["score_threshold"], 0.0)
        if isinstance(kept.get("nms_eta"), int | float):
            kept["nms_eta"] = min(kept["nms_eta"], 1.0)
        try:
            return build(NmsParams, kept)
        except DataError as error:
            raise self.error(f"its nms cannot be used: {error.problem}", error.remedy or "", head, "nms") from error

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
                    differences.append(f"{name}'s {key} is {shown(one.get(key))}, not {shown(other.get(key))}")
        if not differences:
            return ()
        return (
            f"TestReader, which is exported, differs from EvalReader ({cut('; '.join(differences), 300)}), so that "
            "`gfldeploy eval` does not give the mAP of PaddleDetection's tools/eval.py; to export what that "
            "measures, copy the transforms of EvalReader to TestReader",
        )

    def _check_transform(self, known: Any, where: str, name: str, arguments: Any, keys: tuple[str, ...]) -> None:
        operator = getattr(known, name, None)
        if not inspect.isclass(operator):
            classes = [other for other in dir(known) if inspect.isclass(getattr(known, other))]
            remedy = _hint(name, classes, "Use a transform that PaddleDetection 2.6 has.")
            new = _OLD_TRANSFORMS.get(name, name.removesuffix("Op"))  # 2.0-beta: DecodeOp
            if new != name and new in classes:
                remedy = f"It is called {new!r} now."
            raise self.error(f"{where}: transform {shown(name)} does not exist", remedy, *keys)
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
                remedy = _hint(str(key), accepted, _takes(accepted))
                raise self.error(f"{where}: {name} has no argument {shown(key)}", remedy, *keys)


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
