"""Many adapters in one batch: each answers what it answers alone, whatever else is in the batch."""

from __future__ import annotations

import asyncio
import time
from contextlib import aclosing

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

import peft_dist
from orchestrator.serve.engines import batching
from orchestrator.serve.engines.batching import BatchingEngine
from orchestrator.serve.engines.continuous import _SaltedCache
from orchestrator.serve.engines.engine import AdapterRefused, EngineDead, Generation, ScoresNotFinite
from orchestrator.serve.engines.packed_base import PackedBase
from peft_dist.catalog import METHODS
from peft_dist.rows import BASE
from tests.orchestrator.serve import adapter_zoo as zoo

ANSWER = 10
LORA = {"r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM"}


def decode(ids) -> str:
    return "".join(chr(256 + token) for token in ids)


def tokens(text: str) -> tuple[int, ...]:
    return tuple(ord(letter) - 256 for letter in text)


def engine_of(kind: str = "llama", **options) -> BatchingEngine:
    return BatchingEngine(options.pop("model", None) or zoo.base(kind), decode, frozenset(), 60, **options)


@pytest.fixture
def engine():
    made = engine_of()
    yield made
    made.close()


async def said(engine, prompt, key=None, num=ANSWER, **options) -> tuple[int, ...]:
    request = Generation(tuple(prompt), key, num, **options)
    return tokens("".join([piece.text async for piece in engine.generate(request)]))


async def noted(engine, prompt, key=None, num=ANSWER, **options):
    request = Generation(tuple(prompt), key, num, logprobs=3, **options)
    return [note for piece in [p async for p in engine.generate(request)] for note in piece.logprobs]


def lora(folder, seed, **values):
    torch.manual_seed(seed)
    model = peft_dist.get_peft_model(zoo.base(), peft_dist.LoraConfig(**{**LORA, **values}))
    zoo.disturb(model, seed=seed)
    model.save_pretrained(folder)
    return folder


@pytest.mark.slow  # every method of the catalog, each with a model of its own for what it says alone
@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral", "qwen2_moe"])
def test_every_method_answers_in_one_batch_what_it_answers_alone(kind, tmp_path):
    """Our own model is asked, and HF PEFT's, from the same folders."""
    kept = zoo.kept(tmp_path, kind, ANSWER)
    bare = zoo.prompt_of(3)
    wanted = [zoo.answer(zoo.base(kind), bare, ANSWER), *(each.answer for each in kept)]
    engine = BatchingEngine(
        zoo.base(kind), decode, frozenset(), 30 if kind == "gpt2" else 60, max_batch_tokens=96
    )

    async def all_at_once():
        for number, each in enumerate(kept):
            await engine.load(f"k{number}", each.folder)
        return await asyncio.gather(
            said(engine, bare),
            *(said(engine, each.prompt, f"k{number}", task=each.task) for number, each in enumerate(kept)),
        )

    try:
        given = asyncio.run(all_at_once())
    finally:
        engine.close()
    labels = ["base", *(each.label for each in kept)]
    assert [label for label, a, b in zip(labels, given, wanted, strict=True) if a != b] == []
    theirs = [
        (each.label, zoo.answer_of_peft(kind, each, ANSWER), answer)
        for each, answer in zip(kept, given[1:], strict=True)
        if zoo.is_theirs(each)
    ]
    assert [label for label, their_answer, answer in theirs if their_answer != answer] == []
    if kind == "llama":
        assert len(kept) > 120 and len(theirs) > 115
        methods = {str(each.config.peft_type) for each in kept}
        assert methods == set(METHODS)


def test_one_adapter_answers_for_each_of_its_tasks(engine, tmp_path):
    """In one batch, also where the prompts are alike: neither neighbours nor cached prefixes are of another task."""
    prompt = tuple(range(1, 40))
    configs = {
        "poly": peft_dist.PolyConfig(r=4, n_tasks=3, task_type="CAUSAL_LM"),
        "multitask": peft_dist.MultitaskPromptTuningConfig(
            num_virtual_tokens=4, num_tasks=3, num_ranks=2, task_type="CAUSAL_LM"
        ),
    }
    wanted = {}
    for label, config in configs.items():
        model = peft_dist.get_peft_model(zoo.base(), config).eval()
        zoo.move(model, 1, 1.0)
        model.save_pretrained(tmp_path / label)
        wanted |= {(label, task): zoo.answer(model, prompt, ANSWER, task) for task in range(3)}

    async def run():
        for label in configs:
            await engine.load(label, tmp_path / label)
            assert engine.num_tasks(label) == 3
        keys = [*wanted, *reversed(wanted)]
        among = await asyncio.gather(*(said(engine, prompt, label, task=task) for label, task in keys))
        after = [await said(engine, prompt, label, task=task) for label, task in wanted]
        for task in (None, 3):
            with pytest.raises(ValueError, match="has 3, numbered from 0"):
                await said(engine, prompt, "poly", task=task)
        return dict(zip(keys, among, strict=True)), dict(zip(wanted, after, strict=True))

    among, after = asyncio.run(run())
    assert among == after == wanted
    assert len(set(wanted.values())) == 6 and engine.figures().cached_tokens > 0


