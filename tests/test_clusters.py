"""The files under clusters/: ours load, Ray's pass Ray's own validator, Kubernetes' pass KubeRay's
schemas, and all of them keep what docs/clusters.md promises: GPU workers, a head on demand, closed ports,
a token."""

import re
from pathlib import Path

import pytest
import yaml
from ray.autoscaler._private.docker import validate_docker_config
from ray.autoscaler._private.util import prepare_config, validate_config

from orchestrator.cluster import load_cluster
from orchestrator.submit.facts import read_facts

from .kuberay_schemas import problems, validator

CLUSTERS = Path(__file__).parent.parent / "clusters"
OURS = sorted(path for path in CLUSTERS.glob("*.yaml") if not path.stem.endswith("-ray"))
LAUNCHERS = sorted(CLUSTERS.glob("*-ray.yaml"))
MANIFESTS = sorted((CLUSTERS / "kuberay").glob("*.yaml"))


def read(path):
    return yaml.safe_load(path.read_text())


def by_name(path):
    return path.stem


def test_every_environment_is_there():
    assert {path.stem for path in OURS} == {"local", "address", "on-prem", "aws", "gcp", "kuberay"}
    assert {path.stem for path in LAUNCHERS} == {"on-prem-ray", "aws-ray", "gcp-ray"}
    assert {read(path)["kind"] for path in MANIFESTS} == {"RayCluster", "RayJob", "RayService"}


@pytest.mark.parametrize("path", OURS, ids=by_name)
def test_our_files_load_by_name_and_by_path(path, monkeypatch):
    monkeypatch.chdir(CLUSTERS.parent)
    monkeypatch.delenv("RAYPEFT_CLUSTER", raising=False)
    cluster = load_cluster(path.stem)
    assert cluster == load_cluster(str(path.relative_to(CLUSTERS.parent)))
    assert cluster.path is not None
    assert cluster.shared or cluster.kind == "local"  # the others say where runs and adapters are kept


@pytest.mark.parametrize(
    "path", [path for path in OURS if path.stem not in ("local", "address")], ids=by_name
)
def test_the_files_that_ours_name_say_what_there_will_be(path):
    cluster = load_cluster(str(path))
    facts = read_facts(cluster)
    if path.stem == "on-prem":
        assert facts is None  # only the machines know what is in them
    else:
        assert facts.max_gpus >= 8 and facts.several_nodes
        assert cluster.shared


@pytest.mark.parametrize("path", LAUNCHERS, ids=by_name)
def test_rays_own_validator_takes_the_launcher_files(path):
    prepared = prepare_config(read(path))
    validate_config(prepared)
    validate_docker_config(prepared)


@pytest.mark.parametrize("path", LAUNCHERS, ids=by_name)
def test_rays_validator_refuses_a_wrong_key(path):
    prepared = prepare_config(read(path) | {"max_wokers": 3})
    with pytest.raises(Exception, match="max_wokers"):
        validate_config(prepared)


def commands(config):
    return " ".join([*config["head_start_ray_commands"], *config["worker_start_ray_commands"]])


@pytest.mark.parametrize("path", LAUNCHERS, ids=by_name)
def test_launched_clusters_ask_for_a_token_and_keep_their_dashboard_to_themselves(path):
    config = read(path)
    starts = re.findall(r"\S*\s*ray start", commands(config))
    assert starts == ["RAY_AUTH_MODE=token ray start"] * 2
    assert "--dashboard-host=127.0.0.1" in commands(config) and "0.0.0.0" not in commands(config)
    assert config["file_mounts"]["/home/ray/.ray/auth_token"] == "~/.ray/auth_token"


@pytest.mark.parametrize("path", LAUNCHERS, ids=by_name)
def test_launched_clusters_install_the_package(path):
    config = read(path)
    assert "pip install -c ~/raypeft/constraints.txt ~/raypeft" in config["setup_commands"]
    assert config["file_mounts"]["/home/ray/raypeft"] == "."


def is_spot(node_config) -> bool:
    market = node_config.get("InstanceMarketOptions", {}).get("MarketType")
    return market == "spot" or node_config.get("scheduling", {}).get("provisioningModel") == "SPOT"


