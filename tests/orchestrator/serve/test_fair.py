"""Whose turn it is, by the tokens that each queue was served."""

from orchestrator.serve.fair import FairQueue


def drained(queue: FairQueue[str]) -> list[str]:
    order = []
    while (popped := queue.pop()) is not None:
        name, item = popped
        order.append(item)
        queue.served(name, 10)
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
