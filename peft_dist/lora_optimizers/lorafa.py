"""LoRA-FA: A stays as it started and B follows the gradient of W as closely as A allows (Zhang et al. 2023,
arXiv:2308.03303): B's gradient is G_B (A A')^-1 / s^2, and the step is AdamW's.

HF PEFT rounds that product to bf16 where the machine can; here it is made in the gradient's own dtype.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from peft_dist.adapted import Adapted
from peft_dist.errors import OptimizerError


class LoraFAOptimizer(Optimizer):
    """AdamW whose gradients of B are projected.

    Args:
        params: what is trained. frozen: for each B its A and s.
        lr, betas, eps, weight_decay: of AdamW. correct_bias: of its means.

    Raises:
        OptimizerError: one of them lies out of its range.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        frozen: Mapping[nn.Parameter, tuple[Tensor, float]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        correct_bias: bool = True,
    ) -> None:
        for name, value, most in (
            ("lr", lr, math.inf),
            ("eps", eps, math.inf),
            *(("betas", b, 1) for b in betas),
        ):
            if not 0 <= value < most:
                raise OptimizerError(f"LoraFAOptimizer: {name} is {value!r}; it lies in [0, {most}).")
        self.frozen = dict(frozen)
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {**defaults, "correct_bias": correct_bias})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step; what `closure` gave."""
        loss = closure() if closure is not None else None
        for group in self.param_groups:
            first, second = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                gradient, state = self._projected(p), self.state[p]
                if not state:
                    state.update(step=0, exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
                state["step"] += 1
                state["exp_avg"].mul_(first).add_(gradient, alpha=1 - first)
                state["exp_avg_sq"].mul_(second).addcmul_(gradient, gradient, value=1 - second)
                size = group["lr"]
                if group["correct_bias"]:
                    size *= math.sqrt(1 - second ** state["step"]) / (1 - first ** state["step"])
                p.addcdiv_(state["exp_avg"], state["exp_avg_sq"].sqrt().add_(group["eps"]), value=-size)
                p.mul_(1 - group["lr"] * group["weight_decay"])
        return loss

    def _projected(self, p: nn.Parameter) -> Tensor:
        if p not in self.frozen:
            return p.grad  # type: ignore[return-value]
        A, s = self.frozen[p]
        A = A.flatten(1).float()
        inverse = torch.linalg.pinv(A @ A.mT + 1e-8 * torch.eye(len(A), device=A.device))
        assert p.grad is not None
        return (p.grad.flatten(1).float() @ inverse / s**2).to(p.dtype).view_as(p)


def create_lorafa_optimizer(
    model: nn.Module,
    r: int,
    lora_alpha: int,
    lr: float,
    weight_decay: float = 0.0,
    use_rslora: bool | None = None,
) -> LoraFAOptimizer:
    """An optimizer of the model's trained parameters; every A is frozen.

    Args:
        r, lora_alpha: as HF PEFT has them; each layer's own are used.
        use_rslora: deprecated; must be what the active adapters' configs say.

    Raises:
        OptimizerError: `use_rslora` is not what a config says, or there is no LoRA to train.
    """
    configs = getattr(model, "peft_config", {})
    if use_rslora is not None:
        active: Any = getattr(model, "active_adapters", [])
        wrong = [n for n in active if bool(getattr(configs.get(n), "use_rslora", False)) != use_rslora]
        if wrong:
            raise OptimizerError(
                f"create_lorafa_optimizer: use_rslora is {use_rslora}, but the configs of {', '.join(wrong)} say "
                "otherwise. Leave it out: the configs are used."
            )
        warnings.warn(
            "create_lorafa_optimizer: use_rslora is deprecated; the configs are used.", FutureWarning, 2
        )
    frozen: dict[nn.Parameter, tuple[Tensor, float]] = {}
    for module in model.modules():
        if not isinstance(module, Adapted):
            continue
        for name in module.adapters:
            p = module.tensors(name)
            if {"A", "B"} <= p.keys() and p["B"].requires_grad and module.base.site.kind != "embedding":
                assert isinstance(p["B"], nn.Parameter)
                p["A"].requires_grad_(False)
                frozen[p["B"]] = (p["A"], module.methods[name].scaling(module.base.site))
    if not frozen:
        raise OptimizerError(
            "create_lorafa_optimizer: the model trains no LoRA on a layer other than an embedding."
        )
    return LoraFAOptimizer(
        (p for p in model.parameters() if p.requires_grad), frozen, lr, weight_decay=weight_decay
    )
