"""The built-in demo: a generated dataset and a small trained GFL detector, so that everything runs with no download."""

from __future__ import annotations

from pathlib import Path

_ASSETS = Path(__file__).parent / "assets"


def config_path() -> Path:
    """The demo detector's PaddleDetection config. Its backbone is `export.demo_backbone`."""
    return _ASSETS / "gfl_demo.yml"


def weights_path() -> Path:
    """The demo detector's trained checkpoint: a pickled dict of parameter name to float16 array."""
    return _ASSETS / "gfl_demo.pdparams"
