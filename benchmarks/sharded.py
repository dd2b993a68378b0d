"""What adapters cost on a sharded base, beside HF PEFT with DeepSpeed, in one run.

    python benchmarks/sharded.py [--stages 2 3] [--bits 4] [--shape 1B] [--rounds 15] [--device cuda] [--write]

Steps: two ranks over gloo, each with its own rows, LoRA r 16 on all seven linears, AdamW. On a CPU one thread a rank
works and CPU time is counted, summed over the ranks: what waits for the other rank costs nothing, so a busy machine
changes little; the heap is kept between steps for all sides alike. In each round every side takes one step, the first
one changing; the table has the medians.

    base        the frozen base's forward and backward as it is sharded at this stage, without an adapter: at stage 3 it
                gathers each layer for the forward and for the backward, at stage 2 it is whole
    arithmetic  the adapter's share: its products by themselves, as bare `torch.mm` over tensors of the same shapes (for
                each layer x A' and (x A') B' with its addition in the forward, the four products of the backward), with
                the sum of the layer's input gradients, and torch's AdamW over its tensors, half of them on each rank
    ours        peft_dist on the same base: forward, backward, `AdapterOptimizer.reduce`, `step`
    HF PEFT     `peft` with `deepspeed.initialize(model, model_parameters=trained, optimizer=AdamW)` at this stage:
                forward, `engine.backward`, `engine.step`

To reach: ours at most HF PEFT's, and at most 1.05 x (base + arithmetic).

Saving at stage 3: `model.save_pretrained` on all ranks, files written, beside the whole model gathered by
`engine._zero3_consolidated_16bit_state_dict()` without writing it. To reach: a tenth.

With `--device cuda` there is a rank a GPU, at most two, over nccl; the base is bf16, or nf4 with `--bits 4`, of a
1B and a 7B shape from random weights; the wall clock of a synchronised step is taken, of the slowest rank.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from heap import keep_heap
from shapes import SHAPES

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

ROWS = {"14M": (4, 128), "90M": (4, 128), "1B": (4, 512), "7B": (2, 512)}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RANK, RATE = 16, 1e-4
SLACK, SHARE_OF_SAVING = 1.05, 0.1


@dataclass(frozen=True)
class Case:
    """One table: a stage over a shape."""

    stage: int
    shape: str
    bits: int
    device: str
    rounds: int
    world: int

    @property
    def size(self) -> dict[str, int]:
        """The Llama's sizes."""
        return SHAPES[self.shape]


