"""A new adapter from a weighted combination of others: `add_weighted_adapter` of LoRA and IA3.

What is combined are the changes of W that the adapters make, in fp32: `linear` and `cat` put their factors side by
side, which is exact and has the sum of their ranks; the others combine the changes and keep the strongest
directions, as many as `svd_rank` or the largest rank where the name ends in `svd`, else as the ranks' sum. HF PEFT
combines A and B each by itself in `linear`, `ties`, `dare_linear`, `dare_ties` and `magnitude_prune`, so that one
adapter's B meets another's A.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from peft_dist import checkpoint
from peft_dist.adapted import Adapted, AdapterModule, Replaced
from peft_dist.arithmetic import combine
from peft_dist.errors import AdapterError, ConfigError, suggest
from peft_dist.inject import adapter_modules
from peft_dist.methods.lora.plain import as_plain

EXACT = ("linear", "cat")
_OF_DELTAS = ("svd", "ties", "dare_linear", "dare_ties", "magnitude_prune")
COMBINATIONS = (*EXACT, *_OF_DELTAS, *(f"{name}_svd" for name in _OF_DELTAS[1:]))


class WeightedLora:
    """LoRA's part."""

    model: nn.Module
    peft_config: dict[str, Any]

    @torch.no_grad()
    def add_weighted_adapter(
        self: Any,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: str = "svd",
        svd_rank: int | None = None,
        svd_clamp: float | None = None,
        svd_full_matrices: bool = True,
        svd_driver: str | None = None,
        density: float | None = None,
        majority_sign_method: Literal["total", "frequency"] = "total",
    ) -> None:
        """Adds the combination of `adapters` under `adapter_name`; it is neither active nor trained.

        Args:
            weights: of each; negative ones take an adapter's change away.
            combination_type: one of `COMBINATIONS`. A single adapter is scaled exactly whatever it says.
            svd_rank: of a type that ends in `svd`; the adapters' largest by default.
            svd_clamp: bound of the factors' entries, as a quantile of them.
            svd_full_matrices, svd_driver: of `torch.linalg.svd`.
            density: share of entries that the pruning types keep, in [0, 1].
            majority_sign_method: how the `ties` types elect a sign.

        Raises:
            AdapterError: an adapter that is not there or no LoRA, a name that is taken.
            ConfigError: no such combination, or one that these adapters cannot have.
        """
        _check_adapters(self, adapters, weights, adapter_name, "LORA")
        exact = combination_type in EXACT or len(adapters) == 1
        _check_type(combination_type, density, exact)
        configs = [self.peft_config[name] for name in adapters]
        _check_configs(adapters, configs)
        kept = _modules_kept(self.model, adapters)
        made: dict[str, tuple[Tensor, Tensor]] = {}
        biases: dict[str, Tensor] = {}
        for name, module in adapter_modules(self.model):
            here = [(a, w) for a, w in zip(adapters, weights, strict=True) if _has_factors(module, a)]
            if not here:
                continue
            if module.base.site.groups > 1:  # type: ignore[union-attr, operator]
                raise ConfigError(
                    f"add_weighted_adapter: {name!r} is a convolution with groups, where LoRA's factors cannot be "
                    "combined. Merge the adapters one after the other, or leave the layer out of their targets."
                )
            if exact:
                made[name] = _side_by_side(module, here)
            else:
                delta = _combined(module, here, combination_type, density, majority_sign_method)
                ranks = [_rank(module, a) for a, _ in here]
                by_svd = combination_type.endswith("svd")
                r = (svd_rank or max(ranks)) if by_svd else sum(ranks)
                made[name] = _factored(delta, r, svd_clamp, svd_full_matrices, svd_driver)
            shifts = [
                w * shift
                for a, w in here
                if (shift := module.methods[a].bias_delta(module.tensors(a), module.base)) is not None
            ]
            if shifts:
                biases[name] = torch.stack(shifts).sum(0)
        _put(self, adapter_name, _config(configs, made, bool(biases), kept))
        for name, module in adapter_modules(self.model):
            if adapter_name in module.adapters and isinstance(module, Adapted):
                own = module.tensors(adapter_name)
                B, A = made.get(name, (None, None))
                for key, value in (("A", A), ("B", B), ("c", biases.get(name))):
                    if key in own and value is None:
                        own[key].zero_()
                    elif key in own:
                        own[key].copy_(value.reshape(own[key].shape))  # type: ignore[union-attr]
            elif isinstance(module, Replaced) and name in kept:
                for key, tensor in module.tensors(adapter_name).items():
                    tensor.copy_(module.tensors(kept[name])[key])
        self.set_requires_grad(adapter_name, False)

    def subtract_mutated_init(
        self: Any, output_state_dict: Mapping[str, Tensor], adapter_name: str, kwargs: Any = None
    ) -> dict[str, Tensor]:
        """The tensors of an adapter that started from the base's own directions, as a plain LoRA of twice its rank.

        Args:
            output_state_dict: its tensors now. adapter_name: an adapter that has those of its start.
        """
        initial = checkpoint.state_dict(self, adapter_name, (kwargs or {}).get("state_dict"))
        # A PeftModel's names begin one part higher.
        initial |= {f"base_model.{key}": tensor for key, tensor in initial.items()}
        return as_plain(self.peft_config[adapter_name], output_state_dict, initial)[1]


