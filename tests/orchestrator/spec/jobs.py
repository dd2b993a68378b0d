"""Small jobs for the tests of the spec."""

import textwrap

from orchestrator.errors import SpecError
from orchestrator.spec.load import load_job_text

_PROMPTS = ("prompt_tuning", "multitask_prompt_tuning", "p_tuning", "prefix_tuning")
NEEDED: dict[str, dict] = {
    **{name: {"num_virtual_tokens": 4} for name in _PROMPTS},
    "c3a": {"block_size": 32},
    "vblora": {"vector_length": 32, "num_vectors": 64},
    "adaption_prompt": {"adapter_len": 4, "adapter_layers": 2},
    "xlora": {"adapters": {"a": "somewhere"}},
    "trainable_tokens": {"token_indices": [3, 5]},
    "cpt": {"cpt_token_ids": [3, 4, 5, 6], "cpt_mask": [1, 1, 1, 1], "cpt_tokens_type_mask": [1, 2, 3, 4]},
}
"""Fields that a method does not do without, or not on a base whose layers are 64 wide."""

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
