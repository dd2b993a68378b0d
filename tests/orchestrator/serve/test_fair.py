"""Whose turn it is, by the tokens that each queue was served."""

from orchestrator.serve.engines.fair import FairQueue


def drained(queue: FairQueue[str]) -> list[str]:
    order = []
    while (popped := queue.pop()) is not None:
        name, item = popped
        order.append(item)
        queue.served(name, 10)
        queue.leave(name)
    return order


def test_a_flooded_queue_does_not_keep_others_waiting():
    queue: FairQueue[str] = FairQueue()
    for number in range(5):
        queue.push("flood", f"f{number}")
    queue.push("calm", "c0")
    queue.push("calm", "c1")
    assert drained(queue) == ["f0", "c0", "f1", "c1", "f2", "f3", "f4"]


def test_one_queue_is_first_in_first_out():
    queue: FairQueue[str] = FairQueue()
    for item in "abc":
        queue.push("one", item)
    assert drained(queue) == ["a", "b", "c"]


def test_nobody_saves_up_turns_by_waiting():
    queue: FairQueue[str] = FairQueue()
    queue.push("busy", "b0")
    assert queue.pop() == ("busy", "b0")
    queue.served("busy", 1000)
    queue.push("late", "l0")
    queue.push("late", "l1")
    queue.push("busy", "b1")
    # The latecomer begins where the busy one is, not 1000 tokens before it.
    order = [queue.pop()]
    queue.served("late", 1)
    order.append(queue.pop())
    assert [item for _, item in order if item] == ["l0", "b1"]


def test_a_weight_is_a_share():
    queue: FairQueue[str] = FairQueue()
    for _ in range(8):
        queue.push("heavy", "h")
        queue.push("light", "l")
    order = ""
    for _ in range(9):
        name, item = queue.pop() or ("", "")
        order += item
        queue.served(name, 10, 2.0 if name == "heavy" else 1.0)
        queue.leave(name)
    assert order.count("h") == 6


def test_what_waits_can_be_taken_out_and_queues_are_forgotten():
    queue: FairQueue[str] = FairQueue()
    queue.push("one", "a")
    queue.push("one", "b")
    assert queue.remove("one", "a") and not queue.remove("one", "a")
    assert queue.waiting() == {"one": 1} and len(queue) == 1
    assert queue.pop() == ("one", "b")
    queue.leave("one")
    assert queue.pop() is None and queue._counters == {}


def places(queue: FairQueue[str]) -> dict[str, int]:
    """How many of each run once nothing more may."""
    while queue.pop() is not None:
        pass
    return dict(queue._running)


def flooded(calm: int) -> FairQueue[str]:
    """Fifty of one queue that wait, and a few of another."""
    queue: FairQueue[str] = FairQueue()
    for _ in range(50):
        queue.push("flood", "f")
    for _ in range(calm):
        queue.push("calm", "c")
    return queue


def test_a_flood_has_no_more_places_than_all_others_together_and_a_few_at_least():
    assert places(flooded(calm=0)) == {"flood": 50}
    assert places(flooded(calm=1)) == {"flood": 4, "calm": 1}
    assert places(flooded(calm=9)) == {"flood": 9, "calm": 9}


def test_one_that_had_something_to_do_a_moment_ago_still_counts_and_then_no_more():
    queue = flooded(calm=6)
    assert places(queue) == {"flood": 6, "calm": 6}
    for _ in range(6):
        queue.leave("calm")
    assert queue.pop() is None
    queue.served("flood", 600)
    assert places(queue) == {"flood": 50}


def test_many_queues_of_a_few_each_fill_all_places():
    queue: FairQueue[str] = FairQueue()
    for name in "abcdefgh":
        for number in range(8):
            queue.push(name, f"{name}{number}")
    assert sum(places(queue).values()) == 64


def test_a_queue_with_more_than_it_may_do_is_late_while_another_has_all_it_wants_and_a_moment_longer():
    queue = flooded(calm=1)
    places(queue)
    assert queue.late() == {"flood"}
    queue.leave("calm")
    assert queue.late() == {"flood"}
    queue.served("flood", 512)
    assert queue.late() == frozenset()


def test_where_all_want_more_than_they_may_nobody_is_late():
    queue: FairQueue[str] = FairQueue()
    for name in "ab":
        for number in range(20):
            queue.push(name, f"{name}{number}")
    for _ in range(8):
        queue.pop()
    assert queue.late() == frozenset()
