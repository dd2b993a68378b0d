"""Each task against transformers' own loss, a count by hand, or a library's own numbers; and what it refuses."""

from __future__ import annotations

import json
import math

import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)

import peft_dist
from orchestrator.errors import DataError, ModelError
from orchestrator.spec.job import DatasetSpec, EvalSpec
from orchestrator.train.group import Group
from orchestrator.train.rows.sources import SourceRow
from orchestrator.train.task_file import read_task_file, write_task_file
from orchestrator.train.tasks import BY_TYPE, Answering, Facts, task_class
from orchestrator.train.tasks.classification import in_order, sequence_logits
from orchestrator.train.tasks.embedding import TEMPERATURE, embeddings, pair_loss, retrieval_ranks
from orchestrator.train.tasks.qa import exact, overlap, plain
from orchestrator.train.tasks.token_classification import first_tokens
from orchestrator.train.worker.data import load_examples
from orchestrator.train.worker.evaluate import Evaluation
from orchestrator.train.worker.inspection import inspected
from orchestrator.train.worker.run import train
from peft_dist.loading import load_base

from .chats import TINY_LLAMA
from .tasks import KINDS, row, task_job
from .test_run import Recorder
from .tiny import plan, request

pytestmark = pytest.mark.usefixtures("one_thread")


def parts(folder, kind, **sections):
    """(spec, examples, task, base in eval mode) of a tiny job."""
    spec = task_job(folder, kind, **sections)
    tokenizer = AutoTokenizer.from_pretrained(spec.model.base_model)
    examples = load_examples(spec, tokenizer, max_len=128)
    task = task_class(spec)(tokenizer, examples.facts)
    torch.manual_seed(0)
    labels = examples.facts.labels if task.has_labels else None
    base = load_base(spec.model.base_model, task=task.name, labels=labels).eval()
    base.config.pad_token_id = tokenizer.pad_token_id
    return spec, examples, task, base


def read(kind, values, **fields):
    return BY_TYPE[kind].read(
        SourceRow(values, "rows.jsonl:1"), DatasetSpec(path="rows.jsonl", type=kind, **fields)
    )


# ---- losses


@pytest.mark.parametrize("kind", ["classification", "token-classification", "qa", "seq2seq"])
def test_the_loss_of_one_row_is_transformers_own(kind, tmp_path):
    """Without padding nothing differs; transformers divides by the targets, and takes the mean of both ends."""
    _, examples, task, base = parts(tmp_path, kind)
    for example in examples.train[:4]:
        batch = task.collate([example], [0])
        ours = task.loss(base, batch) / batch.targets
        if kind == "qa":
            own = {"start_positions": batch.labels["first"], "end_positions": batch.labels["last"]}
        elif kind == "token-classification":  # the class shifts nothing
            own = {"labels": batch.labels["labels"]}
        else:
            own = {"labels": batch.labels["labels"]}
        theirs = base(**batch.inputs, **own).loss
        assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)


@pytest.mark.parametrize("kind", KINDS[:4])
def test_padding_changes_no_loss(kind, tmp_path):
    _, examples, task, base = parts(tmp_path, kind)
    rows = examples.train[:5]
    alone = sum(task.loss(base, task.collate([each], [0])).item() for each in rows)
    together = task.collate(rows, range(5))
    assert task.loss(base, together).item() == pytest.approx(alone, rel=1e-5)
    assert together.targets == sum(each.num_targets for each in rows)


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_without_targets_has_a_zero_gradient_not_none(kind, tmp_path):
    _, examples, task, base = parts(tmp_path, kind)
    batch = task.silent(examples.train[0])
    task.loss(base, batch).backward()
    gradients = [p.grad for p in base.parameters() if p.grad is not None]
    assert batch.targets == 0 and gradients and not any(gradient.any() for gradient in gradients)


