"""MLflow: a database file without a server, or a tracking server.

An experiment is the job's name; a run is found again by the tag `raypeft.key`.
"""

from __future__ import annotations

import fcntl
import logging
import math
import os
import re
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlflow.entities import Metric, Param, ViewType
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from .sink import Sink, flat

KEY = "raypeft.key"
_SQLITE = "sqlite:///"
_STATUS = {"finished": "FINISHED", "failed": "FAILED", "killed": "KILLED"}
_LONGEST_PARAM, _LONGEST_TAG = 5000, 4000
_OF_STEPS = ("loss", "learning_rate", "grad_norm", "tokens_per_s", "epoch")
_AT_ONCE = 100
"""Parameters that the API takes in one call."""


class MlflowRuns(Sink):
    """Runs of one experiment.

    Args:
        uri: `sqlite:////abs/file.db`, or a server's URL. experiment: its name.
        artifacts: a folder for files, where the uri is no server's.
    """

    def __init__(self, uri: str, experiment: str, artifacts: str | None = None) -> None:
        logging.getLogger("mlflow").setLevel(logging.ERROR)
        logging.getLogger("alembic").setLevel(logging.ERROR)
        if uri.startswith(_SQLITE):
            make_database(Path(uri.removeprefix(_SQLITE)))
        self._client = MlflowClient(uri)
        self._experiment = self._found_experiment(experiment, artifacts)
        self._runs: dict[str, str] = {}
        self._last_step: dict[str, int] = {}
        self._measured: dict[str, set[tuple[str, int]]] = {}
        """What was told of evaluations before, by the runs' keys: name and step."""
        self._open: set[str] = set()

    def start(self, message: dict[str, Any]) -> None:
        key = message["key"]
        params = flat(message["params"])
        given = {
            re.sub(r"[^\w./ :-]", "_", name): _text(value, _LONGEST_PARAM) for name, value in params.items()
        }
        tags = {KEY: key, **{name: _text(value, _LONGEST_TAG) for name, value in message["tags"].items()}}
        if message["parent"]:
            tags["mlflow.parentRunId"] = self._id(message["parent"])
        known = self._found(key)
        if known is None:
            run = self._client.create_run(self._experiment, run_name=message["name"], tags=tags)
            self._runs[key], before = run.info.run_id, {}
        else:
            self._runs[key], before = known.info.run_id, dict(known.data.params)
            self._client.update_run(known.info.run_id, status="RUNNING")
            for name, value in tags.items():
                self._client.set_tag(known.info.run_id, name, value)
            self._last_step[key] = self._steps_of(known)
            self._measured[key] = self._evaluations_of(known)
        self._open.add(key)
        fresh = [Param(name, value) for name, value in given.items() if name not in before]
        for at in range(0, len(fresh), _AT_ONCE):
            self._client.log_batch(self._runs[key], params=fresh[at : at + _AT_ONCE])
        # a parameter cannot change there: what a resumed job changed stands among the tags
        for name, value in given.items():
            if name in before and before[name] != value:
                self._client.set_tag(self._runs[key], f"resumed.{name}", value)

    def metrics(self, key: str, batch: Sequence[dict[str, Any]]) -> None:
        last, measured = self._last_step.get(key, -1), self._measured.get(key, set())
        found = [
            Metric(name, float(value), int(each["t"] * 1000), each["step"])
            for each in batch
            for name, value in each["values"].items()
            if (each["step"] > last if name in _OF_STEPS else (name, each["step"]) not in measured)
            if value is not None and not (isinstance(value, float) and math.isinf(value))
        ]
        for at in range(0, len(found), 1000):
            self._client.log_batch(self._id(key), metrics=found[at : at + 1000])

    def tags(self, key: str, message: dict[str, Any]) -> None:
        for name, value in message["tags"].items():
            self._client.set_tag(self._id(key), name, _text(value, _LONGEST_TAG))

    def text(self, key: str, message: dict[str, Any]) -> None:
        self._client.log_text(self._id(key), message["content"], message["file"])

    def end(self, key: str, message: dict[str, Any]) -> None:
        self._client.set_terminated(self._id(key), _STATUS[message["status"]])
        self._open.discard(key)

    def close(self) -> None:
        for key in sorted(self._open):
            self._client.set_terminated(self._id(key), _STATUS["killed"])
        self._open.clear()

    def _id(self, key: str) -> str:
        if key not in self._runs and (known := self._found(key)) is not None:
            self._runs[key] = known.info.run_id
        return self._runs[key]

    def _found(self, key: str) -> Any:
        runs = self._client.search_runs(
            [self._experiment],
            f"tags.`{KEY}` = '{key}'",
            run_view_type=ViewType.ACTIVE_ONLY,
            max_results=1,
        )
        return runs[0] if runs else None

    def _steps_of(self, run: Any) -> int:
        if "loss" not in run.data.metrics:
            return -1
        return max(each.step for each in self._client.get_metric_history(run.info.run_id, "loss"))

    def _evaluations_of(self, run: Any) -> set[tuple[str, int]]:
        return {
            (name, each.step)
            for name in run.data.metrics
            if name not in _OF_STEPS
            for each in self._client.get_metric_history(run.info.run_id, name)
        }

    def _found_experiment(self, name: str, artifacts: str | None) -> str:
        found = self._client.get_experiment_by_name(name)
        if found is None:
            try:
                return self._client.create_experiment(name, artifact_location=artifacts)
            except MlflowException:  # another driver was first
                found = self._client.get_experiment_by_name(name)
                if found is None:
                    raise
        if found.lifecycle_stage == "deleted":
            self._client.restore_experiment(found.experiment_id)
        return found.experiment_id


def make_database(file: Path) -> None:
    """MLflow's empty database, where there is none yet: made in memory, since its hundred changes of tables wait for
    a disk each, and by one driver, since two at once break each other's."""
    if file.exists():
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    memory = "/dev/shm" if os.path.isdir("/dev/shm") else None
    with open(f"{file}.lock", "w") as lock, tempfile.TemporaryDirectory(dir=memory) as scratch:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if file.exists():
            return
        made = Path(scratch) / file.name
        MlflowClient(f"{_SQLITE}{made}").search_experiments(max_results=1)
        aside = file.with_name(f".{file.name}.{os.getpid()}")
        shutil.copyfile(made, aside)
        os.replace(aside, file)


def _text(value: Any, longest: int) -> str:
    text = value if isinstance(value, str) else "" if value is None else str(value)
    return text if len(text) <= longest else text[: longest - 3] + "..."