class WeightedIA3:
    """IA3's part."""

    @torch.no_grad()
    def add_weighted_adapter(
        self: Any, adapters: Sequence[str], weights: Sequence[float], adapter_name: str
    ) -> None:
        """Adds an adapter whose scales are the weighted sum of the scales of `adapters`; it is neither active nor
        trained.

        Raises:
            AdapterError: an adapter that is not there or no IA3, a name that is taken.
            ConfigError: targets of different kinds, or a module that several of them train whole.
        """
        _check_adapters(self, adapters, weights, adapter_name, "IA3")
        configs = [self.peft_config[name] for name in adapters]
        kept = _modules_kept(self.model, adapters)
        config = copy.copy(configs[0])
        for field in ("target_modules", "feedforward_modules"):
            setattr(config, field, _union(field, [getattr(each, field) for each in configs]))
        config.modules_to_save = _saved_names(configs)
        _put(self, adapter_name, config)
        for name, module in adapter_modules(self.model):
            if adapter_name not in module.adapters:
                continue
            own = module.tensors(adapter_name)
            if isinstance(module, Replaced) and name in kept:
                for key, tensor in own.items():
                    tensor.copy_(module.tensors(kept[name])[key])
            elif not isinstance(module, Replaced):
                for key, tensor in own.items():
                    tensor.zero_()
                    for adapter, weight in zip(adapters, weights, strict=True):
                        if adapter in module.adapters:
                            tensor.add_(weight * module.tensors(adapter)[key])
        self.set_requires_grad(adapter_name, False)


class NoWeighted:
    """Of a method whose adapters cannot be combined."""

    def add_weighted_adapter(self: Any, *args: Any, **kwargs: Any) -> None:
        """Refuses."""
        raise TypeError(
            f"{type(self).__name__} does not support add_weighted_adapter: its ranks belong to one training. "
            "Convert its adapters to LoRA and combine those."
        )


# What may be combined


def _put(tuner: Any, adapter: str, config: Any) -> None:
    """Adds an adapter, or leaves the tuner as it was."""
    tuner.peft_config[adapter] = config
    try:
        tuner.inject_adapter(tuner.model, adapter)
    except BaseException:
        del tuner.peft_config[adapter]
        raise


def _check_adapters(
    tuner: Any, adapters: Sequence[str], weights: Sequence[float], adapter_name: str, method: str
) -> None:
    where = "add_weighted_adapter"
    if not adapters:
        raise AdapterError(f"{where}: no adapter is named. Name at least one.")
    for name in adapters:
        if name not in tuner.peft_config:
            raise AdapterError(
                f"{where}: adapter {name!r} does not exist; there are: {', '.join(tuner.peft_config)}."
                f"{suggest(name, tuner.peft_config)}"
            )
        if tuner.peft_config[name].peft_type != method:
            raise AdapterError(
                f"{where}: adapter {name!r} is {tuner.peft_config[name].peft_type}; here adapters of {method} "
                "are combined."
            )
    if len(adapters) != len(weights):
        raise ConfigError(f"{where}: {len(weights)} weights for {len(adapters)} adapters. Give one for each.")
    if adapter_name in tuner.peft_config:
        raise AdapterError(
            f"{where}: the model has an adapter {adapter_name!r} already. Delete it, or choose another name."
        )


def _check_type(combination_type: str, density: float | None, exact: bool) -> None:
    if combination_type not in COMBINATIONS:
        raise ConfigError(
            f"combination_type: {combination_type!r} is not one of {', '.join(COMBINATIONS)}."
            f"{suggest(combination_type, COMBINATIONS)}"
        )
    prunes = combination_type.startswith(("ties", "dare", "magnitude"))
    if prunes and not exact and (density is None or not 0 <= density <= 1):
        raise ConfigError(f"density: {density!r}; {combination_type} needs a share in [0, 1].")


def _check_configs(adapters: Sequence[str], configs: Sequence[Any]) -> None:
    for name, config in zip(adapters, configs, strict=True):
        for field, absent in (
            ("target_parameters", None),
            ("trainable_token_indices", None),
            ("bias", "none"),
        ):
            if getattr(config, field) not in (absent, []):
                raise ConfigError(
                    f"add_weighted_adapter: adapter {name!r} has {field}, which cannot be combined."
                )