def test_a_sum_with_an_adapter_of_tasks_is_the_sum_of_their_deltas(engine, tmp_path):
    (poly,) = zoo.kept(tmp_path, "llama", 1, lambda label: label == "poly")
    prompt = zoo.prompt_of(4)

    async def run():
        await engine.load("poly", poly.folder)
        await engine.load("lora", lora(tmp_path / "lora", 1))
        for name, parts in {"poly alone": [("poly", 1.0)], "both": [("poly", 1.0), ("lora", 0.5)]}.items():
            await engine.combine(name, parts)
            assert engine.num_tasks(name) == 3
        return [await said(engine, prompt, key, task=2) for key in ("poly", "poly alone", "both")]

    own, alone, both = asyncio.run(run())
    assert own == alone != both


def test_a_start_that_changes_the_base_leaves_it_to_the_others(engine, tmp_path):
    """And those that would change it alike share what they would change."""
    kept = zoo.kept(tmp_path, "llama", ANSWER, lambda label: label.startswith("loftq"))
    before = {name: t.clone() for name, t in zoo.base().state_dict().items()}

    async def run():
        for each in kept:
            await engine.load(each.label, each.folder)
        given = [await said(engine, each.prompt, each.label) for each in kept]
        layer = engine._base.model.layers[0].self_attn.q_proj
        return given, {label: method.change for label, method in layer.methods.items()}

    given, changes = asyncio.run(run())
    assert given == [each.answer for each in kept]
    assert changes["loftq"] is changes["loftq of the same"] is not changes["loftq of 8 bits, twice"]
    now = {name.replace(".base_layer", ""): t for name, t in engine._base.state_dict().items()}
    assert all(torch.equal(now[name], t) for name, t in before.items())


def test_a_mixture_runs_apart_while_others_go_on(tmp_path):
    """Long prompts in pieces, the batch in steps between them, with nothing left behind; one that is left stops."""
    (mixture,) = zoo.kept(tmp_path, "llama", 1, lambda label: label == "xlora")
    prompts = [tuple(range(1 + i, 41 + i)) for i in range(6)]
    alone = peft_dist.PeftModel.from_pretrained(zoo.uncached("llama"), mixture.folder).eval()
    wanted = [zoo.answer(alone, prompt, ANSWER) for prompt in prompts]
    engine = engine_of(max_batch_tokens=16, max_sequences=8)
    ended = []

    async def one(label, prompt, key=None):
        answer = await said(engine, prompt, key)
        ended.append(label)
        return answer

    async def run():
        await engine.load("mixture", mixture.folder)
        async with aclosing(engine.generate(Generation(prompts[0], "mixture", 20))) as pieces:
            await anext(pieces)
        return await asyncio.gather(
            *(one("mixture", prompt, "mixture") for prompt in prompts), one("base", zoo.prompt_of(1))
        )

    try:
        *given, base = asyncio.run(run())
        assert len(engine._lane) == engine.figures().running == 0
    finally:
        engine.close()
    assert given == wanted and base == zoo.answer(zoo.base(), zoo.prompt_of(1), ANSWER)
    assert ended.index("base") < 3


def test_a_mixture_has_no_weighted_sum(engine, tmp_path):
    (mixture,) = zoo.kept(tmp_path, "llama", 1, lambda label: label == "xlora")

    async def run():
        await engine.load("mixture", mixture.folder)
        await engine.load("lora", lora(tmp_path / "lora", 1))
        with pytest.raises(AdapterRefused, match="rows of its own, so it has no weighted sum"):
            await engine.combine("sum", [("lora", 0.5), ("mixture", 0.5)])

    asyncio.run(run())


