"""`gfldeploy load` against a real server on a socket, which answers as each test says."""

from __future__ import annotations

import asyncio
import functools
import json
import shutil
import ssl
import subprocess
from collections import Counter
from pathlib import Path

import pytest
from demo_bundles import RunHere
from recorded_progress import RecordedProgress
from schema_checks import check_schema
from scripted_server import MODEL, Asked, Script, ScriptedServer, answer, error, reply

import gfldeploy
from gfldeploy import BenchResults, DataError, OutputError, ServerError, UsageError, load_server
from gfldeploy.bench.results import Serving, Traffic
from gfldeploy.bench.scenarios import arrival_times
from gfldeploy.bench.table import COLUMNS, rows
from gfldeploy.load import connection as connections

brief = functools.partial(load_server, duration=0.4, warm_up=0.0)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three files that a server which looks at nothing takes for images."""
    folder = tmp_path_factory.mktemp("images")
    for name in "abc":
        (folder / f"{name}.jpg").write_bytes(name.encode() * 1000)
    return folder


def served(results: BenchResults) -> tuple[Serving, Traffic]:
    """Of the only load."""
    (cell,) = results.cells
    (run,) = cell.runs
    assert run.serving is not None and run.serving.traffic is not None
    return run.serving, run.serving.traffic


def test_a_rate_sends_what_was_drawn_and_every_request_ends_once(images: Path, tmp_path: Path) -> None:
    output = tmp_path / "load.json"
    with ScriptedServer() as server:
        found = load_server(
            server.url,
            images=images,
            rates=[80.0],
            duration=0.7,
            warm_up=0.3,
            seed=5,
            latency_bound_ms=250,
            output=output,
        )
    times = arrival_times(80.0, 1000, 5)
    serving, traffic = served(found)
    assert serving.requests == sum((times >= 0.3) & (times < 1.0))
    assert traffic.endings == {"200": serving.requests} and (serving.rejected, serving.failed) == (0, 0)
    assert len(server.asked) == 1 + sum(times < 1.0), "one comes before, to see whether the server answers"
    assert len(traffic.late_ms) == serving.requests == len(found.cells[0].latency_ms)
    assert (traffic.resent, traffic.unasked, traffic.loopback) == (0, 0, True)
    assert len(found.cells[0].runs[0].samples.warmup_ms) == sum(times < 0.3)
    assert {one.line for one in server.asked} == {"POST /v1/detect?timeout_ms=250 HTTP/1.1"}
    sent = Counter(one.body[:1] for one in server.asked[1:])
    assert set(sent) == {b"a", b"b", b"c"} and max(sent.values()) - min(sent.values()) <= 1, "in rounds"
    assert all("authorization" not in one.headers for one in server.asked)
    assert BenchResults.read(output) == found
    check_schema("results", output)
    cell = found.cells[0].cell
    assert (cell.scenario, cell.rate, cell.engine, cell.streams, cell.batch_size) == ("http", 80.0, "openvino", 2, 4)
    assert cell.bundle.digest == MODEL["bundle"]["digest"]  # type: ignore[index]


def test_requests_are_sent_at_their_times_though_nothing_is_answered(images: Path) -> None:
    """The server answers nobody before the 30th has come: a client that waited for answers would never get there. The
    latencies count from the planned times, so the first one has the time until the 30th was to be sent in it."""
    first = asyncio.Event()

    async def stall(asked: Asked) -> bytes:
        if asked.number == 30:
            first.set()
        if 0 < asked.number < 30:
            await first.wait()
        return reply()

    with ScriptedServer(stall) as server:
        found = brief(server.url, images=images, rates=[100.0], seed=1, duration=0.6)
    times = arrival_times(100.0, 100, 1) * 1e3
    serving, traffic = served(found)
    assert traffic.endings == {"200": serving.requests} and serving.requests > 30
    assert max(found.cells[0].latency_ms) >= times[29] - times[0]
    assert traffic.most_connections >= 29


def test_what_became_of_requests_is_told_apart(images: Path, tmp_path: Path) -> None:
    async def script(asked: Asked) -> bytes | None:
        answers: dict[int, bytes | None] = {
            1: error(429, "queue_full"),
            2: error(503, "deadline"),
            3: error(422, "image"),
            4: reply(500, "no object"),
            5: b"nonsense\r\n\r\n",
            6: None,
        }
        return answers.get(asked.number % 8, reply())

    with ScriptedServer(script) as server:
        found = brief(server.url, images=images, rates=[200.0])
    serving, traffic = served(found)
    endings = dict(traffic.endings)
    assert sum(endings.values()) == serving.requests
    assert serving.rejected == endings["429 queue_full"] + endings["503 deadline"] > 0
    assert len(found.cells[0].latency_ms) == endings["200"]
    assert serving.failed == endings["422 image"] + endings["500"] + endings["malformed"] + endings.get("closed", 0)
    (row,) = rows(found)
    assert row.served is not None and row.served.rejected == serving.rejected / serving.requests
    assert "overloaded" in row.flags and row.memory_mb is None and row.padding is None
    shown = {column.key: column.text(row) for column in COLUMNS}
    assert float(shown["failed_percent"]) > 0 and shown["mean_batch"] == ""


def test_a_request_without_an_answer_is_given_up(images: Path) -> None:
    async def never(asked: Asked) -> bytes:
        if asked.number % 2:
            await asyncio.sleep(60)
        return reply()

    with ScriptedServer(never) as server:
        found = brief(server.url, images=images, rates=[60.0], latency_bound_ms=100, timeout_s=0.2)
    serving, traffic = served(found)
    assert set(traffic.endings) == {"200", "timed out"} and serving.failed == traffic.endings["timed out"]


def test_connections_are_bounded(images: Path) -> None:
    async def never(asked: Asked) -> bytes:
        if asked.number > 1:
            await asyncio.sleep(60)
        return reply()

    with ScriptedServer(never) as server:
        found = brief(server.url, images=images, rates=[80.0], timeout_s=1.0, connections=3)
    serving, traffic = served(found)
    assert traffic.most_connections == 3
    assert traffic.endings == {"200": 1, "timed out": 3, "no connection": serving.requests - 4}


def test_a_request_on_a_connection_that_the_server_closed_just_then_is_sent_again(images: Path) -> None:
    """Once, and on a new connection; what a server answers twice is noticed."""

    async def close(asked: Asked) -> bytes | None:
        return None if asked.use == 3 else reply()

    with ScriptedServer(close) as server:
        serving, traffic = served(brief(server.url, images=images, clients=[1]))
    assert traffic.endings == {"200": serving.requests} and traffic.resent >= 1

    async def twice(asked: Asked) -> bytes | None:
        return reply() + (reply() if asked.number == 5 else b"")

    with ScriptedServer(twice) as server:
        serving, traffic = served(brief(server.url, images=images, clients=[1]))
    assert traffic.unasked + traffic.endings.get("malformed", 0) == 1


def test_clients_have_one_request_each(images: Path) -> None:
    at_once: list[int] = []
    present = 0

    async def count(asked: Asked) -> bytes:
        nonlocal present
        present += 1
        at_once.append(present)
        await asyncio.sleep(0.002)
        present -= 1
        return reply()

    with ScriptedServer(count) as server:
        found = brief(server.url, images=images, clients=[4])
    serving, traffic = served(found)
    assert max(at_once) == 4 and traffic.most_connections == 4 and traffic.late_ms == ()
    assert found.cells[0].cell.clients == 4 and found.cells[0].cell.rate is None
    assert len(found.cells[0].latency_ms) == serving.requests
    (row,) = rows(found)
    assert "clients" in row.cell.load and row.served is not None and row.served.late_ms is None


def test_report_and_compare_read_what_it_writes(images: Path, tmp_path: Path, run_here: RunHere) -> None:
    with ScriptedServer() as server:
        for name in ("a", "b"):
            ended = run_here(
                *("load", server.url, "--images", images, "--rates", "40,60", "--clients", 2),
                *("--duration", 0.3, "--warm-up", 0, "--output", tmp_path / f"{name}.json"),
            )
            assert ended.returncode == 0, ended.stderr
    assert "in time" in ended.stdout and "http" in ended.stdout
    found = gfldeploy.compare(tmp_path / "a.json", tmp_path / "b.json")
    assert [pair.cell.load for pair in found.pairs] == [
        ", http at 40 images/s", ", http at 60 images/s", ", http from 2 clients",
    ]  # fmt: skip
    assert all(pair.a_in_time_per_s for pair in found.pairs)
    shown = run_here("compare", tmp_path / "a.json", tmp_path / "b.json")
    assert shown.returncode == 0 and "http from 2 clients" in " ".join(shown.stdout.split())
    page = gfldeploy.report(tmp_path / "a.json", force=True).read_text()
    assert "Most answers within 1000 ms over HTTP" in page and "200; the client, on the same machine" in page


def test_loads_that_differ_are_not_compared(images: Path) -> None:
    with ScriptedServer() as server:
        one, two = (
            load_server(server.url, images=images, rates=[40.0], latency_bound_ms=bound, duration=0.2, warm_up=0.0)
            for bound in (100.0, 200.0)
        )
    with pytest.raises(DataError, match="latency bound in ms"):
        gfldeploy.compare(one, two)


def test_nothing_is_answered(images: Path, tmp_path: Path, run_here: RunHere) -> None:
    async def full(asked: Asked) -> bytes:
        return error(429, "queue_full")

    with ScriptedServer(full) as server:
        ended = run_here(
            *("load", server.url, "--images", images, "--rates", 50, "--duration", 0.2, "--warm-up", 0),
            *("--output", tmp_path / "load.json"),
        )
    assert ended.returncode == 2 and "none of" in ended.stderr and "429 queue_full" in ended.stderr
    (cell,) = BenchResults.read(tmp_path / "load.json").cells
    assert cell.status == "failed"
    with ScriptedServer() as server:
        (cell,) = brief(server.url, images=images, rates=[1e-3], duration=0.05).cells
    assert (cell.status, cell.reason) == ("failed", "no request was due in so short a time")


@pytest.mark.parametrize(
    ("script", "model", "problem"),
    [
        (answer, error(401, "unauthorized"), r"/v1/model answered 401: it is unauthorized. Give the file with its key"),
        (answer, reply(302, None, "location: http://192.0.2.1/"), "answered 302. Give the URL that it redirects to"),
        (answer, reply(404), r"answered 404\. Give the URL of a running `gfldeploy serve`"),
        (answer, b"220 mail ready\r\n\r\n", r"answers no HTTP/1\.1. Check the URL"),
        (answer, reply(200, {"name": "another"}), "must be an object with bundle"),
        (answer, reply(200, {**MODEL, "batch_size": 0}), "batch_size, threads and streams must be at least 1"),
        (answer, reply(200, {**MODEL, "precision": "x"}), "precision must be one of"),
        (answer, reply(200, [1] * 9), "must be an object"),
    ],
)
def test_what_is_no_server_of_ours(script: Script, model: bytes, problem: str, images: Path) -> None:
    with ScriptedServer(script, model) as server, pytest.raises(ServerError, match=problem):
        load_server(server.url, images=images, rates=[10.0])


def test_a_server_that_cannot_use_the_first_image_or_is_not_there(images: Path) -> None:
    async def refuse(asked: Asked) -> bytes | None:
        return error(422, "image") if asked.number == 0 else None

    with ScriptedServer(refuse) as server:
        url = server.url
        with pytest.raises(ServerError, match=r"/v1/detect answered 422: it is image"):
            load_server(url, images=images, rates=[10.0])
        with pytest.raises(ServerError, match=r"/v1/detect closed the connection"):
            load_server(url, images=images, rates=[10.0])
    with pytest.raises(ServerError, match=r"cannot be reached: .* Start the server, or check the URL"):
        load_server(url, images=images, rates=[10.0])
    with pytest.raises(ServerError, match=r"a\.\.b has no address: .* Check the host in the URL"):
        load_server("http://a..b", images=images, rates=[10.0])


def test_the_key_is_sent_and_not_written(images: Path, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("# clé\ns3cret\nother\n", "utf-8")
    output = tmp_path / "load.json"
    with ScriptedServer() as server:
        brief(server.url, images=images, rates=[40.0], api_key_file=tmp_path / "keys", output=output)
    assert {one.headers["authorization"] for one in server.asked} == {"Bearer s3cret"}
    assert "s3cret" not in output.read_text() and str(images) not in output.read_text()
    (tmp_path / "keys").write_text("# none\n")
    with pytest.raises(DataError, match="has no key"):
        load_server("http://127.0.0.1:1", images=images, rates=[1.0], api_key_file=tmp_path / "keys")


class Interrupting(RecordedProgress):
    """Interrupts when the second load begins."""

    def stage(self, text: str) -> None:
        super().stage(text)
        if "60 images/s" in text:
            raise KeyboardInterrupt


def test_an_interruption_leaves_the_loads_that_were_done(images: Path, tmp_path: Path) -> None:
    output = tmp_path / "load.json"
    with ScriptedServer() as server, pytest.raises(KeyboardInterrupt) as stopped:
        brief(server.url, images=images, rates=[40.0, 60.0], output=output, progress=Interrupting())
    assert stopped.value.__notes__ == [f"{output} has the 1 of 2 loads that were done"]
    assert [one.cell.rate for one in BenchResults.read(output).cells] == [40.0]


def test_options_that_cannot_be(images: Path, tmp_path: Path) -> None:
    url = "http://127.0.0.1:1"
    with pytest.raises(UsageError, match="neither --rates nor --clients"):
        load_server(url, images=images)
    with pytest.raises(UsageError, match="more than 1,000,000 requests"):
        load_server(url, images=images, rates=[1e6])
    with pytest.raises(UsageError, match=r"9 clients need as many connections\. Raise --connections from 8"):
        load_server(url, images=images, clients=[9], connections=8)
    with pytest.raises(UsageError, match="answers in time would be given up"):
        load_server(url, images=images, rates=[1.0], latency_bound_ms=2e4)
    with pytest.raises(DataError, match="there are no images"):
        load_server(url, images=tmp_path, rates=[1.0])
    (tmp_path / "load.json").write_text("{}")
    with pytest.raises(OutputError, match="exists"):
        load_server(url, images=images, rates=[1.0], output=tmp_path / "load.json")
    with pytest.raises(OutputError, match=r"does not end in \.json"):
        load_server(url, images=images, rates=[1.0], output=tmp_path / "load")
    assert json.loads((tmp_path / "load.json").read_text()) == {}


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl, to make a certificate")
def test_https_with_a_certificate_that_is_checked(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
         "-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1", "-out", certificate, "-keyout", key],
        check=True, capture_output=True,
    )  # fmt: skip
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate, key)
    monkeypatch.setattr(connections, "_trusted", connections._trusted.__wrapped__)
    with ScriptedServer(tls=tls) as server:
        with pytest.raises(ServerError, match=r"cannot be reached: .*certificate verify failed"):
            load_server(server.url, images=images, rates=[40.0])
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        serving, traffic = served(brief(server.url, images=images, rates=[40.0]))
    assert traffic.endings == {"200": serving.requests}
