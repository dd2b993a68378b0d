"""What adapters cost, beside HF PEFT, in one run.

    python benchmarks/adapters.py [--only LORA IA3 loading ...] [--rounds 15] [--write]

Training steps, as multiples of "floor", which is the frozen base's forward and backward alone. All sides take
the same `inputs_embeds`, which require a gradient; both adapters' sides also step `AdamW(fused=True)`. On a
CPU one thread works and its CPU time is counted, so that a busy machine changes little, and the heap is kept
between steps for all sides alike (else each step pays for fetching from the system what the one before gave
back, the more the larger its tensors are); on a GPU (`--device
cuda`: bf16, a 1B-shaped Llama) the wall clock is, around a synchronised step. In each round every side runs
once, the first one changing; the table has the medians. With `--write` it is kept under benchmarks/results.
"""

from __future__ import annotations

import argparse
import copy
import functools
import gc
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import peft  # noqa: E402
import torch  # noqa: E402
from heap import keep_heap  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402

import peft_dist  # noqa: E402

SLACK = 0.02
ATTENTION, MLP = ["q_proj", "k_proj", "v_proj", "o_proj"], ["gate_proj", "up_proj", "down_proj"]
ALL = [*ATTENTION, *MLP]


@dataclass(frozen=True)
class Method:
    """A method's settings, and how many times the floor its step may take."""

    config: str
    target: float
    values: dict[str, Any] = field(default_factory=dict)


