"""Adapters come once, stay while they are used, and leave at rest."""

import asyncio

import pytest

from orchestrator.errors import StorageError
from orchestrator.serve.api_error import ApiError
from orchestrator.serve.engines.engine import AdapterRefused
from orchestrator.serve.engines.ensemble import ensemble_name, parse_ensemble
from orchestrator.serve.engines.residency import Residency, sum_key
from tests.orchestrator.serve.counting_engine import CountingEngine, Shelf


class Site:
    def __init__(self, folder, *, names="abcdef", load_s=0.0, **options) -> None:
        self.engine, self.shelf = CountingEngine(load_s=load_s), Shelf()
        self.versions = {name: self.shelf.add(name) for name in names}
        self.residency = Residency(self.engine, self.shelf, folder / "cache", **options)

    async def use(self, name, seconds=0.0):
        async with self.residency.held(self.versions[name]) as key:
            assert key in self.engine.loaded()
            await asyncio.sleep(seconds)
            assert key in self.engine.loaded()

    @property
    def there(self):
        return sorted(key.partition("-")[0] for key in self.engine.loaded())


def test_a_hundred_who_want_it_at_once_load_it_once(tmp_path):
    async def run():
        site = Site(tmp_path, load_s=0.01)
        await asyncio.gather(*(site.use("a") for _ in range(100)))
        assert site.engine.loads == {"a-1": 1} and site.shelf.pulls == {"a@1": 1}

    asyncio.run(run())


def test_different_ones_load_at_the_same_time(tmp_path):
    async def run():
        site = Site(tmp_path, load_s=0.05)
        await asyncio.gather(*(site.use(name) for name in "abcdef"))
        assert site.engine.most_loading > 2

    asyncio.run(run())


def test_a_client_that_leaves_ends_the_load_for_nobody(tmp_path):
    async def run():
        site = Site(tmp_path, load_s=0.05)
        impatient = asyncio.ensure_future(site.use("a"))
        other = asyncio.ensure_future(site.use("a"))
        await asyncio.sleep(0.02)
        impatient.cancel()
        await other
        assert site.engine.loads == {"a-1": 1}

    asyncio.run(run())


def test_the_longest_unused_leaves_and_comes_back_from_disk(tmp_path):
    async def run():
        site = Site(tmp_path, slots=2)
        for name in "abac":
            await site.use(name)
        assert site.there == ["a", "c"]
        assert site.residency.state("b-1") == "cold"
        await site.use("b")
        assert site.there == ["b", "c"] and site.shelf.pulls["b@1"] == 1 and site.engine.loads["b-1"] == 2

    asyncio.run(run())


def test_what_is_used_never_leaves(tmp_path):
    """Two slots, many requests over six adapters: each finds its own for its whole time."""

    async def run():
        site = Site(tmp_path, slots=2, load_s=0.001)
        await asyncio.gather(*(site.use(name, 0.002) for name in "abcdef" * 10))
        assert len(site.there) == 2
        assert site.engine.loads.total() < 60

    asyncio.run(run())


def test_where_all_slots_are_in_use_a_request_waits_and_then_says_so(tmp_path):
    async def run():
        site = Site(tmp_path, slots=1, patience_s=0.1)
        async with site.residency.held(site.versions["a"]):
            with pytest.raises(
                ApiError, match="All 1 adapters that can be loaded at once are in use"
            ) as raised:
                await site.use("b")
            assert raised.value.status == 503 and raised.value.retry_after_s
            waiting = asyncio.ensure_future(site.use("c"))
            await asyncio.sleep(0.02)
            assert not waiting.done()
        await waiting
        assert site.there == ["c"]

    asyncio.run(run())


def test_what_the_engine_refuses_is_said_to_each_and_tried_once(tmp_path):
    async def run():
        site = Site(tmp_path, slots=1)
        site.engine.refuses["a-1"] = "no module matches"
        for _ in range(3):
            with pytest.raises(ApiError, match="The model 'a@1' does not load: no module matches") as raised:
                await site.use("a")
            assert raised.value.code == "adapter_refused"
        assert site.engine.loads["a-1"] == 1 and site.residency.state("a-1") == "refused"
        await site.use("b")  # its slot is free again

    asyncio.run(run())


