"""With how many workers a run goes on, when it grows, how often it is tried again: the rules, then the driver that
follows them over a cluster made of plain numbers. No Ray, no waiting: the clock is a number too."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from ray.exceptions import RayActorError
from ray.train import WorkerGroupError

from orchestrator.errors import DataError, PlacementError, TrainingError
from orchestrator.plan import Plan
from orchestrator.runner import Spent, TrainRequest
from orchestrator.spec.job import RetrySpec
from orchestrator.spec.workers import group_sizes
from orchestrator.train.driver.attempts import Attempts, Leave
from orchestrator.train.driver.elastic import Growth, largest, size_to_try
from orchestrator.train.driver.nodes import NODE_LABEL, labels_without
from orchestrator.train.driver.placement import NodeRoom, places_in_all, places_now
from orchestrator.train.retries import FailureKind, Retries, smaller_micro_batch

from .tiny import plan

KILLED = WorkerGroupError(
    "a worker died", {1: RayActorError(error_msg="The actor died. worker exit: SIGKILL")}
)
NO_MEMORY = WorkerGroupError("no memory", {0: MemoryError()})


def test_the_largest_size_for_which_there_is_room():
    assert [largest((1, 2, 4), places) for places in range(6)] == [None, 1, 2, 2, 4, 4]


@pytest.mark.parametrize(
    ("in_all", "free", "waited", "size"),
    [
        (4, 4, 0, 4),
        (4, 1, 0, 4),  # what left a moment ago may still hold its room
        (4, 1, 6, 1),
        (2, 2, 0, 2),  # a node is gone: nothing to wait for
        (0, 0, 0, 1),
        (4, 0, 60, 1),  # the least that is waited for
    ],
)
def test_with_how_many_workers_a_start_is_tried(in_all, free, waited, size):
    assert size_to_try((1, 2, 4), in_all=in_all, free=free, waited_s=waited) == size
    assert size_to_try((3,), in_all=in_all, free=free, waited_s=waited) == 3


def test_growth_needs_steady_room_and_its_interval():
    growth = Growth((1, 2, 4), interval_s=300)
    assert growth.size(1, 2, now=0) is None and growth.size(1, 2, now=1) is None
    assert growth.size(1, 2, now=2) == 2
    assert growth.size(1, 1, now=3) is None  # gone again: it counts anew
    assert growth.size(1, 2, now=4) is None and growth.size(1, 4, now=6) is None
    assert growth.size(1, 5, now=8) == 4
    growth.grew(8)
    assert [growth.size(2, 4, now=now) for now in (9, 100, 307)] == [None] * 3
    assert growth.size(2, 4, now=308) is None and growth.size(2, 4, now=310) == 4


def test_a_run_of_full_size_never_grows():
    growth = Growth((1, 2), interval_s=0)
    assert [growth.size(2, 9, now=now) for now in range(5)] == [None] * 5


@pytest.mark.parametrize(
    ("kind", "retry", "allowed"),
    [
        (FailureKind.WORKER_LOST, {}, 2),
        (FailureKind.NODE_LOST, {"worker_failure": 1}, 1),
        (FailureKind.PREEMPTION, {}, 50),
        (FailureKind.PREEMPTION, {"preemption": 0}, 0),
        (FailureKind.OUT_OF_MEMORY, {}, 0),
        (FailureKind.OUT_OF_MEMORY, {"oom": 3}, 3),
        (FailureKind.WORKER_LOST, {"worker_failure": "unlimited"}, 50),
        *[(kind, {}, 0) for kind in ("data", "config", "storage", "NaN", "error")],
    ],
)
def test_how_often_each_kind_is_tried_again(kind, retry, allowed):
    retries = Retries(RetrySpec(**retry))
    assert sum(retries.allow(FailureKind(kind)) for _ in range(50)) == allowed


def test_budgets_are_counted_apart_and_shared_by_kinds():
    retries = Retries(RetrySpec(worker_failure=2, oom=1))
    assert retries.spent(FailureKind.WORKER_LOST) is None
    assert retries.allow(FailureKind.WORKER_LOST) and retries.allow(FailureKind.NODE_LOST)
    assert not retries.allow(FailureKind.WORKER_LOST) and retries.allow(FailureKind.OUT_OF_MEMORY)
    assert retries.spent(FailureKind.NODE_LOST) == (
        "It was started again 2 times, as often as retry.worker_failure allows; --resume counts anew."
    )
    # what drivers before have tried counts too; a kind of another release is nobody's
    later = Retries(RetrySpec(worker_failure=2), {"node lost": 1, "oom": 1, "preemption": 4, "flood": 9})
    assert later.allow(FailureKind.WORKER_LOST) and not later.allow(FailureKind.NODE_LOST)
    assert [smaller_micro_batch(rows) for rows in (8, 3, 1)] == [4, 1, 1]


def test_room_counts_labels_nodes_and_the_runs_own_workers():
    nodes = [
        NodeRoom({"CPU": 2}, {"CPU": 0}, {NODE_LABEL: "a"}, "a"),
        NodeRoom({"CPU": 4}, {"CPU": 3}, {NODE_LABEL: "b"}, "b"),
    ]
    for placement, in_all, now, with_own in [
        ("PACK", 6, 3, 5), ("STRICT_PACK", 4, 3, 3), ("STRICT_SPREAD", 2, 1, 2),
    ]:  # fmt: skip
        made = plan(workers=2, placement=placement)
        assert places_in_all(made, nodes) == in_all
        assert places_now(made, nodes) == now
        assert places_now(made, nodes, {"a": 2}) == with_own
    away = plan(workers=2, labels=labels_without(plan(), {"a"}))
    assert places_in_all(away, nodes) == 4


@dataclass
class House:
    """A cluster of nodes with one CPU each, its mailbox, its clock, and a script of what each group does."""

    nodes: list[str]
    script: list[Callable[[House], dict]]
    now: float = 0.0
    taken: set[str] = field(default_factory=set)
    dead: set[str] = field(default_factory=set)
    drained: set[str] = field(default_factory=set)
    most: dict[str, float] = field(default_factory=dict)
    told: list[tuple[str, str]] = field(default_factory=list)
    failures: list[dict] = field(default_factory=list)
    plans: list[Plan] = field(default_factory=list)
    where: dict[int, str] = field(default_factory=dict)
    asked: bool = False
    aborted: bool = False
    reserved: list[int] = field(default_factory=list)
    attempts: Attempts | None = None

    # the cluster
    def rooms(self):
        return [
            NodeRoom({"CPU": 1}, {"CPU": 0 if node in self.taken else 1}, {NODE_LABEL: node}, node)
            for node in self.nodes
            if node not in self.drained
        ]

    def grows_to(self):
        return self.most

    def going(self):
        return self.drained

    def silent(self, node_ids):
        return {node: f"10.0.0.{node}" for node in node_ids if node in self.dead or node not in self.nodes}

    def reserve(self, made, num_workers, without=()):
        house = self
        self.reserved.append(num_workers)

        class Held:
            def wait(self, timeout_s):
                free = [node for node in house.nodes if node not in house.taken | house.dead | set(without)]
                if len(free) >= num_workers:
                    return True
                house.now += timeout_s
                return False

            def release(self):
                house.reserved.append(-num_workers)

        return Held()

    # the mailbox
    def begin(self):
        self.asked, self.where = False, {}

    def ask_to_leave(self):
        self.asked = True

    def places(self):
        return self.where

    def tell(self, kind, **fields):
        self.told.append((fields.get("state", kind), fields.get("message", fields.get("text", ""))))

    def failed(self, **fields):
        self.failures.append(fields)

    # the groups
    def open_group(self, request: TrainRequest):
        house = self
        self.plans.append(request.plan)
        count = request.plan.num_workers
        wanted = [node for node in self.nodes if node not in self.dead][:count]
        assert len(wanted) == count, "more workers than there are nodes that answer"
        self.aborted = False

        class Group:
            def train(self):
                house.taken, house.where = set(wanted), dict(enumerate(wanted))
                house.attempts.stepped()
                try:
                    return house.script.pop(0)(house)
                finally:
                    house.taken = set()

            def abort(self):
                house.aborted = True

        return Group()

    def passes(self, seconds: float) -> None:
        """A group steps for so long, until it is asked to leave or ended."""
        for _ in range(int(seconds)):
            self.now += 1
            assert self.attempts is not None
            self.attempts.look()
            if self.asked or self.aborted:
                return

    def run(self, tmp_path: Path, made: Plan, resources: dict | None = None, spent=None, **retry):
        from .tiny import job, request

        spec = job(tmp_path, retry=retry, resources=resources or {})
        asked = request(tmp_path, spec, made, spent=spent or Spent())
        self.attempts = Attempts(asked, self, self, self.open_group, clock=lambda: self.now)
        return self.attempts.run()


@pytest.fixture(scope="module", autouse=True)
def no_watch():
    """Looks are taken by the script."""
    before = Attempts._watch
    Attempts._watch = lambda self: None
    yield
    Attempts._watch = before


ELASTIC = replace(plan(workers=2, accumulation=2), sizes=group_sizes(1, 2, 8, 2))
DONE = {"steps": 9, "is_stopped": False}


def done(house):
    return DONE


def left(house):
    assert house.asked
    return {"steps": 5, "is_stopped": True}


def fails_with(error, *dead):
    def script(house):
        house.dead |= set(dead)
        raise error

    return script


def grows(house):
    """Takes steps until it is asked to leave; a minute at most."""
    house.passes(60)
    return left(house)


def sizes_of(house):
    return [
        (made.num_workers, made.gradient_accumulation_steps, made.global_batch_size) for made in house.plans
    ]


def test_a_lost_node_is_left_at_once_and_the_batch_stays(tmp_path):
    house = House(["a", "b"], [fails_with(KILLED, "b"), done])
    assert house.run(tmp_path, ELASTIC) == DONE
    assert sizes_of(house) == [(2, 2, 8), (1, 4, 8)]
    assert house.now < 1, "nothing was waited for"
    assert house.plans[1].labels == {NODE_LABEL: "!in(b)"}
    assert house.plans[1].deepspeed["train_micro_batch_size_per_gpu"] == 2
    (failure,) = house.failures
    assert failure == {
        "attempt": 1, "rank": 1, "kind": "node lost", "will_retry": True,
        "cause": "node 10.0.0.b, on which worker 1 was, does not answer.",
    }  # fmt: skip
    assert ("starting", "going on with 1 worker instead of 2") in house.told


def test_a_node_that_returns_is_used_again_after_a_checkpoint(tmp_path):
    def returns(house):
        house.dead, before = set(), house.now
        house.passes(60)
        assert house.now - before <= 4
        return left(house)

    house = House(["a", "b"], [fails_with(KILLED, "b"), returns, done])
    assert house.run(tmp_path, ELASTIC) == DONE
    assert [made.num_workers for made in house.plans] == [2, 1, 2]
    assert len(house.failures) == 1, "to grow is no failure"
    assert ("saving", "there is room for 2 workers: a checkpoint, then on from 1") in house.told


def test_growth_is_at_most_once_in_its_interval(tmp_path):
    def waits(house):
        house.dead, before = set(), house.now
        house.passes(1000)
        assert 299 <= house.now - before <= 305
        return left(house)

    house = House(["a", "b"], [fails_with(KILLED, "b"), grows, fails_with(KILLED, "b"), waits, done])
    house.script[1] = lambda house: (house.dead.clear(), grows(house))[1]
    assert house.run(tmp_path, ELASTIC) == DONE
    assert [made.num_workers for made in house.plans] == [2, 1, 2, 1, 2]


def test_a_fixed_size_waits_for_its_node(tmp_path):
    def comes_back(house):
        house.dead = {"b"}
        raise KILLED

    house = House(["a", "b"], [comes_back, done])
    silent = house.silent

    def returning(node_ids):
        if house.now > 30:
            house.dead = set()
        return silent(node_ids)

    house.silent = returning
    assert house.run(tmp_path, plan(workers=2)) == DONE
    assert [made.num_workers for made in house.plans] == [2, 2] and 30 < house.now < 40
    assert [state for state, _ in house.told] == ["waiting"]


def test_a_start_that_waits_too_long_says_for_what(tmp_path):
    house = House(["a", "b"], [])
    house.taken = {"a"}
    with pytest.raises(
        PlacementError, match=r"no room after 20 s of waiting for 2 x \{CPU: 1\}; free now: CPU 1 of 2"
    ):
        house.run(tmp_path, plan(workers=2), start_timeout="20s")
    # an elastic run takes what there is, after others had time to let go of theirs
    house = House(["a", "b"], [done])
    house.open_group, held = (
        (lambda request: (house.taken.clear(), House.open_group(house, request))[1]),
        {"a"},
    )
    house.taken = held
    assert house.run(tmp_path, ELASTIC) == DONE
    assert [made.num_workers for made in house.plans] == [1] and 5 <= house.now <= 7
    assert sum(house.reserved) == 0, "every reservation was let go again"


def test_failures_beyond_the_budget_end_the_run(tmp_path):
    house = House(["a", "b"], [fails_with(KILLED)] * 4)
    with pytest.raises(TrainingError) as failed:
        house.run(tmp_path, ELASTIC)
    assert str(failed.value) == (
        "worker 1 was lost: The actor died. worker exit: SIGKILL It was started again 2 times, as often as "
        "retry.worker_failure allows; --resume counts anew. See raypeft logs."
    )
    assert [failure["will_retry"] for failure in house.failures] == [True, True, False]


def test_what_drivers_before_used_up_is_used_up(tmp_path):
    house = House(["a", "b"], [fails_with(KILLED)] * 2)
    with pytest.raises(TrainingError, match="started again 2 times"):
        house.run(tmp_path, ELASTIC, spent=Spent(retries={"worker lost": 1}))
    assert [failure["will_retry"] for failure in house.failures] == [True, False]

    def steps(house):
        house.passes(100)
        return left(house)

    house = House(["a", "b"], [steps])
    assert house.run(tmp_path, ELASTIC, spent=Spent(seconds=30), max_duration="50s")["is_stopped"]
    assert house.attempts.leave == Leave.TIME and 20 < house.now < 23


def test_what_a_new_start_cannot_mend_is_not_tried(tmp_path):
    error = DataError("no row.", where="data")
    house = House(["a", "b"], [fails_with(WorkerGroupError("x", {0: error}))])
    with pytest.raises(DataError, match=r"^data: no row\.$"):
        house.run(tmp_path, ELASTIC)
    assert [(failure["kind"], failure["will_retry"]) for failure in house.failures] == [("data", False)]


def test_memory_is_tried_with_half_the_rows_a_forward(tmp_path):
    house = House(["a", "b"], [fails_with(NO_MEMORY), done])
    assert house.run(tmp_path, ELASTIC, oom=1) == DONE
    assert [(made.micro_batch_size, made.gradient_accumulation_steps) for made in house.plans] == [
        (2, 2),
        (1, 4),
    ]
    assert {made.global_batch_size for made in house.plans} == {8}
    with pytest.raises(TrainingError, match="ran out of memory"):
        House(["a", "b"], [fails_with(NO_MEMORY)]).run(tmp_path, ELASTIC)


def test_workers_that_are_sent_away_are_no_failure_of_theirs(tmp_path):
    def sent(house):
        return {"steps": 3, "is_stopped": True}

    house = House(["a", "b"], [*[sent] * 5, done])
    assert house.run(tmp_path, ELASTIC, worker_failure=0) == DONE
    assert {(failure["kind"], failure["cause"]) for failure in house.failures} == {
        ("preemption", "a worker was told to end: the checkpoint of step 3 is saved")
    }
    house = House(["a", "b"], [sent, sent])
    with pytest.raises(TrainingError, match=r"a worker was told to end.*retry\.preemption allows"):
        house.run(tmp_path, ELASTIC, preemption=1)


def test_a_node_that_is_told_to_go_is_left_before(tmp_path):
    def drained(house):
        house.drained = {"b"}
        house.passes(10)
        return left(house)

    house = House(["a", "b"], [drained, done])
    assert house.run(tmp_path, ELASTIC) == DONE
    assert [made.num_workers for made in house.plans] == [2, 1]
    assert [failure["kind"] for failure in house.failures] == ["preemption"]


def test_a_node_that_falls_silent_under_its_workers_ends_their_group(tmp_path):
    def hangs(house):
        house.dead = {"b"}
        house.passes(10)
        assert house.aborted and not house.asked and house.now <= 4
        raise RayActorError(error_msg="the controller was ended")

    house = House(["a", "b"], [hangs, done])
    assert house.run(tmp_path, ELASTIC) == DONE
    assert [made.num_workers for made in house.plans] == [2, 1]
    assert [failure["kind"] for failure in house.failures] == ["node lost"]


def test_the_time_of_a_run_is_all_of_its_groups(tmp_path):
    def steps(house):
        house.passes(100)
        return left(house)

    house = House(["a", "b"], [lambda house: (house.passes(30), fails_with(KILLED)(house))[1], steps])
    assert house.run(tmp_path, ELASTIC, max_duration="50s")["is_stopped"]
    assert house.attempts.leave == Leave.TIME and 50 < house.now < 53


def test_workers_that_do_not_leave_in_time_are_ended(tmp_path):
    def deaf(house):
        house.attempts.stop()
        house.asked = False
        house.passes(100)
        assert house.aborted and 20 < house.now < 23
        raise RayActorError(error_msg="ended")

    with pytest.raises(RayActorError):
        House(["a", "b"], [deaf]).run(tmp_path, ELASTIC)


def test_a_stop_goes_before_a_growth(tmp_path):
    def stops(house):
        house.nodes.append("b")
        house.passes(60)
        assert house.attempts.leave == Leave.GROW
        house.attempts.stop()
        return left(house)

    house = House(["a"], [stops])
    assert house.run(tmp_path, ELASTIC)["is_stopped"]
    assert house.attempts.leave == Leave.STOP and len(house.plans) == 1


def test_an_autoscaler_sees_the_wish_for_more(tmp_path):
    def alone(house):
        house.passes(20)
        assert not house.asked and house.reserved[-1] == 1
        house.nodes.append("b")
        house.passes(20)
        return left(house)

    house = House(["a"], [alone, done], most={"CPU": 4})
    assert house.run(tmp_path, ELASTIC) == DONE
    assert [made.num_workers for made in house.plans] == [1, 2]
    assert sum(house.reserved) == 0
