"""What the laws run on: for each method of the catalog a few configs, and for each kind of layer a small
one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from peft_dist import inject
from peft_dist.adapted import Adapted
from peft_dist.catalog import config_class
from peft_dist.config import PeftConfig


@dataclass(frozen=True)
class Case:
    """One config of a method, and the layer kinds that it sits on. `is_fresh`: it changes nothing at its
    start."""

    method: str
    label: str
    values: dict
    kinds: tuple[str, ...]
    is_fresh: bool = True

    def config(self, **more) -> PeftConfig:
        return config_class(self.method)(**{**self.values, **more})


LINEAR = ("linear", "linear without bias", "Conv1D")
CONVS = ("conv1d", "conv2d", "conv3d")

CASES = (
    Case("LORA", "plain", {"r": 4}, (*LINEAR, "embedding", *CONVS)),
    Case("LORA", "rslora", {"r": 4, "lora_alpha": 3, "use_rslora": True}, ("linear",)),
    Case("LORA", "gaussian", {"r": 4, "init_lora_weights": "gaussian"}, ("linear", "embedding")),
    Case(
        "LORA", "random start", {"r": 4, "init_lora_weights": False}, ("linear", "embedding"), is_fresh=False
    ),
    Case("LORA", "bias", {"r": 4, "bias": "lora_only"}, ("linear", "Conv1D", "conv2d")),
    Case(
        "LORA",
        "patterns",
        {"r": 4, "rank_pattern": {"target": 2}, "alpha_pattern": {"target": 5}},
        ("linear",),
    ),
    Case("IA3", "output", {"feedforward_modules": []}, (*LINEAR, *CONVS)),
    Case("IA3", "input", {"feedforward_modules": ["target"]}, (*LINEAR, *CONVS)),
    Case(
        "IA3",
        "random start",
        {"feedforward_modules": [], "init_ia3_weights": False},
        ("linear",),
        is_fresh=False,
    ),
    Case("PROMPT_TUNING", "random", {"num_virtual_tokens": 3, "task_type": "CAUSAL_LM"}, ()),
)

SITES = [(case, kind) for case in CASES for kind in case.kinds]
SITE_IDS = [f"{case.method}-{case.label}-{kind}".replace(" ", "_") for case, kind in SITES]

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(12, 8),
    "linear without bias": lambda: nn.Linear(12, 8, bias=False),
    "Conv1D": lambda: Conv1D(8, 12),
    "embedding": lambda: nn.Embedding(20, 12),
    "conv1d": lambda: nn.Conv1d(4, 6, 3, padding=1, stride=2),
    "conv2d": lambda: nn.Conv2d(4, 6, (3, 2), padding=1, padding_mode="circular"),
    "conv3d": lambda: nn.Conv3d(4, 6, 2, dilation=2),
}


def sample(kind: str, rows: int = 4) -> Tensor:
    """An input of a layer: float64, or token ids."""
    spaces = {"conv1d": (9,), "conv2d": (7, 6), "conv3d": (5, 4, 6)}
    if kind == "embedding":
        return torch.randint(20, (rows, 5))
    if kind in spaces:
        return torch.randn(rows, 4, *spaces[kind], dtype=torch.double)
    return torch.randn(rows, 5, 12, dtype=torch.double)


class Base(nn.Module):
    """A base of one layer, called `target`."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.target = LAYERS[kind]()

    def forward(self, x: Tensor) -> Tensor:
        return self.target(x)


def adapted(case: Case, kind: str, *names: str, device: str = "cpu") -> tuple[Base, inject.Adapters]:
    """A base in float64 with adapters of the case, the first of them active."""
    torch.manual_seed(0)
    base, shared = Base(kind).double().to(device), inject.Adapters()
    # Conv1D starts its bias at zero, which would hide what happens to it.
    if getattr(base.target, "bias", None) is not None and device != "meta":
        nn.init.normal_(base.target.bias)
    for name in names or ("a",):
        inject.inject(base, case.config(target_modules=["target"]), name, shared)
    inject.activate(base, [(names or ("a",))[0]])
    return base, shared


def disturb(module: nn.Module, seed: int = 1, size: float = 0.3) -> None:
    """Moves every adapter tensor away from its start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, wrapper in inject.adapter_modules(module):
            for name in wrapper.adapters:
                for tensor in wrapper.tensors(name).values():
                    tensor.add_(torch.randn(tensor.shape, generator=generator, dtype=torch.double) * size)


def target(base: Base) -> Adapted:
    assert isinstance(base.target, Adapted)
    return base.target


def run_with(module: Adapted, names: list[str], x: Tensor) -> Tensor:
    """The layer run with W + dW and b + db in the place of its own."""
    layer, (dW, db) = module.base_layer, module.change(names)
    stored = {key: p.detach().clone() for key, p in layer.named_parameters()}
    with torch.no_grad():
        if dW is not None:
            layer.weight.add_(module.base._as_stored(dW))
        if db is not None:
            layer.bias.add_(db)
        y = layer(x)
        for key, p in layer.named_parameters():
            p.copy_(stored[key])
    return y