def test_without_the_salt_a_prefix_of_one_adapter_answers_for_another(tmp_path, monkeypatch):
    """And with it, it does not."""
    prompt = tuple(range(1, 40))
    folders = [lora(tmp_path / f"{seed}", seed) for seed in (1, 2)]
    alone = [
        zoo.answer(peft_dist.PeftModel.from_pretrained(zoo.base(), folder).eval(), prompt, ANSWER)
        for folder in folders
    ]

    def one_after_the_other():
        engine = engine_of()

        async def run():
            for number, folder in enumerate(folders):
                await engine.load(f"k{number}", folder)
            return [await said(engine, prompt, f"k{number}") for number in range(2)]

        try:
            return asyncio.run(run())
        finally:
            engine.close()

    assert one_after_the_other() == alone
    monkeypatch.setattr(_SaltedCache, "search_prefix_match", _unsalted(_SaltedCache.search_prefix_match))
    monkeypatch.setattr(_SaltedCache, "mark_complete_blocks", _unsalted(_SaltedCache.mark_complete_blocks))
    assert one_after_the_other() != alone


def _unsalted(method):
    def run(self, *args):
        self.salts = dict.fromkeys(self.salts, "one for all")
        return method(self, *args)

    return run


def test_the_same_adapter_finds_its_prefix_again(engine, tmp_path):
    prompt = tuple(range(1, 40))

    async def twice():
        await engine.load("k", lora(tmp_path / "a", 1))
        return [await said(engine, prompt, "k") for _ in range(2)]

    first, second = asyncio.run(twice())
    assert first == second and engine.figures().cached_tokens == 32


def test_a_sum_of_adapters_is_the_sum_of_their_deltas(engine, tmp_path):
    folders = {name: lora(tmp_path / name, seed, r=2 + 2 * seed) for seed, name in enumerate("ab")}
    merged = peft_dist.PeftModel.from_pretrained(zoo.base(), folders["a"], adapter_name="a")
    merged.load_adapter(folders["b"], "b")
    merged.add_weighted_adapter(["a", "b"], [0.7, 0.3], "both", combination_type="cat")
    merged.set_adapter("both")
    prompt = zoo.prompt_of(5)

    async def run():
        for name, folder in folders.items():
            await engine.load(name, folder)
        await engine.combine("both", [("a", 0.7), ("b", 0.3)])
        one = await said(engine, prompt, "both")
        among = await asyncio.gather(
            said(engine, prompt, "both"),
            said(engine, prompt, "a"),
            said(engine, prompt, "b"),
            said(engine, prompt),
        )
        return one, among

    one, among = asyncio.run(run())
    assert one == among[0] == zoo.answer(merged.eval(), prompt, ANSWER)
    assert len(set(among)) == 4


def test_a_sum_with_what_does_not_add_is_refused(engine, tmp_path):
    kept = zoo.kept(tmp_path, "llama", 1, lambda label: label in ("ia3", "prompt"))

    async def run():
        await engine.load("lora", lora(tmp_path / "a", 1))
        for each in kept:
            await engine.load(each.label, each.folder)
        for each in kept:
            with pytest.raises(AdapterRefused, match="no weighted sum"):
                await engine.combine("sum", [("lora", 0.5), (each.label, 0.5)])

    asyncio.run(run())
    assert "sum" not in engine.loaded()


def test_a_seed_repeats_a_sequence_alone_and_in_a_batch(engine, tmp_path):
    prompt = zoo.prompt_of(2)
    drawn = {"temperature": 1.0, "top_p": 0.9, "seed": 7}

    async def run():
        await engine.load("k", lora(tmp_path / "a", 1))
        alone = await said(engine, prompt, "k", **drawn)
        others = [said(engine, zoo.prompt_of(i), "k" if i % 2 else None, temperature=1.0) for i in range(6)]
        among, *_ = await asyncio.gather(said(engine, prompt, "k", **drawn), *others)
        return alone, among, await said(engine, prompt, "k", **{**drawn, "seed": 8})

    alone, among, other = asyncio.run(run())
    assert alone == among != other


