"""Deploy PaddleDetection GFL detectors: export, quantise, benchmark, compare, predict."""

TYPE_CHECKING = False  # as type checkers know it: `typing` takes most of the time until an interruption is answered
if TYPE_CHECKING:
    from gfldeploy.detector import Detector

__all__ = ["Detector", "__version__"]

__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    """`Detector`, imported when it is used: the package itself loads nothing heavy."""
    if name == "Detector":
        from gfldeploy.detector import Detector

        return Detector
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
