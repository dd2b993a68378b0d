"""KappaTune (arXiv:2506.16289): targets by how well conditioned their weights are."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from peft_dist.base_layer import door

EXPERTS = (".gate_up_proj", ".down_proj", ".gate_proj", ".up_proj")


class KappaTuneSelector:
    """The linear layers, and the stacked experts, of a model, those with the smallest condition numbers first.

    Args:
        max_dim_size_to_analyze: layers of which one side is larger are left out.
        moe_param_suffixes: how names of Parameters (experts, rows, columns) end that are looked at.
        show_progress: tell how far the decompositions are.
    """

    def __init__(
        self,
        model: nn.Module,
        max_dim_size_to_analyze: int = 16384,
        moe_param_suffixes: tuple[str, ...] | None = None,
        show_progress: bool = True,
    ) -> None:
        self.model = model
        self.max_dim_size_to_analyze = max_dim_size_to_analyze
        self.moe_param_suffixes = tuple(moe_param_suffixes or EXPERTS)
        self.show_progress = show_progress
        self._kappas: tuple[dict[str, float], dict[str, float]] | None = None

    def get_best_targets(
        self, top_p: float | None = None, num_modules: int | None = None, threshold: float | None = None
    ) -> list[str]:
        """Names of linear layers: `num_modules` of them, else the share `top_p`, else those whose condition number
        is at most `threshold`, else all."""
        return _first(self._both()[0], top_p, num_modules, threshold)

    def get_best_target_parameters(
        self, top_p: float | None = None, num_modules: int | None = None, threshold: float | None = None
    ) -> list[str]:
        """Names of Parameters that hold experts, chosen as `get_best_targets` does; a Parameter's condition number
        is the mean of its experts'."""
        return _first(self._both()[1], top_p, num_modules, threshold)

    def _both(self) -> tuple[dict[str, float], dict[str, float]]:
        if self._kappas is None:
            most = self.max_dim_size_to_analyze
            linear = [
                (name, module)
                for name, module in self.model.named_modules()
                if isinstance(module, nn.Linear) and max(module.in_features, module.out_features) <= most
            ]
            experts = [
                (name, parameter)
                for name, parameter in self.model.named_parameters()
                if parameter.ndim == 3
                and name.endswith(self.moe_param_suffixes)
                and max(parameter.shape[1:]) <= most
            ]
            self._kappas = (
                {n: _kappa(door(m, n).weight()) for n, m in self._told(linear)},
                {n: _kappa(p.detach()) for n, p in self._told(experts)},
            )
        return self._kappas

    def _told(self, found: Sequence[tuple[str, Any]]) -> Iterable[tuple[str, Any]]:
        return tqdm(
            found, desc="condition numbers", unit="layer", disable=not self.show_progress or not found
        )


def _kappa(weight: Tensor) -> float:
    values = torch.linalg.svdvals(weight.float())
    return float((values[..., 0] / values[..., -1].clamp(min=torch.finfo(values.dtype).tiny)).mean())


def _first(
    kappas: dict[str, float], top_p: float | None, num_modules: int | None, threshold: float | None
) -> list[str]:
    ordered = sorted(kappas, key=kappas.__getitem__)
    if num_modules is not None:
        return ordered[:num_modules]
    if top_p is not None:
        return ordered[: max(1, int(len(ordered) * top_p))]
    return [name for name in ordered if threshold is None or kappas[name] <= threshold]


def find_kappa_target_modules(
    model: nn.Module,
    top_p: float = 0.2,
    max_dim_size_to_analyze: int = 16384,
    moe_param_suffixes: tuple[str, ...] | None = None,
    show_progress: bool = True,
) -> dict[str, list[str] | None]:
    """LoRA's `target_modules` and `target_parameters` (None without experts): of each the share `top_p` with the
    smallest condition numbers."""
    selector = KappaTuneSelector(model, max_dim_size_to_analyze, moe_param_suffixes, show_progress)
    return {
        "target_modules": selector.get_best_targets(top_p),
        "target_parameters": selector.get_best_target_parameters(top_p) or None,
    }