def test_log_probabilities_are_the_models_own(engine):
    prompt = zoo.prompt_of(2)
    notes = asyncio.run(noted(engine, prompt, temperature=0.7, seed=1))
    ids = torch.tensor([[*prompt, *(note.token for note in notes)]])
    with torch.no_grad():
        wanted = zoo.base()(ids).logits[0].log_softmax(-1)[len(prompt) - 1 : -1]
    for note, row in zip(notes, wanted, strict=True):
        assert note.logprob == pytest.approx(float(row[note.token]), abs=1e-4)
        assert [token for token, _ in note.top] == row.topk(3).indices.tolist()


def test_in_bf16_scores_are_those_of_one_adapter_within_its_precision(tmp_path):
    folders = [lora(tmp_path / f"{seed}", seed, r=4 * seed) for seed in (1, 2, 3)]
    prompt = zoo.prompt_of(4)
    engine = engine_of(model=zoo.base().to(torch.bfloat16))

    async def run():
        for number, folder in enumerate(folders):
            await engine.load(f"k{number}", folder)
        return await asyncio.gather(
            *(noted(engine, prompt, f"k{number}", 1) for number in range(3)), noted(engine, prompt, None, 1)
        )

    try:
        given = asyncio.run(run())
    finally:
        engine.close()
    for folder, (note,) in zip(folders, given, strict=False):
        alone = peft_dist.PeftModel.from_pretrained(zoo.base(), folder).eval()
        with torch.no_grad():
            row = alone(torch.tensor([prompt])).logits[0, -1].log_softmax(-1)
        assert note.logprob == pytest.approx(float(row[note.token]), abs=0.15)


@pytest.mark.parametrize(
    "values", [{"modules_to_save": ["lm_head"]}, {"target_modules": ["q_proj", "lm_head"]}]
)
@pytest.mark.parametrize("deterministic", [False, True])
def test_a_step_in_which_nobodys_prompt_ends_asks_nothing_of_the_head(tmp_path, values, deterministic):
    """A prompt of several steps, where an adapter has a head of its own, or a part of it."""
    prompt = zoo.prompt_of(3) * 3
    folder = lora(tmp_path / "a", 1, **values)
    engine = engine_of(max_batch_tokens=8, deterministic=deterministic)

    async def run():
        await engine.load("a", folder)
        return [await said(engine, prompt, key) for key in (None, "a")]

    try:
        given = asyncio.run(run())
    finally:
        engine.close()
    adapted = peft_dist.PeftModel.from_pretrained(zoo.base(), folder).eval()
    assert given == [zoo.answer(model, prompt, ANSWER) for model in (zoo.base(), adapted)]
    assert given[0] != given[1]


@pytest.mark.parametrize("kind", ["llama", "mixtral", "qwen2_moe"])
def test_deterministic_log_probabilities_are_equal_to_the_bit(kind, tmp_path):
    """Of a mixture too, whose experts each have another number of a batch's tokens."""
    labels = (
        "lora",
        "dora",
        "poly",
        "multitask",
        "loftq",
        "xlora",
        "ia3",
        "oft",
        "loha",
        "vera",
        "prompt",
        "prefix",
        "ln tuning",
        "lora with a head",
    )
    kept = zoo.kept(tmp_path, kind, 1, lambda label: kind != "llama" or label in labels)
    assert kept and (kind != "llama" or len(kept) == len(labels))
    engine = engine_of(kind, deterministic=True, max_batch_tokens=24)

    async def run():
        for each in kept:
            await engine.load(each.label, each.folder)
        keys = [(None, None), *((each.label, each.task) for each in kept)]

        def asked():
            prompts = [zoo.prompt_of(i) * 2 for i in range(len(keys))]
            return [
                noted(engine, prompt, key, 6, task=task)
                for prompt, (key, task) in zip(prompts, keys, strict=True)
            ]

        alone = [await each for each in asked()]
        among = await asyncio.gather(
            *asked(),
            *(
                noted(engine, zoo.prompt_of(30 + i) * 2, kept[0].label, 9, task=kept[0].task)
                for i in range(5)
            ),
        )
        return alone, among[: len(keys)]

    try:
        alone, among = asyncio.run(run())
    finally:
        engine.close()
    assert alone == list(among)


def test_deterministic_is_for_fp32_on_a_cpu():
    with pytest.raises(ValueError, match="deterministic: is for fp32 on a CPU"):
        engine_of(model=zoo.base().to(torch.bfloat16), deterministic=True)


