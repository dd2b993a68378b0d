"""What a worker sets up for the process that it is."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import sys, types
import torch
from orchestrator.merging.room import own_bytes
from orchestrator.train.worker import entry as worker

if sys.argv[1] == "without":
    worker.map_large_blocks = lambda: None
worker.rank_facts = lambda: types.SimpleNamespace(rank=0, world_size=1, local_rank=0, node_rank=0)
worker.join = lambda own: [own]
worker.device_of = lambda own: "cpu"
worker.precision_of = lambda *given: "fp32"

def train(request, **given):
    # Once a larger block is freed glibc's heap takes these; what lives on among them, as an adapter's gradients do
    # among activations, then keeps those below it.
    larger = torch.ones(2**21)
    del larger
    before, blocks, kept = own_bytes(), [], []
    for _ in range(100):
        blocks.append(torch.ones(2**19))
        kept.append(torch.ones(2**15))
    del blocks
    return own_bytes() - before

worker.run = types.SimpleNamespace(train=train)
plan = types.SimpleNamespace(bundle={"CPU": 1})
spec = types.SimpleNamespace(training=types.SimpleNamespace(precision="fp32"))
request = types.SimpleNamespace(plan=plan, spec=spec)
print(worker._train(request, types.SimpleNamespace(emit=lambda *args, **kwargs: None)))
"""


def held_after(how: str) -> int:
    """Bytes that a worker's process still holds of 200 MiB that it has freed."""
    ran = subprocess.run([sys.executable, "-c", SCRIPT, how], capture_output=True, text=True, check=True)
    return int(ran.stdout.split()[-1])


def test_memory_that_a_cpu_worker_frees_is_the_systems_again():
    """The plan's memory counts what is alive. The negative control: glibc's heap keeps what lies under what lives."""
    assert held_after("with") < 20 * 2**20
    assert held_after("without") > 40 * 2**20
