"""`deploy.rollout`, `deploy.scale` and `deploy.engine`: what they take, what they refuse, what follows."""

import pytest

from orchestrator.plan.serving import serving
from orchestrator.spec.canonical import canonical_hash, load_stored, resolved_yaml

from .jobs import refused_after_minimal, spec_of


def test_without_them_a_version_takes_its_alias_at_once():
    deploy = spec_of("deploy: {}\n").deploy
    assert not deploy.rollout.is_watched and deploy.bounds == (1, 1) and deploy.scale is None
    assert deploy.engine.model_dump() == {
        "max_context": "auto",
        "max_batch_tokens": "auto",
        "max_adapters": "auto",
        "deterministic": False,
        "quantization": "auto",
    }


@pytest.mark.parametrize("key", ["canary_percent: 10", "shadow_percent: 5", "bake: 10m"])
def test_each_of_them_has_it_watched(key):
    rollout = spec_of(
        f"deploy: {{rollout: {{{key}, rollback: {{any: ['error_rate > 0.1']}}}}}}\n"
    ).deploy.rollout
    assert rollout.is_watched and rollout.sticky_key == "user"


def test_durations_and_bounds():
    text = "deploy: {rollout: {bake: 1h30m}, num_replicas: 2, scale: {min_replicas: 0, idle_timeout: 30s}}\n"
    deploy = spec_of(text).deploy
    assert deploy.rollout.bake == 5400 and deploy.scale.idle_timeout == 30 and deploy.bounds == (0, 2)
    assert spec_of("deploy: {scale: {}}\n").deploy.bounds == (1, 1)
    assert spec_of("deploy: {scale: {min_replicas: 3}}\n").deploy.bounds == (3, 3)
    assert spec_of("deploy: {scale: {max_replicas: 4}}\n").deploy.bounds == (1, 4)


MEASURED = (
    "requests, error_rate, latency_p50, latency_p99, first_token_p50, first_token_p99, tokens_per_second, "
    "production.requests, production.error_rate, production.latency_p50, production.latency_p99, "
    "production.first_token_p50, production.first_token_p99, production.tokens_per_second."
)


@pytest.mark.parametrize(
    ("deploy", "message"),
    [
        ("{rollout: {rollback: {any: ['error_rate > 0.1']}}}",
         "deploy.rollout.rollback: is never looked at: the version takes the alias at once. "
         "Write bake: 10m beside it, or canary_percent below 100."),
        ("{rollout: {bake: 1m, rollback: {}}}", "deploy.rollout.rollback: has neither all nor any. "
         'Write rollback: {any: ["error_rate > 0.05"]}.'),
        ("{rollout: {bake: 1m, rollback: {any: []}}}", "deploy.rollout.rollback.any: is an empty list. "
         "Write a condition, or remove the rollback: nothing is then taken back by itself."),
        ("{rollout: {bake: 1m, rollback: {any: [eror_rate > 1]}}}",
         f"deploy.rollout.rollback.any.0: 'eror_rate' is not measured of a rollout. Closest: 'error_rate'. "
         f"It measures: {MEASURED}"),
        ("{rollout: {bake: 1m, rollback: {any: [shadow.agreement < 0.9]}}}",
         "deploy.rollout.rollback.any.0: 'shadow.agreement' is not measured of a rollout. "
         "Set deploy.rollout.shadow_percent above 0."),
        ("{rollout: {canary_percent: 101}}", "deploy.rollout.canary_percent: "),
        ("{rollout: {bake: soon}}", "deploy.rollout.bake: 'soon' is not a duration. "),
        ("{rollout: {canary: 10}}", "deploy.rollout.canary: no such key. Closest: 'deploy.rollout.canary_percent'."),
        ("{scale: {min_replicas: 3, max_replicas: 2}}",
         "deploy.scale.max_replicas: 2 is below the 3 replicas that there are at least. "
         "Write at least 3, or lower deploy.scale.min_replicas."),
        ("{num_replicas: 5, scale: {max_replicas: 2}}",
         "deploy.scale.max_replicas: 2 is below the 5 replicas that there are at least. "
         "Write at least 5, or lower deploy.scale.min_replicas."),
        ("{num_replicas: 5, scale: {min_replicas: 1, max_replicas: 2}}",
         "deploy.num_replicas: 5 is not between the bounds of deploy.scale, 1 and 2. "
         "Remove it: deploy.scale says how many there are."),
        ("{scale: {max_replicas: 0}}", "deploy.scale.max_replicas: "),
        ("{engine: {max_context: many}}", "deploy.engine.max_context: "),
        ("{engine: {quantization: int4}}", "deploy.engine.quantization: "),
    ],
)  # fmt: skip
def test_what_is_refused(deploy, message):
    assert message in refused_after_minimal(f"deploy: {deploy}\n")


def test_they_are_stored_and_read_and_new_keys_do_not_make_old_runs_look_new():
    text = (
        "deploy: {rollout: {canary_percent: 10, rollback: {any: [requests > 3]}}, scale: {min_replicas: 0}}\n"
    )
    spec = spec_of(text)
    assert load_stored(resolved_yaml(spec)).deploy == spec.deploy
    plain = spec_of("deploy: {}\n")
    assert canonical_hash(spec_of("deploy: {rollout: {}, engine: {}}\n")) == canonical_hash(plain)
    assert canonical_hash(spec) != canonical_hash(plain)


@pytest.mark.parametrize(
    ("deploy", "words"),
    [
        ("{}", "x@production at once; 1 replica"),
        ("{alias: beta, num_replicas: 2}", "x@beta at once; 2 replicas"),
        ("{rollout: {canary_percent: 10, sticky_key: x-s}}",
         "x@production by raypeft promote, until then 10 % of its requests by 'x-s'; 1 replica"),
        ("{rollout: {shadow_percent: 20, bake: 10m, rollback: {any: [error_rate > 0.1, requests > 9]}}}",
         "x@production after 10m, until then 100 % of its requests by 'user', 20 % in shadow, "
         "taken back if any of: error_rate > 0.1; requests > 9; 1 replica"),
        ("{scale: {min_replicas: 0, max_replicas: 3, idle_timeout: 1m}}",
         "x@production at once; 0 to 3 replicas by demand, each until 1m without"),
        ("{engine: {max_context: 64, max_batch_tokens: 32, max_adapters: 3, deterministic: true, quantization: int8}}",
         "x@production at once; 1 replica; engine max_context 64, max_batch_tokens 32, max_adapters 3, "
         "deterministic true, quantization int8"),
    ],
)  # fmt: skip
def test_the_plan_says_what_each_of_them_does(deploy, words):
    assert serving(spec_of(f"deploy: {deploy}\n")) == words
    assert serving(spec_of("")) is None


def test_a_rollback_is_one_value():
    """Half of one and half of another is none."""
    text = "deploy: {rollout: {bake: 1m, rollback: {all: [requests > 3]}}}\n"
    spec = spec_of(text, overrides=["deploy.rollout.rollback={any: [error_rate > 0.1]}"])
    assert spec.deploy.rollout.rollback.all is None
