"""What a rank holds while a base is loaded, beside transformers' own loading under ZeRO-3, in one run.

    python benchmarks/loading.py [--only bf16 fp32 int8 nf4] [--layers 8] [--write]

A Llama of at least 1 GB of random bf16 weights is written to a temporary folder and loaded at stage 3 by two ranks
of fresh interpreters: by `peft_dist.load_base`, and by `from_pretrained` while an HfDeepSpeedConfig is alive, after
which `deepspeed.initialize` partitions what is not partitioned yet. Of each process RssAnon + RssShmem of
/proc/PID/status is sampled every 10 ms; its peak counts from where it stood, idle, with everything imported. A
rank may hold its share with the statistics of quantisation, the largest tensor once, and 300 MB. MB are 10^6 bytes.
With `--write` the table is kept under benchmarks/results.
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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from memory_of import Sampler, own_bytes

ROOT = Path(__file__).resolve().parent.parent
RANKS, SPARE_BYTES, SAMPLE_S = 2, 300_000_000, 0.01
KINDS = {
    "bf16": ("bfloat16", None),
    "fp32": ("float32", None),
    "int8": ("bfloat16", "int8"),
    "nf4": ("bfloat16", "nf4"),
}
SHAPE = {
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "max_position_embeddings": 2048,
}


@dataclass
class Line:
    """One kind of base: what a rank held at its peak, of the worse of two ranks, in bytes beyond an idle one."""

    kind: str
    ours: int
    theirs: int
    share: int
    largest: int
    ours_s: float
    theirs_s: float

    @property
    def bound(self) -> int:
        """What a rank may hold."""
        return self.share + self.largest + SPARE_BYTES

    @property
    def is_met(self) -> bool:
        """Whether no rank of ours held more."""
        return self.ours <= self.bound

    def __str__(self) -> str:
        figures = [self.share, self.largest, self.bound, self.ours, self.theirs]
        cells = "".join(f"{figure / 1e6:>10.0f}" for figure in figures)
        mark = "" if self.is_met else "  MISSED"
        return f"{self.kind:<6}{cells}{self.ours / self.theirs:>8.2f}{self.ours_s:>9.1f}{self.theirs_s:>9.1f}{mark}"


HEADER = "".join(
    f"{title:>{width}}"
    for title, width in [
        ("MB", -6), ("share", 10), ("largest", 10), ("bound", 10), ("ours", 10), ("theirs", 10), ("ratio", 8),
        ("ours s", 9), ("theirs s", 9),
    ]
    if width > 0
)  # fmt: skip


def write_base(folder: Path, layers: int) -> int:
    """Random weights, a layer a file, none of them all at once; returns their bytes."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(num_hidden_layers=layers, dtype="bfloat16", **SHAPE)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in LlamaForCausalLM(config).state_dict().items()}
    files: dict[str, list[str]] = {}
    for name in shapes:
        part = name.split(".")[2] if ".layers." in name else "rest"
        files.setdefault(f"model-{part}.safetensors", []).append(name)
    generator, size, places = torch.Generator().manual_seed(0), 0, {}
    for file, names in files.items():
        tensors = {}
        for name in names:
            tensor = torch.empty(shapes[name], dtype=torch.bfloat16)
            tensors[name] = (
                tensor.fill_(1.0) if "norm" in name else tensor.normal_(0, 0.02, generator=generator)
            )
            size += tensor.numel() * 2
            places[name] = file
        save_file(tensors, folder / file, metadata={"format": "pt"})
    index = {"metadata": {"total_size": size}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return size


# One rank, in an interpreter of its own


def load_as_rank(side: str, kind: str, folder: str) -> None:
    """Says that it is idle, loads when told to, and says what it then holds."""
    import deepspeed
    import torch
    import torch.distributed as dist
    import transformers
    from transformers.integrations import HfDeepSpeedConfig

    import peft_dist
    from peft_dist import sharding

    if KINDS[kind][1]:
        import bitsandbytes  # noqa: F401
    torch.set_num_threads(1)
    sharding.disable_deepspeed_op_builds()
    _say({"state": "idle"})
    sys.stdin.readline()
    started = time.monotonic()
    dist.init_process_group("gloo")
    dtype, quantization = KINDS[kind]
    if side == "ours":
        model = peft_dist.load_base(folder, "CAUSAL_LM", dtype, quantization, 3)
    else:
        config: dict[str, Any] = {"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 1}
        deepspeed.init_distributed("gloo")
        alive = HfDeepSpeedConfig(config)
        more = {}
        if quantization == "int8":
            more["quantization_config"] = transformers.BitsAndBytesConfig(load_in_8bit=True)
        elif quantization:
            more["quantization_config"] = transformers.BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type=quantization, bnb_4bit_use_double_quant=True
            )
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), **more)
        model.requires_grad_(False)
        deepspeed.initialize(model=model, config=config)
        del alive
    seconds = time.monotonic() - started
    shapes = [p.ds_shape if hasattr(p, "ds_shape") else p.shape for p in model.parameters()]
    largest = max(shape.numel() for shape in shapes) * torch.finfo(getattr(torch, dtype)).bits // 8
    _say({"state": "loaded", "seconds": seconds, "share": sharding.bytes_at_rest(model), "largest": largest})
    sys.stdin.readline()
    os._exit(0)