def test_the_loss_of_pairs_by_hand(tmp_path):
    _, examples, task, base = parts(tmp_path, "embedding")
    rows = examples.train[:4]
    batch = task.collate(rows, range(4))
    vectors = embeddings(base, batch.inputs)
    assert torch.allclose(vectors.norm(dim=1), torch.ones(len(vectors)))
    hidden = base(**{name: t[:1] for name, t in batch.inputs.items()}).last_hidden_state
    length = len(rows[0].encoded[0].ids)
    assert torch.allclose(vectors[0], F.normalize(hidden[0, :length].mean(dim=0), dim=0), atol=1e-6)
    places = batch.labels["place"].tolist()
    anchors = [i for i, place in enumerate(places) if place == 0]
    candidates = [i for i, place in enumerate(places) if place > 0]
    wanted = 0.0
    for anchor in anchors:
        scores = [float(vectors[anchor] @ vectors[c]) / TEMPERATURE for c in candidates]
        right = scores[candidates.index(anchor + 1)]
        wanted += math.log(sum(math.exp(score) for score in scores)) - right
    assert task.loss(base, batch).item() == pytest.approx(wanted, rel=1e-4)


def test_the_same_text_is_no_negative():
    vectors = F.normalize(torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), dim=1)
    places = torch.tensor([0, 1, 0, 1, 0, 1])
    same = pair_loss(vectors, places, torch.tensor([1, 9, 2, 9, 3, 8]))
    # rows 0 and 1 have the same positive: each is compared with its own and with that of row 2
    alone = pair_loss(vectors[[0, 1, 4, 5]], places[:4], torch.tensor([1, 9, 3, 8]))
    assert same[0].item() == pytest.approx(alone[0].item())


def test_ranks_of_retrieval():
    vectors = F.normalize(torch.tensor([[1.0, 0], [1, 0.1], [1, 0], [0, 1], [0, 1], [1, 0.05]]), dim=1)
    places, keys = torch.tensor([0, 1, 0, 1, 0, 1]), torch.arange(6)
    assert retrieval_ranks(vectors, places, keys).tolist() == [2, 3, 3]
    tied = retrieval_ranks(vectors[[0, 1, 2, 1]], places[:4], torch.tensor([0, 7, 2, 7]))
    assert tied.tolist() == [1, 1]


@pytest.mark.parametrize("adapter", [{"type": "prompt_tuning", "num_virtual_tokens": 3},
                                     {"type": "prefix_tuning", "num_virtual_tokens": 3}, {"type": "p_tuning",
                                      "num_virtual_tokens": 3, "encoder_hidden_size": 8}])  # fmt: skip
@pytest.mark.parametrize("kind", ["classification", "token-classification", "qa", "embedding"])
def test_virtual_tokens_are_no_part_of_the_answer(kind, adapter, tmp_path):
    """Rows padded together say what they say alone, whatever stands before them."""
    spec, examples, task, base = parts(tmp_path, kind, adapter=adapter)
    end = train(request(tmp_path, spec, plan()))
    model = peft_dist.PeftModel.from_pretrained(base, end.adapter_dir).eval()
    rows = examples.train[:5]
    how = Answering(task.tokenizer)
    many, one = task.answers(model, rows, how), [task.answers(model, [each], how)[0] for each in rows]
    if kind != "embedding":
        assert many == one
    for together, alone in zip(many, one, strict=True):
        if kind == "embedding":
            assert torch.allclose(torch.tensor(together), torch.tensor(alone), atol=1e-5)


def test_a_decoder_classifies_at_the_last_token_of_the_mask(tmp_path):
    _, examples, task, base = parts(tmp_path, "classification")
    batch = task.collate(examples.train[:6], range(6))
    theirs = base(**batch.inputs).logits
    assert torch.allclose(sequence_logits(base, batch.inputs), theirs, atol=1e-6)


# ---- metrics


def test_metrics_of_classes(tmp_path):
    _, examples, task, _ = parts(tmp_path, "classification")
    rows = examples.train[:4]
    wanted = [each.label for each in rows]
    given = ["even"] * 4
    right = wanted.count("even")
    found = task.metrics(rows, given, ("accuracy", "f1"))
    assert found["accuracy"] == right / 4
    assert found["f1"] == pytest.approx(2 * right / (4 + right) / 2)  # the other class is never found


