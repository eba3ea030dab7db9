"""ppdet's process-wide dictionary of settings, into which it merges every config that it loads.

A second config would inherit what the first one set, so the dictionary holds one only while that is needed.
"""

from __future__ import annotations

import contextlib
import copy
import threading
from collections.abc import Iterator, Mapping
from typing import Any

from gfldeploy._quiet import quiet
from gfldeploy.engines.dependencies import require

_LOCK = threading.RLock()


def load_workspace() -> Any:
    """`ppdet.core.workspace` with every module registered, the demo's backbone among them."""
    require("paddle", "export")
    require("ppdet", "export")
    with quiet():
        import gfldeploy.export.demo_backbone  # noqa: F401  # the import registers it

    return require("ppdet.core.workspace", "export")


def registered(workspace: Any) -> dict[str, Any]:
    """Module name to its SchemaDict."""
    return {name: value for name, value in workspace.global_config.items() if hasattr(value, "pymodule")}


def fresh(workspace: Any) -> Any:
    """ppdet's dictionary as it is before any config is loaded: every registered module without a value."""
    pristine = workspace.AttrDict()
    for name, module in registered(workspace).items():
        pristine[name] = _copy_schema(module, {})
    return pristine


def snapshot(config: Any) -> Any:
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
def installed(workspace: Any, content: Any, settings: Mapping[str, Any]) -> Iterator[None]:
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
