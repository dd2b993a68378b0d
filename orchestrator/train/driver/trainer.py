"""Ray Train's trainer of one group of workers, with a controller that starts fast and leaves every decision to us."""

from __future__ import annotations

import functools
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import ray
from ray.exceptions import RayError
from ray.train import TrainingFailedError
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.callbacks.working_dir_setup import WorkingDirectorySetupCallback
from ray.train.v2.api.config import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from orchestrator import objects
from orchestrator.runner import TrainRequest

from ..backend import MeetingConfig
from ..worker.entry import run_worker
from .controller import EndAtOnce, RunController, WithoutAutoscaler
from .nodes import RayCluster

FROZEN_S = 120.0
"""How long a worker's process may answer no question of its controller before its group ends: stopped, or on a node
that swaps. It answers from a thread of its own, whatever it computes. Ray Train's own bound is ten minutes."""

_NOT_NEEDED = (
    # it would move the workers out of the job's folder
    WorkingDirectorySetupCallback,
    # another process to start, for placement groups that outlive the controller; ours end with it
    PlacementGroupCleanerCallback,
    # another one, for Ray's datasets: rows are read by our own
    DatasetsCallback,
)


Work = Callable[[TrainRequest, Any, str], dict[str, Any]]


class Trainer(DataParallelTrainer):
    """Ray's trainer from a plan, without what TorchTrainer adds, for which the driver would have to import torch. It
    keeps its controller's handle, to end a group that does not leave by itself.

    Args:
        work: what each worker does.
    """

    def __init__(self, request: TrainRequest, mailbox: Any, work: Work = run_worker) -> None:
        plan = request.plan
        self._controller: Any = None
        # Ray Train insists on storage of its own, and puts nothing there: checkpoints are ours
        self._storage = tempfile.mkdtemp(prefix="raypeft-")
        # a new number for this group: what one before it, cut off and not yet dead, still commits is refused
        fence = objects.persistently(request.fence.advanced) if request.fence else None
        told = replace(request, secrets={}, fence=fence)
        super().__init__(
            cast(Any, functools.partial(work, told, mailbox, os.getcwd())),
            backend_config=MeetingConfig(),
            scaling_config=ScalingConfig(
                num_workers=plan.num_workers,
                use_gpu=plan.use_gpu,
                resources_per_worker=dict(plan.bundle),
                placement_strategy=plan.placement,
                label_selector=dict(plan.labels) or None,
            ),
            run_config=RunConfig(
                name=request.run_id,
                storage_path=self._storage,
                logging_config=LoggingConfig(log_level="ERROR"),
            ),
        )

    def train(self) -> dict[str, Any]:
        """Rank 0's return value.

        Raises:
            TrainingFailedError, RayError: as `fit`.
        """
        try:
            result: Any = self.fit()
        finally:
            shutil.rmtree(self._storage, ignore_errors=True)
        if not isinstance(result.return_value, dict):
            raise TrainingFailedError("the workers returned nothing")
        return result.return_value

    def abort(self) -> None:
        """Ends the workers and the controller at once."""
        controller, self._controller = self._controller, None
        if controller is None:
            return
        try:
            ray.get(controller.abort.remote(), timeout=5)
        except RayError:
            ray.kill(controller)

    def _create_default_callbacks(self) -> list[Any]:
        return [each for each in super()._create_default_callbacks() if not isinstance(each, _NOT_NEEDED)]

    def _initialize_and_run_controller(self, **parts: Any) -> Any:
        parts |= {"failure_policy": EndAtOnce(FailureConfig()), "frozen_s": FROZEN_S}
        if not RayCluster().grows_to():
            parts["scaling_policy"] = WithoutAutoscaler(self.scaling_config)
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        controller: Any = (
            ray.remote(num_cpus=0)(RunController).options(scheduling_strategy=here).remote(**parts)
        )
        self._controller = controller
        try:
            ray.get(controller.run.remote())
            return ray.get(controller.get_result.remote())
        finally:
            # whatever it still holds goes with it: workers, placement group
            self._controller = None
            ray.kill(controller)
