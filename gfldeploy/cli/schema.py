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
    width = max(map(len, names()))
    for one in names():
        click.echo(f"{one:{width}}  {schema(one)['title']:24}  {path_of(one)}")
