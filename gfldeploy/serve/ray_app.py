"""`gfldeploy serve --ray`: the application as a deployment of Ray Serve, from its start to its end."""

from __future__ import annotations

import hashlib
import json
import logging
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

from gfldeploy.bundle import Bundle
from gfldeploy.cluster.ray_cluster import LOCAL, connected
from gfldeploy.cluster.worker import bundle_files, versions
from gfldeploy.detection_options import AS_CONFIGURED
from gfldeploy.engines.hardware import usable_threads
from gfldeploy.engines.registry import ENGINES
from gfldeploy.errors import (
    BundleError,
    GfldeployError,
    OutputError,
    ServerError,
    UsageError,
    summary,
)
from gfldeploy.predict.engine_selection import DEPLOY_SUFFIXES
from gfldeploy.predict.pipeline import PREPARED
from gfldeploy.progress import SILENT, Progress
from gfldeploy.serialization import plain
from gfldeploy.serve.keys import Keys
from gfldeploy.serve.loaded import images_by_size
from gfldeploy.serve.process import Listen, bound
from gfldeploy.serve.ray_proxy import proxy_environment
from gfldeploy.serve.ray_replica import DEPLOYMENT, DetectorReplica, ReplicaJob, error_in
from gfldeploy.tune.deploy_file import Deploy

APPLICATION = "gfldeploy"
_LOOK_S = 0.25
_NO_ROOM_S = 30.0  # after so many the user is told that Ray has no room for a replica
_STARTS = 3  # of a replica that fails, until the deployment has failed
_HEALTH_S, _HEALTH_TIMEOUT_S = 10.0, 60.0
_UPSCALE_S, _DOWNSCALE_S = 5.0, 120.0
_DELETE = "Delete the application that answers at / with `serve.delete`, or use another cluster."
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass(frozen=True)
class RayServing:
    """Where and how often to serve.

    `address`: of a cluster, or "local" for one of this machine's that ends with the command. `least`, `most`: replicas;
    Ray Serve chooses between them by the requests that wait and run.
    """

    address: str
    least: int
    most: int
    listen: Listen


@dataclass(frozen=True)
class _State:
    """What Ray Serve says of the application. `running`: replicas. `message`: why it is not well."""

    status: str
    running: int
    message: str


def serve_on_ray(
    source: Path,
    job: ReplicaJob,
    serving: RayServing,
    warm_up: Path | None = None,
    keys: Keys | None = None,
    progress: Progress = SILENT,
) -> None:
    """Deploy, wait until it is ready, and keep it until a signal comes; then let it answer what it has, and delete it.

    `job`: what is to be served, without what only `source` and the keys say. SIGHUP reads them again, and has the
    replicas replaced one after the other. `warm_up`: a folder of images such as those to come.

    Raises as `serve_detector`, and `ServerError` where Ray does not do what it should.
    """

    def read() -> ReplicaJob:
        return read_source(source, job, warm_up, keys)

    target = read()
    if serving.address == LOCAL:
        with bound(serving.listen) as sock:  # so that a port in use is one line
            serving = replace(serving, listen=replace(serving.listen, port=sock.getsockname()[1]))
    elif not serving.listen.port:
        raise UsageError("--port 0 is for --ray local: on a cluster every proxy listens on one port", "Give a --port.")
    with ExitStack() as stack:
        # Ray counts CPUs by what replicas say that they take. One more than there may be has room during a reload.
        shared = on_cpus(target, [usable_threads()], serving.most)
        cpus = (serving.most + 1) * (shared.threads or 1) * (shared.streams or 1)
        stack.enter_context(connected(serving.address, cpus=cpus))
        signals = stack.enter_context(_signals())
        _Application(read, serving, progress, signals).run(target)


