"""What Prometheus gets, read by its own parser."""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import prometheus_client.openmetrics.parser as openmetrics
import pytest
from prometheus_client.parser import text_string_to_metric_families as read_text
from served import serving

from gfldeploy import __version__
from gfldeploy.bundle import Bundle
from gfldeploy.serve.access_log import Exchange
from gfldeploy.serve.loaded import AnswerTimes
from gfldeploy.serve.metrics import Metrics
from gfldeploy.serve.service import DetectionService

pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def service(tiny_bundle: Path) -> Iterator[DetectionService]:
    with serving(tiny_bundle) as service:
        yield service


@pytest.fixture
def metrics(service: DetectionService) -> Metrics:
    metrics = Metrics()
    metrics.ask(lambda: service)
    return metrics


def values(metrics: Metrics, name: str) -> dict[tuple[str, ...], float]:
    """The samples of this name, by the values of their labels in the order of the labels' names."""
    text, _ = metrics.text("")
    return {
        tuple(value for _, value in sorted(sample.labels.items())): sample.value
        for family in read_text(text.decode())
        for sample in family.samples
        if sample.name == name
    }


def exchange(
    route: str | None = "/v1/detect", method: str = "POST", status: int = 200, seconds: float = 0.03
) -> Exchange:
    return Exchange(datetime.now(UTC), None, method, route, "/hostile" * 100, status, 0, 0, None, None, seconds)


def test_requests(metrics: Metrics) -> None:
    for one in (exchange(), exchange(), exchange(status=429, seconds=0.001), exchange(None, "BREW", 404)):
        metrics.begin()
        metrics.end(one)
    metrics.begin()
    assert values(metrics, "gfldeploy_http_requests_in_flight") == {(): 1}
    assert values(metrics, "gfldeploy_http_requests_total") == {
        ("POST", "/v1/detect", "200"): 2,
        ("POST", "/v1/detect", "429"): 1,
        ("other", "other", "404"): 1,
    }
    buckets = values(metrics, "gfldeploy_http_request_duration_seconds_bucket")
    assert buckets["0.025", "/v1/detect", "200"] == 0 and buckets["0.05", "/v1/detect", "200"] == 2
    assert values(metrics, "gfldeploy_http_request_duration_seconds_sum")["/v1/detect", "200"] == pytest.approx(0.06)


def test_images_and_batches(metrics: Metrics) -> None:
    metrics.answered(AnswerTimes(decode=2.0, preprocess=3.0, queue=0.5, infer=40.0))
    metrics.rejected("queue full")
    metrics.rejected("deadline")
    metrics.failed("image")
    metrics.failed("engine")
    metrics.batch(3, 3 * 64 * 96, 64 * 96 + 2 * 64 * 64)
    metrics.batch(40, 1, 1)
    metrics.restarted()
    metrics.reloaded("switched")
    metrics.dropped_lines(5)
    assert values(metrics, "gfldeploy_images_total") == {
        ("answered",): 1,
        ("rejected",): 2,
        ("bad",): 1,
        ("failed",): 1,
    }
    assert values(metrics, "gfldeploy_rejections_total") == {("queue_full",): 1, ("deadline",): 1, ("closed",): 0}
    sums = values(metrics, "gfldeploy_stage_duration_seconds_sum")
    assert sums == pytest.approx({("decode",): 0.002, ("preprocess",): 0.003, ("queue",): 0.0005, ("infer",): 0.04})
    buckets = values(metrics, "gfldeploy_batch_size_images_bucket")
    assert buckets["2.0",] == 0 and buckets["3.0",] == 1 and buckets["32.0",] == 1 and buckets["+Inf",] == 2
    padded, own = (values(metrics, f"gfldeploy_batch_{name}pixels_total")[()] for name in ("", "own_"))
    assert (padded, own) == (3 * 64 * 96 + 1, 64 * 96 + 2 * 64 * 64 + 1)
    assert values(metrics, "gfldeploy_engine_restarts_total") == {(): 1}
    assert values(metrics, "gfldeploy_reloads_total") == {("switched",): 1, ("failed",): 0}
    assert values(metrics, "gfldeploy_access_log_dropped_lines_total") == {(): 5}


def test_the_service_is_asked(metrics: Metrics, tiny_bundle: Path) -> None:
    (labels,) = (
        sample.labels
        for family in read_text(metrics.text("")[0].decode())
        for sample in family.samples
        if sample.name == "gfldeploy_build_info"
    )
    bundle = Bundle.open(tiny_bundle)
    assert labels["version"] == __version__ and labels["digest"] == bundle.digest and labels["bundle"] == "tiny"
    assert (labels["engine"], labels["precision"], labels["device"]) == ("onnxruntime", "fp32", "cpu")
    for name, value in (("ready", 1), ("images_waiting", 0), ("images_in_flight", 0)):
        assert values(metrics, f"gfldeploy_{name}") == {(): value}
    assert values(metrics, "process_resident_memory_bytes")[()] > 1e6
    assert values(metrics, "process_cpu_seconds_total")[()] > 0


def test_two_applications_in_one_process() -> None:
    one, other = Metrics(), Metrics()
    one.restarted()
    assert values(one, "gfldeploy_engine_restarts_total") == {(): 1}
    assert values(other, "gfldeploy_engine_restarts_total") == {(): 0}


def test_names_and_formats(metrics: Metrics) -> None:
    metrics.begin()
    metrics.end(exchange())
    text, content_type = metrics.text("*/*")
    assert content_type.startswith("text/plain; version=0.0.4")
    families = list(read_text(text.decode()))
    for family in families:
        assert re.fullmatch(r"(gfldeploy|process)_[a-z_]+", family.name) and family.documentation
        assert not re.search(r"_(ms|milliseconds|mb|percent|created)$", family.name), "base units alone"
        assert family.type != "unknown"
    accept = "application/openmetrics-text; version=1.0.0,text/plain;q=0.5"
    text, content_type = metrics.text(accept)
    assert content_type.startswith("application/openmetrics-text")
    found = openmetrics.text_string_to_metric_families(text.decode())  # type: ignore[no-untyped-call]
    assert {one.name for one in found} >= {"gfldeploy_http_requests", "gfldeploy_ready"}


@pytest.mark.parametrize("accept", ["application/openmetrics-text;version=zz", "*/*;;=,;version", "\xff", ""])
def test_whatever_a_client_accepts(metrics: Metrics, accept: str) -> None:
    assert metrics.text(accept)[0].startswith(b"# HELP gfldeploy_")
