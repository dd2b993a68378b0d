"""Deployments that are refused before anything is started or written."""

import pytest

from orchestrator.errors import ServeError
from orchestrator.identity import base_identity
from orchestrator.registry import Registry
from orchestrator.serve.desired import Desired, Served
from orchestrator.serve.endpoints import RayEndpoints
from orchestrator.serve.rollout import Rollout
from orchestrator.spec.job import DeploySpec
from tests.orchestrator.serve import tiny


@pytest.fixture
def registry(tmp_path):
    return Registry(tmp_path / "registry")


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    return [tiny.save_base(folder / name, seed=seed) for seed, name in enumerate(("one", "two"))]


def refused(registry, version, base, **options):
    force = options.pop("force", False)
    before = {name: registry.endpoint_state(name) for name in registry.endpoint_names()}
    with pytest.raises(ServeError) as raised:
        RayEndpoints(registry, local=True).deploy(
            version, str(base), "main", DeploySpec(**options), force=force
        )
    assert {name: registry.endpoint_state(name) for name in registry.endpoint_names()} == before
    assert registry.holders(version.ref) == []
    return str(raised.value)


def test_a_version_that_its_gate_refused(registry, bases, tmp_path):
    version = tiny.register(registry, "docs", bases[0], tmp_path, gate_passed=False)
    assert refused(registry, version, bases[0]) == (
        "the gate refused docs@1: eval_loss is 3 > 2. "
        "Deploy it all the same with: raypeft deploy docs@1 --force (it is recorded)"
    )


def test_a_base_that_is_not_the_versions(registry, bases, tmp_path):
    version = tiny.register(registry, "docs", bases[0], tmp_path)
    one, two = (base_identity(str(base)).content_hash[:8] for base in bases)
    assert refused(registry, version, bases[1]) == (
        f"docs@1 was trained on one ({one}), and {bases[1]} is two ({two}): another base, or one that has "
        "changed since. Deploy it on the base that it was trained on."
    )


def test_an_endpoint_of_another_base(registry, bases, tmp_path):
    registry.update_endpoint("shop", lambda now: Desired("shop", base_identity(str(bases[0]))).to_dict())
    version = tiny.register(registry, "docs", bases[1], tmp_path)
    one, two = (base_identity(str(base)).content_hash[:8] for base in bases)
    assert refused(registry, version, bases[1], endpoint="shop") == (
        f"deploy.endpoint: endpoint 'shop' serves the base one ({one}), and this adapter belongs to two ({two}). "
        "Deploy it to another endpoint, or end this one first: raypeft undeploy shop"
    )


@pytest.mark.parametrize("name", ["v1", "healthz", "x" * 64])
def test_a_name_that_is_no_part_of_a_url(registry, bases, tmp_path, name):
    version = tiny.register(registry, "docs", bases[0], tmp_path)
    assert refused(registry, version, bases[0], endpoint=name) == (
        f"deploy.endpoint: '{name}' cannot be an endpoint's name. Use at most 63 letters, digits, '.', '_' and "
        "'-', a letter or digit first; not 'v1'."
    )


def test_the_endpoint_of_a_base_is_found_again(registry, bases):
    one, two = (base_identity(str(base)) for base in bases)
    endpoints = RayEndpoints(registry, local=True)
    assert endpoints._choose(one, "CAUSAL_LM", None) == "one"
    registry.update_endpoint("shop", lambda now: Desired("shop", one).to_dict())
    assert endpoints._choose(one, "CAUSAL_LM", None) == "shop"
    assert endpoints._choose(two, "CAUSAL_LM", None) == "two"
    registry.update_endpoint("one", lambda now: Desired("one", two).to_dict())
    assert endpoints._choose(one, "CAUSAL_LM", None) == "shop"
    assert endpoints._choose(two, "CAUSAL_LM", None) == "one"


def test_desired_states_are_read_as_written_and_unknown_keys_passed_over(bases):
    served = (Served("a", 1, forced=True), Served("b", 2, alias_when_live="production"))
    desired = Desired("tiny", base_identity(str(bases[0])), threads=2, adapters=served)
    stored = {**desired.to_dict(), "format": 1, "later": 5}
    stored["adapters"] = [{**entry, "weight": 3} for entry in stored["adapters"]]
    assert Desired.from_dict(stored) == desired
    assert desired.without_promise("b", "production").served("b@2") == Served("b", 2)
    assert desired.without_promise("b", "other") == desired


def test_a_deployment_that_fails_leaves_what_there_was(registry, bases, tmp_path):
    base = base_identity(str(bases[0]))
    one, two = (tiny.register(registry, "docs", bases[0], tmp_path, seed=seed) for seed in (1, 2))
    served = tuple(Served("docs", version.version) for version in (one, two))
    rolling = Rollout("id", "docs", "production", 2, state="baking", began=1.0)
    state = Desired("one", base, adapters=served, rollouts=(rolling,))
    registry.update_endpoint("one", lambda now: state.to_dict())
    registry.set_alias("docs", 1, "production")
    endpoints = RayEndpoints(registry, local=True)
    before = registry.endpoint_state("one")
    asked = DeploySpec(rollout={"canary_percent": 10, "bake": "5m"}, engine={"max_context": 16})
    now = endpoints._record("one", base, "CAUSAL_LM", two, Served("docs", 2), asked)
    assert registry.endpoint_state("one") != before
    endpoints._restore("one", now, two.ref)
    assert registry.endpoint_state("one") == before
