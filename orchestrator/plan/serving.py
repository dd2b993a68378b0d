"""What a job's `deploy` comes to, in words: the alias, how it is taken, and by how many replicas."""

from __future__ import annotations

from ..spec.durations import format_duration
from ..spec.job import DeploySpec, EngineSpec, JobSpec, RolloutSpec


def serving(spec: JobSpec) -> str | None:
    """One line; None where nothing is deployed."""
    deploy = spec.deploy
    if deploy is None:
        return None
    name = spec.register_.name or spec.name
    parts = [f"{name}@{deploy.alias}{_taken(deploy.rollout)}", _replicas(deploy)]
    return "; ".join([*parts, *_engine(deploy.engine)])


def _taken(rollout: RolloutSpec) -> str:
    if not rollout.is_watched:
        return " at once"
    end = f"after {format_duration(rollout.bake)}" if rollout.bake else "by raypeft promote"
    said = [f" {end}, until then {rollout.canary_percent:g} % of its requests by '{rollout.sticky_key}'"]
    if rollout.shadow_percent:
        said.append(f"{rollout.shadow_percent:g} % in shadow")
    if rollout.rollback is not None:
        kind = "any" if rollout.rollback.all is None else "all"
        conditions = (rollout.rollback.all if kind == "all" else rollout.rollback.any) or ()
        said.append(f"taken back if {kind} of: {'; '.join(conditions)}")
    return ", ".join(said)


def _replicas(deploy: DeploySpec) -> str:
    low, most = deploy.bounds
    if deploy.scale is None:
        return f"{most} replica{'s' * (most > 1)}"
    idle = format_duration(deploy.scale.idle_timeout)
    return f"{low} to {most} replicas by demand, each until {idle} without"


def _engine(engine: EngineSpec) -> list[str]:
    said = engine.model_dump(exclude_defaults=True)
    return (
        [f"engine {', '.join(f'{key} {str(value).lower()}' for key, value in said.items())}"] if said else []
    )
