"""What travels with a job: local files under names that hold on every node, up to what Ray takes."""

import io
import os
import zipfile

import pytest

from orchestrator.cluster import Cluster, cluster_at, load_cluster
from orchestrator.errors import DataError
from orchestrator.spec.load import load_job_text
from orchestrator.spec.sweep import SweepSpec
from orchestrator.submit import payload
from orchestrator.submit.payload import pack

from .job import make_job, write_inputs

CLUSTER = cluster_at("http://head:8265")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory with the job's inputs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAYPEFT_CLUSTER", raising=False)
    write_inputs(tmp_path)
    return tmp_path


def unzip(packed):
    archive = zipfile.ZipFile(io.BytesIO(packed.zip()))
    return {name: archive.read(name) for name in archive.namelist()}


def test_paths_below_the_working_directory_keep_their_names(folder):
    packed = pack(make_job(), CLUSTER)
    assert set(unzip(packed)) == {"base/config.json", "rows.jsonl", "job.yaml", "cluster.yaml", "start.sh"}
    assert packed.spec.model.base_model == "base"


def test_other_paths_are_moved_and_the_spec_says_where(folder, monkeypatch):
    (folder / "work").mkdir()
    monkeypatch.chdir(folder / "work")
    packed = pack(make_job(str(folder / "base"), "../rows.jsonl"), CLUSTER)
    spec = load_job_text(packed.texts["job.yaml"]).spec
    assert spec.model.base_model == "files/0/base"
    assert spec.data.datasets[0].path == "files/1/rows.jsonl"
    assert {"files/0/base/config.json", "files/1/rows.jsonl"} <= set(unzip(packed))


def test_a_pattern_brings_what_it_matches(folder):
    (folder / "parts" / "deep").mkdir(parents=True)
    for name in ("a.jsonl", "b.jsonl", "deep/c.jsonl", "no.txt"):
        (folder / "parts" / name).write_text("{}\n")
    packed = pack(make_job(data="parts/*.jsonl"), CLUSTER)
    assert packed.spec.data.datasets[0].path == "parts/*.jsonl"
    assert {"parts/a.jsonl", "parts/b.jsonl"} < set(unzip(packed))
    assert "parts/no.txt" not in unzip(packed)
    moved = pack(make_job(data=str(folder / "parts" / "*.jsonl")), CLUSTER)
    assert moved.spec.data.datasets[0].path == "files/1/*.jsonl"
    assert {"files/1/a.jsonl", "files/1/b.jsonl"} < set(unzip(moved))


def test_adapters_that_a_sweep_begins_with_travel(folder, monkeypatch):
    for name in ("one", "two", "three"):
        (folder / name).mkdir()
        (folder / name / "adapter_config.json").write_text("{}")
    (folder / "work").mkdir()
    monkeypatch.chdir(folder / "work")
    here = [str(folder / name) for name in ("one", "two", "three")]
    job = make_job(str(folder / "base"), "../rows.jsonl")
    whole = [{"type": "lora", "init_from": here[2]}, {"type": "lora"}]
    for space in (
        {"adapter.init_from": {"choice": [here[0], "docs@1", here[1]]}, "training.seed": {"randint": [1, 3]}},
        {"paired": [{"adapter.init_from": here[0]}, {"adapter.init_from": "docs@1"}]},
        {"adapter": {"choice": whole}},
        {"paired": [{"adapter": each} for each in whole]},
    ):
        packed = pack(job.model_copy(update={"sweep": SweepSpec(space=space)}), CLUSTER)
        files, text = unzip(packed), packed.texts["job.yaml"]
        sent = [name for name in files if name.endswith("adapter_config.json")]
        assert sent and all(name.removesuffix("/adapter_config.json") in text for name in sent)
        assert str(folder) not in text and ("docs@1" in text) == ("docs@1" in str(space))


def test_what_is_elsewhere_stays_as_it_is(folder):
    packed = pack(make_job("meta/llama", "s3://bucket/rows.jsonl"), CLUSTER)
    assert packed.local == ()
    assert packed.spec.data.datasets[0].path == "s3://bucket/rows.jsonl"


def test_the_same_content_is_the_same_package(folder):
    first = pack(make_job(), CLUSTER).zip()
    os.utime(folder / "rows.jsonl", (0, 0))
    assert pack(make_job(), CLUSTER).zip() == first


def test_secrets_go_by_name_alone(folder, monkeypatch):
    (folder / "token").write_text("planted-value")
    monkeypatch.setenv("B_TOKEN", "planted-value")
    packed = pack(make_job(secrets={"A_TOKEN": f"file:{folder}/token", "B_TOKEN": "env"}), CLUSTER)
    assert packed.spec.secrets == {"A_TOKEN": "env", "B_TOKEN": "env"}
    assert not [name for name, content in unzip(packed).items() if b"planted" in content]


def test_what_is_too_large_is_refused_with_what_to_do(folder, monkeypatch):
    (folder / "rows.jsonl").write_bytes(os.urandom(3_000_000))
    monkeypatch.setattr(payload, "UPLOAD_LIMIT_BYTES", 2_000_000)
    with pytest.raises(DataError) as caught:
        pack(make_job(), CLUSTER).zip()
    assert str(caught.value) == (
        "data.datasets.0.path: 'rows.jsonl' (3 MB) cannot travel with the job: its local files are 3 MB, and "
        "Ray's Jobs API takes 2 MB (compressed). Copy it to storage that the cluster reads and name that: "
        "s3://..., or a folder that every node mounts, or a hub id."
    )


def test_what_shrinks_below_the_limit_travels(folder, monkeypatch):
    (folder / "rows.jsonl").write_bytes(b"x" * 3_000_000)
    monkeypatch.setattr(payload, "UPLOAD_LIMIT_BYTES", 2_000_000)
    assert len(pack(make_job(), CLUSTER).zip()) < 2_000_000


def test_a_file_that_cannot_be_read_is_named(folder, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(DataError, match=r"model.base_model: 'base/config.json' cannot be read."):
        pack(make_job(), CLUSTER)


def test_the_job_finds_the_clusters_places(folder):
    shared = Cluster(
        "c", "address", "s3://b/runs", "s3://b/adapters", address="http://head:8265", shared=True
    )
    (folder / "inside.yaml").write_text(pack(make_job(), shared).texts["cluster.yaml"])
    inside = load_cluster("inside.yaml")
    assert inside.is_inside
    assert (inside.storage, inside.registry, inside.serve) == ("s3://b/runs", "s3://b/adapters", shared.serve)
