"""The prompt methods' modules on their own, beside HF PEFT's: the same names and shapes of their tensors, and with
the same values the same tokens.
"""

from __future__ import annotations

import warnings

import peft
import pytest
import torch
from torch import nn
from transformers.modeling_outputs import CausalLMOutput

import peft_dist
from peft_dist.errors import ConfigError, RowsError
from peft_dist.prompt_encoders import BasePromptEncoder
from tests.contract import bases

SIZES = {
    "num_virtual_tokens": 4,
    "token_dim": 16,
    "num_transformer_submodules": 2,
    "num_attention_heads": 2,
    "num_layers": 3,
    "encoder_hidden_size": 8,
}
KINDS = {
    "PromptEncoder by an MLP": ("PromptEncoder", "PromptEncoderConfig", {}),
    "PromptEncoder by an LSTM": (
        "PromptEncoder",
        "PromptEncoderConfig",
        {"encoder_reparameterization_type": "LSTM", "encoder_num_layers": 3},
    ),
    "PrefixEncoder": ("PrefixEncoder", "PrefixTuningConfig", {}),
    "PrefixEncoder by an MLP": ("PrefixEncoder", "PrefixTuningConfig", {"prefix_projection": True}),
    "PromptEmbedding": ("PromptEmbedding", "PromptTuningConfig", {}),
    "MultitaskPromptEmbedding": ("MultitaskPromptEmbedding", "MultitaskPromptTuningConfig", {"num_tasks": 3}),
    "CPTEmbedding": (
        "CPTEmbedding",
        "CPTConfig",
        {"cpt_token_ids": [5, 6, 7, 8], "cpt_tokens_type_mask": [1, 2, 3, 4], "task_type": "CAUSAL_LM"},
    ),
}


def config(library, name: str, values: dict):
    mine = {"num_virtual_tokens": 4} if name == "CPTConfig" else dict(SIZES)
    if "Encoder" not in name and name != "PrefixTuningConfig":
        mine.pop("encoder_hidden_size", None)
    made = getattr(library, name)(**{**mine, **values})
    if name == "CPTConfig":
        made.token_dim = 16
    return made


def made(library, kind: str, **more):
    name, config_name, values = KINDS[kind]
    words = (nn.Embedding(64, 16),) if "Embedding" in name else ()
    where = peft.tuners if library is peft else peft_dist.prompt_encoders
    return getattr(where, name)(config(library, config_name, {**values, **more}), *words)


@pytest.mark.parametrize("kind", KINDS)
def test_a_module_alone_is_theirs(kind) -> None:
    mine, theirs = made(peft_dist, kind).double().eval(), made(peft, kind).double().eval()
    assert isinstance(mine, BasePromptEncoder) and isinstance(
        mine, peft_dist.tuners.tuners_utils.BasePromptEncoder
    )
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(torch.randn_like(p))
    shapes = [{k: tuple(t.shape) for k, t in m.state_dict().items()} for m in (mine, theirs)]
    assert shapes[0] == shapes[1]
    assert [n for n, p in mine.named_parameters() if p.requires_grad] == [
        n for n, p in theirs.named_parameters() if p.requires_grad
    ]
    mine.load_state_dict(theirs.state_dict())
    total = 4 if kind.startswith(("Prefix", "CPT")) else 8
    for asked in (torch.arange(total), torch.tensor([2, 0, 1])):
        indices = asked.expand(2, -1)
        if kind.startswith("Multitask"):
            if len(asked) != total:
                continue
            tasks = torch.tensor([2, 0])
            got, wanted = mine(indices, tasks), theirs(indices, tasks)
        else:
            got, wanted = mine(indices), theirs(indices)
        assert got.shape == (2, len(asked), 16 * (6 if kind.startswith("Prefix") else 1))
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)
    rows = torch.stack([torch.arange(total), torch.arange(total).flip(0)])
    if not kind.startswith("Multitask"):
        torch.testing.assert_close(mine(rows), theirs(rows), rtol=1e-9, atol=1e-9)


