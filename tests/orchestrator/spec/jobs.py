"""Small jobs for the tests of the spec."""

import textwrap

from orchestrator.errors import SpecError
from orchestrator.spec.load import load_job_text

MINIMAL = "model: {base_model: b}\ndata: {datasets: [{path: a.jsonl}]}\n"


def spec_of(text="", *, overrides=(), source="jobs/x.yaml"):
    """The spec of MINIMAL and `text`."""
    return load_job_text(MINIMAL + textwrap.dedent(text), source, overrides).spec


def refused(text, *, overrides=(), source="jobs/x.yaml"):
    """The message with which a whole file is refused."""
    try:
        load_job_text(textwrap.dedent(text), source, overrides)
    except SpecError as error:
        return str(error)
    raise AssertionError("accepted")


def refused_after_minimal(text, **kwargs):
    """The message for MINIMAL and `text`; lines of `text` begin at 3."""
    return refused(MINIMAL + textwrap.dedent(text), **kwargs)
