from dataclasses import replace

import pytest

from orchestrator.spec.workers import group_sizes
from orchestrator.train.driver.placement import NodeRoom, capacity, what_is_missing, why_impossible

from .tiny import plan

TWO_NODES = [
    NodeRoom({"CPU": 4.0, "GPU": 1.0}, {"CPU": 1.0, "GPU": 0.0}, {"zone": "a"}),
    NodeRoom({"CPU": 4.0}, {"CPU": 4.0}),
]


def test_what_fits_is_possible_though_busy():
    assert why_impossible(plan(workers=8), TWO_NODES) is None
    assert why_impossible(plan(workers=2, placement="STRICT_SPREAD"), TWO_NODES) is None


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (
            plan(workers=9),
            "9 x {CPU: 1} placed PACK will never fit: the cluster has {CPU: 8} on 2 node(s)",
        ),
        (plan(workers=5, placement="STRICT_PACK"), "room for 4 worker(s)"),
        (plan(workers=3, placement="STRICT_SPREAD"), "room for 2 worker(s)"),
        (plan(workers=2, bundle={"CPU": 1, "GPU": 1}), "the cluster has {CPU: 8, GPU: 1}"),
        (plan(workers=1, bundle={"CPU": 5}), "room for 0 worker(s)"),
        (plan(workers=5, labels={"zone": "a"}), "the cluster has {CPU: 4} on 1 node(s)"),
        (plan(workers=1, labels={"zone": "b"}), "no node has the labels zone=b; the cluster has 2 node(s)."),
    ],
)
def test_what_never_fits_says_why(made, words):
    assert words in why_impossible(made, TWO_NODES)


def test_the_autoscaler_counts():
    assert why_impossible(plan(workers=40), TWO_NODES, {"CPU": 64.0}) is None
    said = why_impossible(plan(workers=65), TWO_NODES, {"CPU": 64.0})
    assert said == "65 x {CPU: 1} needs 65 CPU, the cluster grows to 64 at most."
    assert why_impossible(plan(workers=1, bundle={"GPU": 1}), [NodeRoom({"CPU": 1})], {"CPU": 8.0})


def test_a_worker_that_no_kind_of_node_holds_is_refused():
    kinds = [{"CPU": 8.0}, {"CPU": 16.0, "GPU": 1.0}]
    most = {"CPU": 64.0, "GPU": 4.0}
    assert why_impossible(plan(workers=4, bundle={"CPU": 16}), TWO_NODES, most, kinds) is None
    assert why_impossible(plan(workers=1, bundle={"CPU": 17}), TWO_NODES, most, kinds) == (
        "a worker of {CPU: 17} will never fit: no node that is up, or can be started, has more than {CPU: 16}."
    )
    packed = plan(workers=2, bundle={"CPU": 1, "GPU": 1}, placement="STRICT_PACK")
    assert why_impossible(packed, TWO_NODES, most, kinds) == (
        "2 x {CPU: 1, GPU: 1} on one node will never fit: no node that is up, or can be started, has more than "
        "{CPU: 16, GPU: 1}."
    )


def test_an_elastic_run_needs_room_for_its_least():
    range_ = plan(workers=16, sizes=group_sizes(2, 16, 16, 1))
    assert why_impossible(range_, TWO_NODES) is None
    assert "2 x {CPU: 5} placed PACK will never fit" in why_impossible(
        replace(range_, bundle={"CPU": 5}), TWO_NODES
    )


def test_label_selectors_of_ray():
    nodes = [NodeRoom({"CPU": 1.0}, labels={"market": "spot"})]
    assert why_impossible(plan(labels={"market": "in(spot, on-demand)"}), nodes) is None
    assert why_impossible(plan(labels={"market": "!spot"}), nodes)
    assert why_impossible(plan(labels={"market": "!on-demand"}), nodes) is None


def test_what_it_waits_for():
    assert what_is_missing(plan(workers=6), TWO_NODES) == "6 x {CPU: 1}; free now: CPU 5 of 8"


def test_fractions_of_a_gpu():
    assert capacity({"CPU": 8, "GPU": 1}, {"CPU": 1, "GPU": 0.1}) == 8
    assert capacity({"CPU": 16, "GPU": 1}, {"CPU": 1, "GPU": 0.1}) == 10
