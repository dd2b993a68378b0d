"""The base of an endpoint comes from wherever training read it."""

from orchestrator.serve import base_model


def test_a_base_at_a_url_is_fetched_with_its_tokenizer(tiny_base, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    base = base_model.load(f"file://{tiny_base}", "main", threads=1)
    here = base_model.load(str(tiny_base), "main", threads=1)
    assert base.tokenizer("abc")["input_ids"] == here.tokenizer("abc")["input_ids"]
    assert sum(p.numel() for p in base.model.parameters()) == sum(p.numel() for p in here.model.parameters())
