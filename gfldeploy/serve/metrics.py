"""What a monitoring system sees of the server: counters, histograms and gauges in Prometheus' format."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any, Literal, get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector
from starlette.requests import Request
from starlette.responses import Response

from gfldeploy import __version__
from gfldeploy.bench.monitor import Gpu
from gfldeploy.errors import Rejection
from gfldeploy.serve.access_log import Exchange
from gfldeploy.serve.loaded import AnswerTimes
from gfldeploy.serve.service import DetectionService, Watch

# Seconds: from a rejection, which takes a millisecond, to a large network on a CPU.
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_BATCH_SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
# No client adds values of labels: whatever else it sends as a method is "other", and so is a path without a route.
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_OTHER = "other"
# By the field of `bench.results.Monitored`: name, what it is, and how many of its base units it is.
_GPU = {
    "gpu_percent": ("utilization_ratio", "Share of the time in which a kernel ran.", 1e-2),
    "gpu_memory_mb": ("memory_used_bytes", "Memory in use, by all processes.", 1e6),
    "gpu_power_w": ("power_watts", "Power of the board.", 1.0),
    "gpu_clock_mhz": ("clock_hertz", "Clock of the multiprocessors.", 1e6),
}

Outcome = Literal["answered", "rejected", "bad", "failed"]
ReloadOutcome = Literal["switched", "failed"]
# All samples of one process, as JSON-ready data: of each metric its name, documentation, type and samples.
Families = Sequence[Mapping[str, Any]]


class Metrics(Watch):
    """Counts what happens in one application, in a registry of its own. Thread-safe.

    One for all services that the application has one after the other: counters never fall.
    """

    def __init__(self) -> None:
        registry = CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"gfldeploy_{name}", text, labels, registry=registry)

        def histogram(name: str, text: str, buckets: Iterable[float], *labels: str) -> Histogram:
            return Histogram(f"gfldeploy_{name}", text, labels, registry=registry, buckets=tuple(buckets))

        self._requests = counter("http_requests_total", "Requests that ended.", "route", "method", "status")
        self._durations = histogram(
            "http_request_duration_seconds", "From a request's headers to its end.", _SECONDS, "route", "status"
        )
        self._in_flight = Gauge("gfldeploy_http_requests_in_flight", "Requests that have not ended.", registry=registry)
        images = counter("images_total", "Images, by what became of them.", "outcome")
        self._images = {outcome: images.labels(outcome) for outcome in get_args(Outcome)}
        rejections = counter("rejections_total", "Rejected images, by the reason.", "reason")
        self._rejections = {reason: rejections.labels(reason.replace(" ", "_")) for reason in get_args(Rejection)}
        stages = histogram("stage_duration_seconds", "Time of an image in a stage.", _SECONDS, "stage")
        self._stages = {field.name: stages.labels(field.name) for field in fields(AnswerTimes)}
        self._batches = histogram("batch_size_images", "Images of a batch.", _BATCH_SIZES)
        self._pixels = counter("batch_pixels_total", "Pixels of the network's input, with the padding of batches.")
        self._own_pixels = counter("batch_own_pixels_total", "The same without padding to a common size.")
        self._restarts = counter("engine_restarts_total", "Times that an engine that had failed was opened again.")
        reloads = counter("reloads_total", "Reloads, by what became of them.", "outcome")
        self._reloads = {outcome: reloads.labels(outcome) for outcome in get_args(ReloadOutcome)}
        self._dropped = counter("access_log_dropped_lines_total", "Lines of the access log that were not written.")
        ProcessCollector(registry=registry)
        self._registry = registry

    def ask(self, current: Callable[[], DetectionService]) -> None:
        """From now on tell also what the service says of itself that answers at the moment. Once."""
        self._registry.register(_Now(current))

    def begin(self) -> None:
        """A request begins."""
        self._in_flight.inc()

    def end(self, exchange: Exchange) -> None:
        """A request has ended."""
        self._in_flight.dec()
        route, status = exchange.route or _OTHER, str(exchange.status)
        method = exchange.method if exchange.method in _METHODS else _OTHER
        self._requests.labels(route, method, status).inc()
        self._durations.labels(route, status).observe(exchange.seconds)

    def batch(self, images: int, pixels: int, own_pixels: int) -> None:
        self._batches.observe(images)
        self._pixels.inc(pixels)
        self._own_pixels.inc(own_pixels)

    def answered(self, times: AnswerTimes) -> None:
        self._images["answered"].inc()
        for name, stage in self._stages.items():
            stage.observe(getattr(times, name) / 1e3)

    def rejected(self, reason: Rejection) -> None:
        self._images["rejected"].inc()
        self._rejections[reason].inc()

    def failed(self, kind: Literal["image", "engine"]) -> None:
        self._images["bad" if kind == "image" else "failed"].inc()

    def restarted(self) -> None:
        self._restarts.inc()

    def reloaded(self, outcome: ReloadOutcome) -> None:
        """A reload has ended."""
        self._reloads[outcome].inc()

    def dropped_lines(self, count: int) -> None:
        """So many lines of the access log were dropped."""
        self._dropped.inc(count)

    def text(self, accept: str) -> tuple[bytes, str]:
        """All of it, and its content type: OpenMetrics where the header `accept` asks for it, else Prometheus' own.

        Reads files of the system and asks the GPU, which takes milliseconds.
        """
        return _encoded(_WithoutCreated(self._registry), accept)

    def families(self) -> Families:
        """All of it, for `merged` in another process. Takes as long as `text`."""
        return [
            {
                "name": metric.name,
                "documentation": metric.documentation,
                "type": metric.type,
                "samples": [[one.name, one.labels, one.value] for one in metric.samples],
            }
            for metric in _WithoutCreated(self._registry).collect()
        ]


def restarts(count: int) -> dict[str, Any]:
    """How often a process was started again, of `Families`."""
    name = "gfldeploy_replica_restarts"
    text = "Times that a replica has ended and was started again."
    return {"name": name, "documentation": text, "type": "counter", "samples": [[f"{name}_total", {}, float(count)]]}


def merged(by_replica: Mapping[str, Families], accept: str) -> tuple[bytes, str]:
    """What several processes tell, as `Metrics.text`: each sample with the name of its process as label `replica`."""
    metrics: dict[str, Metric] = {}
    for replica, families in by_replica.items():
        for one in families:
            metric = metrics.setdefault(one["name"], Metric(one["name"], one["documentation"], one["type"]))
            for name, labels, value in one["samples"]:
                metric.add_sample(name, {**labels, "replica": replica}, value)
    return _encoded(_Given(tuple(metrics.values())), accept)


def _encoded(metrics: Collector, accept: str) -> tuple[bytes, str]:
    """In OpenMetrics where the header `accept` asks for it, else in Prometheus' own form; and the content type."""
    try:
        encode, content_type = choose_encoder(accept)
    except Exception:  # noqa: BLE001 - a header from elsewhere, which the package takes for a well-formed one
        encode, content_type = choose_encoder("")
    return encode(metrics), content_type