def test_metrics_of_entities():
    task = BY_TYPE["token-classification"](None, Facts(labels=("B-X", "I-X", "O")))

    class Row:
        def __init__(self, tags):
            self.tags = tuple(tags.split())

    rows = [Row("B-X I-X O B-X"), Row("O O")]
    given = [["B-X", "O", "O", "B-X"], ["B-X", "O"]]  # one of two entities whole, two made up
    found = task.metrics(rows, given, ("precision", "recall", "f1", "accuracy"))
    assert found == pytest.approx({"precision": 1 / 3, "recall": 1 / 2, "f1": 0.4, "accuracy": 4 / 6})


@pytest.mark.parametrize(
    ("given", "right", "is_exact", "f1"),
    [("The cat!", "cat", 1.0, 1.0), ("a cat sat", "the cat", 0.0, 2 / 3), ("", "", 1.0, 1.0), ("", "x", 0.0, 0.0),
     ("dog", "cat", 0.0, 0.0), ("cat cat", "cat", 0.0, 2 / 3)],
)  # fmt: skip
def test_answers_are_compared_as_squad_does(given, right, is_exact, f1):
    assert (exact(given, right), overlap(given, right)) == (is_exact, pytest.approx(f1))
    assert plain("An  Apple,") == "apple"


def test_metrics_of_written_texts():
    task = BY_TYPE["seq2seq"](None)

    class Row:
        target = "the cat sat"

    found = task.metrics(
        [Row, Row], ["the cat sat", "dog"], ("chrf", "rouge1", "rougeL", "exact_match", "contains")
    )
    assert (found["exact_match"], found["contains"], found["rouge1"], found["rougeL"]) == (0.5, 0.5, 0.5, 0.5)
    assert 0 < found["chrf"] < 100
    assert task.metrics([Row], ["the cat sat"], ("chrf",)) == {"chrf": pytest.approx(100.0)}


def test_few_texts_are_written_where_nobody_says_how_many():
    task = BY_TYPE["seq2seq"](None)
    rows = list(range(1000))
    assert len(task.answerable(rows, ("chrf",), EvalSpec())) == 256
    assert len(task.answerable(rows, ("chrf",), EvalSpec(max_rows=900))) == 1000


# ---- rows


def test_labels_are_in_sorted_order():
    assert in_order({"b", "a"}) == ("a", "b") and in_order({"10", "9", "-1"}) == ("-1", "9", "10")
    assert in_order({"10", "9", "x"}) == ("10", "9", "x")


def test_labels_are_kept_with_the_base_and_the_adapter(tmp_path):
    spec = task_job(tmp_path, "classification", training={"max_steps": 1})
    end = train(request(tmp_path, spec))
    found = read_task_file(tmp_path / "run" / "final")
    assert found is not None and (found.task, found.facts.labels) == ("SEQ_CLS", ("even", "odd"))
    assert read_task_file(tmp_path) is None
    config = json.loads((tmp_path / "run" / "final" / "adapter_config.json").read_text())
    assert config["task_type"] == "SEQ_CLS" and set(config["modules_to_save"]) == {"classifier", "score"}
    _, _, _, base = parts(tmp_path, "classification")
    assert base.config.id2label == {0: "even", 1: "odd"} and base.config.label2id == {"even": 0, "odd": 1}
    assert end.question is None
    (tmp_path / "run" / "final" / "raypeft_task.json").write_text('{"format": 9}')
    with pytest.raises(ModelError, match="was written in format 9; this version reads 1"):
        read_task_file(tmp_path / "run" / "final")


