"""What `raypeft inspect` shows."""

import io
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from orchestrator.errors import ModelError
from orchestrator.spec.job import JobSpec
from orchestrator.train.worker.inspection import histogram, inspect, inspected, max_positions, token_texts

from .chats import TINY_LLAMA, tokenizer


def job(path, **data):
    data = {"datasets": [{"path": str(path)}], **data}
    return JobSpec(name="j", model={"base_model": str(TINY_LLAMA)}, data=data)


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    with path.open("w") as file:
        for i in range(20):
            turns = [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": "ü " * (i + 1)}]
            print(json.dumps({"messages": turns}), file=file)
    return path


def test_rows_are_shown_as_the_model_reads_them(rows):
    found = inspect(job(rows, val_set_size=2, sequence_len=30), num_rows=3)
    assert len(found.rows) == 3 and found.has_chat_template
    row = found.rows[0]
    text = "".join(token.text for token in row.tokens)
    assert text == "<|begin|><|user|>\nq0<|end|>\n<|assistant|>\nü <|end|>\n"
    assert "".join(token.text for token in row.tokens if token.trained) == "ü <|end|>"
    assert row.where == f"{rows}:1"
    assert found.report.evaluation_rows == 2
    assert found.share_truncated == found.report.truncated / 20 > 0
    assert sum(bin.count for bin in found.lengths) == 20


def test_dict_is_json_and_holds_the_account(rows):
    found = json.loads(json.dumps(inspect(job(rows), num_rows=1).to_dict()))
    assert found["rows"][0]["tokens"][0] == {"text": "<|begin|>", "trained": False}
    assert set(found) == {"rows", "lengths", "share_truncated", "has_chat_template", "report"}
    assert {"dropped_overlong", "duplicates", "train_rows", "evaluation_rows"} <= set(found["report"])


def shown(inspection, **console) -> str:
    out = io.StringIO()
    inspection.show(Console(file=out, width=100, **console))
    return out.getvalue()


def test_trained_tokens_are_coloured_or_bracketed(rows):
    found = inspect(job(rows, val_set_size=2), num_rows=1)
    plain = shown(found)
    assert "<|assistant|>\n⟦ü <|end|>⟧" in plain
    assert f"{rows}: 20 rows" in plain and "18 rows to train on, 2 to evaluate" in plain
    assert "0.0% truncated at 512 tokens" in plain and "0 dropped, 0 duplicates" in plain
    coloured = shown(found, force_terminal=True, color_system="standard")
    assert "⟦" not in coloured and "\x1b[1;32m" in coloured


def test_text_that_looks_like_markup_is_shown_as_it_is(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": f"[bold]x[/nope] {i}"}) + "\n" for i in range(3)))
    spec = JobSpec(
        name="j",
        model={"base_model": str(TINY_LLAMA)},
        data={"datasets": [{"path": str(path), "type": "text"}], "val_set_size": 0},
    )
    assert "[bold]x[/nope] 0" in shown(inspect(spec, num_rows=1))


def test_default_template_is_mentioned(rows):
    found = inspected(job(rows), tokenizer(None), max_len=512, num_rows=0)
    assert not found.has_chat_template and found.rows == ()
    assert "The base brings no chat template: chats have `### User:`" in shown(found)


@given(st.text(max_size=60))
def test_token_texts_join_to_the_text(text):
    tok = tokenizer_once()
    ids = tok(text)["input_ids"]
    texts = token_texts(ids, tok)
    assert len(texts) == len(ids)
    assert "".join(texts) == tok.decode(ids, clean_up_tokenization_spaces=False)


def tokenizer_once(cache=[]):  # noqa: B006
    if not cache:
        cache.append(tokenizer())
    return cache[0]


@given(st.lists(st.integers(1, 5000), max_size=80))
def test_histogram_counts_each_length_once(lengths):
    bins = histogram(lengths)
    assert len(bins) <= 12
    for bin in bins:
        assert bin.count == sum(bin.first <= length <= bin.last for length in lengths)
    assert sum(bin.count for bin in bins) == len(lengths)


def test_positions_that_a_config_leaves(rows):
    spec = job(rows)
    assert max_positions({"max_position_embeddings": 512}, spec) == 512
    assert max_positions({"n_positions": 1024}, spec) == 1024
    assert max_positions({"text_config": {"max_position_embeddings": 64}}, spec) == 64
    assert max_positions({"hidden_size": 4}, spec) is None
    adapter = type(spec.adapter)(type="prompt_tuning", num_virtual_tokens=16)
    prompt = spec.model_copy(update={"adapter": adapter})
    assert max_positions({"max_position_embeddings": 512}, prompt) == 496


def test_base_without_a_tokenizer_is_named(rows, tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text('{"model_type": "llama", "max_position_embeddings": 64}')
    spec = job(rows).model_copy(update={"model": type(job(rows).model)(base_model=str(base))})
    with pytest.raises(ModelError) as caught:
        inspect(spec)
    message = str(caught.value)
    assert message.startswith(f"model.base_model: the base '{base}' has no tokenizer that can be loaded: ")
    assert message.endswith("Save one beside the weights with tokenizer.save_pretrained(DIRECTORY).")
