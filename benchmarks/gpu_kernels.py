"""Which kernels a GPU runs for a detector in ONNX Runtime, and for how long: PyTorch's profiler sees those of others.

    python benchmarks/gpu_kernels.py --bundle gfl_r50/fp32 --size 800x1344 --batch-size 8 --name gfl_r50 --machine GPU

Needs PyTorch for the same CUDA. Random images run in the session for any shape, without a graph, in FP16, TF32 and
FP32; times are of one inference, the mean of `--runs`, and the input is copied from pageable memory. Writes
results/MACHINE/checks/NAME_kernels.json beside this script, and prints the longest.
"""

from __future__ import annotations

import argparse
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from gfldeploy import Bundle
from gfldeploy.engines.base import EngineOptions
from gfldeploy.engines.registry import open_engine
from gfldeploy.files import write_json
from gfldeploy.machine import describe_machine

HERE = Path(__file__).resolve().parent
PRECISIONS = {"FP16": ("fp16", False), "TF32": ("fp32", True), "FP32": ("fp32", False)}
SHOWN, KEPT, WIDTH = 12, 40, 120


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--size", default="320x512", metavar="HxW")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N")
    parser.add_argument("--runs", type=int, default=3, metavar="N")
    parser.add_argument("--name", required=True, help="of the results file")
    parser.add_argument("--machine", required=True, help="folder of results/")
    args = parser.parse_args()
    import torch

    torch.zeros(1, device="cuda")
    height, width = (int(side) for side in args.size.split("x"))
    coarse = np.random.default_rng(0).normal(0, 1, (args.batch_size, 3, height // 8, width // 8)).astype(np.float32)
    inputs = {"image": coarse.repeat(8, 2).repeat(8, 3)}
    bundle, found = Bundle.open(args.bundle), {}
    for name, (precision, tf32) in PRECISIONS.items():
        options: Any = EngineOptions(precision, "gpu", 4, tf32=tf32)
        with open_engine("onnxruntime", bundle, options) as engine:
            for _ in range(args.runs + 1):
                engine.infer(inputs)
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiled:
                for _ in range(args.runs):
                    engine.infer(inputs)
        spent, launches = Counter[str](), Counter[str]()
        for one in profiled.key_averages():
            spent[one.key] += one.self_device_time_total / 1e3 / args.runs
            launches[one.key] += one.count / args.runs
        longest = spent.most_common(KEPT)
        found[name] = [{"kernel": key[:WIDTH], "ms": ms, "launches": launches[key]} for key, ms in longest]
        print(f"\n{name}: {spent.total():.1f} ms")
        for key, ms in longest[:SHOWN]:
            print(f"{ms:8.2f} ms {launches[key]:5.0f} x {key[:WIDTH]}")
    about = {"machine": asdict(describe_machine()), "bundle": {"name": bundle.name, "digest": bundle.digest}}
    output = HERE / "results" / args.machine / "checks" / f"{args.name}_kernels.json"
    write_json(output, {**about, "size": args.size, "batch_size": args.batch_size, "kernels": found})


if __name__ == "__main__":
    main()
