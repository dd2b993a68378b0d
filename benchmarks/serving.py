"""What adapters cost a batch that serves many of them, beside HF PEFT and the bare base, in one run.

    python benchmarks/serving.py [--dtype float32 bfloat16] [--only exact resident] [--repeats 3] [--write]

A Llama of 135M parameters and random weights (30 layers of 576), 16 requests of 32 tokens that are answered by 32
each, over 8 LoRA adapters of rank 8 on all linear layers; one thread. What is counted are generated tokens per second
of the process's CPU time, prompts included, so that other work on the machine weighs little. Each way runs in a
process of its own, the ways take turns, and the median of the repeats stands.

    sequential   HF PEFT, one request at a time, `set_adapter` and `generate`
    mixed        HF PEFT, one batch with `adapter_names`
    base         this engine without adapters
    ours         this engine, 8 adapters in one batch

Then K = 1, 8, 64 and 512 resident adapters in bf16, the requests over 8 of them (over the one where K is 1), and over
16. Bounds are those of the project's issue; a line that misses one says so, and the command ends with 1. With
`--write` the figures are kept under benchmarks/results.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

REQUESTS, PROMPT, ANSWER, RANK, ADAPTERS = 16, 32, 32, 8, 8
RESIDENT = (1, 8, 64, 512)
SHAPE = {
    "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
    "num_key_value_heads": 3, "vocab_size": 49152, "max_position_embeddings": 2048, "tie_word_embeddings": True,
}  # fmt: skip
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# (what is divided, by what, the least ratio) for each dtype.
BOUNDS = {
    "float32": (("ours", "sequential", 4.5), ("ours", "mixed", 1.25), ("ours", "base", 0.88)),
    "bfloat16": (("ours", "sequential", 11.0), ("ours", "mixed", 2.7), ("ours", "base", 0.75)),
}
KEEPS = 0.9


def base_model(dtype: str) -> Any:
    """The base, the same at every call."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    torch.set_num_threads(1)
    config = LlamaConfig(**SHAPE, eos_token_id=None, bos_token_id=None, pad_token_id=0)
    model = LlamaForCausalLM(config).to(getattr(torch, dtype)).eval()
    model.generation_config.eos_token_id = None
    return model


def prompts(seed: int = 1) -> list[list[int]]:
    """The requests' tokens."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, SHAPE["vocab_size"], (REQUESTS, PROMPT), generator=generator).tolist()


def make_adapters(folder: Path, number: int) -> None:
    """Writes adapters with weights that are not zero, as HF PEFT does."""
    import peft
    import torch

    model = base_model("float32")
    config = peft.LoraConfig(r=RANK, lora_alpha=16, target_modules=LINEAR, task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, config)
    for which in range(number):
        torch.manual_seed(100 + which)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = torch.randn_like(parameter) * 0.02
        model.save_pretrained(folder / f"a{which}")


def run_sequential(dtype: str, folder: Path, _: int, __: int) -> float:
    """HF PEFT, one request at a time: tokens per CPU second."""
    model = _of_hf(dtype, folder)
    import torch

    def all_of_them() -> None:
        for number, prompt in enumerate(prompts()):
            model.set_adapter(f"a{number % ADAPTERS}")
            ids = torch.tensor([prompt])
            model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=ANSWER, do_sample=False
            )

    return _rate(all_of_them)


def run_mixed(dtype: str, folder: Path, _: int, __: int) -> float:
    """HF PEFT's own mixed batch: tokens per CPU second."""
    model = _of_hf(dtype, folder)
    import torch

    ids = torch.tensor(prompts())
    names = [f"a{number % ADAPTERS}" for number in range(REQUESTS)]

    def all_of_them() -> None:
        model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=ANSWER,
            do_sample=False,
            adapter_names=names,
        )

    return _rate(all_of_them)


def run_engine(dtype: str, folder: Path, resident: int, active: int) -> float:
    """This engine with so many adapters loaded, of which so many are asked for: tokens per CPU second."""
    from orchestrator.serve.engines.batching import BatchingEngine
    from orchestrator.serve.engines.engine import Generation

    engine = BatchingEngine(base_model(dtype), lambda ids: "", frozenset(), 2048, cache_bytes=2**28)

    async def load() -> None:
        for number in range(resident):
            await engine.load(f"k{number}", folder / f"a{number % 16}")

    async def one(number: int, prompt: Sequence[int]) -> None:
        key = f"k{number % active}" if active else None
        request = Generation(tuple(prompt), key, ANSWER)
        taken = sum([piece.num_tokens async for piece in engine.generate(request)])
        assert taken == ANSWER

    async def all_of_them(seed: int) -> None:
        await asyncio.gather(*(one(number, prompt) for number, prompt in enumerate(prompts(seed))))

    asyncio.run(load())
    try:
        asyncio.run(all_of_them(2))  # other prompts: nothing of them is in the prefix cache
        return _rate(lambda: asyncio.run(all_of_them(1)))
    finally:
        engine.close()


