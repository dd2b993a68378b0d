"""The plan's memory against what a worker really takes: fp32 LoRA steps on CPU, each in a process of its own.

    python benchmarks/memory_plan.py [--write]     prints estimate, measured and their ratio for each shape

Measured: the peak resident memory of two optimizer steps (VmHWM, reset once the model is built), less that of the same
process before it has loaded a base. Estimated: the plan's total less its `framework`. The bases are random Llamas.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

SHAPES = {
    "20M": {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 8, "num_attention_heads": 6,
            "num_key_value_heads": 6, "vocab_size": 8000},
    "50M": {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 12, "num_attention_heads": 8,
            "num_key_value_heads": 4, "vocab_size": 16000},
    "200M": {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 12, "num_attention_heads": 16,
             "num_key_value_heads": 8, "vocab_size": 32000},
}  # fmt: skip

CASES = [
    {"shape": "20M", "rows": 4, "length": 256, "r": 8},
    {"shape": "20M", "rows": 8, "length": 512, "r": 8},
    {"shape": "50M", "rows": 2, "length": 512, "r": 16},
    {"shape": "50M", "rows": 4, "length": 512, "r": 16, "recomputes": True},
    {"shape": "50M", "rows": 4, "length": 256, "r": 16, "dropout": 0.1},
    {"shape": "200M", "rows": 1, "length": 512, "r": 8},
]


def main() -> None:
    """Measures every case and prints a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help="keep the table in benchmarks/results")
    parser.add_argument("--only", help="cases whose shape has this name")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        print(json.dumps(measure(json.loads(arguments.case))))
        return
    lines = [
        f"{'base':>5} {'rows':>4} {'length':>6}  {'':<12} {'estimate':>9} {'measured':>9} {'ratio':>6} {'idle':>8}"
    ]
    print(lines[0])
    with tempfile.TemporaryDirectory() as folder:
        for case in CASES:
            if arguments.only in (None, case["shape"]):
                lines.append(row(case, Path(folder)))
                print(lines[-1], flush=True)
    if arguments.write:
        name = f"memory_plan-{time.strftime('%Y-%m-%d')}-{platform.machine()}-{os.cpu_count()}cpu.txt"
        (ROOT / "benchmarks" / "results" / name).write_text("\n".join(lines) + "\n")


def row(case: dict, folder: Path) -> str:
    """One case, estimated and measured."""
    from orchestrator.plan import make_plan
    from orchestrator.plan.model_sizes import read_sizes
    from orchestrator.spec.load import load_job_mapping

    base = folder / case["shape"]
    command = [sys.executable, __file__, "--case", json.dumps({**case, "base": str(base)})]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise SystemExit(done.stderr)
    found = json.loads(done.stdout.splitlines()[-1])
    spec = load_job_mapping(
        {
            "name": "memory",
            "model": {"base_model": str(base)},
            "data": {"datasets": [{"path": "unused.jsonl"}], "sequence_len": case["length"]},
            "adapter": {"type": "lora", "r": case["r"], "dropout": case.get("dropout", 0.0)},
            "training": {
                "micro_batch_size": case["rows"],
                "gradient_checkpointing": bool(case.get("recomputes")),
            },
        }
    ).spec
    memory = make_plan(spec, None, read_sizes(str(base))).memory
    assert memory is not None
    estimate, measured = memory.total - memory.framework, found["peak"] - found["idle"]
    what = (
        "recomputes"
        if case.get("recomputes")
        else f"dropout {case['dropout']}"
        if case.get("dropout")
        else ""
    )
    mib = 2**20
    return (
        f"{case['shape']:>5} {case['rows']:>4} {case['length']:>6}  {what:<12} {estimate / mib:>5.0f} MiB"
        f" {measured / mib:>5.0f} MiB {estimate / measured:>6.2f} {found['idle'] / mib:>4.0f} MiB"
    )


def measure(case: dict) -> dict[str, int]:
    """Two steps as a worker takes them; runs in a process of its own."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    import peft_dist
    from orchestrator.train.allocator import map_large_blocks
    from orchestrator.train.loss import target_loss
    from peft_dist.catalog import config_class
    from peft_dist.loading import load_base
    from peft_dist.optim import AdapterOptimizer, Hyper

    map_large_blocks()
    torch.set_num_threads(1)
    shape = SHAPES[case["shape"]]
    make_base(Path(case["base"]), LlamaConfig, LlamaForCausalLM, shape)
    config = config_class("LORA")(
        r=case["r"], lora_dropout=case.get("dropout", 0.0), target_modules="all-linear"
    )
    warm_up(
        LlamaForCausalLM(LlamaConfig(**{**SHAPES["20M"], "num_hidden_layers": 1, "vocab_size": 64})), config
    )
    idle = resident("VmRSS")
    model = peft_dist.get_peft_model(load_base(case["base"]), config)
    model.train()
    if case.get("recomputes"):
        model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = AdapterOptimizer(stage=0)
    trained = {name: each for name, each in model.named_parameters() if each.requires_grad}
    optimizer.add("default", trained, Hyper(learning_rate=1e-3))
    Path("/proc/self/clear_refs").write_text("5")
    for _ in range(2):
        step(
            model,
            optimizer,
            torch.randint(0, shape["vocab_size"], (case["rows"], case["length"])),
            target_loss,
        )
    return {"idle": idle, "peak": resident("VmHWM")}


def make_base(folder: Path, config: type, model: type, shape: dict) -> None:
    """Saves a random base in a process that then ends, so that its memory is not counted."""
    if not folder.exists() and os.fork() == 0:
        model(config(**shape, max_position_embeddings=2048)).save_pretrained(folder)
        os._exit(0)
    while not (folder / "model.safetensors").exists():
        os.wait()


def warm_up(model, config) -> None:
    """A step of a small model: what a first step imports and sets up belongs to an idle worker."""
    import torch

    import peft_dist
    from orchestrator.train.loss import target_loss

    tiny = peft_dist.get_peft_model(model, config)
    ids = torch.randint(0, 64, (1, 8))
    target_loss(tiny(input_ids=ids).logits, ids).backward()


def step(model, optimizer, ids, target_loss) -> None:
    """Forward, backward and update, as `orchestrator.train.loop` does them."""
    import torch

    out = model(input_ids=ids, attention_mask=torch.ones_like(ids))
    (target_loss(out.logits, ids) / ids.numel()).backward()
    del out
    optimizer.reduce()
    optimizer.step()
    optimizer.zero_grad()


def resident(key: str) -> int:
    """Bytes of `VmRSS` or `VmHWM`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


if __name__ == "__main__":
    main()