def main() -> None:
    """Runs every case in a fresh set of ranks and prints the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stages", type=int, nargs="+", default=[2, 3], choices=[1, 2, 3])
    parser.add_argument("--shape", nargs="+", choices=list(ROWS), help="14M on CPU, 1B and 7B on a GPU")
    parser.add_argument(
        "--bits", type=int, nargs="+", default=None, choices=[4, 16, 32], help="of the base's weights"
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--no-saving", action="store_true", help="the steps alone")
    parser.add_argument("--parts", action="store_true", help="also forward, backward, reduce and step, each")
    parser.add_argument("--write", action="store_true", help="keep the result in benchmarks/results")
    chosen = parser.parse_args()
    import torch

    world = 2 if chosen.device == "cpu" else max(1, min(2, torch.cuda.device_count()))
    shapes = chosen.shape or (["14M"] if chosen.device == "cpu" else ["1B", "7B"])
    bits = chosen.bits or ([32] if chosen.device == "cpu" else [16, 4])
    print(HEADER)
    found = []
    for shape in shapes:
        for width in bits:
            for stage in chosen.stages:
                case = Case(stage, shape, width, chosen.device, chosen.rounds, world)
                line = steps_line(case, on_ranks(steps, case))
                print(line["text"], flush=True)
                if chosen.parts:
                    print(parts_text(case, on_ranks(parts, case)), flush=True)
                found.append(line)
    saved = {}
    if not chosen.no_saving:
        case = Case(3, shapes[-1] if chosen.device == "cuda" else "90M", bits[0], chosen.device, 7, world)
        saved = saving_line(case, on_ranks(saving, case))
        print(saved["text"], flush=True)
    if chosen.write:
        write(chosen.device, found, saved)
    missed = [each for each in [*found, *([saved] if saved else [])] if not each["is_met"]]
    raise SystemExit(1 if missed else 0)


HEADER = f"{'':<20} {'base':>9} {'arithm.':>9} {'ours':>9} {'HF PEFT':>9} {'limit':>9}   ours/HF  ours/limit"


def steps_line(case: Case, ranks: list[dict[str, list[float]]]) -> dict[str, Any]:
    """The medians of what all ranks took in each round, in milliseconds."""
    sides = {side: 1000 * value for side, value in medians(case, ranks).items()}
    limit = SLACK * (sides["base"] + sides["arithmetic"])
    name = f"{case.shape} {_bits(case)} ZeRO-{case.stage}"
    of_theirs, of_limit = sides["ours"] / sides["peft"], sides["ours"] / limit
    text = f"{name:<20} " + " ".join(
        f"{sides[side]:7.1f}ms" for side in ("base", "arithmetic", "ours", "peft")
    )
    text += f" {limit:7.1f}ms   {of_theirs:7.2f}  {of_limit:10.3f}"
    return {
        **asdict(case), **sides, "limit": limit, "is_met": of_theirs <= 1 and of_limit <= 1, "text": text
    }  # fmt: skip


def saving_line(case: Case, ranks: list[dict[str, list[float]]]) -> dict[str, Any]:
    """Median wall clock of the slowest rank, and of CPU time over the ranks."""
    wall = {
        key: 1000 * statistics.median(max(each) for each in zip(*(rank[key] for rank in ranks), strict=True))
        for key in ranks[0]
    }
    ratio = wall["adapter"] / wall["whole"]
    text = (
        f"saving, {case.shape} {_bits(case)} ZeRO-3: the adapter gathered and written {wall['adapter']:.1f} ms,"
        f" the whole model gathered {wall['whole']:.1f} ms: {ratio:.3f} (to reach {SHARE_OF_SAVING})"
    )
    return {**asdict(case), **wall, "ratio": ratio, "is_met": ratio <= SHARE_OF_SAVING, "text": text}


def _bits(case: Case) -> str:
    return {4: "nf4", 16: "bf16", 32: "fp32"}[case.bits]


def write(device: str, found: list[dict[str, Any]], saved: dict[str, Any]) -> None:
    """Keeps the result, dated, with the machine."""
    import torch

    day = time.strftime("%Y-%m-%d")
    machine = (
        torch.cuda.get_device_name() if device == "cuda" else f"{os.cpu_count()}cpu-{platform.machine()}"
    )
    path = ROOT / "benchmarks" / "results" / f"{day}-{machine.replace(' ', '-')}-sharded.json"
    result = {"date": day, "machine": machine, "torch": torch.__version__, "steps": found, "saving": saved}
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written: {path.relative_to(ROOT)}")


# Ranks


def on_ranks(work: Callable[..., dict[str, list[float]]], case: Case, *more: Any) -> list[dict]:
    """What `work(case, rank, ...)` returned on each of fresh ranks that can reach one another."""
    import torch.multiprocessing as processes

    folder = Path(tempfile.mkdtemp(prefix="sharded-"))
    try:
        processes.spawn(_rank, (work, case, folder, more), nprocs=case.world)
        return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(case.world)]
    finally:
        shutil.rmtree(folder)


def _rank(rank: int, work: Callable[..., dict], case: Case, folder: Path, more: tuple) -> None:
    warnings.filterwarnings("ignore")
    if case.device == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(case.world))
    import logging

    import torch
    import torch.distributed as dist

    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    keep_heap()
    if case.device == "cuda":
        torch.cuda.set_device(rank)
    backend = "gloo" if case.device == "cpu" else "nccl"
    dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=rank, world_size=case.world)
    from peft_dist.sharding import disable_deepspeed_op_builds

    disable_deepspeed_op_builds()
    result = work(case, rank, *more)
    (folder / f"{rank}.json").write_text(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()


# Sides


def base_of(case: Case) -> Any:
    """A frozen random Llama, the same on every rank and side."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    dtype = torch.float32 if case.bits == 32 else torch.bfloat16
    config = LlamaConfig(**case.size, max_position_embeddings=1024)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(case.device):
            base = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    if case.bits == 4:
        quantise(base, dtype)
    return base.requires_grad_(False)


