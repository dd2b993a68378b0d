"""Versions, aliases, holders and endpoints, on a disk and on S3, alone and against others."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import shutil
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator import objects
from orchestrator.errors import ModelError, RegistryError, StorageError
from orchestrator.registry import Registry

from .adapters import BASE, lineage, make_adapter
from .s3 import run_together


@pytest.fixture
def registry(place: str) -> Registry:
    """An empty registry on each kind of storage."""
    return Registry(place)


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return make_adapter(tmp_path / "trained")


def everything(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def says(text: str) -> str:
    return f"^{re.escape(text)}$"


def test_a_version_is_stored_with_its_lineage(registry: Registry, adapter: Path) -> None:
    facts = lineage(
        run_id="job-1", spec_hash="s", resolved_spec="name: job\n", data_hash="d",
        metrics={"eval_loss": 1.25, "base.eval_loss": math.nan}, gate_passed=False, gate_reasons=("why",),
    )  # fmt: skip
    version = registry.register("docs", adapter, facts, train_rows=["aa", "bb", "aa"])
    assert version.ref == "docs@1" and version.url == f"{registry.url}/adapters/docs/1"
    again = registry.get("docs@1")
    assert replace(again, lineage=facts) == replace(version, lineage=facts)
    assert replace(again.lineage, metrics={}) == replace(facts, metrics={})
    assert again.lineage.metrics["eval_loss"] == 1.25
    assert math.isnan(again.lineage.metrics["base.eval_loss"])
    assert registry.train_rows(version) == {"aa", "bb"} == registry.train_rows("docs@1")
    assert set(version.files) == {"adapter_config.json", "adapter_model.safetensors", "train_rows.txt"}
    assert version.size_bytes > 100
    json.dumps(version.to_dict(), allow_nan=False)
    assert version.to_dict()["ref"] == "docs@1"


def test_the_content_hash_is_of_what_answers(registry: Registry, tmp_path: Path) -> None:
    first = registry.register("a", make_adapter(tmp_path / "1"), lineage())
    moved = make_adapter(tmp_path / "2", base_model_name_or_path="/elsewhere/tiny")
    same = registry.register("b", moved, lineage(run_id="other"))
    weights = registry.register("a", make_adapter(tmp_path / "3", value=2.0), lineage())
    config = registry.register("a", make_adapter(tmp_path / "4", lora_alpha=3), lineage())
    base = registry.register("a", tmp_path / "1", lineage(base=replace(BASE, content_hash="c" * 64)))
    assert first.content_hash == same.content_hash
    assert len({v.content_hash for v in (first, weights, config, base)}) == 4


def test_ids_resolve_by_number_alias_and_bare_name(registry: Registry, adapter: Path) -> None:
    for _ in range(3):
        registry.register("docs", adapter, lineage())
    assert registry.get("docs@2").version == 2
    assert registry.alias("docs", "production") is None
    with pytest.raises(RegistryError) as caught:
        registry.get("docs")
    assert str(caught.value) == (
        "'docs' means docs@production, and there is no such alias. Its versions: docs@1, docs@2, docs@3. "
        "Name one of them, or set the alias: raypeft alias docs@3 production."
    )
    version = registry.set_alias("docs", 2, "production")
    assert version.aliases == ("production",)
    assert registry.get("docs").version == registry.get("docs@production").version == 2
    registry.set_alias("docs", 3, "production")
    assert registry.get("docs").version == 3 and registry.get("docs@2").aliases == ()
    assert registry.alias("docs", "production") == 3 and registry.aliases("docs") == {"production": 3}
    with pytest.raises(RegistryError) as caught:
        registry.get("docs@candidate")
    assert str(caught.value) == (
        "docs has no version 'candidate': there is no such alias. Its versions: docs@1, docs@2, docs@3. "
        "production is docs@3. Name one of them, or set the alias: raypeft alias docs@3 candidate."
    )
    registry.remove_alias("docs", "production")
    assert registry.aliases("docs") == {} and registry.aliases("dogs") is None


def test_unknown_ids_say_what_there_is(registry: Registry, adapter: Path) -> None:
    with pytest.raises(RegistryError, match=says(
        f"the registry {registry.url} has no adapter 'docs'. It has none yet: raypeft run trains one, raypeft register "
        "takes one in."
    )):  # fmt: skip
        registry.get("docs@1")
    registry.register("docs", adapter, lineage())
    for ref, text in {
        "docs@7": "docs@7 does not exist. There are: docs@1.",
        "dogs@1": f"the registry {registry.url} has no adapter 'dogs'. Did you mean 'docs'?",
        "zzz": f"the registry {registry.url} has no adapter 'zzz'. There are: docs.",
        "../docs@1": "'../docs@1' is not an adapter's id. Write NAME@VERSION or NAME@ALIAS.",
    }.items():
        with pytest.raises(RegistryError, match=says(text)):
            registry.get(ref)
    with pytest.raises(RegistryError, match=says("docs@7 does not exist. There are: docs@1.")):
        registry.set_alias("docs", 7, "production")
    assert registry.versions("nothing") == [] and registry.alias("nothing", "production") is None
    assert registry.versions("../docs") == [] and registry.alias("../docs", "production") is None


@pytest.mark.parametrize("name", ["", "a/b", "a@b", "-a", ".a", "a b", "ä", "a" * 64])
def test_bad_names_are_refused(tmp_path: Path, adapter: Path, name: str) -> None:
    registry = Registry(tmp_path / "registry")
    with pytest.raises(RegistryError, match=says(
        f"'{name}' cannot be an adapter's name. Use letters, digits, '.', '_' and '-', at most 63, "
        "beginning with a letter or digit."
    )):  # fmt: skip
        registry.register(name, adapter, lineage())
    assert not (tmp_path / "registry").exists()


def test_an_alias_never_looks_like_a_version(registry: Registry, adapter: Path) -> None:
    registry.register("docs", adapter, lineage())
    for alias in ("7", "a@b", "", "a/b"):
        with pytest.raises(RegistryError, match=says(
            f"'{alias}' cannot be an alias. Use letters, digits, '.', '_' and '-', at most 63, "
            "beginning with a letter."
        )):  # fmt: skip
            registry.set_alias("docs", 1, alias)


def test_lists(registry: Registry, tmp_path: Path) -> None:
    assert registry.names() == [] and registry.adapters() == []
    for value in (1.0, 2.0):
        registry.register("b", make_adapter(tmp_path / "b", value), lineage(metrics={"eval_loss": value}))
    registry.register("a", make_adapter(tmp_path / "a"), lineage(parent="b@1"))
    registry.set_alias("b", 1, "production")
    assert registry.names() == ["a", "b"]
    a, b = registry.adapters()
    assert (b.name, b.latest, b.num_versions, b.aliases, b.base) == ("b", 2, 2, {"production": 1}, "tiny")
    assert b.to_dict()["latest"] == 2 and a.latest == 1
    versions = registry.versions("b")
    assert [v.version for v in versions] == [1, 2]
    assert [v.lineage.metrics["eval_loss"] for v in versions] == [1.0, 2.0]
    assert [v.aliases for v in versions] == [("production",), ()]
    assert versions[0].created <= versions[1].created
    assert registry.get("a@1").lineage.parent == "b@1"


def test_a_held_version_is_not_deleted(registry: Registry, adapter: Path) -> None:
    for _ in range(3):
        registry.register("docs", adapter, lineage())
    registry.set_alias("docs", 1, "production")
    registry.hold("docs@2", "tiny")
    registry.hold("docs@2", "tiny")
    assert registry.holders("docs@2") == ["tiny"]
    for ref, text in {
        "docs@1": "docs@1 cannot be deleted: docs@production is this version. "
        "Point the alias at another one first: raypeft alias docs@VERSION production.",
        "docs@2": "docs@2 cannot be deleted: endpoint 'tiny' serves it. "
        "Take it out first: raypeft undeploy docs@2.",
        "docs": "'docs' names no version. Delete by number: NAME@VERSION.",
        "docs@9": "docs@9 does not exist. There are: docs@1, docs@2, docs@3.",
    }.items():
        with pytest.raises(RegistryError, match=says(text)):
            registry.delete(ref)
    registry.delete("docs@3")
    with pytest.raises(RegistryError, match=says("docs@3 was deleted. There are: docs@1, docs@2.")):
        registry.get("docs@3")
    registry.release("docs@2", "tiny")
    registry.delete("docs@2")
    assert [version.version for version in registry.versions("docs")] == [1]


def test_deleted_numbers_are_never_given_out_again(registry: Registry, adapter: Path) -> None:
    registry.register("docs", adapter, lineage())
    registry.delete("docs@1")
    assert registry.names() == []
    assert registry.register("docs", adapter, lineage()).ref == "docs@2"
    with pytest.raises(RegistryError, match=r"docs@1 was deleted\."):
        registry.set_alias("docs", 1, "production")


def test_forced_deployments_stay_on_record(registry: Registry, adapter: Path) -> None:
    registry.register("docs", adapter, lineage())
    registry.hold("docs@1", "tiny", forced=True, reasons=["eval_loss < 1: fails"])
    registry.release("docs@1", "tiny")
    (forced,) = registry.get("docs@1").forced
    assert (forced["endpoint"], forced["reasons"]) == ("tiny", ["eval_loss < 1: fails"])
    assert registry.holders("docs@1") == []


def test_pull_gives_the_checked_folder(registry: Registry, adapter: Path, tmp_path: Path) -> None:
    version = registry.register("docs", adapter, lineage(), train_rows=["aa"])
    pulled = tmp_path / "deep" / "pulled"
    assert registry.pull("docs@1", pulled) == version
    assert everything(pulled) == [
        "adapter_config.json", "adapter_model.safetensors", "raypeft.json", "train_rows.txt",
    ]  # fmt: skip
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (pulled / name).read_bytes() == (adapter / name).read_bytes()
    with pytest.raises(
        StorageError, match=r"pulled: something is there already\. Name a new or empty folder\."
    ):
        registry.pull("docs@1", pulled)
    assert registry.register("copy", pulled, lineage()).content_hash == version.content_hash


def test_a_damaged_version_is_not_pulled(registry: Registry, adapter: Path, tmp_path: Path) -> None:
    version = registry.register("docs", adapter, lineage())
    objects.write(version.url + "/adapter_config.json", b'{"peft_type": "LORA"}')
    with pytest.raises(StorageError, match=says(
        f"{version.url}: adapter_config.json of docs@1 is not what was registered: its sha256 differs. "
        "Restore it from a backup, or train and register a new version."
    )):  # fmt: skip
        registry.pull("docs@1", tmp_path / "deep" / "pulled")
    objects.delete(version.url + "/adapter_model.safetensors")
    objects.delete(version.url + "/adapter_config.json")
    with pytest.raises(StorageError, match=r"docs@1 lacks adapter_config\.json\. Register it again\."):
        registry.pull("docs@1", tmp_path / "deep" / "pulled")
    assert not (tmp_path / "deep").exists()


def test_a_newer_format_is_refused_by_name(registry: Registry, adapter: Path) -> None:
    version = registry.register("docs", adapter, lineage())
    manifest = json.loads(objects.read(version.url + "/raypeft.json")[0])
    objects.write(version.url + "/raypeft.json", json.dumps(manifest | {"new_key": 1}).encode())
    assert registry.get("docs@1").content_hash == version.content_hash
    objects.write(version.url + "/raypeft.json", json.dumps(manifest | {"format": 2}).encode())
    with pytest.raises(StorageError, match=says(
        f"{version.url}/raypeft.json: a newer raypeft wrote this: format 2, and this one reads up to 1. "
        "Upgrade: pip install -U raypeft."
    )):  # fmt: skip
        registry.get("docs@1")


def test_rows_of_the_parent_count_as_trained_on(registry: Registry, adapter: Path) -> None:
    registry.register("docs", adapter, lineage(), train_rows=["aa"])
    registry.register("docs", adapter, lineage(parent="docs@1"), train_rows=["bb"])
    registry.register("docs", adapter, lineage(parent="docs@2"), train_rows=["cc"])
    registry.delete("docs@1")
    assert registry.train_rows("docs@3") == {"aa", "bb", "cc"}
    elsewhere = registry.register("docs", adapter, lineage(parent="org/adapter"))
    assert registry.train_rows(elsewhere) == frozenset()


def test_peft_loads_a_version_as_it_is(tmp_path: Path) -> None:
    import torch
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    def base():
        torch.manual_seed(0)
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=32,
                hidden_size=16,
                intermediate_size=16,
                num_hidden_layers=1,
                num_attention_heads=2,
            )
        )

    trained = get_peft_model(base(), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    trained.save_pretrained(tmp_path / "trained")
    registry = Registry(tmp_path / "registry")
    version = registry.register("docs", tmp_path / "trained", lineage(), train_rows=["aa"])
    tokens = torch.arange(8)[None]
    loaded = PeftModel.from_pretrained(base(), version.url)
    assert torch.equal(loaded(tokens).logits, trained(tokens).logits)


# what may not be registered


def test_unfit_folders_are_refused_and_leave_nothing(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "registry")
    good = make_adapter(tmp_path / "good")

    def spoilt(spoil) -> Path:
        shutil.rmtree(tmp_path / "bad", ignore_errors=True)
        shutil.copytree(good, tmp_path / "bad")
        spoil(tmp_path / "bad")
        return tmp_path / "bad"

    weights, config = "adapter_model.safetensors", "adapter_config.json"
    size = (good / weights).stat().st_size
    bad = tmp_path / "bad"
    cases = [
        (shutil.rmtree, f"'{bad}' is not a folder. Name an adapter's folder."),
        (
            lambda d: (d / config).unlink(),
            f"'{bad}' has no {config}, so it is not an adapter's folder. "
            "Name a folder that save_pretrained of a PEFT model wrote.",
        ),
        (
            lambda d: (d / config).write_text("{"),
            f"{bad}/{config} is damaged: Expecting property name enclosed in double quotes: line 1 column 2 "
            "(char 1). Save the adapter again.",
        ),
        (
            lambda d: (d / config).write_text("{}"),
            f"{bad}/{config} names no peft_type, so nothing can load it. "
            "Name a folder that save_pretrained of a PEFT model wrote.",
        ),
        (
            lambda d: (d / weights).unlink(),
            f"'{bad}' has no {weights}. Save the adapter again.",
        ),
        (
            lambda d: (d / weights).rename(d / "adapter_model.bin"),
            f"'{bad}' has only pickled weights (adapter_model.bin): reading runs code. "
            "Save it as safetensors: model.save_pretrained(DIR, safe_serialization=True).",
        ),
        (
            lambda d: os.truncate(d / weights, size - 8),
            f"{bad}/{weights} is truncated: it has {size - 8} bytes of {size}. Save or fetch it again.",
        ),
        (
            lambda d: os.truncate(d / weights, 5),
            f"{bad}/{weights} is truncated: it has 5 bytes. Save or fetch it again.",
        ),
        (
            lambda d: (d / weights).write_bytes(b"\x02" + b"\0" * 7 + b"no"),
            f"{bad}/{weights} is not a safetensors file. Save or fetch it again.",
        ),
        (
            lambda d: (d / weights).write_bytes(b"\x02" + b"\0" * 7 + b"{}"),
            f"{bad}/{weights} has no tensors. Save the adapter again.",
        ),
        (
            lambda d: make_adapter(d, value=math.nan),
            f"the tensor base_model.model.layers.0.q_proj.lora_A.weight of {bad}/{weights} has NaN or "
            "infinite values. Train it again: it diverged.",
        ),
    ]  # fmt: skip
    for spoil, text in cases:
        with pytest.raises(ModelError, match=says(text)):
            registry.register("docs", spoilt(spoil), lineage())
    assert not (tmp_path / "registry").exists()


@pytest.mark.parametrize(("value", "fits"), [(1.0, True), (math.inf, False), (math.nan, False), (3e38, True)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_nan_is_seen_in_every_float_type(tmp_path: Path, dtype: str, value: float, fits: bool) -> None:
    import torch
    from safetensors.torch import save_file

    folder = make_adapter(tmp_path / "a")
    tensors = {"x": torch.tensor([0.0, value, -1.0], dtype=getattr(torch, dtype)), "n": torch.arange(3)}
    save_file(tensors, folder / "adapter_model.safetensors")
    registry = Registry(tmp_path / "registry")
    if fits:
        assert registry.register("a", folder, lineage()).version == 1
    else:
        with pytest.raises(ModelError, match="has NaN or infinite values"):
            registry.register("a", folder, lineage())


@pytest.mark.parametrize(
    ("number", "text"),
    [(errno.ENOSPC, "the disk is full."), (errno.EROFS, "the file system is read-only.")],
)
@pytest.mark.parametrize("broken", ["fsync", "mkdir", "rename", "link"])
def test_a_registry_that_cannot_be_written(
    tmp_path: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch, broken: str, number: int, text: str
) -> None:
    registry = Registry(tmp_path / "deep" / "registry")
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    before = everything(tmp_path)
    real = getattr(os, broken)

    def refuse(path, *args, **kwargs):
        if isinstance(path, int) or str(path).startswith(str(tmp_path / "deep")):
            raise OSError(number, os.strerror(number))
        return real(path, *args, **kwargs)

    monkeypatch.setattr(os, broken, refuse)
    with pytest.raises(StorageError, match=re.escape(text)):
        registry.register("docs", adapter, lineage())
    if broken in ("fsync", "mkdir"):
        with pytest.raises(StorageError, match=re.escape(text)):
            registry.check_writable() if broken == "fsync" else registry.register("x", adapter, lineage())
    monkeypatch.undo()
    assert everything(tmp_path) == before


def test_a_full_disk_at_the_last_step_gives_the_number_back(
    tmp_path: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = Registry(tmp_path / "registry")
    registry.register("docs", adapter, lineage())
    before = everything(tmp_path)
    real = os.rename

    def full(source, target):
        if str(target).endswith("/2"):
            raise OSError(errno.ENOSPC, "full")
        real(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(os, "rename", full)
        with pytest.raises(StorageError, match="the disk is full"):
            registry.register("docs", adapter, lineage())
    assert everything(tmp_path) == before
    assert registry.register("docs", adapter, lineage()).ref == "docs@2"


def test_storage_without_conditional_writes_is_refused(adapter: Path) -> None:
    with pytest.raises(
        StorageError, match="memory:// has no write here that fails if another process was first"
    ):
        Registry("memory://registry").register("docs", adapter, lineage())


KILLED = """
import os, sys
sys.path.insert(0, {root!r})
from tests.orchestrator.adapters import lineage
from orchestrator.registry import Registry
from orchestrator.objects import local, s3
real = os.rename
os.rename = lambda a, b: os.kill(os.getpid(), 9) if str(b).endswith("/2") else real(a, b)
store = s3._store() if sys.argv[1].startswith("s3") else None
if store is not None:
    put = store.put_file
    store.put_file = lambda a, b: os.kill(os.getpid(), 9) if b.endswith("raypeft.json") else put(a, b)
