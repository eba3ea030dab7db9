"""A replica of Ray Serve: one engine with its batcher behind the ASGI application, and what says whether it is well."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gfldeploy.batching.buckets import Size
from gfldeploy.bundle import GOLDEN
from gfldeploy.cluster.worker import as_plain, check_versions, local_bundle, raised
from gfldeploy.detection_options import AS_CONFIGURED, DetectionOptions
from gfldeploy.detections import Detections
from gfldeploy.engines.base import Device, Precision
from gfldeploy.engines.heap import limit_arenas
from gfldeploy.errors import BundleError, GfldeployError, ParityError, RejectedError
from gfldeploy.export.golden import PICTURE, difference
from gfldeploy.predict.engine_selection import Choice, choose
from gfldeploy.serialization import build
from gfldeploy.serve.app import create_app
from gfldeploy.serve.keys import Keys
from gfldeploy.serve.metrics import Families, Metrics, merged
from gfldeploy.serve.problems import Problem
from gfldeploy.serve.ray_proxy import REPLICA_HEADER, waited_s
from gfldeploy.serve.reload import check_golden
from gfldeploy.serve.requests import RequestLimits
from gfldeploy.serve.service import DetectionService, ServiceSettings
from gfldeploy.tune.deploy_file import Deploy

DEPLOYMENT = "detector"
_ERROR = re.compile(r"gfldeploy-error (\{.*?\})$", re.MULTILINE)
_METRICS_S = 5.0


@dataclass(frozen=True)
class ReplicaJob:
    """What a replica serves, and how, as plain data: `serialization.plain` and `build`.

    `bundle`: its directory on the replica's machine. `deploy`: the content of a `deploy.yml`, None without one.
    `threads`, `streams`: where it comes to a replica they are given, for Ray counts CPUs by them. `sizes`: input sizes,
    (height, width), to run before the replica is ready; () for those of the `deploy.yml` or of photographs. `keys`: the
    digests of the keys, None where none is needed. `versions`: of Python and packages, which have to be the same.
    `detection`: what was turned of NMS and of what is shown.
    """

    settings: ServiceSettings
    limits: RequestLimits
    bundle: str = ""
    digest: str = ""
    threads: int | None = None
    streams: int | None = None
    deploy: str | None = None
    engine: str | None = None
    precision: Precision | None = None
    device: Device | None = None
    tf32: bool | None = None
    input_size: Size | None = None
    batch_size: int | None = None
    engine_cache: str | None = None
    sizes: tuple[Size, ...] = ()
    keys: tuple[str, ...] | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    detection: DetectionOptions = AS_CONFIGURED

    @contextmanager
    def choice(self, files: Mapping[str, bytes] | None = None) -> Iterator[Choice]:
        """What runs here, as long as the block lasts: of the bundle at its path, else of its `files`.

        Raises as `choose`, `BundleError` where the bundle of this digest is in neither, and `UnsupportedError` where
        packages have other versions.
        """
        check_versions(self.versions)
        with local_bundle(self.bundle, self.digest, files) as found, TemporaryDirectory(prefix="gfldeploy-") as folder:
            if found is None:
                raise BundleError(
                    f"{self.bundle} does not hold the bundle on this machine, of SHA-256 {self.digest[:12]}",
                    "Put the same bundle at that path on every machine.",
                )
            found.verify_files()
            source = found.directory
            if self.deploy is not None:
                source = Path(folder) / "deploy.yml"
                deploy = Deploy.from_dict(json.loads(self.deploy))
                replace(deploy, choice=replace(deploy.choice, path=str(found.directory.absolute()))).write(source)
            choice = choose(
                source,
                self.engine,
                self.precision,
                self.device,
                self.threads,
                self.batch_size,
                None if self.engine_cache is None else Path(self.engine_cache),
                tf32=self.tf32,
                streams=self.streams,
                throughput=True,
                input_size=self.input_size,
                detection=self.detection,
            )
            sizes = tuple((1, *size) for size in self.sizes)
            yield replace(choice, expected=sizes) if sizes else choice


class Canary:
    """A picture whose detections are known: what tells whether a service still finds what it has to.

    The golden picture of the bundle, or without one an image of the warm-up.
    """

    def __init__(self, service: DetectionService) -> None:
        bundle = service.choice.bundle
        golden = bundle.record(GOLDEN) is not None
        self._content = (bundle.directory / PICTURE).read_bytes() if golden else service.sample
        self._what = "its golden picture" if golden else "an image of the warm-up"
        self._service = service
        self._first: Detections | None = None

    async def check(self, seconds: float) -> None:
        """Raise `EngineError` if it never answers again, or fails, and `ParityError` if it finds something else now.

        The first time its answer is held against what the bundle expects, later against the first. A service that is
        too busy for one more image, or whose engine is being replaced, is not asked.
        """
        service = self._service
        if service.gave_up is not None:
            raise service.gave_up
        if self._first is None:
            await check_golden(service)
        try:
            answer = await service.detect(self._content, seconds * 1e3, service.choice.bundle.manifest.nms)
        except RejectedError:
            return
        if self._first is None:
            self._first = answer.detections
            return
        precision = service.choice.bundle.manifest.precision
        if (missing := difference(answer.detections, self._first, precision)) is not None:
            raise ParityError(f"the detections in {self._what} are others than at the start: {missing}", None)


class MetricsOfAll(Metrics):
    """The metrics of a replica, and at `/metrics` those of every replica, each sample with its name as a label.

    A proxy asks one replica, whichever; a monitoring system wants all of them.
    """

    def text(self, accept: str) -> tuple[bytes, str]:
        """As that of one process. Takes up to seconds, for replicas that do not answer are waited for."""
        from ray import serve

        context = serve.get_replica_context()
        own: tuple[str, Families] = (context.replica_tag, self.families())
        try:
            handle = serve.get_deployment_handle(DEPLOYMENT, context.app_name)
            told = handle.broadcast("metrics").results(timeout_s=_METRICS_S)
        except Exception:  # noqa: BLE001 - of a replica that ends at the moment: this one's are better than none
            told = [own]
        return merged(dict(told), accept)


class DetectorReplica:
    """What Ray Serve runs in a process of its own, as often as there are replicas; `serve.ingress` goes around it."""

    def __init__(self, job: dict[str, Any], files: Any = None) -> None:
        """Load and warm up. `files`: what is in Ray's object store of the bundle, for machines that do not have it.

        Raises `RuntimeError` with the `GfldeployError` as a line that `error_in` finds in what Ray makes of it.
        """
        import ray
        from ray import serve

        self._stack = ExitStack()
        self._name = serve.get_replica_context().replica_tag
        self._metrics = MetricsOfAll()
        try:
            self._job = build(ReplicaJob, job)
            limit_arenas((self._job.threads or 1) * (self._job.streams or 1))
            with local_bundle(self._job.bundle, self._job.digest, None) as there:
                sent = None if there is not None or files is None else ray.get(files)
            choice = self._stack.enter_context(self._job.choice(sent))
            self._service = DetectionService(choice, self._job.settings, self._metrics)
            self._canary = Canary(self._service)
        except GfldeployError as error:
            raise RuntimeError(error_line(error)) from None

    async def __serve_build_asgi_app__(self) -> ASGIApp:
        """The application, once the canary is well."""
        try:
            await self._canary.check(self._job.settings.hang_s)
        except GfldeployError as error:
            await asyncio.to_thread(self._service.close, False)
            raise RuntimeError(error_line(error)) from None
        keys = None if self._job.keys is None else Keys.of_digests(self._job.keys)
        app = create_app(self._service, self._job.limits, metrics=self._metrics, keys=keys)
        return answering(app, self._name)

    async def check_health(self) -> None:
        """What Ray Serve asks every ten seconds: after three errors in a row it replaces the replica."""
        await self._canary.check(self._job.settings.hang_s)

    def metrics(self) -> tuple[str, Families]:
        """Of this replica: its name, and all samples."""
        return self._name, self._metrics.families()

    async def __del__(self) -> None:
        """What Ray Serve calls when the last request has its answer."""
        if (service := getattr(self, "_service", None)) is not None:
            await asyncio.to_thread(service.close)
            self._stack.close()


def answering(app: Starlette, name: str) -> ASGIApp:
    """The application of the replica of this name: it knows how long a request took to come, and clients who answers.

    Whoever asks it to reload is told who can.
    """
    app.add_route("/v1/reload", _refuse_reload, methods=["POST"])

    async def named(scope: Scope, receive: Receive, send: Send) -> None:
        async def named_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", ()), (REPLICA_HEADER, name.encode())]}
            await send(message)

        if scope["type"] != "http":
            await app(scope, receive, send)
            return
        scope.setdefault("state", {})["arrived"] = time.perf_counter() - waited_s(scope)
        await app(scope, receive, named_send)

    return named


async def _refuse_reload(request: Request) -> Response:
    raise Problem(
        409,
        "reload_elsewhere",
        "a replica of Ray Serve does not reload itself",
        "Send SIGHUP to the `gfldeploy serve` that deployed it: it replaces the replicas one after the other.",
    )


def error_line(error: GfldeployError) -> str:
    """An error as a line that `error_in` finds in the middle of whatever."""
    return f"gfldeploy-error {json.dumps(as_plain(error))}"


def error_in(text: str) -> GfldeployError | None:
    """The error that a replica told of, in what Ray makes of it."""
    found = _ERROR.search(text)
    return None if found is None else raised(json.loads(found[1]))