def read_source(source: Path, job: ReplicaJob, warm_up: Path | None = None, keys: Keys | None = None) -> ReplicaJob:
    """The job with what the bundle or `deploy.yml` and the keys say, which are read here and sent to the replicas."""
    directory, detection = source, job.detection
    if source.suffix in DEPLOY_SUFFIXES and not source.is_dir():
        deploy = Deploy.read(source)
        directory, cell = deploy.bundle_path(source), deploy.choice.cell
        detection = detection.over(deploy.detection or AS_CONFIGURED)
        job = replace(job, deploy=json.dumps(deploy.to_dict()), device=job.device or cell.device)
        if (job.threads, job.streams) == (None, None):
            job = replace(job, threads=cell.threads, streams=cell.streams)
    elif not source.is_dir():
        problem = f"{source} is neither a bundle nor a deploy file" if source.exists() else f"there is no {source}"
        raise BundleError(problem, "Give what `gfldeploy export` or `gfldeploy tune` wrote.")
    bundle = Bundle.open(directory)
    bundle.verify_files()
    bundle.manifest.turned(detection)  # here it is said in one line
    sizes = (
        () if warm_up is None else tuple(images_by_size(warm_up, bundle.at_size(job.input_size).manifest.preprocess))
    )
    return replace(
        job,
        bundle=str(directory.resolve()),
        digest=bundle.digest,
        sizes=sizes,
        keys=None if keys is None else keys.read_again().digests,
        versions=_versions(job.engine),
    )


def _versions(engine: str | None) -> dict[str, str]:
    """What has to be the same everywhere, or replicas would find different things; without engine, what all need."""
    if engine is not None:
        return versions(engine)
    each = [versions(one).items() for one in ENGINES]
    return dict(set[tuple[str, str]].intersection(*map(set, each)))


