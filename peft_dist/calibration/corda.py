"""CorDA's preparation: W C = U S V' of each layer, C the covariance of what it takes in.

Yang et al. 2024, arXiv:2406.05223. A layer's factors are kept on it until an adapter starts from them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor, nn

from peft_dist.base_layer import door
from peft_dist.calibration.filled import check_filled
from peft_dist.errors import ConfigError
from peft_dist.inject import facts_of, places
from peft_dist.methods.lora.corda import EIGENS
from peft_dist.methods.lora.settings import CordaConfig
from peft_dist.methods.weight.lora import LoraConfig
from peft_dist.ranks import is_writer
from peft_dist.targets import by_pattern, resolve


@torch.no_grad()
def preprocess_corda(
    model: nn.Module,
    lora_config: LoraConfig,
    run_model: Callable[[], Any] | None = None,
    hooked_model: nn.Module | None = None,
) -> None:
    """Prepares a base for `get_peft_model` with init_lora_weights "corda"; with several ranks all call it together,
    each with samples of its own, and find what one would of all.

    Args:
        run_model: runs the model on samples; needed where no file holds their covariances.
        hooked_model: whose inputs are looked at, where that is another model with the same layers.

    Raises:
        ConfigError: no `corda_config`, nothing to learn from, or inputs that are not finite.
    """
    settings = lora_config.corda_config
    if settings is None:
        raise ConfigError("preprocess_corda: lora_config.corda_config must be given.")
    if settings.corda_method not in ("ipm", "kpm"):
        raise ConfigError(f"CordaConfig.corda_method: {settings.corda_method!r} is not one of ipm, kpm.")
    check_filled(model, "preprocess_corda")
    layers = _layers(model, lora_config)
    if settings.cache_file is not None and _holds(settings.cache_file):
        kept = safetensors.torch.load_file(settings.cache_file)
        for name, layer in layers.items():
            layer.__dict__[EIGENS] = tuple(kept[f"{name}.eigens.{part}_WC"] for part in "USV")
        return
    covariances = _covariances(layers, lora_config, settings, run_model, hooked_model)
    for name, layer in layers.items():
        r = by_pattern(lora_config.rank_pattern or {}, name, lora_config.r)
        if settings.verbose:
            print(f"CorDA: {name}")
        U, S, V = decomposed(door(layer, name).weight(), covariances[name])
        chosen = slice(0, r) if settings.corda_method == "ipm" else slice(len(S) - r, len(S))
        layer.__dict__[EIGENS] = (
            U[:, chosen].contiguous(),
            S[chosen].contiguous(),
            V[:, chosen].contiguous(),
        )
        if not settings.prune_temporary_fields:
            layer.__dict__["covariance_matrix"] = covariances[name]
    if settings.cache_file is not None:
        _keep(
            settings.cache_file,
            {
                f"{name}.eigens.{part}_WC": value
                for name, layer in layers.items()
                for part, value in zip("USV", layer.__dict__[EIGENS], strict=True)
            },
        )


def decomposed(W: Tensor, C: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(U (out, k), S (k,), V (in, k)) with W = U S V', from the decomposition of W C: the inverse of C, damped
    until it is exact, is in V."""
    W, C = W.float(), C.float()
    one, damp = torch.eye(len(C), device=C.device), 0.01
    while True:
        damped = C + one * C.diagonal().mean() * damp
        inverse = torch.linalg.inv(damped)
        if torch.dist(damped @ inverse, one) < 0.05:
            break
        damp *= 2
    U, S, Vh = torch.linalg.svd(W @ damped, full_matrices=False)
    return U, S, (Vh @ inverse).mT


def _layers(model: nn.Module, config: LoraConfig) -> dict[str, Any]:
    found = places(model)
    facts = facts_of(model, found)
    return {name: found[name].layer for name in resolve(config, facts) if facts.layers[name] == "linear"}


def _covariances(
    layers: dict[str, Any],
    config: LoraConfig,
    settings: CordaConfig,
    run_model: Callable[[], Any] | None,
    hooked_model: nn.Module | None,
) -> dict[str, Tensor]:
    """C (in, in) of each layer's inputs, each sample scaled by its largest entry, by the layer's name."""
    if settings.covariance_file is not None and _holds(settings.covariance_file):
        return safetensors.torch.load_file(settings.covariance_file)
    if run_model is None:
        raise ConfigError("preprocess_corda: give run_model, or a file that holds the covariances.")
    counts = dict.fromkeys(layers, 0)
    dtype = torch.float16 if settings.use_float16_for_covariance else torch.float32
    sums = {name: torch.zeros((), dtype=dtype) for name in layers}

    def note(name: str) -> Callable:
        def hook(module: nn.Module, args: tuple) -> None:
            x = args[0].detach().flatten(0, -2)
            x = (x if settings.use_float16_for_covariance else x.float()) / x.max().abs()
            sums[name] = sums[name] + (x.mT @ x).to(dtype) if counts[name] else (x.mT @ x).to(dtype)
            counts[name] += 1

        return hook

    hooked = layers if hooked_model is None else _layers(hooked_model, config)
    looked_at: Any = hooked_model
    if looked_at is not None:
        looked_at.eval()
    handles = [hooked[name].register_forward_pre_hook(note(name)) for name in layers if name in hooked]
    try:
        run_model()
    finally:
        for handle in handles:
            handle.remove()
    if dist.is_initialized():
        counts = _of_all_ranks(layers, sums, counts)
    unseen = [name for name in layers if not counts[name]]
    if unseen:
        raise ConfigError(
            f"preprocess_corda: run_model ran {len(unseen)} of {len(layers)} layers never, such as {unseen[0]!r}."
        )
    for name, value in sums.items():
        if not torch.isfinite(value).all():
            raise ConfigError(f"preprocess_corda: the input of {name!r} is not finite. Look at the samples.")
    covariances = {name: value / counts[name] for name, value in sums.items()}
    if settings.covariance_file is not None:
        _keep(settings.covariance_file, covariances)
    return covariances


def _of_all_ranks(layers: dict[str, Any], sums: dict[str, Tensor], counts: dict[str, int]) -> dict[str, int]:
    """How often all ranks ran each layer; `sums` become theirs."""
    of_ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(of_ranks, counts)
    for name, layer in layers.items():
        opened = door(layer, name)
        if not counts[name]:  # an expert to which no token of this rank's went
            sums[name] = sums[name].new_zeros(opened.site.in_, opened.site.in_, device=opened.device)
        dist.all_reduce(sums[name])
    return {name: sum(each[name] for each in of_ranks) for name in layers}


def _holds(file: str) -> bool:
    return Path(file).is_file() and Path(file).stat().st_size > 0


def _keep(file: str, tensors: dict[str, Tensor]) -> None:
    if not is_writer(None):
        return
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file({key: t.contiguous() for key, t in tensors.items()}, file)
