"""Loss on the answers and on nothing else, for every kind of row and template."""

import pytest

from orchestrator.chat_template import DEFAULT_CHAT_TEMPLATE
from orchestrator.errors import DataError
from orchestrator.spec.job import DatasetSpec
from orchestrator.train.rows.records import Record, records
from orchestrator.train.rows.render import IGNORED, render
from orchestrator.train.rows.sources import read_rows

from . import chats
from .chats import CHATML, DIALOGUE, LLAMA3, MISTRAL, THINKING, TINY_LLAMA, tokenizer

IM = ("<|im_start|>", "<|im_end|>")
HEADERS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")


def chat(messages, where="x:1"):
    return Record(where, "00" * 32, messages=tuple(messages))


def rendered(record, tok, sequence_len=512):
    return next(iter(render([record], tok, sequence_len)))


def trained_runs(example, tok):
    """The texts of the runs of trained tokens; every label is the token's own id."""
    runs, run = [], []
    for token, label in zip(example.input_ids, example.labels, strict=True):
        assert label in (token, IGNORED)
        if label == token:
            run.append(token)
        elif run:
            runs, run = [*runs, tok.decode(run)], []
    return [*runs, tok.decode(run)] if run else runs


def test_chat_is_trained_on_each_answer_and_its_end():
    tok = tokenizer()
    example = rendered(chat(DIALOGUE), tok)
    assert trained_runs(example, tok) == ["ü ü<|end|>", "ü ü \U0001f600 ok<|end|>"]
    assert tok.decode(example.input_ids) == tok.apply_chat_template(DIALOGUE, tokenize=False)
    assert example.prompt == DIALOGUE[:4] and example.answer == "ü ü \U0001f600 ok"


@pytest.mark.parametrize("template", ["", DEFAULT_CHAT_TEMPLATE])
def test_chat_mask_equals_that_of_transformers(template):
    tok = tokenizer(template)
    dataset = DatasetSpec(path=str(TINY_LLAMA.parent / "python-docs.jsonl"))
    found = [*records(list(read_rows(dataset))[:400], dataset), chat(DIALOGUE)]
    for record, example in zip(found, render(found, tok, 512), strict=True):
        oracle = tok.apply_chat_template(
            list(record.messages), return_dict=True, return_assistant_tokens_mask=True
        )
        assert example.input_ids == oracle["input_ids"]
        assert [int(label != IGNORED) for label in example.labels] == oracle["assistant_masks"]


def test_prefix_differences_give_what_the_generation_blocks_say():
    marked = tokenizer()
    bare = tokenizer(chats.without_generation_blocks(marked.chat_template))
    assert "generation " not in bare.chat_template.replace("add_generation_prompt ", "")
    dataset = DatasetSpec(path=str(TINY_LLAMA.parent / "python-docs.jsonl"))
    found = [*records(list(read_rows(dataset))[:400], dataset), chat(DIALOGUE)]
    for one, other in zip(render(found, marked, 512), render(found, bare, 512), strict=True):
        assert (one.input_ids, one.labels, one.prompt_len) == (
            other.input_ids,
            other.labels,
            other.prompt_len,
        )


@pytest.mark.parametrize(
    ("template", "special", "messages", "answers"),
    [
        (CHATML, IM, DIALOGUE, ["ü ü<|im_end|>", "ü ü \U0001f600 ok<|im_end|>"]),
        (LLAMA3, HEADERS, DIALOGUE, ["ü ü<|eot_id|>", "ü ü \U0001f600 ok<|eot_id|>"]),
        (MISTRAL, (), DIALOGUE[1:], [" ü ü<|end|>", " ü ü \U0001f600 ok<|end|>"]),
        (THINKING, IM, DIALOGUE, ["ü ü<|im_end|>", "<think>\n\n</think>\n\nü ü \U0001f600 ok<|im_end|>"]),
    ],
    ids=["chatml", "llama3", "mistral", "thinking"],
)
def test_templates_without_generation_blocks(template, special, messages, answers):
    tok = tokenizer(template, special)
    example = rendered(chat(messages), tok)
    assert trained_runs(example, tok) == answers
    assert tok.decode(example.input_ids) == tok.apply_chat_template(messages, tokenize=False)


# Not LLAMA3: a tokenizer like GPT-2's cuts its blank line differently before a letter than at a text's end.
@pytest.mark.parametrize(("template", "special"), [("", ()), (CHATML, IM), (None, ())])
def test_prompt_is_what_a_server_will_ask_with(template, special):
    tok = tokenizer(template, special)
    example = rendered(chat(DIALOGUE), tok)
    asked = tok.apply_chat_template(DIALOGUE[:4], add_generation_prompt=True, return_dict=True)["input_ids"]
    assert example.input_ids[: example.prompt_len] == asked


