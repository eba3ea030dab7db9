"""Check what ONNX Runtime hands to TensorRT against TensorRT's rules: FP32, FP16 and INT8 of several detectors.

    python quant/handed_on.py --output DIR [--configs NAME ...] [--samples N] [--provider FOLDER] [--results FILE]

DIR receives generated images and the bundles, or has them from an earlier run, of this or of `compare.py zoo`. The
detectors of the model zoo have random weights: the graphs are those of the real ones. For each graph the row says what
the rules find in the file, in what ONNX Runtime makes of it for TensorRT (`handed_on`), and in what it would make of it
with the options of its other sessions (`other_options`, counted by rule). FP16 is checked whole and as the part
without the decode, which is what a TensorRT gets that chooses precisions itself. "By itself" are the files around these
graphs that take pixels and give detections. No GPU and no TensorRT is needed;
on the CPU some Casts of an FP16 graph are missing in `nodes_handed_on` (see `gfldeploy.quant.tensorrt.handed_on`).

With `--provider`, ONNX Runtime's real TensorRT provider says too what it gives to TensorRT's parser, with the options
of the engine: how many nodes are in the first part of the graph, what the rules find in it, and in it with the options
of other sessions. FOLDER is where `pip install --no-deps --target FOLDER onnxruntime-gpu` put it. The libraries of CUDA
and TensorRT are stand-ins, compiled with gcc from tensorrt_stubs.c.

FILE is results/handed_on.json beside this script when all configs run, else none. Exits with 1 if a rule is broken.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from compare import CONFIGS, HERE, ZOO, export, gfldeploy

from gfldeploy import demo
from gfldeploy.bundle import Bundle, GraphName
from gfldeploy.demo.dataset import generate
from gfldeploy.engines.base import installed_version
from gfldeploy.engines.onnx_split import split_decode
from gfldeploy.engines.ort_engine import session_options
from gfldeploy.export.end_to_end import wrap
from gfldeploy.files import scratch_directory, write_json
from gfldeploy.quant.tensorrt import check_tensorrt, handed_on

STUBS = HERE / "tensorrt_stubs.c"
PROVIDERS = [f"libonnxruntime_providers_{name}.so" for name in ("tensorrt", "cuda")]
# Opens a session with the real provider; the stand-in for TensorRT's parser ends the process.
OPEN = """
import ctypes, sys
from pathlib import Path
import onnxruntime
from gfldeploy.engines.ort_engine import session_options
from gfldeploy.engines.ort_tensorrt import tensorrt_options, tensorrt_session_options
from gfldeploy.engines.tensorrt import TensorRtOptions

stubs, model, precision, which = sys.argv[1:]
for one in Path(stubs).glob("lib*"):
    ctypes.CDLL(str(one), ctypes.RTLD_GLOBAL)
