"""Heads of many adapters in one batch: each answer is what HF PEFT gives with that adapter alone."""

import asyncio
import contextlib
import json
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, pipeline

from orchestrator import api
from orchestrator.plan import make_plan
from orchestrator.plan.model_sizes import read_sizes
from orchestrator.runner import TrainRequest
from orchestrator.serve.engines.base_model import load
from orchestrator.serve.engines.engine import AdapterRefused, EngineDead
from orchestrator.serve.engines.head_engine import HeadEngine
from orchestrator.serve.engines.heads import Input, NoTokens, Terms, TooLong
from orchestrator.spec.job import ModelSpec
from orchestrator.train.tasks import Answering, Facts
from orchestrator.train.tasks.qa import QuestionAnswering, Record
from orchestrator.train.worker.run import train
from tests.orchestrator.serve import tiny_heads

TEXTS = ["a", "def f(x): return x", "os.path.join", "what is it?", "one two three four five six", "ü"]
LABELS = {"one": ("x", "y"), "two": ("p", "q", "r"), "three": ("1", "2", "3", "4", "5")}
METHODS = {"one": "lora", "two": "ia3", "three": "dora"}
DECODERS = {"one": "lora", "two": "prompt", "three": "prefix"}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    return {kind: tiny_heads.save_base(folder / kind, kind) for kind in ("llama", "bert", "roberta", "t5")}


@contextlib.contextmanager
def engine_on(base, task, **options):
    loaded = load(ModelSpec(base_model=str(base)), threads=1, task=task)
    engine = HeadEngine(loaded.model, loaded.tokenizer, task, loaded.max_context, **options)
    try:
        yield engine
    finally:
        engine.close()


def make(base, folder, task, methods, **options):
    """name -> (HF PEFT's model, its directory)."""
    made = {}
    for number, (name, method) in enumerate(methods.items()):
        labels = LABELS[name] if task in ("SEQ_CLS", "TOKEN_CLS") else ()
        model = tiny_heads.alone(base, task, method, max(len(labels), 2), seed=number + 1)
        made[name] = (model, tiny_heads.save(model, folder / name, task, labels, **options))
    return made


def counted_forwards(engine):
    calls = []
    engine._base.register_forward_pre_hook(lambda *_: calls.append(1))
    return calls


def mixed(engine, made, ask):
    """Every text asked of every adapter at once; loads first. Returns name -> answers, and how often the base ran."""

    async def run():
        await asyncio.gather(*(engine.load(name, folder) for name, (_, folder) in made.items()))
        calls = counted_forwards(engine)
        single = [asyncio.ensure_future(ask(name, text)) for text in TEXTS for name in made]
        answers = await asyncio.gather(*single)
        found = {name: [answers[i] for i in range(n, len(answers), len(made))] for n, name in enumerate(made)}
        return found, len(calls)

    return asyncio.run(run())


@pytest.mark.parametrize(
    ("kind", "methods"), [("llama", METHODS), ("llama", DECODERS), ("bert", METHODS), ("roberta", METHODS)]
)
def test_classes_are_those_of_each_adapter_alone(bases, tmp_path, kind, methods):
    base = bases[kind]
    made = make(base, tmp_path, "SEQ_CLS", methods)
    tokenizer = AutoTokenizer.from_pretrained(base)
    with engine_on(base, "SEQ_CLS") as engine:

        async def ask(name, text):
            return (await engine.classify([Input(text)], name))[0]

        found, calls = mixed(engine, made, ask)
        assert calls < len(TEXTS) * len(made)  # how many went together is a matter of time
    for name, (model, _) in made.items():
        for text, answer in zip(TEXTS, found[name], strict=True):
            with torch.no_grad():
                shares = model(**tokenizer(text, return_tensors="pt")).logits[0].softmax(-1)
            wanted = dict(zip(LABELS[name], shares.tolist(), strict=True))
            assert dict(answer.scores) == pytest.approx(wanted, abs=2e-5)
            assert list(answer.scores) == sorted(answer.scores, key=lambda each: -each[1])
            assert answer.num_tokens == len(tokenizer(text)["input_ids"])


def test_pairs_are_read_with_their_token_types(bases, tmp_path):
    made = make(bases["bert"], tmp_path, "SEQ_CLS", {"two": "lora"})
    tokenizer = AutoTokenizer.from_pretrained(bases["bert"])
    with engine_on(bases["bert"], "SEQ_CLS") as engine:

        async def run():
            await engine.load("two", made["two"][1])
            return await engine.classify([Input("one"), Input("one", "and two")], "two")

        answers = asyncio.run(run())
    for answer, texts in zip(answers, [("one",), ("one", "and two")], strict=True):
        with torch.no_grad():
            shares = made["two"][0](**tokenizer(*texts, return_tensors="pt")).logits[0].softmax(-1)
        assert dict(answer.scores) == pytest.approx(dict(zip("pqr", shares.tolist(), strict=True)), abs=2e-5)


