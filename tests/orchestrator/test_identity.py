"""What a base and a job's data are, by content: equal for copies, different for the smallest change."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import fsspec
import huggingface_hub
import numpy as np
import pytest
from safetensors.numpy import save_file

from orchestrator import identity, model_folder
from orchestrator.errors import DataError, ModelError
from orchestrator.identity import base_identity, data_hash
from orchestrator.spec.load import load_job_mapping

from .adapters import make_base

COMMIT = "1234567890" * 4


def hash_of(path: str | Path) -> str:
    return base_identity(str(path)).content_hash


def test_every_spelling_of_a_path_is_one_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = make_base(tmp_path / "models" / "tiny")
    (tmp_path / "link").symlink_to(base)
    monkeypatch.chdir(tmp_path)
    spellings = [
        "models/tiny",
        "./models/tiny/",
        str(base),
        f"file://{base}",
        "models/../models/tiny",
        "link",
    ]
    identities = {base_identity(spelling) for spelling in spellings}
    assert len(identities) == 1
    (found,) = identities
    assert (found.name, found.revision, found.source) == ("tiny", None, str(base))
    assert len(found.content_hash) == 64


def test_a_renamed_copy_is_the_same_base(tmp_path: Path) -> None:
    base = make_base(tmp_path / "tiny")
    copy = shutil.copytree(base, tmp_path / "other-name")
    config = json.loads((copy / "config.json").read_text())
    changed = config | {"_name_or_path": "elsewhere", "transformers_version": "9.9"}
    (copy / "config.json").write_text(json.dumps(changed, indent=4, sort_keys=True))
    (copy / "model.safetensors").rename(copy / "weights.safetensors")
    first, second = base_identity(str(base)), base_identity(str(copy))
    assert first.content_hash == second.content_hash and first.is_same(second)
    assert second.name == "other-name"


def test_another_base_has_another_identity(tmp_path: Path) -> None:
    base = make_base(tmp_path / "a")
    others = [make_base(tmp_path / "b", seed=1), make_base(tmp_path / "c", hidden_size=8)]
    one_value = make_base(tmp_path / "d")
    path = one_value / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    hashes = {hash_of(folder) for folder in (base, *others, one_value)}
    assert len(hashes) == 4


def test_large_weights_are_sampled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identity, "_WHOLE_BYTES", 1000)
    monkeypatch.setattr(identity, "_SAMPLE_BYTES", 64)
    read: list[int] = []
    real = model_folder.ModelFolder.read

    def counting(self, name, start=None, end=None):
        data = real(self, name, start, end)
        read.append(len(data))
        return data

    base = make_base(tmp_path / "a")
    save_file({"w": np.zeros(100_000, np.float32)}, base / "model.safetensors")
    monkeypatch.setattr(model_folder.ModelFolder, "read", counting)
    first = hash_of(base)
    assert sum(read) < 2000
    save_file({"w": np.ones(100_000, np.float32)}, base / "model.safetensors")
    assert hash_of(base) != first


def test_sharded_weights_count_with_all_their_files(tmp_path: Path) -> None:
    base = make_base(tmp_path / "a")
    (base / "model.safetensors").unlink()
    names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    for i, name in enumerate(names):
        save_file({f"w{i}": np.full(4, i, np.float32)}, base / name)
    (base / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"w0": names[0], "w1": names[1]}})
    )
    first = hash_of(base)
    save_file({"w1": np.full(4, 9, np.float32)}, base / names[1])
    assert hash_of(base) != first
    (base / names[1]).unlink()
    with pytest.raises(ModelError) as caught:
        hash_of(base)
    assert str(caught.value) == (
        f"the base '{base}' lacks {names[1]}, which model.safetensors.index.json names. Fetch it again."
    )


def test_a_base_is_read_over_fsspec_too(tmp_path: Path) -> None:
    base = make_base(tmp_path / "tiny")
    memory = fsspec.filesystem("memory")
    memory.put(str(base), "/bases/tiny", recursive=True)
    found = base_identity("memory://bases/tiny")
    assert found.content_hash == hash_of(base)
    assert (found.name, found.source) == ("tiny", "memory://bases/tiny")
    memory.rm("/bases", recursive=True)


def test_what_is_no_base_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    base = make_base(tmp_path / "tiny")
    size = (base / "model.safetensors").stat().st_size
    empty = tmp_path / "empty"
    empty.mkdir()
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"base_model_name_or_path": "org/model"}')
    damaged = make_base(tmp_path / "damaged")
    (damaged / "config.json").write_text("{")
    bare = make_base(tmp_path / "bare")
    (bare / "model.safetensors").unlink()
    pickled = shutil.copytree(bare, tmp_path / "pickled")
    (pickled / "pytorch_model.bin").write_bytes(b"")
    os.truncate(base / "model.safetensors", size - 10)
    cases = {
        "./tinny": f"the base './tinny' does not exist: there is no {tmp_path / 'tinny'}. Did you mean '{base}'?",
        "/no/where/at/all": "the base '/no/where/at/all' does not exist. "
        "Name a directory, an fsspec URL (s3://...) or a hub id (ORGANISATION/MODEL).",
        "tiny/config.json": "the base 'tiny/config.json' is a file, not a folder. "
        "Name the folder that it is in.",
        "empty": "'empty' has no config.json, so it is not a base model's folder. "
        "Name a folder that transformers' save_pretrained wrote.",
        "adapter": "'adapter' is an adapter, not a base model. "
        "Name its base (org/model) here, and the adapter as adapter.init_from.",
        "damaged": "config.json of the base 'damaged' is damaged: "
        "Expecting property name enclosed in double quotes: line 1 column 2 (char 1).",
        "bare": "the base 'bare' has no weights: no *.safetensors. Fetch it again.",
        "pickled": "the base 'pickled' has only pickled weights (pytorch_model.bin): reading runs code. "
        "Save it as safetensors: model.save_pretrained(DIR, safe_serialization=True).",
        "tiny": f"model.safetensors of the base 'tiny' is truncated: it has {size - 10} bytes of {size}. "
        "Save or fetch it again.",
    }
    for given, text in cases.items():
        with pytest.raises(ModelError) as caught:
            base_identity(given)
        assert str(caught.value) == text


# the hub, by stand-ins: no network in tests


class Hub:
    """`HfApi` that knows one model, or fails with `error`."""

    error: Exception | None = None

    def model_info(self, name: str, revision: str, timeout: float):
        if self.error:
            raise self.error
        return type("Info", (), {"sha": COMMIT})

    dataset_info = lambda self, name, timeout: self.model_info(name, "main", timeout)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> type[Hub]:
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(Hub, "error", None)
    monkeypatch.chdir(tmp_path)
    return Hub


def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A hub cache that holds org/model."""
    folder = tmp_path / "cache" / "models--org--model"
    snapshot = make_base(folder / "snapshots" / COMMIT)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(COMMIT)
    real = huggingface_hub.try_to_load_from_cache
    monkeypatch.setattr(
        huggingface_hub,
        "try_to_load_from_cache",
        lambda name, file, revision: real(name, file, cache_dir=tmp_path / "cache", revision=revision),
    )
    return snapshot


