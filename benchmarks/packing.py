"""What runs on one base gain by stepping together, beside the same runs alone on warm workers.

    python benchmarks/packing.py [--shape 14M] [--adapters 8] [--rounds 12] [--device cuda] [--bits 4] [--write]

A base of random weights, LoRA r 16 on all seven linears, AdamW, one worker. In each round every side takes one step of
each run; the table has the medians of a round, in milliseconds.

    alone       a run that has the base for itself, on a warm worker: a step of `loop.Training`, times the runs
    turns       a pack whose runs step one after the other
    together    a pack whose runs share one forward and backward
    auto        a pack that measures both and keeps to the faster, once it has

To reach: auto at most 1.05 x the faster of turns and together, for small and large micro-batches; on a GPU, with 16
adapters at micro-batch 1, at least four times the throughput of the runs alone.

Memory: the peak of a process that trains a pack of K by turns, less that of a pack of one and K - 1 adapters with their
AdamW states, as a share of one base and K adapters with their states. To reach: at most 10 %.

On a CPU one thread works and CPU time is counted, so a busy machine changes little; on a GPU it is the wall clock of
synchronised rounds.
"""

from __future__ import annotations

import argparse
import datetime
import json
import multiprocessing
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from heap import keep_heap
from memory_of import Sampler
from shapes import SHAPES

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

RANK, AUTO, GPU_GAIN, MEMORY = 16, 1.05, 4.0, 0.1
SIZES = {"small": (1, 32), "large": (8, 128)}
"""Rows of a micro-batch, tokens of a row."""


class Silent:
    """Hears nothing, and never asks a run to leave."""

    stop_requested, saves = False, True

    def emit(self, kind: str, /, **fields: Any) -> None:
        """Nothing."""


