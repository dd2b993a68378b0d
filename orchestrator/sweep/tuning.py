"""Ray Tune's own loop over trials that train elsewhere.

`tune.run` would give each trial a placement group, which a stopped one leaks where Ray's dashboard is off, print
tables of its own and pickle its state. Its controller is therefore driven here: proxies take no resources, and what is
known of trials is in the run's folder.
"""

from __future__ import annotations

import functools
import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ray.air.execution import FixedResourceManager
from ray.air.execution.resources.fixed import FixedAcquiredResources
from ray.train._internal.storage import StorageContext
from ray.tune import Callback, PlacementGroupFactory
from ray.tune.execution.tune_controller import TuneController
from ray.tune.experiment import Experiment, Trial
from ray.tune.registry import register_trainable
from ray.tune.schedulers import TrialScheduler
from ray.tune.search import ConcurrencyLimiter, Searcher, SearchGenerator

from .proxy import TRIAL, Proxies, TrialProxy

_NAME = "raypeft-trial"
_PLACE = "place"
"""A resource that exists in Tune's accounts alone."""
_PLACES = 1e6
_PROXY_DEATHS = 3
"""How often a trial's proxy may die before the trial counts as failed: what it stands for is not lost."""

OnTrial = Callable[[int, dict[str, Any]], None]


class Tuning:
    """Trials as Tune decides them.

    Args:
        searcher: suggests `{"trial": number, ...}`, or says that there are no more.
        max_concurrent: trials that run at once.
        on_start: called with number and config when a trial begins to wait for reports (`tell`), once more where its
            proxy died.
        on_end: called with number and config when Tune lets go of a trial: it was told its last report, or the
            scheduler stops it.
    """

    def __init__(
        self,
        searcher: Searcher,
        scheduler: TrialScheduler,
        *,
        max_concurrent: int,
        on_start: OnTrial,
        on_end: OnTrial,
    ) -> None:
        for logger in ("ray.tune", "ray.air"):
            logging.getLogger(logger).setLevel(logging.ERROR)
        os.environ.setdefault("TUNE_PRINT_ALL_TRIAL_ERRORS", "0")
        self._standing = _Standing(on_start, on_end)
        self._proxies = Proxies()
        # Tune insists on a folder; nothing in it is read again
        self._scratch = tempfile.mkdtemp(prefix="raypeft-")
        storage = StorageContext(storage_path=self._scratch, experiment_dir_name="tune")
        register_trainable(_NAME, TrialProxy)
        place = PlacementGroupFactory([{_PLACE: 1}])
        algorithm = SearchGenerator(ConcurrencyLimiter(searcher, max_concurrent=max_concurrent))
        algorithm.add_configurations(
            [
                Experiment(
                    "tune",
                    _NAME,
                    resources_per_trial=place,
                    num_samples=10**9,  # the searcher says when it is enough
                    max_failures=_PROXY_DEATHS,
                    storage_path=self._scratch,
                )
            ]
        )
        self._controller = TuneController(
            search_alg=algorithm,
            scheduler=scheduler,
            callbacks=[self._standing],
            storage=storage,
            checkpoint_period=10**9,
            reuse_actors=True,
            resource_manager_factory=functools.partial(_no_resources, self._proxies),
        )
        # else the proxies of all but one of several trials that end at once are thrown away
        self._controller._actor_cache.increase_max(place, by=max_concurrent)

    @property
    def has_ended(self) -> bool:
        """Whether all trials have ended and none is to come."""
        return self._controller.is_finished()

    def step(self) -> None:
        """Takes one event, or waits a tenth of a second for one."""
        self._controller.step()

    def tell(self, number: int, report: dict[str, Any]) -> None:
        """A trial's report: its metric, what schedulers count by, and `done: True` where it is the last."""
        self._standing.tell(number, report)

    def close(self) -> None:
        """Ends the proxies."""
        self._proxies.close()
        shutil.rmtree(self._scratch, ignore_errors=True)


class _Standing(Callback):
    """Which proxy stands for which trial."""

    def __init__(self, on_start: OnTrial, on_end: OnTrial) -> None:
        self._on_start, self._on_end = on_start, on_end
        self._of: dict[int, Any] = {}

    def tell(self, number: int, report: dict[str, Any]) -> None:
        if (actor := self._of.get(number)) is not None:
            actor.tell.remote(number, report)

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        actor, number = trial.temporary_state.ray_actor, trial.config[TRIAL]
        self._of[number] = actor
        self._on_start(number, dict(trial.config))

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self._end(trial)

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self._end(trial)

    def _end(self, trial: Trial) -> None:
        number = trial.config[TRIAL]
        if self._of.pop(number, None) is not None:
            self._on_end(number, dict(trial.config))


@dataclass
class _InOneHost(FixedAcquiredResources):
    """A proxy's resources: none."""

    proxies: Proxies

    def _annotate_remote_entity(self, entity: Any, bundle: dict[str, float], bundle_index: int) -> Any:
        return self.proxies


def _no_resources(proxies: Proxies) -> FixedResourceManager:
    accounts = FixedResourceManager({_PLACE: _PLACES})
    accounts._resource_cls = functools.partial(_InOneHost, proxies=proxies)
    return accounts
