"""The demo detector's files: small, safe to load, and fitting each other."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from gfldeploy import demo
from gfldeploy.demo import dataset

LABELS = demo.config_path().with_name("gfl_demo_classes.json")


class OnlyArrays(pickle.Unpickler):
    """Loads containers and numpy arrays, and refuses everything else a pickle can name."""

    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] == "numpy" and name in ("_reconstruct", "ndarray", "dtype", "_frombuffer"):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name}")


def test_checkpoint_is_a_small_dict_of_half_precision_arrays() -> None:
    path = demo.weights_path()
    assert path.stat().st_size <= 4_000_000
    with path.open("rb") as file:
        weights = OnlyArrays(file).load()
    assert type(weights) is dict
    assert all(type(name) is str for name in weights)
    for name, value in weights.items():
        assert type(value) is np.ndarray and value.dtype == np.float16, name
        assert np.isfinite(value).all(), name
    assert sum(value.size for value in weights.values()) < 1_900_000


def test_labels_are_the_classes_of_the_dataset() -> None:
    labels = json.loads(LABELS.read_text(encoding="utf-8"))
    assert [(c["id"], c["name"]) for c in labels["categories"]] == list(enumerate(dataset.CLASSES, start=1))


def test_config_matches_the_dataset() -> None:
    # the datasets' and schedulers' own tags (!COCODataSet ...) are mappings here
    class Loader(yaml.SafeLoader):
        pass

    Loader.add_multi_constructor("!", lambda loader, _suffix, node: loader.construct_mapping(node, deep=True))
    config = yaml.load(demo.config_path().read_text(encoding="utf-8"), Loader)
    assert config["architecture"] == "GFL"
    assert config["num_classes"] == len(dataset.CLASSES)
    assert config["GFLHead"]["fpn_stride"] == [8, 16, 32, 64, 128]
    assert config["EvalReader"]["sample_transforms"] == config["TestReader"]["sample_transforms"]
    assert (LABELS.parent / config["TestDataset"]["anno_path"]).is_file()
    assert "pretrain_weights" not in config


def test_importing_the_demo_loads_nothing_heavy() -> None:
    code = (
        "import sys, gfldeploy.demo, gfldeploy.demo.dataset; "
        "print([m for m in ('paddle', 'ppdet', 'cv2', 'pycocotools') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


# In a process of its own: ppdet keeps one global config, and its import changes warning filters and loggers.
_BUILD = """
import json, sys
import numpy as np, paddle
import gfldeploy.export.demo_backbone
from gfldeploy import demo
from ppdet.core.workspace import create, load_config
config = load_config(str(demo.config_path()))
model = create(config.architecture)
weights = paddle.load(str(demo.weights_path()), return_numpy=True)
wanted = {name: list(value.shape) for name, value in model.state_dict().items()}
stored = {name: list(value.shape) for name, value in weights.items()}
from ppdet.utils.checkpoint import load_weight
load_weight(model, str(demo.weights_path()))
loaded = model.state_dict()
different = [n for n, v in weights.items() if not np.array_equal(loaded[n].numpy(), v.astype(np.float32))]
model.eval()
image = paddle.zeros([1, 3, 96, 160])
with paddle.no_grad():
    features = model.backbone({"image": image})
json.dump({"wanted": wanted, "stored": stored, "different": different,
           "features": [list(f.shape) for f in features],
           "spec": [[s.channels, s.stride] for s in model.backbone.out_shape],
           "parameters": sum(int(p.size) for p in model.parameters())}, open(sys.argv[1], "w"))
"""


@pytest.mark.slow
@pytest.mark.needs_ppdet
def test_checkpoint_fits_the_model_that_the_config_builds(tmp_path: Path) -> None:
    answer = tmp_path / "answer.json"
    subprocess.run([sys.executable, "-c", _BUILD, str(answer)], check=True, capture_output=True, cwd=tmp_path)
    found = json.loads(answer.read_text(encoding="utf-8"))
    assert found["stored"] == found["wanted"], "missing, unexpected or misshapen names"
    assert found["different"] == []
    assert found["parameters"] <= 1_900_000
    # channels and strides are what the backbone promises its neck
    assert found["features"] == [[1, c, 96 // s, 160 // s] for c, s in found["spec"]]
    assert [s for _, s in found["spec"]] == [8, 16, 32]
