"""From the options of `gfldeploy serve` to a running server."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from gfldeploy.batching.buckets import Size
from gfldeploy.engines.base import Device, Precision
from gfldeploy.engines.cache import DEFAULT_ENGINE_CACHE
from gfldeploy.files import StrPath
from gfldeploy.predict.engine_selection import choose
from gfldeploy.progress import SILENT, Progress
from gfldeploy.serve.keys import Keys
from gfldeploy.serve.process import Listen, run_server
from gfldeploy.serve.requests import RequestLimits
from gfldeploy.serve.service import DetectionService, ServiceSettings, Watch

_BODIES = 8  # of the largest size are in memory at most


def serve_detector(
    source: StrPath,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    warm_up: StrPath | None = None,
    timeout_ms: float = 1000.0,
    max_waiting: int = 64,
    decode: Literal["exact", "fast"] = "exact",
    max_body_mb: float = 32.0,
    max_images: int = 16,
    body_timeout_s: float = 10.0,
    drain_timeout_s: float = 30.0,
    api_key_file: StrPath | None = None,
    access_log: StrPath | None = None,
    engine: str | None = None,
    precision: Precision | None = None,
    device: Device | None = None,
    tf32: bool | None = None,
    threads: int | None = None,
    streams: int | None = None,
    input_size: Size | None = None,
    batch_size: int | None = None,
    engine_cache: StrPath = DEFAULT_ENGINE_CACHE,
    progress: Progress = SILENT,
) -> None:
    """Serve until a signal comes; see `gfldeploy serve --help`."""
    settings = ServiceSettings(max_waiting, None if warm_up is None else Path(warm_up), decode == "fast")

    keys = None if api_key_file is None else Keys(Path(api_key_file))

    def load(watch: Watch) -> DetectionService:
        choice = choose(
            Path(source),
            engine,
            precision,
            device,
            threads,
            batch_size,
            Path(engine_cache),
            tf32=tf32,
            streams=streams,
            throughput=True,
            input_size=input_size,
        )
        for note in choice.notes:
            progress.note(note)
        return DetectionService(choice, settings, watch, progress)

    limits = RequestLimits(
        body_bytes=int(max_body_mb * 1e6),
        total_bytes=int(_BODIES * max_body_mb * 1e6),
        body_s=body_timeout_s,
        images=max_images,
        timeout_ms=timeout_ms,
    )
    run_server(
        load,
        limits,
        Listen(host, port, drain_timeout_s),
        keys=keys,
        access_log=None if access_log is None else Path(access_log),
        progress=progress,
    )
