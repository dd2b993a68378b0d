"""What the command line does, as functions: each command is one function here that returns typed objects.

from orchestrator import api
result = api.run("jobs/quickstart.yaml", ["training.num_epochs=2"])
print(result.adapter, result.metrics["eval_loss"])
print(api.ask("python-docs", "What does shutil.copytree do?"))
"""

from .asked import ask, ask_head, ask_stream
from .author import init, inspect, method, methods, plan, resolved, schema, templates, validate
from .found import JobSource, ignore, load
from .merged import merge
from .own_ray import down, up
from .registered import adapters, alias, delete, evaluate, pull, register, registry_url, show, versions
from .runs import cancel, improvement, jobs, logs, run, status, storage, sweep, worker_log
from .served import audit, deploy, endpoints, promote, rollback, rollouts, top, undeploy
from .submitted import follow, job_logs, job_status, submission, submit, submitted_jobs
from .tenants import create_key, keys, revoke_key, used

__all__ = [
    "JobSource",
    "adapters",
    "alias",
    "ask",
    "ask_head",
    "ask_stream",
    "audit",
    "cancel",
    "create_key",
    "delete",
    "deploy",
    "down",
    "endpoints",
    "evaluate",
    "follow",
    "ignore",
    "improvement",
    "init",
    "inspect",
    "job_logs",
    "job_status",
    "jobs",
    "keys",
    "load",
    "logs",
    "merge",
    "method",
    "methods",
    "plan",
    "promote",
    "pull",
    "register",
    "registry_url",
    "resolved",
    "revoke_key",
    "rollback",
    "rollouts",
    "run",
    "schema",
    "show",
    "status",
    "storage",
    "submission",
    "submit",
    "submitted_jobs",
    "sweep",
    "templates",
    "top",
    "undeploy",
    "up",
    "used",
    "validate",
    "versions",
    "worker_log",
]
