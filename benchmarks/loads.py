"""What running answers notice of adapters that come and go, and what is left of those in memory.

    python benchmarks/loads.py [--dtype bfloat16] [--rounds 2] [--clock wall] [--only swaps] [--swaps 3600] [--write]

`loads`: eight streams over four LoRA adapters of rank 8 run on the base of benchmarks/serving.py, one engine on one
core. What is measured is the time between two tokens of a stream: first without loads, then while fifty adapters are
loaded (and once more without, and with all fifty unloaded), a few hundred steps each. The bound: the 99th percentile
while they load is at most the one without them and one median step. Time is the CPU time of the process, all its
threads together, so that other work on the machine weighs little; `--clock wall` measures with a clock.

`swaps`: one name whose version changes again and again under traffic, through the cold tier of a replica, as fast as
it goes; each version has a key of its own, as its content hash is. An hour of one swap a second is 3600. The bound: at
the end the process holds at most 5 % more than after the first tenth.

A line that misses its bound says so, and the command ends with 1. `--write` keeps the figures under benchmarks/results.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import gc
import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

STREAMS, ADAPTERS, LOADS, PROMPT = 8, 4, 50, 32
STEPS_WITHOUT = 150
"""Steps without loads, before the loads and after them."""
GROWS = 0.05
SMALL = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 8, "num_attention_heads": 4,
         "num_key_value_heads": 4, "vocab_size": 4096, "max_position_embeddings": 2048}  # fmt: skip
"""The base of the swaps: 56 layers with adapters."""

Clock = Callable[[], float]


def on_one_core() -> None:
    """Pins this process to one of the cores that it may use."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})


def quantile(values: list[float], share: float) -> float:
    """The value that `share` of them do not exceed."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


class Streams:
    """Answers that run without end; the seconds between their tokens go to `gaps` while that is a list."""

    def __init__(self, engine: Any, keys: list[str], clock: Clock) -> None:
        self.gaps: list[float] | None = None
        self.steps = 0
        self._engine, self._keys, self._clock = engine, keys, clock
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self, num: int) -> None:
        """Lets so many answers run, over the keys in turn."""
        self._tasks = [asyncio.ensure_future(self._one(number)) for number in range(num)]
        await self.after(num)

    async def after(self, steps: int) -> None:
        """Waits for so many more tokens of the first answer."""
        until = self.steps + steps
        while self.steps < until:
            failed = next((task for task in self._tasks if task.done()), None)
            if failed is not None:
                failed.result()
                raise AssertionError("an answer ended")
            await asyncio.sleep(0.02)

    async def measured(self, until: Any) -> list[float]:
        """The gaps while `until` runs."""
        self.gaps = gaps = []
        await until
        self.gaps = None
        return gaps

    async def stop(self) -> None:
        """Ends them."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _one(self, number: int) -> None:
        from orchestrator.serve.engines.engine import Generation

        prompt = tuple(range(1 + 50 * number, 1 + 50 * number + PROMPT))
        request = Generation(prompt, self._keys[number % len(self._keys)], 2048 - PROMPT)
        last = None
        async for _ in self._engine.generate(request):
            now = self._clock()
            if self.gaps is not None and last is not None:
                self.gaps.append(now - last)
            last = now
            self.steps += number == 0


async def one_round(engine: Any, folder: Path, clock: Clock) -> tuple[list[float], list[float], list[float]]:
    """(the gaps without loads, while fifty adapters load, while they are unloaded)."""
    streams = Streams(engine, [f"k{number}" for number in range(ADAPTERS)], clock)
    await streams.start(STREAMS)

    async def load() -> None:
        await asyncio.gather(*(engine.load(f"new{n}", folder / f"a{n % 16}") for n in range(LOADS)))

    async def unload() -> None:
        await asyncio.gather(*(engine.unload(f"new{n}") for n in range(LOADS)))

    without = await streams.measured(streams.after(STEPS_WITHOUT))
    loading = await streams.measured(load())
    without += await streams.measured(streams.after(STEPS_WITHOUT))
    leaving = await streams.measured(unload())
    await streams.stop()
    return without, loading, leaving