Registry(sys.argv[1]).register("docs", sys.argv[2], lineage())
"""


def test_a_killed_registration_is_never_seen(registry: Registry, adapter: Path, repository: Path) -> None:
    registry.register("docs", adapter, lineage())
    with pytest.raises(AssertionError):  # the child was killed
        run_together(KILLED.format(root=str(repository)), [registry.url, str(adapter)])
    assert [version.version for version in registry.versions("docs")] == [1]
    with pytest.raises(RegistryError, match=says("docs@2 does not exist. There are: docs@1.")):
        registry.get("docs@2")
    assert registry.register("docs", adapter, lineage()).ref == "docs@3"
    if objects.is_local(registry.url):  # and what it left is gone
        assert not [name for name in everything(Path(registry.url)) if ".tmp" in name]


RACE = """
import sys
sys.path.insert(0, {root!r})
from tests.orchestrator.adapters import lineage
from orchestrator.registry import Registry
registry, who = Registry(sys.argv[1]), sys.argv[2]
for i in range(100):
    facts = lineage(run_id=f"{{who}}{{i}}")
    print(registry.register("docs", sys.argv[3], facts, train_rows=[who * 8]).version)
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_hundred_races_make_two_hundred_whole_versions(
    registry: Registry, tmp_path: Path, repository: Path
) -> None:
    """Two processes, one name, a hundred registrations each: every number once, none torn or mixed."""
    folders = {"a": make_adapter(tmp_path / "a", 1.0), "b": make_adapter(tmp_path / "b", 2.0)}
    program = RACE.format(root=str(repository))
    outputs = run_together(program, *([registry.url, who, str(folder)] for who, folder in folders.items()))
    numbers = [[int(line) for line in out.split()] for out in outputs]
    assert sorted(numbers[0] + numbers[1]) == list(range(1, 201))
    interleaved = sum(number + 1 in numbers[1] for number in numbers[0])
    assert interleaved > 5, "the two never raced"
    for who, mine in zip("ab", numbers, strict=True):
        for i, number in enumerate(mine):
            version = registry.get(f"docs@{number}")
            assert version.lineage.run_id == f"{who}{i}"
            if i % 10 == 0:
                copy = tmp_path / "copies" / str(number)
                registry.pull(version.ref, copy)  # checks every hash
                assert (copy / "train_rows.txt").read_text() == who * 8 + "\n"
                weights = "adapter_model.safetensors"
                assert (copy / weights).read_bytes() == (folders[who] / weights).read_bytes()


