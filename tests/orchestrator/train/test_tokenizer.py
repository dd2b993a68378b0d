"""Tokenizers are found wherever a base may be."""

import fsspec
import pytest

from orchestrator.errors import ModelError
from orchestrator.spec.job import ModelSpec
from orchestrator.train.rows.tokenizer import load_tokenizer

from .chats import TINY_LLAMA


def test_directory():
    tok = load_tokenizer(ModelSpec(base_model=str(TINY_LLAMA)))
    assert tok.chat_template and tok.pad_token == "<|pad|>" and len(tok) == 4096


def test_url(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    fs = fsspec.filesystem("memory")
    for path in TINY_LLAMA.iterdir():
        if path.suffix in (".json", ".jinja"):
            fs.pipe(f"/bases/tiny/{path.name}", path.read_bytes())
    try:
        there = load_tokenizer(ModelSpec(base_model="memory://bases/tiny"))
    finally:
        fs.rm("/bases", recursive=True)
    here = load_tokenizer(ModelSpec(base_model=str(TINY_LLAMA)))
    assert there("What is zip?")["input_ids"] == here("What is zip?")["input_ids"]
    assert there.chat_template == here.chat_template


def test_tokenizer_without_padding_pads_with_its_end(tmp_path):
    tok = load_tokenizer(ModelSpec(base_model=str(TINY_LLAMA)))
    tok.pad_token = None
    tok.save_pretrained(tmp_path)
    assert load_tokenizer(ModelSpec(base_model=str(tmp_path))).pad_token == "<|end|>"


@pytest.mark.parametrize("base", ["no/such/folder", "nobody/no-such-base", "nosuch://bucket/base"])
def test_base_that_is_nowhere(base):
    with pytest.raises(ModelError) as caught:
        load_tokenizer(ModelSpec(base_model=base))
    message = f"model.base_model: the base '{base}' has no tokenizer that can be loaded: "
    assert str(caught.value).startswith(message)
