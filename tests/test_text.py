"""What terminals would obey and spreadsheets would calculate is shown as text."""

from __future__ import annotations

import io
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from gfldeploy.cli import main
from gfldeploy.cli.plain_text import escaping_console, plain_streams
from gfldeploy.text import printable, spreadsheet_cell

EVIL = "\x1b]0;title\x07\x1b[31mred\x9b1m\r\u202eback\ud800\u2066"
SHOWN = r"\x1b]0;title\x07\x1b[31mred\x9b1m\x0d\u202eback\ud800\u2066"


def test_printable() -> None:
    assert printable(EVIL) == SHOWN
    assert printable("tab\tand\nlines", keep="") == r"tab\x09and\x0alines"
    kept = "plain\tÄ 中文 e\u0301 עברית 👩\u200d👧 100 %\n"
    assert printable(kept) == kept


def test_streams_escape_what_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    with plain_streams():
        print(EVIL)
        sys.stdout.writelines([EVIL, "\n"])
        assert out.getvalue() == f"{SHOWN}\n{SHOWN}\n"
    assert sys.stdout is out


def test_consoles_escape_text_and_keep_their_own_colours(monkeypatch: pytest.MonkeyPatch) -> None:
    from rich.text import Text

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.delenv("NO_COLOR", raising=False)
    out = io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    with plain_streams():
        escaping_console(width=200).print(Text("a\x1b[31mb\u202e", style="bold"))
        assert out.getvalue() == "\x1b[1ma\\x1b[31mb\\u202e\x1b[0m\n"


@pytest.mark.parametrize(
    ("value", "cell"),
    [
        *[(text, f"'{text}") for text in ("=1+1", "+cmd|' /C calc'!A0", "-2+3", "@SUM(A1)", "\t=1", "\r=1", "\uff1d1")],
        *[(value, value) for value in ("plain", "-3.5", "a=b", "", -3.5, -1, None)],
    ],
)
def test_spreadsheet_cells(value: Any, cell: Any) -> None:
    assert spreadsheet_cell(value) == cell


# --- commands ---------------------------------------------------------------------------------------------------------


def run(*arguments: object) -> int | str | None:
    with pytest.raises(SystemExit) as stopped:
        main(list(map(str, arguments)))
    return stopped.value.code


def test_a_bundle_that_would_write_to_the_terminal(
    tiny_bundle: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    bundle = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    manifest = json.loads((bundle / "manifest.json").read_text())
    evil = EVIL.replace("\ud800", "")
    manifest |= {"classes": [evil, "b"], "name": evil, "notes": [evil], "provenance": {evil: {evil: EVIL}}}
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    assert run("inspect", bundle) == 0
    out = capfd.readouterr().out
    assert r"\x1b]0;title" in out
    assert not any(one in out for one in "\x1b\x07\x9b\u202e\u2066")
    assert run("inspect", bundle, "--json") == 0
    facts = json.loads(capfd.readouterr().out)
    assert facts["classes"] == [evil, "b"]
    assert facts["provenance"] == {evil: {evil: EVIL}}


def test_an_error_that_would_write_to_the_terminal(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run("inspect", tmp_path / "a\x1b]0;b\x07\n\u202ec") == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert r"a\x1b]0;b\x07 \u202ec is not a directory" in line