def test_an_adapter_of_other_labels_is_no_start(tmp_path):
    spec = task_job(tmp_path, "classification", training={"max_steps": 1})
    end = train(request(tmp_path, spec, run="first"))
    write_task_file(tmp_path / "first" / "final", spec, Facts(labels=("a", "b")))
    with pytest.raises(
        ModelError, match=r"the adapter's labels are a, b, those of the rows even, odd\. Train on rows"
    ):
        train(request(tmp_path, spec, run="second", init_from=end.adapter_dir))


def test_first_tokens_of_words():
    words = ["ab", "c", "de"]  # "ab c de"
    assert first_tokens(words, [(0, 1), (1, 2), (2, 4), (4, 7)]) == [0, 2, 3]
    assert first_tokens(words, [(0, 0), (0, 2), (3, 4), (5, 7), (0, 0)]) == [1, 2, 3]
    assert first_tokens(words, [(0, 4)]) == [0, None, None]
    assert first_tokens(["", "x"], [(1, 2)]) == [None, 0]


def test_a_real_tokenizer_marks_the_first_token_of_each_word():
    tokenizer = AutoTokenizer.from_pretrained(TINY_LLAMA)
    words = ["unbelievable", "in", "Paris", "!"]
    record = read("token-classification", {"tokens": words, "tags": ["O", "O", "B-LOC", "O"]})
    (tagged,) = BY_TYPE["token-classification"].render([record], tokenizer, 64)
    starts = [tokenizer.decode(tagged.input_ids[first]).strip() for first in tagged.firsts]
    assert all(word.startswith(start) and start for word, start in zip(words, starts, strict=True))
    (cut,) = BY_TYPE["token-classification"].render([record], tokenizer, 4)
    assert cut.firsts[-1] is None and cut.is_truncated and cut.num_targets < 4


def test_a_long_text_is_read_in_windows():
    tokenizer = AutoTokenizer.from_pretrained(TINY_LLAMA)
    context = " ".join(f"number {n} is {n * n}." for n in range(80))
    begin = context.index("number 60")
    answers = {"text": ["number 60"], "answer_start": [begin]}
    record = read("qa", {"question": "Which one?", "context": context, "answers": answers})
    (asked,) = BY_TYPE["qa"].render([record], tokenizer, 128)
    assert len(asked.windows) > 3 and asked.is_truncated and asked.num_targets == 1
    having = [window for window in asked.windows if window.first != window.null]
    assert 1 <= len(having) <= 2 and all(len(window.ids) <= 128 for window in asked.windows)
    for window in having:
        spans = [window.spans[window.first], window.spans[window.last]]
        assert context[spans[0][0] : spans[1][1]].strip() == "number 60"
    covered = {i for window in asked.windows for span in window.spans if span for i in range(*span)}
    assert len(covered) >= len(context) - context.count(" ")


