"""What the laws run on: for each method of the catalog a few configs, and for each kind of layer a small
one."""

from __future__ import annotations

import copy
import importlib
import os
import pkgutil
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from peft_dist import inject
from peft_dist.adapted import Adapted
from peft_dist.pooled import PooledModule
from tests.contract import methods
from tests.contract.case import Case

# Methods of other packages name a module with their own cases in this variable.
FILES = [
    *(
        f"{methods.__name__}.{name}"
        for name in sorted(m.name for m in pkgutil.iter_modules(methods.__path__))
    ),
    *filter(None, os.environ.get("PEFT_DIST_CASES", "").split(",")),
]
CASES = tuple(case for name in FILES for case in importlib.import_module(name).CASES)

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
    "conv1d with groups": lambda: nn.Conv1d(4, 6, 3, padding=1, groups=2),
    "conv2d with groups": lambda: nn.Conv2d(4, 6, (3, 2), padding=1, padding_mode="reflect", groups=2),
    "conv3d with groups": lambda: nn.Conv3d(4, 8, 2, padding="same", groups=4),
}


# Where tensors are told apart by their sizes: no factor of a method has as many elements as the weight.
LARGE = {
    **LAYERS,
    "linear": lambda: nn.Linear(60, 56),
    "linear without bias": lambda: nn.Linear(60, 56, bias=False),
    "Conv1D": lambda: Conv1D(56, 60),
    "conv2d": lambda: nn.Conv2d(4, 10, (3, 2)),
}


def sample(kind: str, rows: int = 4, width: int = 12) -> Tensor:
    """An input of a layer: float64, or token ids."""
    spaces = {"conv1d": (9,), "conv2d": (7, 6), "conv3d": (5, 4, 6)}
    if kind == "embedding":
        return torch.randint(20, (rows, 5))
    if kind[:6] in spaces:
        return torch.randn(rows, 4, *spaces[kind[:6]], dtype=torch.double)
    return torch.randn(rows, 5, width, dtype=torch.double)


class Base(nn.Module):
    """A base of one layer, called `target`."""

    def __init__(self, kind: str, layers: dict[str, Callable[[], nn.Module]] = LAYERS) -> None:
        super().__init__()
        self.target = layers[kind]()

    def forward(self, x: Tensor) -> Tensor:
        return self.target(x)


def adapted(
    case: Case, kind: str, *names: str, device: str = "cpu", layers: dict = LAYERS
) -> tuple[Base, inject.Adapters]:
    """A base in float64 with adapters of the case, the first of them active."""
    torch.manual_seed(0)
    base, shared = Base(kind, layers).double().to(device).eval(), inject.Adapters()
    shared.common = PooledModule(shared.pool, "")
    # Conv1D starts its bias at zero, which would hide what happens to it.
    if getattr(base.target, "bias", None) is not None and device != "meta":
        nn.init.normal_(base.target.bias)
    for name in names or ("a",):
        inject.inject(base, case.config(target_modules=["target"]), name, shared)
    inject.activate(base, [(names or ("a",))[0]])
    # One entry serves every row.
    shared.current.batch = {name: torch.tensor([1]) for name in case.config().reads}
    return base, shared


def disturb(module: nn.Module, seed: int = 1, size: float = 0.3) -> None:
    """Moves every adapter tensor that is trained away from its start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, wrapper in inject.adapter_modules(module):
            for name in wrapper.adapters:
                for key, tensor in wrapper.tensors(name).items():
                    if not wrapper.wanted(name)[key].trainable:
                        continue
                    tensor.add_(torch.randn(tensor.shape, generator=generator, dtype=torch.double) * size)


def target(base: Base) -> Adapted:
    assert isinstance(base.target, Adapted)
    return base.target


def run_with(module: Adapted, names: list[str], x: Tensor) -> Tensor:
    """The layer run with W + dW and b + db in the place of its own."""
    layer, (dW, db) = module.base_layer, module.change(names)
    stored = {key: p.detach().clone() for key, p in layer.named_parameters()}
    with torch.no_grad():
        if dW is not None and dW.shape[1] != module.base.site.in_:
            layer, dW = ungrouped(layer), dW.view(len(dW), layer.in_channels, *layer.kernel_size)
            layer.weight.add_(dW)
        elif dW is not None:
            layer.weight.add_(module.base._as_stored(dW))
        if db is not None:
            layer.bias.add_(db)
        y = layer(x)
        for key, p in module.base_layer.named_parameters():
            p.copy_(stored[key])
    return y


def ungrouped(layer: nn.Module) -> nn.Module:
    """A convolution with groups as one over all channels: zero where an output saw none."""
    rows, channels = layer.out_channels // layer.groups, layer.in_channels // layer.groups
    wide = layer.weight.new_zeros(layer.out_channels, layer.in_channels, *layer.kernel_size)
    for group in range(layer.groups):
        here = slice(group * rows, (group + 1) * rows)
        wide[here, group * channels : (group + 1) * channels] = layer.weight.detach()[here]
    alone = copy.deepcopy(layer)
    alone.groups, alone.weight = 1, nn.Parameter(wide)
    return alone
