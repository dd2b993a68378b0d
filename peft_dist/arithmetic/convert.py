"""Any adapter that changes linear layers as a LoRA: the strongest directions of its dW."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from peft_dist import checkpoint
from peft_dist.adapted import Adapted, Replaced
from peft_dist.errors import ConfigError, ConversionError
from peft_dist.inject import adapter_modules
from peft_dist.methods.lora.plain import as_plain
from peft_dist.methods.weight.lora import LoraConfig

_PREFIX = "base_model.model."


@torch.no_grad()
def convert_to_lora(
    model: nn.Module,
    rank: int | float,
    adapter_name: str = "default",
    progressbar: bool = False,
    compile_kwargs: dict[str, Any] | None = None,
) -> tuple[LoraConfig, dict[str, Tensor]]:
    """(config, tensors by their names in a checkpoint) of a LoRA that does what the adapter does, s = 1.

    Args:
        rank: of every layer, or, as a float in (0, 1], the share of the squared singular values that a layer's
            rank is to keep.
        progressbar: shows how far it is.
        compile_kwargs: of `torch.compile`, for the decomposition.

    Raises:
        ConfigError: no such rank, or the adapter trains biases.
        ConversionError: a layer that is not linear, whose change no two factors say, or no layer at all.
    """
    config = getattr(model, "peft_config", {}).get(adapter_name)
    _check(config, rank)
    whole: Any = model
    base = whole.get_base_model() if hasattr(whole, "get_base_model") else whole
    factored = torch.compile(_factored, **compile_kwargs) if compile_kwargs is not None else _factored
    prefix = _PREFIX if config is not None else ""
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    saved: list[str] = []
    layers = [(name, module) for name, module in adapter_modules(base) if adapter_name in module.adapters]
    for name, module in tqdm(layers, desc="Converting to LoRA", disable=not progressbar):
        if isinstance(module, Replaced) and type(module.methods[adapter_name]).__name__ == "ModulesToSave":
            saved.append(name)
            tensors |= {f"{prefix}{name}.{k}": t.detach() for k, t in module.tensors(adapter_name).items()}
            continue
        dW = _change(name, module, adapter_name)
        B, A = factored(dW.float() if dW.itemsize < 4 else dW, rank)
        dtype = next((t.dtype for t in module.tensors(adapter_name).values()), dW.dtype)
        ranks[name] = len(A)
        tensors[f"{prefix}{name}.lora_A.weight"] = A.to(dtype).contiguous()
        tensors[f"{prefix}{name}.lora_B.weight"] = B.to(dtype).contiguous()
    if not ranks:
        raise ConversionError(
            f"convert_to_lora: adapter {adapter_name!r} changes no layer here. Nothing is to be converted."
        )
    r = rank if isinstance(rank, int) else max(ranks.values())
    other = {name: k for name, k in ranks.items() if k != r}
    lora = LoraConfig(
        r=r,
        lora_alpha=r,
        target_modules=list(ranks),
        rank_pattern=other,
        alpha_pattern=dict(other),
        modules_to_save=list(getattr(config, "modules_to_save", None) or saved) or None,
        task_type=getattr(config, "task_type", None),
        base_model_name_or_path=getattr(config, "base_model_name_or_path", None),
    )
    return lora, tensors


def save_as_lora(
    path: str | os.PathLike[str],
    model: nn.Module,
    rank: int | float,
    adapter_name: str = "default",
    progressbar: bool = False,
    compile_kwargs: dict[str, Any] | None = None,
) -> None:
    """Writes what `convert_to_lora` gives as an adapter's directory.

    Raises:
        ConfigError, ConversionError: as `convert_to_lora`.
    """
    config, tensors = convert_to_lora(model, rank, adapter_name, progressbar, compile_kwargs)
    config.inference_mode = True
    folder = Path(path)
    config.save_pretrained(folder)
    tensors = {key: t.cpu().contiguous() for key, t in tensors.items()}
    safetensors.torch.save_file(tensors, folder / checkpoint.WEIGHTS_NAME, metadata={"format": "pt"})


def to_plain(path: str | os.PathLike[str] | None) -> Any:
    """What `checkpoint.save` is to make of an adapter that started from the base's own directions: a plain LoRA.

    Args:
        path: of the adapter as it started; what it started from is known without where None.

    Raises:
        ConfigError: the adapter there says of itself that it starts from the base.
    """
    if path is None:
        return as_plain
    initial = checkpoint.read(path)
    start = str(getattr(initial.config, "init_lora_weights", True)).lower()
    if start.startswith("pissa") or start in ("corda", "olora"):
        raise ConfigError(
            f"path_initial_model_for_weight_conversion: the adapter there has init_lora_weights {start!r}, so its "
            "factors would be taken out of the base again. Set it to True before saving it."
        )
    return lambda config, tensors: as_plain(config, tensors, initial.tensors)


def _check(config: Any, rank: int | float) -> None:
    if isinstance(rank, float) and not 0 < rank <= 1:
        raise ConfigError(f"convert_to_lora: rank {rank!r}; as a float it is a share in (0, 1].")
    if isinstance(rank, int) and rank < 1:
        raise ConfigError(f"convert_to_lora: rank {rank!r}; it is at least 1.")
    bias = getattr(config, "bias", None) or "none"
    if bias != "none" or getattr(config, "lora_bias", False):
        raise ConfigError(
            f"convert_to_lora: the adapter trains biases ({bias!r}), which a LoRA's factors have not."
        )


def _change(name: str, module: Any, adapter: str) -> Tensor:
    method = type(getattr(module, "methods", {}).get(adapter)).__name__
    if not isinstance(module, Adapted) or module.base.site.kind != "linear":
        raise ConversionError(
            f"convert_to_lora: {name!r} is no linear layer, or {method} does not change its weight; only such "
            "changes are converted."
        )
    dW, db = module.change([adapter])
    if dW is None or db is not None:
        raise ConversionError(f"convert_to_lora: {method} changes more of {name!r} than its weight.")
    return dW


def _factored(dW: Tensor, rank: int | float) -> tuple[Tensor, Tensor]:
    """(B (out, k), A (k, in)): the k strongest directions."""
    U, S, Vh = torch.linalg.svd(dW, full_matrices=False)
    k = rank
    if isinstance(rank, float):
        energy = S.square().cumsum(0)
        k = min(int(torch.searchsorted(energy, rank * energy[-1])) + 1, len(S))
    if k > len(S):
        raise ConfigError(
            f"convert_to_lora: rank {rank} is larger than the layer, which has {len(S)} directions. Choose a lower "
            "one."
        )
    return U[:, : int(k)] * S[: int(k)], Vh[: int(k)]
