"""What a merged checkpoint costs, beside HF PEFT's `merge_and_unload` and `save_pretrained`, in one run.

    python benchmarks/merging.py [--gb 1] [--dtype float32] [--only offline] [--folder DIR] [--write]

A Llama of random weights, as large as `--gb` says, and a LoRA of rank 16 on all its linear layers are written to a
temporary folder, and merged three ways, each in processes of their own: by HF PEFT in one process; by `save_merged` on
two ranks over a base in pieces (ZeRO-3); by `raypeft merge` with two workers of a Ray of its own. Of each process
RssAnon + RssShmem of /proc/PID/status is sampled every 10 ms. A rank may hold, beyond an idle process with the same
imports, its share, the largest tensor twice and 300 MB; a worker, beyond an idle one, the largest tensor three times;
both workers and the command together 1.5 GB. MB are 10^6 bytes. With `--write` the table is kept under
benchmarks/results.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memory_of import Sampler, own_bytes

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

RANKS, WORKERS, SPARE, TOGETHER = 2, 2, 300_000_000, 1_500_000_000
HIDDEN, INNER, HEADS, VOCABULARY, RANK = 2048, 5632, 16, 32000, 16
LINEAR = {
    "self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (HIDDEN, HIDDEN), "self_attn.v_proj": (HIDDEN, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN), "mlp.gate_proj": (INNER, HIDDEN), "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}  # fmt: skip
LAYER = sum(out * in_ for out, in_ in LINEAR.values()) + 2 * HIDDEN


@dataclass(frozen=True)
class Line:
    """One way to merge: seconds, and what its processes held at their peak beyond idle ones, in bytes."""

    name: str
    seconds: float
    peak: int
    bound: int | None

    @property
    def is_met(self) -> bool:
        """Whether it stayed within its bound."""
        return self.bound is None or self.peak <= self.bound

    def __str__(self) -> str:
        bound = "" if self.bound is None else f"{self.bound / 1e6:.0f}"
        verdict = "" if self.bound is None else "met" if self.is_met else "MISSED"
        return f"{self.name:<44}{self.seconds:>8.1f}{self.peak / 1e6:>10.0f}{bound:>10}   {verdict}"


HEADER = f"{'':<44}{'s':>8}{'peak MB':>10}{'bound':>10}"


# The base and the adapter


def make(folder: Path, num_bytes: float, dtype: str) -> dict[str, int]:
    """Writes both, tensor by tensor; the base's bytes and its largest tensor's."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    from peft_dist import LoraConfig
    from peft_dist.merged.shards import Entry, Shards, index_of, split

    kind = getattr(torch, dtype)
    layers = max(1, round((num_bytes / kind.itemsize - 2 * VOCABULARY * HIDDEN) / LAYER))
    shapes = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for number in range(layers):
        start = f"model.layers.{number}"
        shapes |= {f"{start}.{name}.weight": shape for name, shape in LINEAR.items()}
        shapes |= {
            f"{start}.{name}.weight": (HIDDEN,) for name in ("input_layernorm", "post_attention_layernorm")
        }
    shapes |= {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCABULARY, HIDDEN)}
    entries = [Entry(key, kind, shape) for key, shape in shapes.items()]
    base, adapter = folder / "base", folder / "adapter"
    base.mkdir()
    config = LlamaConfig(
        hidden_size=HIDDEN, intermediate_size=INNER, num_attention_heads=HEADS, num_key_value_heads=HEADS,
        num_hidden_layers=layers, vocab_size=VOCABULARY, tie_word_embeddings=False, dtype=dtype,
        architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    config.save_pretrained(base)
    shards = split(entries, 2_000_000_000)
    torch.manual_seed(0)
    with Shards(base, shards, create=True) as files:
        for key, shape in shapes.items():
            files.write(key, [torch.randn(shape, dtype=kind).mul_(0.02)])
    if (index := index_of(shards)) is not None:
        (base / "model.safetensors.index.json").write_text(index)
    tensors = {}
    for number in range(layers):
        for name, (out, in_) in LINEAR.items():
            site = f"base_model.model.model.layers.{number}.{name}"
            tensors[f"{site}.lora_A.weight"] = 0.02 * torch.randn(RANK, in_)
            tensors[f"{site}.lora_B.weight"] = 0.02 * torch.randn(out, RANK)
    targets = sorted({name.rpartition(".")[2] for name in LINEAR})
    adapter.mkdir()
    lora = LoraConfig(
        r=RANK, target_modules=targets, task_type="CAUSAL_LM", base_model_name_or_path=str(base)
    )
    lora.inference_mode = True
    lora.save_pretrained(adapter)
    save_file(tensors, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    sizes = [entry.num_bytes for entry in entries]
    return {"bytes": sum(sizes), "largest": max(sizes)}


# What the processes do


def say(**facts: Any) -> None:
    """One line that the parent reads."""
    print("FACTS " + json.dumps(facts), flush=True)


def hf_peft(folder: Path) -> None:
    """Loads base and adapter, merges, saves."""
    import peft
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    say(idle=own_bytes())
    begun = time.monotonic()
    base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype="auto")
    merged = peft.PeftModel.from_pretrained(base, folder / "adapter").merge_and_unload()
    merged.save_pretrained(folder / "theirs")
    say(seconds=time.monotonic() - begun)


def rank(folder: Path, number: int, port: int) -> None:
    """One of two ranks with the base in pieces."""
    os.environ.update(
        RANK=str(number), LOCAL_RANK=str(number), WORLD_SIZE=str(RANKS), MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port), DS_ACCELERATOR="cpu", GLOO_SOCKET_IFNAME="lo",
    )  # fmt: skip
    import deepspeed
    import torch
    import torch.distributed as dist

    import peft_dist
    from peft_dist import sharding
    from peft_dist.loading import load_base
    from peft_dist.merged import gathered

    torch.set_num_threads(1)
    sharding.disable_deepspeed_op_builds()
    deepspeed.init_distributed("gloo", verbose=False)
    dist.barrier()
    say(idle=own_bytes(), module=gathered.__name__)
    begun = time.monotonic()
    base = load_base(str(folder / "base"), dtype="auto", zero_stage=3)
    model = peft_dist.PeftModel.from_pretrained(base, folder / "adapter")
    dist.barrier()
    say(loaded=own_bytes())
    # What loading took is loading's own benchmark.
    (folder / f"loaded-{number}").touch()
    model.save_merged(folder / "gathered")
    dist.barrier()
    say(seconds=time.monotonic() - begun)


