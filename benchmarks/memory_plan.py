"""The plan's memory against what a worker really takes, over stages, bits and methods.

    python benchmarks/memory_plan.py [--only NAME ...] [--device cuda] [--write]

Each case is a job: its base is read, its adapter put on and two steps are taken as a worker does, each worker a process
of its own. Measured: on a CPU the peak of RssAnon, sampled every 5 ms from before the base is read, less that of the
same process idle (all imports, a step of a tiny base behind it); on a GPU `max_memory_allocated`. Estimated: the plan's
total less its `framework`. Where there are several workers the one that takes most counts. The bases are random Llamas.
To reach: a ratio between 0.8 and 1.2 in every case.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

SHAPES = {
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 4, "vocab_size": 64},
    "20M": {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 8, "num_attention_heads": 6,
            "num_key_value_heads": 6, "vocab_size": 8000},
    "50M": {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 12, "num_attention_heads": 8,
            "num_key_value_heads": 4, "vocab_size": 16000},
    "200M": {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 12, "num_attention_heads": 16,
             "num_key_value_heads": 8, "vocab_size": 32000},
    "1B": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
           "num_key_value_heads": 8, "vocab_size": 128256},
    "7B": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
           "num_key_value_heads": 32, "vocab_size": 32000},
}  # fmt: skip

NF4, INT8 = {"load_in_4bit": True}, {"load_in_8bit": True}


def case(
    shape: str, rows: int, length: int, adapter: dict | None = None, *, workers: int = 1, **more: Any
) -> dict:
    """A job as its table says it: `stage`, `bits`, `recomputes`, `precision` beside the shape, rows and adapter."""
    chosen = {"shape": shape, "rows": rows, "length": length, "adapter": adapter or {"type": "lora", "r": 8}}
    usual = {"stage": "zero2", "bits": {}, "recomputes": False, "precision": "fp32"}
    return {**chosen, "workers": workers, **usual, **more}


CPU_CASES = {
    "lora": case("20M", 4, 256),
    "lora-long": case("20M", 8, 512),
    "lora-recomputed": case("50M", 4, 512, {"type": "lora", "r": 16}, recomputes=True),
    "lora-dropout": case("50M", 4, 256, {"type": "lora", "r": 16, "dropout": 0.1}),
    "lora-200M": case("200M", 1, 512),
    "lora-int8": case("50M", 2, 512, bits=INT8),
    "lora-nf4": case("50M", 2, 512, bits=NF4),
    "lora-zero3": case("50M", 2, 512, workers=2, stage="zero3"),
    "lora-offload": case("50M", 2, 512, workers=2, stage="zero3-offload", recomputes=True),
    "lora-nf4-zero3": case("50M", 2, 512, workers=2, stage="zero3", bits=NF4),
    "lora-int8-zero3": case("50M", 2, 512, workers=2, stage="zero3", bits=INT8, recomputes=True),
    "loha": case("50M", 1, 512, {"type": "loha", "r": 8}),
    "loha-zero3": case("50M", 2, 512, {"type": "loha", "r": 8}, workers=2, stage="zero3"),
    "loha-nf4": case("50M", 1, 512, {"type": "loha", "r": 8}, bits=NF4),
    "ia3": case(
        "50M", 1, 512,
        {"type": "ia3", "target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    ),
    "prompts": case("50M", 1, 512, {"type": "prompt_tuning", "num_virtual_tokens": 16}),
}  # fmt: skip
GPU_CASES = {
    "1B-lora": case("1B", 4, 1024, precision="bf16"),
    "1B-lora-recomputed": case("1B", 8, 1024, precision="bf16", recomputes=True),
    "1B-lora-int8": case("1B", 4, 1024, precision="bf16", bits=INT8),
    "1B-lora-nf4": case("1B", 4, 1024, precision="bf16", bits=NF4),
    "1B-loha": case("1B", 2, 1024, {"type": "loha", "r": 8}, precision="bf16"),
    "1B-ia3": case("1B", 4, 1024, CPU_CASES["ia3"]["adapter"], precision="bf16"),
    "7B-lora-recomputed": case("7B", 2, 1024, precision="bf16", recomputes=True),
    "7B-lora-nf4": case("7B", 2, 1024, precision="bf16", bits=NF4, recomputes=True),
}  # fmt: skip
HEADER = f"{'case':<20} {'base':>5} {'rows':>4} {'length':>6} {'workers':>7}  {'stage':<14}"
HEADER += f" {'estimate':>9} {'measured':>9} {'ratio':>6} {'idle':>8}"
MIB = 2**20


def main() -> None:
    """Measures every case and prints a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help="keep the table in benchmarks/results")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these cases")
    parser.add_argument("--parts", action="store_true", help="also the estimate's parts")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.worker:
        print(json.dumps(measure(json.loads(chosen.worker))))
        return
    cases = CPU_CASES if chosen.device == "cpu" else GPU_CASES
    lines, ratios = [HEADER], []
    print(HEADER)
    with tempfile.TemporaryDirectory() as folder:
        for name, each in cases.items():
            if chosen.only is None or name in chosen.only:
                line, ratio = row(name, {**each, "device": chosen.device}, Path(folder), chosen.parts)
                lines.append(line)
                ratios.append(ratio)
                print(line, flush=True)
    lines.append(
        f"ratio: lowest {min(ratios):.2f}, median {statistics.median(ratios):.2f}, highest {max(ratios):.2f}"
    )
    print(lines[-1])
    if chosen.write:
        name = f"{time.strftime('%Y-%m-%d')}-{os.cpu_count()}cpu-{platform.machine()}-{chosen.device}-memory_plan.txt"
        (ROOT / "benchmarks" / "results" / name).write_text("\n".join(lines) + "\n")
    raise SystemExit(0 if all(0.8 <= ratio <= 1.2 for ratio in ratios) else 1)