ALIASES = """
import sys
sys.path.insert(0, {root!r})
from orchestrator.registry import Registry
registry, who, rounds = Registry(sys.argv[1]), sys.argv[2], int(sys.argv[3])
for i in range(rounds):
    registry.set_alias("docs", 1 + i % 2, f"{{who}}{{i}}")
    registry.set_alias("docs", 1 + i % 2, "production")
    registry.hold("docs@1", f"{{who}}{{i}}")
    registry.update_endpoint("tiny", lambda state: {{"count": (state or {{"count": 0}})["count"] + 1}})
"""


def test_no_alias_holder_or_endpoint_change_is_lost(
    registry: Registry, adapter: Path, repository: Path
) -> None:
    registry.register("docs", adapter, lineage())
    registry.register("docs", adapter, lineage())
    rounds = 25 if objects.is_local(registry.url) else 8
    program = ALIASES.format(root=str(repository))
    run_together(program, *([registry.url, who, str(rounds)] for who in "ab"))
    expected = {f"{who}{i}": 1 + i % 2 for who in "ab" for i in range(rounds)}
    aliases = registry.aliases("docs")
    assert aliases.pop("production") in (1, 2)
    assert aliases == expected
    assert sorted(registry.holders("docs@1")) == sorted(expected)
    assert registry.endpoint_state("tiny") == {"format": 1, "count": 2 * rounds}