class _Given(Collector):
    """Metrics that are there already."""

    def __init__(self, metrics: Sequence[Metric]) -> None:
        self._metrics = metrics

    def collect(self) -> Iterator[Metric]:
        yield from self._metrics


async def metrics_route(request: Request) -> Response:
    """`GET /metrics`: of all processes that serve behind the port."""
    metrics: Metrics = request.app.state.metrics
    accept = request.headers.get("Accept", "")
    of_all: Callable[[str], Awaitable[tuple[bytes, str]]] | None = request.app.state.metrics_of_all
    text, content_type = await (asyncio.to_thread(metrics.text, accept) if of_all is None else of_all(accept))
    return Response(text, headers={"Content-Type": content_type})


class _WithoutCreated(Collector):
    """A registry without the time at which each series began, which would double them and of which nothing is made.

    The package switches them off for the whole process only.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry

    def collect(self) -> Iterator[Metric]:
        for metric in self._registry.collect():
            metric.samples = [one for one in metric.samples if not one.name.endswith("_created")]
            yield metric


class _Now(Collector):
    """What is so at the moment of asking: asked, not counted."""

    def __init__(self, current: Callable[[], DetectionService]) -> None:
        self._current = current
        self._gpu: Gpu | None = None

    def describe(self) -> list[Metric]:
        """Nothing: the registry would ask a service that there is not yet."""
        return []

    def collect(self) -> Iterator[Metric]:
        service = self._current()
        yield _gauge("ready", "Whether the server is ready: 1 or 0.", service.ready() is None)
        yield _gauge("images_waiting", "Images that wait for a batch.", service.waiting)
        yield _gauge("images_in_flight", "Images that were admitted and not answered.", service.in_flight)
        about = service.description
        build = InfoMetricFamily("gfldeploy_build", "What answers: the software, the bundle, and what runs it.")
        build.add_metric(
            [],
            {
                "version": __version__,
                "bundle": about.bundle.name,
                "digest": about.bundle.digest,
                "engine": about.engine,
                "engine_version": about.engine_version,
                "precision": about.precision,
                "device": about.device,
            },
        )
        yield build
        if about.device == "gpu":
            self._gpu = self._gpu or Gpu()
            for field, value in self._gpu.sample().items():
                name, text, unit = _GPU[field]
                yield _gauge(f"gpu_{name}", text, value * unit)


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(f"gfldeploy_{name}", text, float(value))