def on_cpus(job: ReplicaJob, machines: list[int], replicas: int) -> ReplicaJob:
    """The job with threads and streams, so that as many replicas have room on machines of so many CPUs.

    Streams of one thread suit throughput (`throughput_options`); a GPU is one stream's.
    """
    if job.device == "gpu":
        return replace(job, threads=job.threads or 1, streams=1)
    if (job.threads, job.streams) != (None, None):
        return replace(job, threads=job.threads or 1, streams=job.streams or 1)
    most = max(machines, default=1)
    share = next((one for one in range(most, 1, -1) if sum(cpus // one for cpus in machines) >= replicas), 1)
    return replace(job, threads=1, streams=share)


def deployment_options(job: ReplicaJob, serving: RayServing, surge: bool) -> dict[str, Any]:
    """The options of the deployment in Ray Serve's words. `surge`: there is room for a replica more during an update.

    A replica takes all that its own queue admits, and what runs: it knows times and deadlines, Ray Serve does not. What
    comes beyond that waits in the proxies, as many again, and gets 429 beyond.
    """
    assert job.threads and job.streams
    at_once = (job.streams + PREPARED[job.device or "cpu"]) * (job.batch_size or 1)
    options: dict[str, Any] = {
        "name": DEPLOYMENT,
        "max_ongoing_requests": job.settings.most_waiting + at_once,
        "max_queued_requests": job.settings.most_waiting,
        "backpressure_config": {"status_code": 429, "retry_after_s": 1},
        "ray_actor_options": {
            "num_cpus": job.threads * job.streams,
            "num_gpus": 1 if job.device == "gpu" else 0,
        },
        "health_check_period_s": _HEALTH_S,
        "health_check_timeout_s": _HEALTH_TIMEOUT_S,
        "graceful_shutdown_timeout_s": max(serving.listen.drain_s, 0.1),
        "graceful_shutdown_wait_loop_s": 0.2,
        "max_constructor_retry_count": _STARTS,
        "max_surge_percent": 1 if surge else 0,  # rounded up: one replica at a time
    }
    if serving.least == serving.most:
        options["num_replicas"] = serving.most
    else:
        options["autoscaling_config"] = {
            "min_replicas": serving.least,
            "max_replicas": serving.most,
            # What runs, and as many requests again, which wait meanwhile: more than that is a queue.
            "target_ongoing_requests": 2 * job.streams * (job.batch_size or 1),
            "upscale_delay_s": _UPSCALE_S,
            "downscale_delay_s": _DOWNSCALE_S,
        }
    return options


@contextmanager
def _signals() -> Iterator[list[int]]:
    """The signals that came since; their own handlers are put back. Ray sets its own when it is connected to."""
    came: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        came.append(number)

    handlers = {number: signal.signal(number, note) for number in _SIGNALS}
    try:
        yield came
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


class _Stop(Exception):  # noqa: N818
    """A signal came that ends the command."""


class _Application:
    """The application on the cluster, as this command deploys, watches and deletes it."""

    def __init__(
        self, read: Callable[[], ReplicaJob], serving: RayServing, progress: Progress, signals: list[int]
    ) -> None:
        """`read`: what there is to serve now."""
        self._read, self._serving, self._progress, self._signals = read, serving, progress, signals
        self._asked = False  # Ray Serve for the application
        self._sent: dict[str, Any] = {}  # in Ray's object store: what serves, and what is to, by digest

    def run(self, target: ReplicaJob) -> None:
        """Until a signal comes."""
        target = self._with_cpus(target)
        own = self._start(target)
        try:
            self._deploy(target)
            listen = self._serving.listen
            where = f"[{listen.host}]" if ":" in listen.host else listen.host
            self._progress.stage(f"ready on http://{where}:{listen.port}")
            self._watch(target)
        except _Stop:
            pass
        finally:
            self._end(own)

    def _with_cpus(self, target: ReplicaJob) -> ReplicaJob:
        import ray

        if self._serving.address == LOCAL:
            return on_cpus(target, [usable_threads()], self._serving.most)
        machines = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
        return on_cpus(target, machines, self._serving.most)

    def _files(self, target: ReplicaJob) -> Any:
        """The bundle in Ray's object store: its path may hold another one when a replica is started again."""
        import ray

        if target.digest not in self._sent:
            self._sent[target.digest] = ray.put(bundle_files(Bundle.open(target.bundle)))
        return self._sent[target.digest]

    def _start(self, target: ReplicaJob) -> bool:
        """Start Ray Serve, and say whether it was not there."""
        from ray import serve

        logging.getLogger("ray.serve").setLevel(logging.CRITICAL)  # of this process: what happens is told below
        if self._state() is not None:
            raise ServerError(
                f"an application {APPLICATION} runs on this cluster already",
                "SIGHUP to the command that deployed it has it load another bundle; if that command was killed, run "
                "`serve shutdown` on the cluster.",
            )
        running = serve.status()
        own = not (running.proxies or running.applications)
        if not own:
            self._progress.note(
                "Ray Serve runs on this cluster already: its proxies keep their address and their limits on bodies"
            )
        listen = self._serving.listen
        try:
            serve.start(
                proxy_location="EveryNode",
                http_options={"host": listen.host, "port": listen.port},
                controller_options={"runtime_env": {"env_vars": proxy_environment(target.limits)}},
                logging_config={"enable_access_log": False, "log_level": "WARNING"},
            )
        except Exception as error:
            if own:
                serve.shutdown()
            if "bind" not in str(error):
                raise ServerError(f"Ray Serve does not start: {summary(error)}", "Try again.") from error
            raise OutputError(
                f"the proxies of Ray Serve cannot listen on {listen.host}:{listen.port}: {summary(error)}",
                "Choose another --port or --host.",
            ) from error
        return own

    def _deploy(self, target: ReplicaJob, surge: bool = False) -> None:
        """Have this job replace what runs, and wait for the end. Raises what the replicas raise, and `_Stop`."""
        from ray import serve

        old = self._state()
        options = deployment_options(target, self._serving, surge)
        job = plain(target)
        deployment = serve.deployment(**options)(serve.ingress()(DetectorReplica))
        # By default every deployment is another version, whose replicas replace all: after a failed reload those that
        # answer, too.
        with suppress(TypeError, ValueError):  # of a Ray Serve that does not take it
            version = hashlib.sha256(json.dumps(job, sort_keys=True).encode()).hexdigest()
            deployment = deployment.options(version=version, _internal=True)
        application = deployment.bind(job, self._files(target))
        try:
            serve.run_many(
                [serve.RunTarget(application, name=APPLICATION, route_prefix="/")],
                wait_for_ingress_deployment_creation=False,
                wait_for_applications_running=False,
            )
            self._asked = True
        except Exception as error:
            raise ServerError(f"Ray Serve does not take the application: {summary(error)}", _DELETE) from error
        began, shown, told = time.monotonic(), "", False
        while True:
            self._pause()
            state = self._state()
            if state is None:
                continue
            if state.status == "RUNNING":
                return
            failed = error_in(state.message) is not None and (old is None or state.message != old.message)
            if failed or state.status in ("DEPLOY_FAILED", "UNHEALTHY"):
                raise error_in(state.message) or ServerError(
                    f"Ray Serve cannot start a replica: {_last_line(state.message)}", "Look into the logs of Ray Serve."
                )
            now = f"{state.running} of {self._serving.least} replicas run"
            if now != shown:
                self._progress.stage(f"deploying: {now}")
                shown = now
            if not told and time.monotonic() - began > _NO_ROOM_S and "resource" in state.message:
                self._progress.note(f"Ray has no room for a replica yet: {_last_line(state.message)}")
                told = True

    def _watch(self, target: ReplicaJob) -> None:
        """Tell of what changes, until a signal comes, or somebody else deploys."""
        running = self._serving.least
        while True:
            self._pause()
            if signal.SIGHUP in self._signals:
                self._signals.remove(signal.SIGHUP)
                target = self._reload(target)
                self._sent = {target.digest: self._sent[target.digest]}
                continue
            state = self._state()
            if state is None or state.status == "DELETING":
                raise ServerError("somebody has deleted the application", "Deploy it again.")
            if state.running != running:
                self._progress.stage(
                    f"{state.running} replica{'s' * (state.running != 1)} run, before it were {running}"
                )
                running = state.running

    def _reload(self, target: ReplicaJob) -> ReplicaJob:
        """What runs afterwards: what `source` holds now, or what ran before, where that does not come up."""
        import ray

        self._progress.stage("reload: replacing the replicas one after the other")
        deployed = False
        try:
            changed = self._with_cpus(self._read())
            cpus = (changed.threads or 1) * (changed.streams or 1)
            deployed = True
            self._deploy(changed, surge=ray.available_resources().get("CPU", 0) >= cpus)
        except GfldeployError as error:
            self._progress.note(f"reload failed, what served before goes on: {error}")
            if deployed:
                self._deploy(target)
            return target
        self._progress.stage(f"reload: {Path(changed.bundle).name} ({changed.digest[:12]}) answers")
        return changed

    def _end(self, own: bool) -> None:
        """Delete the application once its replicas have answered what they have; and Ray Serve, if it is our own."""
        from ray import serve

        if not self._asked:
            return
        self._progress.stage("stopping: replicas answer what they have")
        self._signals.clear()
        serve.delete(APPLICATION, _blocking=False)
        until = time.monotonic() + self._serving.listen.drain_s + 10
        while self._state() is not None and time.monotonic() < until:
            time.sleep(_LOOK_S)
            if self._signals:
                raise KeyboardInterrupt
        if own and self._serving.address != LOCAL and not serve.status().applications:
            serve.shutdown()

    def _pause(self) -> None:
        if any(number != signal.SIGHUP for number in self._signals):
            raise _Stop
        time.sleep(_LOOK_S)

    def _state(self) -> _State | None:
        from ray import serve

        try:
            found = serve.status().applications.get(APPLICATION)
        except Exception as error:
            raise ServerError(f"Ray Serve does not answer: {summary(error)}", "Look after the cluster.") from error
        if found is None:
            return None
        deployment = found.deployments.get(DEPLOYMENT)
        running = (
            0
            if deployment is None
            else sum(
                count
                for state, count in deployment.replica_states.items()
                if getattr(state, "value", state) == "RUNNING"
            )
        )
        message = "\n".join(filter(None, (found.message, deployment and deployment.message)))
        return _State(found.status.value, running, message)


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:200] if lines else "it does not say why"
