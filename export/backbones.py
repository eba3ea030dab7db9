"""Export a GFL with every backbone and neck of PaddleDetection 2.6, and record what exports and how far it is from it.

    python export/backbones.py --output DIR [--steps STEP ...] [--only PAIR ...] [--results FILE] [--again]

A PAIR is BACKBONE+NECK as in the results. The steps, each a command as a user would give it, in a process of its own:

    fixed   gfldeploy export --random-weights 0 --input-shape 320x320; PaddleDetection's forward pass if that fails
    any     the same for any input size
    int8    gfldeploy quantize of the first, with a few made-up pictures

FILE (default: results/backbones.json beside this script) is written after every step, and what it holds already is not
done again; --again forgets it. Prints the table of README.md.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).resolve().parent
SIZE = "320x320"
CHANNELS = 64
SECONDS = 1800
CALIBRATION_IMAGES = 8

# Each backbone at a small size, and the strides of what it returns.
BACKBONES: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "ResNet": ({"depth": 18, "variant": "d", "return_idx": [1, 2, 3]}, (8, 16, 32)),
    "ResNet-50": ({"depth": 50, "variant": "b", "return_idx": [1, 2, 3]}, (8, 16, 32)),
    "ResNet-34-vb": ({"depth": 34, "variant": "b", "return_idx": [1, 2, 3]}, (8, 16, 32)),
    "ResNet-101": ({"depth": 101, "variant": "d", "return_idx": [1, 2, 3]}, (8, 16, 32)),
    "ResNet-152": ({"depth": 152, "variant": "c", "return_idx": [1, 2, 3]}, (8, 16, 32)),
    "ResNeXt": ({"depth": 50, "variant": "a", "groups": 32, "base_width": 4, "return_idx": [1, 2, 3]}, (8, 16, 32)),
    "ResNet-DCN": ({"depth": 50, "variant": "d", "dcn_v2_stages": [1, 2, 3], "return_idx": [1, 2, 3]}, (8, 16, 32)),
    "ResNet-C2": ({"depth": 18, "variant": "d"}, (4, 8, 16, 32)),
    "ResNet-C5": ({"depth": 18, "variant": "d", "return_idx": [3]}, (32,)),
    "Res2Net": ({"depth": 50, "variant": "d", "return_idx": [1, 2, 3]}, (8, 16, 32)),
    "Res2Net-DCN": ({"depth": 50, "variant": "d", "dcn_v2_stages": [3], "return_idx": [1, 2, 3]}, (8, 16, 32)),
    "SENet": (
        {"depth": 50, "variant": "d", "groups": 32, "base_width": 4, "std_senet": True, "return_idx": [1, 2, 3]},
        (8, 16, 32),
    ),
    "DarkNet": ({"depth": 53}, (8, 16, 32)),
    "CSPDarkNet": ({"arch": "X", "depth_mult": 0.33, "width_mult": 0.5}, (8, 16, 32)),
    "CSPDarkNet-P6": (
        {"arch": "P6", "depth_mult": 0.33, "width_mult": 0.5, "return_idx": [2, 3, 4, 5]},
        (8, 16, 32, 64),
    ),
    "CSPResNet": ({"width_mult": 0.5, "depth_mult": 0.33, "use_large_stem": True}, (8, 16, 32)),
    "MobileNet": ({"scale": 1}, (8, 16, 32)),
    "MobileNetV3": ({"model_name": "large", "scale": 0.5, "feature_maps": [7, 13, 16]}, (8, 16, 32)),
    "MobileNetV3-small": ({"model_name": "small", "scale": 1.0, "feature_maps": [4, 9, 12]}, (8, 16, 32)),
    "GhostNet": ({"scale": 1.0}, (8, 16, 32)),
    "ShuffleNetV2": ({"scale": 1.0}, (8, 16, 32)),
    "LCNet": ({"scale": 1.0}, (8, 16, 32)),
    "ESNet": ({"scale": 1.0}, (8, 16, 32)),
    "HRNet": ({"width": 18}, (4, 8, 16, 32)),
    "LiteHRNet": ({"network_type": "wider_naive"}, (4, 8, 16, 32)),
    "LiteHRNet-30": ({"network_type": "lite_30"}, (4, 8, 16, 32)),
    "DLA": ({"depth": 34}, (1, 2, 4, 8, 16, 32)),
    "HarDNet": ({"arch": 85}, (4, 8, 16, 32)),
    "VGG": ({"depth": 16}, (8, 16, 32, 64, 107, 160)),
    "BlazeNet": ({}, (8, 16)),
    "SwinTransformer": (
        {"embed_dim": 48, "depths": [2, 2, 2, 2], "num_heads": [3, 6, 12, 24], "out_indices": [1, 2, 3]},
        (8, 16, 32),
    ),
    "SwinTransformer-ape": (
        {"embed_dim": 48, "depths": [2, 2, 2, 2], "num_heads": [3, 6, 12, 24], "out_indices": [1, 2, 3], "ape": True},
        (8, 16, 32),
    ),
    "VisionTransformer": (
        {"embed_dim": 192, "depth": 4, "num_heads": 3, "qkv_bias": True, "init_values": 0.1, "epsilon": 1e-6,
         "out_indices": [1, 2, 3], "num_fpn_levels": 3},
        (8, 16, 32),
    ),
    "VisionTransformer-abs": (
        {"img_size": [320, 320], "embed_dim": 192, "depth": 4, "num_heads": 3, "qkv_bias": True, "epsilon": 1e-6,
         "use_sincos_pos_emb": False, "use_abs_pos_emb": True, "use_rel_pos_bias": True, "final_norm": True,
         "out_indices": [1, 2, 3], "num_fpn_levels": 3},
        (8, 16, 32),
    ),
    "ConvNeXt": ({"arch": "tiny", "layer_scale_init_value": 1.0}, (8, 16, 32)),
    "TransEncoder": ({}, (32,)),
}  # fmt: skip

# Each neck, and its levels: strides that it adds to the backbone's, or all of its own.
NECKS: dict[str, tuple[dict[str, Any], Any]] = {
    "FPN": ({"out_channel": CHANNELS, "extra_stage": 2, "has_extra_convs": True, "use_c5": False}, "2 more"),
    "FPN-pool": ({"out_channel": CHANNELS, "extra_stage": 1, "norm_type": "gn"}, "1 more"),
    "BiFPN": ({"out_channel": CHANNELS, "num_extra_levels": 0, "norm_type": "gn"}, "same"),
    "BiFPN-5": ({"out_channel": CHANNELS, "num_extra_levels": 2, "fpn_strides": [8, 16, 32, 64, 128]}, "2 more"),
    "HRFPN": ({"out_channel": CHANNELS, "extra_stage": 1}, "1 more"),
    "CSPPAN": ({"out_channels": CHANNELS, "num_features": 4}, "1 more"),
    "CSPPAN-3": ({"out_channels": CHANNELS, "num_features": 3, "use_depthwise": False}, "same"),
    "LCPAN": ({"out_channels": CHANNELS, "num_features": 4}, "1 more"),
    "ESPAN": ({"out_channels": CHANNELS, "num_features": 4}, "1 more"),
    "CustomCSPPAN": (
        {"out_channels": [CHANNELS] * 3, "stage_num": 1, "block_num": 1, "act": "leaky_relu", "spp": True},
        "coarsest first",
    ),
    "CustomCSPPAN-trans": (
        {"out_channels": [CHANNELS] * 3, "stage_num": 1, "block_num": 1, "act": "swish", "use_trans": True,
         "num_layers": 1, "eval_size": [320, 320]},
        "coarsest first",
    ),
    "DilatedEncoder": ({"in_channels": [512], "out_channels": [CHANNELS], "block_mid_channels": 32}, "same"),
    "YOLOCSPPAN": ({}, "same"),
    "YOLOv3FPN": ({}, "coarsest first"),
    "PPYOLOFPN": ({}, "coarsest first"),
    "PPYOLOPAN": ({}, "coarsest first"),
    "PPYOLOTinyFPN": ({}, "coarsest first"),
    "TTFFPN": ({}, [4]),
    "CenterNetDLAFPN": ({}, [4]),
    "CenterNetHarDNetFPN": ({}, [4]),
    "BlazeNeck": ({"in_channel": [96, 96], "neck_type": "fpn_ssh"}, "same"),
}  # fmt: skip

# Channels of the levels, where a neck does not let them be chosen.
OWN_CHANNELS = {"BlazeNeck": 48}

# What else the head may have.
HEADS: dict[str, dict[str, Any]] = {
    "DCN": {"conv_feat": {"use_dcn": True}},
    "GFLv2": {"dgqp_module": {"name": "DGQP", "reg_topk": 4, "reg_channels": 64, "add_mean": True}},
}

PAIRS = (
    *("MobileNetV3+CSPPAN", "LCNet+LCPAN", "VisionTransformer+FPN", "ConvNeXt+CustomCSPPAN", "SENet+FPN"),
    *("CSPDarkNet+FPN", "ResNet+FPN+DCN", "ResNet-DCN+BiFPN", "ResNet+FPN", "ResNet-50+FPN", "SwinTransformer+FPN"),
    *("HRNet+HRFPN", "Res2Net+FPN", "CSPResNet+CustomCSPPAN", "ShuffleNetV2+ESPAN", "GhostNet+CSPPAN", "ESNet+ESPAN"),
    *("MobileNet+FPN", "DarkNet+FPN", "LiteHRNet+HRFPN", "HarDNet+FPN", "DLA+FPN", "VGG+FPN", "BlazeNet+BlazeNeck"),
    *(
        "MobileNet+CSPPAN",
        "HarDNet+CSPPAN-3",
        "DarkNet+CSPPAN",
        "TransEncoder+FPN",
        "ResNet+BiFPN",
        "ResNet+BiFPN-5",
        "ResNet+CSPPAN",
        "ResNet+CSPPAN-3",
        "ResNet+LCPAN",
    ),
    *("ResNet+ESPAN", "ResNet+CustomCSPPAN", "ResNet+CustomCSPPAN-trans", "ResNet-C2+HRFPN", "ResNet-C2+FPN-pool"),
    *("ResNet-C5+DilatedEncoder", "ResNet+YOLOCSPPAN", "ResNet+YOLOv3FPN", "ResNet+PPYOLOFPN", "ResNet+PPYOLOPAN"),
    *("ResNet+PPYOLOTinyFPN", "ResNet-C2+TTFFPN", "DLA+CenterNetDLAFPN", "HarDNet+CenterNetHarDNetFPN"),
    *("ResNet+BlazeNeck", "MobileNetV3-small+ESPAN", "VisionTransformer-abs+FPN", "SwinTransformer-ape+FPN"),
    *("LiteHRNet-30+HRFPN", "CSPDarkNet-P6+BiFPN", "CSPDarkNet+CustomCSPPAN", "SwinTransformer+BiFPN"),
    *("MobileNetV3+FPN", "ConvNeXt+FPN", "HRNet+BiFPN", "Res2Net-DCN+FPN", "LCNet+FPN+GFLv2", "ShuffleNetV2+FPN+DCN"),
    *("ResNeXt+FPN", "ResNet-34-vb+FPN", "ResNet-101+FPN", "ResNet-152+FPN"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="directory for configs and bundles, which are removed again")
    parser.add_argument("--only", nargs="+", metavar="PAIR", default=PAIRS, help="these, in place of all")
    parser.add_argument(
        "--steps", nargs="+", choices=tuple(STEPS), default=tuple(STEPS), metavar="STEP", help="default: all"
    )
    parser.add_argument("--results", type=Path, default=HERE / "results" / "backbones.json", help="JSON file to write")
    parser.add_argument("--again", action="store_true", help="forget what the JSON file holds of these pairs")
    parser.add_argument("--eager", type=Path, metavar="CONFIG", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.eager:
        run_eager(args.eager)
        return
    if args.output is None:
        parser.error("--output is required")
    if unknown := sorted({name for pair in args.only for name in unknown_names(pair)}):
        parser.error(f"unknown: {', '.join(unknown)}")
    args.output.mkdir(parents=True, exist_ok=True)
    rows: dict[str, dict[str, Any]] = json.loads(args.results.read_text("utf-8")) if args.results.is_file() else {}
    for step in (step for step in STEPS if step in args.steps):
        for pair in args.only:
            row = rows.setdefault(pair, {})
            if step in row and not args.again:
                continue
            started = time.perf_counter()
            row[step] = STEPS[step](pair, row, args.output)
            print(f"{time.perf_counter() - started:6.1f} s  {pair} {step}: {row[step]}", file=sys.stderr)
            args.results.parent.mkdir(parents=True, exist_ok=True)
            args.results.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    print(table({pair: rows[pair] for pair in PAIRS if "fixed" in rows.get(pair, {})}))


def unknown_names(pair: str) -> list[str]:
    backbone, neck, *head = pair.split("+") if "+" in pair else (pair, "")
    tables = ((backbone, BACKBONES), (neck, NECKS), *((name, HEADS) for name in head))
    return [name for name, known in tables if name not in known]


def config(pair: str) -> dict[str, Any]:
    """PaddleDetection's config of a pair, complete."""
    backbone, neck, *heads = pair.split("+")
    (settings, strides), (neck_settings, levels) = BACKBONES[backbone], NECKS[neck]
    if levels == "coarsest first":
        strides = strides[::-1]
    elif isinstance(levels, list):
        strides = tuple(levels)
    elif levels != "same":
        strides = (*strides, *(strides[-1] * 2 ** (1 + extra) for extra in range(int(levels.partition(" ")[0]))))
    channels = OWN_CHANNELS.get(neck, CHANNELS)
    feat = {"name": "FCOSFeat", "feat_in": channels, "feat_out": CHANNELS, "num_convs": 1, "norm_type": "gn"}
    head: dict[str, Any] = {"conv_feat": {**feat, "use_dcn": False}, "feat_in_chan": CHANNELS}
    head |= {"fpn_stride": list(strides), "reg_max": 16}
    head["nms"] = {"name": "MultiClassNMS", "nms_top_k": 1000, "keep_top_k": 100, "score_threshold": 0.025}
    head["nms"]["nms_threshold"] = 0.6
    for name in heads:
        for key, value in HEADS[name].items():
            head[key] = {**head.get(key, {}), **value}
    normalize = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225], "is_scale": True}
    steps = [{"Decode": {}}, {"Resize": {"target_size": [320, 320], "keep_ratio": True, "interp": 2}}]
    reader = {
        "sample_transforms": [*steps, {"NormalizeImage": normalize}, {"Permute": {}}],
        "batch_transforms": [{"PadBatch": {"pad_to_stride": max(32, *(stride for stride in strides if stride <= 64))}}],
    }
    names = {key: name.partition("-")[0] for key, name in (("backbone", backbone), ("neck", neck))}
    names["backbone"] = names["backbone"].replace("ResNeXt", "ResNet")
    return {
        "architecture": "GFL",
        "num_classes": 3,
        "metric": "COCO",
        "GFL": {**names, "head": "GFLHead"},
        names["backbone"]: settings,
        names["neck"]: neck_settings,
        "GFLHead": head,
        "TestReader": reader,
    }