def test_adapters_come_and_go_while_others_run(engine, tmp_path):
    folders = [lora(tmp_path / f"{seed}", seed) for seed in range(3)]
    prompt = zoo.prompt_of(1)

    async def run():
        await engine.load("stays", folders[0])
        wanted = await said(engine, prompt, "stays", 40)
        running = [asyncio.ensure_future(said(engine, prompt, "stays", 40)) for _ in range(3)]
        for turn in range(4):
            await asyncio.gather(
                *(engine.load(f"k{turn}", folders[1]) for _ in range(3)), engine.load("x", folders[2])
            )
            await said(engine, prompt, f"k{turn}", 2)
            await asyncio.gather(engine.unload(f"k{turn}"), engine.unload("x"))
        return wanted, await asyncio.gather(*running)

    wanted, given = asyncio.run(run())
    assert set(given) == {wanted} and engine.loaded() == {"stays"}


def test_an_adapter_that_leaves_answers_those_that_asked_before(engine, tmp_path):
    prompt = zoo.prompt_of(1)

    async def run():
        await engine.load("k", lora(tmp_path / "a", 1))
        wanted = await said(engine, prompt, "k", 30)
        running = asyncio.ensure_future(said(engine, prompt, "k", 30))
        await asyncio.sleep(0)
        leaving = asyncio.ensure_future(engine.unload("k"))
        await asyncio.sleep(0)
        with pytest.raises(AdapterRefused, match="not loaded"):
            await said(engine, prompt, "k")
        assert await running == wanted
        await leaving
        # The same key again, with other weights: nothing of the old ones is left.
        await engine.load("k", lora(tmp_path / "b", 2))
        return wanted, await said(engine, prompt, "k", 30)

    first, second = asyncio.run(run())
    alone = peft_dist.PeftModel.from_pretrained(zoo.base(), tmp_path / "b").eval()
    assert second == zoo.answer(alone, prompt, 30) != first


def test_closing_a_generation_stops_it_within_a_step(engine):
    steps = []
    engine._base.register_forward_hook(lambda *_: steps.append(1))

    async def run():
        async with aclosing(engine.generate(Generation(zoo.prompt_of(1), None, 50))) as pieces:
            for _ in range(3):
                await anext(pieces)
        await said(engine, zoo.prompt_of(2), num=1)

    asyncio.run(run())
    assert len(steps) < 12 and engine.figures().running == 0


def test_turns_go_to_the_queue_that_was_served_least():
    engine = engine_of(max_sequences=2)
    ended = []

    async def one(queue, number):
        await said(engine, zoo.prompt_of(number), num=8, queue=queue)
        ended.append(queue)

    async def run():
        flood = [asyncio.ensure_future(one("flood", number)) for number in range(12)]
        await asyncio.sleep(0)
        await one("calm", 3)
        await asyncio.gather(*flood)

    try:
        asyncio.run(run())
    finally:
        engine.close()
    assert ended.index("calm") <= 4


def test_what_cannot_be_served_right_is_refused_with_the_reason(engine, tmp_path):
    good = lora(tmp_path / "good", 1)
    broken = lora(tmp_path / "nan", 1)
    weights = load_file(broken / "adapter_model.safetensors")
    key = next(iter(weights))
    save_file({**weights, key: weights[key] * float("nan")}, broken / "adapter_model.safetensors")
    more = lora(tmp_path / "more", 1)
    save_file(
        {**weights, "base_model.model.nowhere.lora_A.weight": torch.ones(2)},
        more / "adapter_model.safetensors",
    )
    other = tmp_path / "other"
    torch.manual_seed(0)
    large = peft_dist.get_peft_model(zoo.bases.grouped(), peft_dist.LoraConfig(**LORA))
    large.save_pretrained(other)
    reasons = {
        broken: "not finite",
        more: "nowhere",
        other: "size|shape|fit",
        tmp_path / "none": "is not a directory",
    }

    async def run():
        await engine.load("good", good)
        wanted = await said(engine, zoo.prompt_of(1), "good")
        for folder, reason in reasons.items():
            with pytest.raises(AdapterRefused, match=reason):
                await engine.load("bad", folder)
        return wanted, await said(engine, zoo.prompt_of(1), "good")

    before, after = asyncio.run(run())
    assert before == after and engine.loaded() == {"good"}


