"""The embedded base and rows: real, disjoint, small, and rebuilt by one command."""

import json
import math
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

# The releases whose texts were compared; elsewhere a docstring or two may have been edited.
SAME_TEXTS = {(3, 11, 2), (3, 11, 7)}

TASKS = ("classification", "token-classification", "qa", "seq2seq", "embedding")


@pytest.fixture(scope="module")
def assets(repository):
    return repository / "jobs" / "assets"


def rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def documents(assets):
    sys.path.insert(0, str(assets))
    try:
        import documents as module

        yield module
    finally:
        sys.path.remove(str(assets))
        sys.modules.pop("documents", None)


def test_rows_are_many_distinct_and_of_sensible_length(assets):
    found = rows(assets / "python-docs.jsonl")
    assert len(found) >= 1000
    questions = [row["messages"][0]["content"] for row in found]
    answers = [m["content"] for row in found for m in row["messages"] if m["role"] == "assistant"]
    assert len(set(questions)) == len(questions) and len(set(answers)) == len(answers)
    for row in found:
        roles = [message["role"] for message in row["messages"]]
        assert roles == ["user", "assistant"] * (len(roles) // 2) and roles
        assert all(message["content"].strip() == message["content"] != "" for message in row["messages"])
    tokenizer = AutoTokenizer.from_pretrained(assets / "tiny-llama")
    ids = tokenizer.apply_chat_template([row["messages"] for row in found], return_dict=True)["input_ids"]
    assert max(map(len, ids)) <= 256


def test_base_was_trained_on_no_document_of_the_rows(assets):
    trained_on = set(json.loads((assets / "tiny-llama" / "corpus.json").read_text()))
    asked_about = {row["document"] for row in rows(assets / "python-docs.jsonl")}
    assert len(trained_on) > 100 and len(asked_about) > 100
    assert not trained_on & asked_about


@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="the texts are those of CPython 3.11")
def test_no_answer_stands_in_the_corpus(assets, documents):
    everything = documents.all_documents()
    corpus = documents.normal(" ".join(documents.corpus(everything)))
    trained_on = set(json.loads((assets / "tiny-llama" / "corpus.json").read_text()))
    if sys.version_info[:3] in SAME_TEXTS:
        assert {d.name for d in everything if not d.for_rows} - trained_on <= {"_distutils_system_mod"}
    answers = [
        message["content"]
        for row in rows(assets / "python-docs.jsonl")
        for message in row["messages"]
        if message["role"] == "assistant"
    ]
    assert not [answer for answer in answers if answer in corpus]
    bodies = [part for row in rows(assets / "python-topics.jsonl") for part in row["body"].split("\n\n")]
    assert not [part for part in bodies[:-1] if part in corpus]


@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="the texts are those of CPython 3.11")
def test_rows_are_rebuilt_byte_for_byte(assets, tmp_path):
    command = [sys.executable, "-B", str(assets / "build.py"), "data", "--out", str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True)
    for name in ("python-docs.jsonl", "python-topics.jsonl", *(f"python-{kind}.jsonl" for kind in TASKS)):
        rebuilt, committed = (tmp_path / name).read_bytes(), (assets / name).read_bytes()
        if sys.version_info[:3] in SAME_TEXTS:
            assert rebuilt == committed
        else:
            same = set(rebuilt.splitlines()) & set(committed.splitlines())
            assert len(same) >= 0.95 * len(committed.splitlines())


def test_folder_is_at_most_twelve_megabytes(assets):
    files = [path for path in assets.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert sum(path.stat().st_size for path in files) <= 12_000_000
    assert all((assets / f"python-{kind}.jsonl").stat().st_size <= 300_000 for kind in TASKS)


@pytest.mark.parametrize("kind", TASKS)
def test_rows_of_tasks_are_many_distinct_and_unseen_by_the_base(assets, kind):
    found = rows(assets / f"python-{kind}.jsonl")
    trained_on = set(json.loads((assets / "tiny-llama" / "corpus.json").read_text()))
    assert len(found) >= 500 and not trained_on & {row["document"] for row in found}
    assert len({json.dumps(row, sort_keys=True) for row in found}) == len(found)
    for row in found:
        if kind == "token-classification":
            assert len(row["tokens"]) == len(row["tags"]) and "B-NAME" in row["tags"]
        elif kind == "qa":
            (text,), (start,) = row["answers"]["text"], row["answers"]["answer_start"]
            assert row["context"][start : start + len(text)] == text
        else:
            assert all(isinstance(value, str) and value.strip() == value != "" for value in row.values())


def test_tags_of_a_signature_by_hand(assets):
    sys.path.insert(0, str(assets))
    try:
        from task_rows import tagged
    finally:
        sys.path.remove(str(assets))
    tokens, tags = tagged("a.B.run", "(x, *args, key=(1, 'a,b'))")
    assert list(zip(tokens, tags, strict=True)) == [
        ("a", "B-OWNER"), (".", "I-OWNER"), ("B", "I-OWNER"), (".", "O"), ("run", "B-NAME"), ("(", "O"),
        ("x", "B-PARAM"),
        (",", "O"), ("*", "O"), ("args", "B-PARAM"), (",", "O"), ("key", "B-PARAM"), ("=", "O"), ("(", "B-DEFAULT"),
        ("1", "I-DEFAULT"), (",", "I-DEFAULT"), ("'", "I-DEFAULT"), ("a", "I-DEFAULT"), (",", "I-DEFAULT"),
        ("b", "I-DEFAULT"), ("'", "I-DEFAULT"), (")", "I-DEFAULT"), (")", "O"),
    ]  # fmt: skip


def test_the_encoder_decoder_loads_and_has_learnt_to_copy(assets):
    tokenizer = AutoTokenizer.from_pretrained(assets / "tiny-t5")
    base = AutoModelForSeq2SeqLM.from_pretrained(assets / "tiny-t5").eval()
    assert base.dtype == torch.float32 and tokenizer("a")["input_ids"][-1] == tokenizer.eos_token_id
    losses = []
    for row in rows(assets / "python-embedding.jsonl")[:16]:
        ids = tokenizer(row["positive"], return_tensors="pt")["input_ids"]
        with torch.no_grad():
            losses.append(base(input_ids=ids, labels=ids).loss.item())
    # Sentences it has never seen: one that knows nothing is at ln 4096 = 8.3.
    assert sum(losses) / len(losses) < 4.0


def test_base_loads_in_float32_and_has_learnt_to_read(assets):
    tokenizer = AutoTokenizer.from_pretrained(assets / "tiny-llama")
    base = AutoModelForCausalLM.from_pretrained(assets / "tiny-llama")
    assert base.dtype == torch.float32 and base.config.max_position_embeddings == 512
    assert base.get_output_embeddings().weight is base.get_input_embeddings().weight
    bodies = [row["body"] for row in rows(assets / "python-topics.jsonl")][:8]
    losses = []
    for body in bodies:
        ids = tokenizer(body, return_tensors="pt", truncation=True, max_length=256)["input_ids"]
        with torch.no_grad():
            losses.append(base(input_ids=ids, labels=ids).loss.item())
    # Prose it has never seen: a base that knows nothing is at ln 4096 = 8.3.
    assert sum(losses) / len(losses) < math.log(200)


def test_template_marks_the_answers(assets):
    tokenizer = AutoTokenizer.from_pretrained(assets / "tiny-llama")
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    found = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    marked = [i for i, mark in zip(found["input_ids"], found["assistant_masks"], strict=True) if mark]
    assert tokenizer.decode(marked) == "b<|end|>"