def command(folder: Path) -> None:
    """`raypeft merge` with two workers, on a Ray of its own."""
    from orchestrator import api, wiring
    from orchestrator.cluster import load_cluster

    api.up(num_cpus=WORKERS)
    wiring.connect(load_cluster("local"))
    import ray

    idle = max(ray.get([ray.remote(idle_worker).remote() for _ in range(WORKERS)]))
    wiring.disconnect()
    say(idle=idle, own=own_bytes())
    (folder / "ready").touch()
    begun = time.monotonic()
    result = api.merge(str(folder / "adapter"), folder / "offline", workers=WORKERS)
    say(seconds=time.monotonic() - begun, num_workers=result.num_workers)
    api.down()


def idle_worker() -> int:
    """What a worker holds before it merges."""
    from orchestrator.merging import part

    time.sleep(0.5)  # until both are there
    return own_bytes() if part.REPORT_BYTES else 0


# Measuring them


def start(what: str, folder: Path, *more: object, **environment: str) -> subprocess.Popen:
    """A fresh interpreter that does one of these."""
    return subprocess.Popen(
        [sys.executable, __file__, "--do", what, "--folder", str(folder), *(f"--{each}" for each in more)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", **environment},
        cwd=ROOT,
    )


def facts_of(process: subprocess.Popen) -> dict[str, Any]:
    """What a process said, once it has ended."""
    output, _ = process.communicate()
    if process.returncode:
        raise SystemExit(f"{process.args} ended with {process.returncode}\n{output}")
    found: dict[str, Any] = {}
    for line in output.splitlines():
        if line.startswith("FACTS "):
            found |= json.loads(line.removeprefix("FACTS "))
    return found


def measure_theirs(folder: Path) -> Line:
    """HF PEFT."""
    process = start("hf_peft", folder)
    with Sampler(lambda: [process.pid]) as sampler:
        found = facts_of(process)
    return Line("HF PEFT, one process", found["seconds"], sampler.peaks[process.pid] - found["idle"], None)


def measure_gathered(folder: Path, sizes: dict[str, int]) -> Line:
    """`save_merged` on two ranks; the peak is of the worse one, while it merges."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [start("rank", folder, f"number={number}", f"port={port}") for number in range(RANKS)]

    def loaded() -> Iterator[int]:
        return (each.pid for number, each in enumerate(ranks) if (folder / f"loaded-{number}").exists())

    with Sampler(loaded) as sampler:
        found = [facts_of(each) for each in ranks]
    peak = max(sampler.peaks[each.pid] - facts["idle"] for each, facts in zip(ranks, found, strict=True))
    bound = sizes["bytes"] // RANKS + 2 * sizes["largest"] + SPARE
    return Line("save_merged, each of two ZeRO-3 ranks", max(f["seconds"] for f in found), peak, bound)


def measure_offline(folder: Path, sizes: dict[str, int]) -> list[Line]:
    """`raypeft merge`: each worker beyond an idle one, and all processes that work together."""
    home = folder / "home"
    process = start("command", folder, RAYPEFT_HOME=str(home))
    ours: dict[int, bool] = {}

    def workers() -> Iterator[int]:
        if not (folder / "ready").exists():
            return
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and (is_ours(int(entry.name)) or int(entry.name) == process.pid):
                yield int(entry.name)

    def is_ours(pid: int) -> bool:
        """Whether it is a worker that runs a task of this command's Ray."""
        try:
            if not Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"ray::"):
                return False
            if pid not in ours:
                ours[pid] = f"RAYPEFT_HOME={home}".encode() in Path(f"/proc/{pid}/environ").read_bytes()
            return ours[pid]
        except OSError:
            return False

    with Sampler(workers) as sampler:
        found = facts_of(process)
    of_workers = [peak for pid, peak in sampler.peaks.items() if pid != process.pid]
    return [
        Line(
            f"raypeft merge, each of {found['num_workers']} workers",
            found["seconds"],
            max(of_workers) - found["idle"],
            3 * sizes["largest"],
        ),
        Line("  workers and command, idle ones counted", found["seconds"], sampler.together, TOGETHER),
    ]