def test_stop_strings_end_an_answer(engine):
    prompt = zoo.prompt_of(1)
    whole = decode(asyncio.run(said(engine, prompt, num=8)))
    stop = whole[3:5]

    async def run():
        return [piece async for piece in engine.generate(Generation(prompt, None, 8, stop=(stop,)))]

    pieces = asyncio.run(run())
    assert "".join(piece.text for piece in pieces) == whole[: whole.index(stop)]
    assert pieces[-1].finish_reason == "stop"


def test_what_does_not_fit_the_context_is_refused(engine):
    with pytest.raises(ValueError, match="do not fit the context of 60"):
        asyncio.run(said(engine, range(1, 60), num=10))


def test_a_dead_thread_is_told():
    engine = engine_of()
    engine.close()
    with pytest.raises(EngineDead):
        engine.check()
    with pytest.raises(EngineDead):
        asyncio.run(said(engine, zoo.prompt_of(1)))


def test_scores_that_are_no_numbers_end_their_sequence_and_no_other(engine, tmp_path, monkeypatch):
    lora(tmp_path / "a", 1)
    prompt, scores = zoo.prompt_of(5), PackedBase.scores

    def overflowing(self, rows, inputs):
        """The adapter's, from its fourth token on."""
        given = scores(self, rows, inputs)
        for row, part in enumerate(rows.kept):
            if rows.adapters[part] != BASE and rows.starts[part] > len(prompt) + 1:
                given[row, 7] = float("nan")
        return given

    async def run():
        await engine.load("a", tmp_path / "a")
        alone = await said(engine, prompt)
        monkeypatch.setattr(PackedBase, "scores", overflowing)
        broken, beside = await asyncio.gather(
            said(engine, prompt, "a"), said(engine, prompt), return_exceptions=True
        )
        assert isinstance(broken, ScoresNotFinite)
        assert beside == alone
        monkeypatch.undo()
        assert len(await said(engine, prompt, "a")) == ANSWER, "it left nothing behind"

    asyncio.run(run())


@pytest.mark.parametrize("temperature", [5e-324, 1e-45, 1e-38, 1e-6])
def test_the_smallest_temperatures_take_the_likeliest_and_harm_nobody(engine, temperature):
    prompt = zoo.prompt_of(5)

    async def run():
        alone = await said(engine, prompt)
        drawn, beside = await asyncio.gather(
            said(engine, prompt, temperature=temperature, seed=1), said(engine, prompt)
        )
        assert drawn == beside == alone

    asyncio.run(run())


def test_a_sequence_of_which_nothing_is_left_to_draw_by_ends_and_no_other():
    """The base's own defaults may leave no token at all: here every word is a bad one."""
    model = zoo.base()
    model.generation_config.bad_words_ids = [[word] for word in range(64)]
    engine = engine_of(model=model)
    prompt = zoo.prompt_of(5)

    async def run():
        drawn, taken = await asyncio.gather(
            said(engine, prompt, temperature=1.0), said(engine, prompt), return_exceptions=True
        )
        assert isinstance(drawn, ScoresNotFinite)
        assert len(taken) == ANSWER

    try:
        asyncio.run(run())
    finally:
        engine.close()


def test_what_runs_ends_with_the_engine(engine):
    async def run():
        running = asyncio.ensure_future(said(engine, zoo.prompt_of(1), num=50))
        await asyncio.sleep(0.05)
        await asyncio.to_thread(engine.close)
        with pytest.raises(EngineDead):
            await running

    asyncio.run(run())
    began = time.monotonic()
    while engine._thread.is_alive():
        assert time.monotonic() - began < 10