def quantise(base: Any, dtype: Any) -> None:
    """Puts nf4 layers in the place of the blocks' linear ones, packed into `dtype`."""
    import bitsandbytes
    from torch import nn

    for module in list(base.model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                made = bitsandbytes.nn.Linear4bit(
                    child.in_features, child.out_features, bias=False, compute_dtype=dtype,
                    quant_type="nf4", compress_statistics=True, quant_storage=dtype,
                )  # fmt: skip
                made.weight = bitsandbytes.nn.Params4bit(
                    child.weight.data, requires_grad=False, quant_type="nf4", quant_storage=dtype, module=made
                )
                setattr(module, name, made.to(child.weight.device))
    base.is_loaded_in_4bit = True


def steps(case: Case, rank: int) -> dict[str, list[float]]:
    """Seconds of each side's step, by round."""
    batch = inputs(case, rank)
    sides: dict[str, Callable[[], None]] = {
        "base": base_side(case, batch),
        "arithmetic": arithmetic_side(case, batch),
        "ours": our_side(case, batch),
        "peft": peft_side(case, batch),
    }
    taken: dict[str, list[float]] = {side: [] for side in sides}
    names = list(sides)
    for number in range(-2, case.rounds):
        for i in range(len(names)):
            side = names[(number + i) % len(names)]
            began = clock(case)
            sides[side]()
            took = clock(case) - began
            if number >= 0:
                taken[side].append(took)
    return taken


def clock(case: Case) -> float:
    """CPU seconds of this process and its threads; on a GPU the wall once it is idle. Ranks begin together."""
    import torch
    import torch.distributed as dist

    if case.device == "cpu":
        used = resource.getrusage(resource.RUSAGE_SELF)
        return used.ru_utime + used.ru_stime
    torch.cuda.synchronize()
    dist.barrier()
    return time.perf_counter()


def inputs(case: Case, rank: int) -> tuple[Any, Any]:
    """This rank's embeddings, which require a gradient, and its targets."""
    import torch

    rows, length = ROWS[case.shape]
    torch.manual_seed(1 + rank)
    dtype = torch.float32 if case.bits == 32 else torch.bfloat16
    x = torch.randn(rows, length, case.size["hidden_size"], device=case.device, dtype=dtype)
    return x.requires_grad_(True), torch.randint(
        0, case.size["vocab_size"], (rows, length), device=case.device
    )


def loss_of(model: Any, batch: tuple[Any, Any]) -> Any:
    """The mean loss of this rank's tokens."""
    import torch.nn.functional as F

    x, targets = batch
    x.grad = None
    logits = model(inputs_embeds=x, use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def zero(case: Case, **more: Any) -> dict[str, Any]:
    """DeepSpeed's config."""
    section = {"stage": case.stage, "stage3_param_persistence_threshold": 0}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": section,
        "gradient_clipping": 0.0,
        **more,
    }


def sharded_base(case: Case) -> Any:
    """The base without an adapter, as it is sharded at this stage."""
    from peft_dist.sharding import partition_base

    base = base_of(case).train()
    if case.stage == 3:
        partition_base(base, zero(case))
    return base


def base_side(case: Case, batch: tuple[Any, Any]) -> Callable[[], None]:
    """The base's own step."""
    base = sharded_base(case)
    return lambda: loss_of(base, batch).backward()


def our_model(case: Case) -> Any:
    """peft_dist's LoRA on the base, sharded."""
    import peft_dist
    from peft_dist.sharding import partition_base

    config = peft_dist.LoraConfig(r=RANK, target_modules=TARGETS, task_type="CAUSAL_LM")
    model = peft_dist.get_peft_model(base_of(case), config).train()
    if case.stage == 3:
        partition_base(model, zero(case))
    return model


def our_optimizer(case: Case, model: Any) -> Any:
    """AdamW over the adapter, sharded at this stage."""
    from peft_dist.optim import AdapterOptimizer, Hyper

    optimizer = AdapterOptimizer(stage=case.stage)  # type: ignore[arg-type]
    trained = {name: each for name, each in model.named_parameters() if each.requires_grad}
    optimizer.add("default", trained, Hyper(learning_rate=RATE))
    return optimizer


def our_side(case: Case, batch: tuple[Any, Any]) -> Callable[[], None]:
    """peft_dist's step."""
    model = our_model(case)
    optimizer = our_optimizer(case, model)

    def step() -> None:
        optimizer.zero_grad()
        (loss_of(model, batch) / case.world).backward()
        optimizer.reduce()
        optimizer.step()

    return step


def peft_model(case: Case) -> Any:
    """HF PEFT's LoRA in a DeepSpeed engine that trains it."""
    import deepspeed
    import peft
    import torch

    config = peft.LoraConfig(r=RANK, target_modules=TARGETS, task_type="CAUSAL_LM")
    model = peft.get_peft_model(base_of(case), config).train()
    trained = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0)
    settings = zero(case, zero_allow_untested_optimizer=True)
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=trained, optimizer=optimizer, config=settings
    )
    return engine


def peft_side(case: Case, batch: tuple[Any, Any]) -> Callable[[], None]:
    """HF PEFT's step."""
    engine = peft_model(case)

    def step() -> None:
        engine.backward(loss_of(engine, batch))
        engine.step()

    return step


