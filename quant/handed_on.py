"""Check what ONNX Runtime hands to TensorRT against TensorRT's rules: FP32, FP16 and INT8 of several detectors.

    python quant/handed_on.py --output DIR [--configs NAME ...] [--samples N] [--results FILE]

DIR receives generated images and the bundles, or has them from an earlier run, of this or of `compare.py zoo`. The
detectors of the model zoo have random weights: the graphs are those of the real ones. For each graph the row says what
the rules find in the file, in what ONNX Runtime makes of it for TensorRT (`handed_on`), and in what it would make of it
with the options of its other sessions (`other_options`, counted by rule). FP16 is checked whole and as the part
without the decode, which is what a TensorRT gets that chooses precisions itself. No GPU and no TensorRT is needed;
on the CPU some Casts of an FP16 graph are missing in `nodes_handed_on` (see `gfldeploy.quant.tensorrt.handed_on`).

FILE is results/handed_on.json beside this script when all configs run, else none. Exits with 1 if a rule is broken.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from compare import CONFIGS, HERE, ZOO, export, gfldeploy

from gfldeploy import demo
from gfldeploy.bundle import Bundle
from gfldeploy.demo.dataset import generate
from gfldeploy.engines.base import installed_version
from gfldeploy.engines.onnx_split import split_decode
from gfldeploy.engines.ort_engine import session_options
from gfldeploy.files import write_json
from gfldeploy.quant.tensorrt import check_tensorrt, handed_on

DEMO = "gfl_demo"
DEFAULT = (DEMO, "gfl_r18vd_1x_coco", "gfl_r50_fpn_1x_coco", "gflv2_r50_fpn_1x_coco")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="directory for images and bundles")
    parser.add_argument("--configs", nargs="+", choices=(DEMO, *ZOO), default=DEFAULT, metavar="NAME")
    parser.add_argument("--samples", type=int, default=2, metavar="N", help="calibration images (default: 2)")
    parser.add_argument("--results", type=Path, help="JSON file to write")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    rows = []
    for name in args.configs:
        for precision, model in graphs(name, args.output, args.samples):
            rows.append({"config": name, "precision": precision, **row(model)})
            print(line(rows[-1]), flush=True)
    results = args.results or (HERE / "results" / "handed_on.json" if set(args.configs) == set(DEFAULT) else None)
    if results:
        versions = {name: installed_version(name) for name in ("onnxruntime", "onnx")}
        results.parent.mkdir(parents=True, exist_ok=True)
        write_json(results, {"versions": versions, "rows": rows})
    if broken := [f"{one['config']} {one['precision']}" for one in rows if one["file"] or one["handed_on"]]:
        sys.exit(f"TensorRT would refuse: {', '.join(broken)}")


def graphs(name: str, directory: Path, samples: int) -> Iterator[tuple[str, Any]]:
    """What TensorRT is to read of a detector, by precision."""
    import onnx

    fp32, int8 = directory / name, directory / f"{name}_int8"
    if not fp32.exists():
        random = ("--random-weights", "0")
        config = demo.config_path() if name == DEMO else CONFIGS / f"{name}.yml"
        export(directory, name, config, *(("--weights", str(demo.weights_path())) if name == DEMO else random))
    if not int8.exists():
        generate(directory / "data", "calib", samples)
        options = ("--samples", str(samples), "--min-agreement", "0", "--output", int8.name)
        ended = gfldeploy(["quantize", name, "--data", "data/calib/images", *options], directory)
        if ended.error is not None:
            sys.exit(f"{name} was not quantised: {ended.error}")
    for precision, bundle, graph in (
        ("fp32", fp32, "onnx"),
        ("fp16", fp32, "onnx_fp16"),
        ("int8", int8, "onnx_tensorrt"),
    ):
        model = onnx.load(str(Bundle.open(bundle).graph(graph)[0]))
        yield precision, model
        if precision == "fp16":
            yield "fp16, without the decode", split_decode(model)[0]


def row(model: Any) -> dict[str, Any]:
    """What the rules find in a graph, as it is and as ONNX Runtime hands it on."""
    import onnxruntime

    found = handed_on(model)
    kinds = Counter(node.op_type for node in found.graph.node)
    other = check_tensorrt(handed_on(model, session_options(onnxruntime, 1)))
    return {
        "nodes": len(model.graph.node),
        "nodes_handed_on": len(found.graph.node),
        "convolutions": kinds["Conv"],
        "file": check_tensorrt(model),
        "handed_on": check_tensorrt(found),
        "other_options": dict(Counter(rule(problem) for problem in other)),
    }


def rule(problem: str) -> str:
    """A problem without the name of its node, which comes second."""
    kind, _, rest = problem.split(" ", 2)
    return f"{kind}: {rest}"


def line(row: dict[str, Any]) -> str:
    """A row for people."""
    broken = row["file"] + row["handed_on"]
    other = ", ".join(f"{problem} ({count})" for problem, count in row["other_options"].items())
    return (
        f"{row['config']:24} {row['precision']:26} {row['nodes']:5} nodes, {row['convolutions']:3} convolutions: "
        f"{broken[0] if broken else 'keeps the rules'}; with other options: {other or 'too'}"
    )


if __name__ == "__main__":
    main()
