"""A sweep as `runner.Runner`: Tune's trials train in warm groups, and the best one is what the run comes to."""

from __future__ import annotations

import contextlib
import math
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from orchestrator import objects, stored
from orchestrator.errors import Interrupted, OutOfTimeError, RaypeftError, TrainingError
from orchestrator.objects import NotFound, join
from orchestrator.plan.sweep import Layout, trial_plan
from orchestrator.runner import Event, Spent, TrainOutcome, TrainRequest
from orchestrator.spec.job import JobSpec
from orchestrator.spec.space import dimensions
from orchestrator.spec.sweep import SweepSpec
from orchestrator.spec.trials import count_trials, shown, trial_job
from orchestrator.store import Run, RunStore
from orchestrator.train.retries import FailureKind, Retries
from peft_dist.lazy import lazy

from .groups import Groups, OpenGroup
from .trials import FAILED, FINISHED, RUNNING, STOPPED, Trial, best, prune, read_trials, trials_url

if TYPE_CHECKING:
    from orchestrator.sweep import report, schedule, search, tuning
else:
    # Ray Tune, Optuna and matplotlib: while the first group of workers starts
    report = lazy("orchestrator.sweep.report")
    schedule = lazy("orchestrator.sweep.schedule")
    search = lazy("orchestrator.sweep.search")
    tuning = lazy("orchestrator.sweep.tuning")

LEAVE_S = 25.0
"""How long trials may take to save a checkpoint when the sweep is stopped."""
ALIVE_S = 5.0
"""Between two looks at what the sweep has used up."""
ACCOUNT = "sweep.json"


class SweepRunner:
    """`runner.Runner` of a job with a sweep.

    Args:
        open_group: starts a warm group of workers.
        key_of: what trials on one base have in common; None: each needs a base of its own.
        lay_out: where so many trials of a plan train, by the cluster as it is.
        has_room: whether the cluster has room for a plan's workers now, so many groups of them still starting.
    """

    def __init__(
        self,
        open_group: OpenGroup,
        key_of: Callable[[TrainRequest], str | None],
        lay_out: Callable[[TrainRequest, int], Layout],
        has_room: Callable[[TrainRequest, int], bool],
    ) -> None:
        self._open_group, self._key_of = open_group, key_of
        self._lay_out, self._has_room = lay_out, has_room
        self._told: queue.SimpleQueue[Event | None] = queue.SimpleQueue()
        self._stop = threading.Event()
        self._error: BaseException | None = None
        self._outcome: TrainOutcome | None = None
        self._first_step_s = math.nan

    def start(self, request: TrainRequest) -> None:
        """Trains in the background.

        Raises:
            PlacementError: the cluster can never give a group of workers.
        """
        assert request.spec.sweep is not None
        self._began = time.monotonic()
        self._request, self._sweep = request, request.spec.sweep
        self._layout = self._lay_out(request, count_trials(self._sweep))
        self._thread = threading.Thread(target=self._drive, name="sweep", daemon=True)
        self._thread.start()

    def events(self) -> Iterator[Event]:
        """Yields events as they come; ends when the sweep has ended."""
        while (event := self._told.get()) is not None:
            yield event

    def stop(self) -> None:
        """Has all trials save a checkpoint and leave."""
        self._stop.set()

    def outcome(self) -> TrainOutcome:
        """The best trial's.

        Raises:
            Interrupted: it was stopped; finished trials are kept, the others go on from their checkpoints.
            OutOfTimeError: retry.max_duration is over.
            RaypeftError: what ended it.
        """
        self._thread.join()
        if self._error is not None:
            raise self._error
        assert self._outcome is not None
        return replace(self._outcome, first_step_s=self._first_step_s)

    def _drive(self) -> None:
        """The thread: everything."""
        try:
            with contextlib.closing(_Sweep(self._request, self._layout, self._groups(), self._tell)) as sweep:
                self._outcome = sweep.run(self._stop)
        except BaseException as error:
            self._error = error if isinstance(error, RaypeftError) else _unexpected(error)
        finally:
            self._told.put(None)

    def _groups(self) -> Groups:
        return Groups(
            self._open_group,
            self._key_of,
            self._layout,
            lambda starting: self._has_room(self._request, starting),
        )

    def _tell(self, kind: str, /, **fields: Any) -> None:
        if kind == "progress" and math.isnan(self._first_step_s):
            self._first_step_s = time.monotonic() - self._began
        self._told.put({"event": kind, "t": round(time.time(), 3), **fields})


