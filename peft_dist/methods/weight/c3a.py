"""C3A: dW is made of (b, b) circulant blocks, C[r, c] = w[(c - r) mod b], divided by in.

Chen et al. 2024, arXiv:2407.19342. On activations each block is a product of Fourier transforms. Several active
adapters add, each taken of the layer's own input (HF PEFT gives the second one the first one's output).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from peft_dist import starts
from peft_dist.config import TargetedConfig
from peft_dist.contract import BaseLayer, Param, Params, Site
from peft_dist.errors import ConfigError, suggest
from peft_dist.lazy import lazy
from peft_dist.methods.weight.bias import BiasedMethod
from peft_dist.targets import by_pattern

if TYPE_CHECKING:
    from torch import Tensor

torch = lazy("torch")

_STARTS = ("gaussian", "kaiming_uniform", "xavier_uniform")


@dataclass
class C3AConfig(TargetedConfig, BiasedMethod):
    """HF PEFT's C3AConfig.

    Args:
        block_size: b, which divides in and out.
        bias: which biases are trained too: none, all, or those of the targets (c3a_only).
        layers_to_transform: indices of the layers to adapt; all where None.
        layers_pattern: name of the list of layers that those indices count.
        block_size_pattern: other sizes, by regular expressions on the ends of layers' names.
        init_weights: True: start at 0, which changes nothing; gaussian, kaiming_uniform or xavier_uniform: at
            random; False is xavier_uniform.
    """

    block_size: int = 256
    target_modules: list[str] | str | None = None
    bias: str = "none"
    modules_to_save: list[str] | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    block_size_pattern: dict[str, int] | None = field(default_factory=dict)
    init_weights: bool | str | None = "xavier_uniform"

    prefix: ClassVar[str] = "c3a_"
    own_biases: ClassVar[str] = "c3a_only"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = "C3A"
        self.check_layers(alone=False)
        self.check_bias()
        if self.init_weights not in (True, False, *_STARTS):
            raise ConfigError(
                f"C3AConfig.init_weights: {self.init_weights!r} is not one of True, False, "
                f"{', '.join(map(repr, _STARTS))}.{suggest(str(self.init_weights), _STARTS)}"
            )

    def size(self, site: Site) -> int:
        """b at `site`."""
        return by_pattern(self.block_size_pattern or {}, site.name, self.block_size)

    def facts(self, site: Site) -> dict[str, Any]:
        return {"block_size": self.size(site)}

    def params(self, site: Site) -> dict[str, Param]:
        b = self.size(site)
        for side, size in (("in", site.in_), ("out", site.out)):
            if b < 1 or size % b:
                raise ConfigError(
                    f"C3AConfig.block_size: {b!r} does not divide {side} = {size} of {site.name}. Choose a "
                    f"divisor of {math.gcd(site.in_, site.out)}, for this layer by block_size_pattern."
                )
        shape = (site.out // b, site.in_ // b, b)
        kernel = Param("c3a_kernel", ("out/b", "in/b", "b"), shape, self._start(site))
        return {"kernel": kernel, **self.bias_params(site)}

    def _start(self, site: Site):
        if self.init_weights is True:
            return starts.zeros
        if self.init_weights == "gaussian":
            return starts.normal
        bound = math.sqrt(
            1 / site.in_ if self.init_weights == "kaiming_uniform" else 6 / (site.in_ + site.out)
        )
        return starts.uniform(bound)

    def delta(self, p: Params, base: BaseLayer) -> Tensor:
        b = p["kernel"].shape[-1]
        index = torch.arange(b, device=p["kernel"].device)
        blocks = p["kernel"][:, :, (index - index[:, None]) % b]
        return blocks.transpose(1, 2).reshape(base.shape) / base.site.in_

    def added(self, p: Params, base: BaseLayer, x: Tensor) -> Tensor:
        # There is no transform in half precision.
        w = p["kernel"].to(torch.promote_types(p["kernel"].dtype, torch.float32))
        b = w.shape[-1]
        X = torch.fft.rfft(x.to(w.dtype).unflatten(-1, (-1, b)))
        Y = torch.einsum("...nf,mnf->...mf", X, torch.fft.rfft(w).conj())
        y = torch.fft.irfft(Y, b).flatten(-2) / base.site.in_
        return self.with_bias(y.to(x.dtype), p, base)
