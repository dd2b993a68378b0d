"""What is read of transformers' continuous batching is there, and does what the engine takes it to do."""

import inspect

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)
from transformers.generation.continuous_batching.cache import PagedAttentionCache
from transformers.generation.continuous_batching.input_outputs import ContinuousBatchingIOs
from transformers.generation.continuous_batching.requests import RequestState
from transformers.generation.continuous_batching.scheduler import FIFOScheduler

from orchestrator.serve.engines import continuous
from orchestrator.serve.engines.continuous import ContinuousBatches, Sizes, salted

LLAMA = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.3, "eos_token_id": None,
}  # fmt: skip


def llama():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**LLAMA)).eval()


def windowed():
    torch.manual_seed(0)
    return MistralForCausalLM(MistralConfig(**LLAMA, sliding_window=8)).eval()


def gpt2():
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=128, initializer_range=0.3)
    return GPT2LMHeadModel(config).eval()


def prompts(num=5, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return {f"s{i}": torch.randint(64, (3 + 9 * i,), generator=generator).tolist() for i in range(num)}


def alone(model, prompt, num):
    ids = torch.tensor([prompt])
    out = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=num, do_sample=False, eos_token_id=None,
        pad_token_id=0,
    )  # fmt: skip
    return out[0, len(prompt) :].tolist()


def together(model, batches, asked, num, salts=None):
    """Greedy tokens of all sequences, which are added at once."""
    said = {name: [] for name in asked}
    for name, prompt in asked.items():
        batches.add(name, prompt, (salts or {}).get(name, ""))
    with torch.inference_mode():
        while (step := batches.next_step(str)) is not None:
            tokens = model(**step.inputs).logits[0].argmax(-1).tolist()
            new = dict(zip([part.sequence for part in step.parts if part.is_last], tokens, strict=True))
            batches.take(step, new)
            for name, token in new.items():
                said[name].append(token)
                if len(said[name]) == num:
                    batches.finish(name)
    return said


@pytest.mark.parametrize("base", [llama, windowed, gpt2])
def test_packed_sequences_say_what_each_says_alone(base):
    asked = prompts()
    wanted = {name: alone(base(), prompt, 14) for name, prompt in asked.items()}
    model = base()
    batches = ContinuousBatches(model, Sizes(num_blocks=64, page_size=16, max_batch_tokens=32))
    assert together(model, batches, asked, 14) == wanted
    assert batches.num_sequences == 0


def test_a_full_cache_puts_the_newest_back_and_nothing_is_lost():
    asked = prompts()
    wanted = {name: alone(llama(), prompt, 20) for name, prompt in asked.items()}
    model = llama()
    # All five would need 18 blocks.
    batches = ContinuousBatches(model, Sizes(num_blocks=9, page_size=8, max_batch_tokens=32))
    assert together(model, batches, asked, 20) == wanted


def test_sequences_share_blocks_of_one_salt_only():
    prompt = torch.arange(40).tolist()
    for salts, shared in (({"a": "x", "b": "x"}, 32), ({"a": "x", "b": "y"}, 0)):
        model = llama()
        batches = ContinuousBatches(model, Sizes(num_blocks=64, page_size=16, max_batch_tokens=64))
        for name, salt in salts.items():
            together(model, batches, {name: prompt}, 2, {name: salt})
        assert batches.shared_tokens == shared


def test_a_salt_changes_four_tokens_of_the_first_block_and_comes_off_again():
    tokens = list(range(20))
    assert salted(tokens, "a")[4:] == tokens[4:] and salted(tokens, "a") != salted(tokens, "b")
    assert salted(salted(tokens, "a"), "a") == tokens
    assert all(-(2**31) <= token < 2**31 for token in salted(tokens, "a"))


def test_a_sequence_that_is_finished_early_leaves_its_blocks():
    model = llama()
    batches = ContinuousBatches(model, Sizes(num_blocks=16, page_size=8, max_batch_tokens=16))
    free = batches.free_share
    batches.add("a", list(range(30)), "")
    batches.add("b", list(range(30)), "")
    with torch.inference_mode():
        step = batches.next_step(str)
        model(**step.inputs)
    batches.finish("a")
    batches.finish("b")
    batches.take(step, {})
    assert batches.num_sequences == 0 and batches.next_step(str) is None
    batches._cache.evict_cached_blocks()
    batches._cache.pool.try_to_free_sectors()
    assert batches.free_share == free


def test_no_dense_mask_is_kept():
    model = llama()
    batches = ContinuousBatches(model, Sizes(num_blocks=4096, page_size=16, max_batch_tokens=256))
    assert batches._inputs.attention_mask is None


def test_a_model_whose_attention_cannot_be_replaced_is_refused():
    model = llama()
    model._supports_attention_backend = False
    with pytest.raises(continuous.UnfitBase, match="does not let its attention be replaced"):
        ContinuousBatches(model, Sizes(num_blocks=16))


def test_the_insides_that_are_read_are_there():
    """Where one of these fails after an upgrade, continuous.py is what is to be looked at."""
    wanted = {
        PagedAttentionCache.search_prefix_match: ["request_id", "prompt_ids"],
        PagedAttentionCache.mark_complete_blocks: ["state", "complete_blocks"],
        PagedAttentionCache.update: ["key_states", "value_states", "layer_idx", "kwargs"],
        FIFOScheduler.schedule_batch: ["token_budget", "cache_budget"],
        ContinuousBatchingIOs.prepare_batch_tensors: [
            "requests_in_batch", "logits_processors", "use_decode_fast_path", "num_q_tokens", "max_kv_read",
            "use_padding",
        ],
    }  # fmt: skip
    for function, names in wanted.items():
        assert list(inspect.signature(function).parameters)[1:] == names
    state = RequestState(request_id="a", initial_tokens=[1])
    for name in ("initial_tokens", "generated_tokens", "tokens_to_process", "position_offset", "status"):
        assert hasattr(state, name)


def test_late_prompts_are_read_behind_others_a_few_tokens_a_step():
    asked = {"late1": list(range(30)), "late2": list(range(5, 35)), "s1": list(range(20)), "s2": [3, 4, 5]}
    wanted = {name: alone(llama(), prompt, 6) for name, prompt in asked.items()}
    model = llama()
    batches = ContinuousBatches(model, Sizes(num_blocks=64, page_size=16, max_batch_tokens=64))
    for name, prompt in asked.items():
        batches.add(name, prompt, "")
    said: dict[str, list[int]] = {name: [] for name in asked}
    steps = []
    with torch.inference_mode():
        while (step := batches.next_step(str, lambda name: name.startswith("late"), 7)) is not None:
            steps.append({part.sequence: part.length for part in step.parts})
            tokens = model(**step.inputs).logits[0].argmax(-1).tolist()
            new = dict(zip([part.sequence for part in step.parts if part.is_last], tokens, strict=True))
            batches.take(step, new)
            for name, token in new.items():
                said[name].append(token)
                if len(said[name]) == 6:
                    batches.finish(name)
    assert said == wanted
    assert steps[0] == {"s1": 20, "s2": 3, "late1": 7}
    of_late = [sum(num for name, num in step.items() if name.startswith("late")) for step in steps]
    # One more where all of it goes to what is said already.
    assert max(of_late) == 7 and min(of_late[:8]) >= 6
