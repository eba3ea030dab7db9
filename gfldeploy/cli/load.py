"""`gfldeploy load`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from gfldeploy.cli import options
from gfldeploy.cli.console import TerminalProgress


@click.command(name="load")
@click.argument("url", metavar="URL")
@click.option(
    "--images", type=options.DIRECTORY, required=True, help="Folder of images to send, as they are, in random order."
)
@click.option(
    "--rates",
    type=options.POSITIVE_NUMBERS,
    default=(),
    help="Images to send a second, at random times (a Poisson process): one load for each.",
)
@click.option(
    "--clients",
    type=options.WHOLE_NUMBERS,
    default=(),
    help="Numbers of clients that send one image after the other, each when it has its last answer: one load for each.",
)
@click.option(
    "--duration", type=options.FiniteFloat(0, 86400, min_open=True), default=30.0, help="Seconds of each load."
)
@click.option(
    "--warm-up",
    type=options.FiniteFloat(0, 86400),
    default=3.0,
    help="Seconds of the same load before it, which do not count.",
)
@click.option(
    "--latency-bound-ms",
    type=options.FiniteFloat(0, min_open=True),
    default=1000.0,
    help="What the server is asked to answer within. Later answers do not count as in time.",
)
@click.option(
    "--timeout-s",
    type=options.FiniteFloat(0, 3600, min_open=True),
    default=10.0,
    help="Seconds after which a request without an answer is given up.",
)
@click.option(
    "--connections",
    type=options.WholeNumber(1, 100_000),
    default=512,
    help="Number of connections that may be open. Where all are in use, what is due fails.",
)
@options.limit(256)
@options.seed("the times and of the order of the images")
@click.option(
    "--api-key-file",
    type=options.FILE,
    help="File with the key that the server asks for, such as the server's own: its first key is sent.",
)
@options.output("File of results to write, which report and compare read.", Path("load.json"))
def command(output: Path, **given: Any) -> None:
    """Send images to a running `gfldeploy serve`, and measure its answers.

    At --rates images are sent at times that were drawn before, whatever the server does, and latencies count from those
    times: a server that falls behind cannot make its client ask less, which would hide its longest latencies
    (coordinated omission). In time/s is the goodput: images answered within the bound. Percentiles are shown where
    there are enough answers for them. If the generator itself is late, the row says so.

    Of an https URL the certificate is checked; SSL_CERT_FILE names other authorities than the system's.

    \b
    Example: gfldeploy load http://127.0.0.1:8000 --images val_images/ --rates 10,50,100 --output load.json
    """
    from gfldeploy.bench.session import check_measured
    from gfldeploy.cli.results import show_results
    from gfldeploy.load.session import load_server

    results = load_server(**given, output=output, progress=TerminalProgress())
    show_results(results)
    click.echo(f"Wrote {output}")
    check_measured(results)
