"""Joins the use cases to Ray: the only file that imports inside functions, so that a command which needs
neither torch nor Ray pays for neither."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import TYPE_CHECKING, Any

from . import local_ray
from .cluster import Cluster, ClusterFacts, load_cluster
from .errors import ClusterError, ModelError, RaypeftError, first_line
from .objects import get_tree
from .registry import Registry
from .runner import Runner, TrainRequest
from .service import Endpoints, Environment, OnEvent
from .spec.job import JobSpec
from .spec.sharing import base_key, changes_base
from .store import RunStore
from .tracking.targets import open_tracking

if TYPE_CHECKING:
    from .merging.merge import WriteFiles
    from .plan.layout import Layout
    from .serve.endpoint_rows import EndpointInfo
    from .serve.endpoints import RayEndpoints
    from .train.worker.inspection import Inspection


def environment(cluster: Cluster, *, storage: str | None = None) -> Environment:
    """What the use cases work on, for one cluster; nothing is started or connected to yet.

    Args:
        storage: the job's own `storage.path`, which goes before the cluster's.
    """
    registry = Registry(cluster.registry)
    return Environment(
        cluster=cluster,
        runs=RunStore(storage or cluster.storage),
        registry=registry,
        open_runner=lambda: _runner(cluster),
        open_sweep=lambda: _sweep_runner(cluster),
        open_endpoints=lambda: endpoints(cluster, registry),
        facts=lambda: facts(cluster),
        open_tracking=lambda spec, secrets: open_tracking(spec, cluster, secrets, storage=storage),
    )


def facts(cluster: Cluster) -> ClusterFacts | None:
    """What the cluster has and can grow to; None where only the running cluster would know."""
    if cluster.kind == "local":
        return local_ray.facts()
    if cluster.is_inside:
        connect(cluster)
        from .submit.inside import facts_inside

        return facts_inside()
    from .submit.facts import read_facts

    return read_facts(cluster)


def connect(cluster: Cluster) -> None:
    """Makes this process a driver of the cluster's Ray; starts the local one where none is up.

    Raises:
        ClusterError: it does not answer, or is a remote one, which takes jobs only.
    """
    if cluster.kind == "local":
        up = local_ray.ensure_up()
        address = up.gcs_address
    elif cluster.is_inside:
        address = "auto"
    else:
        raise ClusterError(
            f"cluster '{cluster.name}' is reached through Ray's Jobs API.",
            hint=f"Send the job there: raypeft submit FILE --cluster {cluster.path or cluster.address} --follow",
        )
    import ray

    if ray.is_initialized():
        return
    _keep_quiet()
    try:
        with _own_signals():
            ray.init(address=address, log_to_driver=False, logging_level="ERROR", namespace="raypeft")
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ClusterError(
            f"Ray does not answer: {error}", where=address, hint="See: raypeft up, raypeft down."
        ) from error


@contextmanager
def _own_signals() -> Iterator[None]:
    """Puts back what Ctrl-C and SIGTERM did before: a Ray that connects lets SIGTERM abort the process."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in before.items():
                if handler is not None:  # one that was not set from Python cannot be put back
                    signal.signal(number, handler)


def _keep_quiet() -> None:
    """Ray prints what its daemons report (a worker died) on our standard output, where with --json nothing but
    JSON may stand; a run's own events say it in one line."""
    import ray._private.worker

    ray._private.worker.print_to_stdstream = lambda data, ignore_prefix: None


def disconnect() -> None:
    """Ends this process's connection to Ray, where it has one."""
    import sys

    if "ray" in sys.modules:
        sys.modules["ray"].shutdown()
    local_ray.release()


def check_registry(cluster: Cluster) -> None:
    """Raises ClusterError where the endpoints of a remote cluster follow a registry that this machine does not
    know."""
    if cluster.is_remote:
        from .submit.endpoints import check_registry

        check_registry(cluster)


def endpoints(cluster: Cluster, registry: Registry, *, start: bool = True) -> Endpoints:
    """The cluster's endpoints: of the Ray that this process joins, else through Ray's Jobs API.

    Args:
        start: start the local Ray where it is not up; else its endpoints are then what the registry says.
    """
    if cluster.is_remote:
        from .submit.endpoints import JobEndpoints

        return JobEndpoints(cluster)
    return _ray_endpoints(cluster, registry, start=start)


def _ray_endpoints(cluster: Cluster, registry: Registry, *, start: bool = True) -> RayEndpoints:
    if start or cluster.kind != "local" or local_ray.current() is not None:
        connect(cluster)
    from .serve.endpoints import RayEndpoints

    serve = cluster.serve
    return RayEndpoints(registry, host=serve.host, port=serve.port, local=cluster.kind == "local")


