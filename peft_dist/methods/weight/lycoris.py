"""What LoHa and LoKr share, as LyCORIS has it (Yeh et al. 2024, arXiv:2309.14859): their scale alpha / r, the
core of a decomposed kernel, and what chance leaves out of a training step, drawn once for all rows."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar

from peft_dist import starts
from peft_dist.contract import Draw, Param, Params, Site, WeightMethod
from peft_dist.errors import ConfigError
from peft_dist.targets import by_pattern

if TYPE_CHECKING:
    from torch import Tensor


class LycorisMethod(WeightMethod):
    """A method whose config has these fields."""

    layers: ClassVar[frozenset[str]] = frozenset({"linear", "conv1d", "conv2d"})

    r: int
    alpha: int
    rank_dropout: float
    module_dropout: float
    use_effective_conv2d: bool
    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, float]

    def check(self) -> None:
        """Refuses values out of range."""
        name = type(self).__name__
        ranks = {"r": self.r, **{f"rank_pattern[{key!r}]": r for key, r in (self.rank_pattern or {}).items()}}
        for field, r in ranks.items():
            if not isinstance(r, int) or r < 1:
                raise ConfigError(f"{name}.{field}: {r!r}; a rank is a whole number of at least 1.")
        for field, share in (("rank_dropout", self.rank_dropout), ("module_dropout", self.module_dropout)):
            if not 0 <= share < 1:
                raise ConfigError(f"{name}.{field}: {share!r}; it lies in [0, 1).")

    def rank(self, site: Site) -> int:
        """r at `site`."""
        return by_pattern(self.rank_pattern or {}, site.name, self.r)

    def scaling(self, site: Site) -> float:
        """s at `site`."""
        return by_pattern(self.alpha_pattern or {}, site.name, self.alpha) / self.rank(site)

    def facts(self, site: Site) -> dict[str, Any]:
        alpha = by_pattern(self.alpha_pattern or {}, site.name, self.alpha)
        chance = {name: getattr(self, name) for name in ("rank_dropout", "module_dropout")}
        return {"r": self.rank(site), "alpha": alpha, "scaling": self.scaling(site), **chance}

    def is_tensor(self, site: Site) -> bool:
        """Whether the kernel of `site` is decomposed too."""
        return self.use_effective_conv2d and math.prod(site.kernel) > 1

    def core(self, key: str, site: Site) -> Param:
        """T (r, r, kernel) of a decomposed kernel; two axes for it, also where it has one."""
        sizes, r = (*site.kernel, 1)[:2], self.rank(site)
        dims = ("kernel_0", "1") if len(site.kernel) == 1 else ("kernel_0", "kernel_1")
        return Param(key, ("r", "r", *dims), (r, r, *sizes), starts.kaiming_uniform)

    def draws(self, site: Site) -> dict[str, Draw]:
        wanted = {"rows_kept": Draw((site.out,))} if self.rank_dropout else {}
        return {**wanted, "kept": Draw((1,))} if self.module_dropout else wanted

    def is_thinned(self, p: Params) -> bool:
        """Whether chance leaves something out."""
        return "rows_kept" in p or "kept" in p

    def thinned(self, y: Tensor, p: Params, site: Site, is_rescaled: bool = True) -> Tensor:
        """y, what dW adds, without what chance leaves out; the rest of the rows rescaled to the same mean."""
        if "rows_kept" in p:
            keep = (p["rows_kept"] > self.rank_dropout).to(y.dtype)
            if is_rescaled:
                keep = keep / keep.mean().clamp(min=1 / len(keep))
            y = y * keep.view(-1, *(1,) * len(site.kernel))
        return y * (p["kept"] > self.module_dropout) if "kept" in p else y
