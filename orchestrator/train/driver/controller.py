"""Ray Train's controller with our settings. It runs in a process that Ray has at hand, which imports no
torch."""

from __future__ import annotations

import os
from typing import Any

from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.failure_handling import FailureDecision, FailurePolicy
from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy
from ray.train.v2._internal.execution.worker_group import WorkerGroup

WORKER_ENVIRONMENT = {
    # our own capture has all output, free of secrets; Ray's would write it down once more
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "TOKENIZERS_PARALLELISM": "false",
}

SETTINGS = {
    # how often the controller looks at its workers: as long as a finished or failed run seems to go on
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "30",
    "RAY_WARN_BLOCKING_GET_INSIDE_ASYNC": "0",
    # an actor that watches for nodes about to go; `attempts.py` does
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
}


class EndAtOnce(FailurePolicy):
    """No second group under the same controller: whether a run starts again, and with how many workers, is not known
    here."""

    def make_decision(self, training_failed_error: Any) -> FailureDecision:
        """See Ray's FailurePolicy."""
        return FailureDecision.RAISE


class WithoutAutoscaler(FixedScalingPolicy):
    """The planned number of workers, on a cluster that does not grow: no actor starts to ask for more nodes."""

    def after_controller_start(self, train_run_context: Any) -> None:
        """Nothing."""

    def _maybe_send_resource_request(self) -> None:
        pass


class RunWorkerGroup(WorkerGroup):
    """Workers with `WORKER_ENVIRONMENT`."""

    @staticmethod
    def _get_worker_runtime_env(custom_runtime_env: Any) -> dict[str, Any]:
        return {"env_vars": dict(WORKER_ENVIRONMENT)}


class RunController(TrainController):
    """Set up by environment variables of its own process, instead of a runtime environment, for which Ray
    would have to start another process.

    Args:
        frozen_s: how long a worker may answer no question before it counts as lost.
    """

    worker_group_cls = RunWorkerGroup

    def __init__(self, *, frozen_s: float, **parts: Any) -> None:
        os.environ.update(SETTINGS, RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S=f"{frozen_s:g}")
        super().__init__(**parts)
