"""MiSS: dW repeats one block D (r, out): dW[o, j] = D[j mod r, o], so y grows by D of x summed over its r-blocks.

Kang 2024, arXiv:2409.15371. `mini` repeats a narrower D along out too. `bat` changes W by products with itself:
each (r, r) block W_mn becomes W_mn + W_mn D_m + D_m, and several active adapters follow each other. Dropout has
no place in `bat`, as in HF PEFT.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from peft_dist import starts
from peft_dist.config import TargetedConfig
from peft_dist.contract import BaseLayer, Enter, Param, Params, Site
from peft_dist.errors import ConfigError
from peft_dist.lazy import lazy
from peft_dist.methods.weight.bias import BiasedMethod

if TYPE_CHECKING:
    from torch import Tensor

torch, fused = lazy("torch"), lazy("peft_dist.fused")


class ShardSharing(BiasedMethod):
    """The method, under whichever name: MiSS, or Bone as HF PEFT called it before."""

    r: int
    init_weights: bool | str
    mini_r: int
    miss_dropout: float

    own_biases: ClassVar[str] = "MiSS_only"

    @property
    def is_bat(self) -> bool:
        """Whether W is changed by products with itself."""
        return self.init_weights == "bat"

    @property
    def compose(self) -> str:  # type: ignore[override]
        return "chain" if self.is_bat else "add"

    @property
    def full_size(self) -> int:  # type: ignore[override]
        return 1 if self.is_bat else 0

    @property
    def dropout(self) -> float:
        return 0.0 if self.is_bat else self.miss_dropout

    def facts(self, site: Site) -> dict[str, Any]:
        return {"miss_r": self.r, "miss_mini_r": self.mini_r}

    def params(self, site: Site) -> dict[str, Param]:
        r, where = self.r, type(self).__name__
        if not 1 <= r <= site.in_:
            raise ConfigError(f"{where}.r: {r!r} at {site.name}; it lies between 1 and in = {site.in_}.")
        dims: tuple[str, ...] = ("r", "out")
        shape: tuple[int, ...] = (r, site.out)
        if self.is_bat:
            if site.in_ % r or site.out % r:
                raise ConfigError(
                    f"{where}.r: {r!r} does not divide both out = {site.out} and in = {site.in_} of "
                    f"{site.name}, as init_weights='bat' needs."
                )
            dims, shape = ("out/r", "r", "r"), (site.out // r, r, r)
        elif self.init_weights == "mini":
            if site.out % self.mini_r:
                raise ConfigError(
                    f"{where}.mini_r: {self.mini_r!r} does not divide out = {site.out} of {site.name}."
                )
            dims, shape = ("r", "mini_r"), (r, self.mini_r)
        start = starts.zeros if self.init_weights else starts.kaiming_uniform
        return {"block": Param(f"{self.prefix}block", dims, shape, start), **self.bias_params(site)}

    def _wide(self, p: Params, base: BaseLayer) -> Tensor:
        """D (r, out)."""
        times = base.site.out // p["block"].shape[1]
        return p["block"].repeat(1, times) if times > 1 else p["block"]

    def delta(self, p: Params, base: BaseLayer) -> Tensor:
        out, in_ = base.shape
        if not self.is_bat:
            return self._wide(p, base).T.repeat(1, -(-in_ // self.r))[:, :in_]
        D, W = p["block"], base.weight().to(p["block"].dtype)
        m, r, _ = D.shape
        product = torch.bmm(W.reshape(m, -1, r), D).view(m, r, -1, r)
        return (product + D[:, :, None]).view(out, in_)

    def added(self, p: Params, base: BaseLayer, x: Tensor) -> Tensor:
        if self.is_bat:
            return super().added(p, base, x)
        rest = -x.shape[-1] % self.r
        padded = torch.nn.functional.pad(x, (0, rest)) if rest else x
        return self.with_bias(padded.unflatten(-1, (-1, self.r)).sum(-2) @ self._wide(p, base), p, base)

    def forward(self, p: Params, base: BaseLayer, x: Tensor, enter: Enter) -> Tensor:
        if self.is_bat:
            return fused.by_delta(self, p, base, x, enter)
        frozen, entered = fused.plain(base, x, p["block"]), enter(x)
        if frozen is None or entered is not x or x.shape[-1] % self.r:
            return base(x) + self.added(p, base, entered)
        return self.with_bias(fused.pooled(x, *frozen, self._wide(p, base)), p, base)


@dataclass
class MissConfig(TargetedConfig, ShardSharing):
    """HF PEFT's MissConfig.

    Args:
        r: rows of D, from 1 to in; with `bat` it divides in and out.
        miss_dropout: share of the branch's input that is zeroed while training, in [0, 1).
        mini_r: columns of D with `mini`; divides out.
        init_weights: True: D starts at 0, which changes nothing; False: at random; "bat" and "mini": the
            variants, from 0.
        layers_to_transform: indices of the layers to adapt; all where None.
        layers_pattern: name of the list of layers that those indices count.
        bias: which biases are trained too: none, all, or those of the targets (MiSS_only).
    """

    r: int = 64
    miss_dropout: float = 0.0
    mini_r: int = 1
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    init_weights: bool | str = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    bias: str = "none"
    modules_to_save: list[str] | None = None

    prefix: ClassVar[str] = "miss_"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = "MISS"
        self.check_layers(alone=False)
        self.check_bias()
        if self.init_weights not in (True, False, "bat", "mini"):
            raise ConfigError(
                f"MissConfig.init_weights: {self.init_weights!r} is not one of True, False, 'bat', 'mini'."
            )
        if not 0 <= self.miss_dropout < 1:
            raise ConfigError(f"MissConfig.miss_dropout: {self.miss_dropout!r}; it lies in [0, 1).")
        if self.mini_r < 1:
            raise ConfigError(f"MissConfig.mini_r: {self.mini_r!r}; it is at least 1.")