def _unexpected(error: BaseException) -> RaypeftError:
    found = TrainingError(f"the sweep ended: {type(error).__name__}: {error}")
    found.__cause__ = error
    return found


class _Running:
    """A trial under way in this driver."""

    def __init__(self, number: int, run: Run, job: JobSpec, parameters: dict[str, Any]) -> None:
        self.number, self.run, self.job, self.parameters = number, run, job, parameters
        self.reported = 0
        """Evaluations that Tune was told."""
        self.told_step = 0
        self.total_steps: int | None = None
        self.step = 0
        self._clock = contextlib.ExitStack()
        self._clock.enter_context(run.on_the_clock())

    def end(self, state: str, message: str, **facts: Any) -> None:
        """Keeps what it came to, and lets go of it."""
        self._clock.close()
        with contextlib.closing(self.run):
            self.run.set_state(state, message=message, steps=self.step, **facts)


class _Sweep:
    """One driver's part of a sweep."""

    def __init__(
        self,
        request: TrainRequest,
        layout: Layout,
        groups: Groups,
        tell: Callable[..., None],
    ) -> None:
        assert request.spec.sweep is not None
        self.request, self.layout, self.tell = request, layout, tell
        self.sweep: SweepSpec = request.spec.sweep
        self.space = dimensions(self.sweep.space)
        self.store = RunStore(trials_url(request.run_dir))
        self.retries = Retries(request.spec.retry, request.spent.retries)
        self.began = time.monotonic()
        self.groups = groups
        self.running: dict[int, _Running] = {}
        self.leaving: dict[str, Callable[[Event], None]] = {}
        self.known: dict[int, Trial] = {}
        self.used_before = self._account()
        self.ended = 0
        self.over: str | None = None
        self.tuning: Any = None
        self.suggestions: Any = None
        self._looked = 0.0

    # the whole

    def run(self, stop: threading.Event) -> TrainOutcome:
        """All trials that are left, then the best."""
        self.known = {trial.number: trial for trial in read_trials(self.request.run_dir)}
        self._say_what_is_known()
        total = count_trials(self.sweep)
        unfinished = [trial for trial in self.known.values() if trial.state == RUNNING]
        if unfinished or len(self.known) < total:
            self._open_first(unfinished)
            self._tune(stop)
        return self._settle()

    def close(self) -> None:
        """Ends workers and proxies, and keeps what was used up."""
        self.groups.close(5.0)
        if self.tuning is not None:
            self.tuning.close()
        for trial in list(self.running.values()):
            with contextlib.suppress(RaypeftError):
                trial.end("interrupted", "the sweep ended before it")
        self._keep_account()

    def _tune(self, stop: threading.Event) -> None:
        recalled = [search.Suggestion(each.number, each.drawn) for each in self.known.values()]
        # those under way first: they have a place waiting
        recalled.sort(key=lambda each: (self.known[each.number].state != RUNNING, each.number))
        self.suggestions = search.Suggestions(self.sweep, recalled, self.request.spec.training.seed)
        self.tuning = tuning.Tuning(
            self.suggestions,
            schedule.scheduler(self.sweep),
            max_concurrent=self.layout.concurrent,
            on_start=self._start,
            on_end=self._end,
        )
        while not self.tuning.has_ended:
            if stop.is_set():
                self._interrupt(
                    Interrupted(
                        f"sweep '{self.request.run_id}' was stopped.",
                        hint="The same command goes on: finished trials are kept, others go on from their checkpoints.",
                    )
                )
            self.tuning.step()
            for event in self.groups.take():
                self._take(event)
            if over := self._over():
                self._end_of_budget(over)
                return
        self._wait_for_leaving()

    def _settle(self) -> TrainOutcome:
        """The best trial, whole: chosen, measured beside production where a gate asks, the others pruned."""
        trials = read_trials(self.request.run_dir)
        chosen = best(trials, self.sweep)
        if chosen is None:
            if self.over is not None:
                raise OutOfTimeError(
                    f"{self.over} was used up before any of {len(trials)} trials was evaluated.",
                    where=self.over,
                    hint="Raise it and run the same command with --resume.",
                )
            causes = [each.cause for each in trials if each.cause]
            why = f" The first: {causes[0]}" if causes else ""
            raise TrainingError(
                f"none of {len(trials)} trials came to a value of {self.sweep.metric}.{why}",
                where=f"sweep {self.request.run_id}",
                hint=f"See them: raypeft sweep show {self.request.run_id}",
            )
        if chosen.state != FINISHED or self.request.compare:
            chosen = self._complete(chosen)
        storage = self.request.spec.storage
        trials = read_trials(self.request.run_dir)
        gone = prune(trials, self.sweep, storage.keep_best, storage.keep_latest)
        if gone:
            message = (
                f"the adapters of {len(gone)} trials were deleted (storage.keep_best, storage.keep_latest)"
            )
            self._say(message)
        trials = read_trials(self.request.run_dir)
        try:
            files = report.write_report(self.request.run_dir, self.request.run_id, self.sweep, trials)
        except Exception as error:  # the trials are worth more than their pictures
            self.tell("warning", message=f"the plots were not written: {error}")
        else:
            self.tell("report", **files)
        value = chosen.value(self.sweep.metric)
        self.tell(
            "best", trial=chosen.number, parameters=chosen.parameters, metric=self.sweep.metric, value=value
        )
        outcome = chosen.train_outcome()
        origin = {
            "sweep": self.request.run_id,
            "trial": chosen.number,
            "parameters": chosen.parameters,
            "trials": len(trials),
        }
        return replace(outcome, spec=trial_job(self.request.spec, chosen.parameters), origin=origin)

    # trials

    def _start(self, number: int, config: dict[str, Any]) -> None:
        """Tune has begun a trial: what is known of it is told, and the rest trains."""
        before = self.known.get(number)
        reports = before.reports if before else ()
        has_ended = before is not None and before.state != RUNNING
        if number in self.running:  # its proxy died, and it did not
            reports, has_ended = tuple(read_trials_reports(self.running[number])), False
        for count, each in enumerate(reports, start=1):
            is_last = has_ended and count == len(reports)
            self._report(number, count, each.step, each.metrics, is_last=is_last, recalled=True)
        if has_ended and not reports:
            self._report(number, 1, 0, {}, is_last=True)
        if has_ended or number in self.running:
            return
        drawn = {name: value for name, value in config.items() if name != tuning.TRIAL}
        parameters = search.parameters_of(self.space, drawn)
        job = trial_job(self.request.spec, parameters)
        run = self._open_run(number, job)
        trial = self.running[number] = _Running(number, run, job, parameters)
        trial.reported, trial.told_step = len(reports), reports[-1].step if reports else 0
        trial.step = trial.told_step
        run.set_state("starting", message=shown(parameters), trial=number, parameters=parameters, drawn=drawn)
        how = "resumed" if before else "started"
        self._tell_trial(trial, how, parameters=parameters)
        self.groups.enter(str(number), self._trial_request(run, job))

    def _end(self, number: int, config: dict[str, Any]) -> None:
        """Tune has let go of a trial: it has ended, or the scheduler stops it."""
        trial = self.running.pop(number, None)
        if trial is None:
            return
        self.leaving[str(number)] = lambda event: self._stopped(trial, "the scheduler", event)
        self.groups.leave(str(number))

    def _stopped(self, trial: _Running, by: str, event: Event) -> None:
        trial.step = max(trial.step, event.get("step", 0))
        trial.end("done", f"stopped by {by} at step {trial.step}", end=STOPPED)
        self._tell_trial(trial, STOPPED, cause=by)

    def _take(self, event: Event) -> None:
        """An event of a group."""
        kind, name = event["event"], event.get("trial")
        if name is None:
            self._of_group(event)
            return
        if kind in ("left", "failed", "finished") and name in self.leaving:
            self.leaving.pop(name)(event)
            return
        trial = self.running.get(int(name))
        if trial is None:
            return
        event = {**event, "trial": trial.number}
        if kind == "progress":
            trial.step, trial.total_steps = event["step"], event["total_steps"]
            trial.run.append_metrics(event)
            self.tell(kind, **_without(event, "event", "t"))
        elif kind == "eval":
            trial.run.append_metrics(event)
            self.tell(kind, **_without(event, "event", "t"))
            if event["step"] != trial.total_steps and event["step"] > trial.told_step:
                trial.reported, trial.told_step = trial.reported + 1, event["step"]
                self._report(trial.number, trial.reported, event["step"], event["metrics"])
        elif kind in ("state", "checkpoint", "warning"):
            trial.run.append_event(event)
            if kind == "warning":
                self.tell(kind, trial=trial.number, message=f"trial {trial.number}: {event['message']}")
        elif kind == "finished":
            self._finished(trial, event["end"])
        elif kind == "failed":
            self._failed(trial, event["cause"])

    def _finished(self, trial: _Running, end: Mapping[str, Any]) -> None:
        if not self.ended:  # plots take a second to import, which the last trial would be waited for with
            threading.Thread(target=getattr, args=(report, "write_report"), daemon=True).start()
        del self.running[trial.number]
        trial.step = end["steps"]
        outcome = _without(end, "is_stopped")
        trial.end(
            "done",
            f"finished after {end['steps']} steps",
            end=FINISHED,
            outcome=outcome,
            metrics=end["metrics"],
        )
        self._tell_trial(trial, FINISHED, metrics=end["metrics"])
        self._report(trial.number, trial.reported + 1, trial.step, end["metrics"], is_last=True)

    def _failed(self, trial: _Running, cause: str) -> None:
        """One fails alone."""
        del self.running[trial.number]
        trial.end("failed", "failed", cause=cause)
        self._tell_trial(trial, FAILED, cause=cause)
        self._report(trial.number, trial.reported + 1, trial.step, {}, is_last=True)

    def _tell_trial(self, trial: _Running, state: str, **fields: Any) -> None:
        if state in (FINISHED, STOPPED, FAILED):
            self.ended += 1
        counts = {"ended": self.ended, "trials": count_trials(self.sweep)}
        self.tell(
            "trial", trial=trial.number, id=trial.run.id, state=state, step=trial.step, **counts, **fields
        )

    def _report(
        self,
        number: int,
        count: int,
        step: int,
        metrics: Mapping[str, float],
        *,
        is_last: bool = False,
        recalled: bool = False,
    ) -> None:
        value = metrics.get(self.sweep.metric, math.nan)
        told = {
            search.VALUE: value,
            search.EVALUATIONS: count,
            "step": step,
            schedule.RECALLED: recalled,
        }
        self.tuning.tell(number, {**told, "done": True} if is_last else told)

    # groups

    def _of_group(self, event: Event) -> None:
        kind = event["event"]
        if kind == "group_failed":
            self._group_failed(event)
        elif kind == "ready":
            self._say(event.get("message") or f"a group of workers is ready after {event['seconds']:.0f} s")
        elif kind == "pack":
            self.tell("pack", **_without(event, "event", "t"))
        elif kind in ("log", "warning"):
            self.tell(kind, **_without(event, "event", "t"))

    def _group_failed(self, event: Event) -> None:
        kind, cause = event["kind"], event["cause"]
        try:
            will_retry = self.retries.allow(FailureKind(kind))
        except ValueError:
            will_retry = False
        self.tell("failure", attempt=1, rank=event.get("rank"), kind=kind, cause=cause, will_retry=will_retry)
        if not will_retry:
            self._interrupt(
                TrainingError(
                    f"a group of workers failed: {cause}",
                    where=f"sweep {self.request.run_id}",
                    hint="Run the same command again: it goes on from the trials' checkpoints.",
                )
            )

    def _open_first(self, unfinished: list[Trial]) -> None:
        """Starts a group while Ray Tune is imported."""
        from_space = unfinished[0].parameters if unfinished else None
        if from_space is None:
            drawn = {each.name: 0 if each.is_list else each.witnesses()[0] for each in self.space}
            from_space = search.parameters_of(self.space, drawn)
        job = trial_job(self.request.spec, from_space)
        self.groups.open(self._group_request(job))

    def _group_request(self, job: JobSpec) -> TrainRequest:
        run_dir = join(self.request.run_dir, "groups")
        return self._request_of(job, run_dir, f"{self.request.run_id}-group")

    def _trial_request(self, run: Run, job: JobSpec) -> TrainRequest:
        return replace(self._request_of(job, run.url, run.id), fence=run.fence)

    def _request_of(self, job: JobSpec, run_dir: str, run_id: str) -> TrainRequest:
        return replace(
            self.request,
            spec=job,
            plan=trial_plan(self.request.plan, job),
            run_dir=run_dir,
            run_id=run_id,
            compare={},
            fence=None,
            spent=Spent(),
        )

    def _open_run(self, number: int, job: JobSpec) -> Run:
        """A trial's run. What a driver left that died before it said which trial it was is taken away."""
        name = f"trial-{number:03d}"
        if number not in self.known:
            for record in self.store.list():
                if record.name == name:
                    objects.delete_tree(record.url)
        return self.store.open(name, job, self.request.data_hash)

    # ends

    def _over(self) -> str | None:
        """Which budget is used up."""
        if time.monotonic() - self._looked < 0.2:
            return None
        self._looked = time.monotonic()
        budget, spent = self.sweep.budget, self.request.spent.seconds + time.monotonic() - self.began
        if budget.time is not None and spent >= budget.time:
            return "sweep.budget.time"
        hours = (self.used_before + self.groups.worker_seconds) / 3600
        if budget.worker_hours is not None and hours >= budget.worker_hours:
            return "sweep.budget.worker_hours"
        limit = self.request.spec.retry.max_duration
        if limit is not None and spent >= limit:
            self._interrupt(
                OutOfTimeError(
                    f"sweep '{self.request.run_id}' ended: retry.max_duration is over.",
                    hint="Run it again with --resume to go on.",
                )
            )
        return None

    def _end_of_budget(self, over: str) -> None:
        """Stops what runs, for good."""
        self.over = over
        self._say(f"{over} is used up: {len(self.running)} trials are stopped, the best until now is taken")
        self.suggestions.stop()
        self._leave_all(lambda trial, event: self._stopped(trial, over, event))

    def _interrupt(self, error: RaypeftError) -> None:
        """Has every trial save a checkpoint and leave, and raises."""
        self._leave_all(lambda trial, event: trial.end("interrupted", f"interrupted at step {trial.step}"))
        raise error

    def _leave_all(self, end: Callable[[_Running, Event], None]) -> None:
        for number, trial in list(self.running.items()):
            self.leaving[str(number)] = lambda event, trial=trial: end(trial, event)  # type: ignore[misc]
            del self.running[number]
            self.groups.leave(str(number))
        self._wait_for_leaving()

    def _wait_for_leaving(self) -> None:
        """Until every trial that was asked to leave has, or could have."""
        deadline = time.monotonic() + LEAVE_S
        while self.leaving and time.monotonic() < deadline:
            for event in self.groups.take():
                if event.get("trial") in self.leaving and event["event"] in ("left", "failed", "finished"):
                    self.leaving.pop(event["trial"])(event)
                if event["event"] == "group_failed":
                    deadline = min(deadline, time.monotonic() + 1)
            time.sleep(0.02)
        for name in list(self.leaving):
            self.leaving.pop(name)({})

    def _complete(self, chosen: Trial) -> Trial:
        """Measures a trial whole, and writes its final adapter where it was stopped early: no step is taken."""
        job = trial_job(self.request.spec, chosen.parameters)
        run = self.store.open(f"trial-{chosen.number:03d}", job, self.request.data_hash)
        request = replace(self._trial_request(run, job), compare=self.request.compare)
        if chosen.state == STOPPED:
            training = job.training.model_copy(update={"max_steps": max(1, chosen.steps)})
            request = replace(request, spec=job.model_copy(update={"training": training}))
            self._say(
                f"trial {chosen.number}, the best, was stopped at step {chosen.steps}: it is measured as it stands"
            )
        with contextlib.closing(run):
            self.groups.enter(str(chosen.number), request)
            end = self._wait_for(str(chosen.number), run)
            outcome = _without(end, "is_stopped")
            run.set_state(
                "done",
                message=f"measured after {end['steps']} steps",
                end=chosen.state,
                steps=end["steps"],
                outcome=outcome,
                metrics=end["metrics"],
            )
        return replace(chosen, outcome=outcome)

    def _wait_for(self, name: str, run: Run) -> Mapping[str, Any]:
        while True:
            for event in self.groups.take():
                if event.get("trial") != name:
                    if event.get("trial") is None:
                        self._of_group(event)
                elif event["event"] == "finished":
                    return event["end"]
                elif event["event"] == "failed":
                    raise TrainingError(event["cause"], where=f"trial {name}")
                elif event["event"] == "eval":
                    run.append_metrics({**event, "trial": int(name)})
            time.sleep(0.02)

    def _say_what_is_known(self) -> None:
        layout = self.layout
        said = f"{count_trials(self.sweep)} trials, {layout.concurrent} at once on {layout.groups} base(s)"
        if self.known:
            self.ended = sum(each.state != RUNNING for each in self.known.values())
            said += f"; {self.ended} have ended before, {len(self.known) - self.ended} go on"
        self._say(said)

    def _say(self, message: str) -> None:
        self.tell("state", state="training", message=message)

    # what it used up

    def _account(self) -> float:
        url = join(self.request.run_dir, ACCOUNT)
        try:
            return float(stored.load(objects.read(url)[0], url).get("worker_seconds", 0.0))
        except NotFound:
            return 0.0

    def _keep_account(self) -> None:
        used = self.used_before + self.groups.worker_seconds
        document = {"worker_seconds": round(used, 1), "layout": asdict(self.layout)}
        with contextlib.suppress(RaypeftError):
            objects.write(join(self.request.run_dir, ACCOUNT), stored.dump(document))


def read_trials_reports(trial: _Running) -> list[Any]:
    """The evaluations that a trial under way has reported to Tune."""
    from_run = [event for event in trial.run.metrics() if event["event"] == "eval"]
    steps: dict[int, Mapping[str, float]] = {}
    for event in from_run:
        if event["step"] <= trial.told_step:
            steps[event["step"]] = {**steps.get(event["step"], {}), **event["metrics"]}
    return [_Told(step, metrics) for step, metrics in sorted(steps.items())]


class _Told:
    def __init__(self, step: int, metrics: Mapping[str, float]) -> None:
        self.step, self.metrics = step, metrics


def _without(event: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {key: value for key, value in event.items() if key not in names}