@pytest.mark.parametrize("bits", ["int8", "nf4"])
def test_quantised_bases_serve_mixed_batches_too(bits, tmp_path):
    config = zoo.bases.eight_bit() if bits == "int8" else zoo.bases.four_bit()
    sizes = {**zoo.bases.LLAMA, "hidden_size": 64, "intermediate_size": 128}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(tmp_path / "base")

    def base():
        model = LlamaForCausalLM.from_pretrained(
            tmp_path / "base", quantization_config=config, dtype=torch.float32
        )
        model.generation_config.eos_token_id = None
        return model.eval()

    configs = {
        "lora": peft_dist.LoraConfig(**LORA),
        "wide": peft_dist.LoraConfig(**{**LORA, "r": 12}),
        "ia3": peft_dist.IA3Config(
            target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"
        ),
        "prompt": peft_dist.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
        "poly": peft_dist.PolyConfig(
            r=4, n_tasks=3, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"
        ),
    }
    tasks = {"poly": 2}
    # Activations are rounded to int8 too, so that two tokens as likely as each other say nothing.
    seeds = {label: number for number, label in enumerate([*configs, "base"])} | {"poly": 3}
    prompts = {label: zoo.prompt_of(seed) for label, seed in seeds.items()}
    wanted = {"base": zoo.answer(base(), prompts["base"], ANSWER)}
    for seed, (label, of) in enumerate(configs.items()):
        torch.manual_seed(seed)
        model = peft_dist.get_peft_model(base(), of).eval()
        zoo.disturb(model, seed=seed, size=0.2)
        model.save_pretrained(tmp_path / label)
        wanted[label] = zoo.answer(model, prompts[label], ANSWER, tasks.get(label))
    engine = engine_of(model=base())

    async def run():
        for label in configs:
            await engine.load(label, tmp_path / label)
        keys = [*configs, None]
        return await asyncio.gather(
            *(said(engine, prompts[key or "base"], key, task=tasks.get(key)) for key in keys)
        )

    try:
        given = dict(zip([*configs, "base"], asyncio.run(run()), strict=True))
    finally:
        engine.close()
    assert given == wanted


PREFIX = {"num_virtual_tokens": 3, "task_type": "CAUSAL_LM"}


def test_an_adapter_comes_and_goes_a_little_between_each_two_steps(tmp_path, monkeypatch):
    """With no time between steps they go on after each layer, and nobody's answer is another one for it."""
    monkeypatch.setattr(batching, "_SLICE", 0.0)
    torch.manual_seed(3)
    prefix = peft_dist.get_peft_model(zoo.base(), peft_dist.PrefixTuningConfig(**PREFIX))
    zoo.disturb(prefix, seed=3)
    prefix.save_pretrained(tmp_path / "prefix")
    for seed, name in enumerate("ab"):
        lora(tmp_path / name, seed)
    prompt = zoo.prompt_of(4)

    async def run(engine, disturbed: bool):
        await engine.load("a", tmp_path / "a")
        asked = asyncio.ensure_future(said(engine, prompt, "a", num=50))
        while engine.figures().running == 0:
            await asyncio.sleep(0.001)
        told: list = []
        if disturbed:
            loads = [
                asyncio.ensure_future(engine.load(key, folder))
                for key, folder in (("b", tmp_path / "b"), ("p", tmp_path / "prefix"))
            ]
            while not engine._slices.has_work:
                await asyncio.sleep(0)
            begun = len(engine._took)
            with pytest.raises(AdapterRefused):
                await said(engine, prompt, "b")
            await asyncio.wait([asked])
            told = [len(engine._took) - begun, loads[1].done()]
            await asyncio.gather(*loads)
        answers = [await asked]
        if disturbed:
            answers += [await said(engine, prompt, key) for key in ("b", "p")]
            await engine.unload("b")
        return answers, told

    answers = []
    for disturbed in (False, True):
        engine = engine_of()
        try:
            answers.append(asyncio.run(run(engine, disturbed)))
        finally:
            engine.close()
    (alone, _), (beside, told) = answers
    assert beside[0] == alone[0]
    assert told[0] > 5 and told[1] is False  # many steps, and the second adapter is not there yet
    for answer, folder in zip(beside[1:], (tmp_path / "b", tmp_path / "prefix"), strict=True):
        own = peft_dist.PeftModel.from_pretrained(zoo.base(), folder).eval()
        assert answer == zoo.answer(own, prompt, ANSWER)


def test_plans_of_rows_outlive_the_coming_of_adapters_that_they_do_not_name(engine, tmp_path):
    async def run():
        await engine.load("a", lora(tmp_path / "a", 1))
        await said(engine, zoo.prompt_of(4), "a")
        pool = engine._model._adapters.pool
        before = {site: dict(plans) for site, plans in pool.plans.items()}
        await engine.load("b", lora(tmp_path / "b", 2))
        kept = {site: {key: pool.plans[site].get(key) for key in plans} for site, plans in before.items()}
        await engine.unload("a")
        left = [plan for plans in pool.plans.values() for plan in plans.values()]
        return before, kept, left

    before, kept, left = asyncio.run(run())
    named = [plan for plans in before.values() for plan in plans.values() if "a" in plan.named]
    assert named and not any("a" in plan.named for plan in left)
    assert all(kept[site][key] is plan for site, plans in before.items() for key, plan in plans.items())
