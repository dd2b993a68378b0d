"""GraLoRA: dW = s x a grid of k x k blocks, each with a low rank r / k of its own, s = alpha / (r + hybrid_r);
with `hybrid_r` a plain LoRA of that rank beside it.

Jung et al. 2025, arXiv:2505.20355. Block column n of the input has A_n (in / k, r), block row j of the output
B_j (r, out / k); the block (j, n) takes the j-th part of A_n's columns and the n-th part of B_j's rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from peft_dist import starts
from peft_dist.config import TargetedConfig
from peft_dist.contract import BaseLayer, Param, Params, Site
from peft_dist.errors import BaseLayerError, ConfigError
from peft_dist.lazy import lazy
from peft_dist.methods.weight.bias import BiasedMethod

if TYPE_CHECKING:
    from torch import Tensor

torch = lazy("torch")


@dataclass
class GraloraConfig(TargetedConfig, BiasedMethod):
    """HF PEFT's GraloraConfig.

    Args:
        r: rank of the grid, at least 1; gralora_k divides it.
        hybrid_r: rank of the plain LoRA beside it, 0 for none.
        alpha: scales the update by alpha / (r + hybrid_r).
        gralora_dropout: share of the branch's input that is zeroed while training, in [0, 1).
        gralora_k: blocks to a side, at least 1; divides the sizes of every target.
        fan_in_fan_out: the weight is stored (in, out); known from the layer, kept for checkpoints.
        bias: which biases are trained too: none, all, or those of the targets (gralora_only).
        init_weights: True: B is zero; False: both are random.
        layers_to_transform: indices of the layers to adapt; all where None.
        layers_pattern: name of the list of layers that those indices count.
    """

    r: int = 32
    hybrid_r: int = 0
    target_modules: list[str] | str | None = None
    alpha: int = 64
    gralora_dropout: float = 0.0
    gralora_k: int = 2
    fan_in_fan_out: bool = False
    bias: str = "none"
    modules_to_save: list[str] | None = None
    init_weights: bool = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: str | None = None

    prefix: ClassVar[str] = "gralora_"
    own_biases: ClassVar[str] = "gralora_only"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = "GRALORA"
        self.check_bias()
        for name, least in (("r", 1), ("gralora_k", 1), ("hybrid_r", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise ConfigError(f"GraloraConfig.{name}: {value!r}; a whole number of at least {least}.")
        if self.r % self.gralora_k:
            raise ConfigError(
                f"GraloraConfig.r: {self.r}; gralora_k, which is {self.gralora_k}, must divide it."
            )
        if not 0 <= self.gralora_dropout < 1:
            raise ConfigError(f"GraloraConfig.gralora_dropout: {self.gralora_dropout!r}; it lies in [0, 1).")

    @property
    def dropout(self) -> float:
        return self.gralora_dropout

    @property
    def scaling(self) -> float:
        """s."""
        return self.alpha / (self.r + self.hybrid_r)

    def params(self, site: Site) -> dict[str, Param]:
        k, r, h = self.gralora_k, self.r, self.hybrid_r
        for name, size in (("in", site.in_), ("out", site.out)):
            if size % k:
                raise BaseLayerError(
                    f"{site.name}: gralora_k {k} does not divide its {name} size {size}. Choose one that "
                    "divides the sizes of every target, or leave this layer out."
                )
        last = starts.zeros if self.init_weights else starts.kaiming_uniform
        a_shape, b_shape = (k, site.in_ // k, r), (k, r, site.out // k)
        wanted = {
            "A": Param("gralora_A", ("k", "in / k", "r"), a_shape, starts.transposed(starts.kaiming_uniform)),
            "B": Param("gralora_B", ("k", "r", "out / k"), b_shape, starts.transposed(last)),
            **self.bias_params(site),
        }
        if h:
            first = starts.kaiming_uniform
            wanted["A_whole"] = Param("gralora_A_general.weight", ("hybrid r", "in"), (h, site.in_), first)
            wanted["B_whole"] = Param("gralora_B_general.weight", ("out", "hybrid r"), (site.out, h), last)
        return wanted

    def facts(self, site: Site) -> dict[str, Any]:
        names = ("r", "hybrid_r", "alpha", "scaling", "gralora_k")
        return {name: getattr(self, name) for name in names}

    def delta(self, p: Params, base: BaseLayer) -> Tensor:
        k = self.gralora_k
        A, B = p["A"].unflatten(2, (k, -1)), p["B"].unflatten(1, (k, -1))
        dW = torch.einsum("nijs,jnso->joni", A, B).reshape(base.shape)
        if self.hybrid_r:
            dW = dW + p["B_whole"] @ p["A_whole"]
        return self.scaling * dW

    def added(self, p: Params, base: BaseLayer, x: Tensor) -> Tensor:
        k, rows = self.gralora_k, x.flatten(0, -2) if x.ndim > 1 else x[None]
        h = torch.bmm(rows.unflatten(1, (k, -1)).transpose(0, 1), self.scaling * p["A"])
        # (n, rows, j, s) as (j, rows, n, s): what the blocks of a column found goes to each row of blocks.
        h = h.unflatten(2, (k, -1)).transpose(0, 2).flatten(2)
        y = torch.bmm(h, p["B"]).transpose(0, 1).reshape(*x.shape[:-1], -1)
        if self.hybrid_r:
            y = y + base.mix(p["B_whole"], base.apply(self.scaling * p["A_whole"], x))
        return self.with_bias(y, p, base)
