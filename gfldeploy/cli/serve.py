"""`gfldeploy serve`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from gfldeploy.cli import options
from gfldeploy.cli.console import TerminalProgress


@click.command("serve")
@click.argument("source", metavar="BUNDLE|deploy.yml", type=options.PATH)
@click.option("--host", default="127.0.0.1", help="Address to listen on; 0.0.0.0 for every one of this machine.")
@click.option("--port", type=options.WholeNumber(0, 65535), default=8000, help="Port to listen on; 0 for a free one.")
@click.option(
    "--warm-up",
    type=options.DIRECTORY,
    metavar="FOLDER",
    show_default="the sizes of deploy.yml, else those of photographs",
    help="Folder of images such as those to come: their input sizes are run before the server is ready.",
)
@click.option(
    "--timeout-ms",
    type=options.FiniteFloat(0, min_open=True),
    default=1000.0,
    help="Deadline of requests that name none: those that would be answered later are refused.",
)
@click.option("--max-waiting", type=options.WholeNumber(1), default=64, help="Number of images that wait at most.")
@click.option(
    "--max-body-mb", type=options.FiniteFloat(0, 1e6, min_open=True), default=32.0, help="Largest request, 10^6 bytes."
)
@click.option(
    "--max-megapixels",
    type=options.FiniteFloat(0, min_open=True),
    default=50.0,
    help="Largest image, 10^6 pixels: larger ones take seconds to decode.",
)
@click.option("--max-images", type=options.WholeNumber(1), default=16, help="Number of images of a request at most.")
@click.option(
    "--body-timeout-s",
    type=options.FiniteFloat(0, min_open=True),
    default=10.0,
    help="Seconds that a client may take to send a request.",
)
@click.option(
    "--drain-timeout-s",
    type=options.FiniteFloat(0),
    default=30.0,
    help="Seconds that a server that is told to stop may take to answer what it has admitted.",
)
@click.option(
    "--api-key-file",
    type=options.FILE,
    show_default="none is needed",
    help="File of one API key per line, which nobody else may read: requests without one of them are refused.",
)
@click.option(
    "--access-log",
    type=options.PathType(path_type=Path, dir_okay=False, allow_dash=True),
    metavar="FILE",
    show_default="none",
    help="File to append a line of JSON to for each request; - for standard output.",
)
@options.group(*options.SHOWN, *options.NMS, options.DECODE, *options.ENGINE, options.INPUT_SIZE)
@click.option(
    "--streams",
    type=options.WholeNumber(1),
    show_default="as many as usable CPUs, with --threads 1",
    help="Number of inferences at once from one engine, on CPUs. With --threads alone it is 1.",
)
@click.option(
    "--batch-size", type=options.WholeNumber(1), show_default="1", help="Number of images of one inference at most."
)
@options.group(options.ENGINE_CACHE)
@click.option(
    "--replicas",
    type=options.Parsed("N|MIN-MAX", options.replicas),
    default="1",
    help="Number of engines that serve, each in a process of its own; MIN-MAX lets Ray Serve choose by the queue.",
)
@options.RAY[0]
def command(**given: Any) -> None:
    """Serve detections over HTTP: POST an image to /v1/detect.

    Images wait in a queue and run in batches of one input size. What would be answered after its deadline is refused at
    once. SIGTERM and Ctrl-C drain: what was admitted is answered, new requests are refused; a second one stops.
    SIGHUP, or POST /v1/reload with a key, reads the same path again and puts what is there in place of what answers,
    between two requests.

    \b
    Example: gfldeploy serve gfl_r50_int8 --port 8000
    """
    from gfldeploy.serve.session import serve_detector

    serve_detector(**given, progress=TerminalProgress())