@pytest.mark.parametrize(("kind", "methods"), [("llama", DECODERS), ("bert", METHODS)])
def test_vectors_are_pooled_as_training_pools_them(bases, tmp_path, kind, methods):
    base = bases[kind]
    made = make(base, tmp_path, "FEATURE_EXTRACTION", methods) | {
        None: (tiny_heads.alone(base, "FEATURE_EXTRACTION", None), None)
    }
    tokenizer = AutoTokenizer.from_pretrained(base)
    with engine_on(base, "FEATURE_EXTRACTION") as engine:

        async def run():
            await asyncio.gather(*(engine.load(n, f) for n, (_, f) in made.items() if n))
            asked = [engine.embed([Input(text) for text in TEXTS], name) for name in made]
            return await asyncio.gather(*asked)

        found = dict(zip(made, asyncio.run(run()), strict=True))
    for name, (model, _) in made.items():
        for text, answer in zip(TEXTS, found[name], strict=True):
            inputs = tokenizer(text, return_tensors="pt")
            with torch.no_grad():
                hidden = model(**inputs).last_hidden_state[0, -inputs["input_ids"].shape[1] :]
            wanted = torch.nn.functional.normalize(hidden.mean(0), dim=-1)
            assert torch.tensor(answer.vector).allclose(wanted, atol=2e-5)


def test_token_ids_are_taken_as_they_are(bases):
    tokenizer = AutoTokenizer.from_pretrained(bases["bert"])
    with engine_on(bases["bert"], "FEATURE_EXTRACTION") as engine:
        ids = tuple(tokenizer("os.path")["input_ids"])
        by_text, by_ids = asyncio.run(engine.embed([Input("os.path"), Input(ids=ids)], None))
    assert by_ids.vector == pytest.approx(by_text.vector, abs=1e-6)


@pytest.mark.parametrize(("kind", "methods"), [("llama", DECODERS), ("bert", METHODS)])
def test_each_word_has_the_label_of_its_first_token(bases, tmp_path, kind, methods):
    base = bases[kind]
    made = make(base, tmp_path, "TOKEN_CLS", methods)
    tokenizer = AutoTokenizer.from_pretrained(base)
    texts = ["one  two\nthree", "os.path.join ( a , b )", "x"]
    with engine_on(base, "TOKEN_CLS") as engine:

        async def run():
            await asyncio.gather(*(engine.load(name, folder) for name, (_, folder) in made.items()))
            asked = [engine.tag([Input(text) for text in texts], name) for name in made]
            return await asyncio.gather(*asked)

        found = dict(zip(made, asyncio.run(run()), strict=True))
    for name, (model, _) in made.items():
        for text, answer in zip(texts, found[name], strict=True):
            words = text.split()
            inputs = tokenizer(" ".join(words), return_tensors="pt", return_offsets_mapping=True)
            offsets = inputs.pop("offset_mapping")[0].tolist()
            with torch.no_grad():
                shares = model(**inputs).logits[0, -len(offsets) :].softmax(-1)
            at = 0
            wanted = []
            for word in words:
                # the blank before a word is a token of its own here, or none at all
                first = next(i for i, (a, b) in enumerate(offsets) if a <= at < b)
                wanted.append((LABELS[name][int(shares[first].argmax())], float(shares[first].max()), word))
                at += len(word) + 1
            merged = []
            for label, score, word in wanted:
                if merged and merged[-1][0] == label:
                    merged[-1][1].append(score)
                    merged[-1][2].append(word)
                else:
                    merged.append((label, [score], [word]))
            assert [e.label for e in answer.entities] == [label for label, _, _ in merged]
            assert [e.score for e in answer.entities] == pytest.approx(
                [sum(scores) / len(scores) for _, scores, _ in merged], abs=2e-5
            )
            assert [text[e.start : e.end].split() for e in answer.entities] == [w for _, _, w in merged]


QUESTIONS = [
    ("what?", "the answer is forty two"),
    ("who is it", "it was Ada. " * 12),  # several windows
    ("x", "y"),
]


