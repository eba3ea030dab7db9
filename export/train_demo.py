"""Train the demo detector that ships with gfldeploy, from nothing, on generated shapes, with PaddleDetection's pieces.

    python export/train_demo.py --output DIR

Writes DIR/gfl_demo.pdparams, the checkpoint of the package: averaged weights as float16 arrays, evaluated after that
rounding with PaddleDetection's own evaluation. See README.md beside this file.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import pickle
import random
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

# Paddle's CPU kernels use one thread unless told before the import, hence
# ruff: noqa: E402
for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "FLAGS_paddle_num_threads"):
    os.environ.setdefault(_name, str(os.cpu_count() or 1))

import cv2
import numpy as np
import paddle
from paddle.nn import functional
from ppdet.core.workspace import create, load_config
from ppdet.metrics import COCOMetric
from ppdet.optimizer.ema import ModelEMA

from gfldeploy import demo
from gfldeploy.demo import dataset

SEED = 7
MAX_BYTES = 4_000_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="directory for checkpoints, log and data")
    parser.add_argument("--iterations", type=int, default=2600)
    parser.add_argument("--train-images", type=int, default=2500)
    parser.add_argument("--val-images", type=int, default=200)
    parser.add_argument("--data", type=Path, help="directory for the generated images (default: OUTPUT/data)")
    args = parser.parse_args()
    output: Path = args.output
    output.mkdir(parents=True, exist_ok=True)
    data: Path = args.data or output / "data"

    for split, count in (("train", args.train_images), ("val", args.val_images)):
        started = time.perf_counter()
        dataset.generate(data, split, count)
        print(f"{split}: {count} images ready after {time.perf_counter() - started:.1f} s", flush=True)

    random.seed(SEED)
    np.random.seed(SEED)
    paddle.seed(SEED)
    cv2.setNumThreads(1)
    importlib.import_module("gfldeploy.export.demo_backbone")  # registers it with ppdet
    make_trainable()
    config = load_config(str(demo.config_path()))
    for name in ("TrainDataset", "EvalDataset"):
        config[name].dataset_dir = str(data)

    model = create(config.architecture)
    size = sum(int(p.size) for p in model.parameters())
    print(f"{size:,} parameters (batch statistics included)", flush=True)
    started = time.perf_counter()
    ema = train(config, model, output, args.iterations)
    seconds = time.perf_counter() - started

    averaged = {name: value.numpy() for name, value in ema.apply().items()}
    before = evaluate(config, model, averaged, output)
    print(f"mAP(0.50:0.95) in float32: {before:.4f}", flush=True)
    checkpoint = output / "gfl_demo.pdparams"
    write_checkpoint(averaged, checkpoint)
    # evaluate what is on disk, the way anyone would load it
    after = evaluate(config, model, paddle.load(str(checkpoint), return_numpy=True), output)
    print(f"mAP(0.50:0.95) of the float16 checkpoint: {after:.4f}", flush=True)
    result = {
        "map_float32": before,
        "map_float16": after,
        "val_images": args.val_images,
        "train_images": args.train_images,
        "parameters": size,
        "training_seconds": round(seconds, 1),
        "bytes": checkpoint.stat().st_size,
        "seed": SEED,
        "paddle": paddle.__version__,
    }
    (output / "result.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result), flush=True)


def make_trainable() -> None:
    """Replace PaddleDetection's quality focal loss, which multiplies float by bool: a TypeError on Paddle 3."""

    def quality_focal_loss(pred: Any, target: tuple[Any, Any], beta: float = 2.0, use_sigmoid: bool = True) -> Any:
        """Loss [A] of logits `pred` [A, C] for `target`: labels [A], C meaning background, and qualities [A]."""
        assert use_sigmoid, "the demo head trains on logits"
        label, score = target
        classes = pred.shape[1]
        # One-hot times quality: zero for every background row and every other class, so one formula serves them all.
        wanted = functional.one_hot(label, classes + 1)[:, :classes] * score.cast("float32").unsqueeze(-1)
        wanted.stop_gradient = True
        entropy = functional.binary_cross_entropy_with_logits(pred, wanted, reduction="none")
        return (entropy * (wanted - functional.sigmoid(pred)).abs().pow(beta)).sum(axis=1)

    importlib.import_module("ppdet.modeling.losses.gfocal_loss").quality_focal_loss = quality_focal_loss


