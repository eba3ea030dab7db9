"""What a model in a Triton repository is told by a file beside it: what the command line said, and what to load."""

from __future__ import annotations

from dataclasses import dataclass

from gfldeploy.batching.buckets import Size
from gfldeploy.engines.base import Device, Precision
from gfldeploy.images.preprocess import Preprocess
from gfldeploy.serialization import FileFormat, Versioned

SETTINGS = "gfldeploy.json"  # beside model.py
BUNDLE = "bundle"
DEPLOY = "deploy.yml"


@dataclass(frozen=True)
class DetectorSettings(Versioned):
    """`gfldeploy.json` of a model that runs a bundle with gfldeploy.

    `source`: what `Detector` loads, beside the file: the copy of a bundle, or of a `deploy.yml`. `digest`: SHA-256 of
    the bundle's manifest. Everything else is as for `Detector`, null where the source, or the machine that serves,
    decides.
    """

    FORMAT = FileFormat("the settings of a Triton model", "gfldeploy triton", 1)

    source: str
    digest: str
    engine: str | None = None
    precision: Precision | None = None
    device: Device | None = None
    tf32: bool | None = None
    threads: int | None = None
    input_size: Size | None = None
    batch_size: int | None = None

    def __post_init__(self) -> None:
        if self.source not in (BUNDLE, DEPLOY):
            raise ValueError(f"source must be {BUNDLE} or {DEPLOY}, not {self.source!r:.60}")


@dataclass(frozen=True)
class PreprocessSettings(Versioned):
    """`gfldeploy.json` of a model that prepares images for a file that deploys by itself."""

    FORMAT = FileFormat("the settings of a Triton model", "gfldeploy triton", 1)

    preprocess: Preprocess
