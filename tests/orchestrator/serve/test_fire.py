"""Under fire: every kind of client at once, while adapters come, go and change under one name, replicas are killed and
code is rolled; nobody but those whose replica was killed gets anything but the right answer."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace

import pytest
import ray
from ray import serve

from orchestrator.serve import serve_cluster
from tests.orchestrator.serve import fire, tiny
from tests.orchestrator.serve.fire import Answer, Asked, References, Timeline, judge
from tests.orchestrator.serve.fire_site import STAYING, FireSite
from tests.orchestrator.serve.test_endpoints import wait_for


@pytest.fixture
def site(local_ray, tmp_path):
    local_ray.attach()
    ray.init(address=local_ray.gcs_address, log_to_driver=False, logging_level="ERROR", namespace="raypeft")
    door = serve_cluster.open_serve("127.0.0.1", 18741)
    made = FireSite(tmp_path, door.port)
    yield made
    made.close()
    serve.shutdown()
    ray.shutdown()


@pytest.mark.ray
@pytest.mark.slow  # starts replicas five times
@pytest.mark.timeout(600)
def test_under_fire_all_answers_are_right_but_those_of_killed_replicas(site):
    site.prepare(4)
    site.start()
    site.wait_until_whole()
    with site.under_load() as load:
        wait_for(lambda: len(load.answers) > 40)
        site.come()
        site.swap()
        killed = [site.kill()]
        site.swap_back()
        site.go()
        site.wait_until_whole(killed)
        old = site.roll()
        site.swap()
        site.come()
        site.wait_until_whole(old)
        killed = [site.kill()]
        site.swap()
        site.go()
        site.wait_until_whole(killed)
        number = len(load.answers)
        wait_for(lambda: len(load.answers) > number + 40)
    answers = load.answers
    print(*(f"{at - site.timeline.done[0][0]:.1f} {what}" for at, what in site.timeline.done), sep="\n")
    assert judge(answers, site.references, site.timeline) == []
    ways = Counter(answer.asked.way for answer in answers)
    assert min(ways[way] for way in load.WAYS) > 10, ways
    asked = Counter(answer.asked.model for answer in answers)
    assert asked.keys() == {"tiny", "swap", "guest", *STAYING}
    assert len({answer.adapter for answer in answers if answer.asked.model == "swap"}) >= 4
    broken = [answer for answer in answers if not answer.is_whole]
    assert len(broken) <= 2 * len(site.timeline.kills) * 8


# who judges


@pytest.fixture(scope="module")
def references(tmp_path_factory):
    folder = tmp_path_factory.mktemp("references")
    base = tiny.save_base(folder / "tiny")
    known = References(base)
    for seed, name in enumerate(("docs@1", "docs@2"), start=1):
        assert known.prepare(tiny.save_adapter(base, folder / name, seed=seed))
        known.learn(name, folder / name)
    return known


ASKED = Asked("raw-stream", "docs", "def f(", 24)


def answered(references, adapter="docs@1", **fields):
    asked = fields.pop("asked", ASKED)
    text = references.text(adapter or "tiny", asked)
    fields = {"text": text, "models": frozenset([adapter or "tiny"]), "is_whole": True, **fields}
    return Answer(asked, 10.0, 11.0, fields.pop("status", 200), adapter, **fields)


def timeline(**fields):
    """`docs` went from 1 to 2 at the time 20."""
    moves = {"docs": [(0.0, 1.0, "docs@1"), (20.0, 21.0, "docs@2")]}
    return Timeline(moves=moves, **fields)


GONE = {"message": "The replica that answered went away.", "type": "server_error", "code": "replica_gone"}


def test_right_answers_are_right(references):
    fine = [
        answered(references),
        answered(references, None, asked=replace(ASKED, model="tiny")),
        answered(references, "docs@2", asked=replace(ASKED, model="docs@2")),
        replace(answered(references, "docs@2"), sent=20.5, ended=20.6),  # it may be either then
        replace(answered(references, "docs@1"), sent=22.0, ended=23.0),
    ]
    assert judge(fine, references, timeline()) == []
    broken = answered(references, text="", is_whole=False, error=GONE)
    refused = replace(broken, status=503, retry_after="1")
    assert judge([broken, refused], references, timeline(kills=[10.5])) == []


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("another's", "which is \\['docs@2'\\]'s"),
        ("two versions", "which is nobody's"),
        ("the base's", "which is \\['tiny'\\]'s"),
        ("cut", "which is nobody's"),
        ("not meant", "answered by docs@2, meant was one of"),
        ("stale", "answered by docs@1, meant was one of \\['docs@2'\\]"),
        ("two names", "says in itself that it is of"),
        ("no reason", "no replica was killed"),
        ("too late", "no replica was killed"),
        ("plain", "without an error of OpenAI's form"),
        ("no retry-after", "no 503 with Retry-After"),
        ("500", "no 503 with Retry-After"),
        ("a client that tries again", "though the client tries again"),
    ],
)
def test_wrong_answers_are_wrong(references, kind, why):
    fine, other = answered(references), answered(references, "docs@2")
    broken = replace(fine, text="", is_whole=False, error=GONE)
    killed = timeline(kills=[10.5])
    answer, meanwhile = {
        "another's": (replace(fine, text=other.text), timeline()),
        "two versions": (replace(fine, text=fine.text[:8] + other.text[8:]), timeline()),
        "the base's": (replace(fine, text=references.text("tiny", ASKED)), timeline()),
        "cut": (replace(fine, text=fine.text[:-1]), timeline()),
        "not meant": (other, timeline()),
        "stale": (replace(fine, sent=30.0, ended=31.0), timeline()),
        "two names": (replace(fine, models=frozenset(["docs@1", "docs@2"])), timeline()),
        "no reason": (broken, timeline()),
        "too late": (broken, timeline(kills=[5.0, 12.0])),
        "plain": (replace(broken, error=None), killed),
        "no retry-after": (replace(broken, status=503), killed),
        "500": (replace(broken, status=500, retry_after="1"), killed),
        "a client that tries again": (replace(broken, asked=replace(ASKED, way="openai")), killed),
    }[kind]
    found = judge([answer], references, meanwhile)
    assert len(found) == 1
    assert re.search(why, found[0]), found


def test_an_adapter_that_answers_as_another_one_is_no_use(references, tmp_path):
    base = tiny.save_base(tmp_path / "tiny")
    assert not references.prepare(tiny.save_adapter(base, tmp_path / "twin", seed=1))
    assert not references.prepare(None)  # the base is known already


def test_an_adapter_whose_tokens_hang_on_a_last_bit_is_no_use(references, tmp_path, monkeypatch):
    base = tiny.save_base(tmp_path / "tiny")
    folder = tiny.save_adapter(base, tmp_path / "other", seed=3)
    monkeypatch.setattr(fire, "CLEAR", 100.0)
    assert not references.prepare(folder)
    monkeypatch.undo()
    assert references.prepare(folder)