class SameShapeBatches(paddle.io.BatchSampler):  # type: ignore[misc]
    """Shuffled batches of images with equal aspect ratio: a landscape padded beside a portrait wastes a third."""

    def __init__(self, records: list[dict[str, Any]], batch_size: int) -> None:
        self.batch_size = batch_size
        self.groups: dict[float, list[int]] = {}
        for index, record in enumerate(records):
            self.groups.setdefault(round(record["w"] / record["h"], 1), []).append(index)

    def __iter__(self) -> Iterator[list[int]]:
        batches = []
        for group in self.groups.values():
            order = np.random.permutation(group).tolist()
            batches += [order[i : i + self.batch_size] for i in range(0, len(order), self.batch_size)]
        batches = [batch for batch in batches if len(batch) == self.batch_size]
        random.shuffle(batches)
        return iter(batches)

    def __len__(self) -> int:
        return sum(len(group) // self.batch_size for group in self.groups.values())


def endless(loader: Any) -> Iterator[dict[str, Any]]:
    """Batches of the reader, epoch after epoch."""
    while True:
        try:
            yield next(loader)
        except StopIteration:  # the reader has already started its next epoch
            continue


def train(config: Any, model: Any, output: Path, iterations: int) -> ModelEMA:
    """Train for so many batches; returns the averaged weights."""
    images = config["TrainDataset"]
    images.parse_dataset()
    sampler = SameShapeBatches(images.roidbs, config["TrainReader"]["batch_size"])
    loader = create("TrainReader")(images, 0, batch_sampler=sampler)
    # one "epoch" of the schedule is the whole run, however long it is
    for scheduler in config["LearningRate"]["schedulers"]:
        if hasattr(scheduler, "max_epochs"):
            scheduler.max_epochs = 1
    rate = create("LearningRate")(iterations)
    optimizer = create("OptimizerBuilder")(rate, model)
    ema = ModelEMA(model, decay=0.997, ema_decay_type="normal")

    model.train()
    started = saved = time.perf_counter()
    sums: dict[str, float] = {}
    logged = 0
    for iteration, batch in enumerate(islice(endless(loader), iterations)):
        # Rounded as it is: the committed checkpoint was trained so, and a step of the schedule less changes its bits.
        rate.step(int(iteration / iterations * iterations))
        losses = model(batch)
        losses["loss"].backward()
        optimizer.step()
        optimizer.clear_grad()
        ema.update(model)
        for name, value in losses.items():
            sums[name] = sums.get(name, 0.0) + float(value)
        logged += 1
        if logged == config["log_iter"]:
            shown = "  ".join(f"{name} {total / logged:.3f}" for name, total in sums.items())
            elapsed = time.perf_counter() - started
            print(f"{elapsed:6.0f} s  iteration {iteration + 1}  lr {rate.get_lr():.5f}  {shown}", flush=True)
            sums, logged = {}, 0
        if time.perf_counter() - saved > 120:
            write_checkpoint({k: v.numpy() for k, v in ema.apply().items()}, output / "last.pdparams")
            saved = time.perf_counter()
    print(f"{iterations} iterations in {time.perf_counter() - started:.0f} s", flush=True)
    return ema


def load(model: Any, weights: dict[str, Any]) -> None:
    """Give `model` every one of `weights`, whatever floating-point type they have."""
    unknown = set(weights) ^ set(model.state_dict())
    if unknown:
        raise SystemExit(f"the checkpoint does not fit the model: {', '.join(sorted(unknown))}")
    model.set_state_dict({name: paddle.to_tensor(np.asarray(value, np.float32)) for name, value in weights.items()})


def evaluate(config: Any, model: Any, weights: dict[str, Any], output: Path) -> float:
    """mAP(0.50:0.95) of the eager model with `weights`, by PaddleDetection's own reader and metric."""
    load(model, weights)
    model.eval()
    images = config["EvalDataset"]
    loader = create("EvalReader")(images, 0)
    metric = COCOMetric(images.get_anno(), output_eval=str(output))
    with paddle.no_grad():
        for batch in loader:
            metric.update(batch, model(batch))
    metric.accumulate()
    metric.log()
    model.train()
    return float(metric.get_results()["bbox"][0])


def write_checkpoint(weights: dict[str, np.ndarray], path: Path) -> None:
    """Write `weights` as float16 arrays in a plain pickled dict, atomically.

    float16 halves the package; PaddleDetection casts to the model's type as it loads. A dict of arrays and nothing else
    can be read by an unpickler that allows nothing else.
    """
    rounded = {name: np.ascontiguousarray(value, dtype=np.float16) for name, value in weights.items()}
    broken = [name for name, value in rounded.items() if not np.isfinite(value).all()]
    if broken:
        raise SystemExit(f"not representable in float16: {', '.join(broken)}")
    temporary = path.with_name(f".{path.name}.part")
    with temporary.open("wb") as file:
        pickle.dump(rounded, file, protocol=4)
        file.flush()
        os.fsync(file.fileno())
    if temporary.stat().st_size > MAX_BYTES:
        raise SystemExit(f"{path.name} would take {temporary.stat().st_size} bytes, more than {MAX_BYTES}")
    temporary.replace(path)


if __name__ == "__main__":
    main()