METHODS = {
    "LORA": Method("LoraConfig", 1.15, {"r": 16, "target_modules": ALL}),
    "DORA": Method("LoraConfig", 1.35, {"r": 16, "target_modules": ALL, "use_dora": True}),
    "IA3": Method("IA3Config", 1.08, {"target_modules": ALL, "feedforward_modules": ["down_proj"]}),
    "VERA": Method("VeraConfig", 1.08, {"r": 64, "target_modules": ["q_proj", "o_proj"]}),
    "OFT": Method("OFTConfig", 1.18, {"r": 0, "oft_block_size": 32, "target_modules": ALL}),
    "LOHA": Method("LoHaConfig", 1.60, {"r": 8, "target_modules": ALL}),
    "LOKR": Method("LoKrConfig", 1.40, {"r": 8, "target_modules": ALL}),
    "FOURIERFT": Method("FourierFTConfig", 1.15, {"n_frequency": 500, "target_modules": ["q_proj", "v_proj"]}),
    "HRA": Method("HRAConfig", 1.25, {"r": 8, "target_modules": ALL}),
    "BOFT": Method(
        "BOFTConfig",
        1.25,
        {"boft_block_size": 8, "boft_n_butterfly_factor": 1, "target_modules": ["q_proj", "v_proj"]},
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Place:
    """Where it runs: a device, the base's shape and dtype there, and its clock."""

    device: torch.device
    shape: dict[str, int]
    dtype: torch.dtype

    def base(self, layers: int | None = None) -> LlamaForCausalLM:
        """A frozen Llama, the same for all sides."""
        torch.manual_seed(0)
        shape = self.shape if layers is None else {**self.shape, "num_hidden_layers": layers}
        config = LlamaConfig(**shape, max_position_embeddings=1024)
        return LlamaForCausalLM(config).to(self.device, self.dtype).requires_grad_(False)

    def clock(self) -> float:
        """Seconds: of this process's CPU time, or of the wall once the GPU is idle."""
        if self.device.type == "cpu":
            return time.process_time()
        torch.cuda.synchronize(self.device)
        return time.perf_counter()


CPU_SHAPE = {
    "hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 6,
    "num_key_value_heads": 6, "vocab_size": 2048,
}  # fmt: skip
GPU_SHAPE = {
    "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 128256,
}  # fmt: skip
HEADER = f"{'':<12} {'HF PEFT':>9} {'ours':>9} {'target':>9}   verdict"


@dataclass(frozen=True)
class Line:
    """One row of the table: what both sides take in a unit, and the most that ours may."""

    name: str
    theirs: float
    ours: float
    target: float
    unit: str
    beside: str = ""
    """What else was measured in the same rounds."""

    @property
    def is_met(self) -> bool:
        """Whether the target is met and HF PEFT is not faster."""
        return (
            self.ours <= self.target + (SLACK if self.unit == "x floor" else 0) and self.ours <= self.theirs
        )

    def __str__(self) -> str:
        numbers = f"{self.theirs:9.3f} {self.ours:9.3f} {self.target:9.3f}"
        return f"{self.name:<12} {numbers}   {'met' if self.is_met else 'MISSED'} ({self.unit}){self.beside}"


def alternated(sides: Sequence[Callable[[], float]], rounds: int, warm: int = 2) -> list[list[float]]:
    """What each side takes in each round, after rounds to warm up; which is first changes."""
    taken: list[list[float]] = [[] for _ in sides]
    for number in range(-warm, rounds):
        order = [(number + i) % len(sides) for i in range(len(sides))]
        for side in order:
            took = sides[side]()
            if number >= 0:
                taken[side].append(took)
    return taken


def training(name: str, place: Place, rounds: int) -> Line:
    """A method's training step on both sides, in floors."""
    method, medians = METHODS[name], statistics.median
    width, rows, length = place.shape["hidden_size"], 4, 128
    torch.manual_seed(1)
    embeds = torch.randn(rows, length, width, device=place.device, dtype=place.dtype).requires_grad_(True)
    labels = torch.randint(0, place.shape["vocab_size"], (rows, length), device=place.device)

    def step(model: Any, optimizer: torch.optim.Optimizer | None) -> float:
        began = place.clock()
        model(inputs_embeds=embeds, labels=labels, use_cache=False).loss.backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()
        embeds.grad = None
        return place.clock() - began

    sides = [functools.partial(step, place.base().train(), None)]
    for library in (peft, peft_dist):
        torch.manual_seed(2)
        config = getattr(library, method.config)(**copy.deepcopy(method.values), task_type="CAUSAL_LM")
        model = library.get_peft_model(place.base(), config).train()
        trained = [p for p in model.parameters() if p.requires_grad]
        sides.append(functools.partial(step, model, torch.optim.AdamW(trained, lr=1e-4, fused=True)))
    floor, theirs, ours = alternated(sides, rounds)
    return Line(
        name, medians(theirs) / medians(floor), medians(ours) / medians(floor), method.target, "x floor"
    )


def compared(
    name: str, place: Place, theirs: Callable[[], Any], ours: Callable[[], Any], share: float, rounds: int
) -> Line:
    """The times of two functions; what one returns is undone by a call outside of the time."""
    a, b = medians(place, [theirs, ours], rounds)
    return Line(name, 1000 * a, 1000 * b, 1000 * a * share, "ms")


def medians(place: Place, functions: Sequence[Callable[[], Any]], rounds: int) -> list[float]:
    """Seconds of each function, by turns; what one returns is undone by a call outside of the time."""

    def timed(function: Callable[[], Any]) -> float:
        began = place.clock()
        undo = function()
        took = place.clock() - began
        if callable(undo):
            undo()
        return took

    sides = [functools.partial(timed, function) for function in functions]
    return [statistics.median(taken) for taken in alternated(sides, rounds, warm=1)]


def loading(place: Place, rounds: int) -> Line:
    """Fifty LoRA adapters from directories into one model."""
    base = place.base()
    with tempfile.TemporaryDirectory() as folder:
        names = [f"adapter{i}" for i in range(50)]
        first = peft.get_peft_model(base, peft.LoraConfig(r=8, target_modules=ALL, task_type="CAUSAL_LM"))
        for name in names:
            first.save_pretrained(f"{folder}/{name}")

        def load(library: Any, model: Any) -> Callable[[], Any]:
            loaded = library.PeftModel.from_pretrained(model, f"{folder}/{names[0]}", adapter_name=names[0])
            for name in names[1:]:
                loaded.load_adapter(f"{folder}/{name}", adapter_name=name)
            return loaded.unload if hasattr(loaded, "unload") else loaded.base_model.unload

        sides = [functools.partial(load, library, place.base()) for library in (peft, peft_dist)]
        return compared("loading", place, *sides, 0.1, min(rounds, 3))


def injecting(place: Place, rounds: int) -> Line:
    """LoRA onto 560 layers of a base on meta."""
    with torch.device("meta"):
        base = LlamaForCausalLM(LlamaConfig(**{**place.shape, "num_hidden_layers": 80}))

    def inject(library: Any) -> Callable[[], Any]:
        config = library.LoraConfig(r=8, target_modules=ALL, task_type="CAUSAL_LM")
        model = library.get_peft_model(base, config, low_cpu_mem_usage=True)
        return model.base_model.unload

    sides = [functools.partial(inject, library) for library in (peft, peft_dist)]
    return compared("injecting", place, *sides, 0.5, min(rounds, 9))


def naming(place: Place, rounds: int) -> Line:
    """A forward of 16 rows that name 8 LoRA adapters; beside it the base alone, and the base with nothing but the
    adapters' products, two batched ones a layer over rows that lie in the adapters' order already."""
    names = [f"adapter{i}" for i in range(8)]
    ids = torch.randint(0, place.shape["vocab_size"], (16, 32), device=place.device)

    def forward(model: Any) -> None:
        with torch.no_grad():
            model(input_ids=ids, adapter_names=names * 2, use_cache=False)

    sides = []
    for library in (peft, peft_dist):
        config = library.LoraConfig(
            r=16, target_modules=ALL, task_type="CAUSAL_LM", init_lora_weights=False, inference_mode=True
        )
        model = library.get_peft_model(place.base(), config, adapter_name=names[0])
        for name in names[1:]:
            model.add_adapter(name, copy.deepcopy(config))
        sides.append(functools.partial(forward, model.eval()))
    for base in (place.base(), with_products(place.base(), len(names), 16)):
        sides.append(functools.partial(torch.no_grad()(base.eval()), input_ids=ids, use_cache=False))
    theirs, ours, bare, products = medians(place, sides, rounds)
    beside = f"; the base alone {bare / theirs:.3f}, with bare products {products / theirs:.3f} of HF PEFT"
    return Line("naming rows", 1000 * theirs, 1000 * ours, 1000 * theirs * 0.7, "ms", beside)


def with_products(base: LlamaForCausalLM, num: int, r: int) -> LlamaForCausalLM:
    """A base each of whose linear layers adds the products of `num` LoRA adapters, each to its share of the rows."""

    def add(layer: torch.nn.Linear) -> Callable[..., torch.Tensor]:
        A, B = (
            torch.randn(num, *shape, device=layer.weight.device, dtype=layer.weight.dtype)
            for shape in ((layer.in_features, r), (r, layer.out_features))
        )

        def hook(module: torch.nn.Module, args: tuple, y: torch.Tensor) -> torch.Tensor:
            x, grouped = args[0].reshape(num, -1, layer.in_features), y.view(num, -1, layer.out_features)
            grouped.baddbmm_(torch.bmm(x, A), B)
            return y

        return hook

    for name, module in base.named_modules():
        if name.endswith(tuple(ALL)):
            module.register_forward_hook(add(module))
    return base


def merging(place: Place, rounds: int) -> Line:
    """LoRA into the base's weights."""

    def merge(model: Any) -> Callable[[], Any]:
        model.base_model.merge_adapter()
        return model.base_model.unmerge_adapter

    sides = []
    for library in (peft, peft_dist):
        config = library.LoraConfig(r=16, target_modules=ALL, task_type="CAUSAL_LM", init_lora_weights=False)
        sides.append(functools.partial(merge, library.get_peft_model(place.base(), config)))
    return compared("merging", place, *sides, 1.0, rounds)


def cycling(place: Place, rounds: int) -> Line:
    """LoRA into the base's weights and out again; ours puts back the bits that were there."""

    def cycle(model: Any) -> None:
        model.base_model.merge_adapter()
        model.base_model.unmerge_adapter()

    sides = []
    for library in (peft, peft_dist):
        config = library.LoraConfig(r=16, target_modules=ALL, task_type="CAUSAL_LM", init_lora_weights=False)
        sides.append(functools.partial(cycle, library.get_peft_model(place.base(), config)))
    return compared("in and out", place, *sides, 1.0, rounds)


def importing(place: Place, rounds: int) -> Line:
    """`import peft_dist` in a process of its own, always in CPU time; a bare interpreter's is taken off."""

    def run(statement: str) -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-c", statement], cwd=ROOT, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    sides = [functools.partial(run, text) for text in ("pass", "import peft", "import peft_dist")]
    bare, theirs, ours = (statistics.median(taken) for taken in alternated(sides, min(rounds, 3), warm=1))
    theirs, ours = 1000 * (theirs - bare), 1000 * (ours - bare)
    return Line("importing", theirs, ours, theirs / 3, "ms")


OTHERS = {
    "loading": loading,
    "injecting": injecting,
    "naming": naming,
    "merging": merging,
    "cycling": cycling,
    "importing": importing,
}


def hardware(place: Place) -> str:
    """What it ran on, as part of a file's name."""
    if place.device.type == "cpu":
        return f"{os.cpu_count()}cpu-{platform.machine()}"
    return torch.cuda.get_device_name(place.device).lower().replace(" ", "-")


def main() -> int:
    """Measures what is asked for and prints the table; 1 where a target is missed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", nargs="+", choices=[*METHODS, *OTHERS], metavar="NAME", help="all by default"
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--write", action="store_true", help="keep the table in benchmarks/results")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    keep_heap()
    device = torch.device(arguments.device)
    on_gpu = device.type == "cuda"
    place = Place(device, GPU_SHAPE if on_gpu else CPU_SHAPE, torch.bfloat16 if on_gpu else torch.float32)
    lines = []
    print(HEADER)
    for name in arguments.only or [*METHODS, *OTHERS]:
        gc.collect()
        gc.freeze()  # else each part pays, on both sides, for walking what those before it left
        line = (
            OTHERS[name](place, arguments.rounds)
            if name in OTHERS
            else training(name, place, arguments.rounds)
        )
        lines.append(line)
        print(line, flush=True)
    if arguments.write:
        date = time.strftime("%Y-%m-%d")
        result = ROOT / "benchmarks/results" / f"{date}-{hardware(place)}-adapters.json"
        found = {
            "date": date,
            "hardware": hardware(place),
            "torch": torch.__version__,
            "peft": peft.__version__,
            "rounds": arguments.rounds,
            "lines": [
                {
                    "name": line.name,
                    "unit": line.unit,
                    "hf_peft": round(line.theirs, 3),
                    "ours": round(line.ours, 3),
                    "target": round(line.target, 3),
                    "met": line.is_met,
                    **({"beside": line.beside.removeprefix("; ")} if line.beside else {}),
                }
                for line in lines
            ],
        }
        result.write_text(json.dumps(found, indent=1) + "\n")
        print(f"written to {result.relative_to(ROOT)}")
    return int(not all(line.is_met for line in lines))


if __name__ == "__main__":
    sys.exit(main())
