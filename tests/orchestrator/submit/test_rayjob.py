"""A job as a KubeRay RayJob: complete, valid, with the workers that the job asks for."""

import subprocess
import sys

import pytest
import yaml

from orchestrator.cluster import Cluster, load_cluster
from orchestrator.errors import ClusterError, PlacementError
from orchestrator.spec.canonical import canonical_hash
from orchestrator.spec.load import load_job_text
from orchestrator.submit import inline
from orchestrator.submit.jobs import run_id
from orchestrator.submit.rayjob import kubernetes_name, rayjob
from tests.kuberay_schemas import problems

from .job import make_job, write_inputs


@pytest.fixture
def cluster(repository, tmp_path, monkeypatch) -> Cluster:
    """The cluster file of this repository, in a working directory with the job's inputs."""
    monkeypatch.delenv("RAYPEFT_CLUSTER", raising=False)
    monkeypatch.chdir(tmp_path)
    write_inputs(tmp_path)
    return load_cluster(str(repository / "clusters" / "kuberay.yaml"))


def manifest(cluster, **keys):
    return yaml.safe_load(rayjob(make_job(**keys), cluster))


def groups(found):
    return found["spec"]["rayClusterSpec"]["workerGroupSpecs"]


def test_it_satisfies_kuberays_schema(cluster):
    assert problems(manifest(cluster, secrets={"HF_TOKEN": "env"}, resources={"num_workers": 4})) == []


def test_it_is_complete(cluster):
    found = manifest(cluster)
    spec = found["spec"]
    assert found["metadata"]["name"] == kubernetes_name(run_id(make_job()))
    assert spec["entrypoint"] == "python -m orchestrator.submit.inline --json"
    assert spec["shutdownAfterJobFinishes"] is True
    assert spec["ttlSecondsAfterFinished"] > 0
    assert spec["metadata"] == {"raypeft.run": run_id(make_job())}
    assert groups(found)[0]["replicas"] == 1


def test_the_job_inside_is_the_job(cluster):
    variables = yaml.safe_load(manifest(cluster)["spec"]["runtimeEnvYAML"])["env_vars"]
    inside = load_job_text(variables[inline.SPEC_VARIABLE]).spec
    assert canonical_hash(inside) == canonical_hash(make_job())
    assert all(isinstance(value, str) for value in variables.values())


def test_relative_paths_are_read_in_the_image(cluster):
    text = rayjob(make_job(), cluster)
    assert "# Read inside the image, relative paths below /home/ray/raypeft: base, rows.jsonl" in text
    assert (
        yaml.safe_load(yaml.safe_load(text)["spec"]["runtimeEnvYAML"])["working_dir"]
        == "local:///home/ray/raypeft"
    )


def test_secrets_are_referred_to(cluster, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "planted-value")
    text = rayjob(make_job(secrets={"HF_TOKEN": "env"}), cluster)
    assert "planted" not in text
    head = yaml.safe_load(text)["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][
        0
    ]
    assert head["env"] == [
        {
            "name": "HF_TOKEN",
            "valueFrom": {"secretKeyRef": {"name": "raypeft-credentials", "key": "HF_TOKEN"}},
        }
    ]


@pytest.mark.parametrize(
    ("resources", "replicas"),
    [
        ({"num_workers": 3}, 3),  # a GPU each, by default
        ({"num_workers": 3, "gpus_per_worker": 0}, 1),  # eight CPUs a pod
        ({"num_workers": 3, "gpus_per_worker": 0, "cpus_per_worker": 4}, 2),
        ({"num_workers": 8}, 8),
        ({"num_workers": (2, 6)}, 6),
    ],
)
def test_there_are_pods_for_all_workers(cluster, resources, replicas):
    assert groups(manifest(cluster, resources=resources))[0]["replicas"] == replicas


def test_an_elastic_job_has_the_pods_of_the_group_that_gives_most(cluster):
    found = groups(manifest(cluster, resources={"num_workers": (2, 40)}))
    assert [group["replicas"] for group in found] == [0, 2], "two pods of eight GPUs each"


@pytest.mark.parametrize(
    ("resources", "words"),
    [
        ({"num_workers": (17, 40)}, "17 workers are more than a worker group can ever give (16)."),
        ({"num_workers": 17}, "17 workers are more than a worker group can ever give (16)."),
        ({"gpus_per_worker": 9}, "no worker group has room for one worker (1 CPUs, 9 GPUs)."),
        ({"labels": {"ray.io/accelerator-type": "T4"}}, "labels {'ray.io/accelerator-type': 'T4'}"),
    ],
)
def test_what_no_group_can_give_is_refused(cluster, resources, words):
    with pytest.raises(PlacementError) as caught:
        manifest(cluster, resources=resources)
    assert words in str(caught.value)
    assert "rayjob.yaml" in str(caught.value)


def test_a_manifest_of_another_kind_is_refused(cluster, repository):
    other = Cluster("k", "kuberay", "/r", "/a", manifest=str(repository / "clusters/kuberay/raycluster.yaml"))
    with pytest.raises(ClusterError, match="a RayCluster is not a RayJob with a rayClusterSpec"):
        manifest(other)


@pytest.mark.parametrize(
    ("run", "name"),
    [
        ("quick-12345678", "quick-12345678"),
        ("My_Job.v2-12345678", "my-job-v2-12345678"),
        ("x" * 100 + "-12345678", "x" * 31 + "-12345678"),
        ("___-12345678", "job-12345678"),
    ],
)
def test_names_are_kubernetes_names(run, name):
    assert kubernetes_name(run) == name


def test_the_files_are_written_where_the_job_runs(tmp_path):
    code = (
        "import os, sys\nfrom pathlib import Path\nfrom orchestrator.submit import inline\n"
        "print(*inline.write_files(Path(sys.argv[1])))"
    )
    environment = {inline.SPEC_VARIABLE: "name: x\n", inline.CLUSTER_VARIABLE: "kind: local\n"}
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=environment, check=True)
    assert (tmp_path / "job.yaml").read_text() == "name: x\n"
    assert (tmp_path / "cluster.yaml").read_text() == "kind: local\n"
