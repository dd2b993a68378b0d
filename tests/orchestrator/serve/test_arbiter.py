"""One replica decides; every step is in the audit log; a user's word goes before."""

import json
import os
import signal
import time
from dataclasses import replace
from multiprocessing import get_context

import pytest

from orchestrator import lease
from orchestrator.errors import ServeError, StorageError
from orchestrator.processes import this_process
from orchestrator.registry import Registry
from orchestrator.serve.desired import Desired, Served
from orchestrator.serve.rollout import Rollout
from orchestrator.serve.rollouts.arbiter import Arbiter
from orchestrator.serve.rollouts.numbers import Agreement, Numbers
from orchestrator.serve.rollouts.promotion import change, desired_of, promote, rollback
from orchestrator.serve.rollouts.reports import Report, Reports, RolloutNumbers
from orchestrator.serve.rollouts.traffic import audit_lines, rollout_rows, traffic_rows
from tests.orchestrator.adapters import BASE, lineage, make_adapter
from tests.patience import patience


class Site:
    """A registry with two versions of `docs`: the first in production, the second on its way there."""

    def __init__(self, place, folder, **options) -> None:
        self.registry = Registry(place)
        for number in (1, 2):
            self.registry.register("docs", make_adapter(folder / str(number), value=number), lineage())
            self.registry.hold(f"docs@{number}", "tiny")
        self.registry.set_alias("docs", 1, "production")
        options = {"bake_s": 600.0, "rollback": {"any": ["error_rate > 0.2"]}, **options}
        self.rollout = Rollout("id", "docs", "production", 2, created=time.time(), **options)
        served = (Served("docs", 1), Served("docs", 2))
        state = Desired("tiny", BASE, adapters=served, rollouts=(self.rollout,))
        self.registry.update_endpoint("tiny", lambda now: state.to_dict())
        self.reports = Reports(self.registry.url, "tiny")

    @property
    def desired(self):
        return desired_of(self.registry, "tiny")

    @property
    def events(self):
        return [line["event"] for line in self.reports.audit()]

    def began(self, seconds_ago):
        """As if it had begun so long ago."""
        past = replace(self.rollout, state="baking", began=time.time() - seconds_ago)
        self.registry.update_endpoint("tiny", lambda now: Desired.from_dict(now).with_rollout(past).to_dict())

    def report(self, replica="r1", requests=0, errors=0, **facts):
        candidate = Numbers()
        for number in range(requests):
            candidate.count(0.1, 5, 0.01, failed=number < errors)
        numbers = {"id": RolloutNumbers(candidate, Numbers(), Agreement())}
        facts = {"states": {"docs@1": "loaded", "docs@2": "loaded"}, "rollouts": numbers, **facts}
        now = time.time()
        self.reports.write(Report(replica, this_process(), facts.pop("at", now), now, **facts))


@pytest.fixture
def site(place, tmp_path):
    return Site(place, tmp_path)


def test_a_storage_that_is_away_gets_no_reports(site, tmp_path):
    site.report()
    away = Reports(str(tmp_path / "mount"), "tiny")
    with pytest.raises(StorageError, match="no trace of endpoint 'tiny'"):
        away.write(site.reports.read()[0])
    assert not (tmp_path / "mount").exists()


def test_it_begins_bakes_and_is_promoted(site):
    arbiter = Arbiter(site.registry, "tiny", "r1")
    assert arbiter.step() and site.desired.rollouts[0].state == "starting"  # nobody answers for it yet
    site.report()
    arbiter.step()
    assert site.desired.rollouts[0].state == "baking"
    assert site.registry.alias("docs", "production") == 1
    site.began(601)
    site.report(requests=50, errors=5)
    arbiter.step()
    assert site.desired.rollouts == () and site.registry.alias("docs", "production") == 2
    assert site.desired.earlier == {"docs@production": (1,)}
    assert site.desired.served("docs@1")  # it stays, for a way back
    assert site.events == ["began", "promoting", "promoted"]
    last = site.reports.audit()[-1]
    assert (last["adapter"], last["before"], last["by"]) == ("docs@2", 1, "r1")
    assert last["reasons"] == ["10m passed, 50 requests, error rate 0.1"]
    assert not arbiter.step() and not arbiter.holds  # nothing is left to decide


