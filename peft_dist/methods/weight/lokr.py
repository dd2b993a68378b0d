"""LoKr: dW = s W1 (x) W2, a Kronecker product, with s = alpha / r; each factor whole or of low rank.

Yeh et al. 2024, arXiv:2309.14859. W1 is (o1, i1) and W2 (o2, i2) with o1 o2 = out and i1 i2 = in, as near to
each other as `decompose_factor` lets them be; r halves or more of a factor's size leaves it whole. On a
convolution in counts channels, and the kernel is W2's. A whole W2 of a Conv1d interleaves channels and kernel
as HF PEFT's does, so that its checkpoints mean the same.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from peft_dist import starts
from peft_dist.config import TargetedConfig
from peft_dist.contract import BaseLayer, Enter, Param, Params, Site
from peft_dist.errors import ConfigError
from peft_dist.lazy import lazy
from peft_dist.methods.weight.lycoris import LycorisMethod

if TYPE_CHECKING:
    from torch import Tensor

torch, fused = lazy("torch"), lazy("peft_dist.fused")


@dataclass
class LoKrConfig(TargetedConfig, LycorisMethod):
    """HF PEFT's LoKrConfig.

    Args:
        rank_pattern, alpha_pattern: other ranks and alphas, by regular expressions on the ends of names.
        r: rank of a factor that is not whole, at least 1.
        alpha: scales the update by alpha / r.
        rank_dropout: share of the rows of dW that are zero in a training step, in [0, 1).
        module_dropout: how often a layer's whole dW is left out of a training step, in [0, 1).
        use_effective_conv2d: decompose kernels larger than 1 too.
        decompose_both: W1 may be of low rank too.
        decompose_factor: o1 and i1 where they divide; else their upper bound; -1: as near to the root.
        rank_dropout_scale: rescale the rows that rank_dropout leaves.
        init_weights: True: W1 is zero; "lycoris": W2 is; False: all are random.
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
    decompose_both: bool = False
    decompose_factor: int = -1
    rank_dropout_scale: bool = False
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    init_weights: bool | Literal["lycoris"] = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None

    prefix: ClassVar[str] = "lokr_"
    full_size: ClassVar[int] = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = "LOKR"
        self.check_layers(of_str=False)
        self.check()
        if self.init_weights not in (True, False, "lycoris"):
            raise ConfigError(
                f"LoKrConfig.init_weights: {self.init_weights!r} is not one of True, False, 'lycoris'."
            )
        if self.decompose_factor != -1 and self.decompose_factor < 1:
            raise ConfigError(
                f"LoKrConfig.decompose_factor: {self.decompose_factor!r}; it is at least 1, or -1 for the root."
            )

    def sizes(self, site: Site) -> tuple[int, int, int, int]:
        """o1, o2, i1 and i2 at `site`."""
        channels = site.in_ // math.prod(site.kernel)
        return (*factors(site.out, self.decompose_factor), *factors(channels, self.decompose_factor))

    def facts(self, site: Site) -> dict[str, Any]:
        return {**super().facts(site), "rank_dropout_scale": self.rank_dropout_scale}

    def params(self, site: Site) -> dict[str, Param]:
        r, random = self.rank(site), starts.kaiming_uniform
        o1, o2, i1, i2 = self.sizes(site)
        first = starts.zeros if self.init_weights is True else random
        second = starts.zeros if self.init_weights == "lycoris" else random
        kernel = tuple(f"kernel_{i}" for i in range(len(site.kernel)))
        if self.decompose_both and r < max(o1, i1) / 2:
            wanted = {
                "A1": Param("lokr_w1_a", ("o1", "r"), (o1, r), first),
                "B1": Param("lokr_w1_b", ("r", "i1"), (r, i1), random),
            }
        else:
            wanted = {"W1": Param("lokr_w1", ("o1", "i1"), (o1, i1), first)}
        if r >= max(o2, i2) / 2:
            wanted["W2"] = Param("lokr_w2", ("o2", "i2", *kernel), (o2, i2, *site.kernel), second)
        elif self.is_tensor(site):
            wanted["T2"] = self.core("lokr_t2", site)
            wanted["A2"] = Param("lokr_w2_a", ("r", "o2"), (r, o2), random)
            wanted["B2"] = Param("lokr_w2_b", ("r", "i2"), (r, i2), second)
        else:
            columns = i2 * math.prod(site.kernel)
            wanted["A2"] = Param("lokr_w2_a", ("o2", "r"), (o2, r), random)
            wanted["B2"] = Param("lokr_w2_b", ("r", "i2 x kernel"), (r, columns), second)
        return wanted

    def pair(self, p: Params, site: Site) -> tuple[Tensor, Tensor]:
        """s W1 (o1, i1) and W2 (o2, i2 x kernel)."""
        first = self.scaling(site) * (p["W1"] if "W1" in p else p["A1"] @ p["B1"])
        if "W2" in p:
            return first, p["W2"].flatten(1)
        if "T2" in p:
            return first, torch.einsum("ijkl,io,jc->ockl", p["T2"], p["A2"], p["B2"]).flatten(1)
        return first, p["A2"] @ p["B2"]

    def delta(self, p: Params, base: BaseLayer) -> Tensor:
        first, second = self.pair(p, base.site)
        if base.site.kind == "conv1d" and "W2" in p:
            return torch.kron(first, p["W2"]).reshape(base.site.out, -1)
        return torch.kron(first, second)

    def forward(self, p: Params, base: BaseLayer, x: Tensor, enter: Enter) -> Tensor:
        frozen = None if self.is_thinned(p) else fused.exactly(base, x, *p.values())
        if not frozen:
            return super().forward(p, base, x, enter)
        return fused.changed_by_kronecker(x, *frozen, *self.pair(p, base.site))

    def added(self, p: Params, base: BaseLayer, x: Tensor) -> Tensor:
        y = base.apply(self.delta(p, base), x)
        return self.thinned(y, p, base.site, is_rescaled=self.rank_dropout_scale)


def factors(size: int, limit: int) -> tuple[int, int]:
    """Two factors of `size`: `limit` first where it divides; else the first is the largest up to the root and to
    `limit`, -1 for none."""
    if limit > 0 and size % limit == 0:
        return limit, size // limit
    bound = math.isqrt(size) if limit < 0 else min(math.isqrt(size), limit)
    first = next(n for n in range(bound, 0, -1) if size % n == 0)
    return first, size // first
