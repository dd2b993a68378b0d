"""The use cases. Everything that reaches Ray comes in through `Environment` as a protocol, so that each case
runs in a test without a cluster."""

from .environment import Endpoints, Environment, OnEvent
from .jobs import run_job
from .planning import plan_job, plan_sweep
from .results import Comparison, Deployment, RunResult
from .served import served_task, task_to_ask
from .stopping import StopRequest

__all__ = [
    "Comparison",
    "Deployment",
    "Endpoints",
    "Environment",
    "OnEvent",
    "RunResult",
    "StopRequest",
    "plan_job",
    "plan_sweep",
    "run_job",
    "served_task",
    "task_to_ask",
]