def test_the_attributes_that_are_documented() -> None:
    encoder = made(peft_dist, "PromptEncoder by an LSTM")
    for name in ("token_dim", "input_size", "output_size"):
        assert getattr(encoder, name) == 16
    assert (encoder.hidden_size, encoder.total_virtual_tokens, encoder.encoder_type) == (8, 8, "LSTM")
    assert type(encoder.lstm_head) is nn.LSTM and type(encoder.mlp_head) is nn.Sequential
    assert type(encoder.embedding) is nn.Embedding
    bare = made(peft_dist, "PromptEncoder by an LSTM", inference_mode=True)
    assert not hasattr(bare, "mlp_head") and not hasattr(bare, "lstm_head")
    with pytest.warns(UserWarning, match="encoder_num_layers: 5 is ignored for MLP"):
        made(peft_dist, "PromptEncoder by an MLP", encoder_num_layers=5)
    prefix = made(peft_dist, "PrefixEncoder by an MLP")
    assert prefix.prefix_projection and type(prefix.transform) is nn.Sequential
    assert not hasattr(made(peft_dist, "PrefixEncoder by an MLP", inference_mode=True), "transform")


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_makes_the_same_tokens(kind) -> None:
    """The module and the model's adapter are one mathematics: same tensors, same file."""
    if kind == "MultitaskPromptEmbedding":
        return
    alone = made(peft_dist, kind).eval()
    name, config_name, values = KINDS[kind]
    given = {"num_virtual_tokens": 4, "task_type": "CAUSAL_LM", **values}
    if "Encoder" in name:
        given["encoder_hidden_size"] = 8
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft_dist.get_peft_model(bases.llama(), getattr(peft_dist, config_name)(**given))
    tokens = 4
    if name == "PrefixEncoder":
        alone.config.num_layers = 2
        alone = type(alone)(alone.config).eval()
    elif name != "CPTEmbedding":
        alone.config.num_transformer_submodules = 1
        words = (nn.Embedding(64, 16),) if "Embedding" in name else ()
        alone = type(alone)(alone.config, *words).eval()
    mine = {
        n.removeprefix("prompt_encoder.default."): p
        for n, p in model.named_parameters()
        if "prompt_encoder" in n
    }
    with torch.no_grad():
        for key, p in alone.named_parameters():
            mine[key].copy_(p)
    saved = peft_dist.get_peft_model_state_dict(model)["prompt_embeddings"]
    torch.testing.assert_close(saved, alone(torch.arange(tokens)[None])[0].detach(), rtol=1e-6, atol=1e-7)


def test_starts_from_the_vocabulary() -> None:
    words = nn.Embedding(64, 16)
    sampled = peft_dist.PromptEmbedding(
        config(peft_dist, "PromptTuningConfig", {"prompt_tuning_init": "SAMPLE_VOCAB"}), words
    )
    assert all((words.weight == row).all(1).any() for row in sampled.embedding.weight)
    kept = peft_dist.PromptEmbedding(
        config(
            peft_dist, "PromptTuningConfig", {"prompt_tuning_init": "SAMPLE_VOCAB", "inference_mode": True}
        ),
        words,
    )
    assert not any((words.weight == row).all(1).any() for row in kept.embedding.weight)


def test_cpt_projects_and_counts_as_theirs() -> None:
    values = {**KINDS["CPTEmbedding"][2], "opt_weighted_loss_type": "decay", "opt_loss_decay_factor": 0.5}
    ours, theirs = (config(library, "CPTConfig", values) for library in (peft_dist, peft))
    mine, other = made(peft_dist, "CPTEmbedding"), made(peft, "CPTEmbedding")
    delta = torch.randn(4, 16)
    with torch.no_grad():
        mine.delta_embedding.weight.copy_(delta), other.delta_embedding.weight.copy_(delta)
    torch.testing.assert_close(mine.get_projection(), other.get_projection())
    logits, labels = torch.randn(2, 9, 12), torch.randint(0, 12, (2, 9))
    kinds = torch.tensor([[1, 2, 3, 4, 4, 5, 6, 8, 12], [1, 2, 4, 8, 8, 12, 12, 0, 0]])
    labels = labels.masked_fill((kinds == 0) | (kinds % 4 != 0), -100)
    losses = [
        library.CPTEmbedding.calculate_loss(
            CausalLMOutput(logits=logits), labels.clone(), kinds.clone(), made_config
        ).loss
        for library, made_config in ((peft_dist, ours), (peft, theirs))
    ]
    torch.testing.assert_close(losses[0], losses[1])


def test_what_a_module_is_not_given_is_said() -> None:
    with pytest.raises(
        ConfigError, match="PromptEncoder: needs the config of its prompt method, with token_dim"
    ):
        peft_dist.PromptEncoder(peft_dist.PromptEncoderConfig(num_virtual_tokens=2))
    with pytest.raises(ConfigError, match="needs a config with num_layers"):
        peft_dist.PrefixEncoder(peft_dist.PrefixTuningConfig(num_virtual_tokens=2, token_dim=4))
    with pytest.raises(ConfigError, match="do not say the MLP of prefix_projection"):
        made(peft_dist, "PrefixEncoder by an MLP").load_prompt_embeddings(torch.zeros(4, 96))
    prefix = made(peft_dist, "PrefixEncoder")
    with pytest.raises(ConfigError, match=r"\(4, 9\); this prefix has \(4, 96\)"):
        prefix.load_prompt_embeddings(torch.zeros(4, 9))
    prefix.load_prompt_embeddings(torch.ones(4, 96))
    assert (prefix(torch.arange(4)[None]) == 1).all()
    with pytest.raises(RowsError, match="task_ids: MultitaskPromptTuningConfig needs one for each sequence"):
        made(peft_dist, "MultitaskPromptEmbedding")(torch.arange(8)[None], None)


def test_the_mapping_names_them() -> None:
    for peft_type, name in (
        ("PROMPT_TUNING", "PromptEmbedding"),
        ("MULTITASK_PROMPT_TUNING", "MultitaskPromptEmbedding"),
        ("P_TUNING", "PromptEncoder"),
        ("PREFIX_TUNING", "PrefixEncoder"),
        ("CPT", "CPTEmbedding"),
    ):
        assert peft_dist.PEFT_TYPE_TO_TUNER_MAPPING[peft_type] is getattr(peft_dist.prompt_encoders, name)
