"""How a job would run."""

from __future__ import annotations

from dataclasses import replace

from ..cluster import ClusterFacts, check_storage
from ..errors import HubError
from ..plan import Plan, make_plan
from ..plan.model_sizes import ModelSizes, read_sizes
from ..plan.row_lengths import row_facts
from ..plan.sweep import SweepPlan, make_sweep_plan
from ..spec.job import JobSpec
from ..tracking.targets import check_tracking, untold
from .environment import Environment


def plan_job(spec: JobSpec, environment: Environment) -> Plan:
    """The plan that `run` follows; of a sweep, that of the trial that needs most. Where a hub does not answer, it knows
    nothing of the base and says so.

    Raises:
        ModelError: the base does not exist or its weights are damaged.
        PlacementError: the cluster can never give what the job asks.
        ClusterError: it has several nodes without storage that all of them see.
    """
    if spec.sweep is not None:
        return plan_sweep(spec, environment).trial
    facts, sizes, notes = _known_before(spec, environment)
    plan = make_plan(spec, facts, sizes, row_facts(spec))
    return replace(plan, notes=(*notes, *plan.notes))


def plan_sweep(spec: JobSpec, environment: Environment) -> SweepPlan:
    """The plan of a job with a sweep: how many trials, on how many bases, what that takes.

    Raises:
        PlacementError: a trial does not fit, or the cluster can never give its workers. Else as `plan_job`.
    """
    facts, sizes, notes = _known_before(spec, environment)
    plan = make_sweep_plan(spec, facts, sizes, row_facts(spec))
    return replace(plan, notes=(*notes, *plan.notes))


def _known_before(
    spec: JobSpec, environment: Environment
) -> tuple[ClusterFacts | None, ModelSizes | None, list[str]]:
    """What a plan is made from, and what is to be said of it."""
    sizes, notes = None, list[str]()
    try:
        sizes = read_sizes(spec.model.base_model, spec.model.revision)
    except HubError as error:
        notes.append(error.problem)
    facts = environment.facts()
    if facts is not None:
        check_storage(spec, environment.cluster, facts)
    check_tracking(spec, environment.cluster, facts)
    if unsaid := untold(spec, environment.cluster, storage=spec.storage.path):
        notes.append(unsaid)
    return facts, sizes, notes
