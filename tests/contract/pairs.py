"""What two methods on one base come to: composed, or refused."""

from __future__ import annotations

import copy
import hashlib
import tempfile
import warnings
from itertools import combinations_with_replacement
from pathlib import Path

import torch
from torch import Tensor, nn

import peft_dist
from peft_dist import inject
from peft_dist.adapted import Adapted, Replaced
from peft_dist.catalog import METHODS, config_class
from peft_dist.contract import ReplaceMethod, SiteMethod
from peft_dist.errors import PeftDistError
from tests.contract import bases
from tests.contract.methods import xlora
from tests.contract.test_fields import base_values

# Of a package of someone else's none is here: the table is of this package's.
NAMES = tuple(METHODS)
PAIRS = tuple(combinations_with_replacement(NAMES, 2))
TOKENS = {"token_indices": [12, 13]}
IDS = torch.arange(1, 15).view(2, 7)
SOME = {
    "LN_TUNING": {"target_modules": ["input_layernorm"]},
    "MULTITASK_PROMPT_TUNING": {"num_tasks": 2},
    "POLY": {"n_tasks": 2},
}


def config(name: str, **more):
    special = {"hidden_size": 16, "adapters": xlora._experts()} if name == "XLORA" else SOME.get(name, {})
    return config_class(name)(**{**base_values(name), **special, **more})


def base() -> nn.Module:
    return bases.llama().double().eval()


def fill(model) -> None:
    """Moves every trained tensor, by its name: the same adapter whatever stands beside it."""
    with torch.no_grad():
        for key, p in model.named_parameters():
            if p.requires_grad and p.is_floating_point():
                seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big")
                noise = torch.randn(
                    p.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.double
                )
                p.add_((0.1 * noise).to(p))


def logits(model) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


def composed(model, names: list[str]) -> nn.Module:
    """The base with each layer's weight and bias changed by what its adapters come to together."""
    plain = base()
    with torch.no_grad():
        for name, module in inject.adapter_modules(model.get_base_model()):
            layer = plain.get_submodule(name)
            if isinstance(module, Adapted):
                dW, db = module.change(names)
                if dW is not None:
                    layer.weight.add_(module.base._as_stored(dW))
                if db is not None:
                    layer.bias.add_(db)
            elif isinstance(module, Replaced):
                for key, value in module.tensors([n for n in names if n in module.methods][-1]).items():
                    layer.get_parameter(key).copy_(value)
    return plain


def same(a: Tensor, b: Tensor) -> bool:
    """In float64; methods that compute in fp32 (a transform, a stored fp32 tensor) leave its rounding."""
    return torch.allclose(a, b, rtol=1e-4, atol=1e-5)


def outcome(one: str, other: str) -> str:
    """`sum`, `chain`, or `refused: WHY`; anything else is a fault that it names."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        try:
            model = peft_dist.get_peft_model(base(), config(one), "a", mixed=True)
            # Two adapters cannot both own one token's vector.
            model.add_adapter("b", config(other, **(TOKENS if one == other == "TRAINABLE_TOKENS" else {})))
            model.set_adapter(["a", "b"])
        except PeftDistError as error:
            return f"refused: {error}"
        fill(model)
        model.eval()
        want = logits(model)
        if same(want, logits(base())):
            return "fault: nothing changes"
        if not same(want, logits(composed(model, ["a", "b"]))):
            return "fault: not the dense composition"
        model.set_adapter(["b", "a"])
        if not same(logits(model), logits(composed(model, ["b", "a"]))):
            return "fault: not the dense composition in the other order"
        model.set_adapter(["a", "b"])
        merged = copy.deepcopy(model).merge_and_unload()
        if not same(want, logits(merged)):
            return "fault: merged differs"
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            again = peft_dist.PeftMixedModel.from_pretrained(base(), Path(folder) / "a", "a")
            again.load_adapter(Path(folder) / "b", "b")
            again.set_adapter(["a", "b"])
            if not same(want, logits(again.eval())):
                return "fault: loaded differs"
    return how(one, other)


def how(one: str, other: str) -> str:
    """Whether two methods on a layer add, or act one after the other."""
    kinds = [config_class(name) for name in (one, other)]
    if any(issubclass(kind, ReplaceMethod) for kind in kinds):
        return "chain"
    assert all(issubclass(kind, SiteMethod) for kind in kinds)
    return "sum" if all(config(name).compose == "add" for name in (one, other)) else "chain"