def row(name: str, what: dict, folder: Path, with_parts: bool) -> tuple[str, float]:
    """One case, estimated and measured."""
    base = folder / what["shape"]
    make_base(base, what["shape"])
    make_base(folder / "tiny", "tiny")
    _, plan = planned(what, str(base))
    memory = plan.memory
    assert memory is not None, plan.notes
    found = on_workers(what, base, folder)
    estimate, measured = memory.total - memory.framework, max(each["peak"] - each["idle"] for each in found)
    text = f"{name:<20} {what['shape']:>5} {what['rows']:>4} {what['length']:>6} {what['workers']:>7}"
    text += f"  {what['stage']:<14}"
    text += f" {estimate / MIB:>5.0f} MiB {measured / MIB:>5.0f} MiB {estimate / measured:>6.2f}"
    text += f" {found[0]['idle'] / MIB:>4.0f} MiB"
    if with_parts:
        parts = {
            part: getattr(memory, part)
            for part in ("base", "adapter", "gradients", "optimizer", "activations")
        }
        text += "\n" + " " * 8 + ", ".join(f"{part} {size / MIB:.0f}" for part, size in parts.items())
        text += f"; measured when read {(found[0]['read'] - found[0]['idle']) / MIB:.0f}"
        text += f", at rest {(found[0]['rest'] - found[0]['idle']) / MIB:.0f}"
    return text, estimate / measured


def planned(what: dict, base: str) -> tuple[Any, Any]:
    """The job and its plan."""
    from orchestrator.cluster import ClusterFacts, NodeFacts
    from orchestrator.plan import make_plan
    from orchestrator.plan.model_sizes import read_sizes
    from orchestrator.spec.load import load_job_mapping

    on_gpu = what["device"] == "cuda"
    spec = load_job_mapping(
        {
            "name": "memory",
            "model": {"base_model": base, **what["bits"]},
            "data": {"datasets": [{"path": "unused.jsonl"}], "sequence_len": what["length"]},
            "adapter": what["adapter"],
            "training": {
                "micro_batch_size": what["rows"],
                "gradient_checkpointing": what["recomputes"],
                "precision": what["precision"],
            },
            "deepspeed": what["stage"],
            "resources": {"num_workers": what["workers"], "gpus_per_worker": 1 if on_gpu else 0},
        }
    ).spec
    nodes = NodeFacts(64, what["workers"] if on_gpu else 0, 2**40)
    facts = ClusterFacts((nodes,), 64, nodes.gpus, source="here")
    return spec, make_plan(spec, facts, read_sizes(base))


def make_base(folder: Path, shape: str) -> None:
    """Saves a random base in a process that then ends, so that its memory is not counted."""
    if folder.exists():
        return
    if (child := os.fork()) == 0:
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.set_default_dtype(torch.bfloat16 if shape in ("1B", "7B") else torch.float32)
        LlamaForCausalLM(LlamaConfig(**SHAPES[shape], max_position_embeddings=2048)).save_pretrained(folder)
        os._exit(0)
    os.waitpid(child, 0)