def test_what_fails_is_rolled_back_by_the_numbers_of_all_replicas(site):
    site.began(10)
    site.report("r1", requests=10, errors=1)
    arbiter = Arbiter(site.registry, "tiny", "r1")
    arbiter.step()
    assert site.desired.rollouts  # 1 of 10 is not above 0.2
    site.report("r2", requests=10, errors=4)
    arbiter.step()
    assert site.desired.rollouts == () and site.desired.served("docs@2") is None
    assert site.registry.alias("docs", "production") == 1 and site.registry.holders("docs@2") == []
    assert site.events == ["rolling back", "rolled back"]
    assert site.reports.audit()[0]["reasons"] == ["error_rate > 0.2: holds, 0.25 > 0.2"]


def test_a_version_that_a_replica_refuses_is_rolled_back(site):
    site.report(refused={"docs@2": "no module matches"}, states={"docs@2": "refused"})
    Arbiter(site.registry, "tiny", "r1").step()
    assert site.desired.served("docs@2") is None
    assert site.reports.audit()[-1]["reasons"] == ["docs@2 does not load: no module matches"]


def test_of_two_replicas_one_decides_and_the_other_takes_over(site):
    one, two = Arbiter(site.registry, "tiny", "r1"), Arbiter(site.registry, "tiny", "r2")
    assert one.step() and not two.step()
    site.report()
    assert not two.step() and site.desired.rollouts[0].state == "starting"
    one.leave()
    assert two.step() and not one.step()
    assert site.events == ["began"] and site.reports.audit()[0]["by"] == "r2"


def test_both_would_decide_without_the_lease_and_the_step_is_taken_once(site, monkeypatch):
    """The negative control, and what stands behind the lease: each step is one compare-and-swap."""
    monkeypatch.setattr(Arbiter, "_hold", lambda self: setattr(self, "_token", "t"))
    monkeypatch.setattr(Arbiter, "_confirm", lambda self: None)
    site.report()
    one, two = Arbiter(site.registry, "tiny", "r1"), Arbiter(site.registry, "tiny", "r2")
    assert one.step() and two.step()
    assert site.events == ["began"]


def _decide_for_ever(url: str) -> None:
    arbiter = Arbiter(Registry(url), "tiny", "child")
    while True:
        arbiter.step()
        time.sleep(0.02)


def test_the_lease_of_a_killed_replica_is_taken_at_once(tmp_path):
    site = Site(str(tmp_path / "store"), tmp_path)
    child = get_context("fork").Process(target=_decide_for_ever, args=(site.registry.url,))
    child.start()
    try:
        end = time.monotonic() + patience(20)
        while not lease.holder_of(_document(site)):
            assert time.monotonic() < end
            time.sleep(0.02)
        arbiter = Arbiter(site.registry, "tiny", "r1")
        assert not arbiter.step()
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        began = time.monotonic()
        assert arbiter.step() and time.monotonic() - began < patience(5)
    finally:
        child.kill()


def _document(site):
    try:
        return json.loads(open(site.reports.lease_url).read())
    except (OSError, ValueError):
        return {}


def test_what_broke_off_is_ended_by_the_next_one(site, monkeypatch):
    """A replica that was killed between its decision and the alias."""
    site.began(601)
    site.report()
    arbiter = Arbiter(site.registry, "tiny", "r1")
    with monkeypatch.context() as broken, pytest.raises(RuntimeError):
        broken.setattr(site.registry, "set_alias", _killed)
        arbiter.step()
    assert site.desired.rollouts[0].state == "promoting" and site.registry.alias("docs", "production") == 1
    arbiter.leave()
    second = Arbiter(site.registry, "tiny", "r2")
    with monkeypatch.context() as broken, pytest.raises(RuntimeError):
        broken.setattr(Desired, "finished", _killed)  # the alias is set and noted, and then
        second.step()
    second.leave()
    assert Arbiter(site.registry, "tiny", "r3").step()
    assert site.registry.alias("docs", "production") == 2
    assert site.events == ["promoting", "promoted"]
    assert site.desired.earlier == {"docs@production": (1,)} and site.desired.rollouts == ()


