"""From options to a running server: what `gfldeploy serve` runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from gfldeploy.batching.buckets import Size
from gfldeploy.detection_options import DetectionOptions
from gfldeploy.engines.base import Device, Precision, is_installed
from gfldeploy.engines.cache import DEFAULT_ENGINE_CACHE
from gfldeploy.engines.dependencies import TOOL_CHAINS
from gfldeploy.errors import MissingDependencyError, UsageError
from gfldeploy.files import StrPath
from gfldeploy.predict.engine_selection import choose
from gfldeploy.progress import SILENT, Progress
from gfldeploy.serialization import plain
from gfldeploy.serve.service import DetectionService, ServiceSettings, Watch

_BODIES = 8  # of the largest size are in memory at most
_PACKAGES = TOOL_CHAINS["serve"].distributions
_RAY_PACKAGES = {"ray": "'ray[serve]'", "fastapi": "'ray[serve]'"}


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
    max_megapixels: float = 50.0,
    max_images: int = 16,
    body_timeout_s: float = 10.0,
    drain_timeout_s: float = 30.0,
    api_key_file: StrPath | None = None,
    access_log: StrPath | None = None,
    threshold: float | None = None,
    class_thresholds: Mapping[str, float] | None = None,
    classes: Sequence[str | int] | None = None,
    score_threshold: float | None = None,
    nms_threshold: float | None = None,
    keep_top_k: int | None = None,
    class_agnostic: bool | None = None,
    engine: str | None = None,
    precision: Precision | None = None,
    device: Device | None = None,
    tf32: bool | None = None,
    threads: int | None = None,
    streams: int | None = None,
    input_size: Size | None = None,
    batch_size: int | None = None,
    engine_cache: StrPath = DEFAULT_ENGINE_CACHE,
    replicas: int | tuple[int, int] = 1,
    ray: str | None = None,
    progress: Progress = SILENT,
) -> None:
    """Serve detections over HTTP until a signal comes, in the main thread of this process.

    SIGTERM and Ctrl-C drain: what was admitted is answered, new requests are refused. A second one stops at once, as a
    KeyboardInterrupt. SIGHUP reads `source` again, and puts what is there in place of what answers.

    Args:
        source: The directory of a bundle, or the `deploy.yml` that `tune_bundles` wrote.
        host: The address to listen on.
        port: The port to listen on; 0 for a free one.
        warm_up: A folder of images such as those to come, whose input sizes are run before the server is ready. By
            default the sizes are those of `deploy.yml`, or of photographs.
        timeout_ms: The deadline of requests that name none: those that would be answered later are refused.
        max_waiting: Images that wait at most.
        decode: "fast" decodes large JPEGs at a reduced scale.
        max_body_mb: The largest request, in 10^6 bytes.
        max_megapixels: The largest image, in 10^6 pixels.
        max_images: Images of a request at most.
        body_timeout_s: Seconds that a client may take to send a request.
        drain_timeout_s: Seconds that draining may take.
        api_key_file: A file of one key per line, which nobody else may read: requests without one of them are refused.
        access_log: A file to append a line of JSON to for each request; "-" for standard output.
        threshold: The lowest score in answers to requests that name none, by default 0.5.
        class_thresholds: For some classes, by name or id, another one, which requests cannot go below.
        classes: The classes to detect, names or ids; by default all. Requests may ask for some of them.
        score_threshold: Detections must score more to leave NMS; by default, as the next two, as in the detector's
            config.
        nms_threshold: NMS drops a box whose IoU with a better one of its class is above this.
        keep_top_k: The most detections of an image, the best ones.
        class_agnostic: NMS drops a box for a better one of any class; by default of its own.
        engine: The engine; by default the first that runs the bundle here.
        precision: The precision; by default that of the bundle.
        device: The device; by default the CPU.
        tf32: Let FP32 on a GPU multiply in TF32.
        threads: CPU threads of one inference.
        streams: Inferences at once, on CPUs; by default one for each CPU, with one thread.
        input_size: The size, (height, width) in pixels, to which images are resized, as `target_size` in
            PaddleDetection.
        batch_size: The most images of one inference; by default 1.
        engine_cache: Where engines keep what they compiled.
        replicas: How many engines serve, each in a process of its own with its share of the CPUs, behind one port;
            with `ray` also (least, most), between which Ray Serve chooses.
        ray: Serve on Ray: the address of a cluster, or "local" for one on this machine that ends with the server.
        progress: Told of what is loaded, when the server is ready, and of reloads.

    Returns:
        Nothing, once everything that was admitted is answered.

    Raises:
        MissingDependencyError: The extra `serve` is not installed.
        BundleError: The bundle is damaged, or not the one that `deploy.yml` is about.
        DataError: `source` is a file that is no `deploy.yml`, the file of keys is of no use, or there is no image to
            warm up with.
        UnsupportedError: Nothing here can run it.
        OutputError: The port cannot be listened on, or the access log cannot be written.
        UsageError: Options do not go together, there is no such class, or there are not the CPUs or the memory for so
            many replicas.
        ServerError: Ray cannot be reached, or does not do what it should.
        EngineError: The engine cannot be loaded, or failed again and again.
        ParityError: What runs on a GPU differs from the CPU.
    """
    given = {**locals()}
    if not host:  # which sockets take for every address
        raise UsageError(
            "the host is empty", "Give --host 127.0.0.1 for this machine alone, 0.0.0.0 for all addresses."
        )
    packages = _PACKAGES if ray is None else {**_PACKAGES, **_RAY_PACKAGES}
    if missing := [name for module, name in packages.items() if not is_installed(module)]:
        raise MissingDependencyError(
            f"gfldeploy serve needs {', '.join(missing)}, not installed here", f"Run: pip install {' '.join(missing)}"
        )
    from gfldeploy.serve.keys import Keys
    from gfldeploy.serve.process import Listen, run_server
    from gfldeploy.serve.requests import RequestLimits

    settings = ServiceSettings(
        max_waiting, None if warm_up is None else Path(warm_up), decode == "fast", max_megapixels * 1e6
    )
    limits = RequestLimits(
        body_bytes=int(max_body_mb * 1e6),
        total_bytes=int(_BODIES * max_body_mb * 1e6),
        body_s=body_timeout_s,
        images=max_images,
        timeout_ms=timeout_ms,
    )
    detection = DetectionOptions.of(
        threshold, class_thresholds, classes, score_threshold, nms_threshold, keep_top_k, class_agnostic
    )
    listen = Listen(host, port, drain_timeout_s)
    keys = None if api_key_file is None else Keys(Path(api_key_file))
    least, most = (replicas, replicas) if isinstance(replicas, int) else replicas
    if ray is not None:
        if access_log is not None:
            raise UsageError(
                "--access-log is not for --ray: requests come to several machines",
                "Leave it out; `/metrics` counts requests by status.",
            )
        from gfldeploy.serve.ray_app import RayServing, serve_on_ray
        from gfldeploy.serve.ray_replica import ReplicaJob

        job = ReplicaJob(
            replace(settings, warm_up=None),
            limits,
            threads=threads,
            streams=streams,
            engine=engine,
            precision=precision,
            device=device,
            tf32=tf32,
            input_size=input_size,
            batch_size=batch_size,
            engine_cache=str(engine_cache),
            detection=detection,
        )
        serve_on_ray(Path(source), job, RayServing(ray, least, most, listen), settings.warm_up, keys, progress)
        return
    if least < most:
        raise UsageError("a range of replicas needs --ray", "Give one number of replicas, or --ray local.")
    if least > 1:
        from gfldeploy.serve.replicas import serve_replicas

        options = {name: value for name, value in given.items() if name not in ("replicas", "ray", "progress")}
        serve_replicas(plain(options), least, listen, progress)
        return
    from gfldeploy.serve.replica import Replica

    replica = progress if isinstance(progress, Replica) else None

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
            detection=detection,
        )
        if replica is not None:
            replica.check(choice.bundle.digest)
        for note in choice.notes:
            progress.note(note)
        return DetectionService(choice, settings, watch, progress)

    run_server(
        load,
        limits,
        listen,
        keys=keys,
        access_log=None if access_log is None else Path(access_log),
        replica=replica,
        progress=progress,
    )
