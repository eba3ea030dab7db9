"""PaddleDetection configs: reading, merging and checking them. Building models takes too long for this."""

from __future__ import annotations

import random
from collections.abc import Iterable
from pathlib import Path

import yaml
from mutations import mutate_bytes, mutate_value

from gfldeploy.export.config import load_detector_config

_ROOT = Path(__file__).resolve().parents[2]
_DEMO = _ROOT / "gfldeploy" / "demo" / "assets" / "gfl_demo.yml"
_SNIPPETS = (
    *("&a ", "*a", "<<: *a", "? ", "!!python/object/apply:os.system [x]", "!!int x", "!!set {a}", "!!binary x"),
    *(
        "!Callable {}",
        "!COCODataSet {}",
        "1:2:3",
        "2020-01-01",
        ".nan",
        ".inf",
        "0x" + "f" * 90,
        "1e999",
        "{",
        "[",
        "- ",
    ),
    *(
        "_BASE_: [base.yml]\n",
        "_BASE_: [config.yml]\n",
        "pretrained: evil.pdparams\n",
        "name: GFL\n",
        "nms: MatrixNMS\n",
    ),
    *("act: __import__('os').abort()\n", "norm_layer: nn.LayerNorm\n", "backbone: VisionTransformer\n", "neck: GFL\n"),
    *("TestDataset: {anno_path: base.yml}\n", "anno_path: /dev/zero\n", "anno_path: classes.json\n", "depth: 1e9\n"),
)


def seeds() -> Iterable[bytes]:
    demo = _DEMO.read_bytes()
    yield demo
    for path in sorted((_ROOT / "configs" / "gfl").glob("*.yml")):
        yield path.read_bytes().replace(b"_base_/", f"{path.parent}/_base_/".encode())
    yield demo.replace(b"neck: FPN", b"neck: CustomCSPPAN") + b"\nCustomCSPPAN: {stage_fn: \"open('x')\"}\n"
    yield b"_BASE_: [base.yml, base.yml]\n" + demo
    yield b"a: &a [1]\nb: &b [*a, *a]\nc: [*b, *b]\n" + demo


def one(data: bytes, folder: Path) -> object:
    (folder / "base.yml").write_bytes(_DEMO.read_bytes())
    (folder / "gfl_demo_classes.json").write_text('{"categories": [{"name": "a"}]}')
    path = folder / "config.yml"
    path.write_bytes(data)
    return load_detector_config(path)


def mutate(data: bytes, rng: random.Random) -> bytes:
    if rng.random() < 0.6:
        try:
            value = yaml.safe_load(data.replace(b"!", b"tag: "))  # a tag and its mapping are seldom both kept
            return yaml.safe_dump(mutate_value(value, rng), allow_unicode=True).encode("utf-8", "surrogatepass")
        except (yaml.YAMLError, ValueError, RecursionError, OverflowError, TypeError, KeyError):
            pass
    if rng.random() < 0.7:
        text = data.decode("utf-8", "replace")
        for _ in range(rng.choice((1, 1, 2, 5))):
            at = rng.choice([0, len(text), *(place for place, letter in enumerate(text) if letter in " \n:[{,")])
            text = text[: at + 1] + rng.choice(_SNIPPETS) + text[at + rng.choice((1, 1, 2, 30)) :]
        return text.encode("utf-8", "surrogatepass")
    return mutate_bytes(data, rng)