def endpoint_rows(cluster: Cluster) -> list[EndpointInfo]:
    """The endpoints of the cluster's registry; starts no Ray. Where this process cannot be a driver of the
    cluster, or its Ray is not up, an endpoint is `live` when it answers over HTTP, else `down`.

    Raises:
        ClusterError: nothing names a registry that both a remote cluster and this machine see.
    """
    check_registry(cluster)
    registry = Registry(cluster.registry)
    if cluster.is_inside or (cluster.kind == "local" and local_ray.current() is not None):
        return _ray_endpoints(cluster, registry).status()
    if not registry.endpoint_names():
        return []
    from .serve.endpoint_rows import rows_over_http

    return rows_over_http(registry, f"http://{cluster.serve.host}:{cluster.serve.port}")


def jobs_api() -> ModuleType:
    """`submit.jobs`, which speaks Ray's Jobs API over HTTP."""
    from .submit import jobs

    return jobs


def read_output(
    pieces: Iterable[str], on_event: OnEvent
) -> tuple[dict[str, Any] | None, RaypeftError | None, str]:
    """The result, the error and the last other line of what a job printed; see `submit.command`."""
    from .submit.command import read_output

    return read_output(pieces, on_event)


def rayjob(spec: JobSpec, cluster: Cluster) -> str:
    """The complete RayJob for KubeRay, as YAML."""
    from .submit.rayjob import rayjob

    return rayjob(spec, cluster)


def _runner(cluster: Cluster) -> Runner:
    connect(cluster)
    from .train.driver.launch import RayRunner

    return RayRunner()


def _sweep_runner(cluster: Cluster) -> Runner:
    _runner(cluster)  # joins its Ray
    from .plan.layout import lay_out, worker_room
    from .sweep.runner import SweepRunner
    from .train.driver.nodes import RayCluster
    from .train.driver.placement import places_in_all, places_now
    from .train.driver.warm import WarmGroup
    from .train.packing import Packing

    def key_of(request: TrainRequest) -> str | None:
        if changes_base(request.spec) is not None:
            return None
        plan = request.plan
        return base_key(request.spec, zero_stage=plan.zero_stage, on_gpu=plan.use_gpu)

    def layout(request: TrainRequest, trials: int) -> Layout:
        assert request.spec.sweep is not None
        room = places_in_all(request.plan, RayCluster().rooms()) // request.plan.num_workers
        worker = worker_room(request.plan, request.spec, facts(cluster))
        plan = request.plan
        return lay_out(request.spec.sweep, trials, room, plan.memory, worker, is_alone=plan.alone is not None)

    def has_room(request: TrainRequest, starting: int) -> bool:
        places = places_now(request.plan, RayCluster().rooms())
        return places >= (starting + 1) * request.plan.num_workers

    return SweepRunner(
        lambda request, layout: WarmGroup(request, Packing(places=layout.pack, joined=layout.joined)),
        key_of,
        layout,
        has_room,
    )


def inspect_rows(spec: JobSpec, rows: int) -> Inspection:
    """Renders a job's rows as the workers will read them."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from .train.worker import inspection

    return inspection.inspect(spec, rows)


def evaluate(spec: JobSpec, adapter_dir: str) -> dict[str, float]:
    """Metrics over the rows of `eval.datasets`, in this process: the adapter's, and `base.NAME`."""
    from .train.worker.measure import measure_adapter

    return measure_adapter(spec, adapter_dir)


def merge_files(cluster: Cluster) -> WriteFiles:
    """What writes a merged checkpoint, by tasks of the Ray that this process joins: the machine's own, where the
    cluster is reached through Ray's Jobs API."""
    connect(load_cluster("local") if cluster.is_remote else cluster)
    from .merging.tasks import write_files

    return write_files


@contextmanager
def adapter_folder(source: str) -> Iterator[Path]:
    """A local folder with an adapter: `source` itself, or a copy of a URL's or a hub id's files while within.

    Raises:
        StorageError, ModelError: nothing is there.
    """
    if "://" not in source and Path(source).expanduser().exists():
        yield Path(source).expanduser()
        return
    with TemporaryDirectory() as scratch:
        if "://" in source:
            yield get_tree(source, Path(scratch) / "adapter")
        else:
            yield _from_hub(source, scratch)


def _from_hub(name: str, scratch: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, local_dir=scratch, allow_patterns=["*.json", "*.safetensors"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ModelError(
            f"'{name}' is neither a folder nor the hub's: {first_line(error)}",
            hint="Name a folder with adapter_config.json, a URL or a hub id.",
        ) from error
