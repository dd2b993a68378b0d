"""What a replica knows and does by itself: it follows the registry, shares an alias out, counts and compares."""

import asyncio
import contextlib
import json
import time
from dataclasses import replace

import pytest

from orchestrator.errors import StorageError
from orchestrator.serve.api_error import ApiError
from orchestrator.serve.desired import Desired, Served
from orchestrator.serve.engines.engine import Generation
from orchestrator.serve.rollout import Rollout
from orchestrator.serve.rollouts.observed import Observed
from orchestrator.serve.rollouts.sticky import Sticky
from orchestrator.serve.routes.catalogue import Catalogue
from tests.orchestrator.serve.counting_engine import BASE, CountingEngine, Shelf


class Site:
    """A catalogue over a shelf, with two versions of `docs`, the first in production."""

    def __init__(self, folder, *, load_s=0.0, **options) -> None:
        self.engine, self.shelf = CountingEngine(load_s=load_s), Shelf()
        self.one, self.two = self.shelf.add("docs"), self.shelf.add("docs")
        self.shelf.set_alias("docs", 1, "production")
        self.desired = Desired("tiny", BASE, adapters=(Served("docs", 1), Served("docs", 2)))
        self.broken = None
        self.observed = Observed(self.engine)
        options = {"max_age_s": 0.0, "every_s": 0.01, **options}
        self.catalogue = Catalogue(
            BASE, self.observed, self.shelf, self.read, lambda entry: None, folder / "cache", **options
        )
        self.observed.pin = self.catalogue.residency.pinned

    def read(self):
        if self.broken:
            raise self.broken
        return self.desired

    def roll_out(self, **options):
        made = Rollout("id", "docs", "production", 2, **{"state": "baking", "began": 0.0, **options})
        self.desired = self.desired.with_rollout(made)
        return made

    async def name_for(self, model="docs", **fields):
        async with self.catalogue.acquire(model, Sticky({}, json.dumps(fields).encode())) as target:
            return target.name

    async def ask(self, model="docs", **fields):
        async with self.catalogue.acquire(model, Sticky({}, json.dumps(fields).encode())) as target:
            asked = Generation((1,), target.adapter, 8, shadow=target.shadow)
            return [piece async for piece in self.observed.generate(asked)]


async def until(condition, timeout_s=20.0):
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        await asyncio.sleep(0.005)


@contextlib.asynccontextmanager
async def running(site):
    await site.catalogue.start()
    try:
        yield site
    finally:
        await site.catalogue.stop()


# following the registry


def test_a_replica_holds_all_that_it_shall_before_it_answers_and_follows_by_itself(tmp_path):
    async def run():
        async with running(Site(tmp_path)) as site:
            assert site.engine.loaded() == {"docs-1", "docs-2"}
            third = site.shelf.add("docs")
            site.desired = site.desired.with_adapter(Served("docs", 3)).without("docs@1")
            await until(
                lambda: site.engine.loaded() == {"docs-2", third.content_hash}
            )  # nobody asked anything

    asyncio.run(run())


def test_without_its_look_nothing_comes_by_itself(tmp_path):
    """The negative control of the test before."""

    async def run():
        async with running(Site(tmp_path, every_s=None)) as site:
            site.shelf.add("docs")
            site.desired = site.desired.with_adapter(Served("docs", 3))
            await asyncio.sleep(0.1)
            assert site.engine.loaded() == {"docs-1", "docs-2"}

    asyncio.run(run())


def test_a_storage_that_is_away_leaves_all_as_it_was(tmp_path):
    async def run():
        async with running(Site(tmp_path)) as site:
            site.broken = StorageError("it does not answer")
            await asyncio.sleep(0.05)
            assert await site.name_for() == "docs@1" and len(site.engine.loaded()) == 2
            site.broken = None
            site.desired = site.desired.without("docs@2")
            await until(lambda: site.engine.loaded() == {"docs-1"})

    asyncio.run(run())


def test_aliases_that_no_storage_knows_any_more_stay_what_they_were(tmp_path):
    async def run():
        async with running(Site(tmp_path)) as site:
            site.shelf.named.clear()  # as where a folder is mounted no more
            await asyncio.sleep(0.05)
            assert await site.name_for() == "docs@1"
            site.shelf.named["docs"] = {"production": 2}
            assert await site.name_for() == "docs@2"
            site.shelf.named["docs"] = {}
            with pytest.raises(ApiError, match="has no version with the alias 'production'"):
                await site.name_for()

    asyncio.run(run())


