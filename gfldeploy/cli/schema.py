"""`gfldeploy schema`."""

from __future__ import annotations

import json

import click


@click.command("schema")
@click.argument("name", required=False)
def command(name: str | None) -> None:
    """Print the JSON Schema of a file that gfldeploy writes, or of what a command prints with --json.

    Without a NAME this lists all of them, and the files that they are in, which editors and validators can be pointed
    to.

    \b
    Example: gfldeploy schema results
    """
    from gfldeploy.schemas import names, path_of, schema

    if name is not None:
        click.echo(json.dumps(schema(name), indent=2, ensure_ascii=False))
        return
    titles = {one: schema(one)["title"] for one in names()}
    widths = [max(map(len, column)) for column in (titles, titles.values())]
    for one, title in titles.items():
        click.echo(f"{one:{widths[0]}}  {title:{widths[1]}}  {path_of(one)}")