@pytest.mark.parametrize(("kind", "methods"), [("llama", DECODERS), ("bert", METHODS)])
@pytest.mark.parametrize("may_be_empty", [True, False])
def test_the_best_span_is_the_one_that_training_measures(bases, tmp_path, kind, methods, may_be_empty):
    base = bases[kind]
    made = make(base, tmp_path, "QUESTION_ANS", methods, may_be_empty=may_be_empty)
    tokenizer = AutoTokenizer.from_pretrained(base)
    with engine_on(base, "QUESTION_ANS") as engine:

        async def run():
            await asyncio.gather(*(engine.load(name, folder) for name, (_, folder) in made.items()))
            return await asyncio.gather(*(engine.find(QUESTIONS, name, 3) for name in made))

        found = dict(zip(made, asyncio.run(run()), strict=True))
        limits = {name: engine._max_context - engine.virtual_tokens(name) for name in made}
    for name, (model, _) in made.items():
        task = QuestionAnswering(tokenizer, Facts(may_be_empty=may_be_empty))
        rows = list(
            QuestionAnswering.render(
                [Record("", "", q, c, ()) for q, c in QUESTIONS], tokenizer, limits[name]
            )
        )
        assert len(rows[1].windows) > 1
        wanted = task.answers(model, rows, Answering(tokenizer, max_new_tokens=128))
        for (_, context), text, answer in zip(QUESTIONS, wanted, found[name], strict=True):
            if not answer.spans:  # the text's only token is the one that says that nothing answers
                assert (text, len(context)) == ("", 1)
                continue
            best = answer.spans[0]
            assert context[best.start : best.end] == text
            assert [s.score for s in answer.spans] == sorted((s.score for s in answer.spans), reverse=True)
            assert 0 < sum(span.score for span in answer.spans) <= 1 + 1e-5


def test_a_base_with_a_trained_head_answers_itself_and_one_without_is_refused(bases, tmp_path):
    trained = tmp_path / "trained"
    tiny_heads.alone(bases["bert"], "SEQ_CLS", None, 3, seed=7).save_pretrained(trained)
    tokenizer = AutoTokenizer.from_pretrained(bases["bert"])
    tokenizer.save_pretrained(trained)
    with engine_on(trained, "SEQ_CLS") as engine:
        (answer,) = asyncio.run(engine.classify([Input("os.path")], None))
    (wanted,) = pipeline("text-classification", str(trained), top_k=None)(["os.path"])
    assert dict(answer.scores) == pytest.approx({each["label"]: each["score"] for each in wanted}, abs=1e-4)
    with (
        engine_on(bases["bert"], "SEQ_CLS") as engine,
        pytest.raises(AdapterRefused, match="no trained head"),
    ):
        asyncio.run(engine.classify([Input("os.path")], None))


def test_what_cannot_be_served_right_is_refused_and_the_others_serve_on(bases, tmp_path):
    base = bases["llama"]
    made = make(base, tmp_path, "SEQ_CLS", {"one": "lora"})
    headless = tiny_heads.alone(base, "SEQ_CLS", "lora", 2)
    other = tiny_heads.save(
        headless, tmp_path / "causal", "SEQ_CLS", ("a", "b", "c")
    )  # three labels for two outputs
    causal = tiny_heads.save(tiny_heads.alone(base, "FEATURE_EXTRACTION", "lora"), tmp_path / "f", "x")
    nan = tiny_heads.alone(base, "SEQ_CLS", "lora", 2)
    with torch.no_grad():
        next(p for p in nan.parameters() if p.requires_grad).fill_(float("nan"))
    broken = tiny_heads.save(nan, tmp_path / "nan", "SEQ_CLS")
    bare = tiny_heads.save(headless, tmp_path / "bare", "SEQ_CLS")
    file = bare / "adapter_model.safetensors"
    save_file({k: v for k, v in load_file(file).items() if "score" not in k}, file)
    with engine_on(base, "SEQ_CLS") as engine:

        async def run():
            await engine.load("one", made["one"][1])
            for folder, why in [
                (other, "2 labels apart, and 3 are named"),
                (causal, "of task FEATURE_EXTRACTION"),
                (broken, "not finite"),
                (bare, r"score.weight.*modules_to_save: \[score\]"),
            ]:
                with pytest.raises(AdapterRefused, match=why):
                    await engine.load("bad", folder)
            assert engine.loaded() == {"one"}
            with pytest.raises(AdapterRefused, match="head of its own"):
                await engine.combine("sum", [("one", 1.0)])
            return await engine.classify([Input("a")], "one")

        assert len(asyncio.run(run())[0].scores) == 2


def test_texts_that_do_not_fit_or_are_none_are_told_by_their_place(bases):
    with engine_on(bases["bert"], "FEATURE_EXTRACTION") as engine:
        with pytest.raises(TooLong) as long:
            asyncio.run(engine.embed([Input("a"), Input("b" * 63)], None))
        assert (long.value.index, long.value.num_tokens, long.value.max_tokens) == (1, 65, 64)
        assert len(asyncio.run(engine.embed([Input("b" * 62)], None))) == 1
    with engine_on(bases["llama"], "FEATURE_EXTRACTION") as engine, pytest.raises(NoTokens):
        asyncio.run(engine.embed([Input("")], None))
    with engine_on(
        bases["roberta"], "FEATURE_EXTRACTION"
    ) as engine:  # its positions begin behind the padding's
        assert engine._max_context == 64


