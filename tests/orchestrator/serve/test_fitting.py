"""Bases that packed rows are not for: each is answered one at a time, and as transformers' generate does."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import peft_dist
from orchestrator.serve.desired import EngineOptions
from orchestrator.serve.engines.batching import BatchingEngine
from orchestrator.serve.engines.engine import Generation
from orchestrator.serve.engines.engine_choice import engine_for
from orchestrator.serve.engines.fitting import sizes_for
from orchestrator.serve.engines.sequential import SequentialEngine
from tests.orchestrator.serve import adapter_zoo as zoo

SMALL = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "initializer_range": 0.3, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
    "max_position_embeddings": 64,
}  # fmt: skip
HEADS = {"num_key_value_heads": 2, "head_dim": 8}
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8}
EXPERTS = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 16,
}
LAYERS = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}

PACKED = {
    "qwen3": HEADS,
    "gemma2": {**HEADS, **LAYERS, "query_pre_attn_scalar": 8},
    "gpt_neox": {},
}
ONE_AT_A_TIME = {
    # attention whose decoding is its own: a packed prompt alone does not show it
    "diffllama": HEADS,
    # keys and values of other widths than the configuration says of the cache's
    "deepseek_v3": {**LATENT, **EXPERTS, "first_k_dense_replace": 1},
    "deepseek_v2": {**LATENT, **EXPERTS, "first_k_dense_replace": 1},
    "jetmoe": {"num_key_value_heads": 2, "kv_channels": 8, "num_local_experts": 4},
    # layers that differ in width
    "gemma4_text": {**HEADS, **LAYERS, "global_head_dim": 16, "hidden_size_per_layer_input": 8,
                    "vocab_size_per_layer_input": 64, "num_kv_shared_layers": 0},
    # scores of attention that no kernel is told of
    "gpt_oss": {**HEADS, "num_local_experts": 4, "num_experts_per_tok": 2, "layer_types": ["full_attention"] * 2},
}  # fmt: skip


def base_of(kind: str) -> torch.nn.Module:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **SMALL, **(PACKED | ONE_AT_A_TIME)[kind])
    model = AutoModelForCausalLM.from_config(config).float().eval()
    for parameter in model.parameters():  # what begins as zeros and ones is to matter
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.generation_config.eos_token_id = None
    return model


@pytest.mark.parametrize("kind", [*PACKED, *ONE_AT_A_TIME])
def test_a_base_runs_in_packed_rows_only_where_its_numbers_stay_its_own(kind, tmp_path):
    config = peft_dist.LoraConfig(
        r=2, target_modules=["o_proj", "dense", "output_linear"], task_type="CAUSAL_LM"
    )
    adapted = None
    if any(name.endswith(("o_proj", "dense")) for name, _ in base_of(kind).named_modules()):
        adapted = peft_dist.get_peft_model(base_of(kind), config)
        zoo.move(adapted, 1)
        adapted.save_pretrained(tmp_path)
    prompts = [zoo.prompt_of(seed) for seed in range(3)]
    wanted = [zoo.answer(base_of(kind), prompt, 12) for prompt in prompts]
    wanted += [zoo.answer(adapted.eval(), prompt, 12) for prompt in prompts] if adapted else []
    loaded = SimpleNamespace(model=base_of(kind), max_context=40, eos_ids=frozenset())
    decode = SimpleNamespace(decode=lambda ids: "".join(chr(256 + token) for token in ids))
    engine = engine_for(loaded, decode, EngineOptions())

    async def said(prompt, key):
        pieces = [piece.text async for piece in engine.generate(Generation(prompt, key, 12))]
        return tuple(ord(letter) - 256 for letter in "".join(pieces))

    async def all_at_once():
        if adapted:
            await engine.load("a", tmp_path)
        keys = [None, "a"] if adapted else [None]
        return await asyncio.gather(*(said(prompt, key) for key in keys for prompt in prompts))

    try:
        assert asyncio.run(all_at_once()) == wanted
    finally:
        engine.close()
    assert type(engine) is (BatchingEngine if kind in PACKED else SequentialEngine)


def test_a_base_that_was_tried_holds_nothing_of_it():
    engine = BatchingEngine(base_of("qwen3"), str, frozenset(), 40)
    try:
        assert engine._batches.num_sequences == 0 and engine._batches.shared_tokens == 0
        assert engine._batches.free_share == 1
    finally:
        engine.close()


def test_the_caches_size_counts_each_layers_own_width():
    room = {"max_context": 40, "max_sequences": 10_000, "max_batch_tokens": None}
    tokens = {}
    for kind in ("qwen3", "gemma4_text"):
        sizes = sizes_for(base_of(kind), **room, cache_bytes=10**6)
        tokens[kind] = sizes.num_blocks * sizes.page_size
    both = 2 * 2 * 4  # keys and values, heads, bytes
    assert tokens["qwen3"] == -(-(10**6 // (both * (8 + 8))) // 16) * 16
    assert tokens["gemma4_text"] == -(-(10**6 // (both * (8 + 16))) // 16) * 16
