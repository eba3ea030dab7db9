"""The picture of docs/guides/batch-size.md: mixed orientations and throughput, from what batch_padding.py wrote.

    python benchmarks/plot_padding.py --machine epyc-2core

Writes batch-size.png beside that page: images a second of the network by batch size, as a share of batch 1, for the
files results/MACHINE/checks/*_padding.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import matplotlib

HERE = Path(__file__).resolve().parent
TITLES = {"gfl_r50_int8": "GFL-R50, INT8", "gfl_r50_fp32": "GFL-R50, FP32", "demo_fp32": "demo detector, FP32"}
COLOURS = {"listed": "tab:red", "bucketed": "tab:blue"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--machine", required=True, help="folder of results/, such as epyc-2core")
    args = parser.parse_args()
    found = {name: HERE / "results" / args.machine / "checks" / f"{name}_padding.json" for name in TITLES}
    draw({TITLES[name]: json.loads(path.read_text()) for name, path in found.items() if path.exists()})


def draw(records: dict[str, dict[str, Any]]) -> None:
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(records), figsize=(3.2 * len(records), 3), sharey=True, squeeze=False)
    for axis, (title, record) in zip(axes[0], records.items(), strict=True):
        for order, colour in COLOURS.items():
            speed = relative(record, order)
            axis.plot([str(size) for size in speed], list(speed.values()), "o-", color=colour, label=order)
        axis.axhline(1, color="grey", linewidth=0.8, linestyle=":")
        axis.set(title=title, xlabel="batch size", ylim=(0, 1.25))
    axes[0, 0].set_ylabel("images/s, batch 1 = 1")
    axes[0, 0].legend(loc="lower left", fontsize=8)
    figure.tight_layout()
    figure.savefig(HERE.parent / "docs" / "guides" / "batch-size.png", dpi=120)


def relative(record: dict[str, Any], order: str) -> dict[int, float]:
    """Images a second of the network by batch size, by those of batch 1: the median of the rounds."""
    milliseconds = {
        (leg["batch_size"], leg["way"]): [one["inference_ms"] for one in leg["rounds"]] for leg in record["legs"]
    }
    single = milliseconds[1, "listed"]
    return {1: 1.0} | {
        size: statistics.median(one / many for one, many in zip(single, rounds, strict=True))
        for (size, other), rounds in milliseconds.items()
        if other == order and size > 1
    }


if __name__ == "__main__":
    main()
