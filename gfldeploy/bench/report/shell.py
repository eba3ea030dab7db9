"""One HTML page that needs no network: a short answer, what is said of it, and interactive figures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from string import Template

from gfldeploy.bench.report.plots import Plot
from gfldeploy.files import write_text
from gfldeploy.machine import Machine
from gfldeploy.text import printable

__all__ = ["machine_line", "sections", "write_page"]

_TEMPLATE = Path(__file__).with_name("page.html")


def write_page(
    path: Path, title: str, subtitle: str, answer: Sequence[str], body: str, figures: Sequence[Plot]
) -> None:
    """Write the page, replacing any other file. `answer`: sentences; `body`: HTML, with the `sections` of the figures.

    The page holds plotly.js (MIT licence). Raises `OutputError`.
    """
    from plotly import offline

    data = json.dumps([{"data": one.data, "layout": one.layout} for one in figures], allow_nan=False)
    page = Template(_TEMPLATE.read_text(encoding="utf-8")).substitute(
        title=escape(printable(title)),
        subtitle=escape(printable(subtitle)),
        answer=printable("\n".join(f"<p>{escape(sentence)}</p>" for sentence in answer)),
        body=printable(body),
        figures=data.replace("<", "\\u003c"),  # a tag in a text would end or hide the script that the data are in
        plotly=offline.get_plotlyjs(),
    )
    write_text(path, page)


def sections(figures: Sequence[Plot]) -> str:
    """The places of the figures, in order, each with its heading and what to see in it."""
    return "\n".join(_section(number, plot) for number, plot in enumerate(figures))


def machine_line(machine: Machine, created: str) -> str:
    """Where and when it was measured. `created`: UTC, ISO 8601."""
    gpus = f", {', '.join(machine.gpus)}" if machine.gpus else ""
    return f"{machine.cpu}, {machine.threads} CPUs{gpus}; {created[:16].replace('T', ' ')} UTC"


def _section(number: int, plot: Plot) -> str:
    title, about = escape(plot.title), escape(plot.about)
    return (
        f'<section><h2>{title}</h2><p>{about}</p><div class="plot" id="plot{number}" role="img" '
        f'aria-label="{title}. {about}" style="height:{plot.height}px"></div></section>'
    )