WAYS: dict[str, tuple[Callable[[str, Path, int, int], float], int, int]] = {
    "sequential": (run_sequential, 0, 0),
    "mixed": (run_mixed, 0, 0),
    "base": (run_engine, 0, 0),
    "ours": (run_engine, ADAPTERS, ADAPTERS),
    **{f"resident {k}": (run_engine, k, min(k, ADAPTERS)) for k in RESIDENT},
    **{f"resident {k}, 16 active": (run_engine, k, 16) for k in RESIDENT if k >= 16},
}


def _of_hf(dtype: str, folder: Path) -> Any:
    import peft

    model = peft.PeftModel.from_pretrained(base_model(dtype), folder / "a0", adapter_name="a0")
    for which in range(1, ADAPTERS):
        model.load_adapter(folder / f"a{which}", adapter_name=f"a{which}")
    return model.eval()


def _rate(run: Callable[[], None]) -> float:
    import torch

    torch.set_num_threads(1)
    with torch.inference_mode():
        began = time.process_time()
        run()
        return REQUESTS * ANSWER / (time.process_time() - began)


def measured(way: str, dtype: str, folder: Path) -> float:
    """One run of a way in a process of its own."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, __file__, "--run", way, "--dtype", dtype, "--folder", str(folder)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{way} ({dtype}) failed:\n{done.stderr[-2000:]}")
    return float(done.stdout.split()[-1])


def compared(ways: Sequence[str], dtype: str, folder: Path, repeats: int) -> dict[str, float]:
    """The median of each way's runs, which take turns."""
    found: dict[str, list[float]] = {way: [] for way in ways}
    for turn in range(repeats):
        for way in ways:
            found[way].append(measured(way, dtype, folder))
            print(f"  {dtype} {way} {turn + 1}/{repeats}: {found[way][-1]:.1f}", file=sys.stderr, flush=True)
    return {way: round(statistics.median(rates), 2) for way, rates in found.items()}


def verdicts(dtype: str, rates: dict[str, float]) -> list[tuple[str, float, float]]:
    """(what, the ratio, the least it may be) of all that has a bound."""
    made = [
        (f"{dtype}: {over} / {under}", rates[over] / rates[under], least)
        for over, under, least in BOUNDS[dtype]
        if over in rates and under in rates
    ]
    if "resident 512" in rates:
        made.append((f"{dtype}: 512 resident / 8", rates["resident 512"] / rates["resident 8"], KEEPS))
    return made


def main() -> int:
    """Measures, prints, and says whether every bound is met."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--dtype", nargs="+", choices=tuple(BOUNDS), default=list(BOUNDS))
    parser.add_argument("--only", nargs="+", choices=("exact", "resident"), default=["exact", "resident"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--run", choices=tuple(WAYS), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.run:
        run, resident, active = WAYS[given.run]
        print(run(given.dtype[0], given.folder, resident, active))
        return 0
    figures: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory(prefix="raypeft-serving-") as folder:
        make_adapters(Path(folder), 16)
        for dtype in given.dtype:
            ways = ["sequential", "mixed", "base", "ours"] if "exact" in given.only else []
            if "resident" in given.only and dtype == "bfloat16":
                ways += [way for way in WAYS if way.startswith("resident")]
            figures[dtype] = compared(ways, dtype, Path(folder), given.repeats)
    met = True
    for dtype, rates in figures.items():
        for way, rate in rates.items():
            print(f"{dtype:9} {way:24} {rate:8.1f} tokens per CPU second")
        for what, ratio, least in verdicts(dtype, rates):
            met &= ratio >= least
            print(f"{what:36} {ratio:6.2f}  at least {least:.2f}  {'met' if ratio >= least else 'MISSED'}")
    if given.write:
        day = datetime.date.today().isoformat()
        path = (
            ROOT / "benchmarks" / "results" / f"{day}-{os.cpu_count()}cpu-{platform.machine()}-serving.json"
        )
        path.write_text(json.dumps({"tokens_per_cpu_second": figures}, indent=1) + "\n")
        print(f"written to {path.relative_to(ROOT)}")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