def test_adapters_come_and_go_while_others_answer(bases, tmp_path):
    made = make(bases["llama"], tmp_path, "SEQ_CLS", METHODS)
    with engine_on(bases["llama"], "SEQ_CLS") as engine:

        async def run():
            await engine.load("one", made["one"][1])
            before = await engine.classify([Input("os.path")], "one")

            async def others():
                for _ in range(3):
                    for name in ("two", "three"):
                        await engine.load(name, made[name][1])
                        asked = asyncio.ensure_future(engine.classify([Input("a")] * 4, name))
                        await asyncio.sleep(0)
                        await asyncio.gather(asked, engine.unload(name))

            swaps = asyncio.ensure_future(others())
            count = 0
            while not swaps.done():
                answer = await engine.classify([Input("os.path")], "one")
                assert dict(answer[0].scores) == pytest.approx(dict(before[0].scores), abs=2e-5)
                count += 1
            await swaps
            assert count > 3 and engine.loaded() == {"one"}
            with pytest.raises(AdapterRefused):
                await engine.classify([Input("a")], "two")

        asyncio.run(run())


def test_rows_alone_are_the_same_to_the_bit_where_that_is_asked_for(bases, tmp_path):
    made = make(bases["llama"], tmp_path, "SEQ_CLS", METHODS)
    with engine_on(bases["llama"], "SEQ_CLS", one_by_one=True) as engine:

        async def run():
            await asyncio.gather(*(engine.load(name, folder) for name, (_, folder) in made.items()))
            alone = [await engine.classify([Input(text)], name) for name in made for text in TEXTS]
            asked = [engine.classify([Input(text)], name) for name in made for text in TEXTS]
            return alone, await asyncio.gather(*asked)

        alone, together = asyncio.run(run())
    assert alone == together


def test_a_cancelled_call_is_not_computed_and_a_closed_engine_fails_what_waits(bases):
    with engine_on(bases["bert"], "FEATURE_EXTRACTION", window_s=0.2) as engine:
        calls = counted_forwards(engine)

        async def leave():
            asked = asyncio.ensure_future(engine.embed([Input("a")], None))
            await asyncio.sleep(0.05)
            asked.cancel()
            await asyncio.gather(asked, return_exceptions=True)
            await asyncio.sleep(0.4)

        asyncio.run(leave())
        assert not calls and engine.figures().waiting == 0

        async def close():
            flood = [engine.embed([Input("a")], None, Terms("a")) for _ in range(20)]
            asked = asyncio.gather(
                *flood, engine.embed([Input("a")], None, Terms("b")), return_exceptions=True
            )
            await asyncio.sleep(0.05)
            engine.close()
            assert {type(each) for each in await asyncio.wait_for(asked, 10)} == {EngineDead}

        asyncio.run(close())
        with pytest.raises(EngineDead):
            engine.check()


def test_what_a_run_trains_beside_the_head_is_served_with_it(tmp_path):
    """DistilBERT's pre_classifier is new on the base, as the head is: a run keeps both."""
    base = tiny_heads.save_base(tmp_path / "base", "distilbert")
    rows = [{"text": f"{word} {number}", "label": word} for number in range(8) for word in ("aa", "bb", "cc")]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    job = {
        "name": "x",
        "model": {"base_model": str(base)},
        "data": {
            "datasets": [{"path": str(tmp_path / "rows.jsonl"), "type": "classification"}],
            "val_set_size": 0.3,
        },
        "adapter": {"type": "lora", "r": 2},
        "training": {"max_steps": 1, "micro_batch_size": 4},
    }
    (tmp_path / "job.yaml").write_text(json.dumps(job))
    spec = api.load(str(tmp_path / "job.yaml")).spec
    plan = make_plan(spec, None, read_sizes(spec.model.base_model))
    end = train(TrainRequest(spec, plan, str(tmp_path / "run"), run_id="run", data_hash="0" * 8))
    torch.manual_seed(99)
    with engine_on(base, "SEQ_CLS") as engine:

        async def run():
            await engine.load("x", Path(end.adapter_dir))
            return await engine.classify([Input("aa 1")], "x")

        (answer,) = asyncio.run(run())
    alone = tiny_heads.CLASSES["SEQ_CLS"].from_pretrained(base, num_labels=3)
    alone = peft.PeftModel.from_pretrained(alone, end.adapter_dir).eval()
    with torch.no_grad():
        shares = (
            alone(**AutoTokenizer.from_pretrained(base)("aa 1", return_tensors="pt")).logits[0].softmax(-1)
        )
    assert dict(answer.scores) == pytest.approx(
        dict(zip(("aa", "bb", "cc"), shares.tolist(), strict=True)), abs=2e-5
    )
