"""The machine of rollouts, as a function of what is desired, what was observed and the time."""

from dataclasses import replace

import pytest

from orchestrator.identity import BaseIdentity
from orchestrator.serve.desired import Desired, Served
from orchestrator.serve.rollout import Observed, Rollout, Step, decide, falls_below
from orchestrator.serve.rollouts.numbers import Agreement, Numbers, Seconds
from orchestrator.serve.rollouts.sticky import Sticky
from orchestrator.spec.live_metrics import OF_EACH, OF_SHADOW
from tests.orchestrator.spec.jobs import spec_of

BASE = BaseIdentity(name="b", source="b", revision=None, content_hash="0" * 64)
ROLLOUT = Rollout(
    "id", "docs", "production", 2, canary_percent=10, bake_s=600, rollback={"any": ["error_rate > 0.05"]}
)
BAKING = replace(ROLLOUT, state="baking", began=1000.0)


def desired(rollout=BAKING) -> Desired:
    both = (Served("docs", 1), Served("docs", 2))
    return Desired("tiny", BASE, adapters=both, rollouts=(rollout,))


def test_a_job_says_all_of_it():
    text = (
        "deploy: {rollout: {canary_percent: 5, sticky_key: x-session, shadow_percent: 20, bake: 2m, "
        "rollback: {all: [requests > 9, error_rate > 0.5]}}}\n"
    )
    made = Rollout.of(spec_of(text).deploy.rollout, "docs", 3, "production", id="i", now=7.0)
    assert made == Rollout(
        "i", "docs", "production", 3, 5, "x-session", 20, 120,
        {"all": ["requests > 9", "error_rate > 0.5"]}, created=7.0,
    )  # fmt: skip
    assert Rollout.from_dict({**made.to_dict(), "later": 1}) == made
    assert Desired.from_dict(desired(made).to_dict()) == desired(made)


# shares


@pytest.mark.parametrize("percent", [0, 1, 10, 50, 99, 100])
def test_a_share_of_the_sticky_values_is_answered_by_the_candidate(percent):
    users = [f"user-{number}" for number in range(20_000)]
    chosen = {user for user in users if replace(BAKING, canary_percent=percent).answers(user)}
    assert len(chosen) / len(users) == pytest.approx(percent / 100, abs=0.01)
    again = {user for user in users if replace(BAKING, canary_percent=percent).answers(user)}
    assert chosen == again
    larger = {user for user in users if replace(BAKING, canary_percent=min(100, percent + 5)).answers(user)}
    assert chosen <= larger  # who has the candidate keeps it when the share grows


def test_another_candidate_is_tried_on_others():
    users = [f"user-{number}" for number in range(5_000)]
    one = {user for user in users if BAKING.answers(user)}
    other = {user for user in users if replace(BAKING, candidate=3).answers(user)}
    assert len(one & other) < 0.25 * len(one)


def test_the_share_is_written_down():
    """Any machine, any process, any day: these are the values."""
    assert [number for number in range(40) if falls_below(10, f"docs@2:user-{number}")] == [
        number for number in range(40) if BAKING.answers(f"user-{number}")
    ]
    assert falls_below(50.0, "") is False and falls_below(90.0, "") is True  # sha256("") begins with e3b0c442


def test_before_it_bakes_nobody_gets_it_and_when_it_is_promoted_everybody():
    everybody = replace(BAKING, canary_percent=100)
    assert not replace(everybody, state="starting").answers("u")
    assert not replace(everybody, state="withdrawing").answers("u")
    assert replace(BAKING, canary_percent=0, state="promoting").answers("u")
    assert not replace(BAKING, shadow_percent=100, state="promoting").shadows("u")
    assert replace(BAKING, shadow_percent=100).shadows("u")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("user", "ann"), ("metadata.team", "red"), ("x-session", "s1"), ("X-Session", "s1"), ("n", "3"),
        ("absent", '{"user": "ann", "metadata": {"team": "red"}, "n": 3}'),
    ],
)  # fmt: skip
def test_a_request_is_told_by_a_field_a_header_or_itself(key, value):
    body = b'{"user": "ann", "metadata": {"team": "red"}, "n": 3}'
    assert Sticky({"x-session": "s1"}, body).value(key) == value


def test_a_key_that_says_nothing_puts_nobody_together():
    """Some clients write what is not given as null."""
    one, two = (Sticky({}, b'{"user": null, "prompt": "%s"}' % said).value("user") for said in (b"a", b"b"))
    assert one != two
    assert Sticky({"user": "ann"}, b'{"user": null}').value("user") == "ann"


# decisions


