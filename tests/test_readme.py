"""README's code, run as it stands."""

from __future__ import annotations

import functools
import inspect
import re
import shutil
from pathlib import Path
from typing import Any

import demo_bundles
import pytest

from gfldeploy.bench import session
from gfldeploy.bench.results import BenchResults
from gfldeploy.bundle import Bundle
from gfldeploy.demo.dataset import generate
from gfldeploy.export import exporter

README = Path(__file__).parents[1] / "README.md"


@demo_bundles.needs_quant
@pytest.mark.slow
def test_the_ten_lines(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On the demo detector, with the benchmark's shortest settings; its FP32 bundle is the one that all tests share."""
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert len(code.strip().splitlines()) <= 11
    shortest: dict[str, Any] = {
        "rounds": 1,
        "min_seconds": 0.0,
        "min_count": 2,
        "batch_sizes": (1,),
        "limit": 2,
        "accuracy_limit": 4,
    }
    quick = functools.partial(session.benchmark, **shortest, engines=("onnxruntime",), peak=False, monitor_hz=0)
    signature = inspect.signature(exporter.export_bundle)

    def shared(**given: Any) -> Bundle:
        asked = signature.bind(**given).arguments
        assert Path(asked["config"]).is_file() and Path(asked["weights"]).is_file()
        return Bundle.open(Path(shutil.copytree(trained, asked["output"])))

    monkeypatch.setattr(session, "benchmark", quick)
    monkeypatch.setattr(exporter, "export_bundle", shared)
    monkeypatch.chdir(tmp_path)
    for name in ("gfl_r50_fpn_1x_coco.yml", "model_final.pdparams"):
        Path(name).touch()
    (generate(tmp_path / "data", "calib", 4).parent / "images").rename("calib_images")
    annotations = generate(tmp_path / "data", "val", 4)
    annotations.rename("val.json")
    (annotations.parent / "images").rename("val_images")
    for name, picture in zip(("a.jpg", "b.jpg"), sorted(Path("val_images").iterdir()), strict=False):
        shutil.copy(picture, name)
    exec(compile(code, str(README), "exec"), {})
    results = BenchResults.read(Path("results.json"))
    ran = {(one.cell.precision, one.cell.bundle.directory) for one in results.cells if one.status == "ok"}
    assert ran == {("fp32", "gfl_r50"), ("int8", "gfl_r50_int8")}
    shown = capsys.readouterr().out
    assert "gfl_r50: onnxruntime fp32, batch 1 ok Accuracy(" in shown
    assert len(re.findall(r"^\['.*'\] \[0\.\d", shown, re.MULTILINE)) == 2, "something is found in both images"