def test_the_best_span_over_all_windows_wins(tmp_path):
    _, examples, task, _ = parts(tmp_path, "qa", data={
        "datasets": [{"path": str(tmp_path / "qa.jsonl"), "type": "qa"}], "val_set_size": 5, "sequence_len": 16,
    })  # fmt: skip
    long = next(each for each in examples.train if len(each.windows) > 1)
    scores = [(torch.zeros(len(w.ids)), torch.zeros(len(w.ids))) for w in long.windows]
    places = [i for i, span in enumerate(long.windows[-1].spans) if span]
    scores[-1][0][places[0]] = scores[-1][1][places[1]] = 5.0
    spans = long.windows[-1].spans
    assert task._best(long, scores, 8) == long.context[spans[places[0]][0] : spans[places[1]][1]].strip()
    unsure = BY_TYPE["qa"](task.tokenizer, Facts(may_be_empty=True))
    for (first, last), window in zip(scores, long.windows, strict=True):
        first[window.null] = last[window.null] = 9.0
    assert unsure._best(long, scores, 8) == "" != task._best(long, scores, 8)


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        ("classification", {"text": "a"}, "has no column 'label', which type 'classification' reads"),
        ("classification", {"text": "a", "label": None}, "column 'label' holds nothing"),
        ("classification", {"text": "a", "label": " "}, "column 'label' is empty: the row has no label"),
        ("token-classification", {"tokens": ["a"], "tags": ["O", "O"]}, "has 1 tokens and 2 tags"),
        ("token-classification", {"tokens": ["a"], "tags": [3]}, "entry 1 of column 'tags' is an int; it must be a "
         "text. Write tags by name"),
        ("token-classification", {"tokens": 3, "tags": []}, "column 'tokens' holds an int; it must be a list of texts"),
        ("qa", {"question": "q", "context": "a b", "answers": {"text": ["c"], "answer_start": [0]}},
         "the answer 'c' of column 'answers' does not stand in the context at character 0"),
        ("qa", {"question": "q", "context": "a b", "answers": ["c"]}, "the answer 'c' of column 'answers' does not"),
        ("qa", {"question": "q", "context": "a", "answers": 3}, "column 'answers' holds an int"),
        ("qa", {"question": "q", "context": "a", "answers": {"text": ["a"], "answer_start": [0, 1]}},
         "has no texts with as many starts"),
        ("seq2seq", {"source": "a", "traget": "b"}, "has no column 'target'.* Closest: 'traget'"),
        ("embedding", {"anchor": "a", "text": "b"}, "has no column 'positive'"),
        ("embedding", {"text": "a", "label": "b"}, "They are those of `type: classification`"),
    ],
)  # fmt: skip
def test_rows_that_do_not_fit(kind, values, message):
    with pytest.raises(DataError, match=message):
        read(kind, values)


def test_forms_of_answers():
    for answers in ("b", ["b"], [{"text": "b", "answer_start": 2}], '{"text": ["b"], "answer_start": [2]}',
                    {"text": "b", "answer_start": 2}, {"text": ["b"]}):  # fmt: skip
        assert read("qa", {"question": "q", "context": "a b", "answers": answers}).answers == (("b", 2),)
    for nothing in ([], None, "", {"text": [], "answer_start": []}):
        assert read("qa", {"question": "q", "context": "a b", "answers": nothing}).answers == ()


def test_columns_by_other_names_and_pairs():
    record = read(
        "classification", {"a": "x", "b": "y", "c": 3}, field_text="a", field_text_pair="b", field_label="c"
    )
    assert (record.text, record.pair, record.label) == ("x", "y", "3")
    assert read("classification", {"text": "x", "text_pair": "y", "label": True}).label == "true"
    tokenizer = AutoTokenizer.from_pretrained(TINY_LLAMA)
    one, two = BY_TYPE["classification"].render(
        [record, read("classification", row("classification", 0))], tokenizer, 64
    )
    assert tokenizer.decode(one.input_ids) == "<|begin|>x<|begin|>y" and two.label == "even"
    (cut,) = BY_TYPE["classification"].render(
        [read("classification", {"text": "a b " * 50, "label": 1})], tokenizer, 8
    )
    assert len(cut.input_ids) == 8 and cut.is_truncated and cut.full_length > 50


def test_an_evaluation_label_must_be_known(tmp_path):
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps({"text": "x", "label": "evn"}) + "\n")
    spec = task_job(
        tmp_path, "classification", eval={"datasets": [{"path": str(other), "type": "classification"}]}
    )
    with pytest.raises(
        DataError, match=r"the label 'evn' is in no row of data.datasets\. Closest: 'even'\. Known: even, odd"
    ):
        load_examples(spec, AutoTokenizer.from_pretrained(spec.model.base_model), max_len=128)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_can_be_looked_at(kind, tmp_path):
    spec = task_job(tmp_path, kind)
    tokenizer = AutoTokenizer.from_pretrained(spec.model.base_model)
    seen = inspected(spec, tokenizer, max_len=128, num_rows=3)
    assert len(seen.rows) == 3 and all(each.tokens for each in seen.rows)
    marks = [any(token.trained for token in each.tokens) for each in seen.rows]
    assert all(marks) == (kind in ("token-classification", "qa", "seq2seq"))
    sentence = seen.report.sentence()
    assert sentence.startswith("12 rows to train on, 5 to evaluate")
    assert ("labels (" in sentence) == (kind in ("classification", "token-classification"))
    assert kind == "seq2seq" or seen.rows[0].note


