"""What the HTTP service costs over its engine: generated tokens per second of CPU time, with and without it.

    python benchmarks/service.py [--dtype bfloat16] [--at-once 1 8 32] [--repeats 3] [--write]

The base of benchmarks/serving.py, prompts of 32 tokens and answers of 32, so many at once; one thread. `engine` asks
the engine itself. `whole` and `stream` ask over HTTP, on loopback, from another process, whose time does not count:
what does is the CPU time of the process that serves, engine included. The three take turns, and the median of the
repeats stands. At 8 and 32 at once the service may cost 15 %; a line that misses that says so, and the command ends
with 1. With `--write` the figures are kept under benchmarks/results.
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
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from http.client import HTTPConnection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

PROMPT, ANSWER = 32, 32
MOST = 0.15
BOUND = (8, 32)
WAYS = ("engine", "whole", "stream")


def ask(port: int, prompts: Sequence[Sequence[int]], stream: bool) -> None:
    """The client's process: each prompt on a connection of its own, all at once."""

    def one(prompt: Sequence[int]) -> None:
        body = {
            "model": "base",
            "prompt": list(prompt),
            "max_tokens": ANSWER,
            "temperature": 0,
            "stream": stream,
        }
        connection = HTTPConnection("127.0.0.1", port, timeout=600)
        connection.request("POST", "/v1/completions", json.dumps(body))
        answer = connection.getresponse()
        text = answer.read().decode()
        assert answer.status == 200 and '"finish_reason":"length"' in text.replace(" ", ""), text[-500:]
        connection.close()

    with ThreadPoolExecutor(len(prompts)) as pool:
        list(pool.map(one, prompts))


class Service:
    """The engine, and the application over it on a port."""

    def __init__(self, dtype: str) -> None:
        import torch
        import uvicorn
        from transformers import AutoTokenizer

        from benchmarks.serving import base_model
        from orchestrator.serve.engines.batching import BatchingEngine
        from orchestrator.serve.engines.prompts import Prompts
        from orchestrator.serve.routes.app import build_app
        from orchestrator.serve.routes.catalogue import Target

        tokenizer = AutoTokenizer.from_pretrained(ROOT / "jobs" / "assets" / "tiny-llama")
        size = len(tokenizer)
        prompts = Prompts(tokenizer)
        torch.set_num_threads(1)
        self.engine = BatchingEngine(
            base_model(dtype),
            lambda ids: prompts.decode([token % size for token in ids]),
            frozenset(),
            2048,
            cache_bytes=2**28,
        )

        class Catalogue:
            base_name = "base"
            base = SimpleNamespace(content_hash="0" * 64, name="base")

            async def start(self) -> None: ...
            async def stop(self) -> None: ...
            @asynccontextmanager
            async def acquire(self, model: str, sticky: Any, may_know: Any) -> Any:
                yield Target("base", None)

        catalogue: Any = Catalogue()
        app = build_app("base", self.engine, prompts, catalogue)
        self._server = uvicorn.Server(
            uvicorn.Config(app, port=0, log_level="warning", timeout_graceful_shutdown=5)
        )
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        while not self._server.started:
            time.sleep(0.05)
        self.port = self._server.servers[0].sockets[0].getsockname()[1]
        self._seed = 0

    def rate(self, way: str, at_once: int) -> float:
        """Tokens per CPU second."""
        import torch

        self._seed += 1  # prompts that no cache has seen
        generator = torch.Generator().manual_seed(self._seed)
        prompts = torch.randint(1, 4000, (at_once, PROMPT), generator=generator).tolist()
        began = time.process_time()
        if way == "engine":
            asyncio.run(self._directly(prompts))
        else:
            command = [
                sys.executable,
                __file__,
                "--ask",
                str(self.port),
                *(["--stream"] if way == "stream" else []),
            ]
            subprocess.run(command, input=json.dumps(prompts), text=True, check=True)
        return at_once * ANSWER / (time.process_time() - began)

    async def _directly(self, prompts: Sequence[Sequence[int]]) -> None:
        from orchestrator.serve.engines.engine import Generation

        async def one(prompt: Sequence[int]) -> None:
            taken = [
                piece.num_tokens
                async for piece in self.engine.generate(Generation(tuple(prompt), None, ANSWER))
            ]
            assert sum(taken) == ANSWER

        await asyncio.gather(*map(one, prompts))

    def close(self) -> None:
        """Ends the server and the engine."""
        self._server.should_exit = True
        self._thread.join(30)


def main() -> int:
    """The command."""
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--dtype", default="bfloat16")
    options.add_argument("--at-once", type=int, nargs="*", default=[1, 8, 32])
    options.add_argument("--repeats", type=int, default=3)
    options.add_argument("--write", action="store_true", help="keep the figures under benchmarks/results")
    options.add_argument("--ask", type=int, help=argparse.SUPPRESS)
    options.add_argument("--stream", action="store_true", help=argparse.SUPPRESS)
    said = options.parse_args()
    if said.ask:
        ask(said.ask, json.load(sys.stdin), said.stream)
        return 0
    service = Service(said.dtype)
    for way in WAYS:
        service.rate(way, 2)
    figures: dict[str, dict[str, float]] = {}
    missed = False
    for at_once in said.at_once:
        rates: dict[str, list[float]] = {way: [] for way in WAYS}
        for _ in range(said.repeats):
            for way in WAYS:
                rates[way].append(service.rate(way, at_once))
        medians = {way: statistics.median(each) for way, each in rates.items()}
        figures[str(at_once)] = {way: round(rate, 2) for way, rate in medians.items()}
        for way in WAYS[1:]:
            cost = 1 - medians[way] / medians["engine"]
            is_bound = at_once in BOUND
            is_over = is_bound and cost > MOST
            missed = missed or is_over
            verdict = (
                f"MISSED, at most {MOST:.0%}"
                if is_over
                else f"at most {MOST:.0%}"
                if is_bound
                else "no bound"
            )
            print(
                f"{at_once:3d} at once, {way:6s}: {medians[way]:6.1f} tokens/CPU s, the engine alone "
                f"{medians['engine']:6.1f}: costs {cost:+.1%} ({verdict})",
                flush=True,
            )
    service.close()
    if said.write:
        name = f"{datetime.date.today()}-{os.cpu_count()}cpu-{platform.machine()}-service.json"
        document = {"dtype": said.dtype, "repeats": said.repeats, "tokens_per_cpu_second": figures}
        (ROOT / "benchmarks" / "results" / name).write_text(json.dumps(document, indent=2) + "\n")
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
