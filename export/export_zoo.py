"""Export every GFL of PaddleDetection's model zoo with random weights and record how far each graph is from ppdet.

    python export/export_zoo.py --output DIR [--configs NAME ...] [--results FILE]

Every export runs as a user would run it, in a process of its own. DIR receives the bundles, or has them from an earlier
run; FILE the table as JSON (default: results/zoo.json beside this script when all configs ran). Checkpoints of the zoo
give the same graphs.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
CONFIGS = HERE.parent / "configs" / "gfl"
ZOO = (
    "gfl_r50_fpn_1x_coco",
    "gfl_r101vd_fpn_mstrain_2x_coco",
    "gfl_r34vd_1x_coco",
    "gfl_r18vd_1x_coco",
    "gflv2_r50_fpn_1x_coco",
    "gfl_slim_ld_r18vd_1x_coco",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="directory for the bundles")
    parser.add_argument("--configs", nargs="+", choices=ZOO, default=ZOO, metavar="NAME")
    parser.add_argument("--results", type=Path, help="JSON file to write")
    args = parser.parse_args()
    rows = [export(name, args.output / name) for name in args.configs]
    for row in rows:
        print(
            f"{row['config']:32} {row['parameters'] / 1e6:5.1f} M  "
            f"score {row['max_score_difference']:.2g}  box {row['max_box_difference_px']:.2g} px  "
            f"{'; '.join(map(by_itself, row['end_to_end']))}"
        )
    results = args.results or (HERE / "results" / "zoo.json" if set(args.configs) == set(ZOO) else None)
    if results:
        results.parent.mkdir(parents=True, exist_ok=True)
        results.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


def export(name: str, output: Path) -> dict[str, Any]:
    """Export one config; the largest differences over all graphs, engines and shapes, and all of them."""
    if not output.exists():
        command = [sys.executable, "-m", "gfldeploy", "export", "--config", str(CONFIGS / f"{name}.yml")]
        subprocess.run([*command, "--random-weights", "0", "--output", str(output)], check=True)
    parity = json.loads((output / "parity.json").read_text(encoding="utf-8"))
    manifest = json.loads((output / "manifest.json").read_text(encoding="utf-8"))
    return {
        "config": name,
        "parameters": manifest["parameters"],
        "max_score_difference": max(found["max_score_difference"] for found in parity["comparisons"]),
        "max_box_difference_px": max(found["max_box_difference_px"] for found in parity["comparisons"]),
        "comparisons": parity["comparisons"],
        "end_to_end": parity["end_to_end"],
        "left_out": manifest["left_out"],
    }


def by_itself(found: dict[str, Any]) -> str:
    """How the detections of a file that deploys by itself compare with others, for people."""
    share = f"{found['detections'] - found['missing']} of {found['detections']}"
    return f"{found['graph']} in {found['engine']}, batch {found['batch']}, {found['reference']}: {share}"


if __name__ == "__main__":
    main()