def test_one_that_cannot_be_brought_stops_no_other_and_is_not_tried_all_the_time(tmp_path):
    async def run():
        site = Site(tmp_path)
        site.shelf.broken["docs@2"] = StorageError("its sha256 differs")
        async with running(site):
            await asyncio.sleep(0.1)
            assert site.engine.loaded() == {"docs-1"} and await site.name_for() == "docs@1"
            assert site.shelf.pulls["docs@2"] == 1
            with pytest.raises(StorageError):
                await site.name_for("docs@2")

    asyncio.run(run())


def test_models_cost_no_look_at_the_storage(tmp_path):
    async def run():
        async with running(Site(tmp_path, max_age_s=60, every_s=None)) as site:
            before = site.shelf.reads.copy()
            for _ in range(50):
                rows = await site.catalogue.cards()
            assert site.shelf.reads == before
            by_id = {row["id"]: row for row in rows}
            assert list(by_id) == ["tiny", "docs@1", "docs@production", "docs", "docs@2"]
            assert by_id["docs"]["root"] == "docs@1" and by_id["docs@1"]["state"] == "loaded"
            assert (by_id["docs@2"]["version"], by_id["docs@2"]["method"]) == (2, "lora")

    asyncio.run(run())


def test_an_alias_that_moves_is_followed_and_a_request_keeps_its_version(tmp_path):
    async def run():
        async with running(Site(tmp_path)) as site:
            async with site.catalogue.acquire("docs") as target:
                site.shelf.set_alias("docs", 2, "production")
                site.desired = site.desired.without("docs@1")
                await asyncio.sleep(0.05)
                assert target.name == "docs@1" and "docs-1" in site.engine.loaded()
                assert await site.name_for() == "docs@2"
            await until(lambda: site.engine.loaded() == {"docs-2"})

    asyncio.run(run())


def test_more_than_there_are_slots_wait_on_disk_and_answer_too(tmp_path):
    async def run():
        async with running(Site(tmp_path, slots=1)) as site:
            assert len(site.engine.loaded()) == 1
            assert sorted(site.catalogue.states().values()) == ["cold", "loaded"]
            for ref in ("docs@1", "docs@2", "docs@1"):
                assert await site.name_for(ref) == ref
            assert site.shelf.pulls == {"docs@1": 1, "docs@2": 1}

    asyncio.run(run())


# sharing an alias out


@pytest.mark.parametrize("percent", [0, 25, 100])
def test_a_canary_gets_exactly_the_users_that_the_hash_gives_it(tmp_path, percent):
    async def run():
        site = Site(tmp_path)
        rollout = site.roll_out(canary_percent=percent)
        async with running(site):
            for number in range(200):
                user = f"user-{number}"
                expected = "docs@2" if rollout.answers(user) else "docs@1"
                assert await site.name_for(user=user) == expected == await site.name_for(user=user, n=2)
            assert (
                await site.name_for("docs@1", user="user-1") == "docs@1"
            )  # by number: nothing is shared out

    asyncio.run(run())


def test_a_canary_that_a_replica_cannot_serve_leaves_its_users_to_the_other(tmp_path):
    async def run():
        site = Site(tmp_path)
        site.engine.refuses["docs-2"] = "no module matches"
        site.roll_out(canary_percent=100)
        async with running(site):
            assert await site.name_for(user="u") == "docs@1"
            assert site.catalogue.refused() == {"docs@2": "no module matches"}
            with pytest.raises(ApiError, match="no module matches"):
                await site.name_for("docs@2")

    asyncio.run(run())


def test_the_sticky_key_may_be_a_header(tmp_path):
    async def run():
        site = Site(tmp_path)
        rollout = site.roll_out(canary_percent=50, sticky_key="x-session")
        async with running(site):
            for number in range(50):
                sticky = Sticky({"x-session": f"s{number}"}, b'{"user": "same"}')
                async with site.catalogue.acquire("docs", sticky) as target:
                    assert target.name == ("docs@2" if rollout.answers(f"s{number}") else "docs@1")

    asyncio.run(run())


# counting and comparing


