"""The plan's memory against what a worker really takes, over stages, bits and methods.

    python benchmarks/memory_plan.py [--only NAME ...] [--device cuda] [--parts] [--left-over] [--write]

Each case is a job: its base is read, its adapter put on and two steps are taken by the task's own `backward` and the
trainer's optimizer, each worker a process of its own. Measured: on a CPU the peak of RssAnon, sampled every 5 ms from
before the base is read, less that of the same process idle (all imports, a step of a tiny base behind it); on a GPU
`max_memory_allocated`. Estimated: the plan's total less its `framework`. Where there are several workers the one that
takes most counts. The bases have random weights. To reach: a ratio between 0.8 and 1.2 in every case. The cases of
`UNSEEN` were added once the estimate was written, and nothing was changed for them.

`--left-over` also says what a worker gives back after the last step, asked to: what MKL had packed, and what is free in
glibc's heap by then, most of which was in use at the peak.
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
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from memory_of import Sampler, own_bytes
from shapes import SHAPES

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

NF4, INT8 = {"load_in_4bit": True}, {"load_in_8bit": True}


def case(
    shape: str, rows: int, length: int, adapter: dict | None = None, *, workers: int = 1, **more: Any
) -> dict:
    """A job as its table says it: `stage`, `bits`, `recomputes`, `precision` beside the shape, rows and adapter."""
    chosen = {"shape": shape, "rows": rows, "length": length, "adapter": adapter or {"type": "lora", "r": 8}}
    usual = {"stage": "zero2", "bits": {}, "recomputes": False, "precision": "fp32", "model": "llama"}
    return {**chosen, "workers": workers, **usual, **more}


IA3 = {
    "type": "ia3",
    "target_modules": ["k_proj", "v_proj", "down_proj"],
    "feedforward_modules": ["down_proj"],
}
LOHA, OFT, DORA = {"type": "loha", "r": 8}, {"type": "oft"}, {"type": "lora", "r": 8, "use_dora": True}
PROMPTS = {"type": "prompt_tuning", "num_virtual_tokens": 16}
CPU_CASES = {
    "lora": case("20M", 4, 256, stage="zero0"),
    "lora-long": case("20M", 8, 512),
    "lora-recomputed": case("50M", 4, 512, {"type": "lora", "r": 16}, recomputes=True),
    "lora-dropout": case("50M", 4, 256, {"type": "lora", "r": 16, "dropout": 0.1}),
    "lora-200M": case("200M", 1, 512),
    "lora-bf16": case("50M", 2, 512, precision="bf16"),
    "lora-int8": case("50M", 2, 512, bits=INT8),
    "lora-nf4": case("50M", 2, 512, bits=NF4),
    "lora-zero2-2": case("50M", 1, 512, workers=2),
    "lora-zero3": case("50M", 2, 512, workers=2, stage="zero3"),
    "lora-zero3-short": case("50M", 1, 512, workers=2, stage="zero3"),
    "lora-zero3-long": case("50M", 1, 1024, workers=2, stage="zero3"),
    "lora-offload": case("50M", 2, 512, workers=2, stage="zero3-offload", recomputes=True),
    "lora-bf16-zero3": case("50M", 1, 1024, workers=2, stage="zero3", precision="bf16"),
    "lora-nf4-zero3": case("50M", 2, 512, workers=2, stage="zero3", bits=NF4),
    "lora-int8-zero3": case("50M", 2, 512, workers=2, stage="zero3", bits=INT8, recomputes=True),
    "loha": case("50M", 1, 512, LOHA),
    "loha-zero3": case("50M", 2, 512, LOHA, workers=2, stage="zero3"),
    "loha-nf4": case("50M", 1, 512, LOHA, bits=NF4),
    "dora": case("50M", 1, 512, DORA, stage="zero0"),
    "oft": case("50M", 1, 512, OFT),
    "ia3": case("50M", 1, 512, IA3),
    "prompts": case("50M", 1, 512, PROMPTS),
}
UNSEEN = {
    "unseen-lora": case("35M", 3, 384, {"type": "lora", "r": 4, "target_modules": ["q_proj", "v_proj"]}),
    "unseen-lora-zero3": case("110M", 1, 768, workers=2, stage="zero3", recomputes=True),
    "unseen-dora-nf4": case("35M", 2, 640, DORA, bits=NF4),
    "unseen-oft-zero3": case("35M", 5, 200, OFT, workers=2, stage="zero3"),
    "unseen-prompts-bf16": case("110M", 2, 320, PROMPTS, precision="bf16"),
    "unseen-qwen3": case("35M", 2, 512, model="qwen3"),
    "unseen-starcoder2": case("35M", 2, 512, model="starcoder2"),
}
GPU_CASES = {
    "1B-lora": case("1B", 4, 1024, precision="bf16"),
    "1B-lora-recomputed": case("1B", 8, 1024, precision="bf16", recomputes=True),
    "1B-lora-int8": case("1B", 4, 1024, precision="bf16", bits=INT8),
    "1B-lora-nf4": case("1B", 4, 1024, precision="bf16", bits=NF4),
    "1B-loha": case("1B", 2, 1024, {"type": "loha", "r": 8}, precision="bf16"),
    "1B-ia3": case("1B", 4, 1024, IA3, precision="bf16"),
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
    parser.add_argument(
        "--left-over", action="store_true", help="also what a worker gives back when it is asked to"
    )
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.worker:
        print(json.dumps(measure(json.loads(chosen.worker))))
        return
    cases = {**CPU_CASES, **UNSEEN} if chosen.device == "cpu" else GPU_CASES
    print(HEADER)
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for name, each in cases.items():
            if chosen.only is None or name in chosen.only:
                what = {**each, "device": chosen.device, "left_over": chosen.left_over}
                found.append(row(name, what, Path(folder)))
                print(text_of(found[-1], chosen.parts), flush=True)
    ratios = [each["ratio"] for each in found]
    print(
        f"ratio: lowest {min(ratios):.2f}, median {statistics.median(ratios):.2f}, highest {max(ratios):.2f}"
    )
    if chosen.write:
        write(chosen.device, found)
    raise SystemExit(0 if all(0.8 <= ratio <= 1.2 for ratio in ratios) else 1)


def write(device: str, found: list[dict[str, Any]]) -> None:
    """Keeps the result, dated, with the machine."""
    import torch
    import transformers

    day, machine = time.strftime("%Y-%m-%d"), f"{os.cpu_count()}cpu-{platform.machine()}"
    if device == "cuda":
        machine = torch.cuda.get_device_name().replace(" ", "-")
    result = {
        "date": day,
        "hardware": machine,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "cases": found,
    }
    path = ROOT / "benchmarks" / "results" / f"{day}-{machine}-memory_plan.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written to {path.relative_to(ROOT)}")


def row(name: str, what: dict, folder: Path) -> dict[str, Any]:
    """One case, estimated and measured, in bytes."""
    base = folder / f"{what['model']}-{what['shape']}"
    make_base(base, what["model"], what["shape"])
    make_base(base.with_name(f"{what['model']}-tiny"), what["model"], "tiny")
    _, plan = planned(what, str(base))
    memory = plan.memory
    assert memory is not None, plan.notes
    most = max(on_workers(what, base, folder), key=lambda each: each["peak"] - each["idle"])
    estimate, measured = memory.total - memory.framework, most["peak"] - most["idle"]
    parts = ("base", "adapter", "gradients", "optimizer", "activations")
    return {
        "case": name,
        **{key: what[key] for key in CASE},
        "estimate": estimate,
        "measured": measured,
        "ratio": estimate / measured,
        "parts": {part: getattr(memory, part) for part in parts},
        **{key: size - most["idle"] for key, size in most.items() if key in ("read", "rest")},
        **{key: size for key, size in most.items() if key in ("idle", "heap", "mkl")},
    }


CASE = ("model", "shape", "rows", "length", "workers", "stage", "bits", "precision", "recomputes", "adapter")


def text_of(found: dict[str, Any], with_parts: bool) -> str:
    """A line of the table."""
    text = f"{found['case']:<20} {found['shape']:>5} {found['rows']:>4} {found['length']:>6} {found['workers']:>7}"
    text += f"  {found['stage']:<14} {found['estimate'] / MIB:>5.0f} MiB {found['measured'] / MIB:>5.0f} MiB"
    text += f" {found['ratio']:>6.2f} {found['idle'] / MIB:>4.0f} MiB"
    if with_parts:
        text += (
            "\n" + " " * 8 + ", ".join(f"{part} {size / MIB:.0f}" for part, size in found["parts"].items())
        )
        text += f"; measured when read {found['read'] / MIB:.0f}, at rest {found['rest'] / MIB:.0f}"
    if "mkl" in found:
        text += f"\n{'':8}given back: heap {found['heap'] / MIB:.1f}, MKL {found['mkl'] / MIB:.1f}"
    return text


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


def make_base(folder: Path, model: str, shape: str) -> None:
    """Saves a random base in a process that then ends, so that its memory is not counted."""
    if folder.exists():
        return
    if (child := os.fork()) == 0:
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        torch.set_default_dtype(torch.bfloat16 if shape in ("1B", "7B") else torch.float32)
        config = AutoConfig.for_model(model, **SHAPES[shape], max_position_embeddings=2048)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
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

    from orchestrator.train.worker.allocator import map_large_blocks

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
    return {**found, **(give_back() if what["left_over"] else {})}


def give_back() -> dict[str, int]:
    """Bytes that go when glibc and MKL are asked for what they keep."""
    import ctypes

    import torch

    own = own_bytes(kinds=ANONYMOUS)
    ctypes.CDLL(None).malloc_trim(0)
    trimmed = own_bytes(kinds=ANONYMOUS)
    ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so")).mkl_serv_free_buffers()
    return {"heap": own - trimmed, "mkl": trimmed - own_bytes(kinds=ANONYMOUS)}


def work(what: dict, found: dict[str, int]) -> None:
    """Reads the base, puts the adapter on it, takes two steps."""
    import torch

    from orchestrator.runner import TrainRequest
    from orchestrator.train.group import Group
    from orchestrator.train.tasks.causal import CausalLM
    from orchestrator.train.tasks.task import Batch, Step
    from orchestrator.train.worker.model import build_model, load_frozen_base
    from orchestrator.train.worker.seat import Seat
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
    optimizer.add("default", Seat(model).trained(), Hyper(learning_rate=1e-3))
    size = getattr(base.config, "vocab_size")  # noqa: B009
    task = CausalLM(None)
    for number in range(2):
        ids = torch.randint(0, size, (what["rows"], what["length"]))
        mask = torch.ones_like(ids)
        if what["rows"] > 1:
            mask[-1, -1] = 0  # rows are seldom of one length
        targets = what["rows"] * what["length"]
        batch = Batch(
            {"input_ids": ids, "attention_mask": mask}, {"labels": ids}, list(range(what["rows"])), targets
        )
        optimizer.zero_grad()
        step = Step(model, group, 0, number, targets, 1.0)
        task.backward(step, [batch.to(group.device)])
        optimizer.reduce()
        optimizer.step()
    optimizer.zero_grad()
    found["rest"] = held(what["device"] == "cuda")


def warm_up(what: dict) -> None:
    """The same with a tiny base: what a first step imports and sets up belongs to an idle worker."""
    base = Path(what["base"]).with_name(f"{what['model']}-tiny")
    work({**what, "base": str(base), "rows": 1, "length": 8}, {})
    gc.collect()


ANONYMOUS = ("RssAnon",)


def held(on_gpu: bool) -> int:
    """Bytes now: RssAnon, or what torch has allocated on the GPU."""
    if not on_gpu:
        return own_bytes(kinds=ANONYMOUS)
    import torch

    return torch.cuda.memory_allocated()


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
    own = os.getpid()
    with Sampler(lambda: [own], 0.005, ANONYMOUS) as sampler:
        yield found
    found["peak"] = sampler.peaks[own]


if __name__ == "__main__":
    main()
