"""Has ppdet build the model of a checked config, and keeps it from running, loading or fetching anything meanwhile."""

from __future__ import annotations

import contextlib
import copy
import inspect
import math
import re
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gfldeploy._quiet import quiet
from gfldeploy.errors import ConfigError, GfldeployError
from gfldeploy.export.bounded_text import cut, shown
from gfldeploy.export.config import DetectorConfig
from gfldeploy.export.heads import ARCHITECTURES
from gfldeploy.export.workspace import installed, load_workspace, snapshot


def build_model(config: DetectorConfig) -> Any:
    """Build the paddle model of `config` in evaluation mode, with zeros for most of its weights.

    Raises `ConfigError` when the values do not fit together (a depth that ResNet does not have, for example), when
    they would have code run or a file loaded, or when the model is larger than any that could be deployed.
    """
    workspace = load_workspace()
    try:
        with installed(workspace, snapshot(config.cfg), {}), quiet(), _confined(config.path):
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
        at = f" at '{cut(lines[-1].line, 100)}'" if lines and lines[-1].line else ""
        text = f"{type(error).__name__}{f': {text}' if text else ''}{at}"
    return cut(text, 300)


def _part(error: Exception, workspace: Any) -> tuple[str | None, bool]:
    """The innermost module of ppdet whose code raised `error`, and whether that was while it looked at its input."""
    part, connecting = None, False
    for frame, _ in traceback.walk_tb(error.__traceback__):
        owner = frame.f_locals.get("self", frame.f_locals.get("cls"))
        name = owner.__name__ if inspect.isclass(owner) else type(owner).__name__
        if name not in ARCHITECTURES and hasattr(workspace.global_config.get(name), "pymodule"):
            part, connecting = name, frame.f_code.co_name == "from_config"
    return part, connecting


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
                problem = f"{path}: PaddleDetection would run {shown(text)}, which is not the name of a layer"
                raise ConfigError(problem, remedy)
            return found

        return look_up_in_module

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise ConfigError(f"{path}: building the model would load {shown(args[0] if args else kwargs)}", remedy)

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
    absent = name not in vars(owner)
    before = vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if absent:
            delattr(owner, name)
        else:
            setattr(owner, name, before)


@contextlib.contextmanager
def _limited_memory() -> Iterator[None]:
    """No more memory than now and `_MOST_BYTES`, where the system can say and keep it (Linux)."""
    try:
        import resource

        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[5])
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