def arithmetic_side(case: Case, batch: tuple[Any, Any]) -> Callable[[], None]:
    """The products of LoRA alone, and half of AdamW's work."""
    import torch

    size = case.size
    hidden, wide = size["hidden_size"], size["intermediate_size"]
    kv = hidden * size["num_key_value_heads"] // size["num_attention_heads"]
    shapes = [(hidden, hidden), (hidden, kv), (hidden, kv), (hidden, hidden), (hidden, wide), (hidden, wide),
              (wide, hidden)]  # fmt: skip
    tokens, dtype = batch[1].numel(), batch[0].dtype
    make = {"device": case.device, "dtype": dtype}
    tensors = {
        width: (torch.randn(tokens, width, **make), torch.randn(tokens, width, **make))
        for width in {hidden, kv, wide}
    }
    A = [torch.randn(RANK, in_, **make) for in_, _ in shapes]
    B = [torch.randn(out, RANK, **make) for _, out in shapes]
    trained = [
        torch.nn.Parameter(torch.zeros_like(each, dtype=torch.float32))
        for each in (A + B) * size["num_hidden_layers"]
    ][:: case.world]
    for each in trained:
        each.grad = torch.ones_like(each)
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0)

    @torch.no_grad()
    def step() -> None:
        for _ in range(size["num_hidden_layers"]):
            for (in_, out), a, b in zip(shapes, A, B, strict=True):
                x, y = tensors[in_][0], tensors[out][1]
                low = x.mm(a.T)
                y.addmm(low, b.T)  # forward: added to what the layer gives
                d_low = y.mm(b)
                y.T.mm(low)
                d_low.T.mm(x)
                tensors[in_][1].addmm(d_low, a)  # to the gradient of the layer's input
        optimizer.step()

    return step


PARTS = ("forward", "backward", "reduce", "step")


def parts(case: Case, rank: int) -> dict[str, list[float]]:
    """Seconds of each part of the base's step and of ours, by round."""
    batch = inputs(case, rank)
    base, model = sharded_base(case), our_model(case)
    optimizer = our_optimizer(case, model)
    taken: dict[str, list[float]] = {}
    for number in range(-2, case.rounds):
        for name, each in (("base", base), ("ours", model)):
            marks = [clock(case)]
            loss = loss_of(each, batch)
            marks.append(clock(case))
            loss.backward()
            marks.append(clock(case))
            if name == "ours":
                optimizer.reduce()
                marks.append(clock(case))
                optimizer.step()
                optimizer.zero_grad()
                marks.append(clock(case))
            for part, began, ended in zip(PARTS, marks, marks[1:], strict=False):
                if number >= 0:
                    taken.setdefault(f"{name} {part}", []).append(ended - began)
    return taken


def parts_text(case: Case, ranks: list[dict[str, list[float]]]) -> str:
    """The medians of the parts, in milliseconds."""
    found = [f"{name} {1000 * value:.1f}" for name, value in medians(case, ranks).items()]
    return f"{'':<20} of which, ms: " + ", ".join(found)


def medians(case: Case, ranks: list[dict[str, list[float]]]) -> dict[str, float]:
    """Over the rounds: the sum over ranks of CPU time, or the slowest rank's wall."""
    join = sum if case.device == "cpu" else max
    return {
        key: statistics.median(join(each) for each in zip(*(rank[key] for rank in ranks), strict=True))
        for key in ranks[0]
    }


def saving(case: Case, rank: int) -> dict[str, list[float]]:
    """Wall seconds of gathering and writing our adapter, and of gathering the whole model, in pairs."""
    import torch.distributed as dist

    batch = inputs(case, rank)
    ours, theirs = trained_models(case, batch)
    folder = Path(f"{tempfile.gettempdir()}/sharded-adapter-{os.getppid()}")
    taken: dict[str, list[float]] = {"adapter": [], "whole": []}
    for number in range(-1, case.rounds):
        for key, work in (
            ("adapter", lambda: ours.save_pretrained(str(folder))),
            ("whole", theirs._zero3_consolidated_16bit_state_dict),
        ):
            dist.barrier()
            began = time.perf_counter()
            work()
            dist.barrier()
            if number >= 0:
                taken[key].append(time.perf_counter() - began)
    if rank == 0:
        shutil.rmtree(folder)
    return taken


def trained_models(case: Case, batch: tuple[Any, Any]) -> tuple[Any, Any]:
    """Our model after a step, and HF PEFT's engine after one."""
    ours = our_model(case)
    loss_of(ours, batch).backward()
    engine = peft_model(case)
    engine.backward(loss_of(engine, batch))
    engine.step()
    return ours, engine


if __name__ == "__main__":
    main()
