"""Deploy PaddleDetection GFL detectors: export, quantise, benchmark, compare."""

__all__ = ["__version__"]

__version__ = "0.1.0"