def measure_loads(dtype: str, rounds: int, clock: Clock) -> dict[str, Any]:
    """The figures of `loads`."""
    from benchmarks.serving import base_model, make_adapters
    from orchestrator.serve.engines.batching import BatchingEngine
    from orchestrator.serve.engines.garbage import collect_rarely

    engine = BatchingEngine(base_model(dtype), lambda ids: "", frozenset(), 2048, cache_bytes=2**28)
    collect_rarely()  # as a replica does
    gaps: tuple[list[float], list[float], list[float]] = [], [], []
    with tempfile.TemporaryDirectory(prefix="raypeft-loads-") as folder:
        make_adapters(Path(folder), 16)

        async def run() -> None:
            for number in range(ADAPTERS):
                await engine.load(f"k{number}", Path(folder) / f"a{number}")
            for _ in range(rounds):
                for every, each in zip(gaps, await one_round(engine, Path(folder), clock), strict=True):
                    every += each

        asyncio.run(run())
    engine.close()
    without, loading, leaving = gaps
    step = statistics.median(without)
    figures = {"median": round(1e3 * step, 2), "most": round(1e3 * (quantile(without, 0.99) + step), 2)}
    for name, each in (("without", without), ("loading", loading), ("leaving", leaving)):
        figures[name] = {
            "samples": len(each),
            "p50": round(1e3 * statistics.median(each), 2),
            "p99": round(1e3 * quantile(each, 0.99), 2),
            "worst": round(1e3 * max(each), 2),
        }
    return figures


def say_loads(figures: dict[str, Any]) -> bool:
    """Prints the figures of `loads`; whether their bound is met."""
    for name, what in (
        ("without", "no adapter loads"),
        ("loading", f"{LOADS} adapters load"),
        ("leaving", f"{LOADS} leave"),
    ):
        each = figures[name]
        print(
            f"{what:18} {each['samples']:6d} gaps between tokens: median {each['p50']:7.1f} ms, p99 {each['p99']:7.1f} "
            f"ms, worst {each['worst']:7.1f} ms"
        )
    is_met = figures["loading"]["p99"] <= figures["most"]
    print(
        f"p99 while they load {figures['loading']['p99']:.1f} ms, at most {figures['most']:.1f} ms (p99 without + one "
        f"median step): {'met' if is_met else 'MISSED'}"
    )
    return is_met


class _Copies:
    """A storage whose every version is a copy of one of a few adapters."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def pull(self, ref: str, directory: Path) -> None:
        """Copies a version's files."""
        aside = directory.parent / f".{directory.name}"
        shutil.copytree(self._folder / f"a{int(ref.split('@')[1]) % 4}", aside)
        aside.rename(directory)