def _modules_kept(model: nn.Module, adapters: Sequence[str]) -> dict[str, str]:
    """A module's name -> the one adapter that trains it whole."""
    kept = {}
    for name, module in adapter_modules(model):
        owners = [a for a in adapters if isinstance(module, Replaced) and a in module.adapters]
        if len(owners) > 1:
            raise ConfigError(
                f"modules_to_save: {', '.join(owners)} each train {name!r} whole; such copies cannot be combined."
            )
        if owners:
            kept[name] = owners[0]
    return kept


def _has_factors(module: AdapterModule, adapter: str) -> bool:
    return isinstance(module, Adapted) and adapter in module.adapters and "A" in module.wanted(adapter)


def _rank(module: Any, adapter: str) -> int:
    return module.methods[adapter].rank(module.base.site)


# How


def _side_by_side(module: Any, here: Sequence[tuple[str, float]]) -> tuple[Tensor, Tensor]:
    """(B (out, sum of ranks), A (sum of ranks, in)) of the weighted sum."""
    Bs, As = [], []
    for adapter, weight in here:
        found = module.methods[adapter].factors(module.tensors(adapter), module.base.site)
        if found is None:
            raise ConfigError(
                f"add_weighted_adapter: at {module.base.site.name!r} the change of adapter {adapter!r} is not of "
                "low rank, so factors cannot stand side by side. Use combination_type 'svd'."
            )
        # A sum of fp32 factors loses nothing of what half-precision ones hold.
        Bs.append(weight * found[0].float() if found[0].itemsize < 4 else weight * found[0])
        As.append(found[1].to(Bs[-1].dtype))
    return torch.cat(Bs, dim=1), torch.cat(As, dim=0)


def _combined(
    module: Any,
    here: Sequence[tuple[str, float]],
    combination_type: str,
    density: float | None,
    majority_sign_method: Any,
) -> Tensor:
    """dW (out, in)."""
    deltas = [module.methods[a].delta(module.tensors(a), module.base) for a, _ in here]
    deltas = [d.float() if d.itemsize < 4 else d for d in deltas]
    weights = deltas[0].new_tensor([w for _, w in here])
    kind = combination_type.removesuffix("_svd")
    if kind == "svd":
        return combine.task_arithmetic(deltas, weights)
    more = (majority_sign_method,) if kind.endswith("ties") else ()
    return getattr(combine, kind)(deltas, weights, density, *more)


def _factored(
    delta: Tensor, r: int, clamp: float | None, full_matrices: bool, driver: str | None
) -> tuple[Tensor, Tensor]:
    """(B (out, k), A (k, in)), the k strongest directions; k is r, or all that there are."""
    U, S, Vh = torch.linalg.svd(delta, full_matrices=full_matrices, driver=driver)
    k = min(r, len(S))
    B, A = U[:, :k] * S[:k], Vh[:k]
    if clamp is not None:
        bound = torch.quantile(torch.cat([B.flatten(), A.flatten()]), clamp)
        B, A = B.clamp(-bound, bound), A.clamp(-bound, bound)
    return B, A


def _config(
    configs: Sequence[Any],
    made: Mapping[str, tuple[Tensor, Tensor]],
    with_bias: bool,
    kept: Mapping[str, str],
) -> Any:
    """Of a plain LoRA on exactly these layers, each with alpha equal to its rank, so that s is 1."""
    ranks = {name: len(A) for name, (_, A) in made.items()}
    r = max(ranks.values(), default=1)
    other = {name: rank for name, rank in ranks.items() if rank != r}
    return dataclasses.replace(
        configs[0],
        r=r,
        lora_alpha=r,
        rank_pattern=other,
        alpha_pattern=dict(other),
        target_modules=_targets(configs, list(made)),
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
        modules_to_save=_saved_names(configs),
        init_lora_weights=True,
        eva_config=None,
        corda_config=None,
        loftq_config={},
        use_rslora=False,
        use_dora=False,
        lora_bias=with_bias,
        inference_mode=False,
    )


def _targets(configs: Sequence[Any], names: list[str]) -> list[str] | str:
    """As the configs have them, where their union means the same layers; else the layers' names."""
    wholly = all(
        c.exclude_modules is None and c.layers_to_transform is None and c.target_modules is not None
        for c in configs
    )
    given = [c.target_modules for c in configs]
    if wholly and len({type(each) for each in given}) == 1 and "all-linear" not in given:
        return _union("target_modules", given)
    return names


def _union(field: str, given: Sequence[Any]) -> Any:
    if len({type(each) for each in given}) > 1:
        raise ConfigError(
            f"add_weighted_adapter: {field} are of different kinds, {' and '.join(map(repr, given))}. Give lists, "
            "or regular expressions, to all adapters."
        )
    if isinstance(given[0], str):
        return given[0] if len(set(given)) == 1 else "|".join(f"({each})" for each in given)
    if given[0] is None:
        return None
    return {name for each in given for name in each}


def _saved_names(configs: Sequence[Any]) -> list[str] | None:
    return list(dict.fromkeys(name for c in configs for name in c.modules_to_save or ())) or None