# Workers


def on_workers(what: dict, base: Path, folder: Path) -> list[dict[str, int]]:
    """What each worker measured."""
    store = folder / f"store-{time.monotonic_ns()}"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if what["device"] == "cpu":
        environment["DS_ACCELERATOR"] = "cpu"
    said = {**what, "base": str(base), "store": str(store)}
    running = [
        subprocess.Popen(
            [sys.executable, __file__, "--worker", json.dumps({**said, "rank": rank})],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for rank in range(what["workers"])
    ]
    ended = [worker.communicate() for worker in running]
    for worker, (_, errors) in zip(running, ended, strict=True):
        if worker.returncode:
            raise SystemExit(errors)
    return [json.loads(printed.splitlines()[-1]) for printed, _ in ended]


def measure(what: dict) -> dict[str, int]:
    """A worker's idle memory, its peak, and what it holds once the base is read and after the last step, in bytes."""
    import torch
    import torch.distributed as dist

    from orchestrator.train.allocator import map_large_blocks

    map_large_blocks()
    torch.set_num_threads(1)
    rank, on_gpu = what["rank"], what["device"] == "cuda"
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(what["workers"]))
    if on_gpu:
        torch.cuda.set_device(rank)
    if what["workers"] > 1:
        backend = "nccl" if on_gpu else "gloo"
        dist.init_process_group(
            backend, init_method=f"file://{what['store']}", rank=rank, world_size=what["workers"]
        )
    warm_up(what)
    with peak(on_gpu) as found:
        work(what, found)
    return found


def work(what: dict, found: dict[str, int]) -> None:
    """Reads the base, puts the adapter on it, takes two steps."""
    import torch

    from orchestrator.runner import TrainRequest
    from orchestrator.train.group import Group
    from orchestrator.train.loss import target_loss
    from orchestrator.train.model import build_model, load_frozen_base, trainable
    from peft_dist.optim import AdapterOptimizer, Hyper

    spec, plan = planned(what, what["base"])
    group = Group("cpu" if what["device"] == "cpu" else f"cuda:{what['rank']}")
    is_sharded = plan.zero_stage == 3 and group.is_distributed
    base = load_frozen_base(
        spec, what["precision"], group.device, shards=plan.deepspeed if is_sharded else None
    )
    found["read"] = held(what["device"] == "cuda")
    model = build_model(TrainRequest(spec, plan, "", "", ""), base, group, None, 2, list)
    optimizer = AdapterOptimizer(stage=plan.zero_stage)
    optimizer.add("default", trainable(model), Hyper(learning_rate=1e-3))
    size = getattr(base.config, "vocab_size")  # noqa: B009
    for _ in range(2):
        ids = torch.randint(0, size, (what["rows"], what["length"]), device=group.device)
        optimizer.zero_grad()
        out = model(input_ids=ids, attention_mask=torch.ones_like(ids))
        (target_loss(out.logits, ids) / ids.numel()).backward()
        del out
        optimizer.reduce()
        optimizer.step()
    optimizer.zero_grad()
    found["rest"] = held(what["device"] == "cuda")


def warm_up(what: dict) -> None:
    """The same with a tiny base: what a first step imports and sets up belongs to an idle worker."""
    work({**what, "base": str(Path(what["base"]).parent / "tiny"), "rows": 1, "length": 8}, {})
    gc.collect()


def held(on_gpu: bool) -> int:
    """Bytes now: RssAnon, or what torch has allocated on the GPU."""
    if on_gpu:
        import torch

        return torch.cuda.memory_allocated()
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


@contextmanager
def peak(on_gpu: bool) -> Iterator[dict[str, int]]:
    """Fills in `idle` and, when it ends, `peak`."""
    found = {"idle": held(on_gpu)}
    if on_gpu:
        import torch

        torch.cuda.reset_peak_memory_stats()
        yield found
        found["peak"] = torch.cuda.max_memory_allocated()
        return
    highest, ended = [found["idle"]], threading.Event()

    def sample() -> None:
        while not ended.wait(0.005):
            highest[0] = max(highest[0], held(on_gpu))

    sampler = threading.Thread(target=sample, daemon=True)
    sampler.start()
    yield found
    ended.set()
    sampler.join()
    found["peak"] = max(highest[0], held(on_gpu))


if __name__ == "__main__":
    main()