@pytest.mark.parametrize("path", [path for path in LAUNCHERS if path.stem != "on-prem-ray"], ids=by_name)
def test_clouds_have_gpu_workers_some_spot_and_a_head_on_demand(path):
    config = read(path)
    types = dict(config["available_node_types"])
    head = types.pop(config["head_node_type"])
    assert not is_spot(head["node_config"])
    assert all(each["resources"]["GPU"] for each in types.values())
    assert {is_spot(each["node_config"]) for each in types.values()} == {True, False}
    for each in types.values():
        market = "spot" if is_spot(each["node_config"]) else "on-demand"
        assert each["labels"]["ray.io/market-type"] == market


def test_aws_uses_a_group_of_ones_own_since_the_launchers_is_open_to_the_world():
    types = read(CLUSTERS / "aws-ray.yaml")["available_node_types"].values()
    assert all(each["node_config"]["SecurityGroupIds"] for each in types)
    assert "security_group" not in read(CLUSTERS / "aws-ray.yaml")["provider"]


def test_gcp_uses_a_network_of_ones_own_since_the_default_is_open_to_the_world():
    for each in read(CLUSTERS / "gcp-ray.yaml")["available_node_types"].values():
        assert all(
            "subnetworks/raypeft" in net["subnetwork"] for net in each["node_config"]["networkInterfaces"]
        )


@pytest.mark.parametrize("path", MANIFESTS, ids=by_name)
def test_kuberays_schemas_take_the_manifests(path):
    assert problems(read(path)) == []


@pytest.mark.parametrize("path", MANIFESTS, ids=by_name)
def test_the_schemas_refuse_an_unknown_key_a_wrong_type_and_a_missing_one(path):
    """The negative control: as published, the schemas would let the first of these pass."""
    validator("RayJob")
    typo, kind, lacking = read(path), read(path), read(path)
    for manifest in (typo, kind, lacking):
        spec = manifest["spec"]
        group = (spec.get("rayClusterSpec") or spec.get("rayClusterConfig") or spec)["workerGroupSpecs"][0]
        if manifest is typo:
            group["maxReplica"] = 3
        elif manifest is kind:
            group["maxReplicas"] = "many"
        else:
            del group["template"]
        assert len(problems(manifest)) == 1


@pytest.mark.parametrize("path", MANIFESTS, ids=by_name)
def test_clusters_on_kubernetes_have_gpu_workers_and_a_token(path):
    spec = read(path)["spec"]
    cluster = spec.get("rayClusterSpec") or spec.get("rayClusterConfig") or spec
    assert cluster["authOptions"]["mode"] == "token"
    limits = cluster["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert limits["nvidia.com/gpu"] == "1"
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"


@pytest.mark.parametrize("name", ["raycluster", "rayservice"])
def test_what_stays_keeps_its_heads_state_in_redis(name):
    spec = read(CLUSTERS / "kuberay" / f"{name}.yaml")["spec"]
    options = (spec.get("rayClusterConfig") or spec)["gcsFaultToleranceOptions"]
    assert options["backend"] == "redis" and options["redisAddress"].startswith("redis://")
    assert "value" not in options["redisPassword"]  # by reference alone


def test_the_service_names_an_application_that_can_be_built(tmp_path):
    config = yaml.safe_load(read(CLUSTERS / "kuberay" / "rayservice.yaml")["spec"]["serveConfigV2"])
    application = config["applications"][0]
    module, _, name = application["import_path"].partition(":")
    assert (module, name) == ("orchestrator.serve.declared", "endpoint")
    assert set(application["args"]) == {"endpoint", "registry"}
    assert application["name"] == f"raypeft-{application['args']['endpoint']}"
    assert [each["name"] for each in application["deployments"]] == ["endpoint"]


def test_the_image_has_the_rays_version_of_the_manifests():
    text = (CLUSTERS / "Dockerfile").read_text()
    version = re.search(r"FROM rayproject/ray:([\d.]+)-py311-\$\{PLATFORM\}", text)[1]
    for path in MANIFESTS:
        spec = read(path)["spec"]
        cluster = spec.get("rayClusterSpec") or spec.get("rayClusterConfig") or spec
        assert cluster["rayVersion"] == version
    for path in LAUNCHERS:
        assert all(
            f"ray:{version}-py311" in image for key, image in read(path)["docker"].items() if "image" in key
        )
