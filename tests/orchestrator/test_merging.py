"""`raypeft merge`: from a version of the registry, or a folder, to a complete model; and what it refuses."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

import peft_dist
from orchestrator import api, wiring
from orchestrator.errors import ModelError, PlacementError, StorageError
from orchestrator.identity import base_identity
from orchestrator.lineage import Lineage
from orchestrator.machine import free_bytes
from orchestrator.merging import part
from orchestrator.merging.room import crew, own_bytes, shares
from orchestrator.registry import Registry
from peft_dist import LoraConfig
from tests.contract.methods_table import IDS, model_of
from tests.peft_dist.test_save_merged import Q, disturbed, llama, logits

TEXT = {"input_ids": IDS}


def in_process(request: dict[str, Any], folder: str, workers: int | None, on_event: Any) -> dict[str, Any]:
    """What the tasks do, one after the other and without Ray."""
    asked = part.Request(**request)
    found = part.prepare(asked, folder)
    num_workers = workers or 2
    total = sum(found["sizes"])
    for share in shares(found["sizes"], num_workers):
        for num_bytes in part.write(asked, folder, share, found["digest"]):
            on_event(
                {"event": "merging", "bytes": num_bytes, "total_bytes": total, "num_workers": num_workers}
            )
    return {
        "files": found["files"],
        "num_workers": num_workers,
        "num_bytes": total,
        "num_parameters": found["num_parameters"],
    }


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("RAYPEFT_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(wiring, "merge_files", lambda cluster: in_process)
    transformers.utils.logging.disable_progress_bar()
    return tmp_path / "home"


@pytest.fixture
def trained(tmp_path) -> Any:
    """A base and an adapter on it, in folders; the model of both."""
    llama(tied=True).save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = disturbed(peft_dist.get_peft_model(base, LoraConfig(**Q)))
    model.save_pretrained(tmp_path / "adapter")
    return model


@pytest.fixture
def registered(home, trained, tmp_path) -> str:
    lineage = Lineage(base_identity(str(tmp_path / "base")))
    return Registry(home / "registry").register("shop", tmp_path / "adapter", lineage).ref


def test_a_version_becomes_a_complete_model(raypeft, registered, trained, tmp_path):
    code, out, _ = raypeft(
        "merge", registered, "models/merged", "--workers", "3", "--max-shard-size", "8KB", "--json"
    )
    *events, result = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and result["event"] == "result"
    assert {event["event"] for event in events} == {"merging"}
    merged = tmp_path / "models" / "merged"
    assert result["out"] == str(merged) and result["adapter"] == "shop@1" and len(result["files"]) > 1
    opened = AutoModelForCausalLM.from_pretrained(merged)
    torch.testing.assert_close(logits(opened, TEXT), logits(trained, TEXT), rtol=1e-4, atol=1e-6)
    origin = json.loads((merged / "merged_from.json").read_text())
    assert origin["adapter"] == "shop@1" and origin["base"]["content_hash"] == result["base_hash"]
    assert origin["adapter_hash"] == api.show("shop@1").content_hash
    # Nothing else is left where it was made.
    assert [path.name for path in merged.parent.iterdir()] == ["merged"]


def test_an_alias_and_another_dtype(raypeft, registered, tmp_path):
    raypeft("alias", registered, "production")
    code, out, err = raypeft("merge", "shop@production", "out", "--dtype", "bfloat16")
    assert code == 0 and "shop@1 is in" in out and "parameters" in out, err
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16


def test_an_adapters_folder_with_a_base_at_a_url(raypeft, trained, tmp_path):
    fsspec = pytest.importorskip("fsspec")
    fsspec.filesystem("memory").put(str(tmp_path / "base"), "/merging/base", recursive=True)
    code, _, err = raypeft("merge", "adapter", "out", "--base", "memory://merging/base", "--quiet")
    assert code == 0 and not err
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(opened, TEXT), logits(trained, TEXT), rtol=1e-4, atol=1e-6)


def test_out_that_is_there_is_refused_and_stays(raypeft, registered, tmp_path):
    (tmp_path / "out").mkdir()
    code, out, err = raypeft("merge", registered, "out")
    assert code == 1 and "something is there already" in err and not out
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--dtype", "bfloat61"], "'bfloat61' is none of float32"),
        (["--workers", "0"], "0 workers merge nothing"),
        (["--max-shard-size", "large"], "max_shard_size: 'large' is no size"),
        (["--base", "nowhere"], "nowhere"),
    ],
)
def test_bad_options_leave_nothing(raypeft, registered, tmp_path, more, said):
    before = sorted(path.name for path in tmp_path.iterdir())
    code, _, err = raypeft("merge", registered, "deep/out", *more)
    assert code in (1, 2) and said in err
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_version_that_is_not_there(raypeft, registered):
    code, _, err = raypeft("merge", "shpo@1", "out")
    assert code == 1 and "shop" in err


@pytest.mark.parametrize("method", ["PROMPT_TUNING", "POLY"])
def test_what_cannot_be_merged_is_refused_before_a_cluster_starts(
    home, raypeft, tmp_path, monkeypatch, method
):
    def start(cluster: Any) -> None:
        raise AssertionError("a cluster was started")

    monkeypatch.setattr(wiring, "merge_files", start)
    model_of(method).save_pretrained(tmp_path / "adapter")
    llama().save_pretrained(tmp_path / "base")
    code, _, err = raypeft("merge", "adapter", "out", "--base", "base")
    assert code == 1 and f"{method} cannot be merged" in err and "raypeft deploy" in err


def test_a_base_that_has_changed_is_refused_unless_it_is_named(raypeft, registered, tmp_path):
    torch.manual_seed(7)
    changed = llama(tied=True)
    with torch.no_grad():
        changed.model.norm.weight.add_(1)
    changed.save_pretrained(tmp_path / "base")
    code, _, err = raypeft("merge", registered, "out")
    assert code == 1 and "no longer the one that shop@1 was trained on" in err and "--base" in err
    code, _, err = raypeft("merge", registered, "out", "--base", "base")
    assert code == 0 and "is not the base that shop@1 was trained on" in err


@pytest.mark.parametrize(
    "error", [ModelError("the base is broken."), KeyboardInterrupt(), OSError(28, "No space left")]
)
def test_a_merge_that_ends_early_leaves_nothing(home, registered, tmp_path, monkeypatch, error):
    def half(request: dict[str, Any], folder: str, *_: Any) -> dict[str, Any]:
        part.prepare(part.Request(**request), folder)
        raise error

    monkeypatch.setattr(wiring, "merge_files", lambda cluster: half)
    with pytest.raises(type(error)):
        api.merge(registered, tmp_path / "deep" / "out")
    assert not (tmp_path / "deep").exists()


def test_sigterm_takes_away_what_is_half_made(home, registered, tmp_path, monkeypatch):
    def terminated(request: dict[str, Any], folder: str, *_: Any) -> dict[str, Any]:
        part.prepare(part.Request(**request), folder)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
        raise AssertionError("nothing happened")

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(wiring, "merge_files", lambda cluster: terminated)
    with pytest.raises(KeyboardInterrupt):
        api.merge(registered, tmp_path / "deep" / "out")
    assert not (tmp_path / "deep").exists() and signal.getsignal(signal.SIGTERM) is before


def test_a_base_that_changes_under_way_is_noticed(home, registered, tmp_path, monkeypatch):
    def changing(request: dict[str, Any], folder: str, *_: Any) -> dict[str, Any]:
        asked = part.Request(**request)
        found = part.prepare(asked, folder)
        llama(tied=True, attention_bias=True).save_pretrained(tmp_path / "base")
        return {"done": list(part.write(asked, folder, [0], found["digest"]))}

    monkeypatch.setattr(wiring, "merge_files", lambda cluster: changing)
    with pytest.raises(RuntimeError, match="changed while they were merged"):
        api.merge(registered, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_somebody_else_who_was_first_is_not_overwritten(home, registered, tmp_path, monkeypatch):
    def slow(request: dict[str, Any], folder: str, *more: Any) -> dict[str, Any]:
        found = in_process(request, folder, *more)
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "theirs").touch()
        return found

    monkeypatch.setattr(wiring, "merge_files", lambda cluster: slow)
    with pytest.raises(StorageError, match="already"):
        api.merge(registered, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["theirs"]


# How many workers

MB = 10**6


@pytest.mark.parametrize(
    ("asked", "free", "cpus", "steps", "want", "why"),
    [
        (2, 9000 * MB, 8, 40, 2, None),
        (None, 90_000 * MB, 8, 40, 4, None),
        (None, 90_000 * MB, 2, 40, 2, None),
        (
            8,
            2000 * MB,
            8,
            40,
            3,
            "3 workers instead of 8: each takes 0.60 GB of memory, and 2.00 GB are free.",
        ),
        (8, 9000 * MB, 2, 40, 2, "2 workers instead of 8: Ray has 2 CPUs."),
        (8, 9000 * MB, 8, 3, 3, "3 workers instead of 8: there are 3 layers to write."),
    ],
)
def test_the_number_of_workers(asked, free, cpus, steps, want, why):
    found = crew(
        asked, num_steps=steps, num_cpus=cpus, idle_bytes=300 * MB, largest_bytes=100 * MB, free_bytes=free
    )
    assert (found.num_workers, found.reason) == (want, why)


def test_too_little_memory_for_one_is_refused_with_figures():
    with pytest.raises(PlacementError, match=r"takes 3\.00 GB of memory .* 1\.00 GB are free"):
        crew(1, num_steps=9, num_cpus=2, idle_bytes=300 * MB, largest_bytes=1000 * MB, free_bytes=1000 * MB)


def test_the_work_is_shared_out_in_order_and_evenly():
    sizes = [100, *[10] * 20, 100]
    found = shares(sizes, 4)
    assert [step for share in found for step in share] == list(range(22)) and len(found) == 4
    assert max(sum(sizes[step] for step in share) for share in found) <= 130
    assert shares([5], 3) == [[0]] and shares([1, 1], 2) == [[0], [1]]


def test_memory_is_read_from_this_machine():
    assert free_bytes() > 0 and 10 * MB < own_bytes() < 100_000 * MB


@pytest.mark.ray  # the tasks, the streams that say how far they are, and what an error of theirs becomes
@pytest.mark.timeout(300)
def test_two_tasks_of_ray(session_home, local_ray, trained, tmp_path):
    events: list[dict[str, Any]] = []
    result = api.merge(str(tmp_path / "adapter"), tmp_path / "out", workers=2, on_event=events.append)
    assert result.num_workers == 2
    assert events[-1]["bytes"] == events[-1]["total_bytes"] == result.num_bytes
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(opened, TEXT), logits(trained, TEXT), rtol=1e-4, atol=1e-6)

    adapter = tmp_path / "adapter/adapter_model.safetensors"
    adapter.write_bytes(adapter.read_bytes()[:-8])
    with pytest.raises(ModelError, match=r"cut short|truncated"):
        api.merge(str(tmp_path / "adapter"), tmp_path / "other", workers=2)
    model = peft_dist.get_peft_model(llama(), LoraConfig(**Q, lora_bias=True))
    model.save_pretrained(tmp_path / "biased")
    with pytest.raises(ModelError, match="adds to a bias, and this layer has none"):
        api.merge(str(tmp_path / "biased"), tmp_path / "other", base=str(tmp_path / "base"))
    assert not (tmp_path / "other").exists()
