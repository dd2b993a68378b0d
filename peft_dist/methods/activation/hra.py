"""HRA: W' = W H_1 ... H_r with reflections H = I - 2 u u^T / |u|^2; with `apply_GS` the u are made orthogonal first.

Yuan et al. 2024, arXiv:2405.17484. Their product is I - U T U^T with T^-1 = I / 2 + the strictly upper part of
U^T U, u of length 1, so that activations are turned at the cost of rank r. Pairs of equal u cancel each other:
that is the start where r is even. With `apply_GS` equal u would leave nothing to make orthogonal, and no start
can be neutral: here each is drawn by itself (HF PEFT divides what rounding leaves of the second by its length).
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from peft_dist import starts
from peft_dist.config import TargetedConfig
from peft_dist.contract import BaseLayer, Enter, Param, Params, Site
from peft_dist.errors import ConfigError
from peft_dist.lazy import lazy
from peft_dist.methods.activation.turning import Turning
from peft_dist.methods.weight.bias import OwnBias

if TYPE_CHECKING:
    from torch import Tensor

torch, fused = lazy("torch"), lazy("peft_dist.fused")


@dataclass
class HRAConfig(TargetedConfig, OwnBias, Turning):
    """HF PEFT's HRAConfig.

    Args:
        r: number of reflections, from 1 to in.
        apply_GS: make the reflections' directions orthogonal (Gram-Schmidt).
        init_weights: True: start at pairs that cancel each other, where r is even; False: at random.
        layers_to_transform: indices of the layers to adapt; all where None.
        layers_pattern: name of the list of layers that those indices count.
        bias: which biases are trained too: none, all, or those of the targets (hra_only).
    """

    r: int = 8
    apply_GS: bool = False
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    init_weights: bool = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    bias: str = "none"
    modules_to_save: list[str] | None = None

    prefix: ClassVar[str] = "hra_"
    own_biases: ClassVar[str] = "hra_only"
    layers: ClassVar[frozenset[str]] = frozenset({"linear", "conv1d", "conv2d", "conv3d"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = "HRA"
        self.check_layers()
        self.check_bias()

    def facts(self, site: Site) -> dict[str, Any]:
        return {"hra_r": self.r, "hra_apply_GS": self.apply_GS}

    def params(self, site: Site) -> dict[str, Param]:
        if not 1 <= self.r <= site.in_:
            raise ConfigError(
                f"HRAConfig.r: {self.r!r} at {site.name}; it lies between 1 and in = {site.in_}."
            )
        start = starts.kaiming_uniform
        if self.init_weights and not self.apply_GS:
            start = pairs
            if self.r % 2:
                warnings.warn(
                    f"HRAConfig.r: {self.r} is odd, so the adapter does not start as no change.", stacklevel=2
                )
                start = starts.kaiming_uniform
        return {"u": Param("hra_u", ("in", "r"), (site.in_, self.r), start), **self.bias_params(site)}

    def _product(self, p: Params) -> tuple[Tensor, Tensor]:
        """U (in, r) and V (r, in) with H_1 ... H_r = I - U V."""
        u = p["u"].to(torch.promote_types(p["u"].dtype, torch.float32))
        if self.apply_GS:
            U = torch.linalg.qr(u)[0]
            return U.to(p["u"].dtype), (2 * U.T).to(p["u"].dtype)
        U = u / u.norm(dim=0)
        half = torch.eye(U.shape[1], dtype=U.dtype, device=U.device) / 2
        V = torch.linalg.solve_triangular(half + (U.T @ U).triu(1), U.T, upper=True)
        return U.to(p["u"].dtype), V.to(p["u"].dtype)

    def before(self, p: Params, base: BaseLayer, x: Tensor) -> Tensor:
        U, V = self._product(p)
        rows = x.to(U.dtype).flatten(0, -2)
        return torch.addmm(rows, rows @ V.T, U.T, alpha=-1).view(x.shape)

    def after(self, p: Params, base: BaseLayer, y: Tensor) -> Tensor:
        return self.with_bias(y, p, base)

    def forward(self, p: Params, base: BaseLayer, x: Tensor, enter: Enter) -> Tensor:
        frozen = fused.exactly(base, x, p["u"])
        if not frozen:
            return super().forward(p, base, x, enter)
        return self.with_bias(fused.reflected(x, *frozen, *self._product(p)), p, base)

    def drawn_delta(self, p: Params, base: BaseLayer) -> Tensor:
        U, V = self._product(p)
        return -(base.weight().to(U.dtype) @ U) @ V


def pairs(t: Tensor) -> Tensor:
    """Columns two by two the same, at random."""
    half = starts.kaiming_uniform(t.new_empty(t.shape[0], t.shape[1] // 2))
    return t.copy_(half.repeat_interleave(2, 1))