def fixed_size(pair: str, row: dict[str, Any], output: Path) -> dict[str, Any]:
    """What became of exporting a pair at one size; `not in ppdet` where PaddleDetection itself cannot run it."""
    found = exported(pair, output, "--input-shape", SIZE)
    if "failed" in found:
        done = run(sys.executable, str(Path(__file__).resolve()), "--eager", str(output / "config.yml"))
        if done.returncode:
            found["not in ppdet"] = last_line(done, output)
    return found


def any_size(pair: str, row: dict[str, Any], output: Path) -> dict[str, Any]:
    """The same for any size."""
    return {"failed": "not tried"} if "failed" in row.get("fixed", ()) else exported(pair, output)


def exported(pair: str, output: Path, *options: str) -> dict[str, Any]:
    """What became of `gfldeploy export` of a pair to output/bundle."""
    file, bundle = output / "config.yml", output / "bundle"
    shutil.rmtree(bundle, ignore_errors=True)
    file.write_text(yaml.safe_dump(config(pair), sort_keys=False), encoding="utf-8")
    command = ("export", "-c", str(file), "--random-weights", "0", "--output", str(bundle), *options)
    done = gfldeploy(*command)
    if done.returncode:
        return {"failed": last_line(done, output), "traceback": "Traceback" in done.stderr}
    return differences(bundle)


