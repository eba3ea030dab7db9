"""Images from an object store beside images from the disk: reading alone, and `gfldeploy predict`.

    python benchmarks/object_store.py --bundle demo/int8 --images demo/data/val/images --machine epyc-2core --name demo

Serves the images over S3 on loopback, by moto in a process of its own, which needs about as much of the CPU as reading
does; and once more behind a proxy that holds every request for 30 ms, as a store in another place does. Interleaved,
`--rounds` times: images/s of several readers at once, which fetch whole files; and of `predict` from the start of the
process to its end, from the disk and from both stores. Fails if results differ in anything but names. Prints medians,
with the least and the most; writes all rounds to results/MACHINE/checks/NAME_object_store.json beside this script.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from gfldeploy.at_once import at_once
from gfldeploy.files import write_json
from gfldeploy.images.coco import list_images
from gfldeploy.images.decode import read_file
from gfldeploy.machine import describe_machine
from gfldeploy.predict.sources import read_list
from gfldeploy.serialization import plain

HERE = Path(__file__).resolve().parent
BUCKET = "images"
KEYS = {"AWS_ACCESS_KEY_ID": "none", "AWS_SECRET_ACCESS_KEY": "none", "AWS_DEFAULT_REGION": "us-east-1"}
READERS = (1, 4, 16, 32)
DELAY_S = 0.03


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--images", type=Path, required=True, help="a folder")
    parser.add_argument("--limit", type=int, default=200, metavar="I", help="the first so many (default: 200)")
    parser.add_argument("--name", required=True, help="of the results file")
    parser.add_argument("--machine", required=True, help="folder of results/ for this machine, such as epyc-2core")
    parser.add_argument("--rounds", type=int, default=3, metavar="R")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        asyncio.run(serve())
        return
    os.environ.update(KEYS)
    command = [sys.executable, __file__, "--serve", "--bundle", ".", "--images", ".", "--name", "-", "--machine", "-"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        ports = dict(zip(("store", "far store"), server.stdout.readline().split(), strict=True))
        with tempfile.TemporaryDirectory() as scratch:
            paths = list_images(args.images)[: args.limit]
            upload(paths, ports["store"])
            rounds = measure(args.bundle.resolve(), paths, ports, args.rounds, Path(scratch))
        server.communicate("")
    record = {"machine": plain(describe_machine()), "images": len(paths), "delay_s": DELAY_S, "images_per_s": rounds}
    output = HERE / "results" / args.machine / "checks" / f"{args.name}_object_store.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    write_json(output, record)
    for what, values in rounds.items():
        print(f"| {what} | {statistics.median(values):.3g} ({min(values):.3g} to {max(values):.3g}) |")


async def serve() -> None:
    """Both stores, until the standard input ends; their ports go to the standard output."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    store = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    store.start()
    host, port = store.get_host_and_port()

    async def pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, delay_s: float) -> None:
        while block := await reader.read(1 << 16):
            await asyncio.sleep(delay_s)
            writer.write(block)
        writer.close()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        upstream, downstream = await asyncio.open_connection(host, port)
        await asyncio.gather(pass_on(reader, downstream, DELAY_S), pass_on(upstream, writer, 0), return_exceptions=True)

    async with await asyncio.start_server(connected, "127.0.0.1", 0) as far:
        print(port, far.sockets[0].getsockname()[1], flush=True)
        await asyncio.to_thread(sys.stdin.read)
        far.close()
    os._exit(0)


def upload(paths: list[Path], port: str) -> None:
    import boto3

    client = boto3.client("s3", endpoint_url=f"http://127.0.0.1:{port}")
    client.create_bucket(Bucket=BUCKET)
    for path in paths:
        client.upload_file(str(path), BUCKET, path.name)


def measure(
    bundle: Path, paths: list[Path], ports: dict[str, str], rounds: int, scratch: Path
) -> dict[str, list[float]]:
    """Images/s of every round."""
    found: dict[str, list[float]] = {}
    for _ in range(rounds):
        for where, port in {"disk": "", **ports}.items():
            names = [f"s3://{BUCKET}/{path.name}" if port else str(path) for path in paths]
            listed, output = scratch / f"{where}.txt", scratch / where
            listed.write_text("\n".join(names))
            for readers, seconds in zip(READERS, child(port, "--read", listed), strict=True):
                found.setdefault(f"reading, {where}, {readers} at once", []).append(len(paths) / seconds)
            (seconds,) = child(port, "--predict", bundle, listed, output)
            found.setdefault(f"predict, {where}", []).append(len(paths) / seconds)
            results = (output / "detections.jsonl").read_text().replace(f"s3://{BUCKET}/", f"{paths[0].parent}/")
            assert results == (scratch / "disk" / "detections.jsonl").read_text(), "results differ"
    return found


def child(port: str, *arguments: object) -> list[float]:
    """The numbers that a process of its own says, which knows one store."""
    store = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}"} if port else {}
    command = [sys.executable, __file__, *map(str, arguments)]
    done = subprocess.run(command, env={**os.environ, **store}, stdout=subprocess.PIPE, text=True, check=True)
    return list(map(float, done.stdout.split()))


def read(names: Path) -> None:
    """Say the seconds of reading all, by each number of readers, after once that does not count."""
    sources = read_list(names)
    for place, readers in enumerate((max(READERS), *READERS)):
        start = time.perf_counter()
        for _ in at_once(read_file, sources, readers):
            pass
        if place > 0:
            print(time.perf_counter() - start)


def predict(bundle: str, names: str, output: str) -> None:
    """Say the seconds of a process, from its start to its end."""
    start = time.perf_counter()
    command = [sys.executable, "-m", "gfldeploy", "predict", bundle, "--input-list", names, "--output", output]
    subprocess.run([*command, "--force"], check=True, capture_output=True)
    print(time.perf_counter() - start)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--read"]:
        read(Path(sys.argv[2]))
    elif sys.argv[1:2] == ["--predict"]:
        predict(*sys.argv[2:])
    else:
        main()