of_session = {"handed_on": tensorrt_session_options, "other_options": session_options}[which](onnxruntime, 1)
shapes = TensorRtOptions((1, 320, 320), (1, 320, 320), (1, 320, 320), Path())
of_provider = {**tensorrt_options(precision, shapes, Path()), "trt_dump_subgraphs": "True"}
providers = [("TensorrtExecutionProvider", of_provider)]
onnxruntime.InferenceSession(Path(model).read_bytes(), of_session, providers=providers, enable_fallback=0)
sys.exit("the provider did not ask for a parser")
"""
DEMO = "gfl_demo"
DEFAULT = (DEMO, "gfl_r18vd_1x_coco", "gfl_r50_fpn_1x_coco", "gflv2_r50_fpn_1x_coco")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="directory for images and bundles")
    parser.add_argument("--configs", nargs="+", choices=(DEMO, *ZOO), default=DEFAULT, metavar="NAME")
    parser.add_argument("--samples", type=int, default=2, metavar="N", help="calibration images (default: 2)")
    parser.add_argument("--provider", type=Path, metavar="FOLDER", help="of an unpacked onnxruntime-gpu")
    parser.add_argument("--results", type=Path, help="JSON file to write")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    rows = []
    for name in args.configs:
        for precision, model in graphs(name, args.output, args.samples):
            rows.append({"config": name, "precision": precision, **row(model)})
            if args.provider:
                rows[-1]["provider"] = of_provider(model, precision[:4], args.provider)
            print(line(rows[-1]), flush=True)
    results = args.results or (HERE / "results" / "handed_on.json" if set(args.configs) == set(DEFAULT) else None)
    if results:
        versions = {name: installed_version(name) for name in ("onnxruntime", "onnx")}
        results.parent.mkdir(parents=True, exist_ok=True)
        write_json(results, {"versions": versions, "rows": rows})
    if broken := [f"{one['config']} {one['precision']}" for one in rows if problems(one)]:
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
    around: tuple[tuple[str, Path, GraphName], ...] = (
        ("fp32", fp32, "onnx"),
        ("fp16", fp32, "onnx_fp16"),
        ("int8", int8, "onnx_tensorrt"),
    )
    for precision, bundle, graph in around:
        opened = Bundle.open(bundle)
        model = onnx.load(str(opened.graph(graph)[0]))
        yield precision, model
        whole = onnx.load(str(opened.graph(graph)[0]))
        wrap(whole, opened.manifest)  # what export and quantize write beside it
        yield f"{precision}, by itself", whole
        if precision == "fp16":
            yield "fp16, without the decode", split_decode(model)[0]


def row(model: Any) -> dict[str, Any]:
    """What the rules find in a graph, as it is and as ONNX Runtime hands it on."""
    import onnxruntime

    found = handed_on(model)
    other = handed_on(model, session_options(onnxruntime, 1))
    return {
        "nodes": len(model.graph.node),
        "nodes_handed_on": len(found.graph.node),
        "convolutions": sum(node.op_type == "Conv" for node in found.graph.node),
        "file": check_tensorrt(model),
        "handed_on": check_tensorrt(found),
        "other_options": by_rule(other),
    }


def of_provider(model: Any, precision: str, package: Path) -> dict[str, Any]:
    """What the rules find in what the real TensorRT provider of an unpacked onnxruntime-gpu gives to the parser."""
    import onnx

    with scratch_directory() as folder:
        stubs = build_stubs(folder, package / "onnxruntime" / "capi")
        path = folder / "model.onnx"
        onnx.save(model, str(path))
        found = {}
        for which in ("handed_on", "other_options"):
            command = [sys.executable, "-c", OPEN, str(stubs), str(path), precision, which]
            environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (package, HERE.parent)))}
            subprocess.run(command, cwd=folder, env=environment, check=True)
            (written,) = folder.glob("*TRT_Subgraph*.onnx")
            found[which] = onnx.load(str(written))
            written.unlink()
    (version,) = (one.stem.partition("-")[2] for one in package.glob("onnxruntime_gpu-*.dist-info"))
    return {
        "onnxruntime-gpu": version,
        "nodes": len(found["handed_on"].graph.node),
        "handed_on": check_tensorrt(found["handed_on"]),
        "other_options": by_rule(found["other_options"]),
    }


def build_stubs(folder: Path, libraries: Path) -> Path:
    """Compile stand-ins for what the providers are linked with; returns their folder."""
    stubs = folder / "stubs"
    stubs.mkdir()
    files = [str(libraries / name) for name in PROVIDERS]
    said = {
        tool: subprocess.run([tool, *options, *files], capture_output=True, text=True, check=True).stdout
        for tool, options in (("nm", ["-D", "--undefined-only"]), ("readelf", ["-d"]))
    }
    here = set(re.findall(r"^[a-z][\w *]*?(\w+)\(", STUBS.read_text(encoding="utf-8"), re.MULTILINE))
    names: dict[str, set[str]] = defaultdict(set)
    for name, library in re.findall(r"^ +U (\w+)(?:@+(\S+))?", said["nm"], re.MULTILINE):
        names[library or ("libcuda.so.1" if re.match("cu[A-Z]", name) else "")].add(name)
    for library in sorted(set(re.findall(r"\[(lib(?:cu|nv)[^]]+)\]", said["readelf"]))):
        kind = re.match(r"lib(?:nv)?(\w+)\.", library)[1]  # type: ignore[index]
        part = {"cudart": "CUDA_RUNTIME", "infer": "INFER", "onnxparser": "PARSER"}.get(kind)
        own = sorted(names[library] - (here if part else set()))
        source, versions = folder / f"{library}.c", folder / f"{library}.map"
        source.write_text("".join(f"long {name}(void) {{ return 0; }}\n" for name in own))
        versions.write_text(f"{library} {{ global: *; }};\n")
        options = [f"-D{part}", "-include", str(STUBS)] if part else []
        options += [f"-Wl,--version-script={versions}"] if names[library] and library != "libcuda.so.1" else []
        compile_c(source, stubs / library, [*options, f"-Wl,-soname,{library}"])
    return stubs


def compile_c(source: Path, target: Path, options: Sequence[str]) -> None:
    """Make a shared library with gcc."""
    subprocess.run(["gcc", "-w", "-shared", "-fPIC", *options, "-o", str(target), str(source)], check=True)


def by_rule(model: Any) -> dict[str, int]:
    """How often a graph breaks each rule."""
    return dict(Counter(rule(problem) for problem in check_tensorrt(model)))


def problems(row: dict[str, Any]) -> list[str]:
    """All that the rules find in what TensorRT gets."""
    return [*row["file"], *row["handed_on"], *row.get("provider", {}).get("handed_on", [])]


def rule(problem: str) -> str:
    """A problem without the name of its node, which comes second."""
    kind, _, rest = problem.split(" ", 2)
    return f"{kind}: {rest}"


def line(row: dict[str, Any]) -> str:
    """A row for people."""
    broken = problems(row)
    other = ", ".join(f"{problem} ({count})" for problem, count in row["other_options"].items())
    size = f"{row['nodes']:5} nodes, {row['convolutions']:3} convolutions"
    given = f", {row['provider']['nodes']} nodes given to the parser" if "provider" in row else ""
    return (
        f"{row['config']:24} {row['precision']:26} {size}{given}: "
        f"{broken[0] if broken else 'keeps the rules'}; with other options: {other or 'too'}"
    )


if __name__ == "__main__":
    main()
