"""Backend, device and precision for machines that are not at hand."""

import subprocess
import sys

import pytest

from orchestrator.devices import RankFacts, backend_of, device_of, precision_of, recomputes_activations

H100, T4 = (9, 0), (7, 5)


def cluster(nodes: int, gpus: int, *, capability=H100, widened: bool = True) -> list[RankFacts]:
    """One worker a GPU, with the variables as Ray Train sets them: CUDA_VISIBLE_DEVICES lists the GPUs of all
    workers on the node (`widened`), LOCAL_RANK and NODE_RANK count workers and nodes."""
    return [
        RankFacts(
            rank=node * gpus + local,
            world_size=nodes * gpus,
            local_rank=local,
            node_rank=node,
            assigned=(str(local),),
            visible=tuple(map(str, range(gpus))) if widened else (str(local),),
            num_cuda=gpus if widened else 1,
            capability=capability,
            has_nccl=True,
        )
        for node in range(nodes)
        for local in range(gpus)
    ]


@pytest.mark.parametrize(
    ("nodes", "gpus", "devices"),
    [
        (1, 8, [f"cuda:{i}" for i in range(8)]),
        (2, 8, [f"cuda:{i}" for i in range(8)] * 2),
        (2, 1, ["cuda:0", "cuda:0"]),
    ],
)
def test_each_worker_takes_its_own_gpu_over_nccl(nodes, gpus, devices):
    facts = cluster(nodes, gpus)
    assert [device_of(fact) for fact in facts] == devices
    assert backend_of(facts) == "nccl"
    assert precision_of("auto", facts) == "bf16"


def test_a_worker_that_sees_only_its_own_gpu_calls_it_zero():
    facts = cluster(1, 8, widened=False)
    assert {device_of(fact) for fact in facts} == {"cuda:0"}


def test_the_gpu_is_the_one_that_ray_gave_not_the_local_rank():
    # another job holds GPUs 0 and 1 of the node: Ray gives this one 3 and 2, in this order
    visible = ("2", "3")
    assert device_of(RankFacts(local_rank=0, assigned=("3",), visible=visible, num_cuda=2)) == "cuda:1"
    assert device_of(RankFacts(local_rank=1, assigned=("2",), visible=visible, num_cuda=2)) == "cuda:0"


def test_gpus_named_by_uuid():
    visible = ("GPU-aa", "GPU-bb")
    assert device_of(RankFacts(local_rank=0, assigned=("GPU-bb",), visible=visible, num_cuda=2)) == "cuda:1"


def test_fake_gpus_are_the_cpu_over_gloo():
    # num_gpus=2 on a machine without any: Ray gives ids, torch sees nothing
    facts = [
        RankFacts(rank=i, world_size=2, local_rank=i, assigned=(str(i),), visible=("0", "1"), num_cuda=0)
        for i in range(2)
    ]
    assert [device_of(fact) for fact in facts] == ["cpu", "cpu"]
    assert backend_of(facts) == "gloo"
    assert precision_of("auto", facts) == "fp32"


def test_a_worker_without_a_gpu_of_its_own_stays_on_the_cpu():
    facts = [RankFacts(num_cuda=8, has_nccl=True)]
    assert device_of(facts[0]) == "cpu"
    assert backend_of(facts) == "gloo"


def test_two_workers_on_one_gpu_cannot_use_nccl():
    facts = [
        RankFacts(
            rank=i, world_size=2, local_rank=i, assigned=("0",), visible=("0",), num_cuda=1,
            capability=H100, has_nccl=True,
        )
        for i in range(2)
    ]  # fmt: skip
    assert {device_of(fact) for fact in facts} == {"cuda:0"}
    assert backend_of(facts) == "gloo"


def test_a_torch_without_nccl_uses_gloo():
    facts = [RankFacts(**{**vars(fact), "has_nccl": False}) for fact in cluster(1, 2)]
    assert backend_of(facts) == "gloo"


def test_precision_is_one_for_all_ranks():
    assert precision_of("auto", cluster(1, 2, capability=T4)) == "fp32"
    assert precision_of("auto", cluster(1, 2) + cluster(1, 2, capability=T4)) == "fp32"
    for asked in ("bf16", "fp16", "fp32"):
        assert precision_of(asked, [RankFacts()]) == asked


def test_gradient_checkpointing():
    assert recomputes_activations("auto", on_gpu=True, num_parameters=10)
    assert recomputes_activations("auto", on_gpu=False, num_parameters=2_000_000_000)
    assert not recomputes_activations("auto", on_gpu=False, num_parameters=100_000_000)
    assert recomputes_activations(True, on_gpu=False, num_parameters=10)
    assert not recomputes_activations(False, on_gpu=True, num_parameters=10**12)


def test_auto_leaves_a_method_the_cache_that_it_needs():
    assert not recomputes_activations("auto", on_gpu=True, num_parameters=10**10, keeps_past=True)


def test_deciding_needs_neither_torch_nor_ray():
    code = "import sys, orchestrator.devices; print('torch' in sys.modules, 'ray' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.split() == ["False", "False"]