def test_base_without_a_template_gets_the_default_one():
    tok = tokenizer(None)
    example = rendered(chat(DIALOGUE[1:3]), tok)
    assert tok.decode(example.input_ids) == (
        "<|begin|>### User:\nSay ü twice.\n\n### Assistant:\nü ü<|end|>\n\n"
    )
    assert trained_runs(example, tok) == ["ü ü<|end|>"]


def test_repeated_answers_are_each_trained_where_they_stand():
    tok = tokenizer(CHATML, IM)
    messages = [{"role": role, "content": "same"} for role in ("user", "assistant") * 3]
    example = rendered(chat(messages), tok)
    assert trained_runs(example, tok) == ["same<|im_end|>"] * 3
    assert tok.decode(example.input_ids[: example.prompt_len]).count("same") == 5


def test_chat_that_the_template_refuses_names_the_row():
    tok = tokenizer(MISTRAL)
    with pytest.raises(DataError) as caught:
        rendered(chat(DIALOGUE, where="a.jsonl:7"), tok)
    assert str(caught.value) == (
        "a.jsonl:7: does not fit the base's chat template: Conversation roles must alternate user/assistant. "
        "The template, a file of the base, decides which roles may follow one another."
    )


def test_conversation_without_an_answer_trains_nothing():
    for template, special in (("", ()), (CHATML, IM)):
        example = rendered(chat(DIALOGUE[:2]), tokenizer(template, special))
        assert example.num_targets == 0 and example.prompt_len == len(example.input_ids)


def test_prompt_and_completion_are_tokenized_apart_and_end():
    tok = tokenizer()
    example = rendered(Record("x:1", "00" * 32, prompt="2 + 2 =", answer=" four"), tok)
    prompt = tok("2 + 2 =")["input_ids"]
    assert prompt[0] == tok.bos_token_id
    answer = [*tok(" four", add_special_tokens=False)["input_ids"], tok.eos_token_id]
    assert example.input_ids == prompt + answer
    assert example.labels == [IGNORED] * len(prompt) + answer
    assert (example.prompt_len, example.prompt, example.answer) == (len(prompt), "2 + 2 =", " four")


def test_text_is_trained_from_its_first_token_to_the_end_of_sequence():
    tok = tokenizer()
    example = rendered(Record("x:1", "00" * 32, answer="Hello there"), tok)
    text = tok("Hello there", add_special_tokens=False)["input_ids"]
    assert example.input_ids == [tok.bos_token_id, *text, tok.eos_token_id]
    assert example.labels == [IGNORED, *text, tok.eos_token_id]
    assert example.prompt_len == 0 and example.num_targets == len(text) + 1


def test_end_of_sequence_that_a_tokenizer_adds_itself_is_not_doubled():
    from tokenizers import processors

    tok = tokenizer()
    tok.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin|> $A <|end|>", special_tokens=[("<|begin|>", 0), ("<|end|>", 1)]
    )
    assert tok("a")["input_ids"][-1] == tok.eos_token_id
    example = rendered(Record("x:1", "00" * 32, prompt="a", answer="b"), tok)
    assert example.input_ids.count(tok.eos_token_id) == 1 and example.input_ids[-1] == tok.eos_token_id


def test_long_rows_are_cut_at_the_end_and_say_so():
    tok = tokenizer()
    whole = rendered(chat(DIALOGUE), tok)
    cut = rendered(chat(DIALOGUE), tok, sequence_len=20)
    assert not whole.is_truncated and cut.is_truncated
    assert cut.full_length == len(whole.input_ids)
    assert cut.input_ids == whole.input_ids[:20] and cut.labels == whole.labels[:20]
    assert cut.prompt_len == 20
    record = Record("x:1", "00" * 32, prompt="a b c d e f", answer="g")
    assert rendered(record, tok, sequence_len=3).num_targets == 0


class WithoutOffsets:
    """A tokenizer that cannot say which characters a token came from, as slow ones cannot."""

    is_fast = False

    def __init__(self, tok):
        self._tok = tok

    def __getattr__(self, name):
        return getattr(self._tok, name)

    def __call__(self, text, *, return_offsets_mapping=False, **options):
        assert not return_offsets_mapping
        return self._tok(text, **options)


def test_tokenizers_without_offsets_train_the_same_answers():
    tok = tokenizer(CHATML, IM)
    fast, slow = rendered(chat(DIALOGUE), tok), rendered(chat(DIALOGUE), WithoutOffsets(tok))
    assert trained_runs(slow, tok) == trained_runs(fast, tok)
    assert tok.decode(slow.input_ids) == tok.decode(fast.input_ids)


def test_rows_keep_their_order_across_kinds_and_batches():
    tok = tokenizer()
    mixed = [
        chat(DIALOGUE[1:3], where=f"{i}") if i % 3 else Record(f"{i}", "00" * 32, answer=f"text {i}")
        for i in range(1200)
    ]
    assert [example.where for example in render(mixed, tok, 512)] == [f"{i}" for i in range(1200)]
