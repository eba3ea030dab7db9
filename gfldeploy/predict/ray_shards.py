"""Shards on a Ray cluster: what the driver sends and keeps, and what a worker makes of it."""

from __future__ import annotations

import os
import platform
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from gfldeploy.batching.buckets import Size
from gfldeploy.bundle import Bundle
from gfldeploy.cluster.ray_cluster import ClusterOptions, run_on_ray
from gfldeploy.cluster.schedule import Again, Job
from gfldeploy.cluster.worker import Todo
from gfldeploy.engines.cache import DEFAULT_ENGINE_CACHE
from gfldeploy.errors import DataError
from gfldeploy.predict.resume import WorkingFile, plain_batch
from gfldeploy.predict.shards import ShardJob, Shards, ShardTask, ShardWorker
from gfldeploy.progress import Progress
from gfldeploy.serialization import build, plain
from gfldeploy.storage import Source, source_of

_WORK = f"{__name__}:RayShards"


def shards_on_ray(
    cluster: ClusterOptions,
    job: ShardJob,
    bundle: Bundle,
    inputs: Sequence[Source],
    sizes: Mapping[Source, Size | None],
    shards: Shards,
    mine: Iterable[int],
    working: WorkingFile,
    images: int,
    progress: Progress,
) -> Generator[None]:
    """Have shards detected and write what comes into the working file; something was written at every yield.

    `sizes`: (h, w) of image files whose headers were read. `mine`: the numbers of those to do, which have not ended.
    `images`: about how many there are to do. Closing it ends the workers. Raises as `run_on_ray`.
    """
    of_home = job.options.get("cache_dir") == str(DEFAULT_ENGINE_CACHE)
    setting = {"job": plain(job), "own_cache": of_home, "folder": str(Path.cwd())}

    def task(number: int) -> dict[str, Any]:
        shard = shards[number]
        mine = inputs[shard.start : shard.stop]
        size = None
        if isinstance(first := mine[0], Path):
            with suppress(OSError):
                size = first.stat().st_size
        return {"inputs": list(map(str, mine)), "bytes": size, "sizes": [sizes.get(one) for one in mine]}

    jobs = (
        Job(one.number, one.stop - one.start, working.batches(one.number), working.bad(one.number))
        for one in map(shards.__getitem__, mine)
    )
    parts = run_on_ray(
        cluster, _WORK, setting, jobs, task, bundle=bundle, engine=job.engine, images=images, progress=progress
    )
    with closing(parts):
        for part in parts:
            if isinstance(part, Again):
                working.again(part.job, part.bad)
            else:
                if part.values:
                    working.add(part.job, part.values)
                if part.end:
                    working.end(part.job, part.processor)
            yield


class RayShards:
    """What a worker makes of the tasks; see `cluster.worker.Work`."""

    def __init__(self, setting: Mapping[str, Any], bundle: Path) -> None:
        job = build(ShardJob, setting["job"])
        if setting["own_cache"]:
            job = replace(job, options={**job.options, "cache_dir": str(DEFAULT_ENGINE_CACHE)})
        with suppress(OSError):  # names of inputs may be relative
            os.chdir(setting["folder"])
        self._worker = ShardWorker(replace(job, bundle=str(bundle)))

    def run(self, tasks: Iterable[Todo]) -> Generator[tuple[int, list[Any]]]:
        sizes: dict[Source, Size | None] = {}
        with closing(self._worker.detect_shards(_shard_tasks(tasks, sizes), sizes)) as found:
            for number, batch in found:
                yield number, plain_batch(batch)

    def close(self) -> None:
        self._worker.close()


def _shard_tasks(tasks: Iterable[Todo], sizes: dict[Source, Size | None]) -> Iterator[ShardTask]:
    """The shards of the tasks; `sizes` then has those that the driver knows of the images of the last one."""
    for todo in tasks:
        inputs = list(map(source_of, todo.task["inputs"]))
        sizes.clear()
        sizes.update((one, tuple(size)) for one, size in zip(inputs, todo.task["sizes"], strict=True) if size)
        if todo.task["bytes"] is not None and isinstance(first := inputs[0], Path):
            _check_here(first, todo.task["bytes"])
        yield ShardTask(todo.number, inputs, todo.skip, todo.bad)


def _check_here(path: Path, size: int) -> None:
    """Raise `DataError` unless the file, which the driver can read, is here too."""
    try:
        found = path.stat().st_size
    except OSError as error:
        raise DataError(
            f"a worker on {platform.node()} cannot read {path}, which is on the machine of the command",
            "Put the inputs on storage that every machine mounts at the same path, or give s3:// addresses.",
        ) from error
    if found != size:
        raise DataError(
            f"{path} has {found} bytes on {platform.node()}, and {size} on the machine of the command",
            "Copy the same inputs to every machine, or put them on storage that every machine mounts.",
        )
