from functools import partial

import pytest
import torch
from safetensors.torch import save_file

import peft_dist
from peft_dist import MultitaskPromptTuningConfig
from peft_dist.errors import CheckpointError, ConfigError
from tests.contract import bases
from tests.contract.case import Case, Field, Parity
from tests.contract.vocabularies import counted, recorded, starts_from_text

_TASKS = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 4, "num_tasks": 3, "num_ranks": 2}
_ROWS = {"task_ids": [2, 0, 2]}
CASES = (Case("MULTITASK_PROMPT_TUNING", "random", _TASKS, ()),)
PARITY = {
    "multitask": Parity("llama", "MultitaskPromptTuningConfig", _TASKS, _ROWS),
    "multitask classifier": Parity(
        "classifier", "MultitaskPromptTuningConfig", {**_TASKS, "task_type": "SEQ_CLS"}, _ROWS
    ),
    "multitask on T5": Parity(
        "t5", "MultitaskPromptTuningConfig", {**_TASKS, "task_type": "SEQ_2_SEQ_LM"}, _ROWS
    ),
    "multitask on BART": Parity(
        "bart", "MultitaskPromptTuningConfig", {**_TASKS, "task_type": "SEQ_2_SEQ_LM"}, _ROWS
    ),
}

_GIVEN = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 3}
_PAIRED = {"task_type": "SEQ_2_SEQ_LM"}
_TEXT = {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "a", "tokenizer_name_or_path": "t"}
_from_text = partial(starts_from_text, MultitaskPromptTuningConfig)


def _from_source(tmp_path) -> None:
    """Starts from a source's file: all three kinds, and what is wrong with one."""
    source = peft_dist.get_peft_model(bases.llama(), MultitaskPromptTuningConfig(**_GIVEN, num_tasks=4))
    source.save_pretrained(tmp_path)
    theirs, path = peft_dist.get_peft_model_state_dict(source), str(tmp_path / "adapter_model.safetensors")

    def started(init: str, path: str | None = path, **more) -> dict:
        config = MultitaskPromptTuningConfig(
            **_GIVEN, prompt_tuning_init=init, prompt_tuning_init_state_dict_path=path, **more
        )
        return peft_dist.get_peft_model_state_dict(peft_dist.get_peft_model(bases.llama(), config))

    shared = started("ONLY_SOURCE_SHARED")
    assert torch.equal(shared["prompt_embeddings"], theirs["prompt_embeddings"])
    assert not torch.equal(shared["prefix_task_cols"][0], theirs["prefix_task_cols"].mean(0))
    mean, exact = started("AVERAGE_SOURCE_TASKS"), started("EXACT_SOURCE_TASK", prompt_tuning_init_task=2)
    for key in ("prefix_task_cols", "prefix_task_rows"):
        assert torch.equal(mean[key], theirs[key].mean(0, keepdim=True))
        assert torch.equal(exact[key], theirs[key][2:3])
    with pytest.raises(ConfigError, match="prompt_tuning_init_task: 4, but the source has 4 tasks"):
        started("EXACT_SOURCE_TASK", prompt_tuning_init_task=4)
    with pytest.raises(ConfigError, match="prompt_tuning_init_state_dict_path: must be given"):
        started("ONLY_SOURCE_SHARED", None)
    torch.save(theirs, tmp_path / "pickled.bin")
    with pytest.raises(CheckpointError, match="is no safetensors file; other formats are not read"):
        started("ONLY_SOURCE_SHARED", str(tmp_path / "pickled.bin"))
    with pytest.raises(
        CheckpointError, match=r"prefix_task_cols gives \(1, 3, 1\).*this prompt's is \(2, 3, 1\)"
    ):
        started("AVERAGE_SOURCE_TASKS", num_tasks=2)
    save_file({"other": torch.ones(1)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="has no prompt_embeddings; it is no multitask prompt"):
        started("ONLY_SOURCE_SHARED", str(tmp_path / "other.safetensors"))


FIELDS = {
    "num_virtual_tokens": lambda: counted(MultitaskPromptTuningConfig),
    "token_dim": Field(99, "error"),
    "num_transformer_submodules": (
        Field(1, "tensors", _PAIRED, base="t5"),
        Field(2, "error"),
        Field(3, "error", _PAIRED, base="t5"),
    ),
    **{
        field: partial(recorded, MultitaskPromptTuningConfig, field, 7, _GIVEN)
        for field in ("num_layers", "num_attention_heads")
    },
    "prompt_tuning_init": (_from_source, Field("SAMPLE_VOCAB", "error")),
    "prompt_tuning_init_state_dict_path": _from_source,
    "prompt_tuning_init_task": _from_source,
    "prompt_tuning_init_text": (lambda tmp_path: _from_text(tmp_path), Field(None, "error", _TEXT)),
    "tokenizer_name_or_path": (lambda tmp_path: _from_text(tmp_path), Field("", "error", _TEXT)),
    "tokenizer_kwargs": (lambda tmp_path: _from_text(tmp_path), Field({"a": 1}, "error")),
    "num_ranks": (Field(3, "tensors"), Field(0, "error")),
    "num_tasks": (Field(3, "tensors"), Field(0, "error")),
}
