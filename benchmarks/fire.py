"""An endpoint under fire: every kind of client at once while everything under it changes; what they got, what leaked.

    python benchmarks/fire.py [--rounds 6] [--seed 0] [--swaps 360] [--clients 8] [--write]

Two replicas on a Ray of this machine, with more adapters (LoRA, IA3, prompt tuning) than each may hold. Clients over
raw HTTP and the `openai` client, streaming and not, ask without a pause. In each round, in an order that the seed
draws: a version takes over under one name, and the one before goes; the alias goes back and forth; an adapter comes and
goes; a replica is killed by SIGKILL, and another one a little later; in every other round code is rolled meanwhile.
Each answer is held beside what transformers and HF PEFT answer alone: by the right version, of one version, whole. Only
what was under way on a killed replica may end otherwise: with a 503 with Retry-After, or an event in its stream, in
OpenAI's form; calls of the `openai` client that do not stream succeed by its own tries.

Then, with nothing killed, so many swaps as an hour has at one in ten seconds: the memory of the replicas (what is not
of files) after the last is compared with what it was after a tenth of them, and may be 5 % more.

Exits with 1 where anything was not as it shall be. With --write the figures are kept under benchmarks/results.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])

import ray  # noqa: E402
from ray import serve  # noqa: E402

from orchestrator import local_ray  # noqa: E402
from orchestrator.serve import serve_cluster  # noqa: E402
from tests.orchestrator.serve.fire import Answer, judge  # noqa: E402
from tests.orchestrator.serve.fire_site import STAYING, FireSite  # noqa: E402
from tests.orchestrator.serve.test_endpoints import replica_pids, wait_for  # noqa: E402

GROWTH = 0.05
BEGAN = time.monotonic()


def say(text: str) -> None:
    """A line, with the seconds since the start."""
    print(f"{time.monotonic() - BEGAN:7.1f} {text}", flush=True)


def fire(site: FireSite, rounds: int, seed: int, num_clients: int) -> list[Answer]:
    """All rounds, under one load; returns every answer."""
    draw = random.Random(seed)
    with site.under_load(num_clients) as load:
        wait_for(lambda: len(load.answers) > 40)
        for number in range(rounds):
            rolls = number % 2 == 1
            say(f"round {number + 1} of {rounds}{', with other code' if rolls else ''}")
            old = site.roll() if rolls else []
            kill = partial(site.kill, old)
            acts: list[Callable[[], Any]] = [site.swap, site.swap, site.swap_back, kill, kill]
            draw.shuffle(acts)
            came = draw.randrange(len(acts))
            for at, act in enumerate(acts):
                if at == came:
                    site.come()
                act()
                time.sleep(draw.uniform(0, 2))
            site.go()
            site.wait_until_whole(old)
            say(f"{len(load.answers)} answers, {sum(not each.is_whole for each in load.answers)} broken off")
    return load.answers


def told(site: FireSite, answers: list[Answer]) -> dict[str, Any]:
    """What the load saw."""
    broken = [each for each in answers if not each.is_whole]
    waits = sorted(each.ended - each.sent for each in answers if each.is_whole)
    return {
        "answers": len(answers),
        "by_way": dict(Counter(each.asked.way for each in answers)),
        "versions_that_answered": len({each.adapter for each in answers if each.is_whole}),
        "aliases_moved": sum(map(len, site.timeline.moves.values())) - len(STAYING),
        "adapters_taken_away": sum("gone" in what for _, what in site.timeline.done),
        "codes_rolled": sum("code" in what for _, what in site.timeline.done),
        "replicas_killed": len(site.timeline.kills),
        "broken_off_with_a_killed_replica": dict(
            Counter(f"{each.asked.way} {each.status}" for each in broken)
        ),
        "median_s": round(statistics.median(waits), 3),
        "longest_s": round(waits[-1], 3),
        "wrong": judge(answers, site.references, site.timeline),
    }


def memory_of(pids: list[int]) -> list[float]:
    """MiB of each process that are not of files."""
    found = []
    for pid in pids:
        lines = dict(line.split(":") for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        found.append(sum(int(lines[name].split()[0]) for name in ("RssAnon", "RssShmem")) / 1024)
    return found


def leak(site: FireSite, swaps: int, num_clients: int) -> dict[str, Any]:
    """So many swaps under load; what the replicas' memory was after a tenth of them and after each further tenth."""
    pids, series = replica_pids("tiny"), []
    with site.under_load(num_clients, pause_s=0.05) as load:
        for number in range(1, swaps + 1):
            site.swap(again=True)
            if number % max(1, swaps // 10) == 0:
                series.append([round(each, 1) for each in memory_of(pids)])
                say(f"{number} of {swaps} swaps: {series[-1]} MiB")
    assert replica_pids("tiny") == pids
    growth = max(last / first - 1 for first, last in zip(series[0], series[-1], strict=True))
    return {
        "swaps": swaps,
        "mib_by_tenths": series,
        "growth": round(growth, 4),
        "answers": len(load.answers),
        "wrong": judge(load.answers, site.references, site.timeline)
        + ([f"memory grew by {growth:.1%}"] if growth > GROWTH else []),
    }


def main() -> int:
    """Does what is asked for; 1 where anything was wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=6, help="0: the swaps alone")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--swaps", type=int, default=360, help="0: none")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--write", action="store_true", help="keep the figures in benchmarks/results")
    asked = parser.parse_args()
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="fire-") as folder:
        os.environ["RAYPEFT_HOME"] = f"{folder}/home"
        up = local_ray.ensure_up(num_cpus=2, num_gpus=0, object_store_bytes=200_000_000)
        try:
            ray.init(address=up.gcs_address, log_to_driver=False, logging_level="ERROR", namespace="raypeft")
            door = serve_cluster.open_serve("127.0.0.1", 18800)
            site = FireSite(Path(folder), door.port)
            say("adapters, and what they answer alone")
            site.prepare(4 + asked.rounds)
            site.start()
            site.wait_until_whole()
            if asked.rounds:
                found["fire"] = told(site, fire(site, asked.rounds, asked.seed, asked.clients))
                print(json.dumps(found["fire"], indent=1))
            if asked.swaps:
                found["leak"] = leak(site, asked.swaps, asked.clients // 2)
                print(json.dumps(found["leak"], indent=1))
            site.close()
            serve.shutdown()
            ray.shutdown()
        finally:
            local_ray.down()
    if asked.write:
        write(found)
    wrong = [why for each in found.values() for why in each["wrong"]]
    print("\n".join(wrong[:20]) or "all answers were right")
    return int(bool(wrong))


def write(found: dict[str, Any]) -> None:
    """Keeps the figures, beside what this day's other runs have found."""
    date, hardware = time.strftime("%Y-%m-%d"), f"{os.cpu_count()}cpu-{platform.machine()}"
    result = ROOT / "benchmarks/results" / f"{date}-{hardware}-fire.json"
    kept = json.loads(result.read_text()) if result.exists() else {}
    kept |= {"date": date, "hardware": hardware, "ray": ray.__version__, **found}
    result.write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
