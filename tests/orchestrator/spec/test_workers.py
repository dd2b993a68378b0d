"""`resources.num_workers: [min, max]`: how it is written, which sizes are worth their workers, what retry takes."""

import math

import pytest

from orchestrator.spec.canonical import canonical_hash
from orchestrator.spec.rules import accumulation, sizes
from orchestrator.spec.schema import json_schema
from orchestrator.spec.workers import forwards, group_sizes, numbers
from orchestrator.train.rows.batches import steps

from .jobs import refused, spec_of


@pytest.mark.parametrize(
    ("written", "least", "most"), [("3", 3, 3), ("[1, 2]", 1, 2), ("[2, 2]", 2, 2), ("4.0", 4, 4)]
)
def test_a_number_or_a_range(written, least, most):
    resources = spec_of(f"resources: {{num_workers: {written}}}\n").resources
    assert (resources.min_workers, resources.max_workers) == (least, most)


@pytest.mark.parametrize(
    ("written", "says"),
    [
        ("0", "0 is not a number of workers. Write a whole number of at least 1, or [min, max]."),
        ("[2, 1]", "[2, 1] has its largest number first. Write [1, 2]."),
        (
            "[1]",
            "[1] is not [min, max]: it has 1 entries. Write a whole number of at least 1, or [min, max].",
        ),
        ("[0, 2]", "[0, 2] is not a number of workers. Write a whole number of at least 1, or [min, max]."),
        ("true", "True is not a number of workers. Write a whole number of at least 1, or [min, max]."),
        ("many", "'many' is not a number of workers. Write a whole number of at least 1, or [min, max]."),
    ],
)
def test_anything_else_is_refused_with_the_forms(written, says):
    line = f"resources: {{num_workers: {written}}}\n"
    message = refused(f"{line}model: {{base_model: b}}\ndata: {{datasets: [{{path: a}}]}}\n")
    assert message == f"jobs/x.yaml:1 resources.num_workers: {says}"


def test_a_range_of_one_number_is_that_number():
    one, two = (spec_of(f"resources: {{num_workers: {text}}}\n") for text in ("2", "[2, 2]"))
    assert canonical_hash(one) == canonical_hash(two)
    assert canonical_hash(one) != canonical_hash(spec_of("resources: {num_workers: [1, 2]}\n"))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((1, 2, 8, 4), [(1, 2), (2, 1)]),
        ((1, 3, 8, 1), [(1, 8), (2, 4), (3, 3)]),
        ((1, 3, 4, 2), [(1, 2), (2, 1)]),  # a third worker has nothing to do
        ((8, 16, 64, 1), [(8, 8), (10, 7), (11, 6), (13, 5), (16, 4)]),
        ((2, 2, 8, 2), [(2, 2)]),
    ],
)
def test_a_size_is_worth_its_workers_where_a_step_gets_shorter(arguments, expected):
    found = group_sizes(*arguments)
    assert [(each.num_workers, each.gradient_accumulation_steps) for each in found] == expected
    assert numbers(found).split(" or ")[-1] == str(expected[-1][0])


@pytest.mark.parametrize("workers", range(1, 8))
@pytest.mark.parametrize(("batch", "micro"), [(8, 1), (8, 2), (7, 2), (24, 4)])
def test_what_is_said_of_a_size_is_what_its_busiest_worker_does(workers, batch, micro):
    parts = [
        next(
            steps(
                100, epochs=1, max_steps=1, global_batch_size=batch, micro_batch_size=micro, world_size=workers,
                rank=rank, seed=0,
            )
        )
        for rank in range(workers)
    ]  # fmt: skip
    assert {len(part.micro) for part in parts} == {forwards(batch, micro, workers)}
    assert sorted(place for part in parts for rows in part.samples for place in rows) == list(range(batch))
    assert forwards(batch, micro, workers) == math.ceil(math.ceil(batch / workers) / micro)


def test_the_batch_of_an_elastic_job_is_that_of_its_most_workers():
    spec = spec_of(
        "training: {micro_batch_size: 2, gradient_accumulation_steps: 3}\nresources: {num_workers: [1, 4]}\n"
    )
    assert accumulation(spec) == (3, 24)
    assert [size.num_workers for size in sizes(spec)] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("training", "says"),
    [
        ("global_batch_size: 3",
         "training.global_batch_size: 3 rows are fewer than the 4 workers that may share them. Write at least 4, or "
         "lower resources.num_workers."),
        ("global_batch_size: 8, gradient_accumulation_steps: 3",
         "training.global_batch_size: 8 rows over 4 workers x 1 rows are 2 accumulation steps, not 3. Remove "
         "training.gradient_accumulation_steps: it follows from the others."),
    ],
)  # fmt: skip
def test_a_batch_that_an_elastic_job_cannot_have(training, says):
    text = f"training: {{{training}}}\nresources: {{num_workers: [2, 4]}}\n"
    message = refused(f"{text}model: {{base_model: b}}\ndata: {{datasets: [{{path: a}}]}}\n")
    assert message == f"jobs/x.yaml:1 {says}"


def test_a_batch_that_no_size_divides_is_shared_unevenly():
    spec = spec_of("training: {global_batch_size: 7}\nresources: {num_workers: [2, 3]}\n")
    assert [(s.num_workers, s.gradient_accumulation_steps) for s in sizes(spec)] == [(2, 4), (3, 3)]


def test_how_often_an_elastic_run_grows():
    assert spec_of("").resources.growth_interval == 300
    assert spec_of("resources: {growth_interval: 30s}\n").resources.growth_interval == 30
    message = refused(
        "resources: {growth_interval: soon}\nmodel: {base_model: b}\ndata: {datasets: [{path: a}]}\n"
    )
    assert message.startswith(
        "jobs/x.yaml:1 resources.growth_interval: 'soon' is not a duration. Write seconds"
    )


def test_retry_has_its_defaults():
    retry = spec_of("").retry
    assert (retry.worker_failure, retry.preemption, retry.oom) == (2, "unlimited", 0)
    assert (retry.start_timeout, retry.max_duration) == (600, None)
    retry = spec_of("retry: {worker_failure: unlimited, preemption: 3, oom: 1, max_duration: 24h}\n").retry
    assert (retry.worker_failure, retry.preemption, retry.oom, retry.max_duration) == (
        "unlimited",
        3,
        1,
        86400,
    )


def test_retry_refuses_what_is_no_number():
    message = refused("retry: {worker_failure: -1}\nmodel: {base_model: b}\ndata: {datasets: [{path: a}]}\n")
    assert (
        message == "jobs/x.yaml:1 retry.worker_failure: -1 is not a whole number of at least 0 or unlimited."
    )


def test_editors_are_told_both_forms():
    workers = json_schema()["$defs"]["ResourcesSpec"]["properties"]["num_workers"]
    assert [each["type"] for each in workers["anyOf"]] == ["integer", "array"]
    assert workers["default"] == 1
