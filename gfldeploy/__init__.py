"""Deploy PaddleDetection GFL detectors: export, quantise, benchmark, compare, predict."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gfldeploy.detector import Detector

__all__ = ["Detector", "__version__"]

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """`Detector`, imported when it is used: the package itself loads nothing heavy."""
    if name == "Detector":
        from gfldeploy.detector import Detector

        return Detector
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
