"""A package that is absent, or there and broken, is one line with the command that repairs it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from gfldeploy.engines.base import is_installed
from gfldeploy.engines.dependencies import require
from gfldeploy.errors import MissingDependencyError


def test_what_is_there_is_imported_without_its_noise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "noisy_package.py").write_text(
        "import sys, warnings\nprint('hello')\nprint('hello', file=sys.stderr)\nwarnings.warn('old')\nVALUE = 3\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    assert require("noisy_package", "export").VALUE == 3
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


def test_absent_packages_name_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MissingDependencyError) as caught:
        require("no_such_package.sub", "quantize")
    assert str(caught.value) == (
        "no_such_package is not installed, quantize needs it. Run: pip install no_such_package"
    )
    commands = {
        "paddle": ("pip install paddlepaddle==", "paddlepaddle-gpu"),
        "onnxruntime": ("pip install onnxruntime ", 'pip install "onnxruntime-gpu'),
        "paddleslim": ("uv sync --no-dev --inexact ", "--extra quant (in a checkout of gfldeploy)"),
    }
    for module, expected in commands.items():
        monkeypatch.setattr(sys, "path", [])
        monkeypatch.setattr(sys, "meta_path", [finder for finder in sys.meta_path if finder.__module__ != "builtins"])
        for loaded in [name for name in sys.modules if name.partition(".")[0] == module]:
            monkeypatch.delitem(sys.modules, loaded)
        with pytest.raises(MissingDependencyError) as caught:
            require(module, "this engine")
        assert f"{module} is not installed, this engine needs it" in str(caught.value)
        assert all(words in str(caught.value) for words in expected)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("import no_such_dependency", "No module named 'no_such_dependency'"),
        ("raise ImportError('libfoo.so.1: cannot open shared object file')", "libfoo.so.1"),
        ("raise OSError('libbar.so: bad ELF')", "libbar.so"),
    ],
)
def test_broken_packages_say_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, reason: str) -> None:
    (tmp_path / "broken_package.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(MissingDependencyError) as caught:
        require("broken_package", "export")
    assert "broken_package is installed but cannot be imported" in str(caught.value)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("module", ["onnx_of_a_bundle", "paddle_of_a_bundle"])
def test_a_folder_of_that_name_is_no_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    """As `python -m gfldeploy` in a bundle would find `onnx/` and `paddle/`."""
    (tmp_path / module).mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert not is_installed(module)
    with pytest.raises(MissingDependencyError, match=f"{module} is not installed, this engine needs it"):
        require(module, "this engine")