def differences(bundle: Path) -> dict[str, Any]:
    """Which engines ran which graph of a bundle, how far they were from ppdet, and what was left out."""
    manifest = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
    parity = json.loads((bundle / "parity.json").read_text(encoding="utf-8"))
    found = parity["comparisons"]
    return {
        "parameters": manifest["parameters"],
        "equal": list(dict.fromkeys(f"{one['graph']} in {one['engine']}" for one in found)),
        "left_out": manifest["left_out"],
        "max_score_difference": max(one["max_score_difference"] for one in found),
        "max_box_difference_px": max(one["max_box_difference_px"] for one in found),
        "tolerance": parity["tolerance"],
        "end_to_end": parity["end_to_end"],
        "operators": operators(bundle / "onnx/model.onnx"),
    }


def operators(onnx_file: Path) -> list[str]:
    """Those of an ONNX file."""
    import onnx

    if not onnx_file.is_file():
        return []
    return sorted({node.op_type for node in onnx.load(str(onnx_file)).graph.node})


def int8(pair: str, row: dict[str, Any], output: Path) -> str:
    """What became of quantising a pair at one size with a few made-up pictures."""
    import numpy as np
    from PIL import Image

    if "failed" in exported(pair, output, "--input-shape", SIZE):
        return "not exported"
    images = output / "images"
    images.mkdir(exist_ok=True)
    for number in range(CALIBRATION_IMAGES):
        coarse = np.random.default_rng(number).integers(0, 256, (12, 12, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((320, 320), Image.Resampling.BICUBIC).save(images / f"{number}.png")
    target = output / "int8"
    done = gfldeploy("quantize", str(output / "bundle"), "--data", str(images), "--output", str(target), "--force")
    if done.returncode:
        return last_line(done, output)
    parity = json.loads((target / "parity.json").read_text(encoding="utf-8"))
    ran = {
        name: "{int8} of {all}".format(int8=one["convolutions"].get("int8", 0), all=sum(one["convolutions"].values()))
        for name, one in parity["engines"].items()
        if one.get("convolutions")
    }
    return "; ".join(f"{name} {share} convolutions" for name, share in ran.items()) or "published"


def gfldeploy(*arguments: str) -> subprocess.CompletedProcess[str]:
    return run(sys.executable, "-m", "gfldeploy", *arguments)


def run(*command: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 1, "", f"took more than {SECONDS} s")


def last_line(done: subprocess.CompletedProcess[str], folder: Path) -> str:
    lines = [line for line in done.stderr.replace(f"{folder}/", "").splitlines() if line.strip()]
    line = lines[-1] if lines else f"exit code {done.returncode}"
    return line.removeprefix("Error: ").removeprefix("config.yml: ")[:400]


def run_eager(file: Path) -> None:
    """PaddleDetection's own model and forward pass, NMS included."""
    import numpy as np
    import paddle
    from ppdet.core.workspace import create, load_config

    paddle.set_device("cpu")
    settings = load_config(str(file))
    image = np.random.default_rng(0).standard_normal((1, 3, 320, 320)).astype(np.float32)
    scale = paddle.ones([1, 2])
    inputs = {"image": paddle.to_tensor(image), "im_shape": scale * 320, "scale_factor": scale}
    try:
        model = create(settings.architecture)
        model.eval()
        with paddle.no_grad():
            model({**inputs, "im_id": paddle.zeros([1, 1])})
    except Exception as error:  # noqa: BLE001 - whatever is wrong with a pair
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        sys.exit(f"{type(error).__name__}: {lines[-1][:200] if lines else ''}")


def table(rows: dict[str, dict[str, Any]]) -> str:
    """As Markdown."""
    columns = ("backbone, neck", "PIR", "program", "ONNX Runtime", "OpenVINO", "by itself")
    lines = [f"| {' | '.join((*columns, 'any size', 'score', 'box, px', 'INT8'))} |", "|" + "---|" * 10]
    notes = []
    for pair, row in rows.items():
        backbone, *rest = pair.split("+")
        name = f"{backbone}, {' '.join(rest)}"
        fixed, free = row["fixed"], row.get("any", {"failed": "not tried"})
        if "failed" in fixed:
            if why := fixed.get("not in ppdet"):
                notes.append(f"- {name}: PaddleDetection itself says `{why}`; export says: {fixed['failed']}")
            else:
                notes.append(f"- {name}: {fixed['failed']}")
            lines.append(f"| {name} | {'not in PaddleDetection' if why else 'no'} | | | | | | | | |")
            continue
        there = [
            "equal" if graph in fixed["equal"] else "left out"
            for graph in ("paddle in paddle", "paddle_program in paddle", "onnx in onnxruntime", "onnx in openvino")
        ]
        there.append(by_itself(fixed))
        every = [fixed, *([] if "failed" in free else [free])]
        far = (f"{max(one[key] for one in every):.1e}" for key in ("max_score_difference", "max_box_difference_px"))
        sizes = free["failed"] if free.get("failed") == "not tried" else "no" if "failed" in free else "yes"
        less = [graph for graph in free.get("left_out", ()) if graph not in fixed["left_out"]]
        if less:
            sizes = f"without {', '.join(less)}"
        lines.append(f"| {name} | {' | '.join((*there, sizes, *far, row.get('int8', 'not tried')))} |")
        if sizes == "no":
            notes.append(f"- {name}, any size: {free['failed']}")
        notes += [f"- {name}, {graph} left out: {why}" for graph, why in fixed["left_out"].items()]
        notes += [f"- {name}, any size, {graph} left out: {free['left_out'][graph]}" for graph in less]
    return "\n".join([*lines, "", *notes])


def by_itself(found: dict[str, Any]) -> str:
    """How many detections of the files that deploy by themselves are those of the graph inside, NMS outside."""
    if "end_to_end" not in found:
        return "not tried"
    inside = [one for one in found["end_to_end"] if not one["reference"].startswith("PaddleDetection")]
    every = sum(one["detections"] for one in inside)
    return f"{every - sum(one['missing'] for one in inside)} of {every}" if inside else "left out"


STEPS = {"fixed": fixed_size, "any": any_size, "int8": int8}


if __name__ == "__main__":
    main()