def check_equal(folder: Path) -> None:
    """Both of ours are the same, bit for bit; HF PEFT's differs by how it rounds."""
    import torch
    from safetensors import safe_open

    def read(name: str) -> dict[str, Any]:
        found = {}
        for file in sorted((folder / name).glob("*.safetensors")):
            opened = safe_open(file, "pt")
            found |= dict.fromkeys(opened.keys(), opened)
        return found

    gathered, offline, theirs = read("gathered"), read("offline"), read("theirs")
    assert gathered.keys() == offline.keys() == theirs.keys()
    for key, file in gathered.items():
        one = file.get_tensor(key)
        assert torch.equal(one, offline[key].get_tensor(key)), key
        torch.testing.assert_close(one, theirs[key].get_tensor(key), rtol=2e-2, atol=1e-4)


def main() -> int:
    """Measures all three and prints the table; 1 where a bound is missed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gb", type=float, default=1.0, help="of the base, in 10^9 bytes")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument(
        "--folder", type=Path, help="where to put the files, three times the base; a temporary one"
    )
    parser.add_argument("--only", nargs="+", choices=["theirs", "gathered", "offline"], help="all by default")
    parser.add_argument("--write", action="store_true", help="keep the table in benchmarks/results")
    for hidden in ("--do", "--number", "--port"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.do == "rank":
        rank(arguments.folder, int(arguments.number), int(arguments.port))
        return 0
    if arguments.do:
        {"hf_peft": hf_peft, "command": command, "make": lambda folder: None}[arguments.do](arguments.folder)
        return 0
    folder = Path(tempfile.mkdtemp(prefix="merging-", dir=arguments.folder))
    try:
        sizes = make(folder, arguments.gb * 1e9, arguments.dtype)
        print(
            f"{arguments.dtype}: base {sizes['bytes'] / 1e6:.0f} MB, largest tensor {sizes['largest'] / 1e6:.0f} MB"
        )
        print(HEADER)
        lines = []
        ways: dict[str, Callable[[], list[Line]]] = {
            "theirs": lambda: [measure_theirs(folder)],
            "gathered": lambda: [measure_gathered(folder, sizes)],
            "offline": lambda: measure_offline(folder, sizes),
        }
        for way in arguments.only or ways:
            for line in ways[way]():
                lines.append(line)
                print(line, flush=True)
        if not arguments.only:
            check_equal(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if arguments.write:
        keep(lines, sizes, arguments.dtype, os.getloadavg()[2])
    return int(not all(line.is_met for line in lines))


def keep(lines: list[Line], sizes: dict[str, int], dtype: str, load: float) -> None:
    """The table as a dated file."""
    date, hardware = time.strftime("%Y-%m-%d"), f"{os.cpu_count()}cpu-{platform.machine()}"
    gigabytes = round(sizes["bytes"] / 1e9)
    result = ROOT / "benchmarks/results" / f"{date}-{hardware}-merging-{gigabytes}gb-{dtype}.json"
    found = {
        "date": date,
        "hardware": hardware,
        "base_mb": round(sizes["bytes"] / 1e6),
        "largest_mb": round(sizes["largest"] / 1e6),
        "dtype": dtype,
        # Seconds say little on a machine that has other work.
        "load_average": round(load, 1),
        "lines": [
            {
                "name": line.name.strip(),
                "seconds": round(line.seconds, 1),
                "peak_mb": round(line.peak / 1e6),
                "bound_mb": None if line.bound is None else round(line.bound / 1e6),
                "met": line.is_met,
            }
            for line in lines
        ],
    }
    result.write_text(json.dumps(found, indent=1) + "\n")
    print(f"written to {result.relative_to(ROOT)}")


if __name__ == "__main__":
    sys.exit(main())