def _say(what: dict[str, Any]) -> None:
    print("@" + json.dumps(what), flush=True)


# The parent


def measure(side: str, kind: str, folder: Path) -> tuple[int, dict[str, Any]]:
    """The peak of the worse rank beyond idle, and what it says that it holds."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = [_rank(side, kind, folder, rank, port) for rank in range(RANKS)]
    try:
        for rank in ranks:
            _hear(rank, "idle")
        idle = {rank.pid: own_bytes(rank.pid) for rank in ranks}
        with Sampler(lambda: idle, SAMPLE_S) as sampler:
            for rank in ranks:
                _go_on(rank)
            said = [_hear(rank, "loaded") for rank in ranks]
        for rank in ranks:
            _go_on(rank)
        return max(sampler.peaks[pid] - idle[pid] for pid in idle), {
            "seconds": max(one["seconds"] for one in said),
            "share": max(one["share"] for one in said),
            "largest": said[0]["largest"],
        }
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()


def _rank(side: str, kind: str, folder: Path, rank: int, port: int) -> subprocess.Popen[str]:
    environment = {
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(RANKS),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo",
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, __file__, "--rank", side, kind, str(folder)]
    return subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=open(folder / f"rank{rank}.log", "w"),
        text=True,
    )


def _hear(rank: subprocess.Popen[str], state: str) -> dict[str, Any]:
    assert rank.stdout is not None
    for line in rank.stdout:
        if line.startswith("@") and (said := json.loads(line[1:]))["state"] == state:
            return said
    logs = Path(str(rank.args[-1])).glob("rank*.log")  # type: ignore[index]
    ends = "\n".join(log.read_text()[-1500:] for log in logs)
    raise RuntimeError(f"a rank ended with {rank.wait()} before it was {state}\n{ends}")


def _go_on(rank: subprocess.Popen[str]) -> None:
    assert rank.stdin is not None
    rank.stdin.write("\n")
    rank.stdin.flush()


def compared(kind: str, folder: Path) -> Line:
    """Both sides, one after the other."""
    ours, said = measure("ours", kind, folder)
    theirs, other = measure("theirs", kind, folder)
    largest = said["largest"]
    return Line(kind, ours, theirs, said["share"], largest, said["seconds"], other["seconds"])


def main() -> int:
    """Measures what is asked for and prints the table; 1 where a bound is missed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=KINDS, metavar="KIND", help="all by default")
    parser.add_argument("--layers", type=int, default=8, help="8 are 1.1 GB")
    parser.add_argument(
        "--folder", help="where the base is written and removed; a temporary folder by default"
    )
    parser.add_argument("--write", action="store_true", help="keep the table in benchmarks/results")
    parser.add_argument("--rank", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank:
        load_as_rank(*arguments.rank)
        return 0
    folder = Path(tempfile.mkdtemp(prefix="base-", dir=arguments.folder))
    try:
        size = write_base(folder, arguments.layers)
        print(f"a base of {size / 1e9:.2f} GB, {RANKS} ranks; peak of a rank beyond idle, MB")
        print(" " * 6 + HEADER)
        lines = []
        for kind in arguments.only or KINDS:
            lines.append(compared(kind, folder))
            print(lines[-1], flush=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if arguments.write:
        _keep(lines, size)
    return int(not all(line.is_met for line in lines))


def _keep(lines: list[Line], size: int) -> None:
    import torch
    import transformers

    date, hardware = time.strftime("%Y-%m-%d"), f"{os.cpu_count()}cpu-{platform.machine()}"
    found = {
        "date": date,
        "hardware": hardware,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "base_bytes": size,
        "ranks": RANKS,
        "lines": [{**asdict(line), "bound": line.bound, "met": line.is_met} for line in lines],
    }
    result = ROOT / "benchmarks/results" / f"{date}-{hardware}-loading.json"
    result.write_text(json.dumps(found, indent=1) + "\n")
    print(f"written to {result.relative_to(ROOT)}")


if __name__ == "__main__":
    sys.exit(main())