def test_answers_are_counted_by_rollout_from_its_begin(tmp_path):
    async def run():
        async with running(Site(tmp_path)) as site:
            await site.ask(user="u")
            site.roll_out(canary_percent=100)
            await site.catalogue.look()
            site.observed.watch(site.catalogue.rollouts())
            await site.ask(user="u")
            site.engine.fails["docs-2"] = RuntimeError("out of memory")
            with pytest.raises(RuntimeError):
                await site.ask(user="u")
            await site.ask("docs@1")
            watch = site.observed.watches["id"]
            assert (watch.candidate.requests, watch.candidate.errors, watch.stable.requests) == (2, 1, 1)
            assert site.observed.totals["docs-1"].requests == 2
            assert watch.candidate.metrics()["error_rate"] == 0.5
            site.desired = replace(site.desired, rollouts=())
            await site.catalogue.look()
            assert site.observed.watch(site.catalogue.rollouts()) == {}

    asyncio.run(run())


def test_a_client_that_leaves_counts_as_neither(tmp_path):
    async def run():
        async with running(Site(tmp_path)) as site:
            stream = site.observed.generate(Generation((1,), "docs-1", 8))
            await anext(stream)
            await stream.aclose()
            assert site.observed.totals == {}

    asyncio.run(run())


def test_a_shadow_answers_the_same_and_is_compared_and_seen_by_nobody(tmp_path):
    async def run():
        site = Site(tmp_path)
        site.engine.tokens = {"docs-1": [5, 6, 7, 8], "docs-2": [5, 6, 9, 8]}
        site.engine.logprobs = {"docs-1": -1.0, "docs-2": -1.25}
        site.roll_out(canary_percent=0, shadow_percent=100)
        async with running(site):
            site.observed.watch(site.catalogue.rollouts())
            pieces = await site.ask(user="u")
            assert [piece.text for piece in pieces] == ["5 ", "6 ", "7 ", "8 "]
            assert all(piece.logprobs == () for piece in pieces)  # they were not asked for
            shadow = site.observed.watches["id"].shadow
            await until(lambda: shadow.requests == 1)
            assert shadow.metrics() == {
                "shadow.requests": 1.0,
                "shadow.error_rate": 0.0,
                "shadow.agreement": 0.75,
                "shadow.logprob_diff": pytest.approx(0.25),
            }
            first, twin = site.engine.asked
            assert (first.prompt_ids, first.seed) == (twin.prompt_ids, twin.seed) and first.shadow is None
            assert {first.adapter, twin.adapter} == {"docs-1", "docs-2"}
            site.engine.fails["docs-2"] = RuntimeError("NaN")
            assert len(await site.ask(user="u")) == 4  # the client sees nothing of it
            await until(lambda: shadow.errors == 1)

    asyncio.run(run())


def test_half_of_the_requests_have_a_shadow_and_the_canarys_own_have_none(tmp_path):
    async def run():
        site = Site(tmp_path)
        rollout = site.roll_out(canary_percent=30, shadow_percent=50)
        async with running(site):
            for number in range(100):
                user = f"user-{number}"
                async with site.catalogue.acquire(
                    "docs", Sticky({}, b'{"user": "%s"}' % user.encode())
                ) as target:
                    expected = "docs-2" if rollout.shadows(user) and not rollout.answers(user) else None
                    assert target.shadow == expected

    asyncio.run(run())


def test_an_error_tells_of_no_model_that_whoever_asks_may_not_know(tmp_path):
    async def run():
        async with running(Site(tmp_path)) as site:
            for model in ("docs@9", "tiny@9", "docs:0.5+docs@9:0.5"):
                with pytest.raises(ApiError) as raised:
                    async with site.catalogue.acquire(
                        model, may_know=lambda name: not name.startswith("docs")
                    ):
                        pass
                assert "does not exist" in raised.value.message and "docs@1" not in raised.value.message
            with pytest.raises(ApiError, match="docs@1"):
                async with site.catalogue.acquire("docs@9"):
                    pass

    asyncio.run(run())


def test_an_ensemble_of_served_adapters_answers_under_its_name(tmp_path):
    async def run():
        async with running(Site(tmp_path)) as site:
            async with site.catalogue.acquire("docs:0.7+docs@2:0.3") as target:
                assert target.name == "docs@1:0.7+docs@2:0.3"
                assert site.engine.sums[target.adapter] == (("docs-1", 0.7), ("docs-2", 0.3))
            with pytest.raises(ApiError, match="'dogs' does not exist"):
                async with site.catalogue.acquire("docs:0.7+dogs:0.3"):
                    pass

    asyncio.run(run())