@pytest.mark.parametrize(
    ("rollout", "seen", "now", "kind"),
    [
        (ROLLOUT, Observed(), 0, None),
        (ROLLOUT, Observed(is_live=True), 0, "begin"),
        (ROLLOUT, Observed(is_live=True, refused="no such module"), 0, "rollback"),
        (BAKING, Observed(True), 1599, None),
        (BAKING, Observed(True), 1600, "promote"),
        (BAKING, Observed(True, None, {"requests": 100, "error_rate": 0.05}), 1100, None),
        (BAKING, Observed(True, None, {"requests": 100, "error_rate": 0.06}), 1100, "rollback"),
        (BAKING, Observed(True, None, {"requests": 100, "error_rate": 0.06}), 9999, "rollback"),
        (BAKING, Observed(False, "killed by NaN"), 1100, "rollback"),
        (replace(BAKING, bake_s=0), Observed(True), 10**9, None),
        (replace(BAKING, rollback=None), Observed(True, None, {"error_rate": 1.0}), 1100, None),
        (replace(BAKING, state="promoting"), Observed(True, None, {"error_rate": 1.0}), 9999, None),
        (replace(BAKING, state="withdrawing"), Observed(True), 9999, None),
        (replace(BAKING, rollback={"any": ["latency_p99 > production.latency_p99 * 2"]}),
         Observed(True, None, {"latency_p99": 2.1, "production.latency_p99": 1.0}), 1100, "rollback"),
        (replace(BAKING, rollback={"any": ["latency_p99 > production.latency_p99 * 2"]}),
         Observed(True, None, {"latency_p99": 2.1}), 1100, None),  # what is not measured breaks nothing
        (replace(BAKING, rollback={"all": ["requests >= 20", "error_rate > 0.5"]}),
         Observed(True, None, {"requests": 19, "error_rate": 1.0}), 1100, None),
        (replace(BAKING, rollback={"all": ["requests >= 20", "error_rate > 0.5"]}),
         Observed(True, None, {"requests": 20, "error_rate": 1.0}), 1100, "rollback"),
        (replace(BAKING, rollback={"any": ["shadow.agreement < 0.9"]}),
         Observed(True, None, {"shadow.agreement": 0.89}), 1100, "rollback"),
    ],
)  # fmt: skip
def test_the_next_step(rollout, seen, now, kind):
    step = decide(rollout, seen, now)
    assert (step.kind if step else None) == kind
    assert step is None or all(step.reasons)


def test_a_step_is_taken_once():
    began = desired(ROLLOUT).after("id", Step("begin", ()), 1000.0)
    assert began.rollouts[0] == BAKING
    promoting = began.after("id", Step("promote", ("it is good",)), 2000.0, before=1)
    assert promoting.rollouts[0].state == "promoting" and promoting.rollouts[0].reasons == ("it is good",)
    assert promoting.after("id", Step("rollback", ()), 2000.0) == promoting
    assert promoting.after("another", Step("rollback", ()), 2000.0) == promoting


def test_what_is_promoted_stays_and_remembers_the_one_before():
    done = desired().after("id", Step("promote", ()), 0.0, before=1).finished("id")
    assert done.rollouts == () and done.served("docs@2") and done.served("docs@1")
    assert done.earlier == {"docs@production": (1,)}
    assert done.stepped_back("docs", "production").earlier == {"docs@production": ()}
    assert done.finished("id") == done


def test_what_is_withdrawn_is_served_no_more():
    done = desired().after("id", Step("rollback", ()), 0.0).finished("id")
    assert done.rollouts == () and done.served("docs@2") is None and done.served("docs@1")
    assert done.earlier == {}


def test_an_alias_has_one_rollout():
    other = replace(ROLLOUT, id="other", candidate=3)
    assert desired().with_rollout(other).rollouts == (other,)
    assert len(desired().with_rollout(replace(other, alias="beta")).rollouts) == 2
    assert desired().without("docs@2").rollouts == ()


def test_the_same_version_by_other_terms_keeps_its_users():
    wider = replace(ROLLOUT, id="other", canary_percent=60, created=5000.0)
    (now,) = desired(BAKING).watching(wider).rollouts
    assert now == replace(wider, state="baking", began=5000.0)
    assert desired(ROLLOUT).watching(wider).rollouts == (wider,)
    (now,) = desired(BAKING).watching(replace(wider, candidate=3)).rollouts
    assert now.state == "starting"


# numbers


def test_quantiles_are_known_to_within_five_percent_and_add_up():
    one, two = Seconds(), Seconds()
    for number in range(1, 1001):
        (one if number % 2 else two).add(number / 1000)
    for share in (0.5, 0.99):
        assert one.plus(two).quantile(share) == pytest.approx(share, rel=0.06)
    assert Seconds().quantile(0.5) is None
    assert Seconds.from_dict(one.to_dict()).quantile(0.5) == one.quantile(0.5)


def test_numbers_of_replicas_add_up():
    one, two = Numbers(), Numbers()
    for _ in range(3):
        one.count(0.5, 10, 0.1, failed=False)
    two.count(9.0, 0, None, failed=True)
    both = one.plus(Numbers.from_dict(two.to_dict())).metrics()
    assert set(both) == set(OF_EACH)
    assert both["requests"] == 4 and both["error_rate"] == 0.25 and both["tokens_per_second"] == 20
    assert both["latency_p99"] == pytest.approx(0.5, rel=0.06)  # a failed one says nothing of speed
    assert Numbers().metrics() == {"requests": 0.0}


def test_agreement_is_by_position_and_differences_by_common_beginning():
    seen = Agreement()
    seen.count([(1, -0.5), (2, -1.0), (3, -1.0)], [(1, -0.7), (9, -0.1), (3, -5.0), (4, -1.0)])
    metrics = seen.plus(Agreement(errors=1)).metrics()
    assert set(metrics) == set(OF_SHADOW)
    assert metrics["shadow.agreement"] == 0.5 and metrics["shadow.error_rate"] == 0.5
    assert metrics["shadow.logprob_diff"] == pytest.approx(0.2)
    assert Agreement.from_dict(seen.to_dict()) == seen