def test_an_alias_and_a_deletion_exclude_each_other(tmp_path: Path, adapter: Path) -> None:
    """Whichever comes first wins, and an alias never points at nothing."""
    registry = Registry(tmp_path / "registry")
    for round_ in range(1, 16):
        registry.register("docs", adapter, lineage())
        outcomes: list[str] = []

        def attempt(act, outcomes: list[str] = outcomes) -> None:
            try:
                act()
                outcomes.append("did")
            except RegistryError:
                outcomes.append("refused")

        acts = [
            lambda number=round_: registry.set_alias("docs", number, f"a{number}"),
            lambda number=round_: registry.delete(f"docs@{number}"),
        ]
        threads = [threading.Thread(target=attempt, args=(act,)) for act in acts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        there = {version.version for version in registry.versions("docs")}
        assert set(registry.aliases("docs").values()) <= there


def test_endpoint_state(registry: Registry) -> None:
    assert registry.endpoint_names() == [] and registry.endpoint_state("tiny") is None
    state = registry.update_endpoint("tiny", lambda state: {"format": 1, "adapters": ["docs@1"]})
    assert state == registry.endpoint_state("tiny") == {"format": 1, "adapters": ["docs@1"]}
    registry.update_endpoint("tiny", lambda state: state | {"adapters": []})
    assert registry.endpoint_state("tiny") == {"format": 1, "adapters": []}
    assert registry.endpoint_names() == ["tiny"]
    assert registry.update_endpoint("tiny", lambda state: None) is None
    assert registry.endpoint_names() == [] and registry.endpoint_state("tiny", was_there=True) is None
    with pytest.raises(StorageError, match="has no trace of endpoint 'tinny'"):
        registry.endpoint_state("tinny", was_there=True)
    assert registry.update_endpoint("tiny", lambda state: {"again": state is None})["again"] is True


def test_a_change_that_changes_nothing_writes_nothing(tmp_path: Path, adapter: Path) -> None:
    registry = Registry(tmp_path / "registry")
    registry.register("docs", adapter, lineage())
    registry.set_alias("docs", 1, "production")
    book = Path(registry.url) / "adapters" / "docs" / "book.json"
    before = book.stat().st_ino
    registry.set_alias("docs", 1, "production")
    assert book.stat().st_ino == before
