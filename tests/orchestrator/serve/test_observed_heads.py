"""Task heads' answers counted by adapter, and compared with those of a candidate in their shadow."""

import asyncio

import pytest

from orchestrator.serve.engines.heads import (
    Classified,
    Embedded,
    Entity,
    Found,
    Input,
    Span,
    Tagged,
    Terms,
    TooLong,
)
from orchestrator.serve.rollouts.numbers import Agreement
from orchestrator.serve.rollouts.observed_heads import ObservedHeads


class Two:
    """Two versions: `new` says otherwise to "b"."""

    fails: str | None = None

    async def classify(self, inputs, adapter, terms):
        if self.fails == adapter:
            raise RuntimeError("broken")
        if inputs[0].text == "long":
            raise TooLong(0, 9, 8)
        other = adapter == "new" and inputs[0].text == "b"
        return [Classified((("y", 0.5),) if other else (("x", 0.8),), 3)]

    async def tag(self, inputs, adapter, terms):
        entities = (Entity("A", 0.5, 0, 1), *((Entity("B", 0.5, 2, 3),) if adapter == "new" else ()))
        return [Tagged(entities, 3)]

    async def find(self, questions, adapter, top, terms):
        return [Found((Span(0, 2, 0.25 if adapter == "new" else 0.5),), 3)]

    async def embed(self, inputs, adapter, terms):
        other = {"a": (0.6, 0.8), "b": (-1.0, 0.0)}
        return [Embedded(other[each.text] if adapter == "new" else (1.0, 0.0), 3) for each in inputs]


def observed():
    heads = ObservedHeads(Two())
    heads.watch({"r": ("new", "old")})
    return heads, heads.watches["r"]


async def settled(heads):
    while heads._shadows:
        await asyncio.sleep(0)
        await asyncio.gather(*heads._shadows, return_exceptions=True)


def test_requests_are_counted_by_adapter_and_those_that_are_wrong_are_nobodys_fault():
    heads, watch = observed()

    async def run():
        await heads.classify([Input("a")], "new")
        await heads.embed([Input("a")], None)
        with pytest.raises(TooLong):
            await heads.classify([Input("long")], "new")
        heads._engine.fails = "new"
        with pytest.raises(RuntimeError):
            await heads.classify([Input("a")], "new")

    asyncio.run(run())
    assert (heads.totals["new"].requests, heads.totals["new"].errors, heads.totals["new"].tokens) == (2, 1, 3)
    assert heads.totals[""].requests == 1 and watch.candidate.requests == 2 and watch.stable.requests == 0


def test_a_candidate_is_compared_by_what_it_chooses():
    heads, watch = observed()

    async def run():
        for text in ("a", "b"):
            (answer,) = await heads.classify([Input(text)], "old", Terms(shadow="new"))
            assert answer.scores == (("x", 0.8),)  # what the client gets is the version's that it asked
        await heads.tag([Input("a")], "old", Terms(shadow="new"))
        await heads.find([("q", "c")], "old", 1, Terms(shadow="new"))
        await settled(heads)

    asyncio.run(run())
    shadow = watch.shadow
    assert (shadow.requests, shadow.errors, shadow.positions, shadow.agreed) == (4, 0, 5, 3)
    assert shadow.difference == pytest.approx(0.6931, abs=1e-3)
    assert "new" not in heads.totals


class Tagger:
    """`new` finds one entity more at the head of the first text, and says otherwise to the second."""

    async def tag(self, inputs, adapter, terms):
        both = tuple(Entity("A", 0.5, at, at + 1) for at in range(2, 6))
        more = (Entity("B", 0.9, 0, 1),) if adapter == "new" else ()
        return [Tagged((*more, *both), 9), *(Tagged(both, 9) for _ in inputs[1:])]

    async def classify(self, inputs, adapter, terms):
        return [
            Classified((("y" if adapter == "new" and each.text == "b" else "x", 0.5),), 3) for each in inputs
        ]


def test_what_a_candidate_says_otherwise_of_one_text_is_no_difference_in_the_others():
    heads = ObservedHeads(Tagger())
    heads.watch({"r": ("new", "old")})

    async def run(ask):
        await ask
        await settled(heads)
        shadow, heads.watches["r"].shadow = heads.watches["r"].shadow, Agreement()
        return shadow

    texts = [Input("a"), Input("b"), Input("c")]
    tagged = asyncio.run(run(heads.tag(texts, "old", Terms(shadow="new"))))
    assert (tagged.positions, tagged.agreed, tagged.scored) == (13, 12, 12)
    classified = asyncio.run(run(heads.classify(texts, "old", Terms(shadow="new"))))
    assert (classified.positions, classified.agreed, classified.scored) == (3, 2, 2)


def test_a_candidate_that_fails_in_the_shadow_is_told_of_and_the_client_answered():
    heads, watch = observed()
    heads._engine.fails = "new"

    async def run():
        assert await heads.classify([Input("a")], "old", Terms(shadow="new"))
        await settled(heads)

    asyncio.run(run())
    assert (watch.shadow.requests, watch.shadow.errors) == (0, 1)


def test_vectors_of_a_candidate_are_compared_by_their_cosine():
    heads, watch = observed()

    async def run():
        found = await heads.embed([Input("a"), Input("b")], "old", Terms(shadow="new"))
        await settled(heads)
        return found

    found = asyncio.run(run())
    assert [each.vector for each in found] == [(1.0, 0.0), (1.0, 0.0)]
    assert watch.shadow.metrics() == {
        "shadow.requests": 1.0,
        "shadow.error_rate": 0.0,
        "shadow.agreement": pytest.approx((0.6 + 0.0) / 2),
    }