@pytest.mark.parametrize("kind", KINDS)
def test_answers_do_not_depend_on_the_batch(kind, tmp_path):
    spec, examples, task, base = parts(tmp_path, kind)
    rows = examples.train[:5]
    one, many = (Evaluation(rows, task, size, Group(), spec.eval).answers(base, rows) for size in (1, 5))
    if kind == "embedding":
        assert all(
            torch.allclose(torch.tensor(a), torch.tensor(b), atol=1e-5)
            for a, b in zip(one, many, strict=True)
        )
    else:
        assert one == many


# ---- other bases


def save_encoder(folder):
    """A random BERT of 2 layers x 32 over letters."""
    letters = [f"{mark}{chr(code)}" for mark in ("", "##") for code in range(33, 127)]
    core = Tokenizer(
        models.WordPiece({t: n for n, t in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *letters])})
    )
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.decoder = decoders.WordPiece()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )  # fmt: skip
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=128, pad_token_id=0,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "seq2seq"])
def test_an_encoder_is_a_base_too(kind, tmp_path):
    save_encoder(tmp_path / "bert")
    spec = task_job(tmp_path, kind, model={"base_model": str(tmp_path / "bert")}, training={"num_epochs": 5})
    told = Recorder()
    train(request(tmp_path, spec, plan(micro=12)), reporter=told)
    losses = [event["loss"] for event in told.of("progress")]
    assert losses[-1] < losses[0]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "bert")
    rows = load_examples(spec, tokenizer, max_len=128).train
    if kind == "qa":
        (window,) = rows[0].windows
        assert window.null == 0 and window.types == [int(each) for each in window.types] and 1 in window.types
    if kind == "classification":
        pair = BY_TYPE[kind].read(
            SourceRow({"text": "a", "text_pair": "b", "label": "odd"}, "x:1"),
            DatasetSpec(path="x", type=kind),
        )
        (one,) = BY_TYPE[kind].render([pair], tokenizer, 16)
        assert one.types == [0, 0, 0, 1, 1] and one.input_ids[0] == tokenizer.cls_token_id


def test_a_decoder_without_a_padding_token_classifies_batches(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(task_job(tmp_path, "classification").model.base_model)
    tokenizer.pad_token = None
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=4, n_positions=128, bos_token_id=None
    )
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    spec = task_job(
        tmp_path, "classification", model={"base_model": str(tmp_path / "gpt2")}, training={"num_epochs": 5}
    )
    told = Recorder()
    train(request(tmp_path, spec, plan(micro=12)), reporter=told)
    losses = [event["loss"] for event in told.of("progress")]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision(kind, tmp_path):
    spec = task_job(tmp_path, kind, training={"max_steps": 3})
    full = train(request(tmp_path, spec, plan(micro=4), run="full"))
    half = train(request(tmp_path, spec, plan(micro=4), run="half"), precision="bf16")
    # eight bits of mantissa in the base and the activations; cosines over a temperature of 0.05 show them most
    assert half.metrics["eval_loss"] == pytest.approx(full.metrics["eval_loss"], rel=0.1, abs=0.05)


@pytest.mark.parametrize("kind", ["classification", "token-classification"])
def test_one_label_alone_is_refused(kind, tmp_path):
    found = [
        {"text": str(n), "label": "x"} if kind == "classification" else {"tokens": [str(n)], "tags": ["x"]}
        for n in range(9)
    ]
    path = tmp_path / f"{kind}.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in found))
    spec = task_job(tmp_path, kind)
    with pytest.raises(
        DataError, match=r"all 9 rows have the same label, 'x': there is nothing to tell apart"
    ):
        load_examples(spec, AutoTokenizer.from_pretrained(spec.model.base_model), max_len=128)
