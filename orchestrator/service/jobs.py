"""A job, run to its end."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace

from ..errors import Interrupted, LeaseError, OutOfTimeError, RaypeftError
from ..identity import base_identity, data_hash
from ..spec.job import JobSpec
from ..store import Run
from ..tracking.story import Story
from ..tracking.targets import where_to_look
from .attempt import Attempt
from .environment import Environment, OnEvent
from .planning import plan_job
from .recording import recorder
from .results import RunResult
from .stopping import StopRequest


def run_job(
    spec: JobSpec,
    environment: Environment,
    *,
    secrets: dict[str, str] | None = None,
    new: bool = False,
    resume: bool = False,
    force: bool = False,
    on_event: OnEvent = lambda event: None,
    stop: StopRequest | None = None,
) -> RunResult:
    """Trains, gates, registers and deploys; goes on where an earlier attempt stopped.

    Args:
        new: number a new run where the name is taken by another spec.
        resume: take over the run of this name although keys that may change did; what `retry` allows counts anew.
        force: deploy although the gate refuses; recorded.
        stop: through which Ctrl-C asks for a checkpoint.

    Raises:
        RaypeftError: the leaf says what failed; the run's folder keeps the cause.
        Interrupted: it was stopped; the same call goes on from its last checkpoint.
    """
    began = time.time()
    with _in_environment(secrets or {}):  # a private base's or dataset's token
        plan = plan_job(spec, environment)
        base = base_identity(spec.model.base_model, spec.model.revision)
        data = data_hash(spec)
    environment.registry.check_writable()

    def say(text: str) -> None:  # nothing is kept yet: the run is not held
        on_event({"event": "warning", "t": round(time.time(), 3), "message": text})

    with (
        environment.runs.open(spec.name, spec, data, new=new, resume=resume, say=say) as run,
        _tracked(environment, spec, secrets or {}, run) as story,
    ):
        attempt = Attempt(
            spec,
            plan,
            base,
            run,
            environment,
            secrets or {},
            force,
            emit=recorder(run, on_event, story),
            show=on_event,
            stop=stop or StopRequest(),
            story=story,
        )
        try:
            result = attempt.finish()
        except KeyboardInterrupt as interrupt:
            run.set_state("interrupted")
            raise Interrupted(
                f"run '{run.id}' was interrupted.", hint="The same command goes on from its last checkpoint."
            ) from interrupt
        except LeaseError:
            raise  # the run is another driver's: its state is not ours to say
        except RaypeftError as error:
            state = "interrupted" if isinstance(error, Interrupted | OutOfTimeError) else "failed"
            run.set_state(state, cause=str(error))
            raise
        notes = tuple(where_to_look(story.tracking, run.id)) if story.run else ()
    for warning in story.tracking.warnings():
        say(warning)
    return replace(result, wall_s=round(time.time() - began, 3), notes=(*result.notes, *notes))


@contextlib.contextmanager
def _tracked(
    environment: Environment, spec: JobSpec, secrets: Mapping[str, str], run: Run
) -> Iterator[Story]:
    """Within the context trackers are told of the run, and after it how it ended."""
    facts = {"raypeft.run_dir": run.url, "raypeft.data_hash": run.record.data_hash}
    with environment.open_tracking(spec, secrets) as tracking:
        story = Story(tracking, run.id, spec, facts)
        try:
            yield story
        except (KeyboardInterrupt, Interrupted, OutOfTimeError, LeaseError):
            story.end("killed")
            raise
        except BaseException:
            story.end("failed")
            raise
        story.end("finished")


@contextlib.contextmanager
def _in_environment(secrets: dict[str, str]) -> Iterator[None]:
    """Within the context the secrets are environment variables of this process; no other process sees them."""
    before = {name: os.environ.get(name) for name in secrets}
    os.environ.update(secrets)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
