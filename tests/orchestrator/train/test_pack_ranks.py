"""The law of a pack on two ranks, at each ZeRO stage, and over bases of 8 and 4 bits."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from orchestrator.runner import TrainRequest
from orchestrator.train.worker.run import train
from tests.ranks import run_on_ranks

from .packs import Heard, packed
from .test_pack import check, of, the_same_alone, unlike
from .tiny import plan

LORA = of("lora", r=4, lora_dropout=0.2)
MANY = (LORA, of("oft"), of("prompt_tuning", num_virtual_tokens=3), of("adalora", init_r=4, target_r=2))


def both(requests: dict[str, TrainRequest], way: str) -> dict[str, Heard]:
    """On a rank: all of them in a pack; what was heard of each."""
    torch.set_num_threads(1)
    return packed(requests, way)


def each_alone(requests: dict[str, TrainRequest]) -> dict[str, Heard]:
    torch.set_num_threads(1)
    found = {}
    for name, request in requests.items():
        heard = found[name] = Heard()
        end = train(replace(request, run_dir=request.run_dir.replace("pack", "alone")), reporter=heard)
        heard.emit("finished", end=asdict(end))
    return found


def on_two(folder: Path, stage: int, *adapters: dict[str, Any]) -> dict[str, TrainRequest]:
    """Runs that differ; of the second each step has fewer rows than ranks at times, so that one has nothing of it."""
    made = unlike(folder, *adapters)
    plans = [
        plan(workers=2, stage=stage, micro=1),
        plan(workers=2, stage=stage, micro=3),
        plan(workers=2, stage=stage, micro=1, accumulation=2),
    ]
    return {name: replace(each, plan=plans[i % 3]) for i, (name, each) in enumerate(made.items())}


@pytest.mark.parametrize("way", ["turns", "together"])
@pytest.mark.parametrize(
    "stage",
    # one of them with every commit; a pair of ranks that partition a base takes a dozen seconds
    [pytest.param(0, marks=pytest.mark.matrix), pytest.param(2, marks=pytest.mark.matrix), 3],
)
def test_two_ranks_have_what_they_have_alone(stage, way, tmp_path):
    requests = on_two(tmp_path, stage, *MANY)
    heard = run_on_ranks(both, 2, requests, way)
    wanted = run_on_ranks(each_alone, 2, requests)
    for name in requests:
        assert heard[0][name].of("finished") == heard[1][name].of("finished") != []
    check(heard[0], wanted[0], 0.0 if way == "turns" else 1e-4)


@pytest.mark.matrix  # bases of 4 and 8 bits take seconds a step on a CPU
@pytest.mark.parametrize("way", ["turns", "together"])
@pytest.mark.parametrize("bits", [8, 4])
def test_over_a_quantised_base(bits, way, tmp_path):
    requests = unlike(tmp_path, *MANY)
    on = {f"load_in_{bits}bit": True}
    for name, each in requests.items():
        spec = each.spec.model_copy(update={"model": each.spec.model.model_copy(update=on)})
        requests[name] = replace(each, spec=spec)
    check(packed(requests, way), the_same_alone(requests), {"turns": 1e-6, "together": 1e-3}[way])