def test_a_refusal_names_adapters_as_their_users_do(tmp_path):
    """The engine knows them by their keys, which stand in its tensors' names too."""

    async def run():
        site = Site(tmp_path)
        site.engine.refuses["a-1"] = "adapter 'a-1': the checkpoint lacks 'q_proj.lora_A.a-1.weight'."
        with pytest.raises(
            ApiError, match=r"'a@1' does not load: the checkpoint lacks 'q_proj\.lora_A\.weight'"
        ):
            await site.use("a")

        async def no_sum(key, parts):
            raise AdapterRefused("'c-1' has no weighted sum with others.")

        site.engine.combine = no_sum
        parts = [(site.versions[name], 0.5) for name in "bc"]
        with pytest.raises(ApiError, match="answer together: 'c@1' has no weighted sum"):
            async with site.residency.held_sum(parts):
                pass

    asyncio.run(run())


def test_a_storage_that_fails_is_asked_again(tmp_path):
    async def run():
        site = Site(tmp_path)
        site.shelf.broken["a@1"] = StorageError("it does not answer")
        with pytest.raises(StorageError):
            await site.use("a")
        del site.shelf.broken["a@1"]
        await site.use("a")

    asyncio.run(run())


def test_what_is_no_longer_wanted_leaves_at_rest_on_disk_too(tmp_path):
    async def run():
        site = Site(tmp_path)
        await site.use("a")
        async with site.residency.held(site.versions["b"]):
            await site.residency.keep_only({"c-1"})
            assert site.there == ["b"]
        await site.residency.keep_only({"c-1"})
        assert site.there == [] and list((tmp_path / "cache").iterdir()) == []

    asyncio.run(run())


def test_what_has_no_slot_is_brought_to_disk(tmp_path):
    async def run():
        site = Site(tmp_path, slots=2)
        for version in site.versions.values():
            await site.residency.bring(version)
        assert site.there == ["a", "b"]
        assert {site.residency.state(f"{name}-1") for name in "cdef"} == {"cold"}
        assert site.shelf.pulls.total() == 6

    asyncio.run(run())


# ensembles


@pytest.mark.parametrize(
    ("model", "parts"),
    [
        ("a:0.7+b:0.3", [("a", 0.7), ("b", 0.3)]),
        ("a@2:0.5 + b@production:-1", [("a@2", 0.5), ("b@production", -1.0)]),
        ("a+b", [("a", 1.0), ("b", 1.0)]),
        ("a:2", [("a", 2.0)]),
        ("code+docs@stable+tone:0.5", [("code", 1.0), ("docs@stable", 1.0), ("tone", 0.5)]),
        ("a:1e+2+b:-2.5e-1+code:1E+0", [("a", 100.0), ("b", -0.25), ("code", 1.0)]),
        ("a@production", None),
        ("docs-1.2_x", None),
    ],
)
def test_an_ensemble_is_read(model, parts):
    assert parse_ensemble(model) == parts


@pytest.mark.parametrize("model", ["a:0.7+", "+", ":", "a:x", "a:nan+b", "a:inf", "a::1", "+".join("a" * 17)])
def test_what_is_no_ensemble_is_a_400(model):
    with pytest.raises(ApiError) as raised:
        parse_ensemble(model)
    assert raised.value.status == 400 and raised.value.param == "model"


def test_an_ensemble_holds_its_parts_and_is_made_once(tmp_path):
    async def run():
        site = Site(tmp_path, slots=2)
        parts = [(site.versions["a"], 0.7), (site.versions["b"], 0.3)]
        key = sum_key([("a-1", 0.7), ("b-1", 0.3)])
        for _ in range(2):
            async with site.residency.held_sum(parts) as held:
                assert held == key and site.engine.sums[key] == (("a-1", 0.7), ("b-1", 0.3))
        assert site.engine.events.count(("combine", key)) == 1
        await site.use("c")  # the ensemble is at rest: it leaves, and then one of its parts
        assert key not in site.engine.loaded() and site.there == ["b", "c"]
        async with site.residency.held_sum(parts):
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(site.use("c"), 0.05)
        assert {"a-1", "b-1", key} <= site.engine.loaded()

    asyncio.run(run())


def test_an_ensemble_larger_than_the_slots_is_refused(tmp_path):
    async def run():
        site = Site(tmp_path, slots=1)
        with pytest.raises(ApiError, match="An ensemble of 2 adapters does not fit"):
            async with site.residency.held_sum([(site.versions["a"], 1.0), (site.versions["b"], 1.0)]):
                pass

    asyncio.run(run())


def test_names_of_ensembles():
    assert ensemble_name([("a@1", 0.7), ("b@2", 0.3)]) == "a@1:0.7+b@2:0.3"
