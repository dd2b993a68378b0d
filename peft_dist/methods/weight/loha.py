"""LoHa: dW = s (A1 B1) * (A2 B2), elementwise, with s = alpha / r: a rank of up to r^2.

FedPara: Hyeon-Woo et al. 2022, arXiv:2108.06098; as LyCORIS has it: Yeh et al. 2024, arXiv:2309.14859. With
`use_effective_conv2d` a convolution's factors are T (r, r, kernel) times (r, out) and (r, channels), the
paper's proposition 3.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from peft_dist import starts
from peft_dist.config import TargetedConfig
from peft_dist.contract import BaseLayer, Enter, Param, Params, Site
from peft_dist.lazy import lazy
from peft_dist.methods.weight.lycoris import LycorisMethod

if TYPE_CHECKING:
    from torch import Tensor

torch, fused = lazy("torch"), lazy("peft_dist.fused")


@dataclass
class LoHaConfig(TargetedConfig, LycorisMethod):
    """HF PEFT's LoHaConfig.

    Args:
        rank_pattern, alpha_pattern: other ranks and alphas, by regular expressions on the ends of names.
        r: rank of each of the two products, at least 1.
        alpha: scales the update by alpha / r.
        rank_dropout: share of the rows of dW that are zero in a training step, in [0, 1).
        module_dropout: how often a layer's whole dW is left out of a training step, in [0, 1).
        use_effective_conv2d: decompose kernels larger than 1 too.
        init_weights: True: the last factor is zero; False: all are random.
        layers_to_transform: indices of the layers to adapt; all where None.
        layers_pattern: name of the list of layers that those indices count.
    """

    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    r: int = 8
    alpha: int = 8
    rank_dropout: float = 0.0
    module_dropout: float = 0.0
    use_effective_conv2d: bool = False
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    init_weights: bool = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None

    prefix: ClassVar[str] = "hada_"
    full_size: ClassVar[int] = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = "LOHA"
        self.check_layers(of_str=False)
        self.check()

    def params(self, site: Site) -> dict[str, Param]:
        r, random = self.rank(site), starts.kaiming_uniform
        wanted = {}
        for i, last in ((1, random), (2, starts.zeros if self.init_weights else random)):
            if self.is_tensor(site):
                channels = site.in_ // math.prod(site.kernel)
                wanted[f"T{i}"] = self.core(f"hada_t{i}", site)
                wanted[f"A{i}"] = Param(f"hada_w{i}_a", ("r", "out"), (r, site.out), random)
                wanted[f"B{i}"] = Param(f"hada_w{i}_b", ("r", "channels"), (r, channels), last)
            else:
                wanted[f"A{i}"] = Param(f"hada_w{i}_a", ("out", "r"), (site.out, r), random)
                wanted[f"B{i}"] = Param(f"hada_w{i}_b", ("r", "in"), (r, site.in_), last)
        return wanted

    def delta(self, p: Params, base: BaseLayer) -> Tensor:
        s = self.scaling(base.site)
        if not self.is_tensor(base.site):
            return fused.hadamard(p["A1"], p["B1"], p["A2"], p["B2"], s)
        factors = [p[f"{name}{i}"] for i in (1, 2) for name in ("T", "A", "B")]
        # The backward makes both products again.
        return s * torch.utils.checkpoint.checkpoint(_product, *factors, use_reentrant=False)

    def forward(self, p: Params, base: BaseLayer, x: Tensor, enter: Enter) -> Tensor:
        if self.is_thinned(p):
            return super().forward(p, base, x, enter)
        return fused.by_delta(self, p, base, x, enter)

    def added(self, p: Params, base: BaseLayer, x: Tensor) -> Tensor:
        return self.thinned(base.apply(self.delta(p, base), x), p, base.site)


def _product(T1: Tensor, A1: Tensor, B1: Tensor, T2: Tensor, A2: Tensor, B2: Tensor) -> Tensor:
    first, second = (
        torch.einsum("ijkl,io,jc->ockl", T, A, B).flatten(1) for T, A, B in ((T1, A1, B1), (T2, A2, B2))
    )
    return first * second
