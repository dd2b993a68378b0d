"""Bases are loaded whole or refused in words; nothing is half loaded."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import fsspec
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel

from peft_dist.errors import BaseModelError
from peft_dist.folder import is_hub_id, local_folder
from peft_dist.loading import load_base


def tiny() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
        )
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "raypeft" / "folders"


def refusal(path: object, **kwargs: object) -> str:
    with pytest.raises(BaseModelError) as caught:
        load_base(str(path), **kwargs)
    return str(caught.value)


def test_a_directory_is_loaded_as_it_was_saved(folder: Path) -> None:
    expected = tiny().state_dict()
    loaded = load_base(str(folder))
    assert type(loaded) is LlamaForCausalLM
    assert all(torch.equal(value, expected[key]) for key, value in loaded.state_dict().items())
    assert load_base(str(folder), dtype=torch.bfloat16).dtype == torch.bfloat16


def test_dtype_auto_is_the_stored_one(tmp_path: Path) -> None:
    tiny().to(torch.bfloat16).save_pretrained(tmp_path / "bf16")
    assert load_base(str(tmp_path / "bf16"), dtype="auto").dtype == torch.bfloat16
    assert load_base(str(tmp_path / "bf16")).dtype == torch.float32


def test_a_url_is_fetched_once_and_again_when_it_changes(folder: Path, own_cache: Path) -> None:
    memory = fsspec.filesystem("memory")
    memory.put(str(folder), "/bases/one", recursive=True)
    try:
        expected = tiny().state_dict()
        for _ in range(2):
            loaded = load_base("memory://bases/one")
            assert all(torch.equal(value, expected[key]) for key, value in loaded.state_dict().items())
        assert [entry.is_dir() for entry in own_cache.iterdir()] == [True]
        config = json.loads((folder / "config.json").read_text())
        memory.pipe("/bases/one/config.json", json.dumps(config | {"rms_norm_eps": 0.5}).encode())
        assert load_base("memory://bases/one").config.rms_norm_eps == 0.5
    finally:
        memory.rm("/bases", recursive=True)


def test_threads_that_want_one_folder_fetch_it_once(folder: Path, own_cache: Path) -> None:
    memory = fsspec.filesystem("memory")
    memory.put(str(folder), "/bases/two", recursive=True)
    fetched: list[str] = []
    real = memory.get_file

    def counted(remote: str, local: str, **kwargs: object) -> None:
        fetched.append(remote)
        real(remote, local, **kwargs)

    try:
        counting = mock.patch.object(
            type(memory), "get_file", lambda _, *args, **kwargs: counted(*args, **kwargs)
        )
        with counting, ThreadPoolExecutor(4) as threads:
            found = set(threads.map(lambda _: local_folder("memory://bases/two", ("*.json",)), range(8)))
    finally:
        memory.rm("/bases", recursive=True)
    assert len(found) == 1 and len(fetched) == len(set(fetched)) > 0
    assert list(own_cache.iterdir()) == list(found)


def test_a_missing_url_is_named(own_cache: Path) -> None:
    assert refusal("memory://bases/nowhere") == (
        "base model: 'memory://bases/nowhere' does not exist. "
        "Name a directory, an fsspec URL (s3://...) or a hub id (ORGANISATION/NAME)."
    )
    assert not own_cache.exists()


def test_a_missing_directory_is_named(tmp_path: Path) -> None:
    assert refusal(tmp_path / "nowhere") == (
        f"base model: '{tmp_path / 'nowhere'}' is not a directory. "
        "Name a directory, an fsspec URL (s3://...) or a hub id (ORGANISATION/NAME)."
    )


def test_hub_ids_are_told_from_paths(tmp_path: Path) -> None:
    assert is_hub_id("gpt2") and is_hub_id("meta-llama/Llama-3.1-8B")
    assert not is_hub_id("./base") and not is_hub_id("/base") and not is_hub_id("a/b/c")
    assert not is_hub_id(str(tmp_path)) and not is_hub_id("s3://bucket/base")


def test_a_hub_id_out_of_reach_is_refused() -> None:
    message = refusal("nobody/nothing-at-all")
    assert message.startswith("base model: 'nobody/nothing-at-all' cannot be loaded: ")


@pytest.mark.parametrize("kept", [4, 100, 5000])
def test_truncated_weights_are_refused(folder: Path, kept: int) -> None:
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:kept])
    if kept == 5000:
        expected = f"{file}: has 5000 bytes, its header says {len(whole)}. It was cut short: copy it again."
    else:
        expected = f"{file}: not a safetensors file, or cut short ({kept} bytes). Copy it again."
    assert refusal(folder) == f"base model: {expected}"


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "sharded"
    tiny().save_pretrained(folder, max_shard_size="6KB")
    assert load_base(str(folder))
    shards = sorted(folder.glob("*.safetensors"))
    shards[1].unlink()
    assert refusal(folder) == (
        f"base model: '{folder}' lacks 1 of {len(shards)} weight files: {shards[1].name}. "
        "Copy them beside model.safetensors.index.json."
    )


def test_pickled_weights_are_refused(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert refusal(folder) == (
        f"base model: '{folder}' has its weights in pytorch_model.bin, which runs code when it is read; only "
        "safetensors are loaded. Convert it where you trust it: "
        "AutoModel.from_pretrained(DIR).save_pretrained(NEW_DIR)."
    )
    (folder / "pytorch_model.bin").unlink()
    assert refusal(folder) == f"base model: '{folder}' has no model.safetensors."


def test_configs_that_are_none_are_refused(folder: Path) -> None:
    config = folder / "config.json"
    config.write_text("{")
    assert refusal(folder).startswith(f"base model: {config} is not JSON: ")
    config.write_text("{}")
    assert refusal(folder) == f"base model: {config} names no model_type; it is not a model's config."
    config.unlink()
    assert refusal(folder) == f"base model: '{folder}' has no config.json; it is not a model's directory."


def test_an_unknown_architecture_is_named(folder: Path) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_type": "lama5"}))
    message = refusal(folder)
    assert message.startswith(f"base model: '{folder}' is of model_type 'lama5', which transformers ")
    assert message.endswith(
        "does not know. If the model brings its own code and you trust it, set trust_remote_code."
    )


def test_weights_that_lack_tensors_are_refused_rather_than_made_up(tmp_path: Path) -> None:
    folder = tmp_path / "headless"
    LlamaModel(tiny().config).save_pretrained(folder)
    assert refusal(folder) == (
        f"base model: the weights of '{folder}' lack 1 tensors of LlamaForCausalLM, such as lm_head.weight. "
        "They were saved from another architecture, or for another task than CAUSAL_LM."
    )
    # A classifier's head is new by nature.
    assert load_base(str(folder), task="SEQ_CLS")


def test_weights_of_another_size_are_refused(folder: Path) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"intermediate_size": 48}))
    assert refusal(folder).startswith(f"base model: '{folder}' cannot be loaded: ")


def test_an_unknown_task_is_refused() -> None:
    assert refusal("gpt2", task="CAUSAL") == (
        "load_base: task is 'CAUSAL'; it is one of CAUSAL_LM, SEQ_2_SEQ_LM, SEQ_CLS, TOKEN_CLS, "
        "QUESTION_ANS, FEATURE_EXTRACTION. Closest: 'CAUSAL_LM'."
    )