def main() -> None:
    """Runs every case in a process of its own and prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", default=None, choices=list(SHAPES))
    parser.add_argument("--adapters", type=int, default=None)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--bits", type=int, default=None, choices=[4, 16, 32])
    parser.add_argument("--no-memory", action="store_true", help="the steps alone")
    parser.add_argument("--write", action="store_true", help="keep the result in benchmarks/results")
    chosen = parser.parse_args()
    on_gpu = chosen.device == "cuda"
    case = {
        "shape": chosen.shape or ("1B" if on_gpu else "14M"),
        "adapters": chosen.adapters or (16 if on_gpu else 8),
        "bits": chosen.bits or (16 if on_gpu else 32),
        "device": chosen.device,
        "rounds": chosen.rounds,
    }
    found = []
    print(f"{'micro-batch':<20} {'alone':>9} {'turns':>9} {'together':>9} {'auto':>9}   gain  auto/best")
    for size in SIZES:
        line = _line(size, _in_process(steps, {**case, "size": size}), case)
        print(line["text"], flush=True)
        found.append(line)
    if not chosen.no_memory and not on_gpu:
        line = _memory_line(
            _in_process(memory, {**case, "count": 1}),
            _in_process(memory, {**case, "count": case["adapters"]}),
        )
        print(line["text"], flush=True)
        found.append(line)
    if chosen.write:
        _write(case, found)
    raise SystemExit(0 if all(line["is_met"] for line in found) else 1)


def _in_process(work: Callable[[dict[str, Any]], Any], case: dict[str, Any]) -> Any:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(work, (case,))


def steps(case: dict[str, Any]) -> dict[str, list[float]]:
    """Seconds of each round, by side."""
    import torch

    torch.set_num_threads(1)
    if case["device"] == "cpu":
        keep_heap()
    clock = time.process_time if case["device"] == "cpu" else _synchronised
    rows, length = SIZES[case["size"]]
    with tempfile.TemporaryDirectory(prefix="packing-") as folder:
        made = Maker(Path(folder), case, rows, length)
        sides: dict[str, Callable[[], None]] = {"alone": made.alone()}
        for way in ("turns", "together", "auto"):
            pack = made.pack(way, case["adapters"])
            sides[way] = pack.round
        for _ in range(7):  # auto has measured and chosen by then
            sides["auto"]()
        for side in ("alone", "turns", "together"):
            sides[side]()
        took: dict[str, list[float]] = {side: [] for side in sides}
        order = list(sides)
        for _ in range(case["rounds"]):
            for side in order:
                began = clock()
                sides[side]()
                took[side].append(clock() - began)
            order = order[1:] + order[:1]
    took["alone"] = [seconds * case["adapters"] for seconds in took["alone"]]
    return took


def memory(case: dict[str, Any]) -> dict[str, int]:
    """Peak bytes of this process while a pack takes three rounds by turns, less those before; and what is trained."""
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="packing-") as folder:
        made = Maker(Path(folder), case, *SIZES["small"])
        with Sampler(lambda: [os.getpid()]) as sampler:
            pack = made.pack("turns", case["count"])
            for _ in range(3):
                pack.round()
        model: Any = pack.ground.model
        adapter = sum(p.nbytes for p in next(iter(pack.trials.values())).run.seat.trained().values())
        base = sum(p.nbytes for p in model.get_base_model().parameters()) - adapter * case["count"]
    return {"peak": sampler.peaks[os.getpid()], "adapter": adapter, "base": base, "count": case["count"]}


class Maker:
    """A base, rows of one length and runs over them, in a folder."""

    def __init__(self, folder: Path, case: dict[str, Any], rows: int, length: int) -> None:
        import torch
        from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

        self.folder, self.case, self.rows, self.length = folder, case, rows, length
        tokenizer = AutoTokenizer.from_pretrained(ROOT / "jobs" / "assets" / "tiny-llama")
        torch.manual_seed(0)
        config = LlamaConfig(**{**SHAPES[case["shape"]], "max_position_embeddings": max(256, length)})
        config.vocab_size = max(config.vocab_size, len(tokenizer))
        dtype = torch.float32 if case["device"] == "cpu" else torch.bfloat16
        with torch.device(case["device"]):
            LlamaForCausalLM(config).to(dtype).save_pretrained(folder / "base")
        tokenizer.save_pretrained(folder / "base")
        words = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
        text = [" ".join(words[(i * j) % 10] for j in range(1, 2 * length)) for i in range(400)]
        (folder / "rows.jsonl").write_text("".join(json.dumps({"text": each}) + "\n" for each in text))

    def request(self, name: str, seed: int) -> Any:
        """A run of more steps than any round takes."""
        from orchestrator.plan import make_plan
        from orchestrator.runner import TrainRequest
        from orchestrator.spec.job import JobSpec

        quantised = {"load_in_4bit": True} if self.case["bits"] == 4 else {}
        spec = JobSpec.model_validate({
            "name": name,
            "model": {"base_model": str(self.folder / "base"), **quantised},
            "data": {
                "datasets": [{"path": str(self.folder / "rows.jsonl"), "type": "text"}],
                "val_set_size": 0,
                "sequence_len": self.length,
            },
            "adapter": {"type": "lora", "r": RANK, "target_modules": "all-linear"},
            "training": {
                "micro_batch_size": self.rows, "seed": seed, "num_epochs": 50, "save_steps": 10**6,
                "precision": "fp32" if self.case["device"] == "cpu" else "bf16",
                "gradient_checkpointing": False,
            },
            "resources": {"num_workers": 1},
        })  # fmt: skip
        return TrainRequest(spec, make_plan(spec, None, None), str(self.folder / name), name, "0" * 8)

    def ground(self) -> Any:
        """A base of its own, loaded."""
        from orchestrator.train.group import Group
        from orchestrator.train.worker.ground import Ground

        precision = "fp32" if self.case["device"] == "cpu" else "bf16"
        return Ground(
            self.request("base", 0), Group(self.case["device"]), precision, lambda kind, **fields: None
        )

    def alone(self) -> Callable[[], None]:
        """A step of a run that has a base for itself."""
        from orchestrator.train.worker.run import Run

        run = Run(self.request("alone", 1), self.ground(), Silent(), self.folder / "scratch")
        run.training.rehearse()
        batches = run.training.batches()
        return lambda: run.training.took(batch := next(batches), run.training.take_step(batch))

    def pack(self, way: Any, count: int) -> Any:
        """A pack of so many runs."""
        from orchestrator.train.packing import Packing
        from orchestrator.train.worker.pack import Pack

        clock = time.process_time if self.case["device"] == "cpu" else time.perf_counter
        pack = Pack(self.ground(), Packing(way), clock=clock)
        for number in range(count):
            pack.enter(f"run{number}", self.request(f"{way}{number}", number), Silent())
        assert len(pack.trials) == count
        return pack


def _synchronised() -> float:
    import torch

    torch.cuda.synchronize()
    return time.perf_counter()


def _line(size: str, took: dict[str, list[float]], case: dict[str, Any]) -> dict[str, Any]:
    sides = {side: 1000 * statistics.median(seconds) for side, seconds in took.items()}
    best = min(sides["turns"], sides["together"])
    # of pairs taken side by side, so that what the machine does meanwhile touches both
    faster = "turns" if sides["turns"] == best else "together"
    ratio = statistics.median(a / b for a, b in zip(took["auto"], took[faster], strict=True))
    gain = sides["alone"] / sides["auto"]
    rows, length = SIZES[size]
    text = f"{size + f' ({rows} x {length})':<20} " + " ".join(f"{sides[side]:9.1f}" for side in sides)
    text += f"   {gain:4.2f}  {ratio:9.3f}"
    is_met = ratio <= AUTO and (case["device"] == "cpu" or size != "small" or gain >= GPU_GAIN)
    return {"size": size, **sides, "gain": gain, "auto_over_best": ratio, "is_met": is_met, "text": text}


def _memory_line(one: dict[str, int], many: dict[str, int]) -> dict[str, Any]:
    whole = many["base"] + 3 * many["adapter"] * many["count"]
    more = many["peak"] - one["peak"] - 3 * many["adapter"] * (many["count"] - one["count"])
    ratio = 1 + more / whole
    text = (
        f"memory of {many['count']} over that of one: {(many['peak'] - one['peak']) / 2**20:.1f} MiB; a base, so many "
        f"adapters and their states are {whole / 2**20:.1f} MiB, and what is more than that is x {ratio:.3f}"
    )
    return {"one": one, "many": many, "ratio": ratio, "is_met": ratio <= 1 + MEMORY, "text": text}


def _write(case: dict[str, Any], found: list[dict[str, Any]]) -> None:
    import torch

    machine = (
        torch.cuda.get_device_name().replace(" ", "-")
        if case["device"] == "cuda"
        else f"{os.cpu_count()}cpu-{platform.machine()}"
    )
    path = ROOT / "benchmarks" / "results" / f"{datetime.date.today()}-{machine}-packing.json"
    path.write_text(json.dumps({"case": case, "torch": torch.__version__, "found": found}, indent=1) + "\n")
    print(f"written to {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