def small_base() -> Any:
    """The base of the swaps."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    torch.set_num_threads(1)
    return LlamaForCausalLM(LlamaConfig(**SMALL, eos_token_id=None, bos_token_id=None, pad_token_id=0)).eval()


def write_small(folder: Path) -> None:
    """Four adapters of the base of the swaps, of ranks 8 and 16."""
    import torch

    import peft_dist
    from benchmarks.serving import LINEAR

    for number in range(4):
        config = peft_dist.LoraConfig(r=8 * (1 + number % 2), target_modules=LINEAR, task_type="CAUSAL_LM")
        model = peft_dist.get_peft_model(small_base(), config)
        torch.manual_seed(number)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.copy_(torch.randn_like(parameter) * 0.02)
        model.save_pretrained(folder / f"a{number}")


def measure_swaps(swaps: int) -> dict[str, Any]:
    """The figures of `swaps`."""
    from orchestrator.serve.engines.batching import BatchingEngine
    from orchestrator.serve.engines.engine import Generation
    from orchestrator.serve.engines.garbage import collect_rarely
    from orchestrator.serve.engines.residency import Residency

    engine = BatchingEngine(small_base(), lambda ids: "", frozenset(), 512, cache_bytes=2**25)
    collect_rarely()
    held: list[tuple[int, float]] = []
    answers = 0

    async def run(folder: Path) -> None:
        residency = Residency(engine, _Copies(folder / "storage"), folder / "cold")
        (folder / "cold").mkdir()
        version: Any = None

        def of(number: int) -> Any:
            return SimpleNamespace(content_hash=f"{number:064x}", ref=f"one@{number}")

        async def ask(number: int) -> None:
            nonlocal answers
            while True:
                async with residency.held(version) as key:
                    request = Generation(tuple(range(1 + number, 20 + number)), key, 8)
                    taken = sum([piece.num_tokens async for piece in engine.generate(request)])
                assert taken == 8
                answers += 1

        version = of(0)
        asking = [asyncio.ensure_future(ask(number)) for number in range(4)]
        for number in range(1, swaps + 1):
            after = of(number)
            await residency.bring(after)
            version = after
            await residency.keep_only([after.content_hash])
            if number % max(1, swaps // 20) == 0:
                gc.collect()
                held.append((number, memory()))
                print(
                    f"  {number} swaps, {answers} answers: {held[-1][1]:.1f} MB", file=sys.stderr, flush=True
                )
            if any(task.done() for task in asking):
                break
        for task in asking:
            if task.done():
                task.result()
            task.cancel()
        await asyncio.gather(*asking, return_exceptions=True)

    with tempfile.TemporaryDirectory(prefix="raypeft-swaps-") as folder:
        (Path(folder) / "storage").mkdir()
        write_small(Path(folder) / "storage")
        asyncio.run(run(Path(folder)))
    engine.close()
    first, last = held[1][1], held[-1][1]
    return {
        "swaps": swaps,
        "answers": answers,
        "mb_after_a_tenth": round(first, 1),
        "mb_at_the_end": round(last, 1),
        "grows": round(last / first - 1, 4),
    }


def memory() -> float:
    """MB that this process holds."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def say_swaps(figures: dict[str, Any]) -> bool:
    """Prints the figures of `swaps`; whether their bound is met."""
    is_met = figures["grows"] <= GROWS
    print(
        f"{figures['swaps']} swaps under one name, {figures['answers']} answers: {figures['mb_after_a_tenth']} MB "
        f"after a tenth, {figures['mb_at_the_end']} MB at the end: {figures['grows']:+.1%}, at most {GROWS:.0%}: "
        f"{'met' if is_met else 'MISSED'}"
    )
    return is_met


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--clock", default="cpu", choices=("cpu", "wall"))
    parser.add_argument("--only", nargs="+", default=["loads", "swaps"], choices=("loads", "swaps"))
    parser.add_argument("--swaps", type=int, default=3600)
    parser.add_argument("--write", action="store_true", help="keep the figures under benchmarks/results")
    said = parser.parse_args()
    on_one_core()
    figures: dict[str, Any] = {}
    met = True
    if "loads" in said.only:
        clock = time.process_time if said.clock == "cpu" else time.perf_counter
        figures["loads"] = {
            "dtype": said.dtype,
            "clock": said.clock,
            **measure_loads(said.dtype, said.rounds, clock),
        }
        met &= say_loads(figures["loads"])
    if "swaps" in said.only:
        figures["swaps"] = measure_swaps(said.swaps)
        met &= say_swaps(figures["swaps"])
    if said.write:
        name = f"{datetime.date.today()}-{os.cpu_count()}cpu-{platform.machine()}-loads.json"
        (ROOT / "benchmarks" / "results" / name).write_text(json.dumps(figures, indent=2) + "\n")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
