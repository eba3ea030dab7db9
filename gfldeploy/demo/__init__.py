"""The built-in demo: a generated dataset and a small trained GFL detector, so that everything runs with no download."""

from __future__ import annotations

from pathlib import Path

__all__ = ["config_path", "register_backbone", "weights_path"]

_ASSETS = Path(__file__).parent / "assets"


def config_path() -> Path:
    """The demo detector's PaddleDetection config. Its backbone must be registered before `load_config` can build it."""
    return _ASSETS / "gfl_demo.yml"


def weights_path() -> Path:
    """The demo detector's trained checkpoint: a pickled dict of parameter name to float16 array."""
    return _ASSETS / "gfl_demo.pdparams"


def register_backbone() -> None:
    """Make PaddleDetection know `SlimResNet`. Imports paddle and ppdet; calling it again does nothing."""
    import gfldeploy.demo.backbone  # noqa: F401  # the import registers it
