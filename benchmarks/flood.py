"""What a flood of one adapter costs another: its waiting with and without the flood.

    python benchmarks/flood.py [--requests 300] [--at-once 200] [--prompt 32] [--layers 8] [--clock wall] [--write]

One engine on one core, a Llama with the layers of the base of benchmarks/serving.py, two LoRA adapters. One client asks
the calm adapter, one request after the other (32 tokens, answered by 16), in blocks: without a flood, and while
`--at-once` requests of the other adapter run or wait at any time, each with a prompt of `--prompt` tokens. The bound:
the calm one's 99th percentile is with the flood at most 1.5 times what it is without, of a whole answer and between
tokens. Its first token has no bound: it waits for the step that runs when it is asked for, and without the flood none
does. Time is the CPU time of the process, so that other work on the machine weighs little; `--clock wall` measures with
a clock. A line that misses its bound says so, and the command ends with 1. `--write` keeps the figures under
benchmarks/results.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import json
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

PROMPT, ANSWER, BLOCKS, MOST = 32, 16, 3, 1.5
KINDS = ("answer", "first token", "between tokens")
BOUND = ("answer", "between tokens")

Clock = Callable[[], float]
Times = dict[str, list[float]]


def base_of(layers: int) -> Any:
    """The base, the same at every call."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from benchmarks.serving import SHAPE

    torch.manual_seed(0)
    torch.set_num_threads(1)
    shape = {**SHAPE, "num_hidden_layers": layers}
    model = LlamaForCausalLM(LlamaConfig(**shape, eos_token_id=None, bos_token_id=None, pad_token_id=0))
    return model.to(torch.bfloat16).eval()


def write_adapters(folder: Path, layers: int) -> None:
    """Two adapters."""
    import torch

    import peft_dist
    from benchmarks.serving import LINEAR, RANK

    for number, name in enumerate(("calm", "flood")):
        config = peft_dist.LoraConfig(r=RANK, target_modules=LINEAR, task_type="CAUSAL_LM")
        model = peft_dist.get_peft_model(base_of(layers), config)
        torch.manual_seed(number)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if "lora_" in key:
                    parameter.copy_(torch.randn_like(parameter) * 0.02)
        model.save_pretrained(folder / name)


async def one(engine: Any, key: str, prompt: int, chance: random.Random, clock: Clock, times: Times) -> None:
    """One request; its times are added."""
    from orchestrator.serve.engines.engine import Generation

    tokens = tuple(chance.randrange(1, 40000) for _ in range(prompt))
    began = last = clock()
    async with aclosing(engine.generate(Generation(tokens, key, ANSWER))) as pieces:
        number = 0
        async for _ in pieces:
            now = clock()
            times[KINDS[1] if number == 0 else KINDS[2]].append(now - last)
            last, number = now, number + 1
    times[KINDS[0]].append(clock() - began)


async def compared(
    engine: Any, requests: int, at_once: int, prompt: int, clock: Clock
) -> tuple[Times, Times, int]:
    """(the calm one's times without the flood, with it, how many of the flood were answered)."""
    without: Times = {kind: [] for kind in KINDS}
    flooded: Times = {kind: [] for kind in KINDS}
    chance = random.Random(0)
    answered = 0

    async def floods() -> None:
        nonlocal answered
        while True:
            await one(engine, "flood", prompt, chance, clock, {kind: [] for kind in KINDS})
            answered += 1

    for _ in range(4):
        await one(engine, "calm", PROMPT, chance, clock, {kind: [] for kind in KINDS})
    for block in range(BLOCKS):
        num = requests * (block + 1) // BLOCKS - requests * block // BLOCKS
        for _ in range(num):
            await one(engine, "calm", PROMPT, chance, clock, without)
        flood = [asyncio.ensure_future(floods()) for _ in range(at_once)]
        # Not its first moment, in which the calm one has not been heard of.
        for _ in range(4):
            await one(engine, "calm", PROMPT, chance, clock, {kind: [] for kind in KINDS})
        for _ in range(num):
            await one(engine, "calm", PROMPT, chance, clock, flooded)
        for task in flood:
            task.cancel()
        for result in await asyncio.gather(*flood, return_exceptions=True):
            assert isinstance(result, asyncio.CancelledError), result
    return without, flooded, answered


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=300)
    parser.add_argument("--at-once", type=int, default=200)
    parser.add_argument(
        "--prompt", type=int, nargs="+", default=[32, 256], help="tokens of the flood's prompts"
    )
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--clock", default="cpu", choices=("cpu", "wall"))
    parser.add_argument("--write", action="store_true", help="keep the figures under benchmarks/results")
    said = parser.parse_args()
    from benchmarks.loads import on_one_core, quantile
    from orchestrator.serve.engines.batching import BatchingEngine

    on_one_core()
    clock = time.process_time if said.clock == "cpu" else time.perf_counter
    engine = BatchingEngine(base_of(said.layers), lambda ids: "", frozenset(), 1024, cache_bytes=2**28)
    figures: dict[str, Any] = {}
    met = True

    async def run(folder: Path) -> list[tuple[int, tuple[Times, Times, int]]]:
        for key in ("calm", "flood"):
            await engine.load(key, folder / key)
        return [
            (prompt, await compared(engine, said.requests, said.at_once, prompt, clock))
            for prompt in said.prompt
        ]

    with tempfile.TemporaryDirectory(prefix="raypeft-flood-") as folder:
        write_adapters(Path(folder), said.layers)
        found = asyncio.run(run(Path(folder)))
    engine.close()
    for prompt, (without, flooded, answered) in found:
        print(f"a flood of {said.at_once} at once with prompts of {prompt}: {answered} of it answered")
        for kind in KINDS:
            least, most = quantile(without[kind], 0.99), quantile(flooded[kind], 0.99)
            is_met = most <= MOST * least
            met &= is_met or kind not in BOUND
            verdict = "no bound" if kind not in BOUND else f"at most {MOST}: {'met' if is_met else 'MISSED'}"
            figures[f"{prompt}, {kind}"] = {
                "samples": len(flooded[kind]),
                "p50_ms": [round(1e3 * statistics.median(each[kind]), 2) for each in (without, flooded)],
                "p99_ms": [round(1e3 * each, 2) for each in (least, most)],
            }
            medians = figures[f"{prompt}, {kind}"]["p50_ms"]
            print(
                f"  {kind:15} {len(flooded[kind]):5d} samples: p50 {medians[0]:7.1f} -> {medians[1]:7.1f} ms, p99 "
                f"{1e3 * least:7.1f} -> {1e3 * most:7.1f} ms: x {most / least:.2f}, {verdict}"
            )
    if said.write:
        name = f"{datetime.date.today()}-{os.cpu_count()}cpu-{platform.machine()}-flood.json"
        document = {"clock": said.clock, "layers": said.layers, "at_once": said.at_once, "figures": figures}
        (ROOT / "benchmarks" / "results" / name).write_text(json.dumps(document, indent=2) + "\n")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
