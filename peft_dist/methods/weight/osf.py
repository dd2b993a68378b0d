"""OSF: W = U_high S_high V_high + U_low S_low V_low by its singular values; the low part is trained, with the
gradients of U_low and V_low kept orthogonal to the high part: dW = U_low S_low V_low - (its start).

Nayak et al. 2025, arXiv:2504.07097. Beside the trained factors, as HF PEFT names them, a file holds their start
and what projects the gradients, so that loading needs no decomposition; HF PEFT ignores these and decomposes
again, and its own files are read by decomposing again. Several active adapters add; HF PEFT runs the first only.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from peft_dist import starts
from peft_dist.config import TargetedConfig
from peft_dist.contract import BaseLayer, Enter, Param, Params, Site, WeightMethod
from peft_dist.errors import ConfigError
from peft_dist.lazy import lazy

if TYPE_CHECKING:
    from torch import Tensor

torch, fused = lazy("torch"), lazy("peft_dist.fused")


@dataclass
class OSFConfig(TargetedConfig, WeightMethod):
    """HF PEFT's OSFConfig.

    Args:
        effective_rank: singular values that stay frozen: a number, or a share in (0, 1] of min(out, in); half of
            them where None.
        rank_pattern: other ranks, by regular expressions that are searched for in layers' names.
        init_weights: True: start at W's own factors, which changes nothing; False: at random.
        target_svd_config: has no effect, as in HF PEFT; kept for checkpoints.
    """

    effective_rank: int | float | None = None
    target_modules: list[str] | str | None = None
    rank_pattern: dict[str, int | float] | None = None
    init_weights: bool | None = True
    modules_to_save: list[str] | None = None
    target_svd_config: dict[str, int] | None = None

    prefix: ClassVar[str] = "osf_"
    full_size: ClassVar[int] = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = "OSF"

    def num_frozen(self, site: Site) -> int:
        """Singular values of the layer that stay frozen."""
        size, rank = min(site.out, site.in_), self.effective_rank
        for pattern, other in (self.rank_pattern or {}).items():
            if re.search(pattern, site.name):
                rank = other
                break
        k = (
            size // 2
            if rank is None
            else int(size * rank)
            if isinstance(rank, float) and rank <= 1
            else int(rank)
        )
        if not 1 <= k < size:
            raise ConfigError(
                f"OSFConfig.effective_rank: {rank!r} keeps {k} of {size} singular values of {site.name} frozen; "
                f"it keeps between 1 and {size - 1}."
            )
        return k

    def facts(self, site: Site) -> dict[str, Any]:
        return {"effective_rank": self.num_frozen(site)}

    def params(self, site: Site) -> dict[str, Param]:
        k = self.num_frozen(site)
        low = min(site.out, site.in_) - k
        shapes = {
            "U_low": (("out", "low"), (site.out, low)),
            "S_low": (("low",), (low,)),
            "V_low": (("low", "in"), (low, site.in_)),
        }
        start = starts.normal if self.init_weights is False else starts.inherit
        wanted = {name: Param(f"osf_svd_params.{name}", *shape, start) for name, shape in shapes.items()}
        for name, shape in shapes.items():
            wanted[f"{name}_0"] = Param(f"osf_start.{name}", *shape, starts.inherit, trainable=False)
        # The factor that is square says by its low part alone what is orthogonal to the high part.
        if site.out > site.in_:
            high = Param("osf_start.U_high", ("out", "high"), (site.out, k), starts.inherit, trainable=False)
            wanted["U_high"] = high
        if site.in_ > site.out:
            high = Param("osf_start.V_high", ("high", "in"), (k, site.in_), starts.inherit, trainable=False)
            wanted["V_high"] = high
        return wanted

    def start_from_base(self, p: Params, base: BaseLayer) -> None:
        k, W = self.num_frozen(base.site), base.weight()
        U, S, V = torch.linalg.svd(W.to(torch.promote_types(W.dtype, torch.float32)), full_matrices=False)
        parts = {"U_low_0": U[:, k:], "S_low_0": S[k:], "V_low_0": V[k:], "U_high": U[:, :k], "V_high": V[:k]}
        if self.init_weights is not False:
            parts |= {"U_low": U[:, k:], "S_low": S[k:], "V_low": V[k:]}
        for name, part in parts.items():
            if name in p:
                p[name].copy_(part)

    def gradient(self, name: str, gradient: Tensor, p: Params) -> Tensor:
        if name == "U_low":
            if "U_high" in p:
                return gradient - p["U_high"] @ (p["U_high"].T @ gradient)
            return p["U_low_0"] @ (p["U_low_0"].T @ gradient)
        if name == "V_low":
            if "V_high" in p:
                return gradient - (gradient @ p["V_high"].T) @ p["V_high"]
            return (gradient @ p["V_low_0"].T) @ p["V_low_0"]
        return gradient

    def delta(self, p: Params, base: BaseLayer) -> Tensor:
        start = (p["U_low_0"] * p["S_low_0"]) @ p["V_low_0"]
        return (p["U_low"] * p["S_low"]) @ p["V_low"] - start

    def added(self, p: Params, base: BaseLayer, x: Tensor) -> Tensor:
        y = base.mix(p["U_low"] * p["S_low"], base.apply(p["V_low"], x))
        return y - base.mix(p["U_low_0"] * p["S_low_0"], base.apply(p["V_low_0"], x))

    def forward(self, p: Params, base: BaseLayer, x: Tensor, enter: Enter) -> Tensor:
        (out, in_), low = base.shape, p["S_low"].shape[0]
        # Products of a step through dW: two to make it and two back, and one with x; through the factors: five
        # with x for each of the two sides.
        tokens = x.numel() // x.shape[-1]
        if 4 * out * in_ * low + tokens * out * in_ < 5 * tokens * low * (out + in_):
            return fused.by_delta(self, p, base, x, enter)
        return super().forward(p, base, x, enter)