def _killed(*arguments):
    raise RuntimeError("killed")


# by hand


def test_a_user_promotes_before_the_time_is_over(site):
    assert promote(site.registry, "docs@2") == "tiny"
    assert site.registry.alias("docs", "production") == 2 and site.desired.rollouts == ()
    assert site.events == ["promoting", "promoted"] and site.reports.audit()[-1]["by"] == "user"


def test_a_user_takes_a_rollout_back_and_a_promotion_too(site):
    assert rollback(site.registry, "docs") == ("tiny", 1)
    assert site.desired.rollouts == () and site.desired.served("docs@2") is None
    with pytest.raises(ServeError, match="no version before docs@production is known"):
        rollback(site.registry, "docs")
    site.registry.update_endpoint(
        "tiny", lambda now: Desired.from_dict(now).with_adapter(Served("docs", 2)).to_dict()
    )
    promote(site.registry, "docs@2")
    assert site.registry.alias("docs", "production") == 2
    assert rollback(site.registry, "docs") == ("tiny", 1)
    assert site.registry.alias("docs", "production") == 1
    assert [entry.ref for entry in site.desired.adapters] == ["docs@1"]
    assert site.events == ["rolling back", "rolled back", "promoted", "rolled back"]


def test_what_no_endpoint_serves_is_not_promoted(site, tmp_path):
    site.registry.register("other", make_adapter(tmp_path / "other", value=9), lineage())
    with pytest.raises(
        ServeError, match=r"no endpoint serves other@1\. Serve it first: raypeft deploy other@1"
    ):
        promote(site.registry, "other@1")


# shown


def test_status_and_top_read_the_storage_alone(site):
    site.began(60)
    totals = Numbers()
    for _ in range(4):
        totals.count(0.2, 10, 0.05, failed=False)
    site.report(requests=10, errors=1, totals={"docs@1": totals})
    site.report("gone", at=time.time() - 3600, totals={"docs@1": totals})
    (row,) = rollout_rows(site.registry)
    assert (row.candidate, row.stable, row.state, row.replicas) == ("docs@2", "docs@1", "baking", 1)
    assert row.metrics["error_rate"] == 0.1 and row.breaches == () and 59 < row.baked_s < 120
    rows, counted = traffic_rows(site.registry)
    by_model = {each.model: each for each in rows}
    assert list(by_model) == ["docs@1", "docs@2", "tiny"]
    assert (by_model["docs@1"].requests, by_model["docs@1"].tokens) == (4, 40)
    assert by_model["docs@1"].aliases == ("production",) and by_model["docs@2"].state == "canary"
    assert by_model["docs@1"].latency_p50 == pytest.approx(0.2, rel=0.06)
    assert by_model["docs@1"].requests_per_s is None
    site.report(requests=10, errors=1, totals={"docs@1": totals.plus(totals)})
    later, _ = traffic_rows(site.registry, replace(counted, at=counted.at - 2))
    assert later[0].requests_per_s == pytest.approx(2, rel=0.2) and later[0].model == "docs@1"
    assert audit_lines(site.registry, "other") == []


def test_an_edit_that_changes_nothing_leaves_what_another_raypeft_wrote(site):
    site.registry.update_endpoint("tiny", lambda now: {**now, "of_a_newer_one": 1})
    change(site.registry, "tiny", lambda now: now.finished("no such rollout"))
    assert site.registry.endpoint_state("tiny")["of_a_newer_one"] == 1
    assert change(site.registry, "tiny", lambda now: now.without("docs@2")).served("docs@2") is None
    assert change(site.registry, "none", lambda now: now) is None


def test_reports_of_the_dead_are_forgotten_but_for_what_a_rollout_needs(site):
    site.report("old", at=time.time() - 3600, rollouts={})
    site.report("needed", at=time.time() - 3600)
    site.report("alive")
    site.reports.forget(["id"], time.time())
    assert sorted(report.replica for report in site.reports.read()) == ["alive", "needed"]
    site.reports.forget([], time.time())
    assert [report.replica for report in site.reports.read()] == ["alive"]
