"""Writing a job: templates, checks, what it would do."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import service, wiring
from ..plan import Plan
from ..plan.sweep import SweepPlan
from ..spec import canonical
from ..spec import methods as method_rows
from ..spec import schema as schemas
from ..spec import templates as job_templates
from ..spec.job import JobSpec
from ..spec.load import LoadedJob
from .found import JobSource, cluster_of, environment_of, load

if TYPE_CHECKING:
    from ..train.worker.inspection import Inspection


def validate(job: JobSource, overrides: Sequence[str] = ()) -> LoadedJob:
    """Checks a job against the schema and the rules across its keys, and that its cluster file exists."""
    loaded = load(job, overrides)
    cluster_of(None, loaded)
    return loaded


def resolved(spec: JobSpec) -> str:
    """The job as YAML, every default filled in."""
    return canonical.resolved_yaml(spec)


def schema() -> dict[str, Any]:
    """The JSON Schema of a job, for editors."""
    return schemas.json_schema()


def methods() -> list[method_rows.MethodRow]:
    """The adapter methods that there are."""
    return method_rows.method_rows()


def method(name: str) -> method_rows.MethodRow:
    """One adapter method with its fields; raises SpecError, with the closest name, where there is none."""
    return method_rows.method_row(name)


def templates() -> list[tuple[str, str]]:
    """Name and one line of each template of `init`."""
    return job_templates.list_templates()


def init(template: str, directory: str | Path = ".", *, force: bool = False) -> list[Path]:
    """Writes a commented job file and what it needs; returns the paths written."""
    return job_templates.write_template(template, Path(directory), force=force)


def inspect(job: JobSource, rows: int = 3, overrides: Sequence[str] = ()) -> Inspection:
    """Renders a job's rows as the model will read them. Imports torch's tokenizers, unlike its neighbours."""
    return wiring.inspect_rows(load(job, overrides).spec, rows)


def plan(job: JobSource, overrides: Sequence[str] = (), *, cluster: str | None = None) -> Plan | SweepPlan:
    """How a job would run: workers, batch arithmetic, memory, whether it fits; of a sweep also how many trials, packed
    how, and about how long."""
    loaded = load(job, overrides)
    if loaded.spec.sweep is not None:
        return service.plan_sweep(loaded.spec, environment_of(cluster_of(cluster, loaded), loaded))
    return service.plan_job(loaded.spec, environment_of(cluster_of(cluster, loaded), loaded))
