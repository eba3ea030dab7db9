"""Deploy PaddleDetection GFL detectors: export, quantise, benchmark, compare, predict.

`__all__` is the public API. A name is imported when it is used: `import gfldeploy` loads nothing else.
"""

TYPE_CHECKING = False  # as type checkers know it: `typing` takes most of the time until an interruption is answered
if TYPE_CHECKING:
    from gfldeploy.accuracy import Accuracy as Accuracy
    from gfldeploy.accuracy import EvalResults as EvalResults
    from gfldeploy.accuracy import evaluate as evaluate
    from gfldeploy.analysis.audit import audit as audit
    from gfldeploy.analysis.record import Analysis as Analysis
    from gfldeploy.analysis.session import analyze as analyze
    from gfldeploy.batching.audit import Audit as Audit
    from gfldeploy.bench.compare import Comparison as Comparison
    from gfldeploy.bench.compare import compare as compare
    from gfldeploy.bench.report.page import report as report
    from gfldeploy.bench.results import BenchResults as BenchResults
    from gfldeploy.bench.session import benchmark as benchmark
    from gfldeploy.bundle import Bundle as Bundle
    from gfldeploy.detection_options import DetectionOptions as DetectionOptions
    from gfldeploy.detections import Detections as Detections
    from gfldeploy.detector import Detector as Detector
    from gfldeploy.doctor import Diagnosis as Diagnosis
    from gfldeploy.doctor import diagnose as diagnose
    from gfldeploy.errors import BoundsError as BoundsError
    from gfldeploy.errors import BundleError as BundleError
    from gfldeploy.errors import CheckpointError as CheckpointError
    from gfldeploy.errors import ConfigError as ConfigError
    from gfldeploy.errors import DataError as DataError
    from gfldeploy.errors import EngineError as EngineError
    from gfldeploy.errors import GfldeployError as GfldeployError
    from gfldeploy.errors import MissingDependencyError as MissingDependencyError
    from gfldeploy.errors import OutputError as OutputError
    from gfldeploy.errors import ParityError as ParityError
    from gfldeploy.errors import RejectedError as RejectedError
    from gfldeploy.errors import ServerError as ServerError
    from gfldeploy.errors import UnsupportedError as UnsupportedError
    from gfldeploy.errors import UsageError as UsageError
    from gfldeploy.export.exporter import export_bundle as export_bundle
    from gfldeploy.gates import Gate as Gate
    from gfldeploy.gates import accuracy_gate as accuracy_gate
    from gfldeploy.gates import padding_gate as padding_gate
    from gfldeploy.gates import speed_gate as speed_gate
    from gfldeploy.inspection import inspect as inspect
    from gfldeploy.inspection import verify as verify
    from gfldeploy.load.session import load_server as load_server
    from gfldeploy.predict.live import LiveFrame as LiveFrame
    from gfldeploy.predict.live import LiveSource as LiveSource
    from gfldeploy.predict.outputs import LiveSummary as LiveSummary
    from gfldeploy.predict.outputs import PredictResults as PredictResults
    from gfldeploy.predict.parts import merge_parts as merge_parts
    from gfldeploy.predict.session import predict_images as predict_images
    from gfldeploy.progress import SILENT as SILENT
    from gfldeploy.progress import Progress as Progress
    from gfldeploy.quant.quantizer import quantize_bundle as quantize_bundle
    from gfldeploy.schemas import schema as schema
    from gfldeploy.serve.session import serve_detector as serve_detector
    from gfldeploy.triton.repository import triton_repository as triton_repository
    from gfldeploy.tune.deploy_file import Deploy as Deploy
    from gfldeploy.tune.deploy_file import check_deploy as check_deploy
    from gfldeploy.tune.session import tune_bundles as tune_bundles

__version__ = "0.1.0"

_EXPORTS: dict[str, tuple[str, ...]] = {
    "gfldeploy.accuracy": ("Accuracy", "EvalResults", "evaluate"),
    "gfldeploy.analysis.audit": ("audit",),
    "gfldeploy.analysis.record": ("Analysis",),
    "gfldeploy.analysis.session": ("analyze",),
    "gfldeploy.batching.audit": ("Audit",),
    "gfldeploy.bench.compare": ("Comparison", "compare"),
    "gfldeploy.bench.report.page": ("report",),
    "gfldeploy.bench.results": ("BenchResults",),
    "gfldeploy.bench.session": ("benchmark",),
    "gfldeploy.bundle": ("Bundle",),
    "gfldeploy.detection_options": ("DetectionOptions",),
    "gfldeploy.detections": ("Detections",),
    "gfldeploy.detector": ("Detector",),
    "gfldeploy.doctor": ("Diagnosis", "diagnose"),
    "gfldeploy.errors": (
        "BoundsError",
        "BundleError",
        "CheckpointError",
        "ConfigError",
        "DataError",
        "EngineError",
        "GfldeployError",
        "MissingDependencyError",
        "OutputError",
        "ParityError",
        "RejectedError",
        "ServerError",
        "UnsupportedError",
        "UsageError",
    ),
    "gfldeploy.export.exporter": ("export_bundle",),
    "gfldeploy.gates": ("Gate", "accuracy_gate", "padding_gate", "speed_gate"),
    "gfldeploy.inspection": ("inspect", "verify"),
    "gfldeploy.load.session": ("load_server",),
    "gfldeploy.predict.live": ("LiveFrame", "LiveSource"),
    "gfldeploy.predict.outputs": ("LiveSummary", "PredictResults"),
    "gfldeploy.predict.parts": ("merge_parts",),
    "gfldeploy.predict.session": ("predict_images",),
    "gfldeploy.progress": ("SILENT", "Progress"),
    "gfldeploy.quant.quantizer": ("quantize_bundle",),
    "gfldeploy.schemas": ("schema",),
    "gfldeploy.serve.session": ("serve_detector",),
    "gfldeploy.triton.repository": ("triton_repository",),
    "gfldeploy.tune.deploy_file": ("Deploy", "check_deploy"),
    "gfldeploy.tune.session": ("tune_bundles",),
}
_MODULES = {name: module for module, names in _EXPORTS.items() for name in names}

__all__ = ["__version__", *_MODULES]


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *_MODULES]
