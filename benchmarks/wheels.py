"""Whether what gfldeploy needs to run can be installed on other systems without a compiler, by what the index lists.

    python benchmarks/wheels.py --machine epyc-2core

Asks uv to resolve the runtime dependencies of pyproject.toml, alone and with the extra of each engine, for Linux on
ARM64, macOS on ARM64 and Windows on x86-64, and each Python: wheels only, markers as they are there. Nothing is
installed, and nothing runs there. uv asks the package index that it is configured for. Prints a table, and writes
results/MACHINE/checks/wheels.json beside this script. The exit code is 1 if the runtime, or it with ONNX Runtime, lacks
a wheel.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
PROJECT = HERE.parent / "pyproject.toml"
SYSTEMS = {  # by uv's names, the one that most machines meet first; that of Linux says which glibc it has
    "Linux ARM64": ("aarch64-manylinux_2_28", "aarch64-manylinux_2_36"),
    "macOS ARM64": ("aarch64-apple-darwin",),
    "Windows x86-64": ("x86_64-pc-windows-msvc",),
}
PYTHONS = ("3.11", "3.12", "3.13")
EXTRAS = (None, "onnxruntime", "openvino", "paddle")
NEEDED = (None, "onnxruntime")
ADDRESS = re.compile(r"\b(?:https?|file)://\S+")


def resolve(uv: str, requirements: list[str], platform: str, python: str, folder: Path) -> dict[str, Any]:
    """The wheels that would be installed, or why some are lacking."""
    given, locked = folder / "requirements.in", folder / "pylock.toml"
    given.write_text("\n".join(requirements) + "\n", encoding="utf-8")
    locked.unlink(missing_ok=True)
    command = [uv, "pip", "compile", "--quiet", "--no-config", "--no-header", "--only-binary", ":all:"]
    command += ["--python-platform", platform, "--python-version", python, "--format", "pylock.toml"]
    done = subprocess.run(
        [*command, "--output-file", str(locked), str(given)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        return {"lacks": " ".join(ADDRESS.sub("", done.stderr).split())}
    packages = tomllib.loads(locked.read_text(encoding="utf-8"))["packages"]
    wheels = {one["name"]: [wheel["url"].rpartition("/")[2] for wheel in one.get("wheels", ())] for one in packages}
    if without := [name for name, files in wheels.items() if not files]:
        return {"lacks": f"no wheel of {', '.join(without)}"}
    return {"wheels": sorted(files[0] for files in wheels.values())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--machine", required=True, help="folder under results/")
    parser.add_argument("--uv", default=shutil.which("uv") or str(HERE.parent / ".uv" / "bin" / "uv"), help="uv itself")
    arguments = parser.parse_args()
    project = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]
    version = subprocess.run([arguments.uv, "--version"], capture_output=True, text=True, check=True).stdout.split()[1]
    found: list[dict[str, Any]] = []
    lacking = False
    with tempfile.TemporaryDirectory() as folder:
        for extra in EXTRAS:
            more = project["optional-dependencies"][extra] if extra else []
            for system in SYSTEMS:
                for python in PYTHONS:
                    for platform in SYSTEMS[system]:
                        answer = resolve(
                            arguments.uv, [*project["dependencies"], *more], platform, python, Path(folder)
                        )
                        if "wheels" in answer:
                            break
                    found.append({"extra": extra, "system": system, "platform": platform, "python": python, **answer})
                    lacking |= extra in NEEDED and "lacks" in answer
                    told = f"{len(answer['wheels'])} wheels" if "wheels" in answer else answer["lacks"]
                    print(f"{extra or 'runtime':12} {system:15} {platform:23} {python}  {told}", flush=True)
    result = {
        "date": datetime.now(UTC).date().isoformat(),
        "uv": version,
        "dependencies": project["dependencies"],
        "extras": {extra: project["optional-dependencies"][extra] for extra in EXTRAS if extra},
        "found": found,
    }
    target = HERE / "results" / arguments.machine / "checks" / "wheels.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    sys.exit(1 if lacking else 0)


if __name__ == "__main__":
    main()
