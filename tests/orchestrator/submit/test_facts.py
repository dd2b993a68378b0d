"""What a cluster has, from a running one, a launcher file and a manifest."""

import math

import pytest

from orchestrator.cluster import Cluster, cluster_at
from orchestrator.errors import ClusterError
from orchestrator.submit.dashboard import Dashboard
from orchestrator.submit.facts import (
    facts_at,
    facts_of_launcher,
    facts_of_manifest,
    quantity,
    read_facts,
)

from .stub import NODE, cluster, dashboard, nodes


def test_a_running_cluster_says_nodes_and_versions():
    dead = {**NODE, "state": "DEAD"}
    with dashboard(cluster("2.60.0", "3.11.7", NODE, dead)) as stub:
        facts = read_facts(cluster_at(stub.url))
    assert len(facts.nodes) == 1
    assert (facts.nodes[0].cpus, facts.nodes[0].gpus, facts.nodes[0].gpu_type) == (4, 1, "L4")
    assert (facts.max_cpus, facts.max_gpus, facts.max_nodes) == (4, 1, 1)
    assert (facts.ray_version, facts.python_version, facts.source) == ("2.60.0", "3.11.7", stub.url)


def status(**types):
    return {"data": {"clusterStatus": {"autoscalerReport": {"nodeTypeMapping": types}}}}


def test_an_autoscaler_that_only_looks_adds_nothing():
    plain = status(abc123="node_abc123")
    with dashboard(cluster("2.60.0", "3.11.7", **{"/api/cluster_status": plain})) as stub:
        assert facts_at(Dashboard(stub.url)).max_cpus == 4


def test_an_autoscaler_that_launches_leaves_the_maximum_open():
    growing = status(abc123="head", def456="gpu-spot")
    with dashboard(cluster("2.60.0", "3.11.7", **{"/api/cluster_status": growing})) as stub:
        facts = facts_at(Dashboard(stub.url))
    assert facts.max_gpus == math.inf
    assert facts.several_nodes


def test_another_server_is_no_cluster():
    with (
        dashboard({"/api/v0/cluster_metadata": {"data": {}}, "/api/v0/nodes": nodes()}) as stub,
        pytest.raises(ClusterError, match="not the dashboard of a Ray that we know"),
    ):
        facts_at(Dashboard(stub.url))


LAUNCHER = """
max_workers: 6
provider: {type: aws}
head_node_type: head
available_node_types:
  head: {resources: {CPU: 2}, node_config: {}}
  gpu:
    resources: {CPU: 16, GPU: 4}
    node_config: {}
    max_workers: 8
    labels: {ray.io/accelerator-type: A10G}
"""


def test_a_launcher_file_counts_what_may_be_launched(tmp_path):
    (tmp_path / "ray.yaml").write_text(LAUNCHER)
    facts = facts_of_launcher(str(tmp_path / "ray.yaml"))
    # six workers of the group's eight, since max_workers limits them all, and the head
    assert (facts.max_nodes, facts.max_gpus, facts.max_cpus) == (7, 24, 6 * 16 + 2)
    assert facts.nodes[0].gpu_type == "A10G"


def test_a_launcher_file_that_leaves_resources_to_the_cloud_says_nothing(tmp_path):
    (tmp_path / "ray.yaml").write_text(LAUNCHER.replace("CPU: 16, GPU: 4", ""))
    assert facts_of_launcher(str(tmp_path / "ray.yaml")) is None


def test_machines_of_ones_own_say_nothing(tmp_path):
    (tmp_path / "ray.yaml").write_text("provider: {type: local, head_ip: a, worker_ips: [b]}\n")
    assert facts_of_launcher(str(tmp_path / "ray.yaml")) is None


MANIFEST = """
kind: RayJob
spec:
  rayClusterSpec:
    rayVersion: 2.60.0
    enableInTreeAutoscaling: true
    headGroupSpec:
      rayStartParams: {num-cpus: "0"}
      template: {spec: {containers: [{name: head, resources: {limits: {cpu: "4", memory: 16Gi}}}]}}
    workerGroupSpecs:
      - groupName: gpu
        replicas: 1
        minReplicas: 0
        maxReplicas: 5
        labels: {ray.io/accelerator-type: H100}
        template:
          spec:
            containers:
              - {name: w, resources: {limits: {cpu: 7500m, memory: 64Gi, nvidia.com/gpu: "2"}}}
"""


def test_a_manifest_counts_the_most_replicas(tmp_path):
    (tmp_path / "job.yaml").write_text(MANIFEST)
    facts = facts_of_manifest(str(tmp_path / "job.yaml"))
    assert (facts.max_nodes, facts.max_gpus, facts.max_cpus) == (6, 10, 37.5)  # the head takes no work
    assert facts.nodes[0].memory == 64 * 2**30
    assert facts.nodes[0].gpu_type == "H100"
    assert facts.ray_version == "2.60.0"


def test_without_the_autoscaler_a_manifest_has_its_replicas(tmp_path):
    (tmp_path / "job.yaml").write_text(MANIFEST.replace("Autoscaling: true", "Autoscaling: false"))
    assert facts_of_manifest(str(tmp_path / "job.yaml")).max_gpus == 2


def test_a_file_that_is_not_yaml_is_named(tmp_path):
    (tmp_path / "job.yaml").write_text("kind: [")
    with pytest.raises(ClusterError, match=r"job\.yaml: the file cannot be read"):
        facts_of_manifest(str(tmp_path / "job.yaml"))


def test_a_launcher_without_a_file_says_nothing():
    assert read_facts(Cluster("x", "kuberay", "/runs", "/adapters")) is None


@pytest.mark.parametrize(
    ("text", "number"),
    [("500m", 0.5), ("4", 4), (2, 2), ("16Gi", 2**34), ("1.5", 1.5), ("2k", 2000), ("?", 0)],
)
def test_quantities(text, number):
    assert quantity(text) == number