def test_a_branch_of_the_hub_becomes_a_commit(hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    snapshot = cache(monkeypatch, tmp_path)
    found = base_identity("org/model")
    assert (found.name, found.revision, found.source) == ("model", COMMIT, "org/model")
    assert found.content_hash == hash_of(make_base(tmp_path / "same"))
    assert base_identity(str(snapshot)).name == "model"


def test_offline_the_cached_commit_is_used(hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cache(monkeypatch, tmp_path)
    monkeypatch.setattr(Hub, "error", ConnectionError("no network"))
    assert base_identity("org/model").revision == COMMIT
    assert base_identity("org/model", COMMIT).revision == COMMIT


def test_what_the_hub_refuses(hub, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(name: str) -> Exception:
        return type(name, (Exception,), {})()

    hint = "Name a directory, an fsspec URL (s3://...) or a hub id (ORGANISATION/MODEL)."
    cases = [
        (
            "RepositoryNotFoundError",
            f"the base 'org/model' is neither a directory nor a model on the hub. {hint}",
        ),
        ("RevisionNotFoundError", "'org/model' has no revision 'v9' on the hub. Check model.revision."),
        (
            "GatedRepoError",
            "the hub does not give 'org/model' to you: it is gated. "
            "Accept its terms on the hub and set HF_TOKEN (in the job: secrets: {HF_TOKEN: env}).",
        ),
    ]
    for name, text in cases:
        monkeypatch.setattr(Hub, "error", refused(name))
        with pytest.raises(ModelError) as caught:
            base_identity("org/model", "v9")
        assert str(caught.value) == text
    monkeypatch.setattr(Hub, "error", ConnectionError())
    for offline, why in ((True, "HF_HUB_OFFLINE is set"), (False, "the hub does not answer")):
        monkeypatch.setattr(model_folder.constants, "HF_HUB_OFFLINE", offline)
        with pytest.raises(ModelError) as caught:
            base_identity("org/model")
        assert str(caught.value) == (
            f"the base 'org/model' is no directory here, {why}, and no copy of it is cached. {hint}"
        )


# data


def spec_of(*paths: str, evaluation: tuple[str, ...] = ()):
    return load_job_mapping(
        {
            "name": "small",
            "model": {"base_model": "base"},
            "data": {"datasets": [{"path": path} for path in paths]},
            "eval": {"datasets": [{"path": path} for path in evaluation]},
        }
    ).spec


def test_data_is_its_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.jsonl").write_text("1\n")
    Path("b.jsonl").write_text("2\n")
    Path("folder").mkdir()
    Path("folder/x.jsonl").write_text("1\n")
    Path("folder/y.jsonl").write_text("2\n")
    first = data_hash(spec_of("a.jsonl"))
    assert data_hash(spec_of(str(tmp_path / "a.jsonl"))) == first
    assert data_hash(spec_of("./folder/x.jsonl")) == first  # moved and renamed
    assert (
        data_hash(spec_of("*.jsonl")) == data_hash(spec_of("folder")) == data_hash(spec_of("folder/*.jsonl"))
    )
    different = [
        first,
        data_hash(spec_of("b.jsonl")),
        data_hash(spec_of("a.jsonl", "b.jsonl")),
        data_hash(spec_of("b.jsonl", "a.jsonl")),
        data_hash(spec_of("a.jsonl", evaluation=("b.jsonl",))),
        data_hash(spec_of("folder")),
    ]
    assert len(set(different)) == len(different)
    Path("folder/.hidden").write_text("x")
    assert data_hash(spec_of("folder")) == different[-1]
    Path("folder/y.jsonl").write_text("3\n")
    assert data_hash(spec_of("folder")) != different[-1]


def test_data_elsewhere_is_its_checksum(s3_bucket) -> None:
    def put(key: str, body: bytes) -> None:
        s3_bucket.client.put_object(Bucket=s3_bucket.name, Key=key, Body=body)

    put("data/a.jsonl", b"1\n")
    put("data/b.jsonl", b"2\n")
    one, pattern, folder = (
        data_hash(spec_of(f"{s3_bucket.url}/data{rest}")) for rest in ("/a.jsonl", "/*.jsonl", "")
    )
    assert one != pattern == folder
    put("data/a.jsonl", b"changed\n")
    fsspec.filesystem("s3").invalidate_cache()
    assert data_hash(spec_of(f"{s3_bucket.url}/data/a.jsonl")) != one
    with pytest.raises(
        DataError, match=r"data\.datasets\[0\]\.path: 's3://.*/none' does not exist\. Check the address\."
    ):
        data_hash(spec_of(f"{s3_bucket.url}/none"))


def test_a_dataset_of_the_hub_is_its_commit(hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    first = data_hash(spec_of("org/rows"))
    monkeypatch.setattr(Hub, "error", ConnectionError())
    monkeypatch.setattr(identity.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(DataError) as caught:
        data_hash(spec_of("org/rows"))
    assert str(caught.value) == (
        "data.datasets[0].path: 'org/rows' is neither a file here nor a dataset that the hub gives. "
        "Check the path; for a dataset of the hub check the network and HF_TOKEN."
    )
    refs = tmp_path / "cache" / "datasets--org--rows" / "refs"
    refs.mkdir(parents=True)
    (refs / "main").write_text(COMMIT)
    assert data_hash(spec_of("org/rows")) == first


def test_missing_data_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("rows").mkdir()
    Path("rows/train.jsonl").write_text("1\n")
    Path("empty").mkdir()
    for path, text in {
        "rows/trian.jsonl": f"'rows/trian.jsonl' does not exist: there is no {tmp_path / 'rows/trian.jsonl'}. "
        "Did you mean 'rows/train.jsonl'?",
        "nowhere/at/all.jsonl": f"'nowhere/at/all.jsonl' does not exist: there is no "
        f"{tmp_path / 'nowhere/at/all.jsonl'}. Check the path.",
        "rows/*.csv": f"'rows/*.csv' matches no file: there is no {tmp_path / 'rows/*.csv'}. Check the pattern.",
        "empty": "the folder 'empty' has no files. Put data into it.",
    }.items():
        with pytest.raises(DataError) as caught:
            data_hash(spec_of(path))
        assert str(caught.value) == f"data.datasets[0].path: {text}"
    with pytest.raises(DataError, match=r"^eval\.datasets\[0\]\.path: 'x\.csv' does not exist"):
        data_hash(spec_of("rows/train.jsonl", evaluation=("x.csv",)))


def test_identifying_needs_no_torch() -> None:
    from .s3 import run_together

    (out,) = run_together(
        "import sys, orchestrator.identity, orchestrator.gate, orchestrator.lineage, orchestrator.registry;"
        "print(sorted({'torch', 'ray', 'transformers', 'datasets'} & set(sys.modules)))",
        [],
    )
    assert out.strip() == "[]"
